"""Photos that two packed sets share are found by the bytes of the file and by thumbnails."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from tests.conftest import draw_photo
from tests.union_sets import main_set, other_set, row_of
from triderm_dist.data import overlap
from triderm_dist.data.overlap import (
    SIMILAR,
    Shared,
    Thumbnails,
    edges,
    find_shared,
    rows_with_equal_photo,
    thumbnail,
)
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.schema import VIEWS, DataError, Lesion

CPU = torch.device("cpu")


def jpeg(photo: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=quality)
    return file.getvalue()


def computed(index: ShardIndex, folder) -> Thumbnails:
    thumbnails = Thumbnails(index, folder)
    for number in thumbnails.missing():
        thumbnails.compute(number, 2)
    assert not thumbnails.missing()
    return thumbnails


def similarity(one: bytes, other: bytes) -> float:
    first, second = (edges(thumbnail(data)[None]) for data in (one, other))
    return float((first * second).sum())


@pytest.mark.parametrize(
    "change",
    [
        lambda photo: jpeg(photo, 50),
        lambda photo: jpeg(photo.resize((224, 224))),
        lambda photo: jpeg(photo.resize((200, 150))),
        lambda photo: jpeg(photo.resize((768, 576))),
        lambda photo: jpeg(ImageEnhance.Brightness(photo).enhance(1.1)),
    ],
)
def test_copies_are_similar_and_other_photos_are_not(change):
    photos = [draw_photo(seed, (384, 288)) for seed in range(12)]
    for number, photo in enumerate(photos):
        assert similarity(change(photo), jpeg(photo)) >= SIMILAR
        assert similarity(change(photo), jpeg(photos[number - 1])) < 0.9


def test_photo_of_one_color_is_similar_to_nothing():
    black = np.zeros((2, 16, 16, 3), np.uint8)
    assert (edges(black) @ edges(black).T == 0).all()


@pytest.fixture
def copied(tmp_path) -> tuple[ShardIndex, ShardIndex]:
    """A set, and one of the other task: lesion A has its file, B a smaller copy, C another photo."""
    main = main_set(tmp_path / "main")
    paths = [tmp_path / f"{name}.jpg" for name in "ABC"]
    source = tmp_path / "main-photos"
    paths[0].write_bytes((source / "5-dermoscopic.jpg").read_bytes())
    with Image.open(source / "3-clinical.jpg") as photo:
        photo.resize((40, 30)).save(paths[1], quality=85)
    draw_photo(77_777).save(paths[2])
    task = other_set(tmp_path / "other").task
    lesions = [
        Lesion(path.stem, dict(zip(VIEWS, (None, str(path)), strict=True)), (0.5, 0.5), (0.0, 1.0, 40.0), 0, path.stem)
        for path in paths
    ]
    concepts = ("dermoscopic/dots", "dermoscopic/streaks")
    return main, pack_shards(Dataset(task, lesions, concepts, True, []), tmp_path / "copied", short_side=None)


def test_shared_photos_are_found_among_all_views(copied, tmp_path):
    main, extra = copied
    thumbnails = [computed(index, tmp_path / "cache") for index in (extra, main)]
    found = {extra.lesion_ids[shared.row]: shared for shared in find_shared(*thumbnails, np.arange(len(extra)), CPU)}
    assert found.keys() == {"A", "B"}
    assert found["A"] == Shared(row_of(extra, "A"), row_of(main, "L005"), None)
    assert main.lesion_ids[found["B"].main_row] == "L003" and SIMILAR <= found["B"].similarity < 1
    only = find_shared(*thumbnails, np.array([row_of(extra, "B"), row_of(extra, "C")]), CPU)
    assert [extra.lesion_ids[shared.row] for shared in only] == ["B"]


@pytest.mark.parametrize("nearer", VIEWS)
def test_of_two_similar_photos_the_nearer_is_named(nearer, tmp_path):
    """One photo of the lesion is a fair copy of one of L003, the other is nearly that of L005."""
    main, images = main_set(tmp_path / "main"), {}
    for view, lesion, other in ((nearer, 5, 0.01), (VIEWS[nearer == VIEWS[0]], 3, 0.1)):
        images[view] = str(tmp_path / f"{view}.jpg")
        with Image.open(tmp_path / "main-photos" / f"{lesion}-{view}.jpg") as photo:
            Image.blend(photo, draw_photo(77_777), other).save(images[view], quality=90)
    lesion = Lesion("A", images, (0.5,) * 4, (40.0, 0.0, 0.0), 0, "A")
    extra = pack_shards(Dataset(main.task, [lesion], main.concepts, True, []), tmp_path / "copied", short_side=None)
    thumbnails = [computed(index, tmp_path / "cache") for index in (extra, main)]
    (found,) = find_shared(*thumbnails, np.arange(1), CPU)
    assert main.lesion_ids[found.main_row] == "L005"


def test_equal_photos_are_found_by_reading_few(copied, monkeypatch):
    main, extra = copied
    found = [extra.lesion_ids[row] for row in rows_with_equal_photo(extra, main)]
    assert found == ["A"] and rows_with_equal_photo(main, extra).tolist() == [row_of(main, "L005")]
    assert rows_with_equal_photo(main, main).tolist() == list(range(len(main)))
    # Of the same size and with the same first bytes.
    monkeypatch.setattr(overlap, "PROBE", 500)
    row = row_of(main, "L005")
    path, last = main.path(int(main.shard[row])), int(main.offsets[row, 1] + main.sizes[row, 1]) - 3
    data = bytearray(path.read_bytes())
    data[last] ^= 1
    path.write_bytes(bytes(data))
    assert main.sizes[row, 1] > 1000 and rows_with_equal_photo(extra, main).tolist() == []
    monkeypatch.setattr(overlap, "MOST_READ", 2)
    assert rows_with_equal_photo(main, main).tolist() == []


def test_bounds_leave_out_no_similar_photo(monkeypatch):
    """The result is that of comparing all edges with all others."""
    monkeypatch.setattr(overlap, "BLOCK", 32)
    generator = np.random.default_rng(0)
    cells = generator.integers(60, 200, (60, 4, 4, 3))

    def drawn(cells: np.ndarray) -> np.ndarray:
        return np.kron(cells, np.ones((1, 4, 4, 1)))  # has few components, as photos have

    def noisy(deviation: float) -> np.ndarray:
        return drawn(cells + generator.normal(0, deviation, cells.shape)) + generator.normal(0, 1, (60, 16, 16, 3))

    main = np.concatenate([noisy(2), drawn(cells), noisy(4), np.full((3, 16, 16, 3), 90)]).clip(0, 255).astype(np.uint8)
    own = np.concatenate([*map(noisy, range(3, 24, 3)), np.zeros((2, 16, 16, 3)), drawn(cells[:, ::-1])])
    own = own.clip(0, 255).astype(np.uint8)
    best, at = (edges(own) @ edges(main).T).max(1)
    expected = [(row, int(at[row])) for row in np.flatnonzero(best.numpy() >= SIMILAR)]
    assert 100 < len(expected) < 400
    found = list(overlap._similar(own[:, None], np.ones((len(own), 1), bool), main, CPU))
    assert [(row, main_row) for row, main_row, _ in found] == expected
    np.testing.assert_allclose([similarity for *_, similarity in found], best[[row for row, _ in expected]], atol=1e-6)
    for few in (main[:0], main[:1]):
        assert [row for row, *_ in overlap._similar(main[:2, None], np.ones((2, 1), bool), few, CPU)] == [0] * len(few)


def test_a_set_shares_all_photos_with_itself_and_none_with_another(tmp_path):
    main, other = main_set(tmp_path / "main"), other_set(tmp_path / "other")
    own, others = (computed(index, tmp_path) for index in (main, other))
    assert [shared.main_row for shared in find_shared(own, own, np.arange(len(main)), CPU)] == list(range(len(main)))
    assert find_shared(others, own, np.arange(len(other)), CPU) == []


def test_thumbnails_are_computed_once_for_a_set(tmp_path):
    main = main_set(tmp_path / "main")
    assert computed(main, tmp_path).missing() == []
    assert Thumbnails(replace(main, fingerprint="f" * 64), tmp_path).missing() == [0]


def test_damaged_photo_is_named(tmp_path):
    main = main_set(tmp_path / "main")
    row = row_of(main, "L002")
    path, start = main.path(int(main.shard[row])), int(main.offsets[row, 0])
    data = bytearray(path.read_bytes())
    data[start : start + int(main.sizes[row, 0])] = bytes(int(main.sizes[row, 0]))
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"the clinical photo of lesion L002 does not decode .*; run triderm verify"):
        Thumbnails(main, tmp_path).compute(0, 1)
