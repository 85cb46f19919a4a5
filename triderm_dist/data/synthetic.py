"""Write a small SYNTHETIC challenge folder: generated lesions in the official layout, with a test set and its labels.

OUTPUT/train is a training folder, OUTPUT/test a test folder without labels, OUTPUT/truth holds the test labels.

A diagnosis is a combination of four binary traits, one per modality:

    clinical photo      flat and brown, or raised and red
    dermoscopic photo   a pigment network, or clods
    concept scores      low or high ulceration
    metadata            younger, on trunk and limbs, or older, on sun-exposed skin

Eleven of the sixteen combinations are used, chosen such that without any one modality four pairs of diagnoses cannot be
distinguished. Every trait is noisy, so that no diagnosis is certain even with all four.
"""

import csv
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist.schema import (
    DIAGNOSES,
    DIAGNOSIS_NAMES,
    METADATA_FIELDS,
    MONET_COLUMNS,
    DataError,
    MetadataField,
    added_fields,
)

HEIGHT, WIDTH = 84, 112
LESIONS, TEST_LESIONS = 600, 260
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
SWAPPED = 0.03  # share of the photos that show the opposite trait
SKIN = np.array([(74, 48, 36), (110, 74, 54), (150, 106, 80), (196, 150, 122), (222, 180, 154), (238, 204, 184)], float)
SKIN_TONE_SHARES = (0.05, 0.08, 0.12, 0.45, 0.2, 0.1)
SITE_SHARES = {
    0: (0.42, 0.08, 0.24, 0.20, 0.02, 0.03, 0.01),
    1: (0.12, 0.60, 0.08, 0.10, 0.08, 0.01, 0.01),
}

README = """SYNTHETIC DEMO DATA. NOT A MEDICAL DATA SET.

Every picture, score and label here was generated from random numbers by a program (triderm-dist, data/synthetic.py).
It shows no patient and no lesion, and a score on these data says nothing about real skin. The layout is that of the
MILK10k challenge, so that every program can be tried.

train/   tables and photos with labels
test/    tables and photos without labels
truth/   the labels of test/, to score a submission
"""


@dataclass(frozen=True)
class DemoLesion:
    """One generated lesion: ids, cells of both table rows and concept scores by column, two photos (H, W, 3) uint8."""

    lesion_id: str
    diagnosis: str
    photo_ids: tuple[str, str]
    shared: dict[str, Any]
    scores: tuple[dict[str, float], dict[str, float]]
    photos: tuple[np.ndarray, np.ndarray]


def write_demo(output: Path, lesions: int, test_lesions: int, seed: int) -> bool:
    """Write the demo data into `output` atomically; returns False if `output` holds the same data already.

    Raises DataError where `output` holds other files.
    """
    settings = f"settings: lesions={lesions} test_lesions={test_lesions} seed={seed}"
    settings += "".join(f" {field!r}" for field in added_fields())
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        readme = output / "README.txt"
        if readme.is_file() and settings in readme.read_text(encoding="utf-8").splitlines():
            return False
        raise DataError(f"{output}: exists and is not this demo data; choose another output folder or delete it")
    temporary = output.with_name(output.name + ".part")
    if temporary.exists():
        shutil.rmtree(temporary)  # left by a run that was killed
    try:
        for folder in ("train", "test", "truth"):
            (temporary / folder).mkdir(parents=True)
        write_part(temporary / "train", temporary / "train", "Training", lesions, minimum=6, seed=(seed, 0))
        write_part(temporary / "test", temporary / "truth", "Test", test_lesions, minimum=3, seed=(seed, 1))
        (temporary / "README.txt").write_text(f"{README}\n{settings}\n", encoding="utf-8")
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return True


