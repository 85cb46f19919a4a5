"""Recognize kinds of files by their first bytes, for messages about files with a wrong suffix."""

from __future__ import annotations

START = 1024
"""Bytes that `kind_of` looks at."""

_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs", "a pointer of Git LFS instead of the file; run git lfs pull"),
    (0, b"/annex/objects/", "a pointer of git-annex instead of the file; run git annex get"),
    (8, b"CR\2\0", "a raw file of a camera"),
    (4, b"ftypcrx", "a raw file of a camera"),
    (0, b"FUJIFILMCCD-RAW", "a raw file of a camera"),
    (0, b"IIRO", "a raw file of a camera"),
    (0, b"IIU\0", "a raw file of a camera"),
    (0, b"FOVb", "a raw file of a camera"),
    (0, b"\xff\xd8\xff", "a JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG"),
    (0, b"GIF8", "a GIF"),
    (8, b"WEBP", "a WebP"),
    (0, b"II*\0", "a TIFF"),
    (0, b"MM\0*", "a TIFF"),
    (0, b"II+\0", "a TIFF"),
    (0, b"MM\0+", "a TIFF"),
    (0, b"\xff\x0a", "a JPEG XL"),
    (4, b"JXL ", "a JPEG XL"),
    (4, b"jP  ", "a JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"\0\0\1\0", "an icon"),
    (0, b"%!PS", "a PostScript file"),
    (4, b"ftypavi", "an AVIF"),
    (4, b"ftyphei", "a HEIC"),
    (4, b"ftyphev", "a HEIC"),
    (4, b"ftypmif1", "a HEIF"),
    (4, b"ftypmsf1", "a HEIF"),
    (4, b"ftyp", "a video"),
    (8, b"AVI ", "a video"),
    (0, b"\x1a\x45\xdf\xa3", "a video"),
    (8, b"WAVE", "a sound"),
    (0, b"ID3", "a sound"),
    (0, b"OggS", "a video or sound"),
    (128, b"DICM", "a DICOM file"),
    (0, b"%PDF", "a PDF"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"PK\x05\x06", "an empty zip archive"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"BZh", "a bzip2 file"),
    (0, b"\xfd7zXZ\0", "an xz file"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (0, b"\x04\x22\x4d\x18", "an LZ4 file"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (0, b"Rar!", "a RAR archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"PAR1", "a parquet file"),
    (0, b"\xd0\xcf\x11\xe0", "an old Office file"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"\0\5\x16\7", "an AppleDouble file of macOS"),
    (0, b"\0\5\x16\0", "an AppleDouble file of macOS"),
    (0, b"bplist", "a property list of macOS"),
    (0, b"book\0\0\0\0mark", "an alias of macOS"),
    (0, b"L\0\0\0\1\x14\2\0", "a shortcut of Windows"),
    (0, b"\x7fELF", "a program"),
)
"""(position, bytes there, what the file is); the first that fits is taken."""

_WEB_PAGE = (b"<!doctype html", b"<html", b"<head", b"<script")


def kind_of(start: bytes) -> str:
    """Return what a file with these first `START` bytes is, with an article; `data of an unknown kind` otherwise."""
    if not start:
        return "an empty file"
    if not start.strip(b"\0"):
        return "only zero bytes"
    for position, signature, kind in _SIGNATURES:
        if start[position : position + len(signature)] == signature:
            return kind
    if start[:2] == b"BM" and start[6:10] == bytes(4):
        return "a BMP"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if any(tag in text[:512] for tag in _WEB_PAGE):
        return "a web page"
    if b"<svg" in text[:512] and text.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")):
        return "an SVG drawing"
    if text.startswith(b"[internetshortcut]"):
        return "a link to a web page"
    if text.startswith(b"<?xml"):
        return "an XML file, such as a server's error message"
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "a Python pickle"
    try:
        start[:-4].decode()
    except UnicodeDecodeError:
        return "data of an unknown kind"
    if text[:1] in (b"{", b"["):
        return "a JSON file"
    return "data of an unknown kind" if b"\0" in start else "a text file"
