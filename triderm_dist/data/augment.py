"""Augmentation of photos and dropout of inputs, batched on the device, with random numbers per lesion.

Every random number is a hash of (seed, epoch, lesion, copy, name of the number), independent of rank, worker and order,
so that a lesion is augmented equally for any split of the batch.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from triderm_dist.config import AugmentConfig, Frame, build
from triderm_dist.schema import VIEWS, ConfigError
from triderm_dist.schema.plugins import check_known, check_subclass, described
from triderm_dist.settings import Section

_GEOMETRY = ("scale", "shift_x", "shift_y", "rotation", "turns", "flip", "aspect")
_COLOR = ("brightness", "contrast", "saturation")


def lesion_keys(lesion_ids: Iterable[str]) -> np.ndarray:
    """Return a 64-bit key for each lesion id, (N,) uint64."""
    digests = b"".join(hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in lesion_ids)
    return np.frombuffer(digests, np.uint64)


class LesionRng:
    """Random numbers for the lesions of one batch: splitmix64 (Steele et al. 2014) over (seed, epoch, lesion, name,
    copy).

    keys: `lesion_keys` (B,). copies (B,): number of earlier occurrences of the lesion in this epoch.
    """

    def __init__(self, seed: int, epoch: int, keys: np.ndarray, copies: np.ndarray) -> None:
        state = keys
        for part in (seed, epoch):
            state = _mix(state ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF))
        self._state, self._copies, self._prefix = state[:, None], copies.astype(np.uint64)[:, None], ""

    def uniform(self, name: str) -> np.ndarray:
        """Return one number in [0, 1) for each lesion, (B,) float64; the same name gives the same numbers."""
        return self.uniform_table([name])[:, 0]

    def uniform_table(self, names: Sequence[str]) -> np.ndarray:
        """Return one number in [0, 1) for each lesion and name, (B, len(names)) float64."""
        return to_uniform(self.bits(names))

    def bits(self, names: Sequence[str]) -> np.ndarray:
        """Return 64 random bits for each lesion and name, (B, len(names)) uint64."""
        state = _mix(self._state ^ np.array([_name_key(self._prefix + name) for name in names], np.uint64))
        return _mix(state ^ self._copies)

    def take(self, lesions: np.ndarray | slice) -> LesionRng:
        """Return the numbers of some lesions of the batch, by their positions (n,)."""
        taken = copy.copy(self)
        taken._state, taken._copies = self._state[lesions], self._copies[lesions]
        return taken

    def scoped(self, prefix: str) -> LesionRng:
        """Return a view of these numbers in which names are prefixed by `prefix/`."""
        scoped = copy.copy(self)
        scoped._prefix = f"{self._prefix}{prefix}/"
        return scoped


class Augmentation(Section):
    """Base class of the augmentations in `AUGMENTATIONS`; its fields are its settings."""

    def __call__(self, pixels: torch.Tensor, rng: LesionRng) -> torch.Tensor:
        """Return the augmented crops of one view.

        pixels: (B, 3, S, S) float32 in [0, 1] on the device, after geometry and color and before normalization; may be
        changed in place. Take every random number from `rng`, so that the result depends on the lesion alone.
        """
        raise NotImplementedError

    def of_view(self, view: str) -> Callable[[torch.Tensor, LesionRng], torch.Tensor]:
        """Return what augments the crops of a view, by default the same for both."""
        return self


class _ByView(Augmentation):
    """An augmentation with one strength per view; 0 does not change the view."""

    clinical: float = Field(0.0, ge=0)
    dermoscopic: float = Field(0.0, ge=0)

    def of_view(self, view: str) -> Callable[[torch.Tensor, LesionRng], torch.Tensor]:
        strength: float = getattr(self, view)
        return functools.partial(self.apply, strength) if strength else lambda pixels, rng: pixels

    def apply(self, strength: float, pixels: torch.Tensor, rng: LesionRng) -> torch.Tensor:
        raise NotImplementedError


class Hue(_ByView):
    """Rotate colors around the gray axis, by up to `strength` degrees."""

    def apply(self, strength: float, pixels: torch.Tensor, rng: LesionRng) -> torch.Tensor:
        angle = np.radians(strength * (2 * rng.uniform("angle") - 1))
        # Rodrigues' formula for a rotation around the gray axis: a circulant matrix over (red, green, blue).
        shares = [(1 + 2 * np.cos(angle - shift)) / 3 for shift in (0, -2 * math.pi / 3, 2 * math.pi / 3)]
        itself, following, before = (
            to_device(share.astype(np.float32), pixels.device).view(-1, 1, 1) for share in shares
        )
        rotated = torch.empty_like(pixels)
        for channel in range(3):
            own, later, earlier = (pixels[:, (channel + step) % 3] for step in (0, 1, 2))
            torch.mul(own, itself, out=rotated[:, channel]).addcmul_(later, following).addcmul_(earlier, before)
        return rotated.clamp_(0, 1)


class Blur(_ByView):
    """Blur with a Gaussian of standard deviation up to `strength` pixels of the crop."""

    def apply(self, strength: float, pixels: torch.Tensor, rng: LesionRng) -> torch.Tensor:
        number, channels, height, width = pixels.shape
        radius = min(math.ceil(3 * strength), height - 1, width - 1)
        deviation = np.maximum(strength * rng.uniform("deviation"), 1e-3)
        kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation[:, None]) ** 2)
        kernel = (kernel / kernel.sum(1, keepdims=True)).astype(np.float32).repeat(channels, 0)
        weight = to_device(kernel, pixels.device)
        flat = F.pad(pixels.reshape(1, -1, height, width), [radius] * 4, mode="reflect")
        flat = F.conv2d(flat, weight[:, None, :, None], groups=number * channels)
        flat = F.conv2d(flat, weight[:, None, None, :], groups=number * channels)
        return flat.view(pixels.shape).contiguous(memory_format=torch.channels_last)


class Noise(_ByView):
    """Add uniform noise of a standard deviation up to `strength`, in units of white, independent for each number."""

    def apply(self, strength: float, pixels: torch.Tensor, rng: LesionRng) -> torch.Tensor:
        channels, height, width = pixels.shape[1:]
        # Multiply-shift hashes of the position, times an odd number of the channel; see `models.dropout`.
        positions, odd = _odd_numbers(height * width, channels, pixels.device)
        keys = to_device(rng.bits(["pixels"]).view(np.int64), pixels.device)
        numbers = ((keys * positions) >> 32).to(torch.int32).view(-1, 1, height, width) * odd[:, None, None]
        deviation = strength * rng.uniform("deviation") * math.sqrt(12) / 2**32
        scale = to_device(deviation.astype(np.float32), pixels.device).view(-1, 1, 1, 1)
        return pixels.addcmul_(numbers.to(pixels.dtype), scale).clamp_(0, 1)


class Cutout(_ByView):
    """Fill a square of a side up to `strength` times that of the crop with the crop's mean color (DeVries and Taylor
    2017).
    """

    def apply(self, strength: float, pixels: torch.Tensor, rng: LesionRng) -> torch.Tensor:
        size = pixels.shape[-1]
        drawn = rng.uniform_table(["side", "x", "y"])
        half, center = min(strength, 1) * drawn[:, :1] / 2, drawn[:, 1:]
        first, last = (np.rint(size * (center + sign * half)).astype(np.int64) for sign in (-1, 1))
        at = torch.arange(size, device=pixels.device)
        inside = (at >= to_device(first, pixels.device)[:, :, None]) & (at < to_device(last, pixels.device)[:, :, None])
        hole = (inside[:, 1, :, None] & inside[:, 0, None, :])[:, None]
        return torch.where(hole, pixels.mean((2, 3), keepdim=True), pixels)


@functools.lru_cache
def _odd_numbers(positions: int, channels: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random odd numbers for positions, int64, and for channels, int32."""
    random = np.random.Generator(np.random.Philox(key=1)).integers(0, 2**64, positions + channels, np.uint64)
    random = (random | np.uint64(1)).view(np.int64)
    return to_device(random[:positions], device), to_device(random[positions:].astype(np.int32), device)


