"""Draw synthetic lesions of any task: photos, and one table with the task's own columns and words.

Photos of each view, concept scores and metadata are the modalities of a task. A diagnosis has a level from 0 to 1 in
each of them, chosen such that no two diagnoses have the same levels: a look of the photo, high or low scores, high or
low numbers and categories. Every other concept and field says nothing. A modality shows the level of another diagnosis
in a few lesions, so that no diagnosis is certain.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from triderm_dist.data.readers.find_table import image_columns
from triderm_dist.data.synthetic.pictures import SKIN_TONE_SHARES, draw_clinical, draw_dermoscopic, draw_outline
from triderm_dist.schema import ConfigError, MetadataField, Task

SWAPPED = 0.03
"""Share of lesions in which a modality shows the level of another diagnosis."""
MISSING = 0.03
"""Share of cells without a value."""
TWICE = 0.2
"""Share of lesions with a second photo, where every photo is predicted."""
PREFIXED = ("border", "color", "pattern", "shape")
"""Names of concepts where a task gives only their prefix."""
DRAWN = {"clinical": draw_clinical, "dermoscopic": draw_dermoscopic}
TABLE, PHOTOS = "lesions.csv", "photos"


def write_part(
    folder: Path, truth: Path, task: Task, name: str, lesions: int, minimum: int, seed: tuple[int, int]
) -> None:
    """Write photos and the table of one part; where `truth` is another folder, the diagnoses go into a table there.

    name: part of the ids.  minimum: lesions per diagnosis.
    """
    from PIL import Image

    generator = np.random.default_rng(seed)
    shares = 0.8 ** np.arange(len(task.diagnoses))
    labels = generator.permutation(np.repeat(np.arange(len(shares)), allocate(shares / shares.sum(), lesions, minimum)))
    levels = levels_of(task)
    (folder / PHOTOS).mkdir()
    rows, truths = [], []
    for number, label in enumerate(labels.tolist()):
        own = levels[label].copy()
        for at in np.flatnonzero(generator.random(len(own)) < SWAPPED):
            own[at] = levels[generator.integers(len(levels)), at]
        drawn, photos = draw_lesion(
            generator, task, f"{name.lower()}_{number:05d}", dict(zip(modalities(task), own, strict=True))
        )
        for photo, pixels in photos.items():
            Image.fromarray(pixels).save(folder / PHOTOS / photo, quality=90)
        diagnosis = draw_word(generator, task, label) | draw_fine(generator, task, label)
        id_column = task.columns.lesion_id or image_columns(task)[0]
        truths += [{id_column: lesion_id} | diagnosis for lesion_id in dict.fromkeys(row[id_column] for row in drawn)]
        rows += [row | diagnosis if truth == folder else row for row in drawn]
    write_csv(folder / TABLE, rows)
    if truth != folder:
        write_csv(truth / TABLE, truths)


def draw_lesion(
    generator: np.random.Generator, task: Task, lesion_id: str, levels: Mapping[str, float]
) -> tuple[list[dict[str, str]], dict[str, np.ndarray]]:
    """Draw a lesion with a level in each modality; return its rows without the diagnosis, and its photos by name."""
    columns = task.columns
    shared = {columns.lesion_id: lesion_id} if columns.lesion_id else {}
    if columns.group:
        shared[columns.group] = f"patient_{lesion_id}"
    metadata = draw_metadata(generator, task, levels.get("fields", 0.5))
    tone, outline = int(generator.choice(6, p=SKIN_TONE_SHARES)), draw_outline(generator)
    hairs = int(generator.choice([0, 0, 0, 2, 4, 7]))
    rows, photos = [], {}
    for number, views in enumerate(views_of_rows(generator, task)):
        cells = dict(shared)
        for view in views:
            photo = f"{lesion_id}_{view[0]}{number}.jpg"
            photos[photo] = DRAWN[view](generator, tone, outline, hairs, levels[view])
            cells[columns.image_of(view)] = photo
            if columns.view:
                cells[columns.view] = next((each.words or (view,))[0] for each in task.views if each.name == view)
        rows.append(cells | metadata | draw_scores(generator, task, levels.get("concepts", 0.5)))
    return rows, photos


def views_of_rows(generator: np.random.Generator, task: Task) -> list[tuple[str, ...]]:
    """Return the views of the photos in each row of a lesion."""
    if not isinstance(task.columns.image, str):
        return [task.view_names]
    if task.columns.lesion_id:
        return [(view,) for view in task.view_names]
    return [task.view_names[:1]] * (2 if task.columns.group and generator.random() < TWICE else 1)


# --- levels ----------------------------------------------------------------------------------------------------------


def modalities(task: Task) -> list[str]:
    concepts = ["concepts"] if task.concepts.prefix or task.concepts.names else []
    return [*task.view_names, *concepts, *(["fields"] if task.fields else [])]


def levels_of(task: Task) -> np.ndarray:
    """Return (C, number of modalities) levels from 0 to 1, with as few steps as distinguish the diagnoses.

    Each diagnosis takes the levels that differ from those before it in as many modalities as possible.
    """
    count, classes = len(modalities(task)), len(task.diagnoses)
    steps = next(steps for steps in itertools.count(2) if steps**count >= classes)
    free = np.array(list(itertools.product(range(steps), repeat=count)))
    taken = [0]
    differing = (free != free[0]).sum(1)
    while len(taken) < classes:
        best = int(np.argmax(np.where(np.isin(np.arange(len(free)), taken), -1, differing)))
        taken.append(best)
        differing = np.minimum(differing, (free != free[best]).sum(1))
    return free[taken] / (steps - 1)


def allocate(shares: Sequence[float] | np.ndarray, lesions: int, minimum: int) -> list[int]:
    """Return the number of lesions of each diagnosis: by share, at least `minimum` each. Raises ConfigError."""
    wanted = lesions * np.asarray(shares)
    if lesions < minimum * len(wanted):
        raise ConfigError(f"{lesions} lesions are too few: {minimum} for each of {len(wanted)} diagnoses are needed")
    counts = np.maximum(np.floor(wanted).astype(int), minimum)
    while counts.sum() != lesions:
        step = 1 if counts.sum() < lesions else -1
        gap = step * (wanted - counts)
        gap[(counts <= minimum) & (step < 0)] = -np.inf
        counts[np.argmax(gap)] += step
    return counts.tolist()


# --- cells -----------------------------------------------------------------------------------------------------------


def draw_word(generator: np.random.Generator, task: Task, label: int) -> dict[str, str]:
    """Draw one of the words of a diagnosis as its cell, or a one in its column."""
    if task.columns.diagnosis is None:
        return {each.name: str(int(at == label)) for at, each in enumerate(task.diagnoses)}
    words = task.diagnoses[label].words or (task.diagnoses[label].name,)
    return {task.columns.diagnosis: words[generator.integers(len(words))]}


def draw_fine(generator: np.random.Generator, task: Task, label: int) -> dict[str, str]:
    """Draw one of the finer labels of a diagnosis as its cell, empty if it has none."""
    if task.fine is None:
        return {}
    labels = task.fine.labels.get(task.diagnosis_names[label], ())
    return {task.fine.column: labels[generator.integers(len(labels))] if labels else ""}


def draw_metadata(generator: np.random.Generator, task: Task, level: float) -> dict[str, str]:
    word = next(iter(task.missing_words), "")
    return {
        each.column: draw_cell(generator, each, level if at % 2 == 0 else None, word)
        for at, each in enumerate(task.fields)
    }


def draw_cell(generator: np.random.Generator, field: MetadataField, level: float | None, missing: str = "") -> str:
    """Draw a number or category near a level of the field's range, anywhere in it for None; some are missing."""
    if generator.random() < MISSING:
        return missing if generator.random() < 0.5 else ""
    if field.is_number:
        high = min(field.high, field.scale_end)
        share = generator.random() if level is None else np.clip(generator.normal(0.25 + 0.5 * level, 0.12), 0, 1)
        number = field.low + float(share) * (high - field.low)
        text = f"{number:.0f}" if high - field.low > 20 else f"{number:.2f}"
        return text if field.low <= float(text) <= field.high else str(number)
    count = len(field.categories)
    away = np.zeros(count) if level is None else (np.arange(count) / (count - 1) - level) / 0.7
    weights = np.exp(-(away**2))
    text = field.categories[generator.choice(count, p=weights / weights.sum())]
    return text.upper() if text in ("true", "false") else text


def draw_scores(generator: np.random.Generator, task: Task, level: float) -> dict[str, str]:
    """Draw the concept scores of one row: numbers, or the first words for 0 and 1."""
    names = task.concepts.names or tuple(f"{task.concepts.prefix}{name}" for name in PREFIXED if task.concepts.prefix)
    by_score = {score: word for word, score in reversed(list(task.concepts.words.items()))}
    cells = {}
    for at, name in enumerate(names):
        mean = 0.25 + 0.5 * level if at % 2 == 0 else 0.5
        score = float(generator.beta(8 * mean, 8 * (1 - mean)))
        cells[name] = by_score[float(score > 0.5)] if {0.0, 1.0} <= by_score.keys() else f"{score:.3f}"
    return cells


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
