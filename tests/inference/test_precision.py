"""full_precision makes float32 products exact, and restores the setting."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bqnn.inference.precision import PLACES, full_precision
from bqnn.inference.predict import predictive


def precisions() -> list[str]:
    return [place.fp32_precision for place in PLACES]


def fast_by_the_older_interface() -> None:
    torch.set_float32_matmul_precision("medium")


def fast_by_the_newer_interface() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]


def fast_everywhere() -> None:
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]


def exact_already() -> None:
    torch.backends.cudnn.allow_tf32 = False


SETTINGS = (
    lambda: None,
    fast_by_the_older_interface,
    fast_by_the_newer_interface,
    fast_everywhere,
    exact_already,
)


@pytest.fixture(params=SETTINGS, ids=lambda setting: setting.__name__.strip("<>"))
def before(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Set lower precision by each interface of torch, and return the settings."""
    as_started = precisions()
    request.param()
    yield precisions()
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for place, precision in zip(PLACES, as_started, strict=True):
        place.fp32_precision = precision


def is_exact() -> bool:
    return not set(precisions()) & {"tf32", "bf16"}


class Watcher(nn.Module):
    """The identity; it records whether products are exact."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(is_exact())
        return x


def test_predictions_are_made_in_full_precision(before: list[str]) -> None:
    net = Watcher().eval()
    predictive(net, torch.ones(3, 2), 2)
    assert net.seen == [True, True]
    assert precisions() == before


def test_settings_are_put_back_after_an_error(before: list[str]) -> None:
    with pytest.raises(KeyError), full_precision():
        assert is_exact()
        assert not torch.backends.cudnn.allow_tf32  # torch's older interface agrees
        raise KeyError
    assert precisions() == before


def test_the_last_of_several_threads_puts_settings_back(before: list[str]) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with full_precision():
            entered.set()
            leave.wait(timeout=60)

    other = threading.Thread(target=hold)
    with full_precision():
        other.start()
        assert entered.wait(timeout=60)
    assert is_exact()
    leave.set()
    other.join(timeout=60)
    assert precisions() == before


@pytest.mark.parametrize("before", [fast_everywhere], indirect=True)
def test_inherited_precision_stays_inherited(before: list[str]) -> None:
    assert before[0] == "tf32"
    with full_precision():
        pass
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
