"""Float32 arithmetic in full precision, while a result is to be exact."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# What can round float32 has an `fp32_precision` of its own.
_backends: Any = torch.backends  # its types lack these
PLACES = (
    _backends.cuda.matmul,
    _backends.cudnn.conv,
    _backends.cudnn.rnn,  # so that torch.backends.cudnn.allow_tf32 stays readable
    _backends.mkldnn.matmul,
    _backends.mkldnn.conv,
)

_lock = threading.Lock()
_users = 0
_before: list[str] = []


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep torch from rounding float32 to TF32 or bfloat16 in products and convolutions.

    torch has one such setting for the whole process. The first of several threads changes it and
    the last one puts it back, so a thread that trains meanwhile is slower on a GPU, and not wrong.
    Of torch's two interfaces this is the newer: where a program has used the older
    `torch.set_float32_matmul_precision`, torch refuses to read that one in here.
    """
    global _users
    with _lock:
        if _users == 0:
            _before[:] = [place.fp32_precision for place in PLACES]
            _set(["ieee" if low in ("tf32", "bf16") else low for low in _before])
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _set(_before)


def _set(precisions: list[str]) -> None:
    for place, precision in zip(PLACES, precisions, strict=True):
        if place.fp32_precision != precision:
            inherits = precision == _backends.fp32_precision
            place.fp32_precision = "none" if inherits else precision
