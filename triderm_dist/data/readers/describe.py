"""Look at a folder's tables and photos and describe them as a task.yaml, with a comment at what is not certain."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from triderm_dist.data.photo_formats import READ_FORMATS
from triderm_dist.data.readers.cells import is_missing, parse_number
from triderm_dist.data.readers.csv_file import NotUtf8
from triderm_dist.data.readers.find_photos import PhotoFinder, photo_name
from triderm_dist.data.readers.table import Table, find_tables, read_table
from triderm_dist.data.readers.workbook import SeveralSheets
from triderm_dist.schema import DataError, TableFormat, did_you_mean

MAX_CATEGORIES = 40
MAX_DIAGNOSES = 100
_LIKELY = {
    "diagnosis": (r"dx", r"diagnos(is|tic|is_1)", r"diagn\w*", r"label|class|target|category"),
    "lesion_id": (r"lesion_id|lesion", r"l(e|é|ä|ae)si(o|ó)n\w*", r"case_num|case_id|case"),
    "group": (r"patient_id|patient", r"pa[tc]ient\w*", r"subject_id|subject|person_id"),
}
"""Patterns of the names of columns, in any case, the likeliest first."""
_NOT_INPUTS = re.compile(
    r"(^|_)(dx|diag\w*|histo(log\w*|path\w*)?|biops\w*|confirm\w*|patholog\w*|management|treatment|outcome|score|difficulty|notes?)($|_)",
    re.IGNORECASE,
)
"""Columns that follow from the diagnosis, or that a doctor writes after it."""
_DERMOSCOPIC, _CLINICAL = (
    re.compile("derm", re.IGNORECASE),
    re.compile("clin|klin|close|nah|ma[ck]ro|phone|camera|kamera|overview", re.IGNORECASE),
)
_MALIGNANT = re.compile(
    r"mel|melanoma.*|bcc|basal.?cell.*|scc|sccka|squamous.*|akiec|ack?|actinic.?keratosis|.*malignan.*|.*carcinoma.*",
    re.IGNORECASE,
)
_BENIGN = re.compile(
    r"nv|nev|n(a?)ev(us|i)|.*n(a?)ev(us|i)|bkl|sk|sek|seborr\w*.*|df|dermatofibroma|vasc|vascular.*|benign.*|lentigo",
    re.IGNORECASE,
)


_SCORES = {"absent": 0, "typical": 0, "regular": 0, "present": 1, "atypical": 1, "irregular": 1}
"""Words of the criteria of dermoscopy, and the score that the seven-point checklist gives them."""
_WIDTH = 120


@dataclass(frozen=True)
class _Column:
    """A column's different texts with their counts, without missing words; numbers: all of them, where all are."""

    name: str
    counts: Counter[str]
    numbers: tuple[float, ...]


