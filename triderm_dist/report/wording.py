"""Words that several sections share."""

from __future__ import annotations

from triderm_dist.report.content import Content

RULES = {
    "argmax": "The most probable diagnosis of each lesion is predicted.",
    "fitted": "One diagnosis is predicted for each lesion: the one whose probability is largest relative to its fitted "
    "threshold.",
    "threshold": "A diagnosis is predicted where its probability exceeds its threshold.",
}
"""The decisions of `schema.DECISIONS` in words."""

SCORED_DECISIONS = {
    "argmax": "most probable diagnosis",
    "fitted": "one diagnosis by fitted thresholds",
    "threshold": "each diagnosis with p > 0.5",
}
"""What the macro F1 of a decision counts as predicted; a challenge's metric is called official instead."""


def scored_decision(content: Content) -> str:
    """Return what the run's macro F1 counts as predicted."""
    return "official metric" if content.task.submission else SCORED_DECISIONS[content.task.decision]


def fitted_out_of_fold(content: Content) -> str:
    """Name what is fitted on the out-of-fold lesions."""
    return f"{'temperatures' if content.task.decision == 'argmax' else 'thresholds'}, weights and stacker"
