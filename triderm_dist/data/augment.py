"""Augmentation: draws that belong to a lesion, applied batched on the device.

Every random number is a hash of (seed, epoch, lesion, copy, name of the draw): it depends on no rank, worker or
order, so a lesion looks the same however the batch is split.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from triderm_dist.config import AugmentConfig
from triderm_dist.schema import VIEWS

_GEOMETRY = ("scale", "shift_x", "shift_y", "rotation", "turns", "flip")
_COLOR = ("brightness", "contrast", "saturation")


def lesion_keys(lesion_ids: Iterable[str]) -> np.ndarray:
    """A 64-bit key for each lesion id, (N,) uint64."""
    digests = b"".join(hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in lesion_ids)
    return np.frombuffer(digests, np.uint64)


def _mix(state: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


@functools.cache
def _name_key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class Draws:
    """The random numbers of one batch, from splitmix64 (Steele et al. 2014) over (seed, epoch, lesion, name, copy)."""

    def __init__(self, seed: int, epoch: int, keys: np.ndarray, copies: np.ndarray) -> None:
        state = keys
        for part in (seed, epoch):
            state = _mix(state ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF))
        self._state, self._copies = state[:, None], copies.astype(np.uint64)[:, None]

    def __call__(self, name: str) -> np.ndarray:
        """One number in [0, 1) for each lesion, (B,) float64."""
        return self.table([name])[:, 0]

    def table(self, names: Sequence[str]) -> np.ndarray:
        """One number in [0, 1) for each lesion and name, (B, len(names)) float64."""
        state = _mix(self._state ^ np.array([_name_key(name) for name in names], np.uint64))
        return (_mix(state ^ self._copies) >> np.uint64(11)) * 2.0**-53


def hide(
    draws: Draws, config: AugmentConfig, view_present: np.ndarray, concepts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Dropout of views and concepts: view_present (B, 2), hidden views False; concepts (B, K), hidden scores NaN.

    A view is hidden only where the other one is seen.
    """
    dropout = [config.clinical_dropout, config.dermoscopic_dropout]
    keep = draws.table([f"hide/{view}" for view in VIEWS]) >= dropout
    seen = view_present & keep
    seen = np.where(seen.any(1, keepdims=True), seen, view_present)
    hidden = draws.table([f"hide/concept/{k}" for k in range(concepts.shape[1])]) < config.concept_dropout
    return seen, np.where(hidden, np.float32(np.nan), concepts)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device that the host does not wait for; CUDA takes the array's bytes before it returns."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def view_transform(
    photos: torch.Tensor, size: int, draws: Draws | None, config: AugmentConfig, view: str
) -> torch.Tensor:
    """Crops of one view in [0, 1], (B, 3, size, size) float32, from photos (B, H, W, 3) uint8.

    With draws: random crop, rotation, quarter turns, flip and color. Without: the centered square of the short side.
    """
    pixels = photos.permute(0, 3, 1, 2).float().div_(255)
    pixels = _shrink(pixels, size)
    height, width = pixels.shape[2:]
    side = min(height, width)
    if draws is None and side == size:
        top, left = (height - size) // 2, (width - size) // 2
        return pixels[:, :, top : top + size, left : left + size].contiguous(memory_format=torch.channels_last)
    prefix = "both" if config.tied_views else view
    if draws is None:
        matrix = _affine(
            np.zeros((len(photos), 1)), np.full((len(photos), 2), side), np.zeros((len(photos), 2)), height, width
        )
        return _sample(pixels, matrix, size)
    names = (*_GEOMETRY, *_COLOR)
    drawn = dict(zip(names, draws.table([f"{prefix}/{name}" for name in names]).T, strict=True))
    crop = side * np.sqrt(config.min_scale + (1 - config.min_scale) * drawn["scale"])
    angle = np.radians(config.rotation) * (2 * drawn["rotation"] - 1)
    mirror = np.ones_like(crop)
    if config.dihedral:
        angle = angle + np.floor(4 * drawn["turns"]) * math.pi / 2
        mirror = np.where(drawn["flip"] < 0.5, -1.0, 1.0)
    # The crop's center moves so far that an unrotated crop stays inside the photo; corners that leave it are mirrored
    # back.
    room = np.stack([width - crop, height - crop], 1) / 2
    shift = room * (2 * np.stack([drawn["shift_x"], drawn["shift_y"]], 1) - 1)
    matrix = _affine(angle[:, None], np.stack([crop * mirror, crop], 1), shift, height, width)
    return _color(_sample(pixels, matrix, size), drawn, config)


def normalize(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(pixels - mean) / std for each of the 3 channels of (B, 3, H, W), in place."""
    shift, scale = (to_device(np.asarray(values, np.float32), pixels.device).view(1, 3, 1, 1) for values in (mean, std))
    return pixels.sub_(shift).div_(scale)


def dihedral(pixels: torch.Tensor, index: int) -> torch.Tensor:
    """Transform `index` of the 8 of the dihedral group on (..., H, W): index % 4 quarter turns, then a flip from 4
    on.
    """
    turned = torch.rot90(pixels, index % 4, (-2, -1))
    return turned.flip(-1) if index >= 4 else turned


def _shrink(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Photos far larger than the crop are reduced first: bilinear sampling alone would alias."""
    height, width = pixels.shape[2:]
    factor = size * 1.5 / min(height, width)
    if factor >= 1:
        return pixels
    target = (max(size, round(height * factor)), max(size, round(width * factor)))
    return F.interpolate(pixels, size=target, mode="bilinear", antialias=True, align_corners=False)


def _affine(angle: np.ndarray, crop: np.ndarray, shift: np.ndarray, height: int, width: int) -> np.ndarray:
    """(B, 2, 3) maps from output to input in the [-1, 1] coordinates of `grid_sample`; crop and shift in pixels (x,
    y).
    """
    cos, sin = np.cos(angle[:, 0]), np.sin(angle[:, 0])
    x = np.stack([cos * crop[:, 0] / width, -sin * crop[:, 1] / width, 2 * shift[:, 0] / width], 1)
    y = np.stack([sin * crop[:, 0] / height, cos * crop[:, 1] / height, 2 * shift[:, 1] / height], 1)
    return np.stack([x, y], 1)


def _sample(pixels: torch.Tensor, matrix: np.ndarray, size: int) -> torch.Tensor:
    theta = to_device(matrix.astype(np.float32), pixels.device)
    grid = F.affine_grid(theta, [len(pixels), 3, size, size], align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _color(pixels: torch.Tensor, draws: dict[str, np.ndarray], config: AugmentConfig) -> torch.Tensor:
    """Brightness, then contrast around a photo's mean, then saturation around a pixel's gray, in place.

    All are linear, so together s (c (b p - m) + m) + (1 - s) (c (b g - m) + m), m = b mean(p) and g the gray of p,
    is s c b p + (1 - s) c b g + (1 - c) m.
    """

    def factor(name: str, strength: float) -> torch.Tensor:
        values = (1 + strength * (2 * draws[name] - 1)).astype(np.float32)
        return to_device(values, pixels.device).view(-1, 1, 1, 1)

    brightness, contrast = factor("brightness", config.brightness), factor("contrast", config.contrast)
    saturation = factor("saturation", config.saturation)
    gray = pixels.mean(1, keepdim=True)
    mean = gray.mean((2, 3), keepdim=True) * brightness
    gray.mul_((1 - saturation) * contrast * brightness).add_((1 - contrast) * mean)
    return pixels.mul_(saturation * contrast * brightness).add_(gray).clamp_(0, 1)