def describe_folder(folder: Path, roles: Mapping[str, str] | None = None) -> str:
    """Return the text of a task.yaml that reads this folder.

    roles: columns whose names do not say what they are, by the keys diagnosis, lesion_id, group and view of
    `TaskColumns`.

    Raises DataError for a folder without photos or without a table of them, for a column in `roles` that the table
    lacks, or where nothing looks like a diagnosis.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder that holds the table and the photos")
    photos = PhotoFinder([folder]).names
    if not photos:
        raise DataError(f"{folder}: no photo ({READ_FORMATS}) in this folder")
    table, images = _find_images(folder, photos)
    left = {name: _column(table, name) for name in table.header if name not in images}
    given = {role: _spelled(table, left, role, name) for role, name in (roles or {}).items()}
    if len(images) == 1:
        view, views = _views_of_rows(left, f"{table.path.name} {images[0]}", given.get("view"))
        image = _text(images[0])
    else:
        images.sort(key=lambda name: _DERMOSCOPIC.search(name) is not None)
        view, views = None, ["  - {name: clinical, title: close-up}", "  - {name: dermoscopic, title: dermoscopy}"]
        image = f"{{clinical: {_text(images[0])}, dermoscopic: {_text(images[1])}}} # CHECK"
    group, lesion = _take(left, "group", given), _take(left, "lesion_id", given)
    if lesion and not view and len(images) == 1 and len(set(table.cells[lesion].to_pylist())) < len(table):
        # Several photos of one lesion: every photo is predicted, and those of one lesion stay in one fold.
        group, lesion = group or lesion, None
    diagnosis, diagnoses = _diagnoses(table, left, given)
    concepts = _concept_prefix(left) or _criteria(left)
    fields, not_used = _fields(left)
    name = re.sub(r"[^a-z0-9_]+", "_", folder.resolve().name.lower()).strip("_")
    no_group = "null # CHECK: no column of patients was found; lesions of one patient may be in several folds"
    lines = [
        f"# Described from {table.path.name} ({len(table)} rows) and {len(photos)} photos. Confirm what says CHECK.",
        f"name: {name or 'task'}",
        "",
        "# name: in results; title: in reports; words: in the table, several to merge; malignant: true, false or null",
        "diagnoses:",
        *diagnoses,
        "",
        "views:",
        *views,
        *(["", *concepts] if concepts else []),
        *(["", "fields:", *fields] if fields else []),
        *(
            ["", "# Columns that are left out; add a field for what is known before the diagnosis:", *not_used]
            if not_used
            else []
        ),
        "",
        *_format_lines(table.form),
        "columns:",
        f"  image: {image}",
        f"  lesion_id: {_text(lesion)}" + ("" if lesion else " # every photo is a lesion"),
        *([f"  view: {_text(view)}"] if view else []),
        f"  diagnosis: {_text(diagnosis)}" + ("" if diagnosis else " # one column of zeros and ones each"),
        f"  group: {_text(group)} # never split over folds" if group else f"  group: {no_group}",
        "",
        "# argmax, threshold (each p > 0.5) or fitted (thresholds fitted on out-of-fold predictions)",
        "decision: argmax",
    ]
    return "\n".join([*lines, ""])


def _find_images(folder: Path, photos: set[str]) -> tuple[Table, list[str]]:
    """Return the table with the most cells that name photos, and its one or two columns of them."""
    best: tuple[int, Table, list[str]] | None = None
    tables, errors = find_tables(folder), list[DataError]()
    for table in (table for path in tables for table in _read_tables(path, errors.append)):
        found = {
            name: sum(photo_name(cell) in photos for cell in cells.to_pylist()) for name, cells in table.cells.items()
        }
        likely = sorted((name for name in found if 2 * found[name] > len(table)), key=lambda name: -found[name])[:2]
        total = sum(found[name] for name in likely)
        if likely and (best is None or total > best[0]):
            best = total, table, likely
    if best is None:
        if errors and len(errors) == len(tables):
            raise errors[0]
        names = ", ".join(str(path.relative_to(folder)) for path in tables) or "no table"
        raise DataError(
            f"{folder}: no column names the photos ({names}); a column needs their ids, file names or paths"
        )
    return best[1], best[2]


def _read_tables(path: Path, on_error: Callable[[DataError], object]) -> Iterator[Table]:
    """Yield the table in a file, or that of each sheet of a workbook; `on_error` gets why there is none."""
    others: list[TableFormat] = []
    try:
        yield read_table(path)
    except NotUtf8:
        others = [TableFormat(encoding="cp1252")]
    except SeveralSheets as error:
        others = [TableFormat(sheet=sheet) for sheet in error.sheets]
    except DataError as error:
        on_error(error)
    for form in others:
        try:
            yield read_table(path, form)
        except DataError as error:
            on_error(error)


def _format_lines(form: TableFormat) -> list[str]:
    if form.encoding:
        return [f"table: {{encoding: {form.encoding}}} # CHECK: umlauts and accents in the words above", ""]
    return [f"table: {{sheet: {_text(form.sheet)}}} # CHECK: the sheet to read", ""] if form.sheet else []


def _column(table: Table, name: str) -> _Column:
    counts = Counter(cell for cell in table.cells[name].to_pylist() if not is_missing(cell))
    numbers = [parse_number(text.removesuffix("+")) for text in counts]
    known = tuple(number for number in numbers if number is not None)
    return _Column(name, counts, known if len(known) == len(numbers) else ())


def _spelled(table: Table, left: Mapping[str, _Column], role: str, name: str) -> str:
    """Return a column's name as the table spells it. Raises DataError if the table has no such column."""
    spelled = {column.lower(): column for column in left}
    if name.lower() not in spelled:
        hint = did_you_mean(name, left, f"its columns are {', '.join(left)}")
        raise DataError(f"{table.path}: no column {name!r} ({role}=); {hint}")
    return spelled[name.lower()]


