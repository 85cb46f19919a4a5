"""Strategies of Hypothesis that damage files: their bytes, the nodes of a tree, the cells of a table, archive members.

Each returns the damaged content itself, so that a failing example can be read and repeated.
"""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

DEEP = "[" * 3000 + "]" * 3000
ODD_TEXT = (
    *("", " ", "0", "1", "-1", "1.0", "1,5", "1e400", "-inf", "nan", "NaN", "1E+05", "00012", "true", "FALSE", "null"),
    *("NA", "#N/A", "?", "../../etc/passwd", "/", "~", "C:\\x", "=1+1", "@SUM(A1)", "-x", "+1", "a,b", 'a"b', "a\nb"),
    *(
        "a\tb",
        "\u202eabc",
        "\x00",
        "\x1b[31mred",
        "\ufeff",
        "é",
        "e\u0301",
        "٣",
        "１",
        "\u2028",
        "x" * 3000,
        "9" * 5000,
    ),
)
"""Cells and scalars that people, spreadsheets and attackers write."""
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 1.5, -0.0, 2**31, 2**63, -(2**63) - 1, 10**25, 10**400),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        1e308,
        [],
        {},
        [[]],
        [None],
        [0],
        {"a": {}},
        {"": None},
        [[1, 2], [3]],
    ),
    *ODD_TEXT,
    "\ud800",
)
"""Values of JSON of every type, among them what its readers accept and its standard does not."""


@st.composite
def edited_bytes(draw: st.DrawFn, data: bytes, edits: int = 2) -> bytes:
    """Flip, overwrite, cut, insert, remove, repeat or move some bytes."""
    for _ in range(draw(st.integers(1, edits))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        span = draw(st.sampled_from((1, 2, 4, 16, 512, 4096)))
        kind = draw(st.sampled_from(("flip", "set", "cut", "insert", "remove", "repeat", "zero", "swap", "append")))
        part = data[at : at + span]
        if kind == "flip" and part:
            data = data[:at] + bytes((data[at] ^ 1 << draw(st.integers(0, 7)),)) + data[at + 1 :]
        elif kind == "set":
            data = data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at + 4 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + span :]
        elif kind == "repeat":
            data = data[:at] + part + data[at:]
        elif kind == "zero":
            data = data[:at] + bytes(len(part)) + data[at + span :]
        elif kind == "swap":
            data = data[:at] + data[at + span : at + 2 * span] + part + data[at + 2 * span :]
        else:
            data += draw(st.binary(min_size=1, max_size=8))
    return data


# --- trees -----------------------------------------------------------------------------------------------------------


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths of every node below the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in ((*path, key), *_places(value, (*path, key)))]


@st.composite
def edited_tree(draw: st.DrawFn, tree: Any, edits: int = 2, odd: Sequence[Any] = ODD_VALUES) -> Any:
    """Replace, retype, remove, rename, add or repeat some nodes of a tree of dicts, lists and scalars."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, edits))):
        places = _places(tree)
        if not places:
            break
        *above, key = draw(st.sampled_from(places))
        parent = tree
        for step in above:
            parent = parent[step]
        kind = draw(st.sampled_from(("replace", "replace", "retype", "remove", "rename", "add", "repeat", "exchange")))
        if kind == "replace":
            parent[key] = copy.deepcopy(draw(st.sampled_from(odd)))
        elif kind == "retype":
            parent[key] = draw(st.sampled_from((str, _listed, _mapped, _negative, _huge)))(parent[key])
        elif kind == "remove":
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from((f"{key}x", str(key).upper(), "", "\u202e", "__class__")))] = parent.pop(key)
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(("extra", "format", "Label", "a.b", " ")))] = copy.deepcopy(
                draw(st.sampled_from(odd))
            )
        elif kind == "repeat" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == "exchange":
            *other, last = draw(st.sampled_from(places))
            value = tree
            for step in (*other, last):
                value = value[step] if isinstance(value, list | dict) and _has(value, step) else None
            parent[key] = copy.deepcopy(value)
    return tree


def _has(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else isinstance(key, int) and key < len(container)


def _listed(value: Any) -> Any:
    return [value]


def _mapped(value: Any) -> Any:
    return {"value": value}


def _negative(value: Any) -> Any:
    return -value if isinstance(value, int | float) else [value, value]


def _huge(value: Any) -> Any:
    return value * 10**9 if isinstance(value, int | float) else str(value)[:20] * 50


def json_bytes(tree: Any) -> bytes:
    """Write a tree as JSON, with NaN and infinity as Python spells them, and lone surrogates as escapes."""
    return json.dumps(tree, indent=1).encode()


def without_checksum(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a tree as files hold it that have no checksum, so that readers must check every value."""
    return {key: value for key, value in tree.items() if key != "checksum"}


