"""Cells of a table as text, and the numbers, fields and scores in them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from triderm_dist.runtime.messages import quoted
from triderm_dist.schema import MISSING_WORDS, PLAIN_NUMBER, MetadataField, Task

MAX_CELL = 1 << 15
"""Characters of a cell, as in Excel."""
_DECIMAL_COMMA = r"^([-+]?[0-9]*),([0-9]+)$"
_AMBIGUOUS_COMMA = r"^[-+]?[1-9][0-9]{0,2},[0-9]{3}$"
"""`1,234` is a thousand in English and 1.234 elsewhere."""


def tidy(cells: pa.Array) -> pa.Array | None:
    """Return the cells trimmed and in Unicode NFC; None if one of them exceeds MAX_CELL characters."""
    cells = pc.utf8_trim_whitespace(cells)
    if (pc.max(pc.utf8_length(cells)).as_py() or 0) > MAX_CELL:
        return None
    return cells if pc.all(pc.string_is_ascii(cells)).as_py() else pc.utf8_normalize(cells, form="NFC")


def is_blank(line: Sequence[str]) -> bool:
    """Return whether all cells of a row are empty."""
    return not any(map(str.strip, line))


def is_missing(text: str, words: Sequence[str] = MISSING_WORDS) -> bool:
    """Return whether a cell is empty or one of the words that mean a missing value, in any case."""
    return not text or text.lower() in map(str.lower, words)


def parse_number(text: str) -> float | None:
    """Parse a finite number with a decimal point or comma; None for other text."""
    pointed = _with_point(text)
    number = float(pointed) if PLAIN_NUMBER.fullmatch(pointed) else math.nan
    return number if math.isfinite(number) else None


def _with_point(text: str) -> str:
    return text if re.fullmatch(_AMBIGUOUS_COMMA, text) else re.sub(_DECIMAL_COMMA, r"\1.\2", text)


def numbers_in(texts: pa.Array, low: float, high: float) -> np.ndarray:
    """Parse numbers (N,) with a decimal point or comma; NaN for other text and outside of [low, high]."""
    ambiguous = pc.match_substring_regex(texts, _AMBIGUOUS_COMMA)
    pointed = pc.if_else(ambiguous, texts, pc.replace_substring_regex(texts, _DECIMAL_COMMA, r"\1.\2"))
    plain = pc.match_substring_regex(pointed, r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)$")
    numbers = pc.if_else(plain, pointed, "nan").cast(pa.float64()).to_numpy(zero_copy_only=False)
    return np.where((low <= numbers) & (numbers <= high), numbers, np.nan)


def parse_field(field: MetadataField, text: str, words: Sequence[str] = MISSING_WORDS) -> float:
    """Return the value of a field, NaN where missing; `85+` is 85. Raises ValueError as `MetadataField.parse`."""
    if is_missing(text, words):
        return math.nan
    return field.parse(_with_point(text.removesuffix("+")) if field.is_number else text)


def parse_score(name: str, text: str, task: Task) -> float:
    """Return a concept score from 0 to 1, that of a word of the task in any case, NaN where missing.

    Raises ValueError otherwise.
    """
    for word, number in task.concepts.words.items():
        if word.lower() == text.lower():
            return number
    if is_missing(text, task.missing_words):
        return math.nan
    score = parse_number(text)
    if score is None or not 0 <= score <= 1:
        raise ValueError(f"{name} {quoted(text)} is not a score from 0 to 1")
    return score


def parsed_texts(
    texts: pa.Array, parse: Callable[[str], float], span: tuple[float, float] | None, words: Iterable[str]
) -> tuple[np.ndarray, dict[int, str]]:
    """Parse each text (N,). Returns the values, NaN where `parse` raises ValueError or KeyError, and {index: message}.

    span: numbers in this range are parsed at once, without `parse`, unless they are one of `words` in any case.
    """
    values, errors = np.full(len(texts), np.nan), dict[int, str]()
    if span:
        own = pc.is_in(pc.utf8_lower(texts), pa.array([*map(str.lower, words)], pa.string()))
        values = np.where(own.to_numpy(zero_copy_only=False), np.nan, numbers_in(texts, *span))
    for code in np.flatnonzero(np.isnan(values)).tolist():
        try:
            values[code] = parse(texts[code].as_py())
        except (ValueError, KeyError) as error:
            errors[code] = str(error)
    return values, errors