def _take(left: dict[str, _Column], role: str, given: Mapping[str, str]) -> str | None:
    """Remove and return the column of a role: the given one, or the likeliest."""
    taken = {name for other, name in given.items() if other != role}
    found = given.get(role) or next((name for name in _likely(left, role) if name not in taken), None)
    left.pop(found or "", None)
    return found


def _likely(left: Mapping[str, _Column], role: str) -> list[str]:
    """Return the columns whose names say this role, the likeliest first."""
    return [name for pattern in _LIKELY[role] for name in left if re.fullmatch(pattern, name, re.IGNORECASE)]


def _views_of_rows(left: dict[str, _Column], texts: str, given: str | None) -> tuple[str | None, list[str]]:
    """Return the column that says the view of a photo, removed from `left`, or None; and the lines of the views."""
    if given:
        words = sorted(left.pop(given).counts, key=lambda word: _DERMOSCOPIC.search(word) is not None)
        titles = (("clinical", "close-up"), ("dermoscopic", "dermoscopy"))
        return given, [
            f"  - {{name: {view}, title: {title}, words: [{', '.join(map(_text, part))}]}} # CHECK"
            for (view, title), part in zip(titles, (words[:1], words[1:]), strict=True)
        ]
    for name, column in left.items():
        words = list(column.counts)
        dermoscopic = [word for word in words if _DERMOSCOPIC.search(word)]
        clinical = [word for word in words if _CLINICAL.search(word) and word not in dermoscopic]
        if len(words) == 2 and len(dermoscopic) == len(clinical) == 1:
            del left[name]
            return name, [
                f"  - {{name: clinical, title: close-up, words: [{_text(clinical[0])}]}}",
                f"  - {{name: dermoscopic, title: dermoscopy, words: [{_text(dermoscopic[0])}]}}",
            ]
    if _CLINICAL.search(texts) and not _DERMOSCOPIC.search(texts):
        return None, ["  - {name: clinical, title: close-up} # CHECK: or dermoscopic"]
    return None, ["  - {name: dermoscopic, title: dermoscopy} # CHECK: or clinical"]


