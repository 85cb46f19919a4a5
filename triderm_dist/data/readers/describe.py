"""Describe a folder's tables and photos as a task.yaml, with the comment CHECK on guesses."""

from __future__ import annotations

import json
import math
import re
import unicodedata
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
from triderm_dist.files import why_no_folder
from triderm_dist.runtime.messages import did_you_mean
from triderm_dist.runtime.terminal import counted
from triderm_dist.schema import DataError, TableFormat
from triderm_dist.schema.task import RESERVED_NAMES

MAX_CATEGORIES = 40
MAX_DIAGNOSES = 100
LEAST_ROWS = 4
"""Rows per word, on average, of a column of which each word has one diagnosis only, to take that for no chance."""
MIN_COUNTED = 20
"""Rows above which numbers that occur once each, without a gap, are taken for a running number."""
IMBALANCE = 3
"""How many times as many rows the most frequent diagnosis has as the rarest, above which decisions are fitted."""
_MANY = 1e300
"""Numbers above it cannot be multiplied by 1.5."""
MAX_WORDS = 3
"""Texts that are no numbers in a column of numbers, which may mean a missing value."""
_LIKELY = {
    "diagnosis": (r"dx", r"diagnos(is|tic|is_1)", r"diagn\w*", r"label|class|target|category"),
    "lesion_id": (r"lesion_id|lesion", r"l(e|é|ä|ae)si(o|ó)n\w*", r"case_num|case_id|case"),
    "group": (r"patient_id|patient", r"pa[tc]ient\w*", r"subject_id|subject|person_id", r"pat_?(id|nr|no|num\w*)"),
}
"""Regular expressions for column names as `_joined` writes them (case-insensitive), the most likely first."""
_NOT_INPUTS = re.compile(
    r"(^|_)(dx|diag\w*|histo(log\w*|path\w*)?|biops\w*|confirm\w*|patholog\w*|management|treatment|outcome|"
    r"score|difficulty|notes?|comments?|remarks?|bemerkung(en)?|kommentare?)($|_)",
    re.IGNORECASE,
)
"""Columns that follow from the diagnosis or are written after it, which would leak the label."""
_DERMOSCOPIC, _CLINICAL = (
    re.compile("derm|auflicht", re.IGNORECASE),
    re.compile("clin|klin|close|nah|ma[ck]ro|phone|camera|kamera|overview|übersicht", re.IGNORECASE),
)
_MALIGNANT = re.compile(
    r"mel|melanoma.*|bcc|basal.?cell.*|scc|sccka|squamous.*|akiec|ack?|actinic.?keratosis|.*malign.*|.*carcinoma.*|bösartig",
    re.IGNORECASE,
)
_BENIGN = re.compile(
    r"nv|nev|n(a?)ev(us|i)|.*n(a?)ev(us|i)|bkl|sk|sek|seborr\w*.*|df|dermatofibroma|vasc|vascular.*|benign.*|gutartig|lentigo",
    re.IGNORECASE,
)


_SCORES = {"absent": 0, "typical": 0, "regular": 0, "present": 1, "atypical": 1, "irregular": 1}
"""Words of dermoscopic criteria, with the score that the seven-point checklist gives them."""
_WIDTH, _NAME_WIDTH = 120, 40


@dataclass(frozen=True)
class _Column:
    """A column of a table.

    counts: rows per distinct text, without missing words.  numbers: the texts as numbers, () if any is not one.
    """

    name: str
    counts: Counter[str]
    numbers: tuple[float, ...]


