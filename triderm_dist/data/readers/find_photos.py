"""Find the photos that a table names, anywhere below a folder."""

from __future__ import annotations

import filecmp
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from triderm_dist.data.photo_formats import OTHER_SUFFIXES, PHOTO_SUFFIXES, READ_FORMATS, format_of
from triderm_dist.data.readers.dataset import folded
from triderm_dist.file_kinds import START, kind_of
from triderm_dist.files import walk_folders

_SUFFIXES = frozenset((*PHOTO_SUFFIXES, *OTHER_SUFFIXES))


class MissingPhoto(ValueError):
    """No file has the name of a photo, whatever its suffix or case."""


def photo_name(cell: str) -> str:
    """Return the id of a photo, given its id, file name or path."""
    return _without_suffix(cell.replace("\\", "/").rpartition("/")[2])


def _without_suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in _SUFFIXES else name


class PhotoFinder:
    """Finds the path of a photo by its id, file name or path, after walking the folders once.

    unused: the number of photos that no call has returned.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.where = " and ".join(map(str, folders))
        self.unused = 0
        self._paths: dict[str, str | list[str]] = {}
        self._others: dict[str, str] = {}
        """The paths of files that are not photos by their suffix, by the name without it."""
        self._near: dict[str, str] | None = None
        seen = set[tuple[int, int]]()
        for parent, name, suffix in (file for folder in folders for file in walk_files(folder, seen)):
            path = f"{parent}/{name}"
            if suffix in PHOTO_SUFFIXES:
                stem = _composed(name[: -len(suffix)])
                self.unused += 1
                known = self._paths.get(stem)
                self._paths[stem] = path if known is None else [*([known] if isinstance(known, str) else known), path]
            else:
                self._others.setdefault(_composed(name[: -len(suffix)] if suffix else name), path)

    @property
    def names(self) -> set[str]:
        return set(self._paths)

    def __call__(self, cell: str, lesion_id: str = "") -> str:
        """Return the path of a photo; of several of one name that at the cell's path or in the lesion's folder.

        Raises MissingPhoto where there is none, ValueError for another kind of file, a file whose name differs in
        case, or several different photos.
        """
        cell = _composed(cell)
        stem = photo_name(cell)
        found = self._paths.get(stem)
        if found is None:
            raise self._not_found(stem)
        path = found if isinstance(found, str) else _choose(found, cell, stem, lesion_id)
        self.unused -= 1
        return path

    def _not_found(self, stem: str) -> ValueError:
        """Return the error for a photo that no file has the name of; a file of nearly its name must not be lost."""
        if self._near is None:
            self._near = {_near(name): path for name, path in self._others.items()}
            for name, found in self._paths.items():
                self._near[_near(name)] = found if isinstance(found, str) else found[0]
        path = self._others.get(stem) or self._near.get(_near(stem))
        suffix = os.path.splitext(path or "")[1].lower()
        if path and suffix in PHOTO_SUFFIXES:
            return ValueError(f"no photo {stem}, but {path}, whose name is spelled otherwise; rename it")
        if path and (suffix in ("", *OTHER_SUFFIXES) or format_of(_start_of(path))):
            what = kind_of(_start_of(path))
            return ValueError(
                f"no photo {stem}, but {path}, {what}; convert it to {READ_FORMATS}, with the suffix of that format"
            )
        return MissingPhoto(f"no photo {stem} (.jpg, .png and others) below {self.where}; put it there")

    def clear(self) -> None:
        """Forget all paths, which take much memory."""
        self._paths.clear()
        self._others.clear()
        self._near = None


def _start_of(path: str) -> bytes:
    try:
        if os.path.isfile(path):  # opening a pipe would wait
            with open(path, "rb") as file:
                return file.read(START)
    except OSError:
        pass
    return b""


def _choose(paths: Sequence[str], cell: str, stem: str, lesion_id: str) -> str:
    """Return the one of several photos of a name that the table means, or the first where all have the same bytes.

    The cell's own path with its suffix counts most, then without it, then the suffix alone, then the lesion's folder.
    """
    tail = cell.replace("\\", "/").lstrip("./")
    rules = [
        lambda path: "/" in tail and path.endswith(f"/{tail}"),
        lambda path: "/" in tail and os.path.splitext(path)[0].endswith(f"/{_without_suffix(tail)}"),
        lambda path: os.path.basename(os.path.dirname(path)) == lesion_id,
        lambda path: os.path.basename(path) == tail.rpartition("/")[2],
    ]
    near = list(paths)
    for rule in rules:
        near = [path for path in near if rule(_composed(path))] or near
    if all(filecmp.cmp(near[0], other, shallow=False) for other in near[1:]):
        return near[0]
    raise ValueError(
        f"several photos are named {stem}: {near[0]} and {near[1]}; keep one, or write the path in the table"
    )


def walk_files(folder: Path, seen: set[tuple[int, int]] | None = None) -> Iterator[tuple[str, str, str]]:
    """Yield (folder, name, suffix in lower case) of every file that is not hidden, in the order of names.

    Each folder is walked once, whatever links lead to it; `seen` has those of earlier walks.
    """
    for parent, files in walk_folders(folder, ("__MACOSX",), seen):
        for name in files:
            if not name.startswith("."):
                yield parent, name, os.path.splitext(name)[1].lower()


def _composed(text: str) -> str:
    """Return the text with composed accents; macOS stores an accent as a character of its own."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _near(name: str) -> str:
    """Return a name without what is changed on the way (`folded`), spaces around it and a second suffix of photos."""
    return folded(_without_suffix(name.strip()).strip())
