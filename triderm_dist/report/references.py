"""The works that a run rests on, as BibTeX: data, encoders, losses, training, statistics, libraries, guidelines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from triderm_dist.config import Experiment, ModelConfig
from triderm_dist.tasks import task_references

FILE = Path(__file__).with_name("references.bib")

ENCODERS: dict[str, tuple[str, ...]] = {
    "dermlip": ("derm1m", "clip"),
    "panderm": ("panderm",),
    "dinov2": ("dinov2",),
    "efficientnetv2": ("efficientnet_v2",),
    "efficientnet": ("efficientnet",),
    "convnext": ("convnext",),
    "swin": ("swin",),
    "resnet": ("resnet",),
    "vit": ("vit",),
}
"""Keys of the bibliography by a part of an encoder's name. Of two parts of which one holds the other, the longer
counts."""


def bibliography(keys: Sequence[str], task: str) -> str:
    """Return the entries of the data set of a shipped task, then those of the given keys in alphabetical order."""
    entries = _entries()
    return "\n\n".join(filter(None, [task_references(task), *(entries[key] for key in sorted(set(keys)))]))


def used_works(experiment: Experiment | None, networks: Sequence[str]) -> list[str]:
    """Return the keys of what a run used, as far as its settings say."""
    keys = {"tripod_ai", "claim_2024", "torch", "numpy"}
    keys |= {"temperature_scaling", "ensemble_selection", "confident_learning"}
    keys |= {"brown_2001", "zou_2008", "agresti_2000", "delong_1988", "newcombe_2006", "hanley_1982", "holm_1979"}
    keys |= {"mercaldo_2007", "vickers_2006", "boyd_2013"}
    if experiment is None:
        return sorted(keys)
    for name in networks:
        if name in experiment.models:
            keys |= set(_of_model(experiment.models[name]))
    if experiment.stack.enabled:
        keys |= {"stacking"} | ({"xgboost"} if experiment.stack.kind == "xgboost" else set())
    return sorted(keys)


def encoder_works(source: str) -> list[str]:
    """Return the keys of an encoder, by its name."""
    name = source.lower()
    parts = [part for part in ENCODERS if part in name]
    longest = [part for part in parts if not any(part != other and part in other for other in parts)]
    return [key for part in longest for key in ENCODERS[part]]


def _of_model(model: ModelConfig) -> Iterator[str]:
    train, source = model.train, model.tower.source
    yield from encoder_works(source)
    yield "timm" if source.startswith("timm:") else "open_clip"
    yield from (key for key, used in {
        "focal_loss": train.loss.focal_weight and train.loss.gamma,
        "label_smoothing": train.loss.label_smoothing,
        "logit_adjustment": train.loss.logit_adjustment,
        "repeat_factor_sampling": train.sampling.kind == "balanced",
        "mixup": train.augment.mixup,
        "cutmix": train.augment.cutmix,
        "stochastic_depth": model.tower.drop_path,
        "weight_averaging": train.swa_epochs,
        "adamw": train.optim.name == "adamw",
        "cosine_schedule": train.optim.schedule == "cosine",
    }.items() if used)  # fmt: skip


@cache
def _entries() -> dict[str, str]:
    """Return the entries of `FILE` by key."""
    text = FILE.read_text(encoding="utf-8")
    return {match[1]: match[0] for match in re.finditer(r"^@\w+\{(\w+),.*?^\}", text, re.M | re.S)}
