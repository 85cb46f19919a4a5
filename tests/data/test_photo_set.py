"""Photos that are not packed give the same batches as packed ones."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import draw_photo
from triderm_dist.config import AugmentConfig
from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.photo_set import PhotoSet, PhotoSetSource
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.schema import VIEWS, DataError
from triderm_dist.tasks import milk10k_task

CPU = torch.device("cpu")
HALF = ((0.5,) * 3, (0.5,) * 3)
CANVAS = (48, 36)


def rotated_jpeg(photo: Image.Image) -> bytes:
    """Return a JPEG with an EXIF rotation."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    photo.save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()


@pytest.fixture
def challenge(make_challenge):
    """A challenge with photos of other sizes, kinds and orientations, and one without its clinical photo."""
    challenge = make_challenge(lesions=22)
    challenge.photo(4).unlink()
    draw_photo(50, (96, 72)).save(challenge.photo(6), quality=90)
    draw_photo(51, (40, 30)).save(challenge.photo(7), quality=90)
    draw_photo(52, (60, 60)).convert("L").save(challenge.photo(8), quality=90)
    challenge.photo(9).write_bytes(rotated_jpeg(draw_photo(53, (80, 60))))
    draw_photo(54, (70, 50)).save(challenge.photo(10).with_suffix(".png"))
    challenge.photo(10).unlink()
    return challenge


def photo_set_of(dataset, photos=lambda path: path, **options) -> PhotoSet:
    lesions = dataset.lesions
    return PhotoSet(
        dataset.task, dataset.concepts,
        {view: [each.images[view] and photos(each.images[view]) for each in lesions] for view in VIEWS},
        canvas=CANVAS, lesion_ids=[each.lesion_id for each in lesions], groups=[each.group for each in lesions],
        labels=np.array([each.label for each in lesions]),
        concept_scores=np.array([each.concepts for each in lesions]),
        metadata=np.array([each.metadata for each in lesions]), **options,
    )  # fmt: skip


def batches_of(index, source, rows, **options):
    return [step.micro_batches[0] for step in LoaderFactory(index, source).sequential(rows, 4, CPU, **options)]


@pytest.mark.parametrize("short_side", [None, 32])
@pytest.mark.parametrize("photos", [lambda path: path, Path, lambda path: Path(path).read_bytes()])
@pytest.mark.parametrize("augment", [None, AugmentConfig()])
def test_batches_equal_those_of_a_packed_set(challenge, tmp_path, short_side, photos, augment):
    dataset = read_challenge(challenge.folder, missing_view="mark")
    index = pack_shards(dataset, tmp_path / "shards", short_side=short_side)
    photo_set = photo_set_of(dataset, photos, short_side=short_side)
    photo_set = PhotoSet(**{**vars_of(photo_set), "canvas": index.canvas})
    packed = index.lesion_ids.tolist()
    rows = np.array([packed.index(name) for name in photo_set.lesion_ids])
    assert photo_set.signature == index.signature
    expected = batches_of(index, PhotoSource(index, 24, *HALF), rows, augment=augment)
    found = batches_of(photo_set, PhotoSetSource(photo_set, 24, *HALF), np.arange(len(rows)), augment=augment)
    for one, other in zip(found, expected, strict=True):
        assert one.lesion_ids == other.lesion_ids
        for name in ("clinical", "dermoscopic", "view_present", "concepts", "metadata", "labels", "valid"):
            assert torch.equal(getattr(one, name).nan_to_num(7), getattr(other, name).nan_to_num(7)), name


def vars_of(photo_set: PhotoSet) -> dict:
    names = "task concepts photos canvas short_side lesion_ids groups labels concept_scores metadata"
    return {name: getattr(photo_set, name) for name in names.split()}


def test_image_or_array_counts_as_a_png_of_it(tmp_path):
    image = draw_photo(1, (64, 40))
    image.save(tmp_path / "a.png")
    photos = [tmp_path / "a.png", image, np.asarray(image), (tmp_path / "a.png").read_bytes()]
    photo_set = PhotoSet(milk10k_task(), (), {"dermoscopic": photos}, canvas=CANVAS, short_side=32)
    first, *others = [photo_set.pixels(row, "dermoscopic")[0] for row in range(len(photos))]
    assert first.shape == (32, 51, 3)
    assert all(np.array_equal(first, other) for other in others)


