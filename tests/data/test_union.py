"""The union of a packed set with extra sets of another task."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.data.shards.faulty_server import serve
from tests.union_sets import AGE, MAIN, MAP, OTHER, extra_config, main_set, other_set, pack_set, row_of
from triderm_dist.config import AugmentConfig, RemoteConfig
from triderm_dist.data.augment import LesionRng, lesion_keys
from triderm_dist.data.loader import Loader
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.shards.open import open_index
from triderm_dist.data.threads import Decoders
from triderm_dist.data.token_cache import TokenCache
from triderm_dist.data.token_source import TokenSource
from triderm_dist.data.union import ExtraSet, LesionUnion, UnionSource, match_extra_set
from triderm_dist.schema import UNLABELED, VIEWS, ConfigError, FineLabels, TaskColumns, View

CPU = torch.device("cpu")
HALF = ((0.5,) * 3, (0.5,) * 3)
COLUMNS = TaskColumns(image="photo", lesion_id="lesion", diagnosis="dx")
CLINICAL = replace(MAIN, views=(View("clinical"),), columns=COLUMNS)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("union")
    return main_set(folder / "main"), other_set(folder / "other")


@pytest.fixture(scope="module")
def extra(sets) -> ExtraSet:
    main, other = sets
    return match_extra_set(extra_config(other), other, main, "data.extra.0")


@pytest.fixture(scope="module")
def union(sets, extra) -> LesionUnion:
    return LesionUnion(sets[0], [extra])


def sources(union: LesionUnion, size: int = 24) -> UnionSource:
    indexes = [union.main, *(each.index for each in union.extra)]
    return UnionSource(union, [PhotoSource(index, size, *HALF, views=VIEWS) for index in indexes], VIEWS)


def test_labels_are_mapped_and_null_leaves_lesions_out(sets, extra):
    main, other = sets
    for row, label in enumerate(other.labels.tolist()):
        target = None if label == UNLABELED else MAP[other.diagnoses[label]]
        assert extra.labels[row] == (UNLABELED if target is None else main.diagnoses.index(target))
    assert extra.class_mask.tolist() == [True, True, False, False]  # MEL and NV
    assert len(extra.rows) == 12  # 16 with a label, 4 of them scars


def test_fields_concepts_and_categories_are_matched_by_name(sets, extra):
    other, number = sets[1], 11  # age 10, site scalp, dots 0.1, streaks 0.2
    row = row_of(other, f"L{number:03d}")
    inputs = extra.inputs(np.array([row, row_of(other, "L004")]))
    assert inputs.lesion_ids == ["other/L011", "other/L004"]
    assert inputs.view_present.tolist() == [[False, True]] * 2
    # Of the concepts of MAIN (clinical veil and dots, dermoscopic veil and dots) the set has the last one.
    assert np.isnan(inputs.concepts[:, :3]).all()
    assert inputs.concepts[:, 3] == pytest.approx([0.1, 0.4])
    age, site, tone = inputs.metadata.T
    assert age.tolist() == [10.0, 40.0]
    assert np.isnan(site[0]) and site[1] == 1.0  # scalp is unknown; `Upper Limb` is upper_limb
    assert extra.metadata[row_of(other, "L003"), 1] == 0.0  # `Belly` is a synonym of trunk
    assert np.isnan(tone).all()
    assert (inputs.weights == 0.5).all() and inputs.class_mask.tolist() == [[True, True, False, False]] * 2
    assert [note.partition(":")[0] for note in extra.notes[:2]] == ["site", "tone"]
    groups = "12 groups have the id of a group of the training set (P000, P001, P003, P004, P005, ...); if they are"
    assert len(extra.notes) == 3 and extra.notes[2].startswith(groups)


def test_groups_are_compared_only_under_one_salt(sets):
    main, other = sets
    salted = [replace(index, group_salt=salt) for index, salt in ((main, "a"), (other, "a"), (other, "b"))]
    same, different, one_plain = (
        match_extra_set(extra_config(other), extra, training, "data.extra.0").notes[-1]
        for extra, training in ((salted[1], salted[0]), (salted[2], salted[0]), (salted[1], main))
    )
    assert same.startswith("12 groups have the id of a group")
    for note in (different, one_plain):
        assert "not hashes under the same salt" in note and f"pack it with salt={main.folder}" in note


def test_numbers_outside_the_range_and_other_units_are_missing(sets, tmp_path):
    main = sets[0]
    months = replace(OTHER.fields[2], unit="months")
    for number, (age, missing) in enumerate(((months, 18), (replace(AGE, high=200.0, unit=""), 0))):
        task = replace(OTHER, fields=(*OTHER.fields[:2], age))
        index = pack_set(tmp_path / str(number), task, 18, 10_000, unlabeled=2)
        extra = match_extra_set(extra_config(index), index, main, "data.extra.0")
        assert np.isnan(extra.metadata[:, 0]).sum() == missing
    young = replace(MAIN, fields=(replace(AGE, high=40.0), *MAIN.fields[1:]))
    index = pack_set(tmp_path / "young", young, 8, 0)
    extra = match_extra_set(extra_config(sets[1]), sets[1], index, "data.extra.0")
    assert np.isnan(extra.metadata[:, 0]).sum() == sum(10 * i % 100 > 40 for i in range(18))
    assert extra.notes[0] == "age: 8 values outside 0 to 40, so missing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"map": {**MAP, "nevus": "NV"}},
            r"data.extra.0.map: 'nevus' is not a diagnosis \(did you mean 'naevus'\?\) of ",
        ),
        (
            {"map": {**MAP, "scar": "MEI"}},
            r"data.extra.0.map.scar: 'MEI' is not a diagnosis \(did you mean 'MEL'\?\) of",
        ),
        (
            {"map": {"naevus": "NV", "melanoma": "MEL"}},
            r"data.extra.0.map: lacks scar \(4 lesions\), in_situ \(4 lesions\); map each to",
        ),
        ({"map": {**MAP, "naevus": None}}, "data.extra.0.map: name at least two diagnoses"),
    ],
)
def test_wrong_map_is_refused(sets, changes, message):
    main, other = sets
    with pytest.raises(ConfigError, match=message) as refusal:
        match_extra_set(extra_config(other, **changes), other, main, "data.extra.0")
    assert "\n" not in str(refusal.value)


def test_finer_labels_of_a_set(sets):
    """They belong to the mapped diagnoses, and a set that states only some of them is noted."""
    main, other = sets

    def notes(**labels: tuple[str, ...]) -> list[str]:
        own = replace(other, task=replace(other.task, fine=FineLabels("subtype", labels)))
        known = replace(
            main, task=replace(main.task, fine=FineLabels("fine", {"NV": ("dermal", "blue"), "MEL": ("x",)}))
        )
        found = match_extra_set(extra_config(other), own, known, "data.extra.0").notes
        return [note for note in found if "finer label" in note]

    assert not notes(naevus=("Blue", "Dermal"), in_situ=("x", "y")) and not notes(scar=("blue", "old"))
    (note,) = notes(naevus=("blue", "junctional"))
    assert note.startswith("its lesions have no finer label dermal, x; the loss of finer labels has no mask")
    with pytest.raises(ConfigError, match=r"^data.extra.0.map.melanoma: its finer label 'blue' is one of NV in the tr"):
        notes(naevus=("dermal",), melanoma=("blue",))


def test_training_set_itself_and_a_set_without_a_common_view_are_refused(sets, tmp_path):
    main, other = sets
    same = {name: name for name in main.diagnoses}
    with pytest.raises(ConfigError, match=r"data.extra.0.shards: .*main is the training set itself"):
        match_extra_set(extra_config(main, map=same), main, main, "data.extra.0")
    clinical = pack_set(tmp_path / "c", CLINICAL, 8, 0)
    with pytest.raises(ConfigError, match=r"none of its 18 lesions can join the training: no photo of them shows a vi"):
        match_extra_set(extra_config(other), other, clinical, "data.extra.0")


def test_view_that_the_training_set_lacks_counts_as_missing(sets, tmp_path):
    clinical = pack_set(tmp_path / "c", CLINICAL, 8, 500)
    same = {name: name for name in MAIN.diagnosis_names}
    extra = match_extra_set(extra_config(sets[0], map=same), sets[0], clinical, "data.extra.0")
    assert extra.inputs(np.arange(5)).view_present.tolist() == [[True, False]] * 5
    assert len(extra.rows) == len(sets[0])


def test_union_has_the_rows_of_all_sets(sets, union, extra):
    main, other = sets
    rows = np.random.default_rng(0).permutation(len(main) + len(other))
    inputs = union.inputs(rows)
    for i, row in enumerate(rows.tolist()):
        own = main.inputs(np.array([row])) if row < len(main) else extra.inputs(np.array([row - len(main)]))
        assert inputs.lesion_ids[i] == own.lesion_ids[0]
        for name in ("view_present", "concepts", "metadata", "labels"):
            np.testing.assert_array_equal(getattr(inputs, name)[i], getattr(own, name)[0])
        assert inputs.weights[i] == (1.0 if row < len(main) else 0.5)
        assert inputs.class_mask[i].tolist() == ([True] * 4 if row < len(main) else [True, True, False, False])
        assert union.labels[row] == own.labels[0]
    # A shard of the union is one of one set.
    assert len(set(union.shard.tolist())) == len(main.shards) + len(other.shards)
    assert set(union.shard[: len(main)]).isdisjoint(union.shard[len(main) :])


def test_only_lesions_that_join_are_extra_rows(union, extra):
    rows = union.extra_rows(VIEWS)
    assert (rows - len(union.main)).tolist() == extra.rows.tolist()
    assert union.extra_rows(["dermoscopic"]).tolist() == rows.tolist()
    assert union.extra_rows(["clinical"]).tolist() == []  # the set has no clinical photo
    assert union.extra_rows([]).tolist() == rows.tolist()  # a network of concepts and metadata alone
    dropped = extra.without(extra.rows[:3])
    assert LesionUnion(union.main, [dropped]).extra_rows(VIEWS).tolist() == rows[3:].tolist()


def test_each_set_reads_ahead_its_own_lesions_at_their_steps(union):
    class Source(TokenSource):
        def __init__(self):
            self.expected = []

        @contextlib.contextmanager
        def read_ahead(self, rows, batch):
            self.expected += rows.tolist()
            yield lambda steps: None

    parts, start = [Source(), Source()], len(union.main)
    with UnionSource(union, parts, VIEWS).read_ahead(np.array([start + 3, 5, start, 2]), 2):
        pass
    assert [part.expected for part in parts] == [[-1, 5, -1, 2], [3, -1, 0, -1]]


@pytest.mark.parametrize("augment", [None, AugmentConfig(clinical_dropout=0.5)])
def test_pixels_are_those_of_each_set(sets, union, augment):
    """Every lesion has the pixels that its own set's loader gives, under its name in the union."""
    rows = np.random.default_rng(1).permutation(len(union.labels))
    batches = [
        batch
        for step in Loader(
            union, sources(union), EpochPlan(Samples.of(union, rows), Sampling("sequential"), 0, 0).batches(0, 1, 8),
            micro_batch=4, device=CPU, augment=augment, seed=3, epoch=1,
        )
        for batch in step.micro_batches
    ]  # fmt: skip
    own = {name: PhotoSource(index, 24, *HALF, views=VIEWS) for name, index in zip(("", "other/"), sets, strict=True)}
    with Decoders(1) as pool:
        for batch in batches:
            for at, lesion in enumerate(batch.lesion_ids):
                source = own[lesion[:-4]]
                row = np.array([row_of(source.index, lesion[-4:])])
                rng = LesionRng(3, 1, lesion_keys([lesion]), np.zeros(1, np.int64)) if augment else None
                fetched = source.fetch(pool, row, rng, CPU)
                for job in fetched.jobs:
                    job.result()
                for view, pixels in source.finish(fetched, CPU, rng).items():
                    torch.testing.assert_close(getattr(batch, view)[at], pixels[0], atol=1e-6, rtol=0)
    assert {lesion[:-4] for batch in batches for lesion in batch.lesion_ids} == {"", "other/"}
    assert all(batch.clinical.is_contiguous(memory_format=torch.channels_last) for batch in batches)


