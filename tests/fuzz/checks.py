"""What must hold for every damaged file: a refusal in one line, or a result, within bounded time and memory."""

from __future__ import annotations

import resource
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from triderm_dist.schema import InputError

SECONDS = 20
"""After which a case counts as a hang; it takes milliseconds."""
MEGABYTES = 400
LONGEST = 2000
"""Characters of a message."""

Case = TypeVar("Case")


def cases(few: int, many: int) -> pytest.MarkDecorator:
    """Parametrize a test by the number of its cases: a few, and many where slow tests run."""
    return pytest.mark.parametrize("cases", [few, pytest.param(many, marks=pytest.mark.slow)])


def fuzz(check: Callable[[Case], object], strategy: st.SearchStrategy[Case], cases: int) -> None:
    """Call `check` with examples of a strategy, always the same ones."""

    def check_case(case: _Case[Case]) -> None:
        check(case.value)

    own = settings(
        max_examples=cases, derandomize=True, database=None, deadline=None, suppress_health_check=[*HealthCheck],
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    own(given(strategy.map(_Case))(check_case))()


@dataclass(frozen=True)
class _Case(Generic[Case]):
    """An example whose text is short enough to be read."""

    value: Case

    def __repr__(self) -> str:
        return repr(self.value)[:1000]


@contextmanager
def bounded() -> Iterator[None]:
    """Fail where the block takes too long or too much memory."""

    def stop(*_: Any) -> None:
        raise AssertionError(f"not done in {SECONDS} s")

    before = _peak_bytes()
    in_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGALRM, stop) if in_main else None
    if in_main:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        if in_main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
    grown = (_peak_bytes() - before) / 1e6
    assert grown < MEGABYTES, f"took {grown:.0f} MB"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def result_or_refusal(
    read: Callable[[], Any], file: Path | None = None, also: tuple[type[Exception], ...] = ()
) -> Any | None:
    """Return what `read` returns, None where it refuses its input by a line that names the file.

    also: errors other than InputError by which it may refuse.
    """
    try:
        with bounded():
            return read()
    except OSError as error:
        assert error.filename, f"an error that does not name its file: {error!r}"
        return None
    except (InputError, *also) as error:
        text = str(error)
        assert text, repr(error)
        bad = [
            char for char in text if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in "\u202e\u2066"
        ]
        assert not bad, f"a message of several lines, or with control characters: {text[:500]!r}"
        assert len(text) <= LONGEST, f"a message of {len(text)} characters: {text[:200]!r}"
        assert file is None or file.name in text, f"the message does not name {file.name}: {text!r}"
        return None


def labels_of(lesions: Any, names: tuple[str, ...]) -> dict[str, str | None]:
    """Return the diagnosis of each lesion by name, None where it has none."""
    return {each.lesion_id: names[each.label] if each.label >= 0 else None for each in lesions}


def assert_same_labels(found: dict[str, str | None], original: dict[str, str | None]) -> None:
    """Fail where a lesion of the original has another label than before."""
    changed = {
        lesion: (original[lesion], label) for lesion, label in found.items() if original.get(lesion, label) != label
    }
    assert not changed, f"labels changed without a word: {changed}"
