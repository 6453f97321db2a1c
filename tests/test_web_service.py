"""The web service of the examples answers many threads as it answers one."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bqnn
from tests.checkpoints.test_model import TABLE, model_of
from tests.running import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Create a folder with the checkpoint of a Bayesian network for a table."""
    model = model_of(TABLE)
    state = model.method.state_dict()
    content = {"state_dict": state, "recipe": model.recipe, "epoch": 1}
    torch.save(content, tmp_path / "checkpoint.ckpt")
    return tmp_path


@pytest.fixture
def client(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from fastapi.testclient import TestClient

    monkeypatch.setenv("MODEL", str(folder))
    path = ROOT / "examples" / "web_service.py"
    spec = importlib.util.spec_from_file_location("web_service", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return TestClient(module.app)


def test_eight_threads_get_the_answers_of_serial_calls(client: Any, folder: Path) -> None:
    rows = np.random.default_rng(0).normal([80, 3], [20, 1], (40, 2))
    requests = [{"rows": part.tolist()} for part in np.split(rows, 20)]

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        response = client.post("/predict", json=request)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    serial = [ask(request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, requests)) == serial
    model = bqnn.load(folder)
    for request, answer in zip(requests, serial, strict=True):
        expected = model.predict(request["rows"])
        assert answer == {name: getattr(expected, name).tolist() for name in answer}
        assert set(answer) == {"mean", "std", "aleatoric", "epistemic"}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "at least 1 item"),
        ([[1, 2]] * 1001, "at most 1000 items"),
        ([[1, 2, 3]], "2 features"),
        ([["a", "b"]], "rows"),
        ([[None, 1]], "rows"),
        ("text", "list"),
    ],
)
def test_bad_requests_get_a_reason(client: Any, rows: Any, reason: str) -> None:
    response = client.post("/predict", json={"rows": rows})
    assert response.status_code == 422
    assert reason in response.text
