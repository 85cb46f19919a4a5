"""Look at a folder's tables and photos and describe them as a task.yaml, with a comment at what is not certain."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from triderm_dist.data.readers.lesions_csv import PhotoFinder, photo_name
from triderm_dist.data.readers.table import Table, find_tables, is_missing, parse_number, read_table
from triderm_dist.schema import DataError

MAX_CATEGORIES = 40
MAX_DIAGNOSES = 100
_LESION = ("lesion_id", "lesion", "case_num", "case_id", "case")
_PATIENT = ("patient_id", "patient", "subject_id", "subject", "person_id")
_DIAGNOSIS = ("dx", "diagnosis", "diagnostic", "diagnosis_1", "label", "class", "target", "category")
_NOT_INPUTS = re.compile(
    r"(^|_)(dx|diag\w*|histo\w*|biops\w*|confirm\w*|patholog\w*|management|treatment|outcome|score|difficulty|notes?)($|_)",
    re.IGNORECASE,
)
"""Columns that follow from the diagnosis, or that a doctor writes after it."""
_DERMOSCOPIC, _CLINICAL = (
    re.compile("derm", re.IGNORECASE),
    re.compile("clin|close|macro|phone|overview", re.IGNORECASE),
)
_MALIGNANT = re.compile(
    r"mel|melanoma.*|bcc|basal.?cell.*|scc|sccka|squamous.*|akiec|ack?|actinic.?keratosis|.*malignan.*|.*carcinoma.*",
    re.IGNORECASE,
)
_BENIGN = re.compile(
    r"nv|nev|n(a?)ev(us|i)|.*n(a?)ev(us|i)|bkl|sk|sek|seborr\w*.*|df|dermatofibroma|vasc|vascular.*|benign.*|lentigo",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Column:
    """A column's different texts with their counts, without missing words; numbers: all of them, where all are."""

    name: str
    counts: Counter[str]
    numbers: tuple[float, ...]