def describe_folder(folder: Path, roles: Mapping[str, str] | None = None) -> tuple[str, Table]:
    """Return the text of a task.yaml that reads this folder, and the table that it describes.

    roles: {diagnosis, lesion_id, group or view: column}, for columns whose names do not show their role.

    Raises DataError for a folder without photos or a table of them, for a column in `roles` that the table lacks, or if
    no column looks like a diagnosis.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: {why_no_folder(folder)}; give the folder that holds the table and the photos")
    photos = PhotoFinder([folder]).names
    if not photos:
        tars = "; tars are read by triderm index, with a task.yaml that you write" if any(folder.glob("*.tar")) else ""
        raise DataError(f"{folder}: no photo ({READ_FORMATS}) in this folder{tars}")
    table, images = _find_images(folder, photos)
    unused = {name: _column(table, name) for name in table.header if name not in images}
    given = _given_columns(table, unused, roles or {})
    if len(images) == 1:
        view, views = _views_of_rows(unused, f"{table.path.name} {images[0]}", given.get("view"))
        image = _text(images[0])
    elif "view" in given:
        raise DataError(
            f"{table.path}: view={given['view']} has no effect, since {images[0]} and {images[1]} name photos, one of "
            "each view; remove it"
        )
    else:
        images.sort(key=lambda name: _DERMOSCOPIC.search(name) is not None)
        view, views = None, ["  - {name: clinical, title: close-up}", "  - {name: dermoscopic, title: dermoscopy}"]
        image = f"{{clinical: {_text(images[0])}, dermoscopic: {_text(images[1])}}} # CHECK"
    what = "row" if len(images) == 2 else "photo"
    columns = _identifying_columns(table, unused, given, what, several_views=bool(view) or len(images) == 2)
    diagnosis, counts = _diagnoses(table, unused, given)
    finer = {name for name in unused if diagnosis and _implies_diagnosis(table, name, diagnosis)}
    lines = [
        f"# Described from {table.path.name} ({len(table)} rows) and {len(photos)} photos. Confirm what says CHECK.",
        f"name: {_task_name(folder)}",
        "",
        "# name: in results; title: in reports; words: in the table, several to merge; malignant: true, false or null",
        "diagnoses:",
        *_diagnosis_lines(counts),
        "",
        "views:",
        *views,
        *_input_lines(unused, finer),
        "",
        *_format_lines(table.form),
        "columns:",
        f"  image: {image}",
        columns["lesion_id"],
        *([f"  view: {_text(view)}"] if view else []),
        f"  diagnosis: {_text(diagnosis)}" + ("" if diagnosis else " # one column of zeros and ones each"),
        columns["group"],
        "",
        "# argmax (the most probable), fitted (one, by thresholds fitted out of fold), threshold (each above its own)",
        _decision_line(counts),
    ]
    return "\n".join([*lines, ""]), table


def _task_name(folder: Path) -> str:
    """Return the name of a task from that of its folder: lower-case letters, digits and `_`."""
    plain = unicodedata.normalize("NFKD", folder.resolve().name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9_]+", "_", plain.lower()).strip("_") or "task"


def _identifying_columns(
    table: Table, unused: dict[str, _Column], given: Mapping[str, str], what: str, several_views: bool
) -> dict[str, str]:
    """Remove the columns of groups and lesions from `unused`; return their YAML lines, by key of `columns`.

    what: `row` or `photo`, of which each is a lesion without a column of lesions.
    """
    group, lesion = _take(unused, "group", given), _take(unused, "lesion_id", given)
    several = f"every {what} is a lesion"
    if lesion and not several_views and len(set(table.cells[lesion].to_pylist())) < len(table):
        # Several photos of one lesion: every photo is predicted, and those of one lesion stay in one fold.
        several = f"CHECK: every photo is a lesion; if a column tells the views of a {lesion}, name it: view=COLUMN"
        group, lesion = group or lesion, None
    no_group = "null # CHECK: no column of patients was found; lesions of one patient may be in several folds"
    return {
        "lesion_id": f"  lesion_id: {_text(lesion)}" + ("" if lesion else f" # {several}"),
        "group": f"  group: {_text(group)} # never split over folds" if group else f"  group: {no_group}",
    }


def _implies_diagnosis(table: Table, name: str, diagnosis: str) -> bool:
    """Return whether a few words of a column, each in several rows, imply the diagnosis of every row that has one."""
    rows = Counter(zip(table.cells[name].to_pylist(), table.cells[diagnosis].to_pylist(), strict=True))
    known = {pair: count for pair, count in rows.items() if not any(map(is_missing, pair))}
    words, labels = (len({pair[at] for pair in known}) for at in (0, 1))
    return labels > 1 and len(known) == words and LEAST_ROWS * words <= sum(known.values())


def _input_lines(unused: dict[str, _Column], finer: set[str]) -> list[str]:
    """Return the YAML lines of the concepts and fields, and comments on the columns that are left out.

    finer: columns that imply the diagnosis.
    """
    concepts = _concept_prefix(unused) or _criteria(unused)
    fields, not_used = _fields(unused, finer)
    about = "# Inputs besides the photos; remove what is not known before the diagnosis."
    why = "# Columns that are left out; add a field for what is known before the diagnosis:"
    return [
        *(["", *concepts] if concepts else []),
        *(["", about, "fields:", *fields] if fields else []),
        *(["", why, *not_used] if not_used else []),
    ]


def _find_images(folder: Path, photos: set[str]) -> tuple[Table, list[str]]:
    """Return the table with the most cells that name photos, and the one or two columns with these cells."""
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
    """Yield the table in a file, or one per sheet of a workbook; call `on_error` for each that cannot be read."""
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


def _given_columns(table: Table, unused: Mapping[str, _Column], roles: Mapping[str, str]) -> dict[str, str]:
    """Return the column of each role as the table spells it. Raises DataError for one that it lacks or that has two."""
    spelled = {column.lower(): column for column in unused}
    given: dict[str, str] = {}
    for role, name in roles.items():
        if name.lower() not in spelled:
            hint = did_you_mean(name, unused, f"its columns are {', '.join(unused)}")
            raise DataError(f"{table.path}: no column {name!r} ({role}=); {hint}")
        column = spelled[name.lower()]
        if other := next((other for other in given if given[other] == column), None):
            raise DataError(f"{table.path}: column {column!r} is given as {other} and as {role}; name two columns")
        given[role] = column
    return given


def _take(unused: dict[str, _Column], role: str, given: Mapping[str, str]) -> str | None:
    """Remove and return the column of a role: the given one, or the most likely."""
    taken = {name for other, name in given.items() if other != role}
    found = given.get(role) or next((name for name in _likely(unused, role) if name not in taken), None)
    unused.pop(found or "", None)
    return found


def _likely(unused: Mapping[str, _Column], role: str) -> list[str]:
    """Return the columns whose names match a role, the most likely first."""
    return [name for pattern in _LIKELY[role] for name in unused if re.fullmatch(pattern, _joined(name), re.I)]


def _joined(name: str) -> str:
    """Return the name of a column with blanks, hyphens and other separators as underscores."""
    return re.sub(r"\W+", "_", name).strip("_")


def _views_of_rows(unused: dict[str, _Column], texts: str, given: str | None) -> tuple[str | None, list[str]]:
    """Remove the column of the photos' views from `unused`; return its name, None if there is none, and YAML lines."""
    if given:
        words = sorted(_spellings(unused.pop(given).counts), key=lambda word: _DERMOSCOPIC.search(word) is not None)
        titles = (("clinical", "close-up"), ("dermoscopic", "dermoscopy"))
        return given, [
            f"  - {{name: {view}, title: {title}, words: [{', '.join(map(_text, part))}]}} # CHECK"
            for (view, title), part in zip(titles, (words[:1], words[1:]), strict=True)
        ]
    for name, column in unused.items():
        words = _spellings(column.counts)
        dermoscopic = [word for word in words if _DERMOSCOPIC.search(word)]
        clinical = [word for word in words if _CLINICAL.search(word) and word not in dermoscopic]
        if len(words) == 2 and len(dermoscopic) == len(clinical) == 1:
            del unused[name]
            return name, [
                f"  - {{name: clinical, title: close-up, words: [{_text(clinical[0])}]}}",
                f"  - {{name: dermoscopic, title: dermoscopy, words: [{_text(dermoscopic[0])}]}}",
            ]
    if _CLINICAL.search(texts) and not _DERMOSCOPIC.search(texts):
        return None, ["  - {name: clinical, title: close-up} # CHECK: or dermoscopic"]
    return None, ["  - {name: dermoscopic, title: dermoscopy} # CHECK: or clinical"]


