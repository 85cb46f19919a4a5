"""Scores of subgroups, their gaps, and the correction for many comparisons."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import recall_score, roc_auc_score

from triderm_dist import intervals, metrics
from triderm_dist.report.slices import (
    BEYOND,
    MIN_SLICE_LESIONS,
    TOO_SMALL,
    WITHIN,
    ScoredLesions,
    _Scores,
    placements,
    score_slices,
    slice_masks,
)
from triderm_dist.schema import MetadataField

MALIGNANT = np.array([1.0, 0.0, 0.0, np.nan])


def lesions_of(count: int, seed: int, groups: np.ndarray | None = None) -> ScoredLesions:
    """Return lesions whose probabilities know something of their labels."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(4, count, p=[0.4, 0.3, 0.2, 0.1])
    scores = 1.5 * np.eye(4)[labels] + generator.normal(size=(count, 4)).round(1)  # with ties
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    decisions = metrics.argmax_decisions(probabilities)
    return ScoredLesions(probabilities, labels, decisions, np.arange(count) if groups is None else groups, MALIGNANT)


def by_name(lesions: ScoredLesions, mask: np.ndarray) -> dict:
    return {part.score_name: part for part in score_slices(lesions, {"field": {"value": mask}})}


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_those_of_scikit_learn(seed):
    lesions = lesions_of(400, seed)
    mask = np.random.default_rng(100 + seed).random(400) < 0.4
    found = by_name(lesions, mask)
    p, labels = lesions.probabilities, lesions.labels
    kind = MALIGNANT[labels]
    share = p[:, 0] / p[:, :3].sum(axis=1)

    def scores(side: np.ndarray) -> dict[str, float]:
        predicted = p[side].argmax(axis=1)
        known = side & ~np.isnan(kind)
        return {
            "macro_f1": metrics.macro_f1(lesions.decisions[side], labels[side]),
            "recall": recall_score(labels[side], predicted, average="macro"),
            "auc": np.mean([roc_auc_score(labels[side] == c, p[side, c]) for c in range(4)]),
            "sensitivity": recall_score(kind[known] == 1, lesions.decisions[known, 0]),
            "specificity": recall_score(kind[known] == 0, ~lesions.decisions[known, 0]),
            "malignant_auc": roc_auc_score(kind[known], share[known]),
            "overconfidence": p[side].max(axis=1).mean() - (predicted == labels[side]).mean(),
        }

    inside, outside = scores(mask), scores(~mask)
    assert set(found) == set(inside)
    for name, part in found.items():
        assert part.score.value == pytest.approx(inside[name], abs=1e-12)
        assert part.gap.value == pytest.approx(inside[name] - outside[name], abs=1e-12)
        assert part.score.low < part.score.value < part.score.high
        assert part.gap.low < part.gap.value < part.gap.high


@pytest.mark.parametrize("recall", [0.3, 0.95])
def test_gap_in_recall_has_nominal_coverage(recall: float) -> None:
    """A slice with 60 lesions of one diagnosis and 5 of each other, compared with 200 of each, at equal recall."""
    generator = np.random.default_rng(0)
    sizes = [60, *10 * [5], *11 * [200]]
    labels, inside = np.repeat([*range(11), *range(11)], sizes), np.arange(sum(sizes)) < 110
    truth, draws, behind, ahead = labels[:, None] == np.arange(11), 1000, 0, 0
    scored = _Scores(ScoredLesions(truth + 0.0, labels, truth, np.arange(len(labels)), np.full(11, np.nan)))
    for _ in range(draws):
        found = (generator.random(len(labels)) < recall) / 11
        gap = scored._gap(inside, np.ones(len(labels), bool), labels, found)[1]
        assert gap.low <= gap.value <= gap.high
        behind, ahead = behind + (gap.high < 0), ahead + (gap.low > 0)
    assert behind / draws < 0.045  # nominally 0.025
    assert ahead / draws < 0.08  # few lesions with high recall give wide intervals
    assert behind + ahead > 0  # the interval is narrow enough to detect a difference


