"""Remove passwords, access tokens and keys from text that is printed, logged or saved.

What counts as a secret: user, password and query of a URL (also where only part of the URL is left), the values of
headers and settings whose names say so (`Authorization`, `token=`, `"api_key": ...`), keys of well-known services by
their form, and the values of environment variables whose names say so, wherever they occur.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from triderm_dist.runtime.streams import WrappedStream, wrapped_output

REDACTED = "***"
"""Stands for a secret."""
URLS = "TRIDERM_URLS"
"""Environment variable with the URLs, separated by blanks or in lines, whose secrets saved settings do not hold."""

_SECRET_WORD = (
    r"password|passwd|passphrase|pwd|secret|token|authorization|credentials?|signature|cookie|sas|sig"
    r"|(?:api|access|account|auth|private|secret|encryption|shared|session|storage)[-_.]?key(?:[-_.]?id)?"
)
# Repetitions are bounded, so that the time is linear in the length of any text.
_NAME = rf"(?:[\w.-]{{0,60}}[-_.])?(?:{_SECRET_WORD})"
_SECRET_NAME = re.compile(_NAME, re.I)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_SHORTEST = 8
"""Characters from which on a known secret is removed wherever it occurs; a shorter one is a word."""

_SCHEME = r"\b[a-z][a-z0-9+.-]{0,30}:/{1,2}"
_END = r"(?=[),.;:\]}]{0,10}(?:[\s'\"<>]|$))"
_USER = re.compile(
    rf"(?P<scheme>{_SCHEME})(?:[^\s/@'\"<>?#:]{{0,200}}:(?!\d{{1,5}}/)[^\s@'\"<>?#]{{0,500}}@|[^\s/@'\"<>?#]{{1,500}}@)+",
    re.I,
)
_QUERY = re.compile(rf"(?P<url>{_SCHEME}[^\s?#'\"<>]{{0,500}})(?:\?|#(?=[^\s'\"<>]{{0,500}}=))[^\s'\"<>]+?{_END}", re.I)
_HEADER = re.compile(
    r"(?P<name>\b(?:proxy-)?authorization\b['\"]?\s{0,9}[:=]\s{0,9}['\"]?)"
    r"(?:(?:basic|bearer|token|digest|negotiate)\s{1,9})?[^\s'\",;]+"
    r"|(?P<scheme>\b(?:bearer|basic)\s{1,9})(?=[^\s'\"]{0,500}[\d=._/+-])[^\s'\",;]{12,}",
    re.I,
)
_OPTION = re.compile(
    rf"(?P<name>(?<!\S)(?:-u|--user|--(?:[\w-]{{0,60}}-)?(?:{_SECRET_WORD}))[\s=]{{1,9}})(?P<value>[^\s'\",;-][^\s'\",;]*)",
    re.I,
)
_PAIR = re.compile(
    rf"(?P<name>(?<!\w){_NAME}['\"]?\s{{0,9}}(?P<sign>=>|[:=])\s{{0,9}})"
    r"(?:(?P<quote>['\"])(?P<quoted>(?:(?!(?P=quote)).){0,4000})(?P=quote)|(?P<plain>[^\s'\",;&<>)\]}{]+))",
    re.I,
)
_PARAMETER = re.compile(
    r"(?P<name>[?&][\w.~%-]{0,60}(?:sig|key|token|secret|password|credential|auth|code)[\w.~%-]{0,60}=)[^\s&'\"<>]+",
    re.I,
)
_FORM = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{12,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{20,}"
    r"|\bglpat-[\w-]{16,}|\bxox[abprs]-[\w-]{10,}|\bsk-[\w-]{20,}|\bAIza[\w-]{30,}|\bya29\.[\w.-]{16,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.S,
)
_HINT = re.compile(r"[=:]|[-_]|bearer|basic|AKIA|ASIA|ABIA|ACCA|AIza|ya29|eyJ", re.I)
"""What every text with a secret has; most lines have none of it, or only digits around."""
_registered: set[str] = set()


def redact(text: str) -> str:
    """Return a text with `***` instead of each secret."""
    return _without({*_of_environment(), *_registered}, text)


def _redact_setting(text: str) -> str:
    """Return a text without secrets that a later process can redact to the same text."""
    return _without(_of_environment(), text)


def _without(secrets: Iterable[str], text: str) -> str:
    """Return a text without these secrets, and those that have the form of one."""
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, REDACTED)
    if not _HINT.search(text):
        return text
    text = _USER.sub(rf"\g<scheme>{REDACTED}@", text)
    text = _QUERY.sub(rf"\g<url>?{REDACTED}", text)
    text = _HEADER.sub(lambda found: f"{found['name'] or found['scheme']}{REDACTED}", text)
    text = _OPTION.sub(_without_option, text)
    text = _PARAMETER.sub(rf"\g<name>{REDACTED}", text)
    text = _PAIR.sub(_without_value, text)
    return _FORM.sub(REDACTED, text)


def redact_tree(value: Any, name: str = "") -> Any:
    """Return settings with `***` instead of each secret: in texts, and as values of keys that name a secret."""
    if isinstance(value, Mapping):
        return {key: redact_tree(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [redact_tree(each, name) for each in value]
    if not isinstance(value, str):
        return value
    return REDACTED if value and is_secret_name(name) else _redact_setting(value)


def restore_urls(value: Any) -> Any:
    """Return settings in which each redacted URL that `TRIDERM_URLS` holds is complete again."""
    if isinstance(value, Mapping):
        return {key: restore_urls(each) for key, each in value.items()}
    if isinstance(value, list):
        return [restore_urls(each) for each in value]
    if not isinstance(value, str) or REDACTED not in value:
        return value
    given = os.environ.get(URLS, "")
    return next((url for url in (*given.split("\n"), *given.split()) if _redact_setting(url) == value), value)


def register_secrets(value: Any, pass_on: bool = False) -> None:
    """Remove the secrets of these settings from all later texts. pass_on: give their URLs to child processes too, by
    `TRIDERM_URLS`, since the settings that those read are saved without secrets.
    """
    if isinstance(value, Mapping):
        for name, each in value.items():
            register_secrets(each, pass_on)
            if isinstance(each, str) and len(each) >= _SHORTEST and is_secret_name(str(name)):
                _registered.add(each)
    elif isinstance(value, list | tuple):
        for each in value:
            register_secrets(each, pass_on)
    elif isinstance(value, str) and REDACTED not in value and _redact_setting(value) != value:
        _registered.update(_parts(value))
        passed_on = os.environ.get(URLS, "").split("\n")
        if pass_on and value not in passed_on:
            os.environ[URLS] = "\n".join([*filter(None, passed_on), value])


def is_secret_name(name: str) -> bool:
    """Return whether the value of a setting, header or variable of this name is a secret."""
    return bool(_SECRET_NAME.fullmatch(name) or _SECRET_NAME.fullmatch(_CAMEL.sub("_", name)))


@contextmanager
def redacted_output() -> Iterator[None]:
    """Inside the block, remove secrets from what this process prints, and from the traceback of an error that ends
    it.
    """
    sys.excepthook = _print_exception
    with wrapped_output(_Redacted):
        yield


class _Redacted(WrappedStream):
    """A text stream without secrets."""

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _without_option(found: re.Match[str]) -> str:
    is_user = found["name"].strip(" =").lower() in ("-u", "--user")
    return found[0] if is_user and ":" not in found["value"] else f"{found['name']}{REDACTED}"


def _without_value(found: re.Match[str]) -> str:
    quote = found["quote"] or ""
    value = found["quoted"] if quote else found["plain"]
    word = value.lower() in ("", "true", "false", "none", "null", REDACTED)
    count = not quote and found["sign"] == ":" and re.fullmatch(r"[\d.%]+", value)  # as in "class token: 1"
    return found[0] if word or count else f"{found['name']}{quote}{REDACTED}{quote}"


def _of_environment() -> Iterator[str]:
    """Yield the values of environment variables whose names mark them as secrets."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _SECRET_NAME.fullmatch(name):
            is_path = value.startswith(("/", "~")) and name.upper().endswith(("PWD", "CREDENTIALS"))
            if not is_path:
                yield value


def _parts(text: str) -> Iterator[str]:
    """Yield the secrets of the URLs and headers in a text, as written and decoded: passwords, and the values of the
    query that may be secrets.
    """
    for found in re.finditer(rf"{_SCHEME}[^\s'\"<>]+", text, re.I):
        address, _, query = found[0].partition("?")
        user = address.partition("//")[2].rpartition("@")[0]
        values = [user.partition(":")[2] or user]
        for pair in re.split("[&#]", query):
            name, equals, value = pair.partition("=")
            random = len(value) >= 20 and any(letter.isdigit() for letter in value)
            if not equals or random or _PARAMETER.fullmatch(f"?{name}={value}"):
                values.append(value if equals else pair)
        for value in values:
            yield from {each for each in (value, urllib.parse.unquote_plus(value)) if len(each) >= _SHORTEST}
    for found in _HEADER.finditer(text):
        if len(value := re.split(r"[\s'\":=]+", found[0].rstrip("'\""))[-1]) >= _SHORTEST:
            yield value
