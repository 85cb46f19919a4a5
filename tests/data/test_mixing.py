"""Mixup and CutMix: shares, boxes and targets by lesion, and what is left alone."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from triderm_dist.config import AugmentConfig, TrainConfig
from triderm_dist.data.augment import LesionRng, lesion_keys
from triderm_dist.data.mixing import Mixing
from triderm_dist.engine.checkpoint import TrainState
from triderm_dist.engine.epochs import Epochs
from triderm_dist.schema import Batch, ConfigError
from triderm_dist.settings import validate
from triderm_dist.tasks import milk10k_task

SIGNATURE = milk10k_task().signature(("a", "b"))
C = len(SIGNATURE.diagnoses)
SIZE = 8


def batch(number: int, seed: int = 0, shape: tuple[int, ...] = (3, SIZE, SIZE)) -> Batch:
    """Return lesions whose photos have one value each, which is their number."""
    names = [str(each) for each in range(number)]
    images = torch.arange(float(number)).view(-1, *[1] * len(shape)).expand(number, *shape).contiguous()
    if len(shape) == 3:
        images = images.contiguous(memory_format=torch.channels_last)
    return Batch(
        names,
        images,
        images.clone(),
        torch.ones(number, 2, dtype=torch.bool),
        torch.arange(2.0 * number).view(number, 2),
        torch.arange(float(len(SIGNATURE.fields)) * number).view(number, -1),
        torch.arange(number) % C,
        torch.ones(number, dtype=torch.bool),
        draws=LesionRng(seed, 0, lesion_keys(names), np.zeros(number, np.int64)).bits,
    )


def mix(lesions: Batch, **settings: float) -> Batch:
    return Mixing(AugmentConfig(**settings), SIGNATURE)(lesions)


def shares(mixed: Batch) -> torch.Tensor:
    """Return the share of the partner in the targets, (B,)."""
    assert mixed.targets is not None
    return 1 - mixed.targets[torch.arange(len(mixed.labels)), mixed.labels]


def part(lesions: Batch, rows: slice) -> Batch:
    tensors = {
        each.name: getattr(lesions, each.name)[rows]
        for each in dataclasses.fields(lesions)
        if isinstance(getattr(lesions, each.name), torch.Tensor)
    }
    names = lesions.lesion_ids[rows]
    draws = LesionRng(0, 0, lesion_keys(names), np.zeros(len(names), np.int64)).bits
    return dataclasses.replace(lesions, lesion_ids=names, draws=draws, **tensors)


def test_mixup_mixes_photos_concepts_numbers_and_targets_by_one_share():
    lesions = batch(10)
    mixed, partner = mix(lesions, mixup=1.0), torch.arange(10) ^ 1
    share = shares(mixed)
    assert ((share > 0) & (share <= 0.5)).all()
    for got, values in (
        (mixed.clinical[:, 0, 0, 0], lesions.clinical[:, 0, 0, 0]),
        (mixed.dermoscopic[:, 2, 7, 7], lesions.dermoscopic[:, 2, 7, 7]),
        (mixed.concepts[:, 1], lesions.concepts[:, 1]),
    ):
        torch.testing.assert_close(got, values + share * (values[partner] - values))
    for column, field in enumerate(SIGNATURE.fields):
        own = lesions.metadata[:, column]
        expected = own + share * (own[partner] - own) if field.kind == "number" else own
        torch.testing.assert_close(mixed.metadata[:, column], expected)
    assert mixed.targets is not None
    torch.testing.assert_close(mixed.targets.sum(1), torch.ones(10))
    torch.testing.assert_close(mixed.targets[torch.arange(10), lesions.labels[partner]], share)
    assert torch.equal(mixed.clinical, mixed.clinical.contiguous(memory_format=torch.channels_last))
    assert mixed.clinical.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(3, SIZE, SIZE), (SIZE * SIZE, 5)])
def test_cutmix_puts_one_box_of_the_partner_into_both_views(shape):
    lesions = batch(40, shape=shape)
    mixed, partner = mix(lesions, cutmix=1.0), torch.arange(40) ^ 1
    pixels = mixed.clinical.flatten(2)[:, 0] if len(shape) == 3 else mixed.clinical[:, :, 0]
    other = pixels == partner[:, None]
    assert ((pixels == torch.arange(40)[:, None]) | other).all()
    torch.testing.assert_close(other.float().mean(1), shares(mixed))
    assert torch.equal(mixed.clinical, mixed.dermoscopic)
    grid = other.view(40, SIZE, SIZE)
    rows, columns = grid.any(2), grid.any(1)
    assert torch.equal(grid, rows[:, :, None] & columns[:, None, :])  # a box
    assert len({tuple(each.tolist()) for each in other}) > 20


def test_shares_have_the_folded_beta_distribution_and_both_kinds_half_of_the_lesions():
    from scipy.stats import beta, kstest

    lesions = batch(2000, shape=(4, 1))
    found = shares(mix(lesions, mixup=0.4)).double().numpy()
    assert kstest(found, lambda x: 2 * beta.cdf(x, 0.4, 0.4)).pvalue > 0.01
    lesions = batch(1000, shape=(3, SIZE, SIZE))
    mixed = mix(lesions, mixup=1.0, cutmix=1.0)
    cut = (mixed.clinical == torch.round(mixed.clinical)).flatten(1).all(1)
    assert 400 < cut.sum() < 600


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixture_does_not_depend_on_the_split(settings):
    lesions = batch(12)
    whole = mix(lesions, **settings)
    for rows in (slice(0, 4), slice(4, 12)):
        split = mix(part(lesions, rows), **settings)
        for name in ("clinical", "dermoscopic", "concepts", "metadata", "targets"):
            assert torch.equal(getattr(split, name), getattr(whole, name)[rows]), name


def test_lesions_that_share_nothing_stay_as_they_are():
    lesions = batch(10)
    mask = torch.ones(10, C, dtype=torch.bool)
    mask[2, :3] = False  # another set's
    lesions.valid[5] = False  # padding
    lesions.view_present[6] = torch.tensor([True, False])
    lesions.view_present[7] = torch.tensor([False, True])
    lesions.view_present[8, 0] = False
    lesions.concepts[0, 0] = torch.nan
    mixed = mix(dataclasses.replace(lesions, class_mask=mask), mixup=1.0)
    share = shares(mixed)
    assert (share[2:8] == 0).all() and (share[[0, 1, 8, 9]] > 0).all()
    assert torch.equal(mixed.clinical[2:], lesions.clinical[2:])  # of 8 and 9, one has no clinical photo
    assert torch.equal(mixed.dermoscopic[2:8], lesions.dermoscopic[2:8])
    assert not torch.equal(mixed.dermoscopic[8:], lesions.dermoscopic[8:])
    assert mixed.concepts[0, 0].isnan() and mixed.concepts[1, 0] == lesions.concepts[1, 0]
    assert not mixed.concepts[1:].isnan().any()


def test_micro_batches_must_hold_pairs():
    with pytest.raises(ConfigError, match="micro_batch 3 must be even"):
        validate(TrainConfig, {"global_batch": 6, "micro_batch": 3, "augment": {"mixup": 0.4}})


def test_last_epochs_are_not_mixed() -> None:
    config = validate(TrainConfig, {"epochs": 5, "augment": {"mixup": 0.4, "unmixed_epochs": 2}})
    index = SimpleNamespace(signature=SIGNATURE)
    epochs = object.__new__(Epochs)
    epochs.config, epochs.data = config, SimpleNamespace(loaders=SimpleNamespace(index=index))  # type: ignore
    mixed = [epochs.mixing(TrainState(epoch=epoch)) is not None for epoch in range(5)]
    assert mixed == [True, True, True, False, False]
