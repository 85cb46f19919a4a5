"""One lesion, a batch of lesions, and what a network returns for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple

from triderm_dist.schema.task import UNLABELED

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True, slots=True)
class Lesion:
    """One checked lesion of a data set, before any pixel is read.

    images: path of each view, None if the photo is missing.  concepts: K floats, NaN where missing.  metadata: M
    floats in the order of the task's fields, NaN where missing.  label: of its diagnoses, or `UNLABELED`.  group:
    the patient, or the lesion itself; all lesions of a group are in the same fold.  fine: of the task's finer labels,
    or `UNLABELED`.
    """

    lesion_id: str
    images: dict[str, str | None]
    concepts: tuple[float, ...]
    metadata: tuple[float, ...]
    label: int
    group: str
    fine: int = UNLABELED


@dataclass
class Batch:
    """The input of a network for B lesions, on one device.

    clinical, dermoscopic: (B, 3, H, W) normalized pixels, or (B, L, D) tokens of a frozen tower; (B, 0) where the task
    lacks the view.
    view_present: (B, 2) bool, in the order of `VIEWS`; False if the photo is missing or dropped.
    concepts: (B, K) float, NaN where missing or dropped.  metadata: (B, M) float, NaN where missing.
    labels: (B,) int64, `UNLABELED` where unknown.  valid: (B,) bool, False for padding rows.
    draws: in training, a function that returns 64 random bits for each lesion and name, (B, names) uint64 on the host,
    the same ones whenever it is called.

    Where lesions of extra sets join a training: class_mask: (B, C) bool, the diagnoses that the lesion's set
    distinguishes.  weights: (B,) float, of the lesion's loss. None: all diagnoses, and 1.

    targets: (B, C) float distributions over diagnoses where lesions are mixed (`data.mixing`); None: the labels.

    fine: (B, F) float, one-hot finer labels, mixed as the lesions are; rows of zeros where unknown. None if the task
    has none.
    """

    lesion_ids: list[str]
    clinical: torch.Tensor
    dermoscopic: torch.Tensor
    view_present: torch.Tensor
    concepts: torch.Tensor
    metadata: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    class_mask: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    draws: Callable[[Sequence[str]], np.ndarray] | None = None
    targets: torch.Tensor | None = None
    fine: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device; from pinned memory without blocking the host."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("lesion_ids", "draws")}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **moved)


class Outputs(NamedTuple):
    """The output of a network: raw logits (B, C) of the main and of each view's head, pooled features (B, D).

    aux_clinical, aux_dermoscopic: None if the task lacks the view. A named tuple, since DDP, FSDP2, DeepSpeed and
    Accelerate search tuples for tensors.
    """

    logits: torch.Tensor
    aux_clinical: torch.Tensor | None
    aux_dermoscopic: torch.Tensor | None
    features: torch.Tensor

    @property
    def heads(self) -> list[torch.Tensor]:
        """The logits of all heads, the main one first."""
        return [logits for logits in self[:3] if logits is not None]


class FineOutputs(NamedTuple):
    """The output of a network that learns finer labels, in training: as `Outputs`, and their raw logits (B, F)."""

    logits: torch.Tensor
    aux_clinical: torch.Tensor | None
    aux_dermoscopic: torch.Tensor | None
    features: torch.Tensor
    fine: torch.Tensor

    @property
    def heads(self) -> list[torch.Tensor]:
        """The logits of the heads of diagnoses, the main one first."""
        return [logits for logits in self[:3] if logits is not None]
