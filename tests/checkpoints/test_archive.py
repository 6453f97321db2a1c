"""Archives that differ from those of torch.save are refused before torch opens them."""

import _codecs
import io
import os
import pickle
import random
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import pytest
import torch

from bqnn.checkpoints.archive import check_archive


class Call:
    """Pickles as a call of a function, as torch does for tensors."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def torch_file(content: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zip_of(pickled: bytes, **parts: bytes) -> bytes:
    """Create an archive with a pickle and with storages by number, such as _0=bytes(4)."""
    buffer = io.BytesIO()
    with ZipFile(buffer, "w", ZIP_STORED) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/version", "3\n")
        for name, data in parts.items():
            archive.writestr(f"a/data/{name[1:]}", data)
    return buffer.getvalue()


def check(content: bytes) -> None:
    check_archive(io.BytesIO(content))


def refusal(content: bytes) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check(content)
    assert "\n" not in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300
    return str(error.value)


def test_plain_values_and_tensors_of_torch_save_are_accepted() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    adam = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    adam.step()
    content = {
        "strides": tensor.transpose(0, 2),
        "layouts": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "kinds": [torch.zeros(2, dtype=d) for d in (torch.bool, torch.float16, torch.bfloat16)],
        "parameter": torch.nn.Parameter(torch.zeros(2)),
        "state": model.state_dict(),
        "optimizer": adam.state_dict(),
        "values": [None, True, -1, 2**40, -(2**80), 0.1, float("nan"), "é\x00", (), (1,), (1,) * 9],
        "shared": [word := "a text that is there twice", word],
        "types": [torch.float32, torch.bool],
        7: {"deep": {"in": [[{}]]}},
    }
    check(torch_file(content))


def doubled(kind: Callable[[Any], Any], levels: int = 60) -> Any:
    """Create a container that holds another one twice, which does the same, and so on."""
    value: Any = kind(0)
    for _ in range(levels):
        value = kind(value)
    return value


def ordered(**attributes: object) -> OrderedDict[str, int]:
    made = OrderedDict(a=1)
    vars(made).update(attributes)
    return made


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def in_itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


EXPANDED = torch.zeros(1).expand(10**6, 10**6)
SPARSE = torch.eye(3).to_sparse()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    QUANTIZED = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)

REFUSED: dict[str, object] = {
    "a function of ours": Call(os.system, "touch evil"),
    "gigabytes of zeros": Call(bytearray, 8 * 10**9),
    "a text, coded": Call(_codecs.encode, "x" * 100, "utf-16"),
    "a text, coded twice": Call(_codecs.encode, Call(_codecs.encode, "x", "utf-7"), "hex"),
    "a set": {1, 2},
    "a complex number": 1j,
    "bytes": b"x",
    "a size": torch.Size([2]),
    "a device": torch.device("cpu"),
    "a type of quantized numbers": torch.qint8,
    "a layout": Call(torch.serialization._get_layout, "torch.strided"),
    "a counter": Counter("ab"),
    "a tensor of a device": Call(
        torch._utils._rebuild_device_tensor_from_cpu_tensor, EXPANDED, torch.float32, "cpu", False
    ),
    "a tensor on meta": torch.zeros(10**5, 10**5, device="meta"),
    "a sparse tensor": SPARSE,
    "a quantized tensor": QUANTIZED,
    "a complex tensor": torch.zeros(2, dtype=torch.complex64),
    "a negated view": torch.zeros(2, dtype=torch.complex64).conj().imag,
    "an eight-bit float": torch.zeros(2, dtype=torch.float8_e4m3fn),
    "an expanded tensor": EXPANDED,
    "a parameter of an expanded tensor": torch.nn.Parameter(EXPANDED),
    "one storage in many tensors": [torch.zeros(10**4)] * 0
    + list(torch.zeros(10**4).expand(9, -1)),
    "a tensor with attributes": Call(torch._tensor._rebuild_from_type_v2, torch.Tensor, (), (), {}),
    "lists that hold one twice": doubled(lambda value: [value, value]),
    "dictionaries that hold one twice": doubled(lambda value: {"a": value, "b": value}),
    "tuples that hold one twice": doubled(lambda value: (value, value)),
    "a key that takes years to hash": {doubled(lambda value: (value, value), 18): 1},
    "a long text a thousand times": ["x" * 10**5] * 10**3,
    "a list in itself": in_itself(),
    "a deep list": nested(100),
    "a dictionary with a method of its own": ordered(keys=1),
    "a key that is a float": {0.5: 1},
    "keys with the same hash": {0: 1, sys.hash_info.modulus: 2, 2 * sys.hash_info.modulus: 3},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_objects_than_plain_values_and_tensors_are_refused(kind: str) -> None:
    for protocol in (2, 4):
        refusal(torch_file({"recipe": {}, "more": REFUSED[kind]}, pickle_protocol=protocol))


def test_the_message_names_the_function_that_is_asked_for() -> None:
    assert f"refers to {os.name}.system, but only" in refusal(torch_file(Call(os.system, "x")))
    assert ".bytearray, but only" in refusal(torch_file(Call(bytearray, 8)))


# ---- pickles that no pickler writes

STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpuK\x04tQ"
HOOKS = b"ccollections\nOrderedDict\n)R"


def tensor(
    size: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85", offset: bytes = b"K\0"
) -> bytes:
    """Create a pickle of a tensor in a storage of four floats; K is a byte,  a tuple of one."""
    arguments = b"(" + STORAGE + offset + size + stride + b"\x89" + HOOKS + b"t"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R."


def test_a_tensor_lies_in_its_storage() -> None:
    check(zip_of(tensor(), _0=bytes(16)))
    check(zip_of(tensor(size=b"K\x02\x85", stride=b"K\x03\x85"), _0=bytes(16)))
    for shape in (
        {"size": b"K\x05\x85"},
        {"offset": b"K\x01"},
        {"stride": b"K\x02\x85"},
        {"stride": b"J\xff\xff\xff\xff\x85"},  # -1
        {"size": b"J\xff\xff\xff\xff\x85"},
        {"offset": b"J\xff\xff\xff\xff"},
        {"size": b"K\x02K\x02\x86"},  # two sizes and one stride
        {"size": b"G?\xf0\0\0\0\0\0\0\x85"},  # 1.0
        {"size": b"\x88\x85"},  # true
    ):
        refusal(zip_of(tensor(**shape), _0=bytes(16)))


@pytest.mark.parametrize("length", [0, 12, 15, 17, 20])
def test_a_storage_is_as_long_as_its_part(length: int) -> None:
    assert "claim 16 bytes" in refusal(zip_of(tensor(), _0=bytes(length)))
    assert "claim 16 bytes" in refusal(zip_of(tensor(), _1=bytes(16)))


@pytest.mark.parametrize(
    "pickled",
    {
        "nothing": b"",
        "no end": b"\x80\x02]",
        "more after the end": b"\x80\x02].].",
        "two values": b"\x80\x02]].",
        "no value": b"\x80\x02.",
        "an open mark": b"\x80\x02(].",
        "another protocol": b"\x80\x04].",
        "no protocol in front": b"]\x80\x02.",
        "a protocol inside": b"\x80\x02]\x80\x02.",
        "a memo that is not there": b"\x80\x02h\x07.",
        "appended to what is no list": b"\x80\x02}K\x01a.",
        "set in what is no dictionary": b"\x80\x02]K\x01K\x01s.",
        "a key without a value": b"\x80\x02}(K\x01u.",
        "a list that grows inside another": b"\x80\x02]q\x01]q\x02a(h\x02K\x01al.",
        "a name on the stack": b"\x80\x02X\2\0\0\0osX\6\0\0\0system\x93.",
        "an old instance": b"\x80\x02(ios\nsystem\n.",
        "an object": b"\x80\x02(cos\nsystem\no.",
        "a new object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "a registered extension": b"\x80\x02\x82\x01.",
        "a text identity": b"\x80\x02Pstorage\n.",
        "a name with a blank": b"\x80\x02ctorch FloatStorage\n\n.",
        "a call of a list": b"\x80\x02])R.",
        "a dictionary made of arguments": b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
        "a storage that is called": b"\x80\x02ctorch\nFloatStorage\n)R.",
        "a whole number of gigabytes": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
        "a text of gigabytes": b"\x80\x02X\xff\xff\xff\xffa.",
        "decimal digits": b"\x80\x02L" + b"9" * 10**5 + b"L\n.",
        "many empty lists": b"\x80\x02(" + b"]" * 10**5 + b"l.",
        "a state of a list": b"\x80\x02]}b.",
        "a storage of no name": b"\x80\x02(X\7\0\0\0storageNX\1\0\0\0" + b"0X\3\0\0\0cpuK\4tQ.",
        "a storage on meta": tensor().replace(b"X\x03\0\0\0cpu", b"X\x04\0\0\0meta"),
    }.items(),
    ids=lambda item: item[0],
)
def test_pickles_that_torch_would_not_write_are_refused(
    pickled: tuple[str, bytes],
) -> None:
    refusal(zip_of(pickled[1], _0=bytes(16)))


def test_mutated_pickles_are_refused_or_load_in_the_memory_of_their_file() -> None:
    """Accepted pickles load in torch, and contain only plain values and the file's data."""
    content = {"a": [1, 2.5, "x", (1, 2)], "b": torch.arange(4.0), "c": OrderedDict(d={}, e=[])}
    with ZipFile(io.BytesIO(torch_file(content))) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        whole = archive.read(name)
    check(zip_of(whole, _0=bytes(16)))
    draw, num_passed = random.Random(0), 0
    for _ in range(3000):
        mutated = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(mutated))
            if draw.random() < 0.5:
                mutated[place] = draw.choice(whole)
            else:
                mutated[place:place] = whole[(at := draw.randrange(len(whole))) : at + 6]
        file = zip_of(bytes(mutated), _0=bytes(16))
        try:
            check(file)
        except ValueError:
            continue
        num_passed += 1
        assert_plain(torch.load(io.BytesIO(file), weights_only=True))
    assert num_passed > 100