@st.composite
def edited_json(draw: st.DrawFn, tree: Any) -> bytes:
    """Damage the tree of a JSON file, or its text: cut, other encodings, keys written twice, deep nesting."""
    kind = draw(st.sampled_from(("tree", "tree", "tree", "bytes", "cut", "nest", "twice", "encode", "other", "tail")))
    text = json_bytes(tree)
    if kind == "bytes":
        return draw(edited_bytes(text))
    if kind == "cut":
        return text[: draw(st.integers(0, len(text) - 1))]
    text = json_bytes(draw(edited_tree(tree)))
    if kind == "nest":
        return text.replace(b": ", b": " + DEEP.encode()[:3000] * draw(st.sampled_from((1, 40))), 1)
    if kind == "twice":
        keys = [*tree] if isinstance(tree, dict) else [""]
        again = json.dumps({draw(st.sampled_from(keys)): draw(st.sampled_from(ODD_VALUES))})
        return text.rstrip().removesuffix(b"}") + b"," + again[1:].encode()
    if kind == "encode":
        encoding = draw(st.sampled_from(("utf-16", "utf-16-le", "utf-8-sig", "utf-32", "cp1252")))
        return text.decode().encode(encoding, "replace")
    if kind == "other":
        return draw(st.sampled_from((b"", b"null", b"[]", b"{}", b"3", b'"text"', DEEP.encode(), b"9" * 5000, b"\x00")))
    return text + b"{}" if kind == "tail" else text


# --- tables ----------------------------------------------------------------------------------------------------------


@st.composite
def edited_rows(
    draw: st.DrawFn, rows: Sequence[Sequence[str]], fixed: Sequence[str] = (), edits: int = 2
) -> list[list[str]]:
    """Edit the cells, rows and columns of a table; its first row is the header.

    fixed: columns whose cells are not replaced by text, because they say which lesion a row is about, or its label.
    """
    table = [[*row] for row in rows]
    for _ in range(draw(st.integers(1, edits))):
        row = draw(st.integers(0, len(table) - 1)) if table else 0
        column = draw(st.integers(0, len(rows[0]) - 1))
        kinds = (
            "cell",
            "cell",
            "cell",
            "header",
            "row",
            "drop",
            "move",
            "blank",
            "column",
            "ragged",
            "repeat",
            "spaces",
        )
        kind = draw(st.sampled_from(kinds))
        text = draw(st.sampled_from(ODD_TEXT))
        if not table or column >= len(table[row]):
            continue
        if kind == "cell" and (row == 0 or rows[0][column] not in fixed):
            table[row][column] = text
        elif kind == "header" and column < len(table[0]):
            name = table[0][column]
            table[0][column] = draw(st.sampled_from((name.upper(), f" {name} ", name[:-1], f"{name}s", text, "")))
        elif kind == "row":
            table.insert(row, [*table[row]])
        elif kind == "drop":
            del table[row]
        elif kind == "move":
            table.append(table.pop(row) if row else [*table[-1]])
        elif kind == "blank":
            table.insert(row, [""] * draw(st.sampled_from((0, 1, len(rows[0])))))
        elif kind == "column":
            at = draw(st.integers(0, len(rows[0]) - 1))
            for each in table:
                if max(at, column) < len(each):
                    each.insert(at, each.pop(column))
        elif kind == "ragged":
            table[row] = table[row][:column] if draw(st.booleans()) else [*table[row], text]
        elif kind == "repeat":
            for each in table:
                if column < len(each):
                    each.append(each[column])
        elif kind == "spaces":
            table[row][column] = f"  {table[row][column]}\u00a0"
    return table


