"""Convert a decoded photo to 8-bit sRGB, and describe what was converted.

Numbers of 16 bits are scaled so that white stays white; alpha is composited on white; CMYK and Lab are converted by
their profile. Then an embedded or implied RGB or gray profile other than sRGB is applied (`apply_profile`), relative
colorimetric with black point compensation.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

SCALED = "more than 8 bits, scaled to 8"
ON_WHITE = "transparency, put on white"
CMYK_PROFILE = "CMYK colors, converted by their profile"
CMYK_PLAIN = "CMYK colors, converted without a profile"
LAB = "Lab colors, converted"
PROFILE = "a color profile other than sRGB, converted"
BAD_PROFILE = "an unreadable color profile, taken as sRGB"

MAX_DIFFERENCE = 3
"""In levels of 255: a profile that changes no color by more counts as sRGB, of which there are many spellings."""
_DARKEST_WHITE = 16
"""In levels of 255: a photo of over 8 bits without brighter pixels has fewer bits than its format declares."""

_SRGB_PRIMARIES = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_P3_PRIMARIES = (0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
_BT2020_PRIMARIES = (0.708, 0.292, 0.170, 0.797, 0.131, 0.046)
_ADOBE_PRIMARIES = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
_D65 = (0.3127, 0.3290)
_EXIF, _COLOR_SPACE, _INTEROPERABILITY = 0x8769, 0xA001, 0xA005


class ColorError(ValueError):
    """Colors of an unknown color space; the message names it and says what to do."""


# --- to 8-bit RGB ----------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Return a photo in mode RGB and what was converted; its profile is not applied yet, but for CMYK.

    Raises ColorError for numbers without a known white.
    """
    if image.mode == "CMYK":
        return _from_cmyk(image)
    if image.mode == "LAB":
        return _transform(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "LAB").apply(image), (LAB,)
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep_gray(image)
    changes: tuple[str, ...] = (SCALED,) if _bits(image) > 8 else ()
    if image.has_transparency_data:
        image, opaque = _on_white(image, _bits(image))
        changes += () if opaque else (ON_WHITE,)
    image = image if image.mode == "RGB" else image.convert("RGB")
    if SCALED in changes and np.asarray(image).max(initial=0) < _DARKEST_WHITE:
        raise ColorError(_too_dark(_bits(image)))
    return image, changes


