"""Check that a file holds what torch.save writes of tensors and plain values, before it is loaded.

`torch.load(weights_only=True)` runs no code of the file, but it calls functions that allocate as
much memory as the file asks for, follows a shared list as often as it occurs, and reads what is no
zip archive as a pickle of the old format. Here the archive and its pickle are walked first: only
dictionaries, lists, tuples, texts, numbers, types of numbers and dense tensors that lie in the file
may be in it.
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

LARGEST_PICKLE = 32 * 2**20  # bytes; tensors are not in it, but in parts of their own
DEEPEST = 32  # containers in one another

# Storages of dense tensors, with the bytes of an element. Others (quantized, complex) are refused.
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
    """Walk the archive in a file, and the pickle in it, in time and memory proportional to both.

    Raises:
        ValueError: torch.save did not leave it like this, or it holds other things than plain
            values and tensors, or takes more memory than its size lets expect.
        BadZipFile: It is no zip archive.
    """
    with ZipFile(file) as archive:
        entries = archive.infolist()
        _check_layout(file, archive, entries)
        if damaged := archive.testzip():  # torch checks no CRC
            raise ValueError(f"its part {printable(damaged)} is damaged; copy the file again")
        sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in entries}
        if sizes["data.pkl"] > LARGEST_PICKLE:
            raise ValueError(f"its pickle is larger than {LARGEST_PICKLE // 2**20} MiB")
        folder = entries[0].filename.partition("/")[0]
        _Walk(archive.read(f"{folder}/data.pkl"), sizes).run()


def _check_layout(file: BinaryIO, archive: ZipFile, entries: list[ZipInfo]) -> None:
    """ValueError where two readers of zip archives could see different things in the file."""
    if any(entry.compress_type != ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, and could take more memory than the file")
    names = [entry.filename for entry in entries]
    folders = {name.partition("/")[0] for name in names}
    if (
        len(folders) != 1
        or any(entry.orig_filename != entry.filename for entry in entries)  # cut at a zero byte
        or not all(re.fullmatch(_PARTS, name.partition("/")[2], re.ASCII) for name in names)
        or not any(name.endswith("/data.pkl") for name in names)
    ):
        raise ValueError("its parts are not those of a file of torch.save")
    if len(set(names)) < len(names):
        raise ValueError("a part of it is there twice")
    starts = sorted((entry.header_offset, entry.file_size) for entry in entries)
    ends = [*(start for start, _ in starts[1:]), archive.start_dir]
    is_apart = all(
        start + 30 + length <= end for (start, length), end in zip(starts, ends, strict=True)
    )
    has_extra = any(
        entry.extra and max(entry.file_size, entry.header_offset) < 2**32 - 1 for entry in entries
    )
    if starts[0][0] != 0 or not is_apart or has_extra or _directory(file) != archive.start_dir:
        raise ValueError("it holds more than one archive, or other data beside it")


def _directory(file: BinaryIO) -> int:
    """Where the list of parts begins if it ends where the end of the file says; or else -1."""
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
class _Made:
    """A container, storage or tensor that the pickle makes.

    weight: values in it and characters of texts, counted as often as they occur; depth: of the
    containers in it; is_closed: it is inside another one, so it may not grow any more.
    """

    kind: str  # list, dict, OrderedDict, tuple, storage, tensor
    parts: Sequence[Any] = ()  # of a tuple: all; of a dict: its keys; of a storage: its length
    weight: int = 1
    depth: int = 1
    is_closed: bool = False


@dataclass(slots=True, frozen=True)
class _Global:
    name: str


class _Walk:
    """Follows a pickle as torch does, but makes only notes of what would be made."""

    def __init__(self, pickle: bytes, sizes: dict[str, int]) -> None:
        self.pickle = pickle
        self.sizes = sizes
        self.size = sum(sizes.values())
        self.types: dict[str, str] = {}  # of storages, by their number
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under the marks
        self.memo: dict[int, Any] = {}
        self.made = 0
        self.claimed = 0  # bytes

    def run(self) -> None:
        """ValueError: it is refused."""
        end: int | None = None
        for operation, value, end in pickletools.genops(self.pickle):  # noqa: B007
            name = operation.name
            if name in _SCALARS:
                self.stack.append(_SCALARS[name](value))
            elif name in _OPERATIONS:
                try:
                    _OPERATIONS[name](self, value)
                except (IndexError, KeyError):  # of the stack, the marks or the memo
                    raise ValueError("its pickle is malformed") from None
            else:
                raise ValueError(f"its pickle has the operation {name}; torch.save writes none")
        if end != len(self.pickle) - 1 or self.below or len(self.stack) != 1:
            raise ValueError("its pickle is malformed")

    # ---- operations

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
                f"it asks for {printable(name.replace(' ', '.'))[:100]}, and only tensors and "
                "plain values are loaded"
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
        """A storage: ("storage", its type, the number of its part, a device, its length)."""
        word, kind, key, device, numel = _parts(self.stack.pop(), 5)
        if (
            word != "storage"
            or not isinstance(kind, _Global)
            or kind.name not in STORAGES
            or not (type(key) is type(device) is str and type(numel) is int)
            or not re.fullmatch(r"(cpu|cuda|mps|xpu|hpu)(:\d{1,3})?", device, re.ASCII)
            or self.types.setdefault(key, kind.name) != kind.name
        ):
            raise ValueError("a tensor of it lies in no storage of numbers")
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
            raise ValueError("its pickle calls what is no function")
        if function.name == ORDERED_DICT:
            _parts(arguments, 0)
            self.push("OrderedDict")
        elif function.name == TENSOR:
            self.claimed += _bytes_of_tensor(arguments)
            if self.claimed > self.size:  # the same numbers in many tensors
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
        """What torch's state_dict() says of the versions of its modules, beside the tensors."""
        state, target = self.stack.pop(), self.stack[-1]
        _require(_is(target, "OrderedDict") and _is(state, "dict"))
        _require(list(state.parts) == ["_metadata"])
        self.fill(target, [state])

    # ---- what they do it with

    def push(self, kind: str, parts: Sequence[Any] = ()) -> None:
        self.made += 1
        if self.made > 1000 + len(self.pickle) // 8:
            raise ValueError("its pickle makes more lists and dictionaries than it has values for")
        self.stack.append(_Made(kind, parts))

    def pop(self, count: int) -> list[Any]:
        return [self.stack.pop() for _ in range(count)][::-1]  # never across a mark

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
        # The hash of a tuple can take exponential time, and many large numbers can have the same.
        _require(all(type(k) is str or (type(k) is int and 0 <= k < 2**31) for k in keys))
        self.fill(target, items)
        target.parts = [*target.parts, *keys] if len(target.parts) < 2 else target.parts

    def fill(self, target: _Made, values: Sequence[Any]) -> None:
        """Put values into a container that nothing holds yet, and weigh it."""
        _require(not target.is_closed)
        for value in values:
            if isinstance(value, _Made):
                value.is_closed = True
                target.weight += value.weight
                target.depth = max(target.depth, value.depth + 1)
            else:
                target.weight += 1 + len(value) if type(value) is str else 1
        _require(not target.is_closed)
        if target.depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        if target.weight > 10_000 + 4 * len(self.pickle):
            raise ValueError("it holds the same values again and again")


def _bytes_of_tensor(arguments: object) -> int:
    """What a tensor takes in its storage; a ValueError for one that is not inside of it."""
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
    """What a tuple of `count` values holds."""
    _require(isinstance(value, _Made) and value.kind == "tuple" and len(value.parts) == count)
    assert isinstance(value, _Made)
    return value.parts


def _is(value: object, *kinds: str) -> bool:
    return isinstance(value, _Made) and value.kind in kinds


def _no_hooks(value: object) -> bool:
    return isinstance(value, _Made) and value.kind == "OrderedDict" and value.weight == 1


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError("its pickle is not of the kind that torch.save writes")


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
