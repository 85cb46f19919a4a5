"""Errors whose text is one line for the user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from triderm_dist.runtime.messages import did_you_mean, printable
from triderm_dist.runtime.redact import redact


class InputError(Exception):
    """Invalid input. Its text is one line: what is wrong, where, and what to do. Programs exit with status 2.

    The text may quote a file or a URL: secrets are removed (`redact`), what cannot be printed is escaped, and more than
    `LONGEST_TEXT` characters are cut out of its middle.
    """

    LONGEST_TEXT: ClassVar[int] = 1500

    def __init__(self, text: str) -> None:
        text, longest = printable(redact(text)), self.LONGEST_TEXT
        super().__init__(text if len(text) <= longest else f"{text[: longest * 2 // 3]} ... {text[-longest // 3 :]}")


class Busy(Exception):
    """Another process works on the same files. Its text is one line, as that of InputError; programs exit with 3, since
    the same command works once the other one has ended.
    """


class DataError(InputError):
    """An invalid challenge folder, shard or table; the text names the file and the row or sample."""


class ConfigError(InputError):
    """A setting that is unknown, of the wrong type, or incompatible with another one."""


class CheckpointError(InputError):
    """A weight file that does not belong to the network it is loaded into."""


def check_choice(key: str, value: object, known: Sequence[str]) -> None:
    """Raise ConfigError for a value that is none of the known ones."""
    if value not in known:
        raise ConfigError(f"{key}={value}: {did_you_mean(str(value), known)}")