def _decision_line(counts: Mapping[str, int]) -> str:
    """Return the YAML line of the decision: `fitted` where a diagnosis is rare, and so seldom the most probable."""
    rarest = min(counts, key=lambda word: counts[word])
    most, fewest, rows = max(counts.values()), counts[rarest], sum(counts.values())
    if most > IMBALANCE * fewest:
        return f"decision: fitted # since {_text(rarest)} ({fewest} of {rows} rows) would seldom be the most probable"
    return "decision: argmax # since no diagnosis is much rarer than another"


def _diagnoses(table: Table, unused: dict[str, _Column], given: Mapping[str, str]) -> tuple[str | None, dict[str, int]]:
    """Remove the column(s) of diagnoses from `unused`; return its name, None for one-hot columns, and {word: rows}."""
    for name in [given["diagnosis"]] if "diagnosis" in given else _likely(unused, "diagnosis"):
        words = _categories(unused[name].counts)
        if 2 <= len(words) <= MAX_DIAGNOSES:
            del unused[name]
            return name, words
    truth = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}
    binary = [
        name
        for name, column in unused.items()
        if column.counts and all(word.lower() in truth for word in column.counts)
    ]
    if len(binary) >= 2:
        rows = zip(*(table.cells[name].to_pylist() for name in binary), strict=True)
        if all(sum(truth.get(cell.lower(), 0) for cell in row) == 1 for row in rows):
            counts = {name: sum(n for word, n in unused[name].counts.items() if truth[word.lower()]) for name in binary}
            for name in binary:
                del unused[name]
            return None, counts
    likely = [
        name for name, column in unused.items() if 2 <= len(column.counts) <= MAX_DIAGNOSES and not column.numbers
    ]
    raise DataError(
        f"{table.path}: no column looks like the diagnosis; name it by diagnosis=COLUMN (columns of 2 to "
        f"{MAX_DIAGNOSES} words: {', '.join(likely) or 'none'}), or give one column of zeros and ones per diagnosis"
    )


