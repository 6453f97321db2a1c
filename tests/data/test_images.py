"""Image data: reading, normalization, and augmentation in batches."""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from bqnn.data import download
from bqnn.data.base import TensorData
from bqnn.data.cifar10 import CIFAR10Data
from bqnn.data.digits import DigitsData
from bqnn.data.image_folder import ImageFolderData
from bqnn.data.images import random_crop, random_flip
from bqnn.data.mnist import FashionMNISTData, MNISTData

DATA_DIR = os.environ.get("BQNN_DATA_DIR", "")


def no_network(url: str, timeout: float) -> None:
    raise OSError("no route to host")


def ready(data: TensorData) -> TensorData:
    data.prepare_data()
    data.setup()
    return data


def test_crop_shifts_each_image_by_its_own_offset():
    image = torch.arange(1, 28, dtype=torch.uint8).view(3, 3, 3)
    padded = torch.nn.functional.pad(image, [1] * 4)
    windows = {
        tuple(padded[:, top : top + 3, left : left + 3].flatten().tolist())
        for top in range(3)
        for left in range(3)
    }
    torch.manual_seed(0)
    crops = random_crop(image.expand(500, 3, 3, 3), padding=1)
    assert crops.dtype == torch.uint8
    assert crops.shape == (500, 3, 3, 3)
    assert {tuple(crop.flatten().tolist()) for crop in crops} == windows


def test_crop_takes_every_image_from_itself():
    images = torch.arange(1, 65, dtype=torch.uint8).view(-1, 1, 1, 1).expand(64, 2, 4, 5)
    crops = random_crop(images, padding=1)  # at least one pixel of each image stays inside
    assert torch.equal(crops.amax((1, 2, 3)), images[:, 0, 0, 0])


def test_flip_mirrors_about_half_of_the_images_whole():
    images = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8).expand(1000, 1, 2, 3)
    torch.manual_seed(0)
    flipped = random_flip(images)
    mirrored = (flipped == images.flip(-1)).all((1, 2, 3))
    assert (mirrored | (flipped == images).all((1, 2, 3))).all()
    assert 400 < mirrored.sum() < 600


def test_augmentation_follows_the_global_generator():
    data = CIFAR10Data()
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(1)
    first = data.augment(images)
    torch.manual_seed(1)
    assert torch.equal(data.augment(images), first)
    assert not torch.equal(data.augment(images), first)


def test_cifar10_is_normalized_per_channel():
    images = torch.full((2, 3, 1, 1), 255, dtype=torch.uint8)
    expected = (1 - np.array([0.4914, 0.4822, 0.4465])) / np.array([0.2023, 0.1994, 0.2010])
    normalized = CIFAR10Data().normalize(images)
    np.testing.assert_allclose(normalized[1].flatten(), expected, rtol=1e-5)
    torch.testing.assert_close(CIFAR10Data().normalize(images.float() / 255), normalized)


def test_digits_are_split_by_class_whatever_the_seed():
    data = ready(DigitsData(seed=0, validation_share=0.0))
    assert len(data.train) + len(data.test) == 1797
    assert data.train.inputs.shape[1:] == (1, 8, 8)
    assert data.test.targets.dtype == torch.int64
    all_targets = torch.cat([data.train.targets, data.test.targets])
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert all_targets.bincount().tolist() == counts
    assert data.test.targets.bincount().tolist() == [-(-count // 5) for count in counts]
    assert data.normalize(data.train.inputs).max() == 1
    other = ready(DigitsData(seed=1))
    assert torch.equal(other.test.inputs, data.test.inputs)
    facts = other.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts == {
        "likelihood": "classification",
        "class_names": [str(digit) for digit in range(10)],
        "input_mean": [0.0],
        "input_std": [1.0],
        "input_scale": 16.0,
        "input_shape": [1, 8, 8],
        "num_train": len(other.train),
    }


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def write_mnist(data_dir: Path, kind: str = "MNIST") -> Path:
    folder = data_dir / kind / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 5)):
        images = np.arange(count * 784).reshape(count, 28, 28) % 256
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    return folder


