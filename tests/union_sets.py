"""Small packed sets of two tasks: one to train on, and one whose lesions join its training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.conftest import draw_photo
from triderm_dist.config import ExtraSetConfig
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.schema import (
    UNLABELED,
    VIEWS,
    ConceptColumns,
    Diagnosis,
    Lesion,
    MetadataField,
    Task,
    TaskColumns,
    View,
)

AGE = MetadataField("age", "age", "number", high=90.0, unit="years")

MAIN = Task(
    name="main",
    diagnoses=tuple(map(Diagnosis, ("MEL", "NV", "BCC", "WART"))),
    columns=TaskColumns(image="photo", lesion_id="lesion", view="kind", diagnosis="dx"),
    concepts=ConceptColumns(names=("veil", "dots")),
    fields=(
        AGE,
        MetadataField("site", "site", "category", ("trunk", "upper_limb", "face"), synonyms={"belly": "trunk"}),
        MetadataField("tone", "tone", "ordinal", ("light", "dark")),
    ),
)
OTHER = Task(
    name="other",
    diagnoses=tuple(map(Diagnosis, ("naevus", "melanoma", "scar", "in_situ"))),
    columns=TaskColumns(image="photo", lesion_id="lesion", diagnosis="dx"),
    views=(View("dermoscopic"),),
    concepts=ConceptColumns(names=("dots", "streaks")),
    fields=(
        MetadataField("sex", "sex", "category", ("female", "male")),
        MetadataField("site", "site", "category", ("Belly", "Upper Limb", "scalp")),
        MetadataField("age", "age", "number", high=120.0, unit="years"),
    ),
)
MAP: dict[str, str | None] = {"naevus": "NV", "melanoma": "MEL", "in_situ": "MEL", "scar": None}
"""Of OTHER's diagnoses to MAIN's; of these the set distinguishes MEL and NV."""


def pack_set(
    folder: Path,
    task: Task,
    lesions: int,
    first_photo: int,
    size: tuple[int, int] = (48, 36),
    unlabeled: int = 0,
    prefix: str = "",
) -> ShardIndex:
    """Pack lesions 0, 1 ..., named PREFIXL000 of group PREFIXP000: diagnosis i % C, or none for the last `unlabeled`
    ones; photos of seeds from first_photo.

    A field of lesion i has the value 10 i % 100, or category i % (number of categories); concept k the score (i + k) %
    10 / 10.
    """
    concepts = tuple(f"{view}/{name}" for view in task.view_names for name in task.concepts.names)
    made = []
    for i in range(lesions):
        images = dict[str, str | None].fromkeys(VIEWS)
        for v, view in enumerate(task.view_names):
            path = folder.with_name(f"{folder.name}-photos") / f"{i}-{view}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_photo(first_photo + 2 * i + v, size).save(path, quality=90)
            images[view] = str(path)
        metadata = tuple(10.0 * i % 100 if each.is_number else float(i % len(each.categories)) for each in task.fields)
        scores = tuple((i + k) % 10 / 10 for k in range(len(concepts)))
        label = i % len(task.diagnoses) if i < lesions - unlabeled else UNLABELED
        made.append(Lesion(f"{prefix}L{i:03d}", images, scores, metadata, label, f"{prefix}P{i:03d}"))
    return pack_shards(Dataset(task, made, concepts, True, []), folder, short_side=None, shard_samples=7)


def main_set(folder: Path, lesions: int = 24) -> ShardIndex:
    return pack_set(folder, MAIN, lesions, 0)


def other_set(folder: Path, lesions: int = 18) -> ShardIndex:
    """Return a set of photos of another size, in which the last two lesions have no label."""
    return pack_set(folder, OTHER, lesions, 10_000, (40, 40), unlabeled=2)


def extra_config(index: ShardIndex, **changes: object) -> ExtraSetConfig:
    return ExtraSetConfig.model_validate({"shards": str(index.folder), "map": MAP, "weight": 0.5, **changes})


def row_of(index: ShardIndex, lesion: str) -> int:
    return int(np.flatnonzero(index.lesion_ids[np.arange(len(index))] == lesion)[0])
