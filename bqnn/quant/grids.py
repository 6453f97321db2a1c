"""OnGrid: activations that carry their quantization grid, and the operations they allow.

The layers of a simulated network exchange `OnGrid` tensors: floats with the grid of their
integers. Layers compute with these integers. Any other operation must give the same integers in
float and in int8: it moves elements, or selects a maximum. All other operations raise an error.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F


class Grid(NamedTuple):
    """A quantization grid: x = scale * (integer - zero_point).

    Attributes:
        scale: The step of the grid.
        zero_point: The integer of x = 0.
        largest: The upper bound of |integer - zero_point|.
        origin: The name of the module that rounded x to the grid.
    """

    scale: float
    zero_point: int
    largest: int
    origin: str = ""


UNTRACED = (
    "an int8 network cannot be traced, nor a part of a simulated one; call torch.compile or "
    "torch.export on the whole network, before convert()"
)


class OnGrid(Tensor):
    """A tensor of activations on a grid.

    Operations that move elements, select a maximum or read metadata are allowed. All others raise
    a TypeError, because an int8 network could not compute them on its integers.

    Examples:
        >>> x = OnGrid.of(torch.ones(2, 3), Grid(scale=0.5, zero_point=0, largest=255))
        >>> x.flatten().grid.scale
        0.5
        >>> x + 1  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        TypeError: add cannot run in int8 ...
    """

    grid: Grid

    @property
    def is_nested(self) -> bool:  # type: ignore[override]  # the first query of torch.compile
        raise TypeError(UNTRACED)

    @classmethod
    def of(cls, x: Tensor, grid: Grid) -> Self:
        """Attach a grid to `x`, which must lie on it."""
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
        out = cls.call(func, tuple(_plain_all(args)), kwargs, grid)
        if isinstance(out, Tensor):
            return cls.of(out, grid)
        return type(out)(cls.of(part, grid) for part in out)

    @classmethod
    def call(cls, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], grid: Grid) -> Any:
        """Call a function that keeps the grid, on tensors without a grid."""
        return func(*args, **kwargs)


def _refusing(name: str) -> Callable[..., Any]:
    def method(self: OnGrid, *_: Any) -> Any:
        raise TypeError(refusal(name, self.grid.origin))

    return method


# torch replaces a TypeError in these operators by Python's generic message on operand types.
for _operator in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    for _prefix in ("", "r", "i"):
        setattr(OnGrid, f"__{_prefix}{_operator}__", _refusing(_operator))


def plain(x: Tensor) -> Tensor:
    """Return `x` as a plain tensor without a grid."""
    return x.as_subclass(Tensor) if isinstance(x, OnGrid) else x


def grid_of(x: Tensor) -> Grid | None:
    """Return the grid of an activation, or None."""
    return x.grid if isinstance(x, OnGrid) else None


def refusal(operation: str, origin: str, remedy: str = "") -> str:
    """Return the message for an operation that is refused on the output of `origin`.

    Args:
        operation: The operation, as text.
        origin: The name of the module that rounded its input.
        remedy: What to do; the default is for a network with its own Enter and Leave.
    """
    remedy = remedy or (
        "put a Leave before it and an Enter after it, or use a supported module: nn.ReLU, "
        "nn.MaxPool2d, Add for a residual sum, Pool for the average over an image "
        "(bqnn.layers.markers)"
    )
    place = origin or "a quantized module"
    return f"{operation} cannot run in int8 on the integers of {place}; {remedy}"


def kept_in_float(module: str) -> str:
    """Return the remedy for a module without integers, in a network that bqnn has marked.

    Args:
        module: The name of the module; "" for the network itself.
    """
    if module:
        return f"keep it in float with keep=({module!r},)"
    return "move that part to a module of its own, and keep it in float with keep=(its name,)"


def keeps_grid(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation only moves or selects the integers of its first argument.

    Args:
        func: A function of torch, or a method of Tensor.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Examples:
        >>> x = torch.zeros(2)
        >>> keeps_grid(torch.flatten, (x,), {}), keeps_grid(torch.exp, (x,), {})
        (True, False)
    """
    if func in DROPPING:  # the identity in evaluation; int8 cannot run active dropout
        is_on = kwargs.get("training", args[2] if len(args) > 2 else True)
        return not is_on or torch.is_grad_enabled()
    if func in (operator.getitem, Tensor.__getitem__):
        return _is_basic_index(args[1])
    if func is Tensor.to:
        return not args[1:] and kwargs.keys() == {"memory_format"}
    return func in KEEPING and not kwargs.get("return_indices", False)


# Operations that move integers or select a maximum. Quantized tensors support all of them.
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

# Queries of metadata.
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
    """Return the user-facing name of a function of torch."""
    name = getattr(func, "__name__", repr(func))
    if name in ("__get__", "__set__"):  # of an attribute
        return str(func.__self__.__name__)
    return str(name)