def _diagnosis_lines(words: Mapping[str, int]) -> list[str]:
    lines, used = [], {*RESERVED_NAMES}
    for word, count in sorted(words.items(), key=lambda each: (-each[1], each[0].lower())):
        name = re.sub(r"[^\w+-]+", "_", word.upper())[:_NAME_WIDTH].strip("_") or "DIAGNOSIS"
        others = {each.lower() for each in words if each != word}
        while name.lower() in used | others:
            name += "_2"
        used.add(name.lower())
        malignant = "true" if _MALIGNANT.fullmatch(word) else "false" if _BENIGN.fullmatch(word) else "null"
        keys = {"name": name}
        if name.lower() != word.lower():
            keys |= {"title": _text(word), "words": f"[{_text(word)}]"}
        check = " CHECK: malignant?" if malignant == "null" else ""
        lines += _entry(keys | {"malignant": malignant}, f"{counted(count, 'row')}{check}")
    return lines


def _concept_prefix(unused: dict[str, _Column]) -> list[str]:
    """Remove columns of scores from 0 to 1 that share a prefix up to `_`; return the YAML lines of the concepts."""
    groups: dict[str, list[str]] = {}
    for name, column in unused.items():
        if "_" in name and len(column.numbers) > 8 and all(0 <= number <= 1 for number in column.numbers):
            groups.setdefault(name.partition("_")[0] + "_", []).append(name)
    prefix = max(groups, key=lambda each: len(groups[each]), default=None)
    if (
        prefix is None
        or len(groups[prefix]) < 2
        or any(name.lower().startswith(prefix.lower()) for name in unused if name not in groups[prefix])
    ):
        return []
    for name in groups[prefix]:
        del unused[name]
    return ["# Scores from 0 to 1.", f"concepts: {{prefix: {_text(prefix)}}}"]


def _criteria(unused: dict[str, _Column]) -> list[str]:
    """Remove columns of criteria that are present or absent; return the YAML lines of these concepts."""
    found = {
        name: {word.lower() for word in column.counts}
        for name, column in unused.items()
        if len(column.counts) > 1 and {"absent", "present"} & {word.lower() for word in column.counts}
    }
    if len(found) < 2:
        return []
    for name in found:
        del unused[name]
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


