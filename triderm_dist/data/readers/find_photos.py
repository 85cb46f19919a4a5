"""Find the photos that a table names, anywhere below a folder."""

from __future__ import annotations

import filecmp
import os
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from triderm_dist.data.photo_formats import OTHER_SUFFIXES, PHOTO_SUFFIXES, READ_FORMATS, format_of, is_photo_url
from triderm_dist.data.readers.dataset import folded
from triderm_dist.data.readers.text_index import HashIndex, Texts
from triderm_dist.file_kinds import START, kind_of
from triderm_dist.files import walk_folders

_SUFFIXES = frozenset((*PHOTO_SUFFIXES, *OTHER_SUFFIXES))


class MissingPhoto(ValueError):
    """No file is named like the photo, with any suffix or case."""


def photo_name(cell: str) -> str:
    """Return the id of a photo, given its id, file name or path."""
    return _without_suffix(cell.replace("\\", "/").rpartition("/")[2])


def _without_suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in _SUFFIXES else name


class _Files:
    """Files by their names without suffixes."""

    def __init__(self) -> None:
        self.paths = Texts()
        self._hashes = array("q")
        self._index: HashIndex | None = None

    def add(self, path: str, stem: str) -> None:
        self.paths.append(path)
        self._hashes.append(hash(stem))

    def index(self) -> HashIndex:
        if self._index is None:
            self._index = HashIndex(self._hashes) if self._hashes else HashIndex.of(map(_stem, self.paths))
            self._hashes = array("q")
        return self._index

    def clear(self) -> None:
        self._index = None

    def find(self, stem: str) -> list[int]:
        """Return the positions of the paths of this name, in the order in which they were added."""
        return [at for at in self.index().positions(stem) if _stem(self.paths[at]) == stem]


class PhotoFinder:
    """Finds the path of a photo by its id, file name or path, after walking the folders once.

    paths: of all photos, and then the URLs that were found.  files: the number of photos in the folders.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.where = " and ".join(map(str, folders))
        self._photos, self._others = _Files(), _Files()
        self._near: list[tuple[_Files, HashIndex]] = []
        seen = set[tuple[int, int]]()
        for parent, name, suffix in (file for folder in folders for file in walk_files(folder, seen)):
            files = self._photos if suffix in PHOTO_SUFFIXES else self._others
            files.add(f"{parent}/{name}", _composed(name[: -len(suffix)] if suffix else name))
        self.paths = self._photos.paths
        self.files = len(self.paths)

    @property
    def names(self) -> set[str]:
        return set(map(_stem, self.paths))

    def __call__(self, cell: str, lesion_id: str = "") -> str:
        """Return the path of a photo. Of several with one name, choose by the cell's path or the lesion's folder.

        Raises MissingPhoto if there is none; ValueError for another kind of file, a file whose name differs in
        spelling, or several different photos.
        """
        return self.paths[self.find(cell, lesion_id)]

    def find(self, cell: str, lesion_id: str = "") -> int:
        """Return the position of a photo in `paths`; a URL is appended to them. Raises as `__call__`."""
        if is_photo_url(cell):
            self.paths.append(cell)
            return len(self.paths) - 1
        cell = _composed(cell)
        stem = photo_name(cell)
        found = self._photos.find(stem)
        if not found:
            raise self._not_found(stem)
        if len(found) > 1:
            paths = {self.paths[at]: at for at in found}
            return paths[_choose([*paths], cell, stem, lesion_id)]
        return found[0]

    def find_all(self, cells: Sequence[str]) -> np.ndarray:
        """Return the position of each photo in `paths` (N,), -1 for those that only `find` resolves or refuses."""
        stems = [photo_name(_composed(cell)) for cell in cells]
        found = self._photos.index().only(stems)
        for at, (place, stem) in enumerate(zip(found.tolist(), stems, strict=True)):
            if place >= 0 and (_stem(self.paths[place]) != stem or is_photo_url(cells[at])):
                found[at] = -1
        return found

    def first_of_equal(self) -> np.ndarray:
        """Return for each of `paths` its own position, for a URL that was found before that of the first one (P,)."""
        result = np.arange(len(self.paths))
        if len(result) == self.files:
            return result
        hashes = np.fromiter(map(hash, islice(self.paths, self.files, None)), np.int64, len(result) - self.files)
        _, first, number = np.unique(hashes, return_index=True, return_inverse=True)
        same = self.files + first[number]
        for at in (self.files + np.flatnonzero(same != result[self.files :])).tolist():
            if self.paths[at] == self.paths[own := int(same[at - self.files])]:
                result[at] = own
        return result

    def _not_found(self, stem: str) -> ValueError:
        """Return the error for a photo without a file of its name; it names a file of a similar name, if any."""
        path = self._nearest(stem)
        suffix = os.path.splitext(path or "")[1].lower()
        if path and suffix in PHOTO_SUFFIXES:
            return ValueError(f"no photo {stem}, but {path}, whose name is spelled otherwise; rename it")
        if path and (suffix in ("", *OTHER_SUFFIXES) or format_of(_start_of(path))):
            what = kind_of(_start_of(path))
            return ValueError(
                f"no photo {stem}, but {path}, {what}; convert it to {READ_FORMATS}, with the suffix of that format"
            )
        return MissingPhoto(f"no photo {stem} (.jpg, .png and others) below {self.where}; put it there")

    def _nearest(self, stem: str) -> str | None:
        """Return the path of another kind of file with this name, or of a file whose name differs in spelling."""
        if others := self._others.find(stem):
            return self._others.paths[others[0]]
        if not self._near:
            self._near = [
                (files, HashIndex.of(_near(_stem(path)) for path in files.paths))
                for files in (self._photos, self._others)
            ]
        near = _near(stem)
        for files, index in self._near:
            first: dict[str, str] = {}
            for path in (files.paths[at] for at in index.positions(near)):
                first.setdefault(_stem(path), path)
            if found := [path for name, path in first.items() if _near(name) == near]:
                return found[-1]
        return None

    def clear(self) -> None:
        """Free the memory of the indexes, which the next search builds again."""
        self._photos.clear()
        self._others.clear()
        self._near.clear()


def _stem(path: str) -> str:
    """Return the name of a file without its last suffix."""
    name = path.rpartition("/")[2]
    return _composed(name[: len(name) - len(os.path.splitext(name)[1])])


def _start_of(path: str) -> bytes:
    try:
        if os.path.isfile(path):  # opening a pipe would wait
            with open(path, "rb") as file:
                return file.read(START)
    except OSError:
        pass
    return b""


def _choose(paths: Sequence[str], cell: str, stem: str, lesion_id: str) -> str:
    """Choose one of several photos of a name.

    Rules, in order: the cell's path with its suffix, the path without it, the lesion's folder, the cell's file name.
    Photos that still compete must have the same bytes. Raises ValueError otherwise.
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

    A folder that several links lead to is walked once. seen: folders that were walked before, and is updated.
    """
    for parent, files in walk_folders(folder, ("__MACOSX",), seen):
        for name in files:
            if not name.startswith("."):
                yield parent, name, os.path.splitext(name)[1].lower()


def _composed(text: str) -> str:
    """Return the text in Unicode NFC; macOS stores file names decomposed."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _near(name: str) -> str:
    """Return a name after `folded`, without surrounding spaces and a second photo suffix."""
    return folded(_without_suffix(name.strip()).strip())