def _from_deep_gray(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Scale gray of 9 to 16 bits to 8; the modes are F, I, I;16 and I;16B."""
    values = np.asarray(image)
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    bits, low, high = _bits(image), values.min(initial=0), values.max(initial=0)
    if image.mode == "F" or bits > 16 or not 0 <= low <= high <= 65535 or _first(tags.get(339), 1) != 1:
        raise ColorError("its gray values are floating-point, signed or 32-bit numbers; save it with 8 or 16 bits")
    white = (1 << bits) - 1
    gray = ((values.astype(np.uint32) * 255 + white // 2) // white).clip(0, 255).astype(np.uint8)
    if _first(tags.get(262), 1) == 0:
        gray = 255 - gray  # WhiteIsZero, which Pillow ignores for 16 bits
    if gray.max(initial=0) < _DARKEST_WHITE:
        raise ColorError(_too_dark(bits))
    hidden = image.info.get("transparency")
    if isinstance(hidden, int) and (values == hidden).any():
        gray[values == hidden] = 255
        return Image.fromarray(gray).convert("RGB"), (SCALED, ON_WHITE)
    return Image.fromarray(gray).convert("RGB"), (SCALED,)


def _too_dark(bits: int) -> str:
    return (
        f"nothing in it is brighter than 1/16 of white: it holds fewer than the {bits} bits it declares; save it with 8"
    )


def _bits(image: Image.Image) -> int:
    """Return the bits of a channel in the file, where those are more than 8, else 8."""
    if image.format == "PNG":
        return max(8, image.info.get("bits", 8))
    if image.format == "TIFF":
        return max(8, _first(getattr(image, "tag_v2", {}).get(258), 8))
    if image.format == "HEIF":
        return max(8, image.info.get("bit_depth", 8))
    return 16 if image.mode == "F" or image.mode.startswith("I") else 8


def _first(value: Any, default: int) -> int:
    value = value[0] if isinstance(value, tuple) and value else value
    return int(value) if isinstance(value, int) else default


def _on_white(image: Image.Image, bits: int) -> tuple[Image.Image, bool]:
    """Return a photo with transparency in RGB on white, and whether it was opaque everywhere."""
    hidden = image.info.get("transparency")
    if bits > 8 and isinstance(hidden, tuple):  # of a PNG, whose pixels Pillow cuts to 8 bits
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in hidden)
    if image.mode in ("La", "RGBa"):
        image = image.convert(f"{image.mode[:-1]}A")
    straight = image if image.mode == "RGBA" else image.convert("RGBA")
    low, high = straight.getchannel("A").getextrema()
    if high == 0:
        raise ColorError("it is transparent everywhere; save it without transparency")
    if low == 255:
        return straight.convert("RGB"), True
    white = Image.new("RGBA", straight.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, straight).convert("RGB"), False


def _from_cmyk(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    icc = image.info.get("icc_profile")
    if icc and icc[16:20] == b"CMYK":
        transform = _icc_transform(icc, "CMYK")
        if transform is not None:
            return transform.apply(image), (CMYK_PROFILE,)
    return image.convert("RGB"), (CMYK_PLAIN,)


# --- profiles --------------------------------------------------------------------------------------------------------


def profile_of(image: Image.Image) -> bytes | None:
    """Return the ICC profile that a photo embeds or implies; b"" for one that is unreadable, None for none.

    Implied are the primaries of a PNG or HEIC, and Adobe RGB by the EXIF of a camera that does not embed it (DCF).
    Raises ColorError for HDR.
    """
    info = image.info
    if cicp := info.get("cicp"):
        return _coded(*cicp)
    if "icc_profile" in info:
        return info["icc_profile"] or b""
    if "srgb" not in info and ("gamma" in info or "chromaticity" in info):
        return _of_png(info.get("gamma"), info.get("chromaticity"))
    if nclx := info.get("nclx_profile"):
        return _coded(nclx.get("color_primaries", 2), nclx.get("transfer_characteristics", 2))
    return matrix_profile(_ADOBE_PRIMARIES, gamma=2.19921875) if _is_adobe_rgb(image) else None


def apply_profile(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, tuple[str, ...]]:
    """Return an RGB photo in sRGB, and what was converted; `icc` as of `profile_of`."""
    if icc is None:
        return image, ()
    gray = icc[16:20] == b"GRAY"
    mode = "L" if gray else "RGB"
    if gray:
        red, green, blue = image.split()
        if red.tobytes() != green.tobytes() or red.tobytes() != blue.tobytes():
            return image, (BAD_PROFILE,)
        source = red
    elif icc[16:20] == b"RGB ":
        source = image
    else:
        return image, (BAD_PROFILE,)
    transform = _icc_transform(icc, mode)
    if transform is None:
        return image, (BAD_PROFILE,)
    return (image, ()) if is_srgb(icc) else (transform.apply(source), (PROFILE,))


@lru_cache(maxsize=64)
def is_srgb(icc: bytes | None) -> bool:
    """Return whether a profile of RGB or gray changes no color by more than `MAX_DIFFERENCE`; None is none."""
    if icc is None:
        return True
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    if icc[16:20] == b"GRAY":
        colors = np.arange(256, dtype=np.uint8)[None]
        expected = np.repeat(colors[..., None], 3, axis=2)
    else:
        colors = expected = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    transform = _icc_transform(icc, "L" if icc[16:20] == b"GRAY" else "RGB")
    if transform is None:
        return True
    found = np.asarray(transform.apply(Image.fromarray(colors)))
    return int(np.abs(found.astype(int) - expected).max()) <= MAX_DIFFERENCE


@lru_cache(maxsize=64)
def _icc_transform(icc: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of pixels of a mode to sRGB, None for a profile that cannot be used."""
    try:
        return _transform(ImageCms.ImageCmsProfile(io.BytesIO(icc)), mode)
    except (OSError, ImageCms.PyCMSError, ValueError, TypeError):
        return None


def _transform(profile: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.ImageCmsTransform(
        profile,
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


def _coded(primaries: int, transfer: int, *_: int) -> bytes | None:
    """Return the profile of code points of ITU-T H.273; None for sRGB and what is unspecified."""
    if transfer in (16, 18):
        raise ColorError("its brightness is coded for HDR; save it without HDR")
    known = {1: _SRGB_PRIMARIES, 9: _BT2020_PRIMARIES, 11: _P3_PRIMARIES, 12: _P3_PRIMARIES}
    gamma = {4: 2.2, 5: 2.8, 8: 1.0}.get(transfer)
    if (primaries == 1 and gamma is None) or primaries not in known:
        return None
    return matrix_profile(known[primaries], gamma=gamma)


def _of_png(gamma: float | None, chromaticity: tuple[float, ...] | None) -> bytes | None:
    """Return the profile of a PNG's chunks gAMA and cHRM; 1/2.2 is how those write the curve of sRGB."""
    curve = None if not gamma or abs(gamma - 1 / 2.2) < 0.005 else 1 / gamma
    white = _D65
    primaries: tuple[float, ...] = _SRGB_PRIMARIES
    if chromaticity and len(chromaticity) == 8 and min(chromaticity[1::2]) > 0:
        white, primaries = (chromaticity[0], chromaticity[1]), tuple(chromaticity[2:])
    if curve is None and np.allclose((*white, *primaries), (*_D65, *_SRGB_PRIMARIES), atol=0.002):
        return None
    try:
        return matrix_profile(primaries, white, curve)
    except (np.linalg.LinAlgError, ValueError, struct.error):
        return b""


def _is_adobe_rgb(image: Image.Image) -> bool:
    try:
        exif = image.getexif().get_ifd(_EXIF)
        if exif.get(_COLOR_SPACE) == 2:  # not of the standard, but written
            return True
        index = image.getexif().get_ifd(_INTEROPERABILITY).get(1, "") if exif.get(_COLOR_SPACE) == 0xFFFF else ""
    except Exception:  # a broken EXIF may raise anything in Pillow
        return False
    return (index.decode("latin-1") if isinstance(index, bytes) else str(index)).startswith("R03")


@lru_cache(maxsize=64)
def matrix_profile(
    primaries: tuple[float, ...], white: tuple[float, float] = _D65, gamma: float | None = None
) -> bytes:
    """Return an ICC profile of RGB by its chromaticities (x, y) of red, green, blue and white.

    gamma: the exponent of its curve; None for the curve of sRGB. Adapted to D50 by Bradford, as ICC.1:2010 asks.
    """
    xyz = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in (primaries[0:2], primaries[2:4], primaries[4:6])]).T
    source = np.array([white[0] / white[1], 1.0, (1 - sum(white)) / white[1]])
    matrix = xyz * np.linalg.solve(xyz, source)
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.9642, 1.0, 0.8249])
    adapt = np.linalg.solve(bradford, np.diag(bradford @ d50 / (bradford @ source)) @ bradford)
    columns = (adapt @ matrix).T
    if not np.isfinite(columns).all() or np.abs(columns).max() > 100:
        raise ValueError("chromaticities without a matrix")

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    if gamma is None:
        curve = b"para\0\0\0\0\0\3\0\0" + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    else:
        curve = b"para\0\0\0\0\0\0\0\0" + fixed(gamma)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(*d50)}
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    tags |= {name: b"XYZ \0\0\0\0" + fixed(*column) for name, column in zip(names, columns, strict=True)}
    tags |= {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")}
    table, body, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", offset + len(body), b"\0\0\0\0", 0x04200000, b"mntr", b"RGB ", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + fixed(*d50)
    return header.ljust(128, b"\0") + table + body
