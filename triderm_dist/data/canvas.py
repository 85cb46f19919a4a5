"""Decode photos and fit them to one size."""

from __future__ import annotations

import math

import numpy as np
import torch
from simplejpeg import decode_jpeg


def empty_photos(number: int, height: int, width: int) -> torch.Tensor:
    """Return photos (number, height, width, 3) uint8, pinned if there is a GPU, for a decoder to fill.

    They start 16 bytes past a multiple of 32, since libjpeg-turbo writes aligned rows with non-temporal stores, which
    bypass the caches and cost the next reader 10 of 280 microseconds per photo of 384x288.
    """
    shape, offset = (number, height, width, 3), 16
    memory = torch.empty(offset + math.prod(shape), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    return memory[offset:].view(shape)


def decode_into(out: np.ndarray, data: bytes | memoryview) -> None:
    """Decode a JPEG into `out` (H, W, 3), without a copy if it has that size. Raises ValueError if it fails."""
    try:
        photo = decode_jpeg(data, "RGB", buffer=out)
        if photo.shape == out.shape:
            return
        photo = photo.copy()  # it uses the memory of `out`
    except ValueError:  # larger than `out`, or damaged
        photo = decode_jpeg(data, "RGB")
    out[:] = fit_to_canvas(photo, *out.shape[:2])


def fit_to_canvas(photo: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fit a photo (h, w, 3) uint8 to (height, width, 3), such that its centered square becomes that of the canvas.

    A photo whose orientation (portrait or landscape) differs from the canvas is rotated by 90 degrees, since lesions
    have no upright orientation. It is scaled to the short side of the canvas; then its long side is cropped, or
    mirrored at both ends, to that of the canvas.
    """
    if (height, photo.shape[0]) > (width, photo.shape[1]):  # a portrait canvas: fit the transposed photo
        return fit_to_canvas(photo.swapaxes(0, 1), width, height).swapaxes(0, 1)
    if photo.shape[0] > photo.shape[1]:
        photo = np.rot90(photo)
    from PIL import Image

    short, long = photo.shape[:2]
    scale = height / short
    border = max(0, round((width - long * scale) / 2))
    kept = width - 2 * border
    outside = max(0.0, (long - kept / scale) / 2)
    scaled = Image.fromarray(np.ascontiguousarray(photo)).resize(
        (kept, height), Image.Resampling.BILINEAR, box=(outside, 0, long - outside, short)
    )
    return np.pad(np.asarray(scaled), ((0, 0), (border, border), (0, 0)), mode="symmetric")
