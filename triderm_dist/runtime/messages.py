"""Write texts of users and of other libraries into messages of one line."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence

from triderm_dist.runtime.redact import redact

_TERMINAL_CODE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_DIRECTION_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_LONGEST_COMPARED = 100


def one_line(error: object, limit: int | None = None, with_type: bool = False) -> str:
    """Return an error's text without secrets (`redact`) on one line of at most `limit` characters; the name of its type
    where it has no text.

    Colors of a terminal are left out, and what is not printable is escaped: control characters, directions of writing
    and lone surrogates come from data and from other libraries.  with_type: put the name of the type in front, as in
    `KeyError: 'age'`.
    """
    name, text = type(error).__name__, printable(redact(" ".join(_TERMINAL_CODE.sub("", str(error)).split())))
    text = (f"{name}: {text}" if with_type else text) if text else name
    return text if limit is None or len(text) <= limit else text[: limit - 4] + " ..."


def printable(text: str) -> str:
    """Return a text with every character escaped that is not printable."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listed(names: Sequence[str], limit: int = 3) -> str:
    """Name the first `limit` and count the others, as in `a, b, c and 4 more`."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def joined(words: Sequence[str]) -> str:
    """Return words as a sentence lists them, as in `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word most similar to `word`, whatever their case, None if none is similar.

    cutoff: the least similarity, from 0 to 1.
    """
    if len(word) > _LONGEST_COMPARED:
        return None  # the comparison takes the square of the length
    spelled = {each.lower(): each for each in known}
    found = difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=cutoff)
    return spelled[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return a hint at the nearest of the known words, or `otherwise` where none is near: by default all of them."""
    words = [*known]
    near = nearest(word, words)
    return f"did you mean {near!r}?" if near else otherwise or f"known are {', '.join(words)}"


def quoted(text: str, limit: int = 60) -> str:
    """Return text of a user in quotes for a message, with escapes, and cut if it is long."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text):,} characters)"


def unsafe_character(text: str, allowed: str = "") -> str | None:
    """Name the first character that acts on a terminal or on the order of text, None if there is none.

    Those are control characters, separators of lines, marks of the direction of text, and halves of a surrogate pair.
    """
    if text.isascii() and text.isprintable():
        return None
    for character in text:
        if character not in allowed and (
            unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTION_MARKS
        ):
            name = unicodedata.name(character, "a control character").lower()
            return f"U+{ord(character):04X} ({name})"
    return None
