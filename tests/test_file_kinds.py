"""Files are named by their content, whatever their name."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from triderm_dist.file_kinds import START, kind_of


def image(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return buffer.getvalue()


def written(write: object) -> bytes:
    buffer = io.BytesIO()
    write(buffer)  # type: ignore[operator]
    return buffer.getvalue()


KINDS: dict[str, tuple[bytes, str]] = {
    "jpeg": (image("JPEG"), "a JPEG"),
    "png": (image("PNG"), "a PNG"),
    "webp": (image("WEBP"), "a WebP"),
    "tiff": (image("TIFF"), "a TIFF"),
    "bmp": (image("BMP"), "a BMP"),
    "gif": (image("GIF"), "a GIF"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1", "a HEIC"),
    "avif": (b"\0\0\0\x1cftypavif", "an AVIF"),
    "dicom": (bytes(128) + b"DICM\x02\0", "a DICOM file"),
    "zip": (written(lambda file: zipfile.ZipFile(file, "w").writestr("a", "b")), "a zip archive"),
    "gzip": (gzip.compress(b"text"), "a gzip file"),
    "tar": (tarfile.TarInfo("a").tobuf(), "a tar archive"),
    "numpy": (written(lambda file: np.save(file, np.zeros(3))), "a NumPy array"),
    "pickle": (pickle.dumps({}), "a Python pickle"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
    "page": (b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "a web page"),
    "page with a comment": (b"<!-- drive -->\n<html><head>", "a web page"),
    "server error": (b'<?xml version="1.0"?><Error><Code>AccessDenied', "an XML file"),
    "json": (b'{"metadata": {}}', "a JSON file"),
    "text": ("Läsion, 1\n".encode(), "a text file"),
    "text that starts like a bitmap": (b"BMI,age\n24.0,60\n", "a text file"),
    "empty": (b"", "an empty file"),
    "zeros": (bytes(512), "only zero bytes"),
    "noise": (bytes(range(200, 256)), "data of an unknown kind"),
}


@pytest.mark.parametrize("name", KINDS)
def test_kind_of_content(name: str) -> None:
    content, kind = KINDS[name]
    assert kind_of(content[:START]).startswith(kind)
