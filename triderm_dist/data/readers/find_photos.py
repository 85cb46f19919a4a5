"""Find the photos that a table names, anywhere below a folder."""

from __future__ import annotations

import filecmp
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png")
OTHER_SUFFIXES = (".heic", ".webp", ".tif", ".tiff", ".bmp", ".jfif", ".jpe", ".gif", ".dcm")
_SUFFIXES = frozenset((*PHOTO_SUFFIXES, *OTHER_SUFFIXES))


class MissingPhoto(ValueError):
    """No file has the name of a photo, whatever its suffix."""


def photo_name(cell: str) -> str:
    """Return the id of a photo, given its id, file name or path."""
    name = cell.replace("\\", "/").rpartition("/")[2]
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
        for parent, name, suffix in (file for folder in folders for file in walk_files(folder)):
            stem = _composed(name[: -len(suffix)] if suffix else name)
            if suffix in PHOTO_SUFFIXES:
                path = f"{parent}/{name}"
                self.unused += 1
                known = self._paths.get(stem)
                self._paths[stem] = path if known is None else [*([known] if isinstance(known, str) else known), path]
            elif suffix in OTHER_SUFFIXES:
                self._others[stem] = name

    @property
    def names(self) -> set[str]:
        return set(self._paths)

    def __call__(self, cell: str, lesion_id: str = "") -> str:
        """Return the path of a photo; of several of one name that at the cell's path or in the lesion's folder.

        Raises MissingPhoto where there is none, ValueError for another kind of file or several different photos.
        """
        cell = _composed(cell)
        stem = photo_name(cell)
        found = self._paths.get(stem)
        if found is None:
            if stem in self._others:
                raise ValueError(f"{self._others[stem]} is not a JPEG or PNG; convert it")
            raise MissingPhoto(f"no photo {stem}.jpg or .png below {self.where}; put it there")
        path = found if isinstance(found, str) else _choose(found, cell, stem, lesion_id)
        self.unused -= 1
        return path

    def clear(self) -> None:
        """Forget all paths, which take much memory."""
        self._paths.clear()
        self._others.clear()


def _choose(paths: Sequence[str], cell: str, stem: str, lesion_id: str) -> str:
    tail = os.path.splitext(cell.replace("\\", "/"))[0].lstrip("./")
    near = [path for path in paths if os.path.splitext(path)[0].endswith(f"/{tail}")] if "/" in tail else []
    near = near or [path for path in paths if os.path.basename(os.path.dirname(path)) == lesion_id] or list(paths)
    if all(filecmp.cmp(near[0], other, shallow=False) for other in near[1:]):
        return near[0]
    raise ValueError(
        f"several photos are named {stem}: {near[0]} and {near[1]}; keep one, or write the path in the table"
    )


def walk_files(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (folder, name, suffix in lower case) of every file that is not hidden; a ring of links ends."""
    seen = set[tuple[int, int]]()
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if name != "__MACOSX")
        for name in sorted(files):
            if not name.startswith("."):
                yield parent, name, os.path.splitext(name)[1].lower()


def _composed(text: str) -> str:
    """Return the text with composed accents; macOS stores an accent as a character of its own."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)