def test_mnist_is_read_and_scaled_without_a_download(tmp_path):
    write_mnist(tmp_path)
    data = ready(MNISTData(data_dir=str(tmp_path), validation_share=0.0))
    assert data.train.inputs.shape == (20, 1, 28, 28)
    assert data.test.targets.tolist() == [0, 1, 2, 3, 4]
    assert data.test.targets.dtype == torch.int64
    expected = torch.arange(784).remainder(256).float() / 255
    torch.testing.assert_close(data.normalize(data.train.inputs)[0].flatten(), expected)


def test_fashion_mnist_is_read_from_its_own_folder(tmp_path):
    write_mnist(tmp_path, "FashionMNIST")
    data = FashionMNISTData(data_dir=str(tmp_path))
    ready(data)
    assert (len(data.train), len(data.val or ()), len(data.test)) == (18, 2, 5)
    assert data.class_names[0] == "T-shirt/top"
    assert data.class_names[9] == "Ankle boot"
    path = tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"^{path} is damaged .* so FashionMNIST cannot be read"):
        ready(FashionMNISTData(data_dir=str(tmp_path)))


def test_missing_fashion_mnist_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "urlopen", no_network)
    with pytest.raises(FileNotFoundError, match="no route to host") as error:
        ready(FashionMNISTData(data_dir=str(tmp_path)))
    for part in ("https://", "fashion", str(tmp_path / "FashionMNIST" / "raw"), "data_dir"):
        assert part in str(error.value)


def test_missing_mnist_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "urlopen", no_network)
    with pytest.raises(FileNotFoundError, match="no route to host") as error:
        ready(MNISTData(data_dir=str(tmp_path)))
    for part in ("https://", str(tmp_path / "MNIST" / "raw"), "data_dir"):
        assert part in str(error.value)


def test_truncated_mnist_is_refused(tmp_path):
    path = write_mnist(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="MNIST"):
        ready(MNISTData(data_dir=str(tmp_path)))


def idx(shape: list[int], values: bytes = b"", kind: int = 8) -> bytes:
    return bytes([0, 0, kind, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + values


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train-labels-idx1-ubyte", idx([20], bytes([*range(10), 200, *range(9)])), "label 10 .*"),
        ("train-labels-idx1-ubyte", idx([19], bytes(19)), "19 labels for 20 images"),
        ("train-labels-idx1-ubyte", idx([20], bytes(80), kind=12), "header is not that of bytes"),
        ("train-labels-idx1-ubyte", b"", "header is not that of bytes"),
        ("t10k-images-idx3-ubyte", idx([2**32 - 1] * 3), "do not fit the shape"),
        ("t10k-images-idx3-ubyte", idx([0, 28, 28]), "do not fit the shape"),
        ("t10k-images-idx3-ubyte", idx([5, 28, 28], bytes(5 * 784 + 1)), "do not fit the shape"),
        ("t10k-images-idx3-ubyte", idx([5, 8, 8], bytes(320)), "8x8 pixels"),
    ],
)
def test_damaged_mnist_is_one_line_with_the_file(tmp_path, name, content, said):
    path = write_mnist(tmp_path) / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path} is damaged [^\n]*{said}[^\n]*MNIST[^\n]*$"):
        ready(MNISTData(data_dir=str(tmp_path)))


def test_mnist_opens_no_other_files_beside_its_own(tmp_path):
    processed = write_mnist(tmp_path).parent / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):  # torchvision would load these instead
        (processed / name).write_bytes(b"no tensors")
    assert len(ready(MNISTData(data_dir=str(tmp_path))).test) == 5


