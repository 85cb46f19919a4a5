"""Convert photo files to the JPEG bytes of a shard: complete, upright, sRGB, reduced, without private metadata.

The one conversion of packing and predicting, so that both see the same pixels. The content decides which format a file
has, whatever its name.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, JpegImagePlugin

from triderm_dist.data.photo_formats import READ_FORMATS, format_of
from triderm_dist.data.shards.colors import ColorError, apply_profile, is_srgb, profile_of, to_rgb
from triderm_dist.file_kinds import kind_of
from triderm_dist.runtime.extras import install_command, is_installed
from triderm_dist.runtime.terminal import counted

# Damage is refused, and Pillow's own warnings name its source files, not the photo.
warnings.filterwarnings("ignore", module=r"PIL\.")

QUALITY = 90
PROBE = 4096
"""Bytes at the start of a photo that are read to distinguish it from others."""
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""The limit of Pillow: more is a decompression bomb, or a slide scan and not a photo of a lesion."""
SEVERAL = "several pictures in one file, the main one kept"

_ORIENTATION = 0x0112
_SOI, _EOI, _SOS, _DNL, _COMMENT = 0xD8, 0xD9, 0xDA, 0xDC, 0xFE
_APP0, _APP14, _APP15 = 0xE0, 0xEE, 0xEF
_FRAME_HEADERS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
# A marker that ends entropy-coded data: not a stuffed zero, a restart marker or a fill byte (ITU-T T.81, B.1.1).
_NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_SUBFILE_TYPE, _DNG_VERSION, _MAX_PAGES = 254, 50706, 100


class PhotoError(Exception):
    """A photo that cannot be used; the text gives the reason, the same on every machine."""


class PreparedPhoto(NamedTuple):
    """The JPEG bytes of a photo.  changes: what was converted, in words; its size and orientation do not count."""

    data: bytes
    changes: tuple[str, ...] = ()


def prepare_photo(data: bytes, short_side: int | None) -> PreparedPhoto:
    """Return the JPEG of a photo of any of `READ_FORMATS` after decoding it once, which proves that it is complete.

    A photo whose short side is over `short_side` pixels is reduced to it (Lanczos, quality 90). An upright JPEG in
    sRGB that is small enough keeps the bytes of its pixels; only its metadata segments are removed. Other colors are
    converted (`colors`). Of several pictures in one file the first is taken if it is the photo by the rules of its
    format (MPO and HEIC of phones, reduced pages of a TIFF).
    Raises PhotoError for a file that is not a photo, is truncated or damaged, an animation, or has no known colors.
    """
    return _prepare(data, short_side)[0]