@st.composite
def csv_bytes(draw: st.DrawFn, rows: Sequence[Sequence[str]]) -> bytes:
    """Write rows as a CSV in one of the dialects and encodings that programs write."""
    delimiter = draw(st.sampled_from((",", ",", ";", "\t", "|")))
    quoting = draw(st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))
    file = io.StringIO()
    file.write(draw(st.sampled_from(("", "", "", f"sep={delimiter}\n", "\n", "\ufeff", " \r\n"))))
    end = draw(st.sampled_from(("\n", "\r\n", "\n\n")))
    csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows(rows)
    encoding = draw(st.sampled_from(("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252", "utf-16-be")))
    return file.getvalue().encode(encoding, "replace")


@st.composite
def edited_csv(draw: st.DrawFn, rows: Sequence[Sequence[str]], fixed: Sequence[str] = ()) -> bytes:
    """Damage a table's cells, dialect, encoding or bytes."""
    kind = draw(st.sampled_from(("rows", "rows", "rows", "dialect", "bytes", "cut")))
    if kind in ("bytes", "cut"):
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(rows)
        data = file.getvalue().encode()
        return draw(edited_bytes(data, 1)) if kind == "bytes" else data[: draw(st.integers(0, len(data)))]
    return draw(csv_bytes(draw(edited_rows(rows, fixed)) if kind == "rows" else rows))


# --- binary formats --------------------------------------------------------------------------------------------------

FIELDS = (0, 1, 2, 3, 7, 8, 16, 127, 128, 255, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
"""Values at the ends of integer fields."""


@st.composite
def edited_fields(draw: st.DrawFn, data: bytes, edits: int = 2) -> bytes:
    """Overwrite integer fields, such as lengths, counts and offsets, mostly in the first or last bytes of a file."""
    for _ in range(draw(st.integers(1, edits))):
        if len(data) < 8:
            break
        width = draw(st.sampled_from((1, 2, 4, 8)))
        first, last = draw(st.sampled_from(((0, 256), (0, 1024), (-256, 0), (0, 0))))
        low = max(len(data) + first, 0) if first < 0 else 0
        high = len(data) - 8 if last <= 0 else min(last, len(data) - 8)
        at = draw(st.integers(min(low, high), high))
        order = draw(st.sampled_from(("big", "little")))
        value = draw(st.sampled_from(FIELDS)) % 256**width
        data = data[:at] + value.to_bytes(width, order) + data[at + width :]
    return data


@st.composite
def edited_parts(draw: st.DrawFn, parts: Sequence[bytes]) -> list[bytes]:
    """Remove, repeat, move, empty or damage some of the parts of a file: its segments, chunks or members."""
    parts = [*parts]
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, max(len(parts) - 1, 0)))
        kind = draw(st.sampled_from(("remove", "repeat", "move", "last", "empty", "edit", "fields")))
        if not parts:
            break
        if kind == "remove":
            del parts[at]
        elif kind == "repeat":
            parts.insert(at, parts[at])
        elif kind == "move":
            parts.insert(draw(st.integers(0, len(parts) - 1)), parts.pop(at))
        elif kind == "last":
            parts = parts[: at + 1]
        elif kind == "empty":
            parts[at] = b""
        elif kind == "edit":
            parts[at] = draw(edited_bytes(parts[at]))
        else:
            parts[at] = draw(edited_fields(parts[at]))
    return parts