def write_part(folder: Path, truth: Path, name: str, lesions: int, minimum: int, seed: tuple[int, int]) -> None:
    """Write photos and tables of one part: one-hot labels into `truth`; the supplement only in a folder with labels.

    name: Training or Test, part of the file names.  minimum: lesions per diagnosis.
    """
    from PIL import Image

    generator = np.random.default_rng(seed)
    diagnoses = generator.permutation(np.repeat(list(SHARES), allot(lesions, minimum)))
    lesion_numbers = generator.choice(10**6, lesions, replace=False)
    photo_numbers = generator.choice(10**6, (lesions, 2), replace=False)
    metadata, labels, supplement = [], [], []
    for diagnosis, number, photo_number in zip(diagnoses, lesion_numbers, photo_numbers, strict=True):
        base = 10**6 * (8 + seed[1])  # ids are unique over both parts
        ids = (f"ISIC_{base + photo_number[0]}", f"ISIC_{base + photo_number[1]}")
        lesion = draw_lesion(generator, f"IL_{base + number}", str(diagnosis), ids)
        photos = folder / f"MILK10k_{name}_Input" / lesion.lesion_id
        photos.mkdir(parents=True)
        for kind, photo_id, pixels, scores in zip(
            ("clinical: close-up", "dermoscopic"), lesion.photo_ids, lesion.photos, lesion.scores, strict=True
        ):
            Image.fromarray(pixels).save(photos / f"{photo_id}.jpg", quality=90)
            metadata.append(
                {
                    "lesion_id": lesion.lesion_id,
                    "image_type": kind,
                    "isic_id": photo_id,
                    "attribution": "SYNTHETIC, drawn by triderm-dist",
                    "copyright_license": "CC-0",
                    "image_manipulation": "synthetic",
                    **lesion.shared,
                    **{column: f"{score:.6f}" for column, score in scores.items()},
                }
            )
            supplement.append(
                {
                    "isic_id": photo_id,
                    "diagnosis_full": DIAGNOSIS_NAMES[lesion.diagnosis],
                    "diagnosis_confirm_type": "synthetic",
                    "invasion_thickness_interval": "",
                }
            )
        labels.append({"lesion_id": lesion.lesion_id, **{d: float(d == lesion.diagnosis) for d in DIAGNOSES}})
    write_csv(folder / f"MILK10k_{name}_Metadata.csv", metadata)
    write_csv(truth / f"MILK10k_{name}_GroundTruth.csv", labels)
    if truth == folder:
        write_csv(folder / f"MILK10k_{name}_Supplement.csv", supplement)
    (folder / "attribution.txt").write_text("SYNTHETIC, drawn by triderm-dist; no patient is shown\n", encoding="utf-8")


def allot(lesions: int, minimum: int) -> list[int]:
    """Return the number of lesions of each diagnosis of `SHARES`: by share, at least `minimum` each."""
    wanted = lesions * np.array(list(SHARES.values()))
    counts = np.maximum(np.floor(wanted).astype(int), minimum)
    while counts.sum() != lesions:
        step = 1 if counts.sum() < lesions else -1
        gap = step * (wanted - counts)
        gap[(counts <= minimum) & (step < 0)] = -np.inf
        counts[np.argmax(gap)] += step
    return counts.tolist()


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# --- one lesion ------------------------------------------------------------------------------------------------------


def draw_lesion(
    generator: np.random.Generator, lesion_id: str, diagnosis: str, photo_ids: tuple[str, str]
) -> DemoLesion:
    traits = TRAITS[diagnosis]
    tone = int(generator.choice(6, p=SKIN_TONE_SHARES))
    outline = draw_outline(generator)
    hairs = int(generator.choice([0, 0, 0, 2, 4, 7]))
    red, clods = (traits[view] ^ (generator.random() < SWAPPED) for view in (CLINICAL, DERMOSCOPIC))
    return DemoLesion(
        lesion_id,
        diagnosis,
        photo_ids,
        shared=draw_metadata(generator, traits[METADATA], tone),
        scores=draw_scores(generator, traits[CONCEPTS], hairs),
        photos=(
            draw_clinical(generator, tone, outline, hairs, bool(red)),
            draw_dermoscopic(generator, tone, outline, hairs, bool(clods)),
        ),
    )