def describe_folder(folder: Path) -> str:
    """Return the text of a task.yaml that reads this folder.

    Raises DataError for a folder without photos or without a table of them, or where nothing looks like a diagnosis.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder that holds the table and the photos")
    photos = PhotoFinder(folder).names
    if not photos:
        raise DataError(f"{folder}: no photo (.jpg, .jpeg or .png) in this folder")
    table, images = _find_images(folder, photos)
    left = {name: _column(table, name) for name in table.header if name not in images}
    if len(images) == 1:
        view, views = _views_of_rows(left, f"{table.path.name} {images[0]}")
        image = json.dumps(images[0])
    else:
        images.sort(key=lambda name: _DERMOSCOPIC.search(name) is not None)
        view, views = None, ["  - {name: clinical, title: close-up}", "  - {name: dermoscopic, title: dermoscopy}"]
        image = f"{{clinical: {json.dumps(images[0])}, dermoscopic: {json.dumps(images[1])}}} # CHECK"
    group, lesion = _take(left, _PATIENT), _take(left, _LESION)
    if lesion and not view and len(images) == 1 and len(set(table.cells[lesion].to_pylist())) < len(table):
        # Several photos of one lesion: every photo is predicted, and those of one lesion stay in one fold.
        group, lesion = group or lesion, None
    diagnosis, diagnoses = _diagnoses(table, left)
    prefix = _concept_prefix(left)
    fields, not_used = _fields(left)
    name = re.sub(r"[^a-z0-9_]+", "_", folder.resolve().name.lower()).strip("_")
    no_group = "null # CHECK: no column of patients was found; lesions of one patient may be in several folds"
    lines = [
        f"# Described from {table.path.name} ({len(table)} rows) and {len(photos)} photos. Confirm what says CHECK.",
        f"name: {name or 'task'}",
        "",
        "# name: in results; title: in reports; words: in the table; malignant: true, false or null",
        "diagnoses:",
        *diagnoses,
        "",
        "views:",
        *views,
        *(["", "# Scores from 0 to 1.", f"concepts: {{prefix: {prefix}}}"] if prefix else []),
        *(["", "fields:", *fields] if fields else []),
        *(
            ["", "# Columns that are left out; add a field for what is known before the diagnosis:", *not_used]
            if not_used
            else []
        ),
        "",
        "columns:",
        f"  image: {image}",
        f"  lesion_id: {json.dumps(lesion)}" + ("" if lesion else " # every photo is a lesion"),
        *([f"  view: {json.dumps(view)}"] if view else []),
        f"  diagnosis: {json.dumps(diagnosis)}" + ("" if diagnosis else " # one column of zeros and ones each"),
        f"  group: {json.dumps(group)} # never split over folds" if group else f"  group: {no_group}",
        "",
        "# argmax, threshold (each p > 0.5) or fitted (thresholds fitted on out-of-fold predictions)",
        "decision: argmax",
    ]
    return "\n".join([*lines, ""])


def _find_images(folder: Path, photos: set[str]) -> tuple[Table, list[str]]:
    """Return the table with the most cells that name photos, and its one or two columns of them."""
    best: tuple[int, Table, list[str]] | None = None
    tables = find_tables(folder)
    for path in tables:
        try:
            table = read_table(path)
        except DataError:
            continue  # a text file that is not a table
        found = {
            name: sum(photo_name(cell) in photos for cell in cells.to_pylist()) for name, cells in table.cells.items()
        }
        likely = sorted((name for name in found if 2 * found[name] > len(table)), key=lambda name: -found[name])[:2]
        total = sum(found[name] for name in likely)
        if likely and (best is None or total > best[0]):
            best = total, table, likely
    if best is None:
        names = ", ".join(str(path.relative_to(folder)) for path in tables) or "no table"
        raise DataError(
            f"{folder}: no column names the photos ({names}); a column needs their ids, file names or paths"
        )
    return best[1], best[2]


def _column(table: Table, name: str) -> _Column:
    counts = Counter(cell for cell in table.cells[name].to_pylist() if not is_missing(cell))
    numbers = [parse_number(text.removesuffix("+")) for text in counts]
    known = tuple(number for number in numbers if number is not None)
    return _Column(name, counts, known if len(known) == len(numbers) else ())


def _take(left: dict[str, _Column], names: Sequence[str]) -> str | None:
    """Remove and return the first of these columns that there is, in any case."""
    spelled = {name.lower(): name for name in left}
    found = next((spelled[name] for name in names if name in spelled), None)
    left.pop(found or "", None)
    return found


def _views_of_rows(left: dict[str, _Column], texts: str) -> tuple[str | None, list[str]]:
    """Return the column that says the view of a photo, removed from `left`, or None; and the lines of the views."""
    for name, column in left.items():
        words = list(column.counts)
        dermoscopic = [word for word in words if _DERMOSCOPIC.search(word)]
        clinical = [word for word in words if _CLINICAL.search(word) and word not in dermoscopic]
        if len(words) == 2 and len(dermoscopic) == len(clinical) == 1:
            del left[name]
            return name, [
                f"  - {{name: clinical, title: close-up, words: [{json.dumps(clinical[0])}]}}",
                f"  - {{name: dermoscopic, title: dermoscopy, words: [{json.dumps(dermoscopic[0])}]}}",
            ]
    if _CLINICAL.search(texts) and not _DERMOSCOPIC.search(texts):
        return None, ["  - {name: clinical, title: close-up} # CHECK: or dermoscopic"]
    return None, ["  - {name: dermoscopic, title: dermoscopy} # CHECK: or clinical"]


def _diagnoses(table: Table, left: dict[str, _Column]) -> tuple[str | None, list[str]]:
    """Return the column of diagnoses, removed from `left`, or None for columns of zeros and ones; and their lines."""
    spelled = {name.lower(): name for name in left}
    for name in (spelled[name] for name in _DIAGNOSIS if name in spelled):
        words = left[name].counts
        if 2 <= len(words) <= MAX_DIAGNOSES:
            del left[name]
            return name, _diagnosis_lines(words)
    truth = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}
    binary = [
        name for name, column in left.items() if column.counts and all(word.lower() in truth for word in column.counts)
    ]
    if len(binary) >= 2:
        rows = zip(*(table.cells[name].to_pylist() for name in binary), strict=True)
        if all(sum(truth.get(cell.lower(), 0) for cell in row) == 1 for row in rows):
            counts = {name: sum(n for word, n in left[name].counts.items() if truth[word.lower()]) for name in binary}
            for name in binary:
                del left[name]
            return None, _diagnosis_lines(counts)
    raise DataError(
        f"{table.path}: no column looks like the diagnosis; name it {_DIAGNOSIS[0]!r}, or give one column of zeros and "
        "ones per diagnosis"
    )


def _diagnosis_lines(words: Mapping[str, int]) -> list[str]:
    lines, used = [], set[str]()
    for word, count in sorted(words.items(), key=lambda each: (-each[1], each[0].lower())):
        name = re.sub(r"[^\w+-]+", "_", word.upper()).strip("_") or "DIAGNOSIS"
        while name in used:
            name += "_2"
        used.add(name)
        malignant = "true" if _MALIGNANT.fullmatch(word) else "false" if _BENIGN.fullmatch(word) else "null"
        title = "" if name.lower() == word.lower() else f", title: {json.dumps(word)}, words: [{json.dumps(word)}]"
        check = " CHECK: malignant?" if malignant == "null" else ""
        lines.append(f"  - {{name: {json.dumps(name)}{title}, malignant: {malignant}}} # {count} rows{check}")
    return lines


def _concept_prefix(left: dict[str, _Column]) -> str | None:
    """Remove columns of scores from 0 to 1 that share the beginning of their name, up to a _; return it."""
    groups: dict[str, list[str]] = {}
    for name, column in left.items():
        if "_" in name and len(column.numbers) > 8 and all(0 <= number <= 1 for number in column.numbers):
            groups.setdefault(name.partition("_")[0] + "_", []).append(name)
    prefix = max(groups, key=lambda each: len(groups[each]), default=None)
    if (
        prefix is None
        or len(groups[prefix]) < 2
        or any(name.lower().startswith(prefix.lower()) for name in left if name not in groups[prefix])
    ):
        return None
    for name in groups[prefix]:
        del left[name]
    return prefix


def _fields(left: Mapping[str, _Column]) -> tuple[list[str], list[str]]:
    """Return the lines of the fields, and comments on the columns that are left out."""
    fields, not_used, names = [], [], set[str]()
    for column in left.values():
        counts = column.counts
        name = re.sub(r"\W+", "_", column.name.lower()).strip("_")
        name = name if name.isidentifier() and name not in names else f"field_{len(names) + 1}"
        head = f"  - {{name: {name}, column: {json.dumps(column.name)}, kind: "
        if _NOT_INPUTS.search(column.name):
            not_used.append(f"#   {column.name}: it may follow from the diagnosis")
        elif column.name.startswith("(column "):
            not_used.append(f"#   {column.name}: it has no name")
        elif len(counts) < 2:
            not_used.append(f"#   {column.name}: {'always the same' if counts else 'empty'}")
        elif len(column.numbers) > 8:
            low, high = min(0.0, *column.numbers), max(column.numbers)
            high = 120 if name.startswith("age") and high <= 120 else high
            unit = ", unit: years" if name.startswith("age") else ""
            fields.append(f"{head}number, low: {low:g}, high: {high:g}{unit}}} # {counts.total()} rows")
        elif len(counts) <= MAX_CATEGORIES and 2 * len(counts) <= counts.total():
            seen = ", ".join(f"{word} {count}" for word, count in counts.most_common())
            fields.append(f"{head}category, categories: [{_categories(counts)}]}} # {seen}")
        else:
            not_used.append(f"#   {column.name}: {len(counts)} different texts")
            continue
        names.add(name)
    return fields, not_used


def _categories(counts: Counter[str]) -> str:
    """Return the categories; 1.0 is 1, as pandas writes integers with gaps, and case does not matter."""
    words = {word.lower().removesuffix(".0"): word.removesuffix(".0") for word in sorted(counts)}
    return ", ".join(map(json.dumps, words.values()))
