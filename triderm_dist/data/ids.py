"""Check ids of lesions, photos and patients: spreadsheets change some texts, and take others for formulas."""

from __future__ import annotations

import re
import unicodedata

from triderm_dist.runtime.messages import printable, unsafe_character

_FORMULA = frozenset("=+-@\uff1d\uff0b\uff0d\uff20")
"""What begins a formula where a spreadsheet opens a CSV file, also in full width."""
_ERROR_VALUES = frozenset({"#N/A", "#REF!", "#VALUE!", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!", "#SPILL!", "#CALC!"})
_SCIENTIFIC = re.compile(r"[0-9](\.[0-9]+)?E\+[0-9]{2,3}", re.IGNORECASE)
MAX_ID = 80


def why_no_id(text: str, longest: int = MAX_ID) -> str | None:
    """Say why a text of a table cannot be the id of a lesion, photo or patient, None if it can."""
    if not text:
        return "is empty"
    if len(text) > longest:
        return f"has {len(text):,} characters, more than {longest}"
    if character := unsafe_character(text) or _invisible(text):
        return f"holds {character}"
    if text[0] in _FORMULA:
        return f"begins with {text[0]}, which a spreadsheet takes for a formula"
    if text.upper() in _ERROR_VALUES:
        return "is an error value of a spreadsheet"
    if _SCIENTIFIC.fullmatch(text):
        return "is a number that a spreadsheet has shortened; format the column as text and export it again"
    return None


def cell_text(text: str) -> str:
    """Return a text for a cell of a CSV that shows what data hold: escaped, and never a formula."""
    text = printable(text)
    return f"'{text}" if text[:1] in _FORMULA and text else text


def _invisible(text: str) -> str | None:
    """Name the first character that has no width."""
    found = next((each for each in text if unicodedata.category(each) == "Cf" or each == "\ufffd"), None)
    return found and f"U+{ord(found):04X} ({unicodedata.name(found, 'no name').lower()})"
