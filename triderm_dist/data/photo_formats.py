"""Formats of photo files: the suffixes by which they are found, and the content by which they are recognized."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from triderm_dist.file_kinds import kind_of

PHOTO_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".mpo"),
    *(".heic", ".heif", ".hif", ".avif"),
)
"""Suffixes by which photos are found; only the content determines a file's format."""
OTHER_SUFFIXES = (
    *(".dcm", ".dicom", ".jp2", ".j2k", ".jxl", ".psd", ".svg", ".pdf", ".eps", ".tga", ".ico", ".mp4", ".mov"),
    *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw", ".x3f"),
)
"""Suffixes of pictures that are not read."""
MAX_BYTES = 1 << 30
"""Largest size of a photo file, far above those of cameras."""
READ_FORMATS = "JPEG, PNG, WebP, TIFF, BMP, GIF, HEIC or AVIF"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_FORMATS: dict[str, str] = {
    "a JPEG": "JPEG", "a PNG": "PNG", "a WebP": "WEBP", "a TIFF": "TIFF", "a BMP": "BMP", "a GIF": "GIF",
    "an AVIF": "AVIF", "a HEIC": "HEIF", "a HEIF": "HEIF",
}  # fmt: skip


def format_of(data: bytes) -> str | None:
    """Return Pillow's name of the format of a photo from its first bytes; None for formats that are not read."""
    found = _FORMATS.get(kind_of(data))
    # The major brand of AVIF and HEIC files is ambiguous; the compatible brands determine the decoder.
    return "AVIF" if found == "HEIF" and b"avif" in data[8 : int.from_bytes(data[:4], "big")] else found


def is_photo_url(text: str) -> bool:
    """Return whether a photo is named by a URL: of any file system that fsspec knows, except local files, which are
    named by paths.
    """
    found = _URL.match(text)
    return found is not None and found[0].lower() not in ("file://", "local://") and "::" not in text


def read_photo(path: str | os.PathLike[str]) -> bytes:
    """Return the content of a photo file, or behind a URL.

    Raises OSError, also for a pipe or device, and for over `MAX_BYTES`; DataError for a URL that cannot be read now.
    """
    if isinstance(path, str) and is_photo_url(path):
        from triderm_dist.data.shards.remote import read_url

        if len(data := read_url(path)) > MAX_BYTES:
            raise OSError(errno.EFBIG, "too large", path)
        return data
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.ENXIO, "not a file", os.fspath(path))
    if status.st_size > MAX_BYTES:
        raise OSError(errno.EFBIG, "too large", os.fspath(path))
    return Path(path).read_bytes()


def describe_error(error: OSError) -> str:
    """Return why a file cannot be read, without its path, in the same words on every system."""
    number = error.errno or 0
    known = {
        errno.ENOENT: "no such file",
        errno.EACCES: "no permission to read it",
        errno.EPERM: "no permission to read it",
        errno.EISDIR: "a folder, not a file",
        errno.ELOOP: "a symbolic link in a ring",
        errno.ENXIO: "a pipe or device, not a file",
        errno.EFBIG: f"over {MAX_BYTES >> 30} GiB, too large for a photo",
    }
    return known.get(number, f"cannot be read ({errno.errorcode.get(number, 'unknown error')})")
