"""A photo file -> the JPEG bytes that go into a shard: whole, upright, RGB, not too large, no private metadata."""

from __future__ import annotations

import io
import re

from PIL import Image, ImageOps

QUALITY = 90
_ORIENTATION = 0x0112
_SOI, _EOI, _SOS, _COMMENT = 0xD8, 0xD9, 0xDA, 0xFE
_APP0, _APP14, _APP15 = 0xE0, 0xEE, 0xEF
# A marker that ends entropy-coded data: not a stuffed zero and not a restart marker (ITU-T T.81, B.1.1).
_NEXT_MARKER = re.compile(rb"\xff+(?=[\x01-\xcf\xd8-\xfe])")


class PhotoError(Exception):
    """A photo that can't be used; the text says why."""


def prepare_photo(data: bytes, short_side: int | None) -> bytes:
    """JPEG bytes of a photo (JPEG or PNG), its pixels decoded once to prove that all of them are there.

    A photo whose short side is over `short_side` pixels is reduced to it (Lanczos, quality 90). An upright RGB JPEG
    that is small enough keeps the bytes of its pixels; only its metadata segments are left out.
    Raises PhotoError for a file that is no photo, is cut off or is damaged.
    """
    # Before decoding: a JPEG cut in its last rows decodes to grey there without a word.
    clean = strip_metadata(data) if data[:2] == bytes((0xFF, _SOI)) else None
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            width, height = image.size
            scale = 1.0 if short_side is None else min(1.0, short_side / min(width, height))
            target = (max(1, round(width * scale)), max(1, round(height * scale)))
            orientation = _orientation(image)
            # A much larger JPEG is halved by the decoder itself, never below twice what is wanted.
            image.draft(None, (2 * target[0], 2 * target[1]))
            image.load()
            as_it_is = scale == 1.0 and orientation == 1 and image.mode == "RGB"
            return clean if clean is not None and as_it_is else _encode(image, target, orientation)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise PhotoError(" ".join(str(error).split()) or type(error).__name__) from None


def check_photo(data: bytes) -> None:
    """Decode a JPEG of a shard to its last pixel; raises PhotoError where that fails."""
    prepare_photo(data, None)


def strip_metadata(data: bytes) -> bytes:
    """The JPEG without EXIF, GPS, XMP, ICC, comments, previews and whatever follows its end; the pixels are untouched.

    Kept: the JFIF header without its preview, and Adobe's colour transform, without which colours would change.
    Raises PhotoError where a segment or the end marker is missing.
    """
    if data[:2] != bytes((0xFF, _SOI)):
        raise PhotoError("no JPEG start marker")
    kept = [data[:2]]
    position = 2
    while True:
        marker, start = _marker(data, position)
        if marker == _EOI:
            return b"".join([*kept, bytes((0xFF, _EOI))])
        size = int.from_bytes(data[start : start + 2], "big")
        end = start + size
        if size < 2 or end > len(data):
            raise PhotoError(f"truncated: a segment at byte {start} is cut off")
        payload = data[start + 2 : end]
        if marker == _SOS:
            match = _NEXT_MARKER.search(data, end)
            if match is None:
                raise PhotoError(f"truncated: {len(data)} bytes without the end marker of a JPEG")
            end = match.start()
            kept.append(bytes((0xFF, marker)) + data[start:end])
        elif marker == _APP0 and payload.startswith(b"JFIF\0") and len(payload) >= 14:
            kept.append(_segment(marker, payload[:12] + b"\0\0"))
        elif marker == _APP14 and payload.startswith(b"Adobe") and len(payload) >= 12:
            kept.append(_segment(marker, payload[:12]))
        elif not (_APP0 <= marker <= _APP15 or marker == _COMMENT):
            kept.append(_segment(marker, payload))
        position = end


def _marker(data: bytes, position: int) -> tuple[int, int]:
    """(marker, position after it); any number of 0xFF may stand before a marker."""
    if position >= len(data) or data[position] != 0xFF:
        raise PhotoError(f"truncated or damaged: no JPEG marker at byte {position} of {len(data)}")
    while position < len(data) and data[position] == 0xFF:
        position += 1
    if position >= len(data):
        raise PhotoError(f"truncated: {len(data)} bytes without the end marker of a JPEG")
    return data[position], position + 1


def _segment(marker: int, payload: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(payload) + 2).to_bytes(2, "big") + payload


def _orientation(image: Image.Image) -> int:
    """1 (upright) to 8, as EXIF has it; 1 where the EXIF says nothing or is broken, which is no fault of the pixels."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if orientation in range(1, 9) else 1


def _encode(image: Image.Image, size: tuple[int, int], orientation: int) -> bytes:
    pixels = image.convert("RGB")
    if pixels.size != size:
        pixels = pixels.resize(size, Image.Resampling.LANCZOS)
    pixels.info = {}
    if orientation != 1:
        pixels.getexif()[_ORIENTATION] = orientation
        pixels = ImageOps.exif_transpose(pixels)
        pixels.info = {}
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return buffer.getvalue()