def draw_metadata(generator: np.random.Generator, older: int, tone: int) -> dict[str, Any]:
    age = 5 * round(float(np.clip(generator.normal(70 if older else 40, 9 if older else 12), 5, 85)) / 5)
    sites, sexes = METADATA_FIELDS["site"].categories, METADATA_FIELDS["sex"].categories
    site = sites[generator.choice(len(sites), p=SITE_SHARES[older])]
    cells = {
        "age_approx": "" if generator.random() < 0.03 else age,
        "sex": sexes[generator.integers(2)],
        "skin_tone_class": tone,
        "site": "" if generator.random() < 0.03 else site,
    }
    return cells | {field.column: draw_cell(generator, field) for field in added_fields()}


def draw_cell(generator: np.random.Generator, field: MetadataField) -> str:
    """Draw a cell of a field that a plugin added, independent of the diagnosis; empty in 3 of 100 lesions."""
    if generator.random() < 0.03:
        return ""
    if field.is_number:
        return str(generator.uniform(field.low, field.high))
    return field.categories[generator.integers(len(field.categories))]


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
        return {column: float(generator.beta(*by_name[column.removeprefix("MONET_")])) for column in MONET_COLUMNS}

    return one_photo(), one_photo()


# --- pictures --------------------------------------------------------------------------------------------------------

Y, X = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)


def draw_outline(generator: np.random.Generator) -> np.ndarray:
    """Draw amplitude and phase of the waves along a lesion's edge, (4, 2), the same in both of its photos."""
    return np.stack([generator.uniform(0.0, 0.12, 4), generator.uniform(0, 2 * np.pi, 4)], axis=1)


def within(distance: np.ndarray, sharpness: float) -> np.ndarray:
    """Return 1 where a signed distance is negative and 0 where it is positive, with a logistic transition."""
    return 0.5 - 0.5 * np.tanh(distance * (sharpness / 2))


def lesion_field(generator: np.random.Generator, outline: np.ndarray, radius: float) -> tuple[np.ndarray, ...]:
    """Return two maps (H, W): distance from the center, relative to the edge's, and coverage from 0 to 1."""
    y, x = Y - HEIGHT / 2 - generator.uniform(-5, 5), X - WIDTH / 2 - generator.uniform(-8, 8)
    angle = np.arctan2(y, x)
    edge = 1 + sum(size * np.cos((wave + 2) * angle + phase) for wave, (size, phase) in enumerate(outline.tolist()))
    distance = np.hypot(y, x) / (radius * edge)
    return distance, within(distance - 1, 14)


def smooth_noise(generator: np.random.Generator, cells: int) -> np.ndarray:
    """Draw noise (H, W) with about `cells` bumps across, mean 0, standard deviation 1."""
    waves = generator.uniform(-1, 1, (6, 2)) * 2 * np.pi * cells
    # Six plane waves, each the real part of a product of one along y and one along x.
    along_y = np.exp(1j * (np.outer(np.arange(HEIGHT) / HEIGHT, waves[:, 0]) + generator.uniform(0, 2 * np.pi, 6)))
    along_x = np.exp(1j * np.outer(np.arange(WIDTH) / WIDTH, waves[:, 1]))
    return ((along_y @ along_x.T).real / np.sqrt(3)).astype(np.float32)


def draw_skin(generator: np.random.Generator, tone: int) -> np.ndarray:
    skin = SKIN[tone] * generator.uniform(0.92, 1.08) + generator.normal(0, 2, 3)
    return (skin + (4 * smooth_noise(generator, 4) + 0.002 * skin.mean() * (X - WIDTH / 2))[..., None]).astype(
        np.float32
    )


def vary(generator: np.random.Generator, color: tuple[float, float, float]) -> np.ndarray:
    """Make a color (3,) lighter or darker, and slightly warmer or colder."""
    return np.array(color) + generator.normal(0, 12) + generator.normal(0, 4, 3)


