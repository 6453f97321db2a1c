"""Validate a file of torch.save before it is loaded.

`torch.load(weights_only=True)` runs no code from the file. But it calls functions that allocate as
much memory as the file requests, visits a shared list each time it occurs, and reads a file that is
not a zip archive as a pickle of the legacy format. This module therefore checks the archive and
interprets its pickle without creating objects. It accepts dictionaries, lists, tuples, strings,
numbers, dtypes and dense tensors whose data is in the file.
"""

import pickletools
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import SEEK_END
from math import prod
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from bqnn.text import printable, short

LARGEST_PICKLE = 32 * 2**20  # bytes; the data of tensors is in separate parts
DEEPEST = 32  # nested containers

# Bytes per element of each storage type. Others (quantized, complex) are refused.
STORAGES = {
    "torch BoolStorage": 1,
    "torch ByteStorage": 1,
    "torch CharStorage": 1,
    "torch ShortStorage": 2,
    "torch HalfStorage": 2,
    "torch BFloat16Storage": 2,
    "torch IntStorage": 4,
    "torch FloatStorage": 4,
    "torch LongStorage": 8,
    "torch DoubleStorage": 8,
}
ORDERED_DICT = "collections OrderedDict"
TENSOR = "torch._utils _rebuild_tensor_v2"
PARAMETER = "torch._utils _rebuild_parameter"
DTYPES = {
    *("torch bool", "torch uint8", "torch int8", "torch int16", "torch int32", "torch int64"),
    *("torch float16", "torch bfloat16", "torch float32", "torch float64"),
}
GLOBALS = {*STORAGES, *DTYPES, ORDERED_DICT, TENSOR, PARAMETER}

_PARTS = (
    r"data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id"
)


def check_archive(file: BinaryIO) -> None:
    """Check the zip archive in a file and its pickle.

    The check takes time and memory in proportion to the size of the file.

    Args:
        file: A seekable file, open for reading bytes.

    Raises:
        ValueError: The file differs from what torch.save writes, has other content than plain
            values and tensors, or would need far more memory than its size.
        BadZipFile: The file is not a zip archive.

    Examples:
        >>> import io, torch
        >>> file = io.BytesIO()
        >>> torch.save({"weight": torch.zeros(3)}, file)
        >>> check_archive(file)
        >>> file = io.BytesIO()
        >>> torch.save({"weight": [torch.zeros(3)] * 10}, file)
        >>> check_archive(file)  # ten references to one tensor
        >>> file = io.BytesIO(file.getvalue()[:-1])
        >>> check_archive(file)
        Traceback (most recent call last):
        zipfile.BadZipFile: File is not a zip file
    """
    with ZipFile(file) as archive:
        entries = archive.infolist()
        _check_layout(file, archive, entries)
        if damaged := archive.testzip():  # torch checks no CRC
            raise ValueError(f"part {printable(damaged)} is damaged; copy the file again")
        sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in entries}
        if sizes["data.pkl"] > LARGEST_PICKLE:
            raise ValueError(f"its pickle is larger than {LARGEST_PICKLE // 2**20} MiB")
        folder = entries[0].filename.partition("/")[0]
        _Walk(archive.read(f"{folder}/data.pkl"), sizes).run()


