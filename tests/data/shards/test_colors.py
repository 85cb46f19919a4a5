"""Photos of any depth, transparency and color space become the sRGB pixels that they mean, or are refused by name."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms

from tests.conftest import draw_photo
from triderm_dist.data.shards import colors
from triderm_dist.data.shards.photos import SEVERAL, PhotoError, prepare_photo

pillow_heif.register_heif_opener()
PHOTO = draw_photo(3, (96, 72))
RGB = np.asarray(PHOTO)
GRAY = np.asarray(PHOTO.convert("L"))
GRAY16 = GRAY.astype(np.uint16) * 257
TOP = np.add.outer(range(72), np.zeros(96, int)) < 24
"""Pixels that are transparent in tests."""
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
P3 = colors.matrix_profile(colors._P3_PRIMARIES)
LINEAR_GRAY = np.round(255 * np.where(GRAY > 10, ((GRAY / 255 + 0.055) / 1.055) ** 2.4, GRAY / 255 / 12.92))
EXACT = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}, "HEIF": {"quality": 95}, "AVIF": {"quality": 95}}


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **{**EXACT.get(kind, {}), **options})
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(values: np.ndarray, color_type: int, extra: bytes = b"") -> bytes:
    """Return a PNG of values (H, W, channels) of 8 or 16 bits, with extra chunks."""
    height, width = values.shape[:2]
    depth = 8 * values.itemsize
    rows = values.reshape(height, -1).astype(values.dtype.newbyteorder(">"))
    head = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def with_alpha(mode: str) -> Image.Image:
    return Image.fromarray(np.dstack([RGB, np.where(TOP, 0, 255).astype(np.uint8)])).convert(mode)


def in_profile(icc: bytes) -> Image.Image:
    """Return PHOTO in the numbers of another profile."""
    return ImageCms.profileToProfile(PHOTO, SRGB, ImageCms.ImageCmsProfile(io.BytesIO(icc)))


def on_white(pixels: np.ndarray, hidden: np.ndarray = TOP) -> np.ndarray:
    return np.where(hidden[..., None], 255, pixels).astype(np.uint8)


def gray_rgb(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def in_lab() -> Image.Image:
    return ImageCms.applyTransform(
        PHOTO, ImageCms.buildTransform(SRGB, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "RGB", "LAB")
    )


def adobe_exif() -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 0xFFFF
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    return exif


ADOBE = colors.matrix_profile(colors._ADOBE_PRIMARIES, gamma=2.19921875)
ALPHA16 = np.where(TOP, 0, 65535).astype(np.uint16)
RGB16 = RGB.astype(np.uint16) * 257
BLUE16 = RGB16[50, 50]
KEPT = (colors.SCALED, colors.ON_WHITE)
CASES: dict[str, tuple[Callable[[], bytes], np.ndarray, tuple[str, ...]]] = {
    **{
        kind: (lambda kind=kind: encode(PHOTO, kind), RGB, ())
        for kind in ("PNG", "WEBP", "TIFF", "BMP", "HEIF", "AVIF")
    },
    "TIFF with LZW": (lambda: encode(PHOTO, "TIFF", compression="tiff_lzw"), RGB, ()),
    "1 bit": (lambda: encode(PHOTO.convert("1"), "PNG"), np.asarray(PHOTO.convert("1").convert("RGB")), ()),
    "gray PNG of 16 bits": (lambda: encode(Image.fromarray(GRAY16), "PNG"), gray_rgb(GRAY), (colors.SCALED,)),
    "gray TIFF of 16 bits": (lambda: encode(Image.fromarray(GRAY16), "TIFF"), gray_rgb(GRAY), (colors.SCALED,)),
    "big-endian": (
        lambda: encode(Image.fromarray(GRAY16.astype(">u2")), "TIFF"), gray_rgb(GRAY), (colors.SCALED,)
    ),
    "white is zero": (
        lambda: encode(Image.fromarray(65535 - GRAY16), "TIFF", tiffinfo={262: 0}), gray_rgb(GRAY), (colors.SCALED,)
    ),
    "RGB of 16 bits": (lambda: png(RGB16, 2), RGB, (colors.SCALED,)),
    "RGBA of 16 bits": (lambda: png(np.dstack([RGB16, ALPHA16]), 6), on_white(RGB), KEPT),
    "LA of 16 bits": (lambda: png(np.dstack([GRAY16, ALPHA16]), 4), on_white(gray_rgb(GRAY)), KEPT),
    "tRNS of 16 bits": (
        lambda: png(RGB16, 2, chunk(b"tRNS", struct.pack(">3H", *BLUE16))),
        on_white(RGB, (RGB16 == BLUE16).all(2)), KEPT,
    ),
    "gray tRNS of 16 bits": (
        lambda: png(GRAY16, 0, chunk(b"tRNS", struct.pack(">H", GRAY16[9, 9]))),
        on_white(gray_rgb(GRAY), GRAY16[9, 9] == GRAY16), KEPT,
    ),
    **{
        f"RGBA {kind}": (lambda kind=kind: encode(with_alpha("RGBA"), kind), on_white(RGB), (colors.ON_WHITE,))
        for kind in ("PNG", "WEBP", "TIFF", "HEIF", "AVIF")
    },
    "LA": (lambda: encode(with_alpha("LA"), "PNG"), on_white(gray_rgb(GRAY)), (colors.ON_WHITE,)),
    "opaque": (lambda: encode(PHOTO.convert("RGBA"), "PNG"), RGB, ()),
    "CMYK JPEG": (lambda: encode(PHOTO.convert("CMYK"), "JPEG"), RGB, (colors.CMYK_PLAIN,)),
    "CMYK TIFF": (lambda: encode(PHOTO.convert("CMYK"), "TIFF"), RGB, (colors.CMYK_PLAIN,)),
    "Lab": (lambda: encode(in_lab(), "TIFF"), RGB, (colors.LAB,)),
    **{
        f"Display P3 {kind}": (
            lambda kind=kind: encode(in_profile(P3), kind, icc_profile=P3), RGB, (colors.PROFILE,)
        )
        for kind in ("JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF")
    },
    **{
        f"sRGB {kind}": (lambda kind=kind: encode(PHOTO, kind, icc_profile=SRGB.tobytes()), RGB, ())
        for kind in ("JPEG", "PNG", "WEBP", "TIFF")
    },
    "unreadable profile": (lambda: encode(PHOTO, "PNG", icc_profile=b"x" * 200), RGB, (colors.BAD_PROFILE,)),
    "Adobe RGB by EXIF": (lambda: encode(in_profile(ADOBE), "JPEG", exif=adobe_exif()), RGB, (colors.PROFILE,)),
    "cICP of Display P3": (
        lambda: png(np.asarray(in_profile(P3)), 2, chunk(b"cICP", bytes([12, 13, 0, 1]))), RGB, (colors.PROFILE,)
    ),
    "cICP of sRGB": (lambda: png(RGB, 2, chunk(b"cICP", bytes([1, 13, 0, 1]))), RGB, ()),
    "gAMA 1": (
        lambda: png(LINEAR_GRAY.astype(np.uint8), 0, chunk(b"gAMA", struct.pack(">I", 100000))),
        gray_rgb(GRAY), (colors.PROFILE,),
    ),
    "gAMA of sRGB": (lambda: png(RGB, 2, chunk(b"gAMA", struct.pack(">I", 45455))), RGB, ()),
    "MPO": (
        lambda: encode(PHOTO, "MPO", save_all=True, append_images=[draw_photo(4)], quality=95), RGB, (SEVERAL,)
    ),
    "reduced page": (
        lambda: encode(PHOTO, "TIFF", save_all=True, append_images=[reduced_page()]), RGB, (SEVERAL,)
    ),
}  # fmt: skip


def reduced_page() -> Image.Image:
    page = PHOTO.resize((24, 18))
    page.encoderinfo = {"tiffinfo": {254: 1}}
    return page


@pytest.mark.parametrize("name", CASES)
def test_pixels_mean_the_same_in_srgb(name: str) -> None:
    make, expected, changes = CASES[name]
    photo = prepare_photo(make(), None)
    assert photo.changes == changes
    found = np.asarray(Image.open(io.BytesIO(photo.data)))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 2.5


def animation(kind: str) -> bytes:
    return encode(PHOTO, kind, save_all=True, append_images=[draw_photo(9, (96, 72))])


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "12 bits in 16": (lambda: png(GRAY16 >> 4, 0), "fewer than the 16 bits"),
    "RGB of 12 bits in 16": (lambda: png(RGB16 >> 4, 2), "fewer than the 16 bits"),
    "floats": (lambda: encode(Image.fromarray(GRAY.astype(np.float32)), "TIFF"), "floating-point, signed or 32-bit"),
    "32 bits": (lambda: encode(Image.fromarray(GRAY.astype(np.int32)), "TIFF"), "floating-point, signed or 32-bit"),
    "invisible": (lambda: png(np.dstack([RGB, np.zeros_like(GRAY)]), 6), "transparent everywhere"),
    "HDR": (lambda: png(RGB, 2, chunk(b"cICP", bytes([9, 16, 0, 1]))), "for HDR"),
    **{kind: (lambda kind=kind: animation(kind), "an animation of 2 pictures") for kind in ("GIF", "PNG", "WEBP")},
    "pages": (lambda: animation("TIFF"), "a TIFF of several pages"),
    "preview of a raw file": (lambda: encode(PHOTO, "TIFF", tiffinfo={254: 1}), "a camera's raw file"),
    "checksum of a PNG": (lambda: png(RGB, 2).replace(b"IDAT", b"IDAT\1", 1), "damaged|truncated"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_known_pixels_is_refused_by_name(name: str) -> None:
    make, says = REFUSED[name]
    with pytest.raises(PhotoError, match=says):
        prepare_photo(make(), None)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "GIF", "HEIF", "AVIF"])
def test_a_cut_file_is_refused_in_every_format(kind: str) -> None:
    data = encode(draw_photo(5, (40, 30)), kind)
    for length in range(0, len(data), max(1, len(data) // 40)):
        with pytest.raises(PhotoError) as caught:
            prepare_photo(data[:length], None)
        assert "object at" not in str(caught.value) and "\n" not in str(caught.value)


def test_known_colors_of_display_p3() -> None:
    """Erythema and blood as a phone writes them; values by the primaries of Display P3 and sRGB."""
    for own, expected in (((200, 103, 96), (214, 96, 92)), ((147, 39, 36), (160, 24, 28))):
        found = colors.apply_profile(Image.new("RGB", (1, 1), own), P3)[0].getpixel((0, 0))
        np.testing.assert_allclose(found, expected, atol=1)


def cmyk_profile(inks: dict[int, tuple[int, int, int]]) -> bytes:
    """Return a profile of CMYK to Lab (lut8) by the Lab of some mixtures (bits of C, M, Y, K); the others are black."""
    grid = b"".join(bytes(inks.get(mixture, (0, 128, 128))) for mixture in range(16))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (at % 4 == 0) for at in range(9)))
    lut += bytes(range(256)) * 4 + grid + bytes(range(256)) * 3
    body = struct.pack(">I4sII", 1, b"A2B0", 144, len(lut)) + lut
    head = struct.pack(">I4sI4s4s4s", 128 + len(body), b"\0\0\0\0", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    return (head + bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)).ljust(128, b"\0") + body


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_converted_by_its_profile(kind: str) -> None:
    profile = cmyk_profile({0: (255, 128, 128), 0b1000: (140, 91, 78)})
    image = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))
    photo = prepare_photo(encode(image, kind, icc_profile=profile), None)
    assert photo.changes == (colors.CMYK_PROFILE,)
    found = Image.open(io.BytesIO(photo.data))
    np.testing.assert_allclose(found.getpixel((4, 16)), (255, 255, 255), atol=3)
    np.testing.assert_allclose(found.getpixel((28, 16)), (0, 142, 214), atol=14)  # L* 55, a* -37, b* -50


def test_number_of_lines_after_the_scan_moves_to_the_header() -> None:
    data = encode(PHOTO, "JPEG")
    height = data.index(b"\xff\xc0") + 5
    late = data[:height] + b"\0\0" + data[height + 2 : -2] + b"\xff\xdc\0\4" + struct.pack(">H", 72) + data[-2:]
    assert prepare_photo(late, None).data == prepare_photo(data, None).data
