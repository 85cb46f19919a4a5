"""Confident learning against the formulas of its paper."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triderm_dist.report.label_errors import find_label_errors


def draw(seed: int, lesions: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, lesions)
    probabilities = generator.dirichlet(np.full(classes, 0.5), lesions) + 0.15 * np.eye(classes)[labels]
    return probabilities / probabilities.sum(axis=1, keepdims=True), labels


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 5))
def test_confident_joint_is_that_of_the_paper(seed: int, lesions: int, classes: int) -> None:
    p, labels = draw(seed, lesions, classes)
    thresholds = {
        j: sum(p[x, j] for x in range(lesions) if labels[x] == j) / (labels == j).sum() for j in set(labels.tolist())
    }
    joint = np.zeros((classes, classes), int)
    suspects = set()
    for x in range(lesions):
        candidates = [j for j, threshold in thresholds.items() if p[x, j] >= threshold - 1e-15]
        if candidates:
            best = max(candidates, key=lambda j: p[x, j])
            joint[labels[x], best] += 1
            if best != labels[x]:
                suspects.add((x, best))
    found = find_label_errors(p, labels)
    np.testing.assert_array_equal(found.joint, joint)
    assert set(zip(found.suspects.tolist(), found.alternatives.tolist(), strict=True)) == suspects
    assert list(found.margins) == sorted(found.margins)
    for row, margin in zip(found.suspects, found.margins, strict=True):
        assert margin == pytest.approx(p[row, labels[row]] - np.delete(p[row], labels[row]).max(), abs=1e-12)
    scaled = np.zeros((classes, classes))
    for label in range(classes):
        row = joint[label] if joint[label].sum() else np.eye(classes)[label]
        scaled[label] = row / row.sum() * (labels == label).sum()
    np.testing.assert_allclose(found.estimated, scaled / scaled.sum() * lesions, atol=1e-12)


def test_flipped_labels_are_found() -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 4, 2000)
    scores = generator.normal(size=(2000, 4)) + 4 * np.eye(4)[truth]
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    labels = truth.copy()
    flipped = generator.permutation(2000)[:100]
    labels[flipped] = (labels[flipped] + 1) % 4
    found = find_label_errors(p, labels)
    assert np.isin(found.suspects[:80], flipped).mean() > 0.95
    assert (found.alternatives[:50] == truth[found.suspects[:50]]).all()
    assert 0.03 < found.share < 0.08