def write_images(root: Path, size: tuple[int, int] = (4, 3), mode: str = "RGB") -> None:
    """Write three training and two test images per class; red encodes class and number."""
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(["cat", "dog"]):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                color = 100 * label + i
                fill = color if mode == "L" else (color, 7, 9)
                Image.new(mode, size, fill).save(folder / f"{i}.png")


def test_a_folder_of_images_is_read_by_class(tmp_path):
    write_images(tmp_path)
    (tmp_path / "train" / "cat" / ".DS_Store").write_text("x")
    (tmp_path / "train" / ".DS_Store").write_text("x")
    (tmp_path / "test" / "dog" / "notes.txt").write_text("x")
    data = ready(ImageFolderData(str(tmp_path), validation_share=0.0))
    assert data.train.inputs.shape == (6, 3, 3, 4)
    assert data.train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.targets.dtype == torch.int64
    assert data.train.inputs[:, 0, 2, 3].tolist() == [0, 1, 2, 100, 101, 102]
    assert data.test.inputs[3, :, 0, 0].tolist() == [101, 7, 9]
    facts = data.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["class_names"] == ["cat", "dog"]
    assert torch.equal(data.augment(data.train.inputs), data.train.inputs)
    assert data.normalize(data.train.inputs)[5, 0, 0, 0].item() == pytest.approx(102 / 255)


def test_grey_images_have_one_channel(tmp_path):
    write_images(tmp_path, mode="L")
    options = {"mean": [0.5], "std": [0.25], "validation_share": 0.0}
    data = ready(ImageFolderData(str(tmp_path), **options))
    assert data.train.inputs.shape == (6, 1, 3, 4)
    expected = (102 / 255 - 0.5) / 0.25
    assert data.normalize(data.train.inputs)[5, 0, 0, 0].item() == pytest.approx(expected)


def test_palette_images_are_read_in_their_colors(tmp_path):
    write_images(tmp_path)
    path = tmp_path / "train" / "cat" / "0.png"
    Image.new("RGB", (4, 3), (255, 0, 0)).convert("P").save(path)
    data = ready(ImageFolderData(str(tmp_path), validation_share=0.0))
    assert data.train.inputs[0, :, 0, 0].tolist() == [255, 0, 0]


def test_cifar10_reads_a_folder(tmp_path):
    write_images(tmp_path / "cifar10", size=(32, 32))
    data = ready(CIFAR10Data("folder", data_dir=str(tmp_path)))
    assert isinstance(data, CIFAR10Data)
    assert data.train.inputs.shape == (5, 3, 32, 32)
    assert data.class_names == ["cat", "dog"]


def test_missing_cifar10_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "urlopen", no_network)
    with pytest.raises(FileNotFoundError, match="no route to host") as error:
        ready(CIFAR10Data(data_dir=str(tmp_path)))
    for part in ("https://", str(tmp_path / "cifar-10-batches-py"), "data_dir", "source=folder"):
        assert part in str(error.value)


def test_images_of_any_size_are_cropped_to_their_center_and_resized(tmp_path):
    write_images(tmp_path)
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 6:8] = 100  # the central square is columns 4 to 7: dark, light
    Image.fromarray(wide).save(tmp_path / "train" / "cat" / "0.png")
    tall = Image.fromarray(np.ascontiguousarray(wide.transpose(1, 0, 2)))
    tall.save(tmp_path / "train" / "cat" / "1.png")
    data = ready(ImageFolderData(str(tmp_path), size=2, validation_share=0.0))
    assert data.train.inputs.shape == (6, 3, 2, 2)
    dark, light = data.train.inputs[0, 0, 0].tolist()
    assert (data.train.inputs[0, :, :, 0] == dark).all()
    assert dark < 20  # bilinear weights reach into the other half
    assert light > 60
    assert torch.equal(data.train.inputs[1], data.train.inputs[0].transpose(1, 2))
    assert (data.train.inputs[3, 0] == 100).all()
    large = ready(ImageFolderData(str(tmp_path), size=9, validation_share=0.0))
    assert large.train.inputs.shape == (6, 3, 9, 9)
    assert large.facts()["input_shape"] == [3, 9, 9]


