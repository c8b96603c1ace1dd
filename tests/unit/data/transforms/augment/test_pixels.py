"""What is done to pixels, against Pillow and against torchvision's published formulae, written out here with torch.

Levels are in [0, 255]. Both round otherwise than OpenCV does, hence the tolerances."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from torch.nn import functional

from opentau_train.data.transforms.augment import pixels
from opentau_train.data.transforms.augment.pixels import Box

GREY = torch.tensor([0.2989, 0.587, 0.114])[:, None, None]


def natural(seed: int = 0, size: tuple[int, int] = (45, 80)) -> np.ndarray:
    """[H, W, 3] uint8: coloured blobs without steps between pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


def noise(seed: int = 0, size: tuple[int, int] = (45, 80)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def levels(picture: np.ndarray) -> torch.Tensor:
    """[3, H, W] f32 in [0, 1], as torchvision's functions take it."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255


def distance(picture: np.ndarray, reference) -> np.ndarray:
    if isinstance(reference, torch.Tensor):
        reference = (reference.clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    assert picture.dtype == np.uint8 and picture.shape == np.shape(reference)
    return np.abs(picture.astype(np.float64) - np.asarray(reference, np.float64))


def blended(picture: torch.Tensor, other, factor: float) -> torch.Tensor:
    return factor * picture + (1 - factor) * other


def torch_sharpness(picture: torch.Tensor, factor: float) -> torch.Tensor:
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth = picture.clone()
    smooth[:, 1:-1, 1:-1] = functional.conv2d(picture[:, None], kernel[None, None])[:, 0]
    return blended(picture, smooth, factor)


REFERENCES = {
    "brightness": lambda p, factor: p * factor,
    "contrast": lambda p, factor: blended(p, (p * GREY).sum(0).mean(), factor),
    "saturation": lambda p, factor: blended(p, (p * GREY).sum(0, keepdim=True), factor),
    "sharpness": torch_sharpness,
}
ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
    "sharpness": ImageEnhance.Sharpness,
}


@given(st.sampled_from(sorted(REFERENCES)), st.floats(0.0, 2.0), st.integers(0, 100), st.sampled_from([natural, noise]))
def test_colours_are_torchvisions_and_pillows_within_two_levels(name, factor, seed, made):
    picture = made(seed)
    result = pixels.OPERATIONS[name](picture, factor)
    assert distance(result, REFERENCES[name](levels(picture), factor)).max() <= 2
    assert distance(result, ENHANCERS[name](Image.fromarray(picture)).enhance(factor)).max() <= 3


def torch_hue(picture: torch.Tensor, turns: float) -> torch.Tensor:
    """By the definition of hue, saturation and value: the hexcone model, in floats."""
    most, which = picture.max(0)
    least = picture.min(0).values
    spread = most - least
    safe = torch.where(spread == 0, 1, spread)
    r, g, b = picture
    sixth = torch.stack([(g - b) / safe % 6, (b - r) / safe + 2, (r - g) / safe + 4]).gather(0, which[None])[0]
    sixth = (torch.where(spread == 0, 0, sixth) + 6 * turns) % 6
    across = torch.stack([(n + sixth) % 6 for n in (5.0, 3.0, 1.0)])
    return most - spread * torch.minimum(across, 4 - across).clamp(0, 1)


@given(st.floats(-0.5, 0.5), st.integers(0, 100), st.sampled_from([natural, noise]))
def test_hues_are_those_of_the_hexcone_within_the_256ths_of_eight_bits(turns, seed, made):
    picture = made(seed)
    far = distance(pixels.hue(picture, turns), torch_hue(levels(picture), turns))
    # Two 256ths of a turn, there and back, are 12 levels of the purest colours; saturation and value round, too.
    assert far.max() <= 13 and far.mean() <= 2


@given(st.floats(0.3, 3.0), st.integers(0, 100))
def test_a_blur_is_a_convolution_with_a_gaussian_within_three_levels(sigma, seed):
    picture = noise(seed)
    reach = round(3 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1).float().square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = functional.pad(levels(picture)[:, None], [reach] * 4, mode="reflect")
    reference = functional.conv2d(functional.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None])
    assert distance(pixels.blur(picture, sigma), reference[:, 0]).max() <= 3


BOXES = st.builds(
    lambda w, h, x, y: Box(x * (1 - w), y * (1 - h), w, h), *[st.floats(0.3, 1.0)] * 2, *[st.floats(0.0, 1.0)] * 2
)


@given(BOXES, st.integers(0, 100))
def test_a_crop_is_pillows_within_two_levels(box, seed):
    picture = natural(seed, (90, 160))
    rows, columns = box.pixels(90, 160)
    assert 0 <= rows.start < rows.stop <= 90 and 0 <= columns.start < columns.stop <= 160
    corners = (columns.start, rows.start, columns.stop, rows.stop)
    transform = Image.Transform.EXTENT
    reference = Image.fromarray(picture).transform((80, 45), transform, corners, Image.Resampling.BILINEAR)
    far = distance(pixels.place(picture, box, (45, 80)), reference)
    assert far[1:-1, 1:-1].max() <= 2  # Pillow has another rule for what lies half a pixel beyond the edge


@given(BOXES, st.floats(-30, 30), st.floats(-0.2, 0.2), st.floats(-0.2, 0.2), st.integers(0, 100))
def test_a_turned_and_moved_part_is_torchs_sampling_of_a_grid_within_three_levels(box, degrees, right, down, seed):
    picture = natural(seed, (90, 160))
    rows, columns = box.pixels(90, 160)
    y, x = torch.meshgrid(torch.arange(45) + 0.5, torch.arange(80) + 0.5, indexing="ij")
    u, v = x - 40 - 80 * right, y - 22.5 - 45 * down  # from the middle, where it has moved to, in pixels of the result
    angle = torch.tensor(degrees).deg2rad()
    across, along = u * angle.cos() - v * angle.sin(), u * angle.sin() + v * angle.cos()
    width, height = columns.stop - columns.start, rows.stop - rows.start
    at_x = (columns.start + columns.stop) / 2 + across * width / 80
    at_y = (rows.start + rows.stop) / 2 + along * height / 45
    grid = torch.stack([at_x / 80 - 1, at_y / 45 - 1], -1)[None]  # of the picture 160 x 90, from -1 to 1
    reference = functional.grid_sample(levels(picture)[None], grid, padding_mode="zeros", align_corners=False)[0]
    inside = (at_x > 1) & (at_x < 159) & (at_y > 1) & (at_y < 89)
    far = distance(pixels.place(picture, box, (45, 80), degrees, (right, down)), reference)
    if degrees or right or down:
        assert far[inside.numpy()].max(initial=0) <= 3
        outside = (at_x < -1) | (at_x > 161) | (at_y < -1) | (at_y > 91)
        assert far[outside.numpy()].max(initial=0) == 0


def test_turns_are_counterclockwise_and_shifts_to_the_right_and_downwards():
    picture = natural(3, (60, 60))
    turned = Image.fromarray(picture).rotate(20, Image.Resampling.BILINEAR)
    assert distance(pixels.place(picture, Box(), (60, 60), 20.0), turned)[15:45, 15:45].max() <= 3
    moved = pixels.place(picture, Box(), (60, 60), 0.0, (0.1, 0.2))
    assert np.array_equal(moved[12:, 6:], picture[:-12, :-6]) and not moved[:12].any() and not moved[:, :6].any()


def test_what_is_cut_out_is_black_and_the_rest_as_it_was():
    picture = noise() | 1
    result = pixels.cut_out(picture, Box(0.25, 0.2, 0.5, 0.4))
    assert not result[9:27, 20:60].any() and (picture > 0).all()
    result[9:27, 20:60] = picture[9:27, 20:60]
    assert np.array_equal(result, picture)


@pytest.mark.parametrize("name", pixels.OPERATIONS)
def test_neutral_numbers_change_nothing_but_hues_and_no_picture_is_written_to(name):
    picture = natural()
    picture.flags.writeable = False
    neutral = {"hue": 0.0, "blur": 0.1}.get(name, 1.0)
    assert distance(pixels.OPERATIONS[name](picture, neutral), picture).max() <= (10 if name == "hue" else 0)