def assert_plain(value: object) -> None:
    if isinstance(value, torch.Tensor):
        assert value.numel() * value.element_size() <= 16
    elif type(value) in (dict, OrderedDict):
        for entry in value.values():  # type: ignore[attr-defined]
            assert_plain(entry)
    elif type(value) in (list, tuple):
        for entry in value:  # type: ignore[attr-defined]
            assert_plain(entry)
    else:
        assert value is None or type(value) in (bool, int, float, str)


# ---- archives


@pytest.fixture
def whole() -> bytes:
    return torch_file({"a": torch.zeros(3)})


def test_an_archive_is_all_that_the_file_holds(whole: bytes) -> None:
    check(whole)
    other = torch_file({"a": torch.ones(3)})
    for content in (
        pickle.dumps({"a": 1}) + whole,  # torch would read the pickle
        b"x" + whole,
        other + whole,
        whole + other[:-22],
        whole[:-2] + b"\x05\0" + b"hello",  # a comment
    ):
        assert "other data besides the archive" in refusal(content)
    for content in (whole + b"x" * 10**5, b"", b"PK\x03\x04", whole[:-1]):
        with pytest.raises((ValueError, BadZipFile)):
            check(content)


@pytest.mark.parametrize(
    "names",
    [
        ["a/data.pkl", "a/data.pkl"],
        ["a/data.pkl", "a/DATA.PKL"],  # torch finds parts whatever their case
        ["a/data.pkl", "b/version"],
        ["a/data.pkl", "a/../evil"],
        ["a/data.pkl", "a/constants.pkl"],  # a program
        ["a/data.pkl", "a/data/x"],
        ["a/data.pkl", "a/data/1\0.pkl"],
        ["data.pkl"],
        ["a/version"],
        [],
    ],
)
def test_the_parts_of_an_archive_are_those_of_torch(names: list[str]) -> None:
    buffer = io.BytesIO()
    with ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name in names:
            archive.writestr(name.replace("\0", "#"), pickle.dumps([], 2))
    refusal(buffer.getvalue().replace(b"#", b"\0"))  # which writestr would cut


def test_parts_do_not_share_their_bytes(whole: bytes) -> None:
    buffer = io.BytesIO(zip_of(pickle.dumps([], 2), _0=bytes(100), _1=bytes(100)))
    with ZipFile(buffer) as archive:
        first, second = archive.getinfo("a/data/0"), archive.getinfo("a/data/1")
    content = bytearray(buffer.getvalue())
    place = content.rindex(b"a/data/1") - 4  # the offset, before the name in the list of parts
    assert int.from_bytes(content[place : place + 4], "little") == second.header_offset
    content[place : place + 4] = first.header_offset.to_bytes(4, "little")
    with pytest.raises((ValueError, BadZipFile)):
        check(bytes(content))


def test_a_saved_file_opens_from_any_folder(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "ü b.ckpt")
    with open(tmp_path / "ü b.ckpt", "rb") as file:
        check_archive(file)
