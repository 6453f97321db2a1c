"""Distortions of images whose results are known."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from bqnn.data.distortions import (
    DISTORTIONS,
    Distortion,
    add_impulse_noise,
    add_shot_noise,
    blur,
    brighten,
    compress,
    distort,
    pixelate,
    reduce_contrast,
    rotate,
    shift,
)

LEVELS = range(1, 6)


def random_images(white: int = 255, size: int = 28, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (5, channels, size, size)
    return torch.randint(white + 1, shape, dtype=torch.uint8, generator=generator)


def test_the_levels_are_those_of_the_paper():
    assert DISTORTIONS["rotation"].amounts == (15, 30, 45, 60, 75)
    assert DISTORTIONS["shift"].amounts == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert DISTORTIONS["brightness"].amounts == (1.5, 2, 2.5, 3, 3.5)


def test_a_quarter_turn_moves_every_pixel_counter_clockwise():
    images = random_images(channels=3)
    turned = distort(images, Distortion(rotate, (90,)), 1, white=255)
    assert torch.equal(turned, torch.rot90(images, 1, (2, 3)))


def test_a_rotated_disc_stays_where_it_is_and_corners_turn_black():
    y, x = torch.meshgrid(torch.arange(-13.5, 14), torch.arange(-13.5, 14), indexing="ij")
    disc = (1 - (x**2 + y**2).sqrt() / 14).clamp_min(0)[None, None]
    assert (rotate(disc, 30) - disc).abs().max() < 0.02
    assert rotate(torch.ones(1, 1, 28, 28), 45)[0, 0, 0, 0] == 0


def test_a_shift_is_by_whole_pixels_to_the_right_and_black_follows():
    images = random_images() / 255.0
    moved = shift(images, 0.1)  # 2.8 pixels of 28
    assert torch.equal(moved[..., 3:], images[..., :-3])
    assert (moved[..., :3] == 0).all()
    assert torch.equal(shift(images, 0), images)


def test_brightness_is_a_factor_up_to_white():
    pixels = torch.tensor([0.0, 0.25, 0.5, 1.0]).view(1, 1, 2, 2)
    assert brighten(pixels, 2).flatten().tolist() == [0, 0.5, 1, 1]


@pytest.mark.parametrize("sigma", [0.5, 2.5])
def test_blur_is_a_gaussian_filter(sigma):
    images = random_images() / 255.0
    radius = int(np.ceil(3 * sigma))
    expected = scipy.ndimage.gaussian_filter(
        images[0, 0].double().numpy(), sigma, mode="mirror", radius=radius
    )
    np.testing.assert_allclose(blur(images, sigma)[0, 0], expected, atol=1e-6)


def test_noise_has_its_standard_deviation_and_grows_from_one_draw():
    grey = torch.full((200, 1, 28, 28), 128, dtype=torch.uint8)
    first, third = (
        distort(grey, DISTORTIONS["noise"], level, white=255).float() - 128 for level in (1, 3)
    )
    assert first.std() / 255 == pytest.approx(0.1, rel=0.01)
    inside = third.abs() < 100  # of what is not cut off at black or white
    assert (third - 3 * first)[inside].abs().max() <= 2  # rounding


def test_shot_noise_is_unbiased_and_grows_with_the_root_of_brightness():
    torch.manual_seed(0)
    for grey in (0.25, 1.0):
        noisy = add_shot_noise(torch.full((100, 1, 28, 28), grey), 0.2)
        assert noisy.mean() == pytest.approx(grey, abs=0.005)
        assert noisy.std() == pytest.approx(0.2 * grey**0.5, rel=0.02)
    assert add_shot_noise(torch.zeros(1, 1, 4, 4), 0.5).sum() == 0


def test_impulse_noise_is_black_or_white_in_its_share_of_pixels():
    torch.manual_seed(0)
    noisy = add_impulse_noise(torch.full((100, 1, 28, 28), 0.5), 0.2)
    assert (noisy == 0).float().mean() == pytest.approx(0.1, abs=0.005)
    assert (noisy == 1).float().mean() == pytest.approx(0.1, abs=0.005)
    assert set(noisy.unique().tolist()) == {0, 0.5, 1}


def test_more_impulse_noise_hits_the_same_pixels_and_others():
    images = random_images()
    first, third = (distort(images, DISTORTIONS["impulse_noise"], n, 255) for n in (1, 3))
    hit = first != images
    assert torch.equal(third[hit], first[hit])
    assert (third != images).sum() > hit.sum()


def test_contrast_keeps_the_mean_of_each_channel():
    images = random_images(channels=3) / 255.0
    flat = reduce_contrast(images, 0.3)
    torch.testing.assert_close(flat.mean((2, 3)), images.mean((2, 3)))
    torch.testing.assert_close(flat.std((2, 3)), 0.3 * images.std((2, 3)))


def test_pixels_of_half_the_resolution_are_means_of_four():
    images = random_images(channels=3) / 255.0
    coarse = pixelate(images, 0.5)
    blocks = images.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    torch.testing.assert_close(coarse, blocks.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_jpeg_of_smooth_images_is_close_and_worse_at_a_low_quality(channels):
    ramp = torch.linspace(0, 1, 32).expand(4, channels, 32, 32)
    error = [(compress(ramp, quality) - ramp).abs().mean().item() for quality in (95, 7)]
    assert error[0] < 0.01 < error[1]


def test_jpeg_keeps_images_channels_and_colors_apart():
    colors = torch.eye(3).repeat(2, 1)[:, :, None, None].expand(6, 3, 16, 16)
    assert (compress(colors, 95) - colors).abs().max() < 0.1
    planes = torch.tensor([[0.0, 1.0], [1.0, 0.5]])[:, :, None, None].expand(2, 2, 8, 8)
    assert (compress(planes, 95) - planes).abs().max() < 0.02


@pytest.mark.parametrize("white", [255, 16])
@pytest.mark.parametrize("name", DISTORTIONS)
def test_every_level_gives_pixels_again_and_the_same_each_time(name, white):
    images = random_images(white, size=8)
    before = images.clone()
    state = torch.get_rng_state()
    changes = []
    for level in LEVELS:
        distorted = distort(images, DISTORTIONS[name], level, white)
        assert distorted.dtype == torch.uint8
        assert distorted.shape == images.shape
        assert distorted.max() <= white
        assert torch.equal(distort(images, DISTORTIONS[name], level, white), distorted)
        changes.append((distorted.float() - images.float()).abs().mean().item())
    assert min(changes) > 0
    assert changes[4] >= changes[0]
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


NEUTRAL = ["rotation", "shift", "brightness", "noise", "impulse_noise", "contrast", "pixelation"]


@pytest.mark.parametrize("name", NEUTRAL)
def test_nothing_changes_nothing(name):
    kind = DISTORTIONS[name]
    images = random_images()
    assert torch.equal(
        distort(images, Distortion(kind.change, (kind.nothing,)), 1, white=255), images
    )