def paint(picture: np.ndarray, mask: np.ndarray, color: np.ndarray) -> np.ndarray:
    return picture + mask[..., None] * (color.astype(np.float32) - picture)


def add_hairs(generator: np.random.Generator, picture: np.ndarray, hairs: int) -> np.ndarray:
    for _ in range(hairs):
        angle, offset = generator.uniform(0, np.pi), generator.uniform(-35, 35)
        away = (X - WIDTH / 2) * math.sin(angle) - (Y - HEIGHT / 2) * math.cos(angle) - offset
        away += 4 * np.sin((X + Y) / 25 + offset)
        picture = paint(picture, 0.8 * np.exp(-((away / 0.7) ** 2)), np.array([35.0, 25, 20]))
    return picture


def finish(generator: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    grain = 5 * generator.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(picture + grain, 0, 255).astype(np.uint8)


def draw_clinical(generator: np.random.Generator, tone: int, outline: np.ndarray, hairs: int, red: bool) -> np.ndarray:
    """Draw the close-up (H, W, 3): a flat brown patch, or a red dome lit from one side."""
    skin = draw_skin(generator, tone)
    distance, inside = lesion_field(generator, outline, generator.uniform(16, 26))
    if red:
        color = 0.35 * SKIN[tone] + 0.65 * vary(generator, (205, 70, 75))
        dome = np.clip(1 - distance**2, 0, 1)
        light = generator.uniform(0, 2 * np.pi)
        slope = (np.cos(light) * (X - WIDTH / 2) + np.sin(light) * (Y - HEIGHT / 2)) / 25
        picture = paint(skin, 0.9 * inside, color + (30 * dome * (1 + slope) - 12)[..., None])
    else:
        color = 0.30 * SKIN[tone] + 0.70 * vary(generator, (105, 66, 38))
        picture = paint(skin, 0.9 * inside, color + (12 * smooth_noise(generator, 6))[..., None])
    return finish(generator, add_hairs(generator, picture, hairs))


def draw_dermoscopic(
    generator: np.random.Generator, tone: int, outline: np.ndarray, hairs: int, clods: bool
) -> np.ndarray:
    """Draw the dermatoscope's photo (H, W, 3): larger, with a pigment network or clods, dark in the corners."""
    skin = draw_skin(generator, tone)
    _, inside = lesion_field(generator, outline, generator.uniform(32, 40))
    ground = 0.4 * SKIN[tone] + 0.6 * vary(generator, (165, 118, 95))
    picture = paint(skin, 0.85 * inside, ground + (8 * smooth_noise(generator, 4))[..., None])
    if clods:
        dark = vary(generator, (95, 32, 49))
        centers = np.stack([generator.uniform(6, HEIGHT - 6, 26), generator.uniform(10, WIDTH - 10, 26)], axis=1)
        away = np.full_like(X, np.inf)
        for (y, x), size in zip(centers.tolist(), generator.uniform(4, 6.5, 26).tolist(), strict=True):
            away = np.minimum(away, np.sqrt((Y - y) ** 2 + (X - x) ** 2) - size)
        pattern = within(away, 1.8)
    else:
        dark = vary(generator, (70, 42, 34))
        rotation, period = generator.uniform(0, np.pi), generator.uniform(9, 12)
        cos, sin = math.cos(rotation), math.sin(rotation)
        u, v = X * cos + Y * sin, Y * cos - X * sin
        bend = 1.5 * smooth_noise(generator, 3)
        lines = np.maximum(np.cos(2 * np.pi * (u + bend) / period), np.cos(2 * np.pi * (v + bend) / period))
        pattern = within(0.75 - lines, 12)
    picture = add_hairs(generator, paint(picture, 0.85 * inside * pattern, dark), hairs)
    corner = np.hypot((X - WIDTH / 2) / WIDTH, (Y - HEIGHT / 2) / HEIGHT) / 0.62
    return finish(generator, picture * within(corner - 1, 18)[..., None])