def test_a_smaller_image_is_the_mean_of_its_pixels(tmp_path):
    write_images(tmp_path)
    fine = (np.indices((64, 64)).sum(0) % 2 * 200).astype(np.uint8)  # a checkerboard
    Image.fromarray(fine).convert("RGB").save(tmp_path / "train" / "cat" / "0.png")
    data = ready(ImageFolderData(str(tmp_path), size=4, validation_share=0.0))
    assert (data.train.inputs[0].int() - 100).abs().max() <= 2


def test_channels_are_converted(tmp_path):
    write_images(tmp_path)
    Image.new("L", (4, 3), 60).save(tmp_path / "train" / "cat" / "0.png")
    color = ready(ImageFolderData(str(tmp_path), channels=3, validation_share=0.0))
    assert color.train.inputs[0, :, 0, 0].tolist() == [60, 60, 60]
    assert color.train.inputs[3, :, 0, 0].tolist() == [100, 7, 9]
    gray = ready(ImageFolderData(str(tmp_path), channels=1, validation_share=0.0))
    assert gray.train.inputs[0].unique().tolist() == [60]
    luma = round(0.299 * 100 + 0.587 * 7 + 0.114 * 9)
    assert gray.train.inputs[3].unique().tolist() == [luma]


def write_classes(root: Path, counts: dict[str, int]) -> None:
    """Write images of 4x3 pixels to `<root>/<class>/*`; red encodes class and number."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 3), (100 * label + i, 7, 9)).save(root / name / f"{i:03}.png")


def test_test_images_are_drawn_from_each_class(tmp_path):
    write_classes(tmp_path, {"cat": 20, "dog": 10})
    options = {"test_share": 0.2, "validation_share": 0.0}
    data = ready(ImageFolderData(str(tmp_path), **options))
    assert data.train.targets.bincount().tolist() == [16, 8]
    assert data.test.targets.bincount().tolist() == [4, 2]
    reds = torch.cat([data.train.inputs, data.test.inputs])[:, 0, 0, 0].tolist()
    assert sorted(reds) == [*range(20), *range(100, 110)]
    assert torch.equal(data.test.inputs[:, 0, 0, 0] // 100, data.test.targets)
    again, other = (ready(ImageFolderData(str(tmp_path), seed=s, **options)) for s in (0, 1))
    assert torch.equal(data.test.inputs, again.test.inputs)
    assert not torch.equal(data.test.inputs, other.test.inputs)
    before = data.facts()["source_sha256"]
    assert before == other.facts()["source_sha256"]
    (tmp_path / "cat" / "000.png").rename(tmp_path / "cat" / "900.png")
    assert ready(ImageFolderData(str(tmp_path), **options)).facts()["source_sha256"] != before


def test_drawing_test_images_needs_class_folders(tmp_path):
    write_classes(tmp_path / "flat", {"cat": 2})
    with pytest.raises(FileNotFoundError, match=r"no folder .*/train: .*option test_share of task"):
        ready(ImageFolderData(str(tmp_path / "flat")))
    write_images(tmp_path / "split")
    with pytest.raises(ValueError, match=r"test_share=0.2: .* has folders train and test"):
        ready(ImageFolderData(str(tmp_path / "split"), test_share=0.2))
    write_classes(tmp_path / "one", {"cat": 1, "dog": 1})
    with pytest.raises(ValueError, match=r"test_share=0.2: 2 rows are too few for a test row"):
        ready(ImageFolderData(str(tmp_path / "one"), test_share=0.2))


@pytest.mark.parametrize(
    ("options", "message"), [({"size": 0}, "size=0: "), ({"channels": 2}, "channels=2: choose 1")]
)
def test_options_of_images_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ImageFolderData(str(tmp_path), **options)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (5, 3)), "5x3 with 3 channels, but .* is 4x3 with 3 channels"),
        (Image.new("L", (4, 3)), "4x3 with 1 channel, but"),
        (Image.new("RGBA", (4, 3)), "mode RGBA"),
    ],
)
def test_the_first_image_that_differs_is_named(tmp_path, image, message):
    write_images(tmp_path)
    odd = tmp_path / "test" / "cat" / "1.png"
    image.save(odd)
    image.save(tmp_path / "test" / "dog" / "1.png")
    with pytest.raises(ValueError, match=f"{odd} .*{message}"):
        ready(ImageFolderData(str(tmp_path)))


# ---- what a screen shows is not always what the pixels are


def arrow(mode: str = "RGB") -> Image.Image:
    """Create 4x4 pixels without two equal rows or columns."""
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    return Image.fromarray(pixels).convert(mode)


def read_one(folder: Path, suffix: str, save: Callable[[Path], None]) -> torch.Tensor:
    """Return the first image [C, 4, 4] of a data set, which `save` writes."""
    write_images(folder, size=(4, 4))
    for path in folder.rglob("*.png"):
        path.unlink()
        if path.stem == "0":
            save(path.with_suffix(suffix))
    data = ready(ImageFolderData(str(folder), validation_share=0.0))
    return data.train.inputs[0]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_rotated_with_non_finite_displayed(tmp_path, suffix, orientation):
    shown = np.asarray(arrow())
    # The pixels in the file for each orientation of the EXIF standard: 6 is rotated clockwise.
    stored = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.transpose(1, 0, 2),
        6: shown.transpose(1, 0, 2)[::-1],
        7: shown.transpose(1, 0, 2)[::-1, ::-1],
        8: shown.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation

    def save(path: Path) -> None:
        image = Image.fromarray(np.ascontiguousarray(stored))
        image.save(path, exif=exif, quality=100, lossless=True)

    found = read_one(tmp_path, suffix, save).permute(1, 2, 0).int().numpy()
    np.testing.assert_allclose(found, shown, atol=4 if suffix == ".jpg" else 0)


def png(header: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Create a PNG file of black pixels from the end of IHDR and from other chunks."""
    depth, kind = header[0], header[1]
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    rows = bytes(4 * (1 + -(-4 * channels * depth // 8)))
    size = (4).to_bytes(4, "big") * 2
    parts = [(b"IHDR", size + header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in parts:
        check = zlib.crc32(name + data).to_bytes(4, "big")
        content += len(data).to_bytes(4, "big") + name + data + check
    return content


def bmp(color_space: bytes) -> bytes:
    """Create a BMP file of black pixels with a header of version 5, little-endian."""
    size, header = 4 * 12, 124
    start = b"BM" + (14 + header + size).to_bytes(4, "little") + bytes(4)
    start += (14 + header).to_bytes(4, "little") + header.to_bytes(4, "little")
    start += (4).to_bytes(4, "little") * 2 + b"\x01\0" + b"\x18\0" + bytes(4)
    start += size.to_bytes(4, "little")
    return start.ljust(70, b"\0") + color_space + bytes(14 + header - 74 + size)


RGB8 = bytes([8, 2, 0, 0, 0])
P8 = bytes([8, 3, 0, 0, 0])
GAMMA_1 = (b"gAMA", (100_000).to_bytes(4, "big"))
USUAL_GAMMA = (b"gAMA", (45_455).to_bytes(4, "big"))
PRIMARIES = (b"cHRM", b"".join(n.to_bytes(4, "big") for n in (31270, 32900, *[50000] * 6)))
PALETTE = (b"PLTE", bytes(6))


def written(content: bytes) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(content), None)[1]


def animated(suffix: str) -> Callable[[Path], None]:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    return lambda path: frames[0].save(path, save_all=True, append_images=frames[1:])


def with_profile(name: str) -> Callable[[Path], None]:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile(name))
    return lambda path: arrow().save(path, icc_profile=profile.tobytes(), quality=100)


REFUSED_IMAGES = {
    "16-bit RGB": (".png", written(png(bytes([16, 2, 0, 0, 0]))), "16 bits"),
    "16-bit gray": (".png", written(png(bytes([16, 0, 0, 0, 0]))), "mode I;16"),
    "alpha": (".png", written(png(bytes([8, 6, 0, 0, 0]))), "mode RGBA"),
    "gray with alpha": (".png", written(png(bytes([8, 4, 0, 0, 0]))), "mode LA"),
    "a transparent color": (".png", written(png(RGB8, (b"tRNS", bytes(6)))), "transparent"),
    "a transparent gray": (
        *(".png", written(png(bytes([8, 0, 0, 0, 0]), (b"tRNS", bytes(2)))), "transparent"),
    ),
    "a transparent palette": (".png", written(png(P8, PALETTE, (b"tRNS", b"\0"))), "transparent"),
    "transparent WebP": (
        *(".webp", lambda path: Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(path), "mode RGBA"),
    ),
    "animated PNG": (".png", animated(".png"), "has 3 frames"),
    "animated WebP": (".webp", animated(".webp"), "has 3 frames"),
    "CMYK": (".jpg", lambda path: arrow("CMYK").save(path), "mode CMYK"),
    "linear gamma": (".png", written(png(RGB8, GAMMA_1)), "gamma"),
    "other primaries": (".png", written(png(RGB8, PRIMARIES)), "primary colors"),
    "a color space": (".png", written(png(RGB8, (b"cICP", bytes([9, 16, 0, 1])))), "cICP"),
    "a profile of a BMP": (".bmp", written(bmp(b"DEBM")), "color profile"),
    "a profile": (".jpg", with_profile("LAB"), "color profile"),
    "a broken profile": (
        *(".jpg", lambda path: arrow().save(path, icc_profile=b"x" * 200), "color profile"),
    ),
}


@pytest.mark.parametrize("kind", REFUSED_IMAGES)
def test_images_displayed_in_other_colors_than_their_pixels_are_refused(tmp_path, kind):
    suffix, save, said = REFUSED_IMAGES[kind]
    with pytest.raises(ValueError, match=said) as error:
        read_one(tmp_path, suffix, save)
    assert str(tmp_path / "train" / "cat" / f"0{suffix}") in str(error.value)
    assert "\n" not in str(error.value)


ACCEPTED_IMAGES = {
    "1-bit": (".png", lambda path: arrow("1").save(path)),
    "4-bit": (".png", lambda path: arrow("P").quantize(16).save(path, bits=4)),
    "the usual gamma": (".png", written(png(RGB8, USUAL_GAMMA))),
    "sRGB, whatever the gamma": (".png", written(png(RGB8, (b"sRGB", b"\0"), GAMMA_1))),
    "a BMP that says sRGB": (".bmp", written(bmp(b"BGRs"))),
    "the profile of sRGB": (".jpg", with_profile("sRGB")),
    "EXIF that is none": (".jpg", lambda path: arrow().save(path, exif=b"Exif\0\0" + b"x" * 99)),
}


@pytest.mark.parametrize("kind", ACCEPTED_IMAGES)
def test_metadata_that_change_no_color_are_accepted(tmp_path, kind):
    suffix, save = ACCEPTED_IMAGES[kind]
    found = read_one(tmp_path, suffix, save)
    plain = np.asarray(Image.open(tmp_path / "train" / "cat" / f"0{suffix}").convert("RGB"))
    assert np.array_equal(found.expand(3, 4, 4).permute(1, 2, 0), plain)


def test_an_image_above_the_limit_of_pixels_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for folder, pixels in (("warned", 12), ("refused", 30)):
        write_images(tmp_path / folder, size=(pixels // 3, 3))
        path = tmp_path / folder / "train" / "cat" / "0.png"
        with pytest.raises(ValueError, match=f"{path} cannot be read .*exceeds limit"):
            ready(ImageFolderData(str(tmp_path / folder)))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["FIFO", "folder"])
def test_paths_that_are_not_files_are_named_without_blocking(tmp_path, make):
    write_images(tmp_path)
    path = tmp_path / "train" / "dog" / "1.png"
    path.unlink()
    make(path)
    with pytest.raises(ValueError, match=f"{path} cannot be read as an image"):
        ready(ImageFolderData(str(tmp_path)))


def test_names_of_files_reach_no_terminal_with_non_finite(tmp_path):
    write_images(tmp_path)
    (tmp_path / "train" / "cat" / "\x1b[2J.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cat/\\x1b\[2J.png cannot be read"):
        ready(ImageFolderData(str(tmp_path)))


@pytest.mark.parametrize("keep", [0, 20, 45])
def test_a_corrupt_image_is_named(tmp_path, keep):
    write_images(tmp_path)
    path = tmp_path / "train" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{path} cannot be read as an image"):
        ready(ImageFolderData(str(tmp_path)))


def test_classes_must_be_the_same_in_both_parts(tmp_path):
    write_images(tmp_path)
    (tmp_path / "test" / "emu").mkdir()
    with pytest.raises(ValueError, match="'emu' is in only one of train and test"):
        ready(ImageFolderData(str(tmp_path)))


def test_empty_and_missing_folders_are_named(tmp_path):
    data = ImageFolderData(data_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path}/images/train"):
        ready(data)
    (tmp_path / "images" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no class folders"):
        ready(data)
    for part in ("train", "test"):
        (tmp_path / "images" / part / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{tmp_path}/images/train/cat has no images"):
        ready(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [0.5]}, "give both or neither"),
        ({"mean": [0.5], "std": [0.0]}, "std="),
        ({"mean": [0.5, 0.5], "std": [1.0, 1.0]}, "2 numbers for images of 3 channels"),
        ({"crop_padding": -1}, "crop_padding=-1"),
    ],
)
def test_impossible_image_options_are_refused(tmp_path, options, message):
    write_images(tmp_path)
    with pytest.raises(ValueError, match=message):
        ready(ImageFolderData(str(tmp_path), **options))


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match="source='web'"):
        CIFAR10Data("web")


@pytest.mark.skipif(not DATA_DIR, reason="BQNN_DATA_DIR is not set: no copy of the real data")
def test_the_real_mnist_has_its_published_sizes():
    data = ready(MNISTData(data_dir=DATA_DIR))
    assert (len(data.train), len(data.val), len(data.test)) == (54_000, 6_000, 10_000)
    assert data.test.targets.bincount().tolist() == [
        *(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
    ]


@pytest.mark.skipif(not DATA_DIR, reason="BQNN_DATA_DIR is not set: no copy of the real data")
def test_the_real_fashion_mnist_has_its_published_sizes():
    data = ready(FashionMNISTData(data_dir=DATA_DIR))
    assert (len(data.train), len(data.val), len(data.test)) == (54_000, 6_000, 10_000)
    assert data.test.targets.bincount().tolist() == [1000] * 10


def test_a_file_that_is_not_an_image_is_named_once(tmp_path):
    write_images(tmp_path)
    path = tmp_path / "train" / "cat" / "0.png"
    path.write_text("not an image")
    with pytest.raises(ValueError, match="it is not a BMP, JPEG, PNG or WEBP file") as caught:
        ready(ImageFolderData(str(tmp_path)))
    assert str(caught.value).count(str(path)) == 1


@pytest.mark.filterwarnings("error")
def test_damaged_exif_data_are_no_warning(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0\0\0\x01"

    def save(path: Path) -> None:
        arrow().save(path, exif=exif)

    assert read_one(tmp_path, ".jpg", save).shape == (3, 4, 4)
