"""Convert photo files to the JPEG bytes of a shard: complete, upright, RGB, reduced, without private metadata."""

from __future__ import annotations

import hashlib
import io
import re

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from triderm_dist.schema import one_line

QUALITY = 90
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""The limit of Pillow: more is a decompression bomb, or a slide scan and not a photo of a lesion."""

_ORIENTATION = 0x0112
_SOI, _EOI, _SOS, _COMMENT = 0xD8, 0xD9, 0xDA, 0xFE
_APP0, _APP14, _APP15 = 0xE0, 0xEE, 0xEF
# A marker that ends entropy-coded data: not a stuffed zero, a restart marker or a fill byte (ITU-T T.81, B.1.1).
_NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


class PhotoError(Exception):
    """A photo that cannot be used; the text gives the reason."""


def prepare_photo(data: bytes, short_side: int | None) -> bytes:
    """Return the JPEG bytes of a photo (JPEG or PNG) after decoding it once, which proves that it is complete.

    A photo whose short side is over `short_side` pixels is reduced to it (Lanczos, quality 90). An upright RGB JPEG
    that is small enough keeps the bytes of its pixels; only its metadata segments are removed.
    Raises PhotoError for a file that is not a photo, is truncated or damaged.
    """
    return _prepare(data, short_side)[0]


def prepare_pixels(photo: bytes | Image.Image, short_side: int | None) -> np.ndarray:
    """Return the pixels (H, W, 3) uint8 that the loader decodes of a photo after `prepare_photo`.

    An image is prepared as a PNG of it would be. Raises PhotoError as `prepare_photo`.
    """
    if isinstance(photo, bytes):
        data, pixels = _prepare(photo, short_side)
        return simplejpeg.decode_jpeg(data) if pixels is None else pixels
    try:
        return simplejpeg.decode_jpeg(_prepare_image(photo, short_side))
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise PhotoError(_reason(error)) from None


def _reason(error: Exception) -> str:
    """Say why a photo cannot be decoded; Pillow's own text for other files names a Python object."""
    return "neither a JPEG nor a PNG" if isinstance(error, UnidentifiedImageError) else one_line(error)


def _prepare(data: bytes, short_side: int | None) -> tuple[bytes, np.ndarray | None]:
    """Return the JPEG bytes of a photo, and its decoded pixels where those of `data` were kept."""
    # Before decoding: a JPEG truncated in its last rows may decode to gray there without an error.
    clean = strip_metadata(data) if data[:2] == bytes((0xFF, _SOI)) else None
    try:
        if clean is None or _colors(data) == "CMYK":
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                return _prepare_image(image, short_side), None
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        size, orientation = _reduced((width, height), short_side), _orientation(data)
        pixels = _decode(data, size)
        if size == (width, height) and orientation == 1 and _colors(data) == "RGB":
            return clean, pixels
        return _encode(Image.fromarray(pixels), size, orientation), None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise PhotoError(_reason(error)) from None


def _prepare_image(image: Image.Image, short_side: int | None) -> bytes:
    return _encode(image.convert("RGB"), _reduced(image.size, short_side), _exif_orientation(image))


def check_photo(data: bytes) -> None:
    """Decode a JPEG of a shard completely, as the loader does. Raises PhotoError where that fails."""
    strip_metadata(data)
    try:
        _decode(data)
    except ValueError as error:
        raise PhotoError(_reason(error)) from None


def size_and_hash(data: bytes) -> tuple[int, int, int]:
    """Return (width, height, 64-bit hash of the bytes) of a JPEG, zeros for no bytes.

    The hash is never 0 for a photo. Raises ValueError for bytes that are not a JPEG.
    """
    if not data:
        return 0, 0, 0
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    return width, height, int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) or 1


def is_upright(data: bytes) -> bool:
    """Return whether a JPEG has no EXIF rotation, which the loader would ignore."""
    return _orientation(data) == 1


def strip_metadata(data: bytes) -> bytes:
    """Return the JPEG without EXIF, GPS, XMP, ICC, comments, previews and bytes after its end; pixels are unchanged.

    Kept: the JFIF header without its preview, and Adobe's color transform, without which colors would change.
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
            raise PhotoError(f"truncated: the segment at byte {start} is incomplete")
        payload = data[start + 2 : end]
        if marker == _SOS:
            match = _NEXT_MARKER.search(data, end)
            if match is None:
                raise PhotoError(f"truncated: {len(data)} bytes without the end marker of a JPEG")
            end = match.start()
            while data[end - 1] == 0xFF:
                end -= 1  # fill bytes
            kept.append(bytes((0xFF, marker)) + data[start:end])
        elif marker == _APP0 and payload.startswith(b"JFIF\0") and len(payload) >= 14:
            kept.append(_segment(marker, payload[:12] + b"\0\0"))
        elif marker == _APP14 and payload.startswith(b"Adobe") and len(payload) >= 12:
            kept.append(_segment(marker, payload[:12]))
        elif not (_APP0 <= marker <= _APP15 or marker == _COMMENT):
            kept.append(_segment(marker, payload))
        position = end


def _marker(data: bytes, position: int) -> tuple[int, int]:
    """Return (marker, position after it); any number of fill bytes 0xFF may precede a marker."""
    if position >= len(data) or data[position] != 0xFF:
        raise PhotoError(f"truncated or damaged: no JPEG marker at byte {position} of {len(data)}")
    while position < len(data) and data[position] == 0xFF:
        position += 1
    if position >= len(data):
        raise PhotoError(f"truncated: {len(data)} bytes without the end marker of a JPEG")
    return data[position], position + 1


def _segment(marker: int, payload: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(payload) + 2).to_bytes(2, "big") + payload


def _colors(data: bytes) -> str:
    """Return the color space: RGB for three components, CMYK for four, or Gray."""
    colors = str(simplejpeg.decode_jpeg_header(data)[2])
    return {"YCbCr": "RGB", "YCCK": "CMYK"}.get(colors, colors)


def _orientation(data: bytes) -> int:
    """Return the EXIF orientation, 1 (upright) to 8; 1 where the EXIF is absent or broken, as the pixels are valid."""
    if b"Exif\0\0" not in data:
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return _exif_orientation(image)
    except (OSError, SyntaxError, ValueError):
        return 1


def _exif_orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF may raise anything in Pillow
        return 1
    return orientation if orientation in range(1, 9) else 1


def _reduced(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    scale = 1.0 if short_side is None else min(1.0, short_side / min(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _decode(data: bytes, size: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Decode to (H, W, 3) uint8; the decoder may halve a JPEG down to twice `size` (width, height), not below.

    Uses the loader's strict decoder, so that what is packed can be read; Pillow ignores some damage.
    """
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than the {MAX_PIXELS} that a photo may have")
    return simplejpeg.decode_jpeg(data, min_width=2 * size[0], min_height=2 * size[1], min_factor=2 if size[0] else 1)


def _encode(image: Image.Image, size: tuple[int, int], orientation: int) -> bytes:
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    if orientation != 1:
        image.info = {}
        image.getexif()[_ORIENTATION] = orientation
        image = ImageOps.exif_transpose(image)
    pixels = np.ascontiguousarray(image)
    return bytes(simplejpeg.encode_jpeg(pixels, quality=QUALITY, colorsubsampling="420", fastdct=False))
