"""Activations that carry their grid, and the operations that they allow.

A simulated network passes its activations on as `OnGrid`: floats with the grid of their integers.
Layers compute with those integers. Any other operation either gives the same integers in float
and in int8, because it only moves them (or takes a maximum of them), or it is refused here.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F


class Grid(NamedTuple):
    """x = scale * (integer - zero_point), with |integer - zero_point| <= largest.

    origin: the name of the module that put x there.
    """

    scale: float
    zero_point: int
    largest: int
    origin: str = ""


UNTRACED = (
    "a quantized network cannot be traced; call torch.compile or torch.export on the float one, "
    "before prepare()"
)


class OnGrid(Tensor):
    """An activation that lies on a grid.

    TypeError: something else is done with it than moving its elements, taking a maximum of them,
    or asking for its shape. The integers of an int8 network could not follow.
    """

    grid: Grid

    @property
    def is_nested(self) -> bool:  # type: ignore[override]  # what torch.compile asks first
        raise TypeError(UNTRACED)

    @classmethod
    def of(cls, x: Tensor, grid: Grid) -> Self:
        """`x`, marked."""
        marked = plain(x).as_subclass(cls)
        marked.grid = grid
        return marked

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in ASKING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if not isinstance(args[0] if args else None, OnGrid) or not keeps_grid(func, args, kwargs):
            origin = next(g.grid.origin for g in _flat([args, kwargs]) if isinstance(g, OnGrid))
            raise TypeError(refusal(_name(func), origin))
        grid = args[0].grid
        out = func(*_plain_all(args), **kwargs)
        if isinstance(out, Tensor):
            return cls.of(out, grid)
        return type(out)(cls.of(part, grid) for part in out)


def _refusing(name: str) -> Callable[..., Any]:
    def method(self: OnGrid, *_: Any) -> Any:
        raise TypeError(refusal(name, self.grid.origin))

    return method


# Of a TypeError in these, torch would tell Python only that the types do not fit.
for _operator in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    for _prefix in ("", "r", "i"):
        setattr(OnGrid, f"__{_prefix}{_operator}__", _refusing(_operator))


def plain(x: Tensor) -> Tensor:
    """Return `x` as a plain tensor without a grid."""
    return x.as_subclass(Tensor) if isinstance(x, OnGrid) else x


def grid_of(x: Tensor) -> Grid | None:
    """Return the grid of an activation, or None."""
    return x.grid if isinstance(x, OnGrid) else None


def refusal(operation: str, origin: str) -> str:
    """Return the message for an operation that is refused on the output of `origin`."""
    return (
        f"{operation} cannot run in int8 on the integers of {origin or 'a quantized module'}; put "
        "a Leave before it and an Enter behind it, or use what int8 knows: nn.ReLU, nn.MaxPool2d, "
        "Add for a residual sum, Pool for the average over an image (bqnn.layers.markers)"
    )


def keeps_grid(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation only moves or selects the integers of its first argument."""
    if func in DROPPING:  # in evaluation the identity; int8 does not follow what is left on
        is_on = kwargs.get("training", args[2] if len(args) > 2 else True)
        return not is_on or torch.is_grad_enabled()
    if func in (operator.getitem, Tensor.__getitem__):
        return _is_basic_index(args[1])
    if func is Tensor.to:
        return not args[1:] and kwargs.keys() == {"memory_format"}
    return func in KEEPING and not kwargs.get("return_indices", False)


# Operations that move integers, or take a maximum of them. Quantized tensors have all of them.
KEEPING = frozenset(
    getattr(owner, name)
    for owner, names in (
        (torch, "chunk clone detach flatten max_pool2d movedim narrow permute relu relu_ reshape"),
        (torch, "split squeeze swapaxes transpose unflatten unsqueeze"),
        (Tensor, "chunk clone contiguous detach flatten movedim narrow permute relu relu_ reshape"),
        (Tensor, "split squeeze swapaxes transpose unflatten unsqueeze view view_as"),
        (F, "relu max_pool2d"),
    )
    for name in names.split()
)
DROPPING = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)

# Questions about a tensor that are no arithmetic.
ATTRIBUTES = (
    "device",
    "dtype",
    "grad_fn",
    "is_cuda",
    "is_leaf",
    "is_meta",
    "is_quantized",
    "layout",
    "ndim",
    "requires_grad",
    "shape",
)
ASKING = frozenset(
    [
        Tensor.dim,
        Tensor.element_size,
        Tensor.is_contiguous,
        Tensor.is_floating_point,
        Tensor.nelement,
        Tensor.numel,
        Tensor.size,
        Tensor.stride,
        Tensor.__len__,
        Tensor.__repr__,
        Tensor.__hash__,
        *(getattr(Tensor, attribute).__get__ for attribute in ATTRIBUTES),
        torch.is_floating_point,
        torch.numel,
    ]
)


def _is_basic_index(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is ... or isinstance(part, int | slice) for part in parts)


def _plain_all(values: Sequence[Any]) -> list[Any]:
    return [plain(value) if isinstance(value, Tensor) else value for value in values]


def _flat(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    return (
        [x for part in value for x in _flat(part)] if isinstance(value, list | tuple) else [value]
    )


def _name(func: Any) -> str:
    """What a user would call a function of torch."""
    name = getattr(func, "__name__", repr(func))
    if name in ("__get__", "__set__"):  # of an attribute
        return str(func.__self__.__name__)
    return str(name)