def _fields(unused: Mapping[str, _Column], finer: set[str]) -> tuple[list[str], list[str]]:
    """Return the YAML lines of the fields, and comments on the columns that are left out."""
    fields, not_used, names = [], [], set[str]()
    for column in unused.values():
        counts = column.counts
        name = _joined(column.name.lower())
        name = name if name.isidentifier() and name not in names else f"field_{len(names) + 1}"
        keys = {"name": name, "column": _text(column.name)}
        if _NOT_INPUTS.search(_joined(column.name)):
            not_used.append(f"#   {column.name}: it may follow from the diagnosis")
        elif column.name in finer:
            not_used.append(f"#   {column.name}: each of its words has one diagnosis only; finer labels (fine)?")
        elif column.name.startswith("(column "):
            not_used.append(f"#   {column.name}: it has no name")
        elif len(counts) < 2:
            not_used.append(f"#   {column.name}: {'always the same' if counts else 'empty'}")
        elif _is_running_number(column):
            not_used.append(f"#   {column.name}: a running number; the id of the lesion (lesion_id)?")
        elif len(column.numbers) > 8:
            low, high = 0.0 - _above(-min(0.0, *column.numbers)), _above(max(column.numbers))
            high = 120 if name.startswith("age") and max(column.numbers) <= 120 else high
            keys |= {"kind": "number", "low": f"{low:g}", "high": f"{high:g}"}
            keys |= {"unit": "years"} if name.startswith("age") else {}
            seen = f"{min(column.numbers):g} to {max(column.numbers):g} in {counts.total()} rows"
            fields += _entry(keys, seen)
        elif len(counts) <= MAX_CATEGORIES and 2 * len(counts) <= counts.total() and not _misspelled_numbers(counts):
            fields += _entry(keys | {"kind": "category"}, "", _categories(counts))
        else:
            not_used.append(f"#   {column.name}: {_why_no_field(counts)}")
            continue
        names.add(name)
    return fields, not_used


def _is_running_number(column: _Column) -> bool:
    """Return whether a column counts its rows: whole numbers, each once, without a gap."""
    numbers, rows = sorted(column.numbers), column.counts.total()
    return len(numbers) == rows > MIN_COUNTED and numbers == [numbers[0] + at for at in range(rows)]


def _misspelled_numbers(counts: Counter[str]) -> list[str]:
    """Return the few words among more than 8 numbers that keep a column from being one of numbers; [] if it is none."""
    words = [text for text in counts if parse_number(text.removesuffix("+")) is None]
    few = len(words) <= MAX_WORDS and sum(counts[word] for word in words) < counts.total() / 2
    return words if few and len(counts) - len(words) > 8 else []


def _why_no_field(counts: Counter[str]) -> str:
    """Say why a column is neither numbers nor a few categories."""
    if words := _misspelled_numbers(counts):
        return f"numbers apart from {', '.join(map(json.dumps, words))}; a field, if these are listed in missing_words"
    return f"{len(counts)} different texts"


def _above(number: float) -> float:
    """Return a round number of at least 1.5 times `number`, since rows to come may exceed those seen."""
    if number <= 1:
        return float(number > 0)
    if number > _MANY:
        return number
    power = 10.0 ** math.floor(math.log10(1.5 * number))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 1.5 * number)


def _categories(counts: Counter[str]) -> dict[str, int]:
    """Return {category: count}, ignoring case, with `1.0` as `1`: pandas writes integers with gaps as floats."""
    spelling = {word.lower().removesuffix(".0"): word.removesuffix(".0") for word in sorted(counts)}
    total: Counter[str] = Counter()
    for word, count in counts.items():
        total[spelling[word.lower().removesuffix(".0")]] += count
    return dict(sorted(total.items()))


def _spellings(counts: Counter[str]) -> list[str]:
    """Return the words, of those that differ in case one."""
    return [*{word.lower(): word for word in counts}.values()]


def _entry(keys: Mapping[str, str], comment: str, categories: Mapping[str, int] | None = None) -> list[str]:
    """Return the YAML lines of a list entry: one line if it is short, else one per key and category."""
    listed, lines = "", [f"{key}: {value}" for key, value in keys.items()]
    if categories:
        listed = f", categories: [{', '.join(map(_text, categories))}]"
        comment = ", ".join(f"{word} {count}" for word, count in categories.items())
    short = f"  - {{{', '.join(lines)}{listed}}} # {comment}"
    if len(short) <= _WIDTH:
        return [short]
    if categories:
        lines.append("categories:")
        lines += [f"  - {_text(word)} # {counted(count, 'row')}" for word, count in categories.items()]
    else:
        lines[0] += f" # {comment}"
    return [f"  - {lines[0]}", *(f"    {line}" for line in lines[1:])]


def _text(word: str | None) -> str:
    """Return text as YAML, in quotes only where it needs them."""
    return word if word and re.fullmatch(r"[\w(][\w .()/+-]*", word) and word.lower() != "null" else json.dumps(word)
