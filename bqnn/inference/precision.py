"""Context manager for full float32 precision."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

_backends: Any = torch.backends  # some attributes are missing in its type stubs
# The operations that can round float32; each has an attribute `fp32_precision`.
PLACES = (
    _backends.cuda.matmul,
    _backends.cudnn.conv,
    _backends.cudnn.rnn,
    _backends.mkldnn.matmul,
    _backends.mkldnn.conv,
)


class _Older(NamedTuple):
    """A setting of torch's older interface, which raises an error if it contradicts the newer."""

    get: Callable[[], Any]
    set: Callable[[Any], None]
    exact: Any


_OLDER = (
    _Older(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    _Older(
        lambda: _backends.cudnn.allow_tf32,
        lambda allowed: setattr(_backends.cudnn, "allow_tf32", allowed),
        False,
    ),
)

_lock = threading.Lock()
_users = 0
_before: tuple[list[Any], list[str]] = ([], [])  # of the older interface and the newer one


@contextmanager
def full_precision() -> Iterator[None]:
    """Prevent torch from rounding float32 to TF32 or bfloat16 in matrix products and convolutions.

    The setting is process-wide. Of several threads, the first one changes it and the last one
    restores it. A thread that trains at the same time becomes slower on a GPU, but stays correct.

    Examples:
        >>> with full_precision():
        ...     torch.get_float32_matmul_precision()
        'highest'
    """
    global _users, _before
    with _lock:
        if _users == 0:
            _before = ([_read(older) for older in _OLDER], [p.fp32_precision for p in PLACES])
            exact = ["ieee" if low in ("tf32", "bf16") else low for low in _before[1]]
            _write([older.exact for older in _OLDER], exact)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _write(*_before)


def _read(older: _Older) -> Any:
    try:
        return older.get()
    except RuntimeError:  # the program uses the newer interface, alone or with the older one
        return None


def _write(of_older: list[Any], precisions: list[str]) -> None:
    for older, value, before in zip(_OLDER, of_older, _before[0], strict=True):
        if before is not None and value is not None and _read(older) != value:
            older.set(value)
    for place, precision in zip(PLACES, precisions, strict=True):
        if place.fp32_precision != precision:
            inherits = precision == _backends.fp32_precision
            place.fp32_precision = "none" if inherits else precision
