"""Damaged photos: refused by PhotoError, or converted; pixels that a checksum protects do not change."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import strategies as st
from PIL import Image, features

from tests.conftest import draw_photo
from tests.fuzz.checks import cases, fuzz, result_or_refusal
from tests.fuzz.mutations import edited_bytes, edited_fields, edited_parts
from triderm_dist.data.shards.photos import PhotoError, check_photo, prepare_photo, prepare_pixels, size_and_hash

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, about damage


Encode = Callable[[Image.Image], tuple[Image.Image, dict[str, Any]]]
EXIF = Image.Exif()
EXIF[0x0112] = 6
ENCODED: dict[str, Encode] = {
    "jpeg": lambda image: (image, {"format": "JPEG", "exif": EXIF}),
    "progressive": lambda image: (image, {"format": "JPEG", "progressive": True, "icc_profile": bytes(200)}),
    "cmyk": lambda image: (image.convert("CMYK"), {"format": "JPEG"}),
    "png": lambda image: (image, {"format": "PNG"}),
    "palette": lambda image: (image.quantize(16), {"format": "PNG", "transparency": 3}),
    "gray 16": lambda image: (Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257), {"format": "PNG"}),
    "alpha": lambda image: (image.convert("RGBA"), {"format": "PNG"}),
    "webp": lambda image: (image, {"format": "WEBP"}),
    "webp lossless": lambda image: (image, {"format": "WEBP", "lossless": True}),
    "tiff": lambda image: (image, {"format": "TIFF"}),
    "tiff lzw": lambda image: (image, {"format": "TIFF", "compression": "tiff_lzw"}),
    "tiff deflate": lambda image: (image, {"format": "TIFF", "compression": "tiff_adobe_deflate"}),
    "bmp": lambda image: (image, {"format": "BMP"}),
    "gif": lambda image: (image, {"format": "GIF"}),
    "avif": lambda image: (image, {"format": "AVIF"}),
}
JPEGS, PNGS = ("jpeg", "progressive", "cmyk"), ("png", "palette", "gray 16", "alpha")


def encoded(kind: str) -> bytes:
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    image, options = ENCODED[kind](draw_photo(3, (48, 36)))
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def check_photo_bytes(data: bytes) -> np.ndarray | None:
    """Convert a photo as packing and as predicting do; return its pixels, None where it is refused."""
    packed = result_or_refusal(lambda: prepare_photo(data, 24).data, also=(PhotoError,))
    pixels = result_or_refusal(lambda: prepare_pixels(data, 24)[0], also=(PhotoError,))
    assert (packed is None) == (pixels is None), "packing and predicting differ"
    if packed is None:
        return None
    check_photo(packed)
    np.testing.assert_array_equal(simplejpeg.decode_jpeg(packed), pixels)
    width, height, _ = size_and_hash(packed)
    assert pixels.shape == (height, width, 3)
    return pixels


@cases(2, 70)
@pytest.mark.parametrize("kind", ENCODED)
def test_damaged_photo(kind: str, cases: int) -> None:
    data = encoded(kind)
    parts = [data[start : start + 60] for start in range(0, len(data), 60)]
    damaged = st.one_of(edited_bytes(data), edited_fields(data), edited_parts(parts).map(b"".join))
    fuzz(check_photo_bytes, damaged, cases)


@cases(2, 60)
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_that_is_cut_is_refused(kind: str, cases: int) -> None:
    data = encoded(kind)

    def check(length: int) -> None:
        assert check_photo_bytes(data[:length]) is None, f"{length} of {len(data)} bytes"

    fuzz(check, st.integers(0, len(data) - 2), cases)


@cases(3, 60)
@pytest.mark.parametrize("kind", PNGS)
def test_pixels_of_a_damaged_png_do_not_change(kind: str, cases: int) -> None:
    data = encoded(kind)
    original = check_photo_bytes(data)
    assert original is not None

    def check(damaged: bytes) -> None:
        pixels = check_photo_bytes(damaged)
        assert pixels is None or np.array_equal(pixels, original), "its checksums do not match, and it was converted"

    fuzz(check, st.one_of(edited_bytes(data, 1), edited_fields(data, 1)), cases)


def segments(data: bytes) -> list[bytes]:
    """Cut a JPEG before each of its markers."""
    starts = [at for at in range(len(data) - 1) if data[at] == 0xFF and data[at + 1] not in (0, 0xFF)]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


@cases(2, 70)
@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_with_damaged_segments(kind: str, cases: int) -> None:
    fuzz(check_photo_bytes, edited_parts(segments(encoded(kind))).map(b"".join), cases)


def chunks(data: bytes) -> list[bytes]:
    """Return kind and content of each chunk of a PNG."""
    found, at = [], 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        found.append(data[at + 4 : at + 8 + size])
        at += size + 12
    return found


def png(chunks: list[bytes]) -> bytes:
    """Write a PNG of chunks, with right lengths and checksums."""
    written = (struct.pack(">I", max(len(it) - 4, 0)) + it + struct.pack(">I", zlib.crc32(it)) for it in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


@cases(2, 70)
@pytest.mark.parametrize("kind", PNGS)
def test_png_with_damaged_chunks(kind: str, cases: int) -> None:
    fuzz(check_photo_bytes, edited_parts(chunks(encoded(kind))).map(png), cases)
