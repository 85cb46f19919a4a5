"""Photos are found once, by name, in any format; what is nearly a photo's file is named and never lost."""

import os
import unicodedata
from pathlib import Path

import pytest

from triderm_dist.data.readers.find_photos import MissingPhoto, PhotoFinder, walk_files

CELLS = ["P1", "P1.jpg", "P1.JPG", "a/P1.jpg", "a\\P1.jpg", "./a/P1.webp"]


def put(path: Path, content: bytes = b"\xff\xd8\xffphoto") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "suffix", ["jpg", "JPG", "jpe", "jfif", "png", "webp", "TIF", "tiff", "bmp", "gif", "heic", "avif"]
)
def test_every_suffix_of_photos_is_found(tmp_path: Path, suffix: str) -> None:
    path = put(tmp_path / "a" / f"P1.{suffix}")
    assert [PhotoFinder([tmp_path])(cell) for cell in CELLS] == [str(path)] * len(CELLS)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("P1.dcm", bytes(128) + b"DICM", "a DICOM file; convert it"),
        ("P1.nef", b"MM\0*", "a TIFF; convert it"),
        ("P1", b"\xff\xd8\xff", "a JPEG; convert it to .*, with the suffix of that format"),
        ("P1.jpg_original", b"\xff\xd8\xff", "a JPEG; convert it"),
        ("P1.jpg.part", b"\xff\xd8\xff", "a JPEG; convert it"),
        ("P1.jp2", b"\0\0\0\x0cjP  \r\n", "a JPEG 2000; convert it"),
        ("p1.jpg", b"", "whose name is spelled otherwise"),
        ("P1.jpg.jpg", b"", "whose name is spelled otherwise"),
        ("Ｐ１.jpg", b"", "whose name is spelled otherwise"),
        ("P01.jpg", b"", "whose name is spelled otherwise"),
        (" P1.jpg", b"", "whose name is spelled otherwise"),
    ],
)
def test_a_file_that_is_nearly_the_photo_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    put(tmp_path / name, content)
    with pytest.raises(ValueError, match=says) as error:
        PhotoFinder([tmp_path])("P1")
    assert not isinstance(error.value, MissingPhoto) and str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("name", ["P1.txt", "P1.json", "P2.jpg", "._P1.jpg"])
def test_other_files_are_not_the_photo(tmp_path: Path, name: str) -> None:
    put(tmp_path / name, b"{}")
    with pytest.raises(MissingPhoto):
        PhotoFinder([tmp_path])("P1")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_are_equal_in_both_forms(tmp_path: Path, form: str) -> None:
    path = put(tmp_path / unicodedata.normalize("NFD", "Fälle") / f"{unicodedata.normalize('NFD', 'ä1')}.jpg")
    assert PhotoFinder([tmp_path])(unicodedata.normalize(form, "ä1")) == str(path)


def test_of_different_photos_of_one_name_none_is_chosen_by_order(tmp_path: Path) -> None:
    small, full = put(tmp_path / "224" / "P1.jpg", b"small"), put(tmp_path / "full" / "P1.jpeg", b"full")
    for cell in ("P1", "P1.png"):
        with pytest.raises(ValueError, match=f"several photos are named P1: {small} and {full}; keep one"):
            PhotoFinder([tmp_path])(cell)
    find = PhotoFinder([tmp_path])
    assert [find("full/P1"), find("224/P1.jpg"), find("P1.jpeg"), find("P1", "224")] == [
        *map(str, (full, small, full, small))
    ]
    full.write_bytes(b"small")
    assert PhotoFinder([tmp_path])("P1") == str(small)


def test_every_folder_is_walked_once_by_its_own_path(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    put(folder / "z" / "P1.jpg")
    put(tmp_path / "outside" / "P2.jpg")
    for name, target in {"a": folder, "b": folder / "z", "c": tmp_path / "outside", "d": tmp_path / "outside"}.items():
        (folder / name).symlink_to(target)
    (folder / "z" / "up").symlink_to("..")
    (tmp_path / "outside" / "back").symlink_to(folder)
    (folder / "dangling.jpg").symlink_to("nowhere")
    (folder / "ring").symlink_to("ring")
    found = [os.path.relpath(os.path.join(parent, name), folder) for parent, name, _ in walk_files(folder)]
    assert found == ["dangling.jpg", "ring", "c/P2.jpg", "z/P1.jpg"]
