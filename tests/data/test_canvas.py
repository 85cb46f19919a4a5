"""Photos of any size are decoded into the canvas, which keeps their centered square."""

import numpy as np
import pytest
import simplejpeg
import torch

from triderm_dist.config import AugmentConfig
from triderm_dist.data.augment import PhotoTransform
from triderm_dist.data.canvas import decode_into, fit_to_canvas


def ramp(height: int, width: int) -> np.ndarray:
    """Return an image with red increasing downwards and green to the right, from 0 to 250; blue is constant."""
    down, right = np.mgrid[:height, :width]
    channels = [250 * down / (height - 1), 250 * right / (width - 1), np.full((height, width), 9)]
    return np.stack(channels, 2).round().astype(np.uint8)


@pytest.mark.parametrize(
    "size", [(36, 48), (48, 36), (72, 96), (18, 24), (40, 40), (30, 31), (36, 90), (24, 96), (91, 36)]
)
@pytest.mark.parametrize("canvas", [(36, 48), (48, 36), (36, 36), (24, 72)])
def test_resized_photo_keeps_its_center_crop(size, canvas):
    """The center crop used in evaluation is that of the original photo, up to a rotation by 90 degrees."""
    photo = ramp(*size)
    fitted = fit_to_canvas(photo, *canvas)
    assert fitted.shape == (*canvas, 3) and fitted.dtype == np.uint8
    is_rotated = (size[0] - size[1]) * (canvas[0] - canvas[1]) < 0
    if is_rotated:
        photo = np.rot90(photo)
    fitted_crop, photo_crop = (
        PhotoTransform(24, AugmentConfig())(torch.from_numpy(array.copy())[None], "clinical")[0] * 250
        for array in (fitted, photo)
    )
    assert (rotated_back(fitted_crop, photo_crop) - photo_crop).abs().max() < 8  # about the difference of one pixel


def rotated_back(crop: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Undo a rotation by 90 degrees in either direction."""
    return min((crop, torch.rot90(crop, 2, (1, 2))), key=lambda pixels: float((pixels - expected).abs().mean()))


def test_padding_is_reflected():
    fitted = fit_to_canvas(ramp(40, 40), 40, 60)
    assert np.array_equal(fitted[:, 10:50], ramp(40, 40))
    assert np.array_equal(fitted[:, :10], fitted[:, 10:20][:, ::-1])
    assert np.array_equal(fitted[:, 50:], fitted[:, 40:50][:, ::-1])


@pytest.mark.parametrize("size", [(36, 48), (48, 36), (35, 48), (18, 24), (24, 90), (72, 96), (36, 49)])
def test_photo_of_any_size_is_decoded_into_the_canvas(size):
    data = simplejpeg.encode_jpeg(ramp(*size), quality=95)
    out = np.empty((36, 48, 3), np.uint8)
    decode_into(out, memoryview(data))
    assert np.array_equal(out, fit_to_canvas(simplejpeg.decode_jpeg(data), 36, 48))
    with pytest.raises(ValueError, match=r"(?i)jpeg"):
        decode_into(out, data[: len(data) // 2])
