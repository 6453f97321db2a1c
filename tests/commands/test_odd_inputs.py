"""Random invalid data from hypothesis: they are used, or refused in one line with the place."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from bqnn.checkpoints.recipe import make_recipe
from bqnn.data.base import Rows
from bqnn.data.csv_table import CSVData
from bqnn.data.image_folder import read_image_folder
from bqnn.data.tables import TableData
from bqnn.data.uci import UCIData
from bqnn.inference.likelihoods import Classification, Regression, likelihood_from
from bqnn.inference.predictions import Prediction, score
from bqnn.methods import METHODS
from bqnn.nets import MLP
from tests.bare_trainer import bare_trainer
from tests.small_methods import made

settings.register_profile("bqnn", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("bqnn")

NUMBERS = st.one_of(
    st.integers(-5, 5),
    st.integers(-(2**63), 2**63),
    st.floats(-1e6, 1e6),
    st.floats(),  # NaN, infinity, and the ends of float64
)
FINITE = st.one_of(st.integers(-5, 5), st.floats(-1e6, 1e6), st.sampled_from([1e-300, 1e30]))


@st.composite
def tables(draw: st.DrawFn, cells: st.SearchStrategy[float] = NUMBERS) -> list[list[float]]:
    """Draw 2 to 12 rows of 2 to 5 numbers, some columns constant; the last one is the target."""
    num_rows, num_columns = draw(st.integers(2, 12)), draw(st.integers(2, 5))
    columns = [
        draw(
            st.one_of(
                st.lists(cells, min_size=num_rows, max_size=num_rows),
                cells.map(lambda cell: [cell] * num_rows),
            )
        )
        for _ in range(num_columns)
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def write_table(data_dir: Path, table: list[list[float]], num_test: int = 1) -> Path:
    folder, num_columns, num_rows = data_dir / "uci" / "t" / "data", len(table[0]), len(table)
    rows = [str(row) for row in range(num_rows)]
    write(
        folder,
        data="\n".join(" ".join(map(repr, row)) for row in table),
        index_features=" ".join(map(str, range(num_columns - 1))),
        index_target=str(num_columns - 1),
        n_splits="1",
        index_test_0="\n".join(rows[:num_test]),
        index_train_0="\n".join(rows[num_test:]),
    )
    return folder


def read(data_dir: str) -> UCIData:
    data = UCIData("t", data_dir=data_dir, validation_share=0.0, batch_size=4)
    data.prepare_data()
    data.setup()
    return data


def attempt(action: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """Return the result and an empty string, or None and the error message of one line."""
    try:
        return action(*arguments), ""
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) > 10
    return None, said


# ---- tables


@given(tables())
@example([[1.0, 2.0], [1e200, 3.0], [-1e200, 4.0]])  # its square is no float64
@example([[1e39, 2.0], [1.0, 3.0], [1.0, 4.0]])  # a test row that is no float32
@example([[1.0, 5e-324], [2.0, 0.0], [3.0, 5e-324]])
@example([[0.0, 1.0], [2**63, 1.0], [2**63, 1.0]])
def test_a_table_is_standardized_or_refused_by_file(table: list[list[float]]) -> None:
    with tempfile.TemporaryDirectory() as data_dir:
        folder = write_table(Path(data_dir), table)
        data, refusal = attempt(read, data_dir)
    if data is None:
        if np.isfinite(table).all():
            assert "too far" in refusal or "exceed float64" in refusal
        else:
            assert str(folder / "data.txt") in refusal
        return
    assert np.isfinite(table).all()
    for rows in (data.train, data.test):
        assert rows.inputs.dtype == rows.targets.dtype == torch.float32
        assert rows.inputs.isfinite().all()
        assert rows.targets.isfinite().all()
    assert data.train.inputs.abs().max() <= len(table) ** 0.5 + 1e-3  # of a standard deviation of 1
    make_recipe({"seed": 0, **CONFIG}, data.facts())


CONFIG = {
    "method": {"name": "pointwise", "optimizer": {"name": "adam"}},
    "net": {"name": "mlp"},
    "task": {"name": "t", "dataset": "uci"},
}
TEXTS = st.one_of(st.text(max_size=20), st.text("0123456789 .-+e#_,;xnaif\n\t", max_size=20))


@given(
    st.sampled_from(["data", "index_features", "index_target", "n_splits", "index_train_0"]), TEXTS
)
@example("data", "# 1 2 3")
@example("n_splits", "1e400")
@example("index_train_0", "")
def test_any_text_in_a_file_is_read_or_refused_with_its_path(name: str, text: str) -> None:
    assume("\x00" not in text)
    with tempfile.TemporaryDirectory() as data_dir, warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning in place of an answer
        folder = write_table(Path(data_dir), [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 10.0]])
        try:
            write(folder, **{name: text})
        except UnicodeEncodeError:
            return
        data, refusal = attempt(read, data_dir)
    if data is None:
        assert str(folder) in refusal or "too" in refusal
    else:
        assert data.train.inputs.isfinite().all()


# ---- training


class Given(TableData):
    """A table in memory: the first row is for testing, the others are for training."""

    def __init__(self, table: list[list[float]], batch_size: int) -> None:
        super().__init__(data_dir="", seed=0, batch_size=batch_size, validation_share=0.0)
        self.table = torch.tensor(table, dtype=torch.float64)

    def _read(self) -> tuple[Rows, Rows]:
        rows = Rows(self.table[:, :-1], self.table[:, -1])
        return rows.take(torch.arange(1, len(rows))), rows.take(torch.arange(1))


OPTIONS = {
    "pointwise": {"optimizer": {"name": "adam", "lr": 1e-2}},
    "bbb": {
        "prior_std": 1.0,
        "init_rho": -3.0,
        "beta": 1.0,
        "optimizer": {"name": "adam", "lr": 1e-2},
    },
    "mcdropout": {
        "rate": 0.5,
        "drop_before_output": True,
        "optimizer": {"name": "adam", "lr": 1e-2},
    },
    "sghmc": {
        "burn_in": 1,
        "collect_every": 1,
        "num_members": 2,
        "schedule": "constant",
        "optimizer": {"name": "sghmc", "lr": 1e-3},
    },
    "ensemble": {"num_members": 2, "optimizer": {"name": "adam", "lr": 1e-2}},
    "swag": {"swa_start": 0.0, "swa_lr": 1e-2, "optimizer": {"name": "adam", "lr": 1e-2}},
    "laplace": {"prior": 0.1, "optimizer": {"name": "adam", "lr": 1e-2}},
}


def trained_metrics(name: str, table: list[list[float]], batch_size: int) -> dict[str, float]:
    data = Given(table, batch_size)
    data.setup()
    facts = data.facts()
    torch.manual_seed(0)
    net = MLP(data.train.inputs.shape[1:], [1, 1], hidden_features=[8])
    options: dict[str, Any] = {"num_train": len(data.train), "seed": 0, "num_samples": 2}
    method = made(name, net, likelihood_from(facts), **options, **OPTIONS[name])
    trainer = bare_trainer(2, inference_mode=False)
    trainer.fit(method, datamodule=data)
    return dict(trainer.test(method, datamodule=data, verbose=False)[0])


@settings(max_examples=6)
@given(tables(FINITE), st.integers(1, 5))
@example([[1.0, 2.0], [3.0, 4.0]], 1)  # one training row
@example([[float(x), x % 2] for x in range(8)], 3)  # 7 rows: the last batch has one
@example([[1.0, 2.0]] * 5, 4)  # constant features and targets
@example([[float(x)] * 3000 for x in range(4)], 2)  # thousands of columns
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_finite_rows(
    name: str, table: list[list[float]], batch_size: int
) -> None:
    metrics, refusal = attempt(trained_metrics, name, table, batch_size)
    if metrics is None:  # the test row is too far from the others
        assert "too" in refusal or "not finite" in refusal
    else:
        assert np.isfinite(list(metrics.values())).all()


# ---- evaluation


@given(
    st.integers(1, 3),
    st.lists(st.integers(0, 3), min_size=1, max_size=6),  # often a class is missing
    st.floats(0, 1e30),
    st.integers(0, 100),
)
def test_metrics_of_any_finite_logits_are_finite(
    num_samples: int, targets: list[int], size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    samples = size * torch.randn(num_samples, len(targets), 4)
    metrics = score(Prediction(Classification(list("abcd")), samples, torch.tensor(targets)))
    assert np.isfinite(list(metrics.values())).all()
    assert 0 <= metrics["ece"] <= 1
    assert 0 <= metrics["brier"] <= 2


@given(st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, 5), st.booleans())
def test_a_sample_that_is_not_finite_is_never_scored(
    value: float, row: int, is_table: bool
) -> None:
    likelihood = Regression(0.0, 1.0) if is_table else Classification(["a", "b"])
    targets = torch.zeros(6) if is_table else torch.zeros(6, dtype=torch.int64)
    samples = torch.zeros(3, 6, 2)
    samples[1, row, 1] = value
    with pytest.raises(ValueError, match="1 of 6 rows have a non-finite sample"):
        score(Prediction(likelihood, samples, targets))


# ---- CSV files

CELLS = st.one_of(
    st.text(max_size=5),
    st.floats().map(repr),
    st.integers().map(str),
    st.sampled_from(["a", "b", "1,5", "NA", '"x"', "true", "2024-01-01", "-nan", "1e999", "\x00"]),
)
OPTIONS_OF_TABLES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["auto", "regression", "classification"]),
        "missing": st.sampled_from(["refuse", "drop"]),
        "decimal": st.sampled_from(["point", "comma"]),
        "target": st.sampled_from([-1, 0, "b"]),
        "categories": st.sampled_from([[], [1]]),
    }
)


def read_csv_table(content: bytes, options: dict[str, Any]) -> CSVData:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        path.write_bytes(content)
        data = CSVData(str(path), **options, validation_share=0.0)
        data.setup()
    return data


def check_csv_table(content: bytes, options: dict[str, Any]) -> None:
    data, refusal = attempt(read_csv_table, content, options)
    if data is None:
        assert refusal.isprintable()
        return
    for part in (data.train, data.test):
        assert part.inputs.isfinite().all()
        assert part.targets.isfinite().all()
    task = {"name": "t", "dataset": "table"}
    make_recipe({"seed": 0, **CONFIG, "task": task}, data.facts())


@settings(max_examples=200)
@given(st.binary(max_size=100), OPTIONS_OF_TABLES)
@example(b"a,b\n1,2\n", {"target": -1})
@example(b",,,\n1,2\n", {"target": -1})
@example(b"a\n1\n2\n", {"target": 0})
def test_bytes_of_a_csv_file_are_a_table_or_refused(content: bytes, options: dict) -> None:
    check_csv_table(content, options)


@settings(max_examples=300)
@given(st.lists(st.lists(CELLS, min_size=3, max_size=3), max_size=8), OPTIONS_OF_TABLES)
@example([["1", "a", "2"]] * 5, {"target": -1})
@example([["1", "a", "2"], ["1e150", "b", "-1e150"]] * 5, {"target": -1})
def test_cells_of_a_csv_file_are_used_or_refused(cells: list[list[str]], options: dict) -> None:
    lines = ["a,b,c", *(",".join(row) for row in cells)]
    check_csv_table("\n".join(lines).encode(errors="surrogatepass"), options)


# ---- images


@settings(max_examples=15)
@given(st.binary(max_size=200), st.sampled_from([".png", ".jpg", ".bmp", ".webp"]))
@example(b"", ".png")
@example(b"\x89PNG\r\n\x1a\n", ".png")
@example(b"BM" + bytes(60), ".bmp")
def test_bytes_that_are_not_an_image_are_refused_with_their_path(
    content: bytes, extension: str
) -> None:
    with tempfile.TemporaryDirectory() as root:
        for part in ("train", "test"):
            folder = Path(root) / part / "cat"
            folder.mkdir(parents=True)
            (folder / f"a{extension}").write_bytes(content)
        _, refusal = attempt(read_image_folder, Path(root))
        assert f"train/cat/a{extension} " in refusal
