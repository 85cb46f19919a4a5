"""The vocabulary of the toolkit: diagnoses, views, concepts, metadata, and the shapes that travel between rooms.

Everything here is plain: no file is read, nothing but NumPy and PyTorch types. Shapes use these letters: B lesions in a
batch, C diagnoses, K concepts, M metadata fields, L tokens, D width, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

DIAGNOSES: tuple[str, ...] = (
    "AKIEC",
    "BCC",
    "BEN_OTH",
    "BKL",
    "DF",
    "INF",
    "MAL_OTH",
    "MEL",
    "NV",
    "SCCKA",
    "VASC",
)
"""The 11 diagnoses of MILK10k, in the order of the official ground truth and of the submission."""

DIAGNOSIS_NAMES: dict[str, str] = {
    "AKIEC": "actinic keratosis / intraepidermal carcinoma",
    "BCC": "basal cell carcinoma",
    "BEN_OTH": "other benign proliferation",
    "BKL": "benign keratinocytic lesion",
    "DF": "dermatofibroma",
    "INF": "inflammatory or infectious condition",
    "MAL_OTH": "other malignant proliferation",
    "MEL": "melanoma",
    "NV": "melanocytic nevus",
    "SCCKA": "squamous cell carcinoma / keratoacanthoma",
    "VASC": "vascular lesion or haemorrhage",
}

VIEWS: tuple[str, str] = ("clinical", "dermoscopic")
"""The two photos of a lesion. Every tensor with a view axis uses this order."""

MONET_COLUMNS: tuple[str, ...] = (
    "MONET_ulceration_crust",
    "MONET_hair",
    "MONET_vasculature_vessels",
    "MONET_erythema",
    "MONET_pigmented",
    "MONET_gel_water_drop_fluid_dermoscopy_liquid",
    "MONET_skin_markings_pen_ink_purple_pen",
)
"""Concept scores that the challenge publishes for each photo; a lesion has them once a view."""

CONCEPTS: tuple[str, ...] = tuple(
    f"{view}/{column.removeprefix('MONET_')}" for view in VIEWS for column in MONET_COLUMNS
)
"""Names of MILK10k's 14 concepts. Networks take K and the names from the index of the shards, not from here."""

SEXES: tuple[str, ...] = ("female", "male")
SITES: tuple[str, ...] = (
    "trunk",
    "head_neck_face",
    "lower_extremity",
    "upper_extremity",
    "hand",
    "foot",
    "genital",
)
SKIN_TONES: tuple[str, ...] = ("0", "1", "2", "3", "4", "5")
"""Skin tone from 0 (very dark) to 5 (very light). Not the Fitzpatrick scale."""

METADATA_FIELDS: tuple[str, ...] = ("age", "sex", "skin_tone", "site")
"""Order of the metadata axis M: age in years, then the index of each category. NaN means missing."""

METADATA_CATEGORIES: dict[str, tuple[str, ...]] = {"sex": SEXES, "skin_tone": SKIN_TONES, "site": SITES}

UNLABELED = -1
"""The label of a lesion whose diagnosis is not known."""


class InputError(Exception):
    """Bad input by the user. Its text is one line: what is wrong, where, and what to do. Programs exit with status
    2.
    """


class DataError(InputError):
    """A challenge folder, shard or table that can't be used; the text names the file and the row or sample."""


class ConfigError(InputError):
    """A setting that is unknown, of the wrong type, or that can't work together with another one."""


class CheckpointError(InputError):
    """A weight file that does not belong to the network it is loaded into."""


def one_line(error: object, limit: int | None = None, with_type: bool = False) -> str:
    """Return an error's text on one line of at most `limit` characters; the name of its type where it has no text.

    with_type: put the name of the type in front, as in `KeyError: 'age'`.
    """
    name, text = type(error).__name__, " ".join(str(error).split())
    text = (f"{name}: {text}" if with_type else text) if text else name
    return text if limit is None or len(text) <= limit else text[: limit - 4] + " ..."


@dataclass(frozen=True)
class Lesion:
    """One checked lesion of a challenge folder, before any pixel is read.

    `images` holds the path of each view or None where the photo is missing; `concepts` has K floats, NaN where missing;
    `metadata` has M floats in the order of `METADATA_FIELDS`, NaN where missing; `label` indexes `DIAGNOSES` or is
    `UNLABELED`; lesions of one `group` (a patient, or the lesion itself) never sit in two folds.
    """

    lesion_id: str
    images: dict[str, str | None]
    concepts: tuple[float, ...]
    metadata: tuple[float, ...]
    label: int
    group: str


@dataclass
class Batch:
    """Lesions on one device, ready for a network.

    clinical, dermoscopic: (B, 3, H, W) normalized pixels, or (B, L, D) tokens of a frozen tower.
    view_present: (B, 2) bool, in the order of `VIEWS`; False where the photo is missing or dropped.
    concepts: (B, K) float, NaN where missing or dropped.  metadata: (B, M) float, NaN where missing.
    labels: (B,) int64, `UNLABELED` where unknown.  valid: (B,) bool, False for rows that only pad the batch.
    """

    lesion_ids: list[str]
    clinical: torch.Tensor
    dermoscopic: torch.Tensor
    view_present: torch.Tensor
    concepts: torch.Tensor
    metadata: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; pinned memory travels without blocking the host."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "lesion_ids"}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


class Outputs(NamedTuple):
    """What a network returns from one forward: all logits (B, C) raw, features (B, D) after pooling.

    A named tuple, since DDP, FSDP2, DeepSpeed and Accelerate all look inside tuples for tensors.
    """

    logits: torch.Tensor
    aux_clinical: torch.Tensor
    aux_dermoscopic: torch.Tensor
    features: torch.Tensor
