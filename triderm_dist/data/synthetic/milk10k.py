"""Draw synthetic lesions in the layout of the MILK10k challenge.

A diagnosis is a combination of four binary traits, one per modality:

    clinical photo      flat and brown, or raised and red
    dermoscopic photo   a pigment network, or clods
    concept scores      low or high ulceration
    metadata            younger, on trunk and limbs, or older, on sun-exposed skin

Eleven of the sixteen combinations are used, chosen such that without any one modality four pairs of diagnoses cannot be
distinguished. Every trait is noisy, so that no diagnosis is certain even with all four.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist.data.synthetic.pictures import SKIN_TONE_SHARES, draw_clinical, draw_dermoscopic, draw_outline
from triderm_dist.data.synthetic.table import MISSING, SWAPPED, allocate, draw_cell, write_csv
from triderm_dist.schema import MetadataField, Task
from triderm_dist.tasks import load_task

CLINICAL, DERMOSCOPIC, CONCEPTS, METADATA = range(4)

# Traits of each diagnosis in the order above: red, clods, ulcerated, older.
TRAITS: dict[str, tuple[int, int, int, int]] = {
    "NV": (0, 0, 0, 0),
    "BKL": (0, 0, 0, 1),
    "MEL": (0, 1, 0, 1),
    "MAL_OTH": (0, 1, 1, 1),
    "DF": (1, 0, 0, 0),
    "AKIEC": (1, 0, 0, 1),
    "INF": (1, 0, 1, 0),
    "SCCKA": (1, 0, 1, 1),
    "VASC": (1, 1, 0, 0),
    "BEN_OTH": (1, 1, 0, 1),
    "BCC": (1, 1, 1, 1),
}
SHARES: dict[str, float] = {
    "BCC": 0.20,
    "NV": 0.17,
    "BKL": 0.13,
    "MEL": 0.12,
    "SCCKA": 0.10,
    "AKIEC": 0.08,
    "VASC": 0.06,
    "DF": 0.05,
    "INF": 0.04,
    "BEN_OTH": 0.03,
    "MAL_OTH": 0.02,
}
TASK = load_task("milk10k")
COLUMNS = tuple(each.column for each in TASK.fields)
SITE_SHARES = {
    0: (0.42, 0.08, 0.24, 0.20, 0.02, 0.03, 0.01),
    1: (0.12, 0.60, 0.08, 0.10, 0.08, 0.01, 0.01),
}


@dataclass(frozen=True)
class SyntheticLesion:
    """One generated lesion: ids, cells of both table rows and concept scores by column, two photos (H, W, 3) uint8."""

    lesion_id: str
    diagnosis: str
    photo_ids: tuple[str, str]
    shared: dict[str, Any]
    scores: tuple[dict[str, float], dict[str, float]]
    photos: tuple[np.ndarray, np.ndarray]


def write_part(
    folder: Path, truth: Path, task: Task, name: str, lesions: int, minimum: int, seed: tuple[int, int]
) -> None:
    """Write photos and tables of one part: one-hot labels into `truth`; the supplement only in a folder with labels.

    task: fields that are not MILK10k's get a column whose cells do not depend on the diagnosis.  name: Training or
    Test, part of the file names.  minimum: lesions per diagnosis.
    """
    from PIL import Image

    generator = np.random.default_rng(seed)
    diagnoses = generator.permutation(np.repeat(list(SHARES), allocate(list(SHARES.values()), lesions, minimum)))
    titles = {each.name: each.title for each in TASK.diagnoses}
    more = [each for each in task.fields if each.column not in COLUMNS]
    lesion_numbers = generator.choice(10**6, lesions, replace=False)
    photo_numbers = generator.choice(10**6, (lesions, 2), replace=False)
    metadata, labels, supplement = [], [], []
    for diagnosis, number, photo_number in zip(diagnoses, lesion_numbers, photo_numbers, strict=True):
        base = 10**6 * (8 + seed[1])  # ids are unique over both parts
        ids = (f"ISIC_{base + photo_number[0]}", f"ISIC_{base + photo_number[1]}")
        lesion = draw_lesion(generator, f"IL_{base + number}", str(diagnosis), ids, more)
        photos = folder / f"MILK10k_{name}_Input" / lesion.lesion_id
        photos.mkdir(parents=True)
        for kind, photo_id, pixels, scores in zip(
            ("clinical: close-up", "dermoscopic"), lesion.photo_ids, lesion.photos, lesion.scores, strict=True
        ):
            Image.fromarray(pixels).save(photos / f"{photo_id}.jpg", quality=90)
            metadata.append(_metadata_row(lesion, kind, photo_id, scores))
            supplement.append(_supplement_row(photo_id, titles[lesion.diagnosis]))
        labels.append({"lesion_id": lesion.lesion_id, **{d: float(d == lesion.diagnosis) for d in titles}})
    write_csv(folder / f"MILK10k_{name}_Metadata.csv", metadata)
    write_csv(truth / f"MILK10k_{name}_GroundTruth.csv", labels)
    if truth == folder:
        write_csv(folder / f"MILK10k_{name}_Supplement.csv", supplement)
    (folder / "attribution.txt").write_text("SYNTHETIC, drawn by triderm-dist; no patient is shown\n", encoding="utf-8")


def _metadata_row(lesion: SyntheticLesion, kind: str, photo_id: str, scores: Mapping[str, float]) -> dict[str, Any]:
    return {
        "lesion_id": lesion.lesion_id,
        "image_type": kind,
        "isic_id": photo_id,
        "attribution": "SYNTHETIC, drawn by triderm-dist",
        "copyright_license": "CC-0",
        "image_manipulation": "synthetic",
        **lesion.shared,
        **{column: f"{score:.6f}" for column, score in scores.items()},
    }


def _supplement_row(photo_id: str, diagnosis: str) -> dict[str, Any]:
    return {
        "isic_id": photo_id,
        "diagnosis_full": diagnosis,
        "diagnosis_confirm_type": "synthetic",
        "invasion_thickness_interval": "",
    }


# --- one lesion ------------------------------------------------------------------------------------------------------


def draw_lesion(
    generator: np.random.Generator,
    lesion_id: str,
    diagnosis: str,
    photo_ids: tuple[str, str],
    more: Sequence[MetadataField],
) -> SyntheticLesion:
    traits = TRAITS[diagnosis]
    tone = int(generator.choice(6, p=SKIN_TONE_SHARES))
    outline = draw_outline(generator)
    hairs = int(generator.choice([0, 0, 0, 2, 4, 7]))
    red, clods = (traits[view] ^ (generator.random() < SWAPPED) for view in (CLINICAL, DERMOSCOPIC))
    return SyntheticLesion(
        lesion_id,
        diagnosis,
        photo_ids,
        shared=draw_metadata(generator, traits[METADATA], tone, more),
        scores=draw_scores(generator, traits[CONCEPTS], hairs),
        photos=(
            draw_clinical(generator, tone, outline, hairs, float(red)),
            draw_dermoscopic(generator, tone, outline, hairs, float(clods)),
        ),
    )


def draw_metadata(
    generator: np.random.Generator, older: int, tone: int, more: Sequence[MetadataField]
) -> dict[str, Any]:
    age = 5 * round(float(np.clip(generator.normal(70 if older else 40, 9 if older else 12), 5, 85)) / 5)
    categories = {each.name: each.categories for each in TASK.fields}
    sites, sexes = categories["site"], categories["sex"]
    site = sites[generator.choice(len(sites), p=SITE_SHARES[older])]
    cells = {
        "age_approx": "" if generator.random() < MISSING else age,
        "sex": sexes[generator.integers(2)],
        "skin_tone_class": tone,
        "site": "" if generator.random() < MISSING else site,
    }
    return cells | {field.column: draw_cell(generator, field, None) for field in more}


def draw_scores(
    generator: np.random.Generator, ulcerated: int, hairs: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Draw the concept scores of both photos: ulceration shows the trait, vessels and redness weakly so."""
    strong = (6.0, 2.5) if ulcerated else (2.5, 6.0)
    weak = (3.5, 3.0) if ulcerated else (3.0, 3.5)
    hair = (1.0 + hairs, 5.0)
    by_name = {
        "ulceration_crust": strong,
        "hair": hair,
        "vasculature_vessels": weak,
        "erythema": weak,
        "pigmented": (3.0, 3.0),
        "gel_water_drop_fluid_dermoscopy_liquid": (1.5, 4.0),
        "skin_markings_pen_ink_purple_pen": (1.0, 6.0),
    }

    def one_photo() -> dict[str, float]:
        return {f"MONET_{name}": float(generator.beta(*shape)) for name, shape in by_name.items()}

    return one_photo(), one_photo()