def prepare_pixels(photo: bytes | Image.Image, short_side: int | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the pixels (H, W, 3) uint8 that the loader decodes of a photo after `prepare_photo`, and its changes.

    An image is prepared as a PNG of it would be. Raises PhotoError as `prepare_photo`.
    """
    if isinstance(photo, bytes):
        prepared, pixels = _prepare(photo, short_side)
    else:
        prepared, pixels = _prepare_image(photo, short_side, "this image"), None
    return simplejpeg.decode_jpeg(prepared.data) if pixels is None else pixels, prepared.changes


def describe_changes(photos_by_change: Mapping[str, int]) -> Iterator[str]:
    """Yield a line for each kind of conversion, with the number of its photos."""
    for change, photos in sorted(photos_by_change.items()):
        yield f"{counted(photos, 'photo')} with {change}"


def _prepare(data: bytes, short_side: int | None) -> tuple[PreparedPhoto, np.ndarray | None]:
    """Return the JPEG of a photo, and its decoded pixels where those of `data` were kept."""
    name = format_of(data)
    if name is None:
        raise PhotoError(f"no {READ_FORMATS}, but {kind_of(data)}")
    if name == "JPEG":
        return _prepare_jpeg(data, short_side)
    try:
        image = _open(data, name)
    except (PhotoError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise anything for damaged files
        raise PhotoError(_reason(error, kind_of(data))) from None
    with image:
        return _prepare_image(image, short_side, kind_of(data)), None


def _prepare_jpeg(data: bytes, short_side: int | None) -> tuple[PreparedPhoto, np.ndarray | None]:
    # Before decoding: a JPEG truncated in its last rows may decode to gray there without an error.
    clean = strip_metadata(data)
    several = (SEVERAL,) if b"MPF\0" in data else ()
    try:
        if _colors(clean) == "CMYK":
            with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
                photo = _prepare_image(image, short_side, "a JPEG")
            return PreparedPhoto(photo.data, several + photo.changes), None
        orientation, icc = _about(data)
        height, width = simplejpeg.decode_jpeg_header(clean)[:2]
        size = _reduced((width, height), short_side)
        pixels = _decode(clean, size)
        if size == (width, height) and orientation == 1 and _colors(clean) == "RGB" and is_srgb(icc):
            return PreparedPhoto(clean, several + apply_profile(Image.new("RGB", (1, 1)), icc)[1]), pixels
        photo = _encode(Image.fromarray(pixels), size, orientation, icc)
        return PreparedPhoto(photo.data, several + photo.changes), None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise PhotoError(_reason(error, "a JPEG")) from None


def _open(data: bytes, name: str) -> Image.Image:
    """Open a photo that is not a JPEG, without its pixels. Raises PhotoError, and for damage what Pillow raises."""
    about = _read_png(data) if name == "PNG" else {}
    if name == "WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise PhotoError("truncated: the file is shorter than it says")
    if name == "HEIF" and is_installed("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    if name not in Image.OPEN:
        raise PhotoError(f"{kind_of(data)}, which needs pillow-heif: {install_command('pillow_heif')}, or convert it")
    image = Image.open(io.BytesIO(data), formats=[name])
    image.info.update(about)
    return image


def _read_png(data: bytes) -> dict[str, object]:
    """Return the bits of a PNG's channels and its code points of colors. Raises PhotoError if a chunk is damaged.

    Pillow does not check the checksums of pixels.
    """
    about: dict[str, object] = {}
    position = 8
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        kind, content = data[position + 4 : position + 8], data[position + 8 : end - 4]
        if end > len(data):
            break
        if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise PhotoError(f"damaged: the checksum of its part at byte {position} is wrong")
        if kind == b"IEND":
            return about
        if kind == b"IHDR" and len(content) == 13:
            about["bits"] = content[8]
        elif kind == b"cICP" and len(content) == 4:
            about["cicp"] = tuple(content)
        position = end
    raise PhotoError(f"truncated: {len(data)} bytes without the end of a PNG")


def _prepare_image(image: Image.Image, short_side: int | None, what: str) -> PreparedPhoto:
    """Convert an image of Pillow; `what` names it in messages."""
    try:
        several = _check_frames(image)
        icc = profile_of(image)
        image.load()
        rgb, changes = to_rgb(image)
        if image.mode in ("CMYK", "LAB"):
            icc = None  # already applied
        photo = _encode(rgb, _reduced(rgb.size, short_side), _exif_orientation(image), icc)
    except (PhotoError, MemoryError):
        raise
    except ColorError as error:
        raise PhotoError(str(error)) from None
    except Exception as error:  # Pillow's readers raise anything for damaged files
        raise PhotoError(_reason(error, what)) from None
    return PreparedPhoto(photo.data, (*several, *changes, *photo.changes))


def _check_frames(image: Image.Image) -> tuple[str, ...]:
    """Return a change where a file holds several pictures, of which the first is the photo. Raises PhotoError."""
    if image.format == "TIFF":
        return _check_pages(image)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in ("MPO", "HEIF"):
        raise PhotoError(f"an animation of {frames} pictures; save the one to use")
    return (SEVERAL,) if frames > 1 else ()


def _check_pages(image: Image.Image) -> tuple[str, ...]:
    """Allow further pages of a TIFF if they are reduced copies or masks."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if _DNG_VERSION in tags or tags.get(_SUBFILE_TYPE, 0) & 1:
        raise PhotoError("a camera's raw file, of which only a preview can be read; convert it to a JPEG or PNG")
    page = 0
    for page in range(1, _MAX_PAGES):
        try:
            image.seek(page)
        except EOFError:
            page -= 1
            break
        if not image.tag_v2.get(_SUBFILE_TYPE, 0) & 5:  # type: ignore[attr-defined]
            raise PhotoError("a TIFF of several pages; save the one to use")
    image.seek(0)
    return (SEVERAL,) if page else ()


def _reason(error: Exception, what: str) -> str:
    """Say why a photo cannot be decoded; texts of libraries name Python objects and change with versions."""
    if isinstance(error, Image.DecompressionBombError):
        return f"more than the {MAX_PIXELS} pixels that a photo may have"
    return f"{what} that cannot be decoded to its end: damaged, or of a rare kind; copy it again, or save it as PNG"


def check_photo(data: bytes) -> None:
    """Decode a JPEG of a shard completely, as the loader does. Raises PhotoError if that fails."""
    strip_metadata(data)
    try:
        _decode(data)
    except (ValueError, Image.DecompressionBombError) as error:
        raise PhotoError(_reason(error, "a JPEG")) from None


def size_and_hash(data: bytes) -> tuple[int, int, int]:
    """Return (width, height, 64-bit hash of the bytes) of a JPEG, zeros for no bytes.

    The hash is never 0 for a photo. Raises ValueError for bytes that are not a JPEG.
    """
    if not data:
        return 0, 0, 0
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    return width, height, int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) or 1


