"""Sentences for the methods of a paper: how the networks of a run were built and trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from triderm_dist.config import AugmentConfig, Experiment, ModelConfig
from triderm_dist.runtime.messages import joined
from triderm_dist.runtime.terminal import counted
from triderm_dist.schema import Task

KINDS = {
    "trimodal": "a tri-modal network (tokens of the dermoscopic photo attend to those of the clinical photo, then to "
    "concept scores and metadata, and are pooled by attention)",
    "dual_cnn": "a late-fusion network (mean tokens of each photo, concept scores and metadata, joined by an MLP)",
    "mlp": "a multilayer perceptron on principal components of each photo's mean token, concept scores and metadata",
}
"""The kinds of networks in words."""


def network_sentences(experiment: Experiment, networks: Sequence[str], task: Task) -> list[str]:
    """Return a sentence for each network of a run; those that differ in their seed only share one."""
    described: dict[str, list[str]] = {}
    for name in networks:
        if name in experiment.models:
            described.setdefault(_description(experiment.models[name], task), []).append(name)
    return [
        f"{'Network' if len(names) == 1 else 'Networks with different seeds'} {joined(names)}: {text}"
        for text, names in described.items()
    ]


def _description(model: ModelConfig, task: Task) -> str:
    train, tower = model.train, model.tower
    has = {*task.view_names, *(["metadata"] if task.fields else [])}
    has |= {"concepts"} if task.concepts.prefix or task.concepts.names else set()
    titles = {view.name: f"{view.label} photo" for view in task.views}
    titles |= {"concepts": "concept scores", "metadata": "metadata"}
    inputs = [titles[name] for name in model.use if name in has]
    weights = "pretrained" if tower.pretrained else "randomly initialized"
    trained = "frozen" if tower.frozen else "fine-tuned"
    size = f" at {tower.image_size} x {tower.image_size} pixels" if tower.image_size else ""
    loss = [
        f"{weight:g} x {name}"
        for name, weight in (
            (
                f"focal loss (gamma {train.loss.gamma:g})" if train.loss.gamma else "cross-entropy",
                train.loss.focal_weight,
            ),
            ("soft F1 loss of the whole batch", train.loss.soft_f1_weight),
            *((term, config.weight) for term, config in train.loss.terms.items()),
        )
        if weight
    ]
    if train.loss.aux_weight:
        loss.append(f"{train.loss.aux_weight:g} x the same of a classifier of each photo")
    kept = "the last epoch" if train.select == "last" else "the epoch with the best macro F1 on the held-out fold"
    average = ""
    if train.ema_decay:
        average = f", as an exponential moving average (decay {train.ema_decay:g})"
    elif train.swa_epochs:
        average = f", as the mean over the last {train.swa_epochs} epochs"
    return (
        f"{KINDS.get(model.kind, model.kind)} on {joined(inputs) or 'nothing'}, with a {weights}, {trained} encoder "
        f"({encoder_name(tower.source)}{size}); {train.epochs} epochs with {train.global_batch} lesions per step, "
        f"{train.optim.name} (learning rate {train.optim.lr:g}, weight decay {train.optim.weight_decay:g}, "
        f"{train.optim.schedule} schedule after {train.optim.warmup_epochs:g} warm-up epochs), "
        f"loss {' + '.join(loss)}, {_sampling(model)}, {_augmentation(model)}{_hidden(model, has)}; "
        f"weights of {kept}{average}."
    )


def encoder_name(source: str) -> str:
    """Return an encoder's name without the folders of a user."""
    kind, _, rest = source.partition(":")
    if kind == "hf-hub":
        return rest
    name, _, weights = rest.partition("@") if kind == "timm" else (PurePosixPath(rest or kind).name, "", "")
    return f"{name}, weights {PurePosixPath(weights).name}" if weights and "package:" not in weights else name


def _sampling(model: ModelConfig) -> str:
    sampling = model.train.sampling
    if sampling.kind != "balanced":
        return "lesions in random order"
    return f"diagnoses rarer than {sampling.threshold:g} of the lesions repeated with power {sampling.power:g}"


def _augmentation(model: ModelConfig) -> str:
    augment, cached = model.train.augment, model.tower.cached
    steps = [] if cached and not augment.token_variants else _photo_steps(augment)
    text = f"augmentation by {joined(steps)}" if steps else "no augmentation of photos"
    if steps and cached:
        text += f" in {counted(augment.token_variants, 'version')} of each photo"
    mixes = {"mixup": augment.mixup, "CutMix": augment.cutmix}
    return text + "".join(f", {name} ({value:g})" for name, value in mixes.items() if value)


def _photo_steps(augment: AugmentConfig) -> list[str]:
    steps = [f"crops of at least {augment.min_scale:g} of the area"] if augment.min_scale < 1 else []
    steps += ["flips and quarter turns"] if augment.dihedral else []
    steps += [f"rotation up to {augment.rotation:g} degrees"] if augment.rotation else []
    color = {name: getattr(augment, name) for name in ("brightness", "contrast", "saturation")}
    steps += [f"{name} within {value:g}" for name, value in color.items() if value]
    return [*steps, *augment.extra]


def _hidden(model: ModelConfig, has: set[str]) -> str:
    """Say which inputs the training hides at random."""
    augment = model.train.augment
    shares = {
        "clinical": ("the clinical photo", augment.clinical_dropout),
        "dermoscopic": ("the dermoscopic photo", augment.dermoscopic_dropout),
        "concepts": ("a concept score", augment.concept_dropout),
    }
    used = [(words, share) for name, (words, share) in shares.items() if share and name in has and name in model.use]
    return "".join(f", {words} hidden with probability {share:g}" for words, share in used)