def _check_layout(file: BinaryIO, archive: ZipFile, entries: list[ZipInfo]) -> None:
    """Refuse a file that two zip readers could interpret differently."""
    if any(entry.compress_type != ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, so it could need more memory than its size")
    names = [entry.filename for entry in entries]
    folders = {name.partition("/")[0] for name in names}
    if (
        len(folders) != 1
        or any(entry.orig_filename != entry.filename for entry in entries)  # cut at a zero byte
        or not all(re.fullmatch(_PARTS, name.partition("/")[2], re.ASCII) for name in names)
        or not any(name.endswith("/data.pkl") for name in names)
    ):
        raise ValueError("its parts are not those that torch.save writes")
    if len(set(names)) < len(names):
        raise ValueError("it has two parts with the same name")
    starts = sorted((entry.header_offset, entry.file_size) for entry in entries)
    ends = [*(start for start, _ in starts[1:]), archive.start_dir]
    is_apart = all(
        start + 30 + length <= end for (start, length), end in zip(starts, ends, strict=True)
    )
    has_extra = any(
        entry.extra and max(entry.file_size, entry.header_offset) < 2**32 - 1 for entry in entries
    )
    if starts[0][0] != 0 or not is_apart or has_extra or _directory(file) != archive.start_dir:
        raise ValueError("it has more than one archive, or other data besides the archive")


def _directory(file: BinaryIO) -> int:
    """Return the offset of the central directory, or -1 if the end records contradict it."""
    size = file.seek(0, SEEK_END)
    file.seek(max(size - 98, 0))
    tail = file.read(98)
    *_, count, length, start, comment = struct.unpack("<4s4H2LH", tail[-22:])
    rest = 22
    if tail[-42:-38] == b"PK\x06\x07":
        locator = struct.unpack("<4sLQL", tail[-42:-22])
        wide = struct.unpack("<4sQ2H2L4Q", tail[:56])
        is_here = locator[2] == size - 98 and wide[0] == b"PK\x06\x06"
        narrow = (count, 0xFFFF), (length, 2**32 - 1), (start, 2**32 - 1)
        if not is_here or not all(
            value in (most, long) for (value, most), long in zip(narrow, wide[7:], strict=True)
        ):
            return -1
        (length, start), rest = wide[8:], 98
    return start if comment == 0 and start + length + rest == size else -1


@dataclass(slots=True, eq=False)
class _Object:
    """A container, storage or tensor that the pickle would create.

    Attributes:
        kind: list, dict, OrderedDict, tuple, storage or tensor.
        parts: The values of a tuple, the first keys of a dictionary, or the number of elements of a
            storage and the bytes of one.
        weight: The number of values and of characters in it, shared ones counted repeatedly.
        depth: The nesting depth.
        is_closed: Whether another container holds this one, so that it must not grow.
    """

    kind: str
    parts: Sequence[Any] = ()
    weight: int = 1
    depth: int = 1
    is_closed: bool = False


@dataclass(slots=True, frozen=True)
class _Global:
    name: str


class _Walk:
    """Interprets a pickle as torch does, but records objects instead of creating them."""

    def __init__(self, pickle: bytes, sizes: dict[str, int]) -> None:
        self.pickle = pickle
        self.sizes = sizes
        self.size = sum(sizes.values())
        self.types: dict[str, str] = {}  # the type of each storage
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below the marks
        self.memo: dict[int, Any] = {}
        self.num_objects = 0
        self.claimed = 0  # bytes of all tensors

    def run(self) -> None:
        """Interpret the pickle, and raise a ValueError if it is refused."""
        end: int | None = None
        for operation, value, end in pickletools.genops(self.pickle):  # noqa: B007
            name = operation.name
            if name in _SCALARS:
                self.stack.append(_SCALARS[name](value))
            elif name in _OPERATIONS:
                try:
                    _OPERATIONS[name](self, value)
                except (IndexError, KeyError):  # from the stack, the marks or the memo
                    raise ValueError("its pickle is malformed") from None
            else:
                raise ValueError(f"its pickle has the opcode {name}, which torch.save never writes")
        if end != len(self.pickle) - 1 or self.below or len(self.stack) != 1:
            raise ValueError("its pickle is malformed")

    # ---- opcodes, named after those of pickletools

    def start(self, version: int) -> None:
        if version != 2 or self.memo or self.stack:
            raise ValueError("its pickle is malformed")

    def stop(self, _: object) -> None:
        pass

    def mark(self, _: object) -> None:
        self.below.append(self.stack)
        self.stack = []

    def put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def get(self, place: int) -> None:
        self.stack.append(self.memo[place])

    def find_global(self, name: str) -> None:
        if name not in GLOBALS:
            raise ValueError(
                f"it refers to {printable(name.replace(' ', '.'))[:100]}, but only tensors and "
                "plain values are allowed"
            )
        self.stack.append(_Global(name))

    def new_list(self, _: object) -> None:
        self.push("list")

    def new_dict(self, _: object) -> None:
        self.push("dict")

    def new_tuple(self, parts: list[Any]) -> None:
        self.push("tuple")
        self.fill(self.stack[-1], parts)
        self.stack[-1].parts = parts

    def append(self, _: object) -> None:
        self.extend([self.stack.pop()])

    def appends(self, _: object) -> None:
        self.extend(self.pop_mark())

    def set_item(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_all([key, value])

    def set_items(self, _: object) -> None:
        self.set_all(self.pop_mark())

    def persistent(self, _: object) -> None:
        """Record a storage: ("storage", type, name of its part, device, number of elements)."""
        word, kind, key, device, numel = _parts(self.stack.pop(), 5)
        if (
            word != "storage"
            or not isinstance(kind, _Global)
            or kind.name not in STORAGES
            or not (type(key) is type(device) is str and type(numel) is int)
            or not re.fullmatch(r"(cpu|cuda|mps|xpu|hpu)(:\d{1,3})?", device, re.ASCII)
            or self.types.setdefault(key, kind.name) != kind.name
        ):
            raise ValueError("it has a tensor without a valid storage")
        nbytes = numel * STORAGES[kind.name]
        if self.sizes.get(f"data/{key}") != nbytes:
            raise ValueError(
                f"its tensors claim {short(nbytes)} bytes in part data/{short(key)}, which has "
                f"{self.sizes.get(f'data/{key}', 0)}"
            )
        self.push("storage", [numel, STORAGES[kind.name]])

    def reduce(self, _: object) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global):
            raise ValueError("its pickle calls an object that is not a function")
        if function.name == ORDERED_DICT:
            _parts(arguments, 0)
            self.push("OrderedDict")
        elif function.name == TENSOR:
            self.claimed += _bytes_of_tensor(arguments)
            if self.claimed > self.size:  # many tensors share a storage
                raise ValueError(f"its tensors claim {self.claimed} bytes or more")
            self.push("tensor")
            self.fill(self.stack[-1], [arguments])
        elif function.name == PARAMETER:
            tensor, needs_gradient, hooks = _parts(arguments, 3)
            _require(_is(tensor, "tensor") and type(needs_gradient) is bool and _no_hooks(hooks))
            self.stack.append(tensor)
        else:
            raise ValueError(f"its pickle calls {function.name.replace(' ', '.')}")

    def build(self, _: object) -> None:
        """Record the versions of modules, which torch stores as an attribute of a state_dict."""
        state, target = self.stack.pop(), self.stack[-1]
        _require(_is(target, "OrderedDict") and _is(state, "dict"))
        _require(list(state.parts) == ["_metadata"])
        self.fill(target, [state])

    # ---- helpers of the opcodes

    def push(self, kind: str, parts: Sequence[Any] = ()) -> None:
        self.num_objects += 1
        if self.num_objects > 1000 + len(self.pickle) // 8:
            raise ValueError("its pickle creates too many lists and dictionaries for its length")
        self.stack.append(_Object(kind, parts))

    def pop(self, count: int) -> list[Any]:
        return [self.stack.pop() for _ in range(count)][::-1]  # IndexError at a mark

    def pop_mark(self) -> list[Any]:
        values = self.stack
        self.stack = self.below.pop()
        return values

    def extend(self, values: list[Any]) -> None:
        _require(_is(self.stack[-1], "list"))
        self.fill(self.stack[-1], values)

    def set_all(self, items: list[Any]) -> None:
        target, keys = self.stack[-1], items[::2]
        _require(_is(target, "dict", "OrderedDict") and len(items) % 2 == 0)
        # Hashing a tuple can take exponential time, and many large integers share a hash.
        _require(all(type(k) is str or (type(k) is int and 0 <= k < 2**31) for k in keys))
        self.fill(target, items)
        target.parts = [*target.parts, *keys] if len(target.parts) < 2 else target.parts

    def fill(self, target: _Object, values: Sequence[Any]) -> None:
        """Add values to an open container, and update its weight and depth."""
        _require(not target.is_closed)
        for value in values:
            if isinstance(value, _Object):
                value.is_closed = True
                target.weight += value.weight
                target.depth = max(target.depth, value.depth + 1)
            else:
                target.weight += 1 + len(value) if type(value) is str else 1
        _require(not target.is_closed)
        if target.depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        if target.weight > 10_000 + 4 * len(self.pickle):
            raise ValueError("it repeats the same values too often")


def _bytes_of_tensor(arguments: object) -> int:
    """Return the bytes of a tensor, and refuse one that exceeds its storage."""
    storage, offset, size, stride, needs_gradient, hooks = _parts(arguments, 6)
    _require(_is(storage, "storage") and type(needs_gradient) is bool and _no_hooks(hooks))
    _require(_is(size, "tuple") and _is(stride, "tuple"))
    _require(len(size.parts) == len(stride.parts) <= 16)
    numbers = [offset, *size.parts, *stride.parts]
    _require(all(type(number) is int and 0 <= number < 2**63 for number in numbers))
    length, itemsize = storage.parts
    numel = prod(size.parts)
    if numel > length:
        raise ValueError(
            f"its tensors claim {short(numel * itemsize)} bytes of a storage of {length * itemsize}"
        )
    reach = sum((n - 1) * step for n, step in zip(size.parts, stride.parts, strict=True))
    _require(numel == 0 or offset + reach < length)
    return int(numel * itemsize)


def _parts(value: object, count: int) -> Sequence[Any]:
    """Return the values of a tuple, and refuse one without exactly `count` values."""
    _require(isinstance(value, _Object) and value.kind == "tuple" and len(value.parts) == count)
    assert isinstance(value, _Object)
    return value.parts


def _is(value: object, *kinds: str) -> bool:
    return isinstance(value, _Object) and value.kind in kinds


def _no_hooks(value: object) -> bool:
    return isinstance(value, _Object) and value.kind == "OrderedDict" and value.weight == 1


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError("its pickle is not one that torch.save writes")


_SCALARS: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), lambda value: value
    ),
}
_OPERATIONS: dict[str, Callable[[_Walk, Any], None]] = {
    "PROTO": _Walk.start,
    "STOP": _Walk.stop,
    "MARK": _Walk.mark,
    "BINPUT": _Walk.put,
    "LONG_BINPUT": _Walk.put,
    "BINGET": _Walk.get,
    "LONG_BINGET": _Walk.get,
    "GLOBAL": _Walk.find_global,
    "EMPTY_LIST": _Walk.new_list,
    "EMPTY_DICT": _Walk.new_dict,
    "EMPTY_TUPLE": lambda walk, _: walk.new_tuple(walk.pop(0)),
    "TUPLE1": lambda walk, _: walk.new_tuple(walk.pop(1)),
    "TUPLE2": lambda walk, _: walk.new_tuple(walk.pop(2)),
    "TUPLE3": lambda walk, _: walk.new_tuple(walk.pop(3)),
    "TUPLE": lambda walk, _: walk.new_tuple(walk.pop_mark()),
    "APPEND": _Walk.append,
    "APPENDS": _Walk.appends,
    "SETITEM": _Walk.set_item,
    "SETITEMS": _Walk.set_items,
    "BINPERSID": _Walk.persistent,
    "REDUCE": _Walk.reduce,
    "BUILD": _Walk.build,
}
