"""Photos keep their pixels, lose private metadata, and are refused if truncated."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import draw_photo
from triderm_dist.data.shards.photos import PhotoError, check_photo, prepare_photo, strip_metadata

SECRETS = (b"Exif\0\0", b"http://ns.adobe.com", b"Canon", b"a comment", b"ICC_PROFILE", b"after the end")


def encode(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "JPEG", "quality": 85, **options})
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x010F] = "Canon"
    tags[0x0112] = orientation
    tags.get_ifd(0x8825)[1] = "N"  # GPS
    return tags


def loaded(orientation: int = 1, **options: object) -> bytes:
    """Return a JPEG with the metadata of a camera and an editor."""
    return (
        encode(
            draw_photo(0),
            exif=exif(orientation),
            xmp=b"<x:xmpmeta/>",
            comment=b"a comment",
            icc_profile=b"p" * 100,
            **options,
        )
        + b"after the end"
    )


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 1}, {"keep_rgb": True}]
)
def test_metadata_is_removed_and_pixels_are_kept(options: dict[str, object]) -> None:
    data = loaded(**options)
    assert all(secret in data for secret in SECRETS)
    clean = prepare_photo(data, short_side=36).data
    assert not any(secret in clean for secret in SECRETS)
    np.testing.assert_array_equal(pixels(clean), pixels(data))
    # The bytes from the quantization tables to the end marker are unchanged.
    start, end = data.index(b"\xff\xdb"), data.index(b"after the end")
    assert clean.endswith(data[start:end])
    assert strip_metadata(clean) == clean


def test_adobe_color_transform_is_kept() -> None:
    """The Adobe segment distinguishes CMYK and RGB JPEGs from YCbCr; without it all colors would change."""
    image = draw_photo(1).convert("CMYK")
    data = encode(image)
    assert b"Adobe" in strip_metadata(data)
    np.testing.assert_array_equal(pixels(strip_metadata(data)), pixels(data))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("short_side", [None, 20])
def test_orientation_is_applied(orientation: int, short_side: int | None) -> None:
    stored = Image.fromarray(np.zeros((36, 48, 3), np.uint8))
    stored.paste((255, 0, 0), (0, 0, 24, 18))  # a red corner marks the top left
    expected = np.asarray(stored).copy()
    steps = {2: ("x",), 3: ("x", "y"), 4: ("y",), 5: ("t",), 6: ("t", "x"), 7: ("t", "x", "y"), 8: ("t", "y")}
    for step in steps.get(orientation, ()):
        expected = {"x": expected[:, ::-1], "y": expected[::-1], "t": expected.swapaxes(0, 1)}[step]
    result = pixels(prepare_photo(encode(stored, exif=exif(orientation), quality=95), short_side).data)
    if short_side is None:
        assert result.shape == expected.shape
    else:
        assert min(result.shape[:2]) == short_side and (result.shape[0] > result.shape[1]) == (orientation > 4)
    corner = lambda image: [image[y, x, 0] > 128 for y in (3, -4) for x in (3, -4)]  # noqa: E731
    assert corner(result) == corner(expected)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(8, 300), height=st.integers(8, 300), short_side=st.integers(8, 100))
def test_short_side_is_resized(width: int, height: int, short_side: int) -> None:
    data = encode(draw_photo(2, (width, height)))
    rows, columns = pixels(prepare_photo(data, short_side).data).shape[:2]
    scale = min(1.0, short_side / min(width, height))
    assert (columns, rows) == (round(width * scale), round(height * scale))


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_reduction_is_lanczos(factor: int) -> None:
    """The error against Lanczos is at most that of re-encoding, also if the decoder halves the photo first."""
    detail = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(detail).resize((90 * factor, 60 * factor), Image.Resampling.BICUBIC)
    data = encode(image, quality=95, subsampling=0)
    reference = Image.fromarray(pixels(data)).resize((90, 60), Image.Resampling.LANCZOS)

    def distance(data: bytes) -> float:
        return float(np.abs(pixels(data).astype(int) - np.asarray(reference).astype(int)).mean())

    encoded_again = distance(encode(reference, quality=90, subsampling="4:2:0"))
    assert distance(prepare_photo(data, 60).data) < 1.1 * encoded_again


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG")]
)
def test_other_color_modes_become_rgb_jpegs(mode: str, kind: str) -> None:
    image = draw_photo(4)
    data = encode(image.quantize(64) if mode == "P" else image.convert(mode), format=kind)
    with Image.open(io.BytesIO(prepare_photo(data, None).data)) as result:
        assert (result.format, result.mode, result.size) == ("JPEG", "RGB", (48, 36))
        difference = np.asarray(result).astype(int) - np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(difference).mean() < 8  # JPEG blurs the edges of a palette


@pytest.mark.parametrize("progressive", [False, True])
def test_every_truncation_is_detected(progressive: bool) -> None:
    data = encode(draw_photo(5, (96, 72)), progressive=progressive)
    for length in range(len(data)):
        with pytest.raises(PhotoError):
            prepare_photo(data[:length], 36)
    check_photo(data)


@pytest.mark.parametrize(
    "data",
    [b"", b"not a photo", bytes(1000), encode(draw_photo(6), format="TGA"), encode(draw_photo(6), format="PNG")[:400]],
    ids=["empty", "text", "zeros", "tga", "cut png"],
)
def test_files_that_are_not_photos_are_refused(data: bytes) -> None:
    with pytest.raises(PhotoError) as caught:
        prepare_photo(data, 36)
    assert str(caught.value) and "\n" not in str(caught.value) and "object at" not in str(caught.value)


def test_zero_filled_tail_is_detected() -> None:
    """A preallocated but unfinished download, which decoders render gray without an error."""
    data = encode(draw_photo(7, (96, 72)))
    with pytest.raises(PhotoError, match="truncated"):
        prepare_photo(data[: len(data) // 2] + bytes(len(data) - len(data) // 2), 36)


def test_broken_exif_is_ignored() -> None:
    data = loaded()
    place = data.index(b"Exif\0\0") + 6
    broken = data[:place] + b"\xff" * 12 + data[place + 12 :]
    np.testing.assert_array_equal(pixels(prepare_photo(broken, 36).data), pixels(data))