def _diagnoses(table: Table, left: dict[str, _Column], given: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """Return the column of diagnoses, removed from `left`, or None for columns of zeros and ones; and their lines."""
    for name in [given["diagnosis"]] if "diagnosis" in given else _likely(left, "diagnosis"):
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
    likely = [name for name, column in left.items() if 2 <= len(column.counts) <= MAX_DIAGNOSES and not column.numbers]
    raise DataError(
        f"{table.path}: no column looks like the diagnosis; name it by diagnosis=COLUMN (columns of 2 to "
        f"{MAX_DIAGNOSES} words: {', '.join(likely) or 'none'}), or give one column of zeros and ones per diagnosis"
    )


def _diagnosis_lines(words: Mapping[str, int]) -> list[str]:
    lines, used = [], set[str]()
    for word, count in sorted(words.items(), key=lambda each: (-each[1], each[0].lower())):
        name = re.sub(r"[^\w+-]+", "_", word.upper()).strip("_") or "DIAGNOSIS"
        while name in used:
            name += "_2"
        used.add(name)
        malignant = "true" if _MALIGNANT.fullmatch(word) else "false" if _BENIGN.fullmatch(word) else "null"
        keys = {"name": name}
        if name.lower() != word.lower():
            keys |= {"title": _text(word), "words": f"[{_text(word)}]"}
        check = " CHECK: malignant?" if malignant == "null" else ""
        lines += _entry(keys | {"malignant": malignant}, f"{count} rows{check}")
    return lines


def _concept_prefix(left: dict[str, _Column]) -> list[str]:
    """Remove columns of scores from 0 to 1 that share the beginning of their name, up to a _; return their lines."""
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
        return []
    for name in groups[prefix]:
        del left[name]
    return ["# Scores from 0 to 1.", f"concepts: {{prefix: {prefix}}}"]


def _criteria(left: dict[str, _Column]) -> list[str]:
    """Remove columns whose words say whether a criterion is there, and return the lines of these concepts."""
    found = {
        name: {word.lower() for word in column.counts}
        for name, column in left.items()
        if len(column.counts) > 1 and {"absent", "present"} & {word.lower() for word in column.counts}
    }
    if len(found) < 2:
        return []
    for name in found:
        del left[name]
    words = sorted(set().union(*found.values()), key=lambda word: (_SCORES.get(word, 1), word))
    unsure = {word: " # CHECK" for word in words if word not in _SCORES}
    return [
        "# Criteria; words: their scores from 0 to 1.",
        "concepts:",
        "  names:",
        *(f"    - {_text(name)}" for name in found),
        "  words:",
        *(f"    {_text(word)}: {_SCORES.get(word, 1)}{unsure.get(word, '')}" for word in words),
    ]


def _fields(left: Mapping[str, _Column]) -> tuple[list[str], list[str]]:
    """Return the lines of the fields, and comments on the columns that are left out."""
    fields, not_used, names = [], [], set[str]()
    for column in left.values():
        counts = column.counts
        name = re.sub(r"\W+", "_", column.name.lower()).strip("_")
        name = name if name.isidentifier() and name not in names else f"field_{len(names) + 1}"
        keys = {"name": name, "column": _text(column.name)}
        if _NOT_INPUTS.search(column.name):
            not_used.append(f"#   {column.name}: it may follow from the diagnosis")
        elif column.name.startswith("(column "):
            not_used.append(f"#   {column.name}: it has no name")
        elif len(counts) < 2:
            not_used.append(f"#   {column.name}: {'always the same' if counts else 'empty'}")
        elif len(column.numbers) > 8:
            low, high = 0.0 - _above(-min(0.0, *column.numbers)), _above(max(column.numbers))
            high = 120 if name.startswith("age") and max(column.numbers) <= 120 else high
            keys |= {"kind": "number", "low": f"{low:g}", "high": f"{high:g}"}
            keys |= {"unit": "years"} if name.startswith("age") else {}
            seen = f"{min(column.numbers):g} to {max(column.numbers):g} in {counts.total()} rows"
            fields += _entry(keys, seen)
        elif len(counts) <= MAX_CATEGORIES and 2 * len(counts) <= counts.total():
            fields += _entry(keys | {"kind": "category"}, "", _categories(counts))
        else:
            not_used.append(f"#   {column.name}: {len(counts)} different texts")
            continue
        names.add(name)
    return fields, not_used


def _above(number: float) -> float:
    """Return a round number larger than this one; rows to come may exceed those seen."""
    if number <= 1:
        return float(number > 0)
    power = 10.0 ** math.floor(math.log10(1.5 * number))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 1.5 * number)


def _categories(counts: Counter[str]) -> dict[str, int]:
    """Return the categories with their counts; 1.0 is 1, as pandas writes integers with gaps, and case is ignored."""
    spelling = {word.lower().removesuffix(".0"): word.removesuffix(".0") for word in sorted(counts)}
    total: Counter[str] = Counter()
    for word, count in counts.items():
        total[spelling[word.lower().removesuffix(".0")]] += count
    return dict(sorted(total.items()))


def _entry(keys: Mapping[str, str], comment: str, categories: Mapping[str, int] | None = None) -> list[str]:
    """Return the lines of an entry of a list: one line if it is short, else one for each key and category."""
    listed, lines = "", [f"{key}: {value}" for key, value in keys.items()]
    if categories:
        listed = f", categories: [{', '.join(map(_text, categories))}]"
        comment = ", ".join(f"{word} {count}" for word, count in categories.items())
    short = f"  - {{{', '.join(lines)}{listed}}} # {comment}"
    if len(short) <= _WIDTH:
        return [short]
    if categories:
        lines += ["categories:", *(f"  - {_text(word)} # {count} rows" for word, count in categories.items())]
    else:
        lines[0] += f" # {comment}"
    return [f"  - {lines[0]}", *(f"    {line}" for line in lines[1:])]


def _text(word: str | None) -> str:
    """Return text as YAML, in quotes only where it needs them."""
    return word if word and re.fullmatch(r"[\w(][\w .()/+-]*", word) and word.lower() != "null" else json.dumps(word)