def start_hash(start: bytes, size: int) -> int:
    """Return a 64-bit hash, never 0, of the first bytes of a photo that has `size` bytes. It is equal for photos that
    have the same size and begin alike.
    """
    return int.from_bytes(hashlib.blake2b(start, digest_size=8, key=size.to_bytes(8)).digest()) or 1


def is_upright(data: bytes) -> bool:
    """Return whether a JPEG has no EXIF rotation, which the loader would ignore."""
    return _about(data)[0] == 1


def has_srgb(data: bytes) -> bool:
    """Return whether the numbers of a JPEG are gray or RGB in sRGB, as the loader takes them."""
    return _colors(data) != "CMYK" and is_srgb(_about(data)[1])


def strip_metadata(data: bytes) -> bytes:
    """Return the JPEG without EXIF, GPS, XMP, ICC, comments, previews and bytes after its end; pixels are unchanged.

    Kept: the JFIF header without its preview, and Adobe's color transform, without which colors would change. A number
    of lines that follows the first scan (DNL) moves to the header, where decoders expect it.
    Raises PhotoError if a segment or the end marker is missing.
    """
    if data[:2] != bytes((0xFF, _SOI)):
        raise PhotoError("no JPEG start marker")
    kept = [data[:2]]
    position, frame = 2, 0
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
        elif marker == _DNL and frame and len(payload) == 2:
            kept[frame] = kept[frame][:5] + payload + kept[frame][7:]
        elif not (_APP0 <= marker <= _APP15 or marker == _COMMENT):
            frame = len(kept) if marker in _FRAME_HEADERS and len(payload) >= 6 else frame
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


def _about(data: bytes) -> tuple[int, bytes | None]:
    """Return the EXIF orientation of a JPEG, 1 (upright) to 8, and its `profile_of`.

    1 and None if they are absent, or the EXIF is broken, as the pixels are valid.
    """
    if b"Exif\0\0" not in data and b"ICC_PROFILE\0" not in data:
        return 1, None
    try:
        with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
            return _exif_orientation(image), profile_of(image)
    except Exception:  # a broken EXIF may raise anything in Pillow
        return 1, None


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
        raise Image.DecompressionBombError
    return simplejpeg.decode_jpeg(data, min_width=2 * size[0], min_height=2 * size[1], min_factor=2 if size[0] else 1)


def _encode(image: Image.Image, size: tuple[int, int], orientation: int, icc: bytes | None) -> PreparedPhoto:
    """Reduce, convert to sRGB, rotate and encode an RGB photo."""
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    image, changes = apply_profile(image, icc)
    if orientation != 1:
        image.info = {}
        image.getexif()[_ORIENTATION] = orientation
        image = ImageOps.exif_transpose(image)
    pixels = np.ascontiguousarray(image)
    data = bytes(simplejpeg.encode_jpeg(pixels, quality=QUALITY, colorsubsampling="420", fastdct=False))
    return PreparedPhoto(data, changes)