def test_every_lesion_comes_once_on_any_number_of_ranks(union):
    rows = np.concatenate([np.arange(20), union.extra_rows(VIEWS)])
    plan = EpochPlan(Samples.of(union, rows), Sampling("shuffle", window=6), 0, 2)
    for world in (1, 2, 3):
        seen = [row for rank in range(world) for part in plan.batches(rank, world, 6) for row in part.rows[part.valid]]
        assert sorted(seen) == sorted(rows.tolist())


def test_balance_counts_the_lesions_of_all_sets(union):
    rows = np.concatenate([np.arange(len(union.main)), union.extra_rows(VIEWS)])
    labels = union.labels[rows]
    share = np.bincount(labels, minlength=4) / len(labels)  # MEL 6 + 8, NV 6 + 4, BCC 6, WART 6, of 36
    assert share * 36 == pytest.approx([14, 10, 6, 6])
    plans = [EpochPlan(Samples.of(union, rows), Sampling("balanced", 0.5, 1.0), 0, epoch) for epoch in range(60)]
    drawn = np.mean([np.bincount(union.labels[plan.order], minlength=4) for plan in plans], axis=0)
    assert drawn == pytest.approx(np.full(4, 18), rel=0.01)  # 0.5 / share times each: half of 36


def test_tokens_of_all_sets_with_zeros_for_a_view_that_a_set_lacks(sets, union, tmp_path):
    caches = []
    for number, index in enumerate(sets):
        cache = TokenCache(tmp_path / str(number), len(index), (3, 2))
        views = index.signature.views
        tokens = np.zeros((len(index), len(views), 3, 2), np.float16)
        tokens[:] = np.arange(len(index))[:, None, None, None] + 100 * number + 1
        cache.write("plain", 0, tokens)
        cache.write("augmented", 0, -tokens)
        caches.append(TokenSource(cache, ["plain", "augmented"], ["plain"], views))
    source = UnionSource(union, caches, VIEWS)
    rows = np.array([2, 30, 5, 24])
    with Decoders(1) as pool:
        fetched = source.fetch(pool, rows, None, CPU)
        for job in fetched.jobs:
            job.result()
        views = source.finish(fetched, CPU, None)
    assert views["dermoscopic"][:, 0, 0].tolist() == [3.0, 107.0, 6.0, 101.0]
    assert views["clinical"][:, 2, 1].tolist() == [3.0, 0.0, 6.0, 0.0]

    # The version of a lesion does not depend on its position in the batch.
    rows = np.arange(len(union.labels))
    chosen = []
    for order in (rows, rows[::-1]):
        rng = LesionRng(0, 1, lesion_keys(union.inputs(order).lesion_ids), np.zeros(len(rows), np.int64))
        with Decoders(1) as pool:
            fetched = source.fetch(pool, order, rng, CPU)
            for job in fetched.jobs:
                job.result()
            chosen.append(source.finish(fetched, CPU, rng)["dermoscopic"][:, 0, 0])
    assert torch.equal(chosen[0], chosen[1].flip(0)) and 10 < (chosen[0] < 0).sum() < 32