AUGMENTATIONS: dict[str, type[Augmentation]] = {"blur": Blur, "cutout": Cutout, "hue": Hue, "noise": Noise}
"""Augmentations by the name under which `train.augment.extra` holds their settings; plugins add to this table."""


def build_augmentations(config: AugmentConfig) -> dict[str, Augmentation]:
    """Build the augmentations of `config.extra`, in alphabetical order, in which they are applied.

    Raises ConfigError for an unknown name or wrong settings.
    """
    built = {}
    for name, settings in sorted(config.extra.items()):
        check_known("train.augment.extra", name, AUGMENTATIONS, "an augmentation")
        kind = AUGMENTATIONS[name]
        check_subclass("train.augment.extra", name, kind, Augmentation, "AUGMENTATIONS")
        if kind.__call__ is Augmentation.__call__ and kind.of_view is Augmentation.of_view:
            raise ConfigError(f"train.augment.extra.{name}: {kind.__name__} has no method __call__")
        try:
            built[name] = build(kind, settings)
        except ConfigError as error:
            raise ConfigError(f"train.augment.extra.{name}: {error}") from None
    return built


def to_uniform(bits: np.ndarray) -> np.ndarray:
    """Return a number in [0, 1) for each 64 random bits, float64."""
    return (bits >> np.uint64(11)) * 2.0**-53