def test_what_is_not_given_is_missing():
    photo_set = PhotoSet(
        milk10k_task(), ("clinical/hair",), {"dermoscopic": [draw_photo(1), None]}, canvas=CANVAS, short_side=None
    )
    assert photo_set.view_present.tolist() == [[False, True], [False, False]]
    inputs = photo_set.inputs(np.array([0, 1]))
    assert inputs.lesion_ids == ["0", "1"] and inputs.labels.tolist() == [-1, -1]
    assert np.isnan(inputs.concepts).all() and np.isnan(inputs.metadata).all()
    assert inputs.concepts.shape == (2, 1) and inputs.metadata.shape == (2, 4)
    (batch,) = batches_of(photo_set, PhotoSetSource(photo_set, 24, *HALF), np.arange(2))
    assert (batch.clinical == -1).all() and (batch.dermoscopic[1] == -1).all() and (batch.dermoscopic[0] != -1).any()


def test_taken_rows_are_those_lesions(challenge):
    photo_set = photo_set_of(read_challenge(challenge.folder, missing_view="mark"), short_side=None)
    taken = photo_set.take(slice(2, 9, 3))
    assert taken.lesion_ids.tolist() == photo_set.lesion_ids[[2, 5, 8]].tolist()
    one, other = taken.inputs(np.arange(3)), photo_set.inputs(np.array([2, 5, 8]))
    for name in ("view_present", "concepts", "metadata", "labels"):
        assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name in ("concepts", "metadata"))
    assert taken.photos["clinical"] == [photo_set.photos["clinical"][row] for row in (2, 5, 8)]


@pytest.mark.parametrize("content", [b"", b"text", None, "pipe", "folder", "device", "ring"])
def test_unreadable_photo_is_named(tmp_path, content):
    path = tmp_path / "a.jpg"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        {"pipe": os.mkfifo, "folder": os.mkdir}.get(content, lambda path: None)(path)
        if target := {"device": "/dev/zero", "ring": path}.get(content):
            path.symlink_to(target)
    photos = [draw_photo(1), path]
    photo_set = PhotoSet(milk10k_task(), (), {"clinical": photos}, canvas=CANVAS, short_side=None)
    with pytest.raises(DataError, match=rf"^{path}: unreadable photo \(.+\); replace it, or"):
        batches_of(photo_set, PhotoSetSource(photo_set, 24, *HALF), np.arange(2))
    source = PhotoSetSource(photo_set, 24, *HALF, drop=True)
    batches_of(photo_set, source, np.arange(2))
    assert {row: problem.where for row, problem in source.problems.items()} == {1: str(path)}


def test_photo_in_memory_is_named_by_its_lesion():
    for photo in (np.zeros((4, 4, 3)), np.zeros((4, 4, 5), np.uint8), 3):
        with pytest.raises(DataError, match=r"^the clinical photo of lesion L1: "):
            PhotoSet(milk10k_task(), (), {"clinical": [photo]}, lesion_ids=["L1"], canvas=CANVAS, short_side=None)


def test_view_that_the_task_lacks_is_refused():
    with pytest.raises(DataError, match="has no front photos, its views are clinical, dermoscopic"):
        PhotoSet(milk10k_task(), (), {"front": ["a.jpg"]}, canvas=CANVAS, short_side=None)


def test_fingerprint_changes_with_a_photo_file(tmp_path):
    path = tmp_path / "a.png"
    draw_photo(1).save(path)

    def fingerprint(**options) -> str:
        return PhotoSet(milk10k_task(), (), {"clinical": [path]}, canvas=CANVAS, short_side=None, **options).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(metadata=np.array([[50, 0, 1, 2]])) != first
    draw_photo(2, (60, 50)).save(path)
    assert fingerprint() != first
