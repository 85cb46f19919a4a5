"""Words that several sections share."""

from __future__ import annotations

from triderm_dist.config import mean_of_seeds
from triderm_dist.ensemble.run_files import STACKER
from triderm_dist.ensemble.thresholds import Rule
from triderm_dist.report.content import Content
from triderm_dist.runtime.messages import joined

RULES: dict[Rule, str] = {
    "any": "A diagnosis is predicted where its probability exceeds its threshold.",
    "at_least_one": "A diagnosis is predicted where its probability exceeds its threshold; if none does, the one with "
    "the largest ratio of probability to threshold.",
    "nearest": "One diagnosis is predicted for each lesion: the one whose probability is largest relative to its "
    "fitted threshold.",
}
"""The rules of `Ensemble.rule` in words."""

SCORED_DECISIONS = {
    "argmax": "most probable diagnosis",
    "fitted": "one diagnosis by fitted thresholds",
    "threshold": "each diagnosis with p > 0.5",
}
"""What the macro F1 of a decision counts as predicted; a challenge's metric is called official instead."""


def decision_rule(content: Content) -> str:
    """Return the sentence that says which diagnoses are predicted for a lesion."""
    if content.task.decision == "argmax":
        return "The most probable diagnosis of each lesion is predicted."
    return RULES[content.ensemble.rule]


def scored_decision(content: Content) -> str:
    """Return what the run's macro F1 counts as predicted."""
    return "official metric" if content.task.submission else SCORED_DECISIONS[content.task.decision]


def predicts_alone(content: Content) -> str:
    """Return the sentence that says which member, or which model's seeds, predict in place of the ensemble; "" where
    it predicts, and for runs of earlier versions and of a single network.
    """
    members, weighting = content.ensemble.members, content.ensemble.weighting
    if not content.fit.get("choice"):
        return ""
    if weighting == mean_of_seeds(members[0]):
        return f"The mean of the {len(members)} seeds of {members[0]} predicts alone."
    name = "The stacker" if weighting == STACKER else weighting
    return f"{name} predicts alone." if weighting in members else ""


def fitted_out_of_fold(content: Content) -> str:
    """Name what is fitted on the out-of-fold lesions."""
    decides = "temperatures" if content.task.decision == "argmax" else "thresholds"
    return joined([decides, "weights", *(["stacker"] if content.stacker else [])])
