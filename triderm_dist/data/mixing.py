"""Mixup and CutMix: every lesion of a micro-batch is mixed with its neighbor, with a share drawn per lesion.

The lesions at positions 2i and 2i + 1 of the global batch are partners; the order of an epoch is random, and so are the
partners. Micro-batches are contiguous parts of the global batch with an even number of lesions, so that no pair is
divided, and the shares are hashes of (seed, epoch, lesion, copy): the mixture is independent of the split.

A draw b from the Beta distribution gives the partner the share min(b, 1 - b), so that a lesion keeps at least half
(CutMix: up to rounding to pixels); each order of a pair is mixed, so that this loses no mixtures. Values that cannot be
mixed, such as categories, are those of the larger share.
"""

from __future__ import annotations

from dataclasses import replace
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triderm_dist.config import AugmentConfig
from triderm_dist.data.augment import to_device, to_uniform
from triderm_dist.schema import VIEWS, Batch, Signature

_DRAWS = ("mix/share", "mix/cut", "mix/x", "mix/y")


class Mixing:
    """Mixes the lesions of training batches by mixup (Zhang et al. 2018), CutMix (Yun et al. 2019), or half by each."""

    def __init__(self, config: AugmentConfig, signature: Signature) -> None:
        self.config, self.classes = config, len(signature.diagnoses)
        self._numbers = np.array([field.kind == "number" for field in signature.fields], bool)
        self._is_number: Tensor | None = None  # `_numbers` on the device of the first batch
        self._views = [VIEWS.index(view) for view in signature.views]

    def __call__(self, batch: Batch) -> Batch:
        """Return the mixed batch, with `targets`; the batch has an even number of lesions, and `draws`.

        Mixes views, concepts and numeric metadata that both lesions have, and the targets. Pairs with padding, without
        a common view, or with different class masks are not mixed.
        """
        assert batch.draws is not None
        device = batch.labels.device
        partner = torch.arange(len(batch.labels), device=device) ^ 1
        together = batch.valid & batch.valid[partner]
        both = batch.view_present & batch.view_present[partner]
        if self._views:  # columns one by one: indexing by a list synchronizes with the device
            together = together & torch.stack([both[:, at] for at in self._views]).any(0)
        if batch.class_mask is not None:
            together = together & (batch.class_mask == batch.class_mask[partner]).all(1)
        images = {VIEWS[at]: getattr(batch, VIEWS[at]) for at in self._views}
        images = {view: image for view, image in images.items() if image.numel()}  # a network may use one view only
        side = next((_side(image) for image in images.values()), 1)
        share, depth, box = (to_device(drawn, device) for drawn in self._draw(batch, side))
        share = share * together
        # The partner's share of each pixel: (B, 1, 1), or with boxes (B, side, side).
        shares = (depth * together)[:, None, None] * (_inside(box, side) if self.config.cutmix else 1.0)
        mixed: dict[str, Any] = {
            view: _mix_images(image, shares * both[:, VIEWS.index(view), None, None]) for view, image in images.items()
        }
        one_hot = (batch.labels[:, None] == torch.arange(self.classes, device=device)).float()
        if self._is_number is None:
            self._is_number = to_device(self._numbers, device)
        return replace(
            batch,
            **mixed,
            concepts=_mix_known(batch.concepts, partner, share),
            metadata=torch.where(self._is_number, _mix_known(batch.metadata, partner, share), batch.metadata),
            targets=one_hot.lerp(one_hot[partner], share[:, None]),
            fine=None if batch.fine is None else batch.fine.lerp(batch.fine[partner], share[:, None]),
        )

    def _draw(self, batch: Batch, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw for each lesion the partner's share of the image and of the pixels in the box, (B,) float32, and the box
        (B, 4) int64: first and last row and column, exclusive.

        mixup: the box is the whole image.  CutMix: the box is the partner's, whose share is the area of the box.
        """
        from scipy.special import betaincinv  # importing it takes a tenth of a second

        assert batch.draws is not None
        uniform, cut, *center = to_uniform(batch.draws(_DRAWS)).T
        mixup, cutmix = self.config.mixup, self.config.cutmix
        is_cut = (cut < (0.5 if mixup else 1.0)) & (cutmix > 0) & (side > 1)
        alpha = np.where(is_cut, cutmix, mixup or cutmix)
        share = betaincinv(alpha, alpha, uniform)
        share = np.minimum(share, 1 - share)
        half = np.sqrt(share) / 2
        begins, ends = (
            [np.clip(np.rint(side * (at + sign * half)), 0, side).astype(np.int64) for at in center] for sign in (-1, 1)
        )
        box = np.stack([begins[1], ends[1], begins[0], ends[0]], 1)
        box[~is_cut] = 0, side, 0, side
        area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]) / side**2
        share = np.where(is_cut, area, share).astype(np.float32)
        return share, np.where(is_cut, np.float32(1), share), box


def _side(image: Tensor) -> int:
    """Return the side of pixels (B, 3, S, S), or of the square of tokens (B, S * S, D); 1 for other tokens."""
    if image.ndim == 4:
        return image.shape[2]
    side = isqrt(image.shape[1])
    return side if side**2 == image.shape[1] else 1


def _inside(box: Tensor, side: int) -> Tensor:
    """Return whether a pixel is in the box (B, 4) of its lesion, (B, side, side) bool."""
    at = torch.arange(side, device=box.device)
    top, bottom, left, right = box[:, :, None].unbind(1)
    return ((at >= top) & (at < bottom))[:, :, None] & ((at >= left) & (at < right))[:, None, :]


def _mix_images(image: Tensor, shares: Tensor) -> Tensor:
    """Mix neighbors. image: pixels (B, 3, S, S) or tokens (B, L, D).  shares: of the neighbor, (B, 1, 1) or
    (B, S, S).
    """
    shares = shares[:, None] if image.ndim == 4 else shares.flatten(1)[:, :, None]
    mixed = torch.empty_like(image)
    (first, second), weights = image.unflatten(0, (-1, 2)).unbind(1), shares.to(image.dtype).unflatten(0, (-1, 2))
    out = mixed.unflatten(0, (-1, 2))
    torch.lerp(first, second, weights[:, 0], out=out[:, 0])
    torch.lerp(second, first, weights[:, 1], out=out[:, 1])
    return mixed


def _mix_known(values: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    """Mix values (B, n) with those of the partner where both are known (not NaN)."""
    mixed = values.lerp(values[partner], share[:, None].to(values.dtype))
    return torch.where(mixed.isnan(), values, mixed)