def test_union_is_never_predicted(union):
    with pytest.raises(TypeError, match="never predicted"):
        sources(union).transformed(None, np.arange(2), 0)  # type: ignore[arg-type]


def test_remote_sets_share_one_cache(sets, union, tmp_path):
    """Each reads ahead within its share of the cache: otherwise one could wait for space that the other one fills."""
    # Both sets shard by shard, in turns: two shards of each are needed at a time.
    rows = np.stack([np.arange(18), len(union.main) + np.arange(18)], 1).ravel()
    plan = EpochPlan(Samples.of(union, rows), Sampling("sequential"), 0, 0)
    total = sum(index.bytes for index in sets)
    limits = RemoteConfig(cache=str(tmp_path), cache_gb=0.67 * total / 1e9, total_seconds=60)
    with serve(sets[0].folder) as first, serve(sets[1].folder) as second:
        remote = [open_index(server.url, limits) for server in (first, second)]
        via_url = LesionUnion(remote[0], [replace(union.extra[0], index=remote[1])])
        shares = [index.bytes / total for index in remote]
        read = UnionSource(
            via_url,
            [
                PhotoSource(each, 24, *HALF, views=VIEWS, cache_share=share)
                for each, share in zip(remote, shares, strict=True)
            ],
            VIEWS,
        )
        pairs = zip(
            *(loaded(each, source, plan) for each, source in ((union, sources(union)), (via_url, read))), strict=True
        )
        assert all(torch.equal(local, fetched) for local, fetched in pairs)


def loaded(union: LesionUnion, source: UnionSource, plan: EpochPlan) -> list[torch.Tensor]:
    steps = Loader(union, source, plan.batches(0, 1, 2), micro_batch=2, device=CPU)
    return [getattr(batch, view) for step in steps for batch in step.micro_batches for view in VIEWS]