def drop_inputs(
    rng: LesionRng, config: AugmentConfig, view_present: np.ndarray, concepts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Drop views and concept scores at random.

    Returns view_present (B, 2) with False for dropped views, and concepts (B, K) with NaN for dropped scores. A view
    is dropped only if the other one is kept.
    """
    dropout = [config.clinical_dropout, config.dermoscopic_dropout]
    keep = rng.uniform_table([f"hide/{view}" for view in VIEWS]) >= dropout
    kept = view_present & keep
    kept = np.where(kept.any(1, keepdims=True), kept, view_present)
    dropped = rng.uniform_table([f"hide/concept/{k}" for k in range(concepts.shape[1])]) < config.concept_dropout
    return kept, np.where(dropped, np.float32(np.nan), concepts)


@dataclass(frozen=True)
class Crops:
    """How photos of one view become crops.

    matrix (B, 2, 3): from output to input, in the [-1, 1] coordinates of `grid_sample`.  color (B, 3): factors of
    brightness, contrast and saturation; None leaves the colors as they are.
    """

    matrix: np.ndarray
    color: np.ndarray | None


class PhotoTransform:
    """Photos of one view -> crops for a tower: (B, H, W, 3) uint8 -> (B, 3, size, size) float32 in [0, 1].

    Raises ConfigError as `build_augmentations` does.
    """

    def __init__(self, size: int, config: AugmentConfig, frame: Frame = "square") -> None:
        """frame: the part of a photo that a crop without augmentation shows, see `TowerConfig`."""
        self.size, self.config, self.frame, self.extra = size, config, frame, build_augmentations(config)
        self._clinical = _strengthened(config, config.clinical_strength)

    def __call__(self, photos: torch.Tensor, view: str, rng: LesionRng | None = None) -> torch.Tensor:
        """Augment with random numbers of `rng`: crop, rotation, quarter turns, flip, color, plugins' augmentations.

        Without `rng`, return the frame: the centered square of the short side, or the whole photo.
        """
        size = self.size
        pixels = _shrink(photos.permute(0, 3, 1, 2).float().div_(255), self.reduced_size(*photos.shape[1:3]))
        height, width = pixels.shape[2:]
        if rng is None and self.frame == "square" and min(height, width) == size:
            top, left = (height - size) // 2, (width - size) // 2
            return pixels[:, :, top : top + size, left : left + size].contiguous(memory_format=torch.channels_last)
        crops = self.crops(len(photos), height, width, view, rng)
        pixels = _sample(pixels, crops.matrix, size)
        if crops.color is not None:
            pixels = _color(pixels, crops.color)
        return self.finish(pixels, view, rng)

    def crops(self, number: int, height: int, width: int, view: str, rng: LesionRng | None) -> Crops:
        """Return the crops of a number of photos of this size, drawn from `rng` as in `__call__`."""
        frame = self._frame(height, width)
        if rng is None:
            whole = np.broadcast_to(frame, (number, 2))
            return Crops(_affine(np.zeros(number), np.ones(number), whole, np.zeros((number, 2)), height, width), None)
        config = self._clinical if view == "clinical" else self.config
        names = (*_GEOMETRY, *_COLOR)
        drawn = dict(zip(names, self._scoped(rng, view).uniform_table(names).T, strict=True))
        crop = frame * np.sqrt(config.min_scale + (1 - config.min_scale) * drawn["scale"])[:, None]
        if config.aspect:
            stretch = (1 + config.aspect) ** (drawn["aspect"] - 0.5)
            crop = crop * np.stack([stretch, 1 / stretch], 1)
        angle = np.radians(config.rotation) * (2 * drawn["rotation"] - 1)
        mirror = np.ones_like(angle)
        if config.dihedral:
            angle = angle + np.floor(4 * drawn["turns"]) * math.pi / 2
            mirror = np.where(drawn["flip"] < 0.5, -1.0, 1.0)
        # The center is shifted such that an unrotated crop stays inside the photo; pixels outside are mirrored.
        reach = np.maximum((width, height) - crop, 0) / 2
        shift = reach * (2 * np.stack([drawn["shift_x"], drawn["shift_y"]], 1) - 1)
        matrix = _affine(angle, mirror, crop, shift, height, width)
        strengths = (config.brightness, config.contrast, config.saturation)
        factors = [1 + strength * (2 * drawn[name] - 1) for name, strength in zip(_COLOR, strengths, strict=True)]
        return Crops(matrix, np.stack(factors, 1))

    def finish(self, crops: torch.Tensor, view: str, rng: LesionRng | None) -> torch.Tensor:
        """Apply the augmentations of `config.extra` to crops (B, 3, size, size), after geometry and color."""
        if rng is not None:
            for name, augmentation in self.extra.items():
                shape, crops = crops.shape, augmentation.of_view(view)(crops, self._scoped(rng, view).scoped(name))
                if not isinstance(crops, torch.Tensor) or (crops.shape, crops.dtype) != (shape, torch.float32):
                    expected = f"torch.float32 {tuple(shape)}, the crops"
                    raise ConfigError(f"train.augment.extra.{name}: returned {described(crops)}, not {expected}")
        return crops

    def reduced_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) to which a photo is reduced before crops are sampled from it: a frame of at most
        1.5 times the crop's size, since bilinear sampling alone would alias.
        """
        across, down = (min(1.0, self.size * 1.5 / extent) for extent in self._frame(height, width))
        return round(height * down), round(width * across)

    def _frame(self, height: int, width: int) -> np.ndarray:
        """Return width and height (2,) of the part of a photo that a crop without augmentation shows, in pixels."""
        sides = {"square": [min(height, width)] * 2, "whole": [max(height, width)] * 2, "squash": [width, height]}
        return np.array(sides[self.frame], np.float64)

    def _scoped(self, rng: LesionRng, view: str) -> LesionRng:
        return rng.scoped("both" if self.config.tied_views else view)


def _strengthened(config: AugmentConfig, factor: float) -> AugmentConfig:
    """Return the settings with the strengths of geometry and color multiplied by a factor, clipped to their ranges."""
    if factor == 1:
        return config
    strengths = {name: min(1.0, factor * getattr(config, name)) for name in (*_COLOR, "aspect")}
    strengths |= {"rotation": min(180.0, factor * config.rotation)}
    strengths |= {"min_scale": max(0.05, 1 - factor * (1 - config.min_scale))}
    return config.model_copy(update=strengths)


def normalize(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Return (pixels - mean) / std for each of the 3 channels of (B, 3, H, W), in place."""
    shift, scale = (_of_channels(tuple(values), pixels.device) for values in (mean, std))
    return pixels.sub_(shift).div_(scale)


@functools.lru_cache
def _of_channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return values of the 3 channels on the device, (1, 3, 1, 1), which are copied there once."""
    return to_device(np.asarray(values, np.float32), device).view(1, 3, 1, 1)


def dihedral(pixels: torch.Tensor, index: int) -> torch.Tensor:
    """Apply transform `index` of the 8 of the dihedral group to (..., H, W): index % 4 quarter turns, then a flip where
    index is 4 or more.
    """
    turned = torch.rot90(pixels, index % 4, (-2, -1))
    return turned.flip(-1) if index >= 4 else turned


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to the device without blocking the host; CUDA takes the array's bytes before this returns."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def _mix(state: np.ndarray) -> np.ndarray:
    """Return the output function of splitmix64, (N,) uint64."""
    with np.errstate(over="ignore"):
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


@functools.cache
def _name_key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _shrink(pixels: torch.Tensor, target: tuple[int, int]) -> torch.Tensor:
    """Reduce photos to (height, width) `target` without aliasing."""
    if target == tuple(pixels.shape[2:]):
        return pixels
    return F.interpolate(pixels, size=target, mode="bilinear", antialias=True, align_corners=False)


def _affine(
    angle: np.ndarray, mirror: np.ndarray, crop: np.ndarray, shift: np.ndarray, height: int, width: int
) -> np.ndarray:
    """Return (B, 2, 3) maps from output to input in the [-1, 1] coordinates of `grid_sample`: of a crop that is
    mirrored, then rotated, then stretched to its size in the photo.

    angle (B,) in radians.  mirror (B,): -1 flips from left to right.  crop, shift (B, 2) in pixels (x, y).
    """
    cos, sin = np.cos(angle), np.sin(angle)
    x = np.stack([cos * (crop[:, 0] * mirror) / width, -sin * crop[:, 0] / width, 2 * shift[:, 0] / width], 1)
    y = np.stack([sin * (crop[:, 1] * mirror) / height, cos * crop[:, 1] / height, 2 * shift[:, 1] / height], 1)
    return np.stack([x, y], 1)


def _sample(pixels: torch.Tensor, matrix: np.ndarray, size: int) -> torch.Tensor:
    theta = to_device(matrix.astype(np.float32), pixels.device)
    grid = F.affine_grid(theta, [len(pixels), 3, size, size], align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _color(pixels: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    """Change brightness, then contrast around a photo's mean, then saturation around a pixel's gray, in place.

    factors (B, 3).  All are linear, so together s (c (b p - m) + m) + (1 - s) (c (b g - m) + m), m = b mean(p) and g
    the gray of p, is s c b p + (1 - s) c b g + (1 - c) m.
    """
    columns = to_device(factors.T.astype(np.float32), pixels.device)
    brightness, contrast, saturation = (each.view(-1, 1, 1, 1) for each in columns)
    gray = pixels.mean(1, keepdim=True)
    mean = gray.mean((2, 3), keepdim=True) * brightness
    gray.mul_((1 - saturation) * contrast * brightness).add_((1 - contrast) * mean)
    return pixels.mul_(saturation * contrast * brightness).add_(gray).clamp_(0, 1)