def test_variance_of_an_area_is_that_of_delong():
    generator = np.random.default_rng(3)
    positive = generator.random(20_000) < 0.3
    scores = positive + generator.normal(size=20_000)
    placed, area = placements(np.unique(scores, return_inverse=True)[1], positive)
    assert area == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    delong = placed[positive].var(ddof=1) / positive.sum() + placed[~positive].var(ddof=1) / (~positive).sum()
    labels = np.where(positive, 0, 1)
    lesions = ScoredLesions(
        np.stack([scores, -scores], axis=1), labels, np.zeros((20_000, 2), bool), np.arange(20_000), np.array([1.0, 0])
    )
    mask = np.arange(20_000) < 10_000
    part = by_name(replace(lesions, probabilities=1 / (1 + np.exp(-lesions.probabilities))), mask)["auc"]
    assert (part.gap.high - part.gap.low) / 2 == pytest.approx(1.96 * np.sqrt(4 * delong), rel=0.02)


def test_lesions_of_a_patient_do_not_count_as_independent():
    alone = lesions_of(300, 2)
    twice = np.repeat(np.arange(300), 4)  # every lesion four times, as one patient
    copied = ScoredLesions(
        alone.probabilities[twice], alone.labels[twice], alone.decisions[twice], twice, alone.malignant
    )
    mask = np.random.default_rng(1).random(300) < 0.5
    one, four = by_name(alone, mask), by_name(copied, mask[twice])
    for name in ("recall", "auc", "sensitivity", "overconfidence"):
        width, copied_width = (found[name].gap.high - found[name].gap.low for found in (one, four))
        assert copied_width == pytest.approx(width, rel=0.06), name


def test_gaps_are_marked_where_they_exceed_the_noise_and_the_slice_is_large():
    lesions = lesions_of(1000, 4)
    every = np.arange(1000)
    mask = every % 4 == 0
    decisions = lesions.decisions.copy()
    decisions[mask & (every % 3 > 0)] = False
    worse = replace(lesions, decisions=decisions)
    rows = score_slices(worse, {"a": {"yes": mask, "no": ~mask}, "b": {"few": every < MIN_SLICE_LESIONS - 1}})
    verdicts = {(part.value, part.score_name): part.verdict for part in rows}
    assert verdicts["yes", "recall"] == verdicts["no", "recall"] == BEYOND
    assert verdicts["yes", "auc"] == WITHIN
    assert {verdict for (value, _), verdict in verdicts.items() if value == "few"} == {TOO_SMALL}
    # Two values without a third are one comparison: p is multiplied by at most the 7 scores.
    yes = {part.score_name: part for part in rows if part.value == "yes"}
    assert max(part.adjusted / part.p for part in yes.values() if part.adjusted < 1) <= 7 + 1e-9
    assert yes["recall"].p == pytest.approx(2 * stats.norm.sf(abs(_z(yes["recall"].gap))), rel=1e-6)


def _z(gap: intervals.Interval) -> float:
    return gap.value / ((gap.high - gap.low) / 2 / 1.959963984540054)


def test_empty_slices_and_slices_of_all_lesions_are_left_out():
    lesions = lesions_of(50, 0)
    assert score_slices(lesions, {"a": {"none": np.zeros(50, bool), "all": np.ones(50, bool)}}) == []


def test_numbers_are_cut_at_the_cuts_of_the_field_or_at_the_quartiles():
    values = np.array([1.0, 2.0, 3.0, 4.0, np.nan])
    field = MetadataField("size", "size", "number", high=10, cuts=(2, 4))
    masks = slice_masks(field, values)
    assert [*masks] == ["under 2", "2 to under 4", "4 and over", "missing"]
    assert [int(mask.sum()) for mask in masks.values()] == [1, 2, 1, 1]
    assert sum(mask.astype(int) for mask in slice_masks(replace(field, cuts=()), values).values()).tolist() == [1] * 5
