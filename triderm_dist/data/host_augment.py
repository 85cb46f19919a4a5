"""Augment and normalize one photo at a time on the CPU, in the threads that decode photos.

The crops are those that `augment.PhotoTransform` draws for a batch. One resampling by OpenCV does crop, rotation,
quarter turns, flip and resizing, and one 3x4 matrix does color and normalization, all in float32: values differ from
the batched ones only by rounding, except for augmented photos that are reduced first, which rounds to uint8. OpenCV
releases the GIL, and a photo stays in the cache of one core from the decoder to the batch.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from triderm_dist.config import AugmentConfig
from triderm_dist.data.augment import Crops, LesionRng, PhotoTransform, lesion_keys
from triderm_dist.runtime.extras import install_command, is_installed


@functools.cache
def opencv() -> Any | None:
    """Return the module cv2; None if it is not installed, does not load, or samples differently than `PhotoTransform`.

    OpenCV before version 5, for example, rounds coordinates to 1/32 pixel.
    """
    if not is_installed("cv2"):
        return None
    photo = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    transform, rng = PhotoTransform(24, AugmentConfig()), LesionRng(0, 0, lesion_keys(["a"]), np.zeros(1, np.int64))
    crop = np.empty((24, 24, 3), np.float32)
    try:
        import cv2

        host = HostTransform(transform, 30, 40, (0, 0, 0), (1, 1, 1), cv2)
        host(photo, host.crops(1, "", rng), 0, crop)
    except Exception:  # of a missing library, of OpenCV, or of what else has its name
        return None
    expected = transform(torch.from_numpy(photo)[None], "", rng)[0].permute(1, 2, 0).numpy()
    return cv2 if np.abs(crop - expected).max() < 1e-3 else None


def describe() -> str:
    """Describe in one line which library augments photos on a CPU."""
    if cv2 := opencv():
        return f"photos are cropped and colored by OpenCV {cv2.__version__}, in the threads that decode them"
    advice = f"OpenCV is several times faster: {install_command('cv2')}"
    if is_installed("cv2"):
        advice = f"the installed OpenCV does not load or gives other pixels; {install_command('cv2')}"
    return f"photos are cropped and colored by PyTorch ({advice})"


class HostTransform:
    """Decoded photos (H, W, 3) uint8 -> crops (size, size, 3) float32, normalized for a tower, as `PhotoTransform`
    followed by `normalize` computes them. Calls may run in several threads.
    """

    def __init__(
        self,
        transform: PhotoTransform,
        height: int,
        width: int,
        mean: Sequence[float],
        std: Sequence[float],
        cv2: Any,
    ) -> None:
        """height, width: of the photos."""
        self.transform, self.cv2 = transform, cv2
        self._shape, self._reduced = (height, width), transform.reduced_size(height, width)
        self._shift, self._scale = np.asarray(mean, np.float64), 1 / np.asarray(std, np.float64)
        # Limits of a normalized crop's row: black and white.
        self._limits = [
            np.tile((value - self._shift) * self._scale, transform.size).astype(np.float32) for value in (0, 1)
        ]
        self._scratch = threading.local()

    def supports(self, rng: LesionRng | None) -> bool:
        """Return whether crops with or without random numbers equal those of `PhotoTransform`.

        Not where photos that are not augmented must be reduced first: predictions do without rounding to uint8.
        """
        return rng is not None or self._reduced == self._shape

    def crops(self, number: int, view: str, rng: LesionRng | None) -> Crops:
        """Return the crops of a number of photos, with matrices from output to input in pixels."""
        (height, width), size = self._reduced, self.transform.size
        crops = self.transform.crops(number, height, width, view, rng)
        # grid_sample's -1 and 1 are the outer edges of the first and the last pixel.
        to_pixels = np.array([width, height])[:, None] / 2
        linear = crops.matrix[:, :, :2] * to_pixels * (2 / size)
        offset = (crops.matrix[:, :, 2:] + 1) * to_pixels - 0.5 + linear.sum(2, keepdims=True) * (1 - size) / 2
        return Crops(np.concatenate([linear, offset], 2), crops.color)

    def __call__(self, photo: np.ndarray, crops: Crops, number: int, out: np.ndarray) -> None:
        """Write crop `number` of these to `out` (size, size, 3)."""
        cv2, size = self.cv2, self.transform.size
        if self._reduced != self._shape:
            photo = _reduce(photo, self._reduced)
        floats, sampled = self._buffers()
        np.copyto(floats, photo)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cv2.warpAffine(floats, crops.matrix[number], (size, size), sampled, flags, cv2.BORDER_REFLECT)
        matrix = np.zeros((3, 4))
        if crops.color is None:
            matrix[:, :3] = np.eye(3) / 255
        else:
            # The formula of `augment._color`.
            brightness, contrast, saturation = crops.color[number].tolist()
            level = contrast * brightness / 255
            matrix[:, :3] = (1 - saturation) * level / 3 + saturation * level * np.eye(3)
            matrix[:, 3] = (1 - contrast) * brightness / 255 * sum(cv2.mean(sampled)[:3]) / 3
        matrix[:, 3] -= self._shift
        cv2.transform(sampled, matrix * self._scale[:, None], out)
        if crops.color is not None:
            rows, (black, white) = out.reshape(size, 3 * size), self._limits
            np.maximum(rows, black, out=rows)
            np.minimum(rows, white, out=rows)

    def _buffers(self) -> tuple[np.ndarray, np.ndarray]:
        """Return this thread's memory for the photo and for the crop, in floats."""
        if not hasattr(self._scratch, "buffers"):
            size = self.transform.size
            self._scratch.buffers = tuple(np.empty((*shape, 3), np.float32) for shape in (self._reduced, (size, size)))
        return self._scratch.buffers


def _reduce(photo: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Reduce a photo without aliasing; uint8, for which PyTorch has a fast kernel that starts no threads."""
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None]
    reduced = F.interpolate(pixels, size=shape, mode="bilinear", antialias=True, align_corners=False)
    return reduced[0].permute(1, 2, 0).numpy()
