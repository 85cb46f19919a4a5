"""The loader yields the right lesion in each row, for any number of threads, from photos and from tokens."""

import contextlib
import sys
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import draw_photo
from triderm_dist.config import AugmentConfig
from triderm_dist.data import loader, photo_source
from triderm_dist.data.host_augment import opencv
from triderm_dist.data.loader import Loader
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.index import ShardIndex, read_photo_bytes
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.data.threads import Decoders
from triderm_dist.data.token_cache import TokenCache
from triderm_dist.data.token_source import TokenSource
from triderm_dist.schema import VIEWS, Batch, DataError

CPU = torch.device("cpu")
HALF = ((0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def index(make_challenge, tmp_path) -> ShardIndex:
    challenge = make_challenge(lesions=22)
    challenge.photo(4).unlink()  # the third lesion has only its second view
    dataset = read_challenge(challenge.write().folder, missing_view="mark")
    return pack_shards(dataset, tmp_path / "shards", short_side=None, shard_samples=5)


def steps_of(index: ShardIndex, source, global_batch: int = 8, micro_batch: int = 4, **options):
    samples = Samples(np.arange(len(index)), index.labels, index.shard)
    plan = EpochPlan(samples, Sampling("shuffle"), 0, 0)
    return plan, list(
        Loader(index, source, plan.batches(0, 1, global_batch), micro_batch=micro_batch, device=CPU, **options)
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_batch_rows_contain_the_right_lesions(index, workers):
    source = PhotoSource(index, 36, *HALF)
    plan, steps = steps_of(index, source, workers=workers, prefetch=2)
    assert [len(step.micro_batches) for step in steps] == [2, 2, 2]
    rows = np.concatenate([step.rows for step in steps])
    assert rows[: len(index)].tolist() == plan.order.tolist()
    assert [step.count for step in steps] == [8, 8, 6]
    batches = [batch for step in steps for batch in step.micro_batches]
    for i, row in enumerate(rows):
        batch, at = batches[i // 4], i % 4
        assert batch.lesion_ids[at] == index.lesion_ids[row]
        assert batch.labels[at] == index.labels[row]
        assert batch.valid[at] == (i < len(index))
        assert batch.view_present[at].tolist() == (index.sizes[row] > 0).tolist()
        for view, pixels in zip(VIEWS, (batch.clinical, batch.dermoscopic), strict=True):
            if index.sizes[row, VIEWS.index(view)]:
                photo = simplejpeg.decode_jpeg(read_photo_bytes(index, row, view))[:, 6:42]  # 48 x 36, centered
                expected = torch.from_numpy(photo.copy()).permute(2, 0, 1).float() / 255 * 2 - 1
                torch.testing.assert_close(pixels[at], expected, atol=1e-5, rtol=0)
    source.close()


def test_shards_are_released_for_the_steps_that_were_yielded(index):
    """A source may release what no later step reads: neither the current one, nor one that is decoded in advance."""
    released = []

    class Source(PhotoSource):
        def read_ahead(self, rows, batch):
            return contextlib.nullcontext(released.append)

    source = Source(index, 24, *HALF)
    batches = EpochPlan(Samples.of(index, np.arange(len(index))), Sampling("shuffle"), 0, 0).batches(0, 1, 8)
    loader = Loader(index, source, batches, micro_batch=4, device=CPU, prefetch=4)
    assert [list(released) for _ in loader] == [[1], [1, 2], [1, 2, 3]]
    source.close()


def test_augmented_batch_is_independent_of_the_split(index):
    source, augment = PhotoSource(index, 24, *HALF), AugmentConfig(clinical_dropout=0.5, concept_dropout=0.5)
    large, small = (
        [
            batch
            for step in steps_of(index, source, micro_batch=m, augment=augment, seed=5, epoch=2)[1]
            for batch in step.micro_batches
        ]
        for m in (8, 2)
    )
    for name in ("clinical", "dermoscopic", "view_present", "concepts"):
        a, b = (torch.cat([getattr(batch, name) for batch in batches]) for batches in (large, small))
        torch.testing.assert_close(a, b, equal_nan=True)
    assert torch.cat([batch.concepts for batch in large]).isnan().any()


EXTRA = {"blur": {"clinical": 1.0, "dermoscopic": 0.5}, "hue": {"dermoscopic": 20.0}}


@pytest.mark.parametrize("augment", [None, AugmentConfig(), AugmentConfig(extra=EXTRA, tied_views=True)])
def test_crops_of_the_decoder_threads_equal_those_of_the_batch(index, augment, monkeypatch):
    """With OpenCV threads compute the crops of a CPU, and without it the batch is augmented."""
    pytest.importorskip("cv2", reason="needs the extra cpu")

    def batches() -> list[Batch]:
        source = PhotoSource(index, 24, *HALF, augment=augment)
        steps = steps_of(index, source, augment=augment, seed=5, epoch=2)[1]
        return [batch for step in steps for batch in step.micro_batches]

    threads = batches()
    opencv.cache_clear()
    monkeypatch.setitem(sys.modules, "cv2", None)
    try:
        whole = batches()
    finally:
        opencv.cache_clear()
    for a, b in zip(threads, whole, strict=True):
        for view in VIEWS:
            pixels = getattr(a, view)
            assert pixels.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(pixels, getattr(b, view), atol=1e-4, rtol=0)
    assert not all(torch.equal(a.clinical, b.clinical) for a, b in zip(threads, whole, strict=True))


def test_canvas_is_the_most_frequent_photo_size(make_challenge, tmp_path):
    """Photos of other sizes, including the first one, are fitted to the canvas."""
    challenge = make_challenge(lesions=22)
    dataset = read_challenge(challenge.folder)
    ids = pack_shards(dataset, tmp_path / "as-made", short_side=None).lesion_ids.tolist()
    first = next(lesion for lesion in dataset.lesions if lesion.lesion_id == ids[0])
    for path, size in (
        (first.images["clinical"], (40, 30)),
        (challenge.photo(7), (90, 90)),
        (challenge.photo(9), (36, 48)),
    ):
        draw_photo(3, size).save(path, quality=95)
    index = pack_shards(dataset, tmp_path / "shards", short_side=None)
    assert index.canvas == (48, 36)
    assert index.photo_sizes == {(48, 36): 41, (40, 30): 1, (90, 90): 1, (36, 48): 1}
    (note,) = index.notes()
    assert note.startswith("3 of 44 photos are not 48x36; ")
    _, steps = steps_of(index, PhotoSource(index, 24, *HALF))
    assert all(batch.clinical.shape == (4, 3, 24, 24) for step in steps for batch in step.micro_batches)


class Copies(TorchDispatchMode):
    """Records whether copies to the meta device block the host."""

    def __init__(self) -> None:
        super().__init__()
        self.blocking: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].device.type == "cpu":
            result = function(*args, **kwargs)
            if isinstance(result, torch.Tensor) and result.device.type == "meta":
                self.blocking.append(not kwargs.get("non_blocking", False))
            return result
        return function(*args, **kwargs)


def test_no_copy_to_the_device_blocks_the_host(index):
    plan = EpochPlan(Samples(np.arange(len(index)), index.labels, index.shard), Sampling("shuffle"), 0, 0)
    source, meta = PhotoSource(index, 24, *HALF), torch.device("meta")
    with Copies() as copies:
        batches = plan.batches(0, 1, 4)
        next(iter(Loader(index, source, batches, micro_batch=4, device=meta, augment=AugmentConfig(), prefetch=1)))
    # Per view: photos, matrix of the crops and color factors; mean and std, here the same, once; 5 fields of the batch.
    assert copies.blocking == [False] * (2 * 3 + 1 + 5)


def test_damaged_photo_is_named(index):
    path = index.path(0)
    data = bytearray(path.read_bytes())
    row = int(np.flatnonzero((index.shard == 0) & (index.sizes[:, 1] > 0))[1])
    start, size = int(index.offsets[row, 1]), int(index.sizes[row, 1])
    data[start : start + size] = bytes(size)
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=f"dermoscopic photo of lesion {index.lesion_ids[row]} does not decode"):
        steps_of(index, PhotoSource(index, 24, *HALF))


def test_truncated_and_vanished_shards_are_named(index):
    path, row = index.path(0), int(np.flatnonzero(index.shard == 0)[-1])
    end = int((index.offsets[row] + index.sizes[row]).max())
    with path.open("r+b") as file:
        file.truncate(end - 1)
    with pytest.raises(DataError, match=rf"{path.name}: truncated, ends before byte {end}; run triderm verify"):
        steps_of(index, PhotoSource(index, 24, *HALF))
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: No such file or directory, while reading; restore the file"):
        steps_of(index, PhotoSource(index, 24, *HALF))


def test_views_of_a_source_are_read_without_the_others(index):
    row = int(np.flatnonzero((index.sizes > 0).all(1))[0])
    pixels = []
    for views in (VIEWS, VIEWS[:1], VIEWS[1:], VIEWS[::-1]):
        source = PhotoSource(index, 24, *HALF, views=views)
        out = [np.empty((36, 48, 3), np.uint8) for _ in views]
        source.decode(out, row, source.locate(np.array([row]))[0])
        pixels.append(dict(zip(views, out, strict=True)))
    for view in VIEWS:
        photo = simplejpeg.decode_jpeg(read_photo_bytes(index, row, view))
        assert [np.array_equal(each[view], photo) for each in pixels if view in each] == [True] * 3


def test_batches_do_not_depend_on_how_many_are_prepared_together(index, monkeypatch):
    augment = AugmentConfig(clinical_dropout=0.5, concept_dropout=0.5)
    source, runs = PhotoSource(index, 24, *HALF), []
    for lesions in (1, 16, 512):
        monkeypatch.setattr(loader, "PREPARED_LESIONS", lesions)
        _, steps = steps_of(index, source, micro_batch=3, augment=augment)
        runs.append([batch for step in steps for batch in step.micro_batches])
    for first, other in ((runs[0], runs[1]), (runs[0], runs[2])):
        assert [batch.lesion_ids for batch in first] == [batch.lesion_ids for batch in other]
        for name in ("clinical", "view_present", "concepts", "metadata", "labels", "valid"):
            for a, b in zip(first, other, strict=True):
                torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=0, rtol=0, equal_nan=True)
        assert all(np.array_equal(a.draws(["x"]), b.draws(["x"])) for a, b in zip(first, other, strict=True))


def test_tokens_are_those_of_the_sampled_version(index, tmp_path):
    cache = TokenCache(tmp_path / "tokens", len(index), (3, 2))
    for number, version in enumerate(["plain", "augmented-0", "dihedral-1"]):
        tokens = np.zeros((len(index), 2, 3, 2), np.float16)
        tokens[:] = np.arange(len(index))[:, None, None, None] + 100 * number
        tokens[:, 1] += 1000
        assert cache.missing([version]) == [(version, 0)]
        cache.write(version, 0, tokens)
    assert cache.missing(["plain", "augmented-0"]) == []
    source = TokenSource(cache, ["plain", "augmented-0"], ["plain", "dihedral-1"])
    _, plain = steps_of(index, source)
    _, trained = steps_of(index, source, augment=AugmentConfig())
    transformed = [
        replace(
            step,
            micro_batches=[
                source.transformed(batch, step.rows[4 * i : 4 * i + 4], 1) for i, batch in enumerate(step.micro_batches)
            ],
        )
        for step in plain
    ]
    for steps, allowed in ((plain, {0}), (transformed, {200}), (trained, {0, 100})):
        seen = set()
        for step in steps:
            rows = torch.from_numpy(step.rows).float()
            clinical = torch.cat([batch.clinical for batch in step.micro_batches])
            dermoscopic = torch.cat([batch.dermoscopic for batch in step.micro_batches])
            seen |= set((clinical[:, 0, 0] - rows).tolist())
            assert set((dermoscopic[:, 2, 1] - rows - 1000).tolist()) <= allowed
        assert seen == allowed


def test_photos_are_transformed_on_the_device(index):
    source = PhotoSource(index, 24, *HALF)
    step = steps_of(index, source, micro_batch=8)[1][0]
    batch = step.micro_batches[0]
    assert source.transformed(batch, step.rows, 0) is batch
    transformed = source.transformed(batch, step.rows, 5)  # a rotation by 90 degrees, then a flip
    assert torch.equal(transformed.dermoscopic, torch.rot90(batch.dermoscopic, 1, (2, 3)).flip(3))
    assert torch.equal(transformed.clinical, torch.rot90(batch.clinical, 1, (2, 3)).flip(3))
    assert torch.equal(transformed.concepts, batch.concepts)


def test_smaller_requests_reuse_the_buffers_of_the_largest(index):
    """Otherwise each size of a set's part of a micro-batch would keep buffers of its own. For a GPU the oldest comes
    first, whose copy was asked for before those of the others.
    """
    source = PhotoSource(index, 24, *HALF)
    addresses = []
    with Decoders(1) as pool:
        for number in (8, 3, 5, 8, 1, 8, 8):
            fetched = source.fetch(pool, np.arange(number), None, torch.device("cuda"))
            for job in fetched.jobs:
                job.result()
            assert [len(view) for view in fetched.views] == [number, number]
            addresses.append(fetched.views[0].data_ptr())
            source.finish(fetched, CPU, None)
    ring = 1 + photo_source.SPARE_BUFFERS
    assert addresses == [addresses[i % ring] for i in range(7)] and len(set(addresses)) == ring
