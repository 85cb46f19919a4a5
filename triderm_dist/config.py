"""The settings of a run, as one typed tree; settings.py parses, validates and describes such trees.

`Experiment` is the tree. A program adds settings of its own in a subclass, and declares in `uses` which settings of the
experiment have an effect on it; programs that need no experiment declare a smaller `Section`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import Field, field_validator, model_validator
from pydantic_core import to_jsonable_python

from triderm_dist.files import why_no_folder, write_text
from triderm_dist.runtime.messages import one_line, quoted
from triderm_dist.runtime.redact import redact_tree, restore_urls
from triderm_dist.schema import ConfigError
from triderm_dist.settings import (
    NULL,
    PathText,
    Plain,
    Section,
    SourceText,
    Tree,
    describe,
    merge,
    read_mapping,
    read_override,
    typed,
    validate,
)

MAX_SEED = 2**53
"""Every generator takes this seed, and JSON holds it exactly."""
MAX_BATCH = 2**20
"""Lesions: far more than a step needs, and their photos than a device holds."""
MAX_SECONDS = 1e9
"""Thirty years; what waits overflows somewhere above it."""


class RemoteConfig(Section):
    """Shards behind a URL: data.shards and data.test_shards may be s3://, gs://, hf://, https:// or any fsspec URL."""

    cache: PathText | None = Field(
        None,
        description="folder of the node's shard cache, shared by its ranks; default triderm-dist/shards in "
        "$XDG_CACHE_HOME or ~/.cache",
    )
    cache_gb: float = Field(
        100.0,
        gt=0,
        description="size limit of that folder in GB (1e9 bytes); least recently used shards are evicted first",
    )
    downloads: int = Field(8, ge=1, description="parallel downloads per node")
    total_seconds: float = Field(
        600.0,
        gt=0,
        le=MAX_SECONDS,
        description="seconds for one shard, retries included, before the run ends with an error",
    )
    stall_seconds: float = Field(
        30.0, gt=0, le=MAX_SECONDS, description="seconds without a byte before a download is retried"
    )
    allow_commands: bool = Field(
        False,
        description="allow pipe:COMMAND URLs, in which {} is the file name; the commands run on every node, "
        "without a shell",
    )


class ExtraSetConfig(Section):
    """A packed set whose lesions join training; docs/training.md explains what is matched and how."""

    shards: PathText = Field(description="packed shards of an extra set, a folder or a URL")
    map: dict[str, str | None] = Field(
        description="diagnosis of the training set's task by diagnosis of the extra set's; null leaves lesions out"
    )
    weight: float = Field(1.0, ge=0, description="weight of the loss of an extra lesion; 0 leaves the set out")
    overlap: Literal["refuse", "drop"] = Field(
        "refuse",
        description="lesions of an extra set with a photo of the training or test set: refuse the set, or leave them "
        "out",
    )


MissingView = Annotated[
    Literal["refuse", "mark"],
    Field(description="lesions with one of two photos: refuse the folder, or mark the other view as missing"),
]
Invalid = Annotated[
    Literal["refuse", "drop"],
    Field(
        description="lesions with an invalid row or an unreadable photo: refuse the folder, or drop and count them",
    ),
]
Groups = Annotated[
    Literal["hash", "plain"],
    Field(
        description="ids of groups, such as patients, in packed sets: hashes under a secret salt, which "
        "SHARDS.groups.csv keeps with the ids, or as they are"
    ),
]
Threads = Annotated[int | None, Field(ge=1, description="threads; null takes one per core")]


class DataConfig(Section):
    source: PathText | None = Field(None, description="folder with photos and a table, or that table")
    test: PathText | None = Field(
        None,
        description="folder of the test set, which triderm pipeline packs and predicts; labels are optional",
    )
    task: PathText | None = Field(
        None,
        description="task.yaml, or the name of a shipped task, by which both folders are read; default task.yaml in "
        "data.source, else milk10k where it has that layout",
    )
    shards: PathText | None = Field(
        None, description="packed training shards, a folder or a URL; default OUTPUT/shards/train"
    )
    test_shards: PathText | None = Field(
        None, description="packed test shards, a folder or a URL; default OUTPUT/shards/test"
    )
    test_truth: PathText | None = Field(
        None, description="ground truth of the test set, to score the submission; null where it is unknown"
    )
    folds: int = Field(5, ge=2, description="number of cross-validation folds")
    fold_seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of the fold assignment")
    short_side: int | None = Field(
        288, ge=32, description="short side in pixels to which packing reduces photos; null keeps their size"
    )
    groups: Groups = "hash"
    missing_view: MissingView = "refuse"
    invalid: Invalid = "refuse"
    verify: bool = Field(
        True,
        description="check the checksums of the shards before work starts; those of a URL are checked after "
        "download in any case",
    )
    workers: int = Field(2, ge=1, description="decoder threads per rank")
    prefetch: int = Field(4, ge=1, description="micro-batches to decode ahead")
    remote: RemoteConfig = RemoteConfig()
    extra: tuple[ExtraSetConfig, ...] = Field(
        (), description="other packed sets whose lesions join training, and training only"
    )

    @property
    def extra_sets(self) -> dict[str, ExtraSetConfig]:
        """The extra sets with a weight, by the name of their setting."""
        return {f"data.extra.{number}": each for number, each in enumerate(self.extra) if each.weight}


class SamplingConfig(Section):
    kind: Literal["shuffle", "balanced"] = Field(
        "balanced", description="order of an epoch: a plain shuffle, or one in which rare diagnoses are repeated"
    )
    threshold: float = Field(
        0.1, gt=0, le=1, description="balanced: repeat diagnoses rarer than this share of the lesions"
    )
    power: float = Field(0.5, ge=0, le=1, description="balanced: repeat factor is (threshold / share) ** power")
    window: int | None = Field(
        None,
        ge=1,
        description="lesions per shuffle window, for reading shard by shard; null shuffles the epoch as a whole",
    )
    last: Literal["pad", "drop"] = Field(
        "pad", description="an incomplete last global batch: pad it with masked lesions, or drop it"
    )


class AugmentConfig(Section):
    min_scale: float = Field(0.7, gt=0, le=1, description="smallest share of a photo's area that a random crop keeps")
    dihedral: bool = Field(True, description="random flips and quarter turns")
    rotation: float = Field(15.0, ge=0, le=180, description="random rotation up to this many degrees")
    brightness: float = Field(0.15, ge=0, le=1, description="brightness factor within 1 +- this")
    contrast: float = Field(0.15, ge=0, le=1, description="contrast factor within 1 +- this")
    saturation: float = Field(0.15, ge=0, le=1, description="saturation factor within 1 +- this")
    aspect: float = Field(0.0, ge=0, le=1, description="ratio of a crop's sides, as a factor of up to 1 + this")
    clinical_strength: float = Field(
        1.0,
        ge=0,
        description="multiple of the strength of crop, rotation, aspect, brightness, contrast and saturation for the "
        "clinical photo",
    )
    tied_views: bool = Field(False, description="use the same geometric augmentation for both photos of a lesion")
    clinical_dropout: float = Field(0.2, ge=0, lt=1, description="probability that the clinical view is hidden")
    dermoscopic_dropout: float = Field(0.0, ge=0, lt=1, description="probability that the dermoscopic view is hidden")
    concept_dropout: float = Field(0.1, ge=0, lt=1, description="probability that one concept score is hidden")
    token_variants: int = Field(
        0,
        ge=0,
        le=16,
        description="frozen towers and cache_frozen_blocks: augmented versions of each photo in the cache, in addition "
        "to the plain one",
    )
    mixup: float = Field(
        0.0,
        ge=0,
        description="mix every lesion with another one of the batch, targets included; the share is drawn from "
        "Beta(mixup, mixup), such as 0.4; 0 mixes none",
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        description="put a box of another lesion's photos into those of every lesion, its area drawn from "
        "Beta(cutmix, cutmix), such as 1; with mixup half of the lesions by each",
    )
    unmixed_epochs: int = Field(3, ge=0, description="last epochs without mixup and cutmix")
    extra: dict[str, dict[str, Any]] = Field(
        {},
        description="more augmentations by name, each with its own settings: hue, blur, noise, cutout and those of "
        "plugins; applied after geometry and color, in alphabetical order",
    )

    OTHER_KEYS: ClassVar[frozenset[str]] = frozenset(
        {
            *("clinical_dropout", "dermoscopic_dropout", "concept_dropout", "token_variants"),
            *("mixup", "cutmix", "unmixed_epochs"),
        }
    )
    """Settings that do not change the pixels of an augmented photo."""

    @property
    def mixes(self) -> bool:
        """Whether lesions are mixed with one another."""
        return self.mixup > 0 or self.cutmix > 0

    @classmethod
    def pixel_keys(cls) -> list[str]:
        """Return the settings that change pixels, and with them the tokens of a frozen tower."""
        return [name for name in cls.model_fields if name not in cls.OTHER_KEYS]


Frame = Literal["square", "whole", "squash"]


class LoraConfig(Section):
    rank: int = Field(ge=1, description="rank of the trained update of each frozen matrix")
    alpha: float = Field(16.0, gt=0, description="the update is multiplied by alpha / rank")
    targets: tuple[Literal["attention", "mlp"], ...] = Field(
        ("attention", "mlp"), min_length=1, description="matrices of a block: those of attention, of the MLP, or both"
    )


class TowerConfig(Section):
    source: SourceText = Field(
        "hf-hub:redlessone/DermLIP_ViT-B-16",
        description="hf-hub:ID, local-dir:PATH, a PanDerm checkpoint file, timm:NAME, or timm:NAME@WEIGHTS_FILE",
    )
    pretrained: bool = Field(True, description="load pretrained weights; false initializes at random")
    image_size: int | None = Field(
        None, ge=32, le=2**14, description="side of the input in pixels; null uses the tower's default"
    )
    frame: Frame = Field(
        "square",
        description="the part of a photo that the tower gets without augmentation: its centered square, the whole "
        "photo with "
        "its short sides continued by mirroring, or the whole photo squashed to a square",
    )
    quick_gelu: bool | None = Field(
        None, description="open_clip ViT: force QuickGELU on or off; null follows the checkpoint's config"
    )
    drop_path: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="probability that training drops a residual branch of the last unit, for a lesion; it falls "
        "linearly to 0 in the first unit. null keeps that of the architecture, mostly 0",
    )
    shared: bool = Field(False, description="use one tower for both views")
    frozen: bool = Field(False, description="freeze the tower completely; its tokens are computed once and cached")
    freeze_clinical: int = Field(6, ge=0, description="number of leading blocks of the clinical tower to freeze")
    freeze_dermoscopic: int = Field(4, ge=0, description="number of leading blocks of the dermoscopic tower to freeze")
    lora: LoraConfig | None = Field(
        None,
        description="train only low-rank updates of the matrices of the blocks that are not frozen (LoRA); null "
        "trains all their weights",
    )
    token_dtype: Literal["float16", "bfloat16", "int8"] = Field(
        "float16",
        description="storage of cached tokens and of the cached output of frozen blocks; int8 takes about half the "
        "space, with a scale for every few numbers",
    )
    cache_frozen_blocks: bool = Field(
        False,
        description="compute the output of the frozen blocks once, in train.augment.token_variants augmented versions, "
        "and train the other blocks on it",
    )

    @property
    def cached(self) -> bool:
        """Whether training reads what was computed once from the photos instead of the photos."""
        return self.frozen or self.cache_frozen_blocks

    @model_validator(mode="after")
    def _some_blocks_are_frozen(self) -> TowerConfig:
        if self.cache_frozen_blocks and not self.frozen and not (self.freeze_clinical and self.freeze_dermoscopic):
            raise ValueError("cache_frozen_blocks: set freeze_clinical and freeze_dermoscopic to at least 1")
        if self.lora and self.frozen:
            raise ValueError("lora: has no effect on a frozen tower; remove it, or set frozen=false")
        return self


class TermConfig(Section):
    weight: float = Field(ge=0, description="weight of the term")
    settings: dict[str, Any] = Field({}, description="settings of the term itself, such as {epsilon: 1.0}")


class LossConfig(Section):
    focal_weight: float = Field(0.5, ge=0, description="weight of the focal (or cross-entropy) term")
    soft_f1_weight: float = Field(0.5, ge=0, description="weight of the soft F1 term")
    terms: dict[str, TermConfig] = Field(
        {}, description="more terms, by name; plugins add them to triderm_dist.losses.LOSS_TERMS"
    )
    aux_weight: float = Field(0.3, ge=0, description="weight of the losses of the auxiliary heads, one per view")
    fine_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the cross-entropy of an auxiliary head for the task's finer labels (`fine`), which "
        "exists in training only",
    )
    gamma: float = Field(2.0, ge=0, description="focal exponent; 0 is plain cross-entropy")
    alpha: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="sigmoid head: weight of positives, with 1 - alpha for negatives; null weights both by 1",
    )
    class_weight_power: float = Field(
        0.0,
        ge=0,
        le=1,
        description="the weight of a lesion is share of its diagnosis ** -power, scaled to mean 1 over the training "
        "lesions, so the weight of the term stays; 0 weights all equally",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target that is spread over all diagnoses")
    logit_adjustment: float = Field(
        0.0, ge=0, description="softmax head: tau of the training-time adjustment logits + tau * log(prior)"
    )
    soft_f1_sums: Literal["exact", "previous"] = Field(
        "exact",
        description="soft F1 and other ratios of sums under gradient accumulation: sums of the global batch by a first "
        "pass without gradients, or those of the step before (cheaper, biased)",
    )

    USED_WITH: ClassVar[dict[str, tuple[str, ...]]] = {
        "focal_weight": ("gamma", "alpha", "class_weight_power", "label_smoothing")
    }
    """Settings that have an effect only where the weight of their term is not 0."""


class OptimConfig(Section):
    name: str = Field("adamw", description="optimizer; plugins add others to triderm_dist.optim.OPTIMIZERS")
    settings: dict[str, Any] = Field(
        {}, description="keyword arguments of the optimizer, such as {momentum: 0.9}, besides lr and weight_decay"
    )
    schedule: str = Field(
        "cosine", description="learning rate after the warm-up; plugins add others to triderm_dist.optim.SCHEDULES"
    )
    lr: float = Field(1e-4, gt=0, description="learning rate of heads and fusion, before `head_lr_multiple`")
    head_lr_multiple: float = Field(
        1.0,
        gt=0,
        description="multiple of `lr` for everything after the towers; the towers keep `lr` with `layer_decay`",
    )
    layer_decay: float = Field(
        0.9, gt=0, le=1, description="factor of the learning rate per block, from the heads towards the input"
    )
    weight_decay: float = Field(0.05, ge=0, description="weight decay of matrices; vectors and embeddings have none")
    min_lr: float = Field(1e-7, ge=0, description="learning rate at the end of the schedule")
    warmup_epochs: float = Field(
        3.0, ge=0, description="epochs of linear warm-up of the learning rate, counted in optimizer steps"
    )
    unfreeze_epochs: float = Field(
        0.0,
        ge=0,
        description="gradual unfreezing: the last tower block starts to train after so many epochs, the one before it "
        "after twice as many, and so on; until then only what comes after it is trained",
    )
    clip_norm: float = Field(1.0, gt=0, description="largest gradient norm, to which gradients are clipped")


class TrainConfig(Section):
    epochs: int = Field(60, ge=1, description="number of epochs")
    global_batch: int = Field(
        96, ge=1, le=MAX_BATCH, description="lesions per optimizer step, over all ranks and accumulation steps"
    )
    micro_batch: int = Field(
        16, ge=1, le=MAX_BATCH, description="lesions per forward pass and rank; the accumulation steps follow from it"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="compute precision; auto: bf16 where the GPU supports it, fp16 on older GPUs; on a CPU bf16 where "
        "a step is measured to be faster, else fp32",
    )
    gradient_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="precision in which ranks add up their gradients; bf16 sends half of the bytes and rounds each sum "
        "(docs/clusters.md says where that pays)",
    )
    bucket_mb: float = Field(
        25.0, gt=0, description="DDP: MiB of gradients that ranks add up while the backward pass computes further ones"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass to save memory"
    )
    compile: bool = Field(False, description="torch.compile tower blocks, fusion, heads and losses")
    graph: Literal["auto"] | bool = Field(
        "auto",
        description="on a GPU, launch each training step as one CUDA graph; auto: in one process and DDP with bf16 or "
        "fp32, true: the run fails where that cannot work",
    )
    deterministic: bool = Field(
        False,
        description="on a GPU, only algorithms that give the same numbers each time, so that a resumed training equals "
        "an undisturbed one bit for bit on the same hardware and versions; slower. On a CPU it always does",
    )
    log_every: int = Field(10, ge=1, description="optimizer steps between log lines")
    save_every: int | None = Field(
        None,
        ge=1,
        description="optimizer steps between checkpoints within an epoch; null saves at the end of each epoch only",
    )
    save_every_seconds: float | None = Field(
        None,
        ge=0,
        description="seconds between checkpoints, at log lines and ends of epochs, instead of one at the end of each "
        "epoch; for epochs of seconds",
    )
    keep_last: int = Field(2, ge=1, description="number of resumable checkpoints to keep during a training")
    keep_checkpoints: bool = Field(
        False,
        description="keep the checkpoints, with the state of the optimizer, of finished folds too; predicting needs "
        "only their weights",
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay per step of the averaged weights (EMA), such as 0.999, which are then validated and kept; 0 "
        "uses no average; not with DeepSpeed",
    )
    swa_epochs: int = Field(
        0,
        ge=0,
        description="number of last epochs over whose final weights to average (stochastic weight averaging), which "
        "are then validated and kept; 0 uses none; not with DeepSpeed, nor with ema_decay",
    )
    validate_every: int = Field(
        1, ge=1, description="epochs between two validations, the last epoch is always validated; a search uses 1"
    )
    select: Literal["best", "last"] = Field(
        "last",
        description="weights to keep: of the last epoch, or of that with the best validation macro F1, which biases "
        "out-of-fold scores upwards (the report then says so)",
    )
    trackers: tuple[str, ...] = Field(
        ("tensorboard",),
        description="where metrics go in addition to metrics.jsonl: tensorboard, wandb, mlflow or another tracker of "
        "Accelerate",
    )
    tracker_settings: dict[str, dict[str, Any]] = Field(
        {},
        description="arguments of trackers by name, such as {wandb: {project: skin, entity: lab, group: night, tags: "
        "[a]}, mlflow: {experiment_name: skin}}; before WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME and the like",
    )
    profile: int | None = Field(
        None,
        ge=1,
        description="optimizer steps for torch.profiler to record into the fold's trace.json; null records none",
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="dense peak of one device in TFLOP/s, for MFU; null looks the GPU up by name",
    )
    sampling: SamplingConfig = SamplingConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()

    @property
    def averages(self) -> bool:
        """Whether the training keeps an average of the weights."""
        return self.ema_decay > 0 or self.swa_epochs > 0

    @property
    def smallest_micro_batch(self) -> int:
        """The size of which every micro-batch must be a multiple: a pair where lesions are mixed."""
        return 2 if self.augment.mixes else 1

    @model_validator(mode="after")
    def _pairs_fit_into_micro_batches(self) -> TrainConfig:
        if self.micro_batch % self.smallest_micro_batch:
            raise ValueError(f"mixup and cutmix take pairs of lesions: micro_batch {self.micro_batch} must be even")
        return self

    @model_validator(mode="after")
    def _one_average(self) -> TrainConfig:
        if self.swa_epochs and self.ema_decay:
            raise ValueError("ema_decay and swa_epochs are two averages of the weights; set one to 0")
        if self.swa_epochs > self.epochs:
            raise ValueError(f"swa_epochs {self.swa_epochs} is more than epochs {self.epochs}")
        return self


COSMETIC = (
    *("log_every", "save_every", "save_every_seconds", "keep_last", "keep_checkpoints", "trackers"),
    *("tracker_settings", "profile", "peak_tflops", "graph", "deterministic", "bucket_mb"),
)
"""Settings of `train` that change no result, or only its rounding on a GPU or several ranks."""
EXECUTION = ("micro_batch", "precision", "gradient_precision", "activation_checkpointing", "compile")
"""Settings of `train` that change how a step is computed; a training may resume with other values."""


class ExtraTowerConfig(Section):
    init: PathText = Field(
        description="trained network whose tower is taken, as `models.NAME.init` names it: RUN, RUN/MODEL or "
        "RUN/MODEL/fold-K"
    )
    logits: bool = Field(
        False,
        description="also the log-probabilities of diagnoses from the auxiliary heads of that network; for a "
        "network that reads mean tokens, such as dual_cnn and mlp",
    )


class ModelConfig(Section):
    kind: str = Field("trimodal", description="network: trimodal, dual_cnn, mlp, or one that a plugin adds")
    settings: dict[str, Any] = Field(
        {}, description="the network's own settings, as its class defines them: {components: 96} of mlp"
    )
    seeds: int = Field(
        1,
        ge=0,
        le=100,
        description="trainings that differ in their seed: the models NAME, NAME-s1, NAME-s2, ..., each a member of "
        "the ensemble; 0 marks those after NAME where all models are listed",
    )
    tower: TowerConfig = TowerConfig()
    init: PathText | None = Field(
        None,
        description="start from the weights of another run: RUN, RUN/MODEL, RUN/MODEL/fold-K or RUN/MODEL/refit, where "
        "RUN is a folder, a zip file or hf-hub:USER/NAME; weights that do not fit are initialized",
    )
    extra_towers: tuple[ExtraTowerConfig, ...] = Field(
        (),
        description="frozen towers of other runs in addition to `tower`, for networks that read mean tokens (mlp, "
        "dual_cnn): "
        "they get the concatenated mean tokens of all, mlp with principal components of each",
    )
    width: int = Field(768, ge=8, le=2**20, description="fusion width D")
    heads: int = Field(8, ge=1, description="attention heads of the fusion")
    depth: int = Field(1, ge=1, le=1000, description="trimodal: number of fusion blocks")
    fusion: tuple[Literal["view_alignment", "semantic_gating"], ...] = Field(
        ("view_alignment", "semantic_gating"),
        min_length=1,
        description="trimodal: stages of a fusion block, always in this order; for ablations",
    )
    mlp_ratio: float = Field(4.0, gt=0, le=1000, description="hidden width of the fusion's MLPs as a multiple of D")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout in fusion and heads")
    head: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="softmax: one diagnosis per lesion; sigmoid: independent diagnoses"
    )
    use: tuple[Literal["clinical", "dermoscopic", "concepts", "metadata"], ...] = Field(
        ("clinical", "dermoscopic", "concepts", "metadata"),
        description="modalities that the network uses, if the task has them; the others are treated as missing, in "
        "training and prediction",
    )
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width * self.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio:g} of width {self.width} leaves no hidden unit; raise it")
        if self.tower.cache_frozen_blocks and not self.tower.frozen and self.train.augment.cutmix:
            raise ValueError("cutmix mixes pixels, and with tower.cache_frozen_blocks there are none; use mixup")
        if self.extra_towers and not self.tower.frozen:
            raise ValueError("extra_towers stand beside a frozen tower; set tower.frozen")
        if self.head == "sigmoid" and self.train.loss.logit_adjustment:
            raise ValueError("logit_adjustment works with head=softmax only")
        if self.head == "softmax" and self.train.loss.alpha is not None:
            raise ValueError("alpha works with head=sigmoid only")
        return self


class StackConfig(Section):
    enabled: bool = Field(True, description="fit a stacker on the out-of-fold rows")
    kind: str = Field("xgboost", description="stacker; plugins may add others")
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="settings of a stacker of another kind; those of XGBoost are booster to device",
    )
    booster: Literal["softprob", "multi_output"] = Field(
        "softprob", description="one multi-class booster, or multi-output trees"
    )
    max_depth: int = Field(2, ge=1, description="depth of a tree")
    learning_rate: float = Field(0.2, gt=0, description="shrinkage of a tree")
    max_rounds: int = Field(600, ge=1, description="maximum number of boosting rounds")
    early_stopping: int = Field(15, ge=1, description="boosting stops after this many rounds without improvement")
    subsample: float = Field(0.8, gt=0, le=1, description="share of the rows sampled for each tree")
    colsample_bytree: float = Field(0.5, gt=0, le=1, description="share of the columns sampled for each tree")
    min_child_weight: float = Field(1.0, ge=0, description="minimum total weight of the rows in a leaf")
    reg_lambda: float = Field(2.0, ge=0, description="L2 penalty on the leaves")
    class_weight_power: float = Field(0.5, ge=0, le=1, description="weight of a row: share of its diagnosis ** -power")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device of XGBoost; auto uses a GPU, if there is one, from 20 million cells on"
    )
    max_rows: int | None = Field(
        20_000,
        ge=1000,
        description="lesions that one fit takes at most; of more a sample, of each diagnosis by the square root of its "
        "number, weighted accordingly. null: all, in XGBoost's external memory above memory_gb",
    )
    memory_gb: float = Field(8.0, gt=0, description="GiB of columns above which they are streamed from a parquet file")
    extra: tuple[Literal["embeddings", "features"], ...] = Field(
        (),
        description="additional columns, kept only if they improve the nested estimate: embeddings of the "
        "pretrained tower without training (written by triderm embed), fused features aligned to one basis (needs "
        "test predictions of "
        "every fold: triderm predict submit=false). triderm pipeline runs both",
    )
    components: int = Field(
        32, ge=1, description="principal components that additional columns are reduced to in each fit"
    )


class EnsembleConfig(Section):
    members: tuple[str, ...] | None = Field(
        None, min_length=1, description="models to combine; null: all of the out-of-fold table"
    )
    use: str = Field(
        "auto",
        min_length=1,
        description="what predicts: ensemble, the name of one member (stack is the stacker), or auto: the best network "
        "unless the ensemble beats it beyond the noise",
    )
    rounds: int = Field(30, ge=1, description="rounds of greedy selection of weights")
    shrinkage: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = Field(
        "auto", description="shrinkage of thresholds toward the pooled one, in positives; auto: by inner folds"
    )
    bootstrap: int = Field(
        1000,
        ge=10,
        description="bootstrap resamples of the lesions for intervals of differences and of other metrics than F1",
    )

    @field_validator("members")
    @classmethod
    def _each_once(cls, members: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if members and len(set(members)) < len(members):
            raise ValueError("a model is named twice")
        return members


class OofConfig(Section):
    tta: Literal[1, 2, 4, 8] = Field(
        1,
        description="number of transforms of the dihedral group to average out-of-fold predictions over; with that of "
        "predict.transforms, stacker, thresholds and estimate are fitted on the kind of prediction they are used on",
    )


class PredictConfig(Section):
    transforms: Literal[1, 2, 4, 8] = Field(
        8, description="number of test-time transforms of the dihedral group to average over"
    )
    batch: int = Field(64, ge=1, le=MAX_BATCH, description="lesions per forward pass")


class ReportConfig(Section):
    photos: bool = Field(
        True,
        description="show photos of the hardest, doubtful and typical lesions; false leaves pictures of patients out",
    )
    attention: bool = Field(
        True,
        description="show the attention of the first tri-modal network next to these photos; runs it once per lesion",
    )


TRAINING = (
    *("plugins", "output", "seed", "token_seed", "tokens", "rank_timeout", "train", "models", "oof"),
    *("data.shards", "data.test_shards", "data.extra", "data.folds", "data.fold_seed", "data.verify", "data.workers"),
    *("data.prefetch", "data.remote"),
)
"""The settings that have an effect on training, as `Experiment.uses` lists them."""


def slice_of(text: str | None) -> tuple[int, int] | None:
    """Return K and N of the setting slice=K/N, None if it is not given. Raises ConfigError for another text."""
    if text is None:
        return None
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise ConfigError(f"slice={text}: write K/N for the K-th of N slices, such as 1/8")
    return int(number), int(of)


class Extensible(Section):
    """Settings of a program that plugins can extend."""

    plugins: tuple[str, ...] = Field(
        (),
        description="Python files or modules that are imported first and add networks, losses, optimizers, metadata "
        "fields and the like to the library's tables; docs/extending.md has recipes",
    )

    @field_validator("plugins")
    @classmethod
    def _locate_plugins(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Make the paths of files absolute, so that processes with another working directory find them."""
        return tuple(str(Path(name).expanduser().absolute()) if name.endswith(".py") else name for name in names)


_MODEL_NAME = re.compile(r"\w[\w.+-]{0,63}")
DEFAULT_MODEL = "trimodal"
"""The model of settings that name none."""
RESERVED_MODELS = frozenset(
    (
        *("stack", "mean", "fitted", "chosen", "ensemble", "auto"),
        *("shards", "tokens", "towers", "refit", "report", "search", "explain", "data", "test", "oof"),
        "learning_curve",
    )
)
"""Names that no model may have: members and rows of an ensemble, and files and folders of a run."""


def seed_names(name: str, seeds: int) -> list[str]:
    """Return the names of the trainings of a model with several seeds: NAME, NAME-s1, NAME-s2, ..."""
    return [name, *(f"{name}-s{number}" for number in range(1, seeds))]


def with_seeds(models: Mapping[str, ModelConfig]) -> dict[str, ModelConfig]:
    """Return the models, each followed by NAME-s1, NAME-s2, ... where it has several seeds; earlier ones are replaced.

    Raises ValueError if one of these names is that of another model.
    """
    result = {}
    for name, model in models.items():
        if not model.seeds:
            continue
        result[name] = model
        for further in seed_names(name, model.seeds)[1:]:
            if further in models and models[further].seeds:
                raise ValueError(f"{further!r} is a model, and the name of a further seed of {name!r}; rename one")
            result[further] = model.model_copy(update={"seeds": 0})
    if alone := sorted(set(models) - set(result)):
        base = models.get(alone[0].rpartition("-s")[0])
        if base is None or not base.seeds:
            raise ValueError(f"{alone[0]}.seeds: write 1 or more")
    return result


def check_model_names(names: Iterable[str]) -> None:
    """Raise ValueError for a name of a model that its folder, or a table of results, cannot have."""
    known: dict[str, str] = {}
    for name in names:
        if not _MODEL_NAME.fullmatch(name):
            wanted = "up to 64 letters, digits and _ . + -, the first a letter or a digit"
            raise ValueError(f"a model can't be named {quoted(name)}; write {wanted}")
        if name.lower() in RESERVED_MODELS or re.fullmatch(r"fold-\d+", name):
            raise ValueError(f"a model can't be named {name!r}, which a run uses otherwise; rename it")
        if (other := known.setdefault(name.lower(), name)) != name:
            raise ValueError(f"the models {other!r} and {name!r} differ in case only; rename one")


class Experiment(Extensible):
    """The settings of a run."""

    uses: ClassVar[tuple[str, ...] | None] = None
    """Keys and sections of the experiment that affect a program; None means all."""

    output: PathText = Field("runs/default", description="folder of the run")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of initial weights, order of lesions and augmentation")
    token_seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="seed of the augmented tokens of frozen towers; null takes `seed`"
    )
    tokens: PathText | None = Field(
        None, description="folder of the token cache of frozen towers; default OUTPUT/tokens"
    )
    rank_timeout: float = Field(
        600.0,
        gt=0,
        le=MAX_SECONDS,
        description="seconds that ranks wait for one that does not answer, before the run ends as interrupted; "
        "raise it where rank 0 checks very large shards (data.verify)",
    )
    data: DataConfig = DataConfig()
    train: TrainConfig = Field(
        TrainConfig(), description="training settings of all models; models.NAME.train overrides them"
    )
    models: dict[str, ModelConfig] = Field(
        default_factory=lambda: {DEFAULT_MODEL: ModelConfig()}, min_length=1, description="the networks, by name"
    )
    oof: OofConfig = OofConfig()
    stack: StackConfig = StackConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    predict: PredictConfig = PredictConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="before")
    @classmethod
    def _drop_former_settings(cls, raw: Any) -> Any:
        """Accept config files of runs made when every program had an (empty) `explain`."""
        if isinstance(raw, Mapping) and "explain" not in cls.model_fields and raw.get("explain") == []:
            return {key: value for key, value in raw.items() if key != "explain"}
        return raw

    @model_validator(mode="before")
    @classmethod
    def _share_train_settings(cls, raw: Any) -> Any:
        """Merge `train` under each `models.NAME.train`, of the default model too."""
        if not isinstance(raw, Mapping):
            return raw
        shared, named = raw.get("train") or {}, raw.get("models", {DEFAULT_MODEL: {}})
        if not isinstance(shared, Mapping) or not isinstance(named, Mapping):
            return raw
        models = {
            name: {**model, "train": merge(shared, model.get("train") or {})}
            if isinstance(model, Mapping) and isinstance(model.get("train") or {}, Mapping)
            else model
            for name, model in named.items()
        }
        return {**raw, "models": models}

    @field_validator("models")
    @classmethod
    def _check_names(cls, models: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
        models = with_seeds(models)
        check_model_names(models)
        return models

    @property
    def writes(self) -> bool:
        """Whether the program writes into OUTPUT."""
        return True

    @property
    def is_stage(self) -> bool:
        """Whether environment.json of the run records the program."""
        return False

    @property
    def log_folder(self) -> Path | None:
        """The folder whose log.txt gets what the program prints; None for a program that keeps no log."""
        return self.folder if self.is_stage else None

    @property
    def folder(self) -> Path:
        return Path(self.output)

    @property
    def token_folder(self) -> Path:
        """The folder of the token cache; that of the user where the run is read-only."""
        own = Path(self.tokens or self.folder / "tokens")
        return own if is_writable(own) else cache_folder() / "tokens"

    @property
    def seed_of_tokens(self) -> int:
        return self.seed if self.token_seed is None else self.token_seed

    def seed_of(self, model: str) -> int:
        """Return the seed of a model's initial weights, order of lesions and augmentation."""
        return self.seed + (0 if self.models[model].seeds else int(model.rpartition("-s")[2]))

    def without_idle_settings(self, model: str) -> Experiment:
        """Return the experiment in which settings that have no effect on a model's training are not given: `token_seed`
        equal to `seed`, which null takes, and `validate_every` where no weights are selected by a score.
        """
        changes: dict[str, Any] = {"token_seed": None} if self.token_seed == self.seed else {}
        config = self.models[model]
        if config.train.select == "last" and config.train.validate_every != 1:
            train = config.train.model_copy(update={"validate_every": 1})
            changes["models"] = {**self.models, model: config.model_copy(update={"train": train})}
        return self.model_copy(update=changes) if changes else self

    @property
    def train_shards(self) -> str:
        """A folder or a URL."""
        return self.data.shards or str(self.folder / "shards" / "train")

    @property
    def test_shards(self) -> str:
        """A folder or a URL."""
        return self.data.test_shards or str(self.folder / "shards" / "test")

    @property
    def experiment(self) -> Experiment:
        """The settings of the experiment without those that a program adds."""
        return Experiment(**self.model_dump(include=set(Experiment.model_fields)))

    def fold_folder(self, model: str, fold: int) -> Path:
        """Return OUTPUT/MODEL/fold-K."""
        return self.folder / model / f"fold-{fold}"

    def refit_folder(self, model: str) -> Path:
        """Return OUTPUT/refit/MODEL."""
        return self.folder / "refit" / model


class RunReader(Experiment):
    """Settings of a program that reads a run and may write its results elsewhere: `run=RUN output=FOLDER`."""

    run: PathText | None = Field(None, description="folder of the run to read; null: OUTPUT")
    output: PathText = Field("runs/default", description="folder for the results; with run=RUN, RUN by default")

    @property
    def folder(self) -> Path:
        return Path(self.run or self.output)

    @property
    def results(self) -> Path:
        return Path(self.output)

    @property
    def experiment(self) -> Experiment:
        return super().experiment.model_copy(update={"output": str(self.folder)})


Networks = Literal["folds", "refit"]
"""The networks of a model that predict other lesions than those of training: those of all folds, whose outputs are
averaged, or the one that was refitted on all labeled lesions.
"""

RunTree = TypeVar("RunTree", bound=Experiment)

PARALLEL_FOLDS_KEYS = ("cpus", "gpus", "retries", "address")
"""Settings of parallel folds."""
RAY_KEYS = ("gpus", "address")
"""Those that have effect with parallel_folds=true only."""


class ParallelFoldsRun(Experiment):
    """An experiment whose folds may be trained in parallel."""

    parallel_folds: bool | Literal["auto"] = Field(
        "auto",
        description="train folds in parallel, each in one process: auto does so where there is no GPU and several "
        "cores, true by Ray, on GPUs or a cluster; false trains one after the other",
    )
    cpus: int | None = Field(
        None,
        ge=1,
        description="parallel_folds: CPU cores and threads per fold; null: with auto the cores divided by the number "
        "of trainings, with true 1",
    )
    gpus: float | None = Field(
        None, gt=0, le=1, description="parallel_folds: share of a GPU per fold; null: one GPU where there are any"
    )
    retries: int = Field(
        2, ge=0, description="parallel_folds: times that a failed fold is restarted from its last checkpoint"
    )
    address: str | None = Field(
        None,
        description="parallel_folds: address of a Ray cluster, whose token is read from RAY_AUTH_TOKEN; null starts "
        "Ray on this machine",
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_former_name(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and "side_by_side" in raw:
            raise ValueError("side_by_side is now called parallel_folds")
        return raw

    @model_validator(mode="after")
    def _refuse_without_effect(self) -> ParallelFoldsRun:
        given = self.model_fields_set
        if not self.parallel_folds and (unused := sorted(given.intersection(PARALLEL_FOLDS_KEYS))):
            raise ValueError(f"{unused[0]}: has no effect with parallel_folds=false")
        if self.parallel_folds == "auto" and (unused := sorted(given.intersection(RAY_KEYS))):
            raise ValueError(f"{unused[0]}: has effect with parallel_folds=true only")
        return self


def is_writable(folder: Path) -> bool:
    """Return whether files can be written into a folder, which may not exist yet, or into that of a file."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return os.access(existing, os.W_OK | os.X_OK)


def cache_folder() -> Path:
    """Return the folder of this user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "triderm-dist"


def has_effect(kind: type[Section], key: str) -> bool:
    """Return whether a dotted key is a setting of the program itself, or one of the experiment that it uses."""
    uses = kind.uses if issubclass(kind, Experiment) else None
    if uses is None or key.split(".")[0] not in Experiment.model_fields:
        return True
    return any(f"{key}.".startswith(f"{used}.") or f"{used}.".startswith(f"{key}.") for used in uses)


SHIPPED = {
    "experiments": "launch/experiments",
    "spaces": "tune/spaces",
    "accelerate_configs": "accelerate_configs",
    "slurm": "launch/slurm",
    "kubernetes": "launch/kubernetes",
    "ray": "launch/ray",
    "tasks": "triderm_dist/tasks",
    "benchmarks": "benchmarks/results",
}
"""The folders of files that ship with the package, by kind, with their location in a clone."""
BY_STEM = ("experiments", "spaces", "accelerate_configs")
"""Kinds whose files a setting names without the ending: `--config rtx4090`, `space=losses`, `launcher=ddp`."""


def shipped(kind: str) -> Path:
    """Return the folder of a kind of `SHIPPED`: inside an installed wheel, else in the clone."""
    installed = Path(__file__).parent / "shipped" / kind
    return installed if installed.is_dir() else Path(__file__).parents[1] / SHIPPED[kind]


def shipped_names(kind: str) -> list[str]:
    """Return the names of the files of a kind: `rtx4090` of an experiment, `slurm/train.sh` of a launcher."""
    if kind in BY_STEM:
        return sorted(path.stem for path in shipped(kind).glob("*.yaml"))
    return sorted(
        f"{kind}/{path.name}" for path in shipped(kind).iterdir() if path.is_file() and path.name != "__init__.py"
    )


CONFIG_DIR = "${config_dir}"
"""At the start of a path in a YAML file: the folder of that file."""
CONFIG_FILE = "config.yaml"
"""The resolved settings of a run, in its folder; of a fold trained by itself also in the fold's folder."""
SAVED, SAVED_END = "# All settings of a run.", "# End of the settings."
"""The first and last line of a file of saved settings: a part of such a file may be valid YAML as well."""
_CUT_OFF = "its settings are cut off; restore it from a copy, or give the settings again: --config FILE output=RUN"


def _settings_of_run(kind: type[Experiment], top: dict[str, Any]) -> dict[str, Any]:
    """Take `run` out of the settings of a command line, and return the settings of that run.

    Raises ConfigError if the folder holds none, and if `output` names another folder than `run` for a program
    that writes into its run.
    """
    folder = str(Path(str(top.pop("run"))).expanduser())
    file = Path(folder, CONFIG_FILE)
    if not file.is_file():
        raise ConfigError(f"run: {_why_no_run(Path(folder))}")
    raw = read_yaml(file)
    if not raw:
        raise ConfigError(f"{file}: {_CUT_OFF}")
    if (owner := _run_folder(file, raw)) not in (None, Path(folder)):
        raise ConfigError(f"run: {folder}: is the folder of a fold; name the run, {owner}")
    output = top.get("output")
    if issubclass(kind, RunReader):
        top["run"] = folder
    elif output is not None and os.path.abspath(os.path.expanduser(str(output))) != os.path.abspath(folder):
        raise ConfigError(
            f"output: run={folder} is worked on in its own folder; remove output, or start another run with the same "
            f"settings: --config {file} output={output}"
        )
    return _moved(raw, folder)


def _why_no_run(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: {why_no_folder(folder)}"
    folds = sorted(folder.glob(f"*/fold-*/{CONFIG_FILE}"))
    advice = f"name a fold's settings instead: --config {folds[0]}" if folds else "name a folder that a run wrote"
    return f"{folder}: holds no {CONFIG_FILE}; {advice}"


def _run_folder(file: Path, raw: Mapping[str, Any]) -> Path | None:
    """Return the folder of the run whose saved settings a file holds, None for a file that is not of a run."""
    models = raw.get("models")
    if file.name != CONFIG_FILE or not isinstance(models, Mapping) or "token_seed" not in raw:
        return None  # a saved file holds every setting
    folder = file.parent
    model = re.sub(r"-s\d+$", "", folder.absolute().parent.name)  # of a further seed, the name in the settings
    if {model, folder.absolute().parent.name} & set(models) and re.fullmatch(r"fold-\d+", folder.absolute().name):
        return Path(os.path.normpath(folder / ".." / ".."))
    of_a_run = (".lock", "stages.json", "oof.parquet", "ensemble.json", *map(str, models))
    return folder if any(folder.joinpath(name).exists() for name in of_a_run) else None


def _moved(raw: dict[str, Any], folder: str) -> dict[str, Any]:
    """Set `output` to a folder, and move the paths inside the former output there.

    Saved settings hold their own folder as `${config_dir}`; those of earlier versions hold what was typed.
    """
    former = str(raw.get("output", ""))

    def move(key: str, path: str) -> str:
        inside = former and path.startswith(f"{former.rstrip('/')}/")
        return os.path.join(folder, path[len(former.rstrip("/")) + 1 :]) if inside else path

    return {**map_paths(raw, move), "output": folder}


def find_file(kind: str, name: str | os.PathLike[str]) -> Path:
    """Return the file at a path, or if there is none the shipped one of that name."""
    path = Path(name).expanduser()
    if not path.is_file() and str(name) in shipped_names(kind):
        return shipped(kind) / (f"{name}.yaml" if kind in BY_STEM else path.name)
    return path


def first_comment(file: Path) -> str:
    """Return the first comment line of a YAML file, a script or a Dockerfile: its one-line description."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), "")


def load(kind: type[Tree], file: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> Tree:
    """Read the settings of `kind` from a YAML file and `key.subkey=value` overrides, which win.

    A file may name another one as `base: FILE` and change some of its settings. Raises ConfigError for a file that is
    missing or not a mapping, a key written twice, an unknown key (with the nearest known one), or a value of the wrong
    type.
    """
    top: dict[str, Any] = {}
    for override in overrides:
        top = merge(top, read_override(override))
    raw: dict[str, Any] = {}
    if issubclass(kind, Experiment) and "run" in top:
        if file is not None:
            raise ConfigError("run: takes the settings of that run; remove --config")
        raw = _settings_of_run(kind, top)
    elif file is not None:
        raw = read_yaml(path := find_file("experiments", file))
        if issubclass(kind, Experiment) and (folder := _run_folder(path, raw)):
            raw = _moved(raw, str(folder))
    return build(kind, merge(raw, top))


def load_run(kind: type[RunTree], folder: str | os.PathLike[str]) -> RunTree:
    """Read the settings of the run in a folder, as `run=FOLDER` does. Raises ConfigError."""
    top = {"run": os.fspath(folder)}
    return build(kind, merge(_settings_of_run(kind, top), top))


def build(kind: type[Tree], raw: Mapping[str, Any]) -> Tree:
    """Build the settings of `kind` from a nested mapping, after importing its plugins; URLs that were saved without
    their secrets are completed from `TRIDERM_URLS`. Raises ConfigError as `load` does, and for a plugin that cannot be
    imported.
    """
    raw = restore_urls(raw)
    if issubclass(kind, Extensible):
        import_plugins(raw.get("plugins"))
    return validate(kind, raw)


def import_plugins(names: Any) -> None:
    """Import the files and modules of `plugins`, each once. Raises ConfigError for one that fails."""
    names = typed(names, Extensible.model_fields["plugins"].annotation)
    for name in names if isinstance(names, list | tuple) else ():
        path = Path(str(name)).expanduser().absolute()
        module = f"triderm_plugin_{path.stem}" if path.suffix == ".py" else str(name)
        if module in sys.modules:
            continue
        try:
            if path.suffix != ".py":
                importlib.import_module(module)
                continue
            spec = importlib.util.spec_from_file_location(module, path)
            assert spec is not None and spec.loader is not None
            sys.modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module])
        except Exception as error:  # a user's file may raise any type
            sys.modules.pop(module, None)
            raise ConfigError(f"plugins: {name}: {one_line(error, with_type=True)}") from error


FIRST_KEYS = frozenset(
    f"{section}.{key}"
    for section, keys in {
        "data": "source test shards test_shards test_truth folds fold_seed short_side missing_view invalid verify "
        "workers prefetch",
        "data.remote": "cache cache_gb downloads total_seconds stall_seconds allow_commands",
        "models.NAME": "kind width heads depth fusion mlp_ratio dropout head use",
        "models.NAME.tower": "source pretrained image_size quick_gelu shared frozen freeze_clinical freeze_dermoscopic",
        "models.NAME.train": "epochs global_batch micro_batch precision activation_checkpointing compile log_every "
        "save_every keep_last ema_decay select trackers profile peak_tflops",
        "models.NAME.train.sampling": "kind threshold power window last",
        "models.NAME.train.augment": "min_scale dihedral rotation brightness contrast saturation tied_views "
        "clinical_dropout dermoscopic_dropout concept_dropout token_variants",
        "models.NAME.train.loss": "focal_weight soft_f1_weight aux_weight gamma alpha class_weight_power "
        "label_smoothing logit_adjustment soft_f1_sums",
        "models.NAME.train.optim": "lr layer_decay weight_decay min_lr warmup_epochs clip_norm",
        "stack": "enabled booster max_depth learning_rate max_rounds early_stopping subsample colsample_bytree "
        "min_child_weight reg_lambda class_weight_power device memory_gb extra components",
        "ensemble": "members rounds shrinkage bootstrap",
        "predict": "transforms batch",
    }.items()
    for key in keys.split()
)
"""The settings that the first finished runs were hashed with (commit 754ad2d). Never add to this."""

ADDED_KEYS: dict[str, Any] = {
    "data.extra": [],
    "data.groups": "plain",
    "data.task": None,
    "ensemble.use": "ensemble",
    "models.NAME.tower.cache_frozen_blocks": False,
    "models.NAME.tower.drop_path": None,
    "models.NAME.tower.frame": "square",
    "models.NAME.tower.lora.alpha": 16.0,
    "models.NAME.tower.lora.rank": None,
    "models.NAME.tower.lora.targets": ["attention", "mlp"],
    "models.NAME.tower.token_dtype": "float16",
    "models.NAME.train.augment.aspect": 0.0,
    "models.NAME.train.augment.clinical_strength": 1.0,
    "models.NAME.train.augment.cutmix": 0.0,
    "models.NAME.train.augment.extra": {},
    "models.NAME.train.augment.mixup": 0.0,
    "models.NAME.train.augment.unmixed_epochs": 3,
    "models.NAME.train.bucket_mb": 25.0,
    "models.NAME.train.deterministic": False,
    "models.NAME.train.gradient_precision": "fp32",
    "models.NAME.train.graph": "auto",
    "models.NAME.train.keep_checkpoints": False,
    "models.NAME.train.loss.fine_weight": 0.0,
    "models.NAME.train.loss.terms": {},
    "models.NAME.train.optim.head_lr_multiple": 1.0,
    "models.NAME.train.optim.name": "adamw",
    "models.NAME.train.optim.settings": {},
    "models.NAME.train.optim.schedule": "cosine",
    "models.NAME.train.optim.unfreeze_epochs": 0.0,
    "models.NAME.train.save_every_seconds": None,
    "models.NAME.train.swa_epochs": 0,
    "models.NAME.train.tracker_settings": {},
    "models.NAME.train.validate_every": 1,
    "models.NAME.extra_towers": [],
    "models.NAME.init": None,
    "models.NAME.seeds": 1,
    "models.NAME.settings": {},
    "oof.tta": 1,
    "stack.kind": "xgboost",
    "stack.max_rows": 20_000,  # as before for fits of fewer rows, which all were when it was added
    "stack.settings": {},
}
"""Every setting added since, with the value (as in JSON) that gives the behavior from before the setting existed. Keep
the value when a default changes, so that the new default gets another hash than work finished with the former one.
"""


def stable_dump(section: Section, path: str) -> dict[str, Any]:
    """Return the settings of a section as plain values, for the hashes that decide whether finished work is reused.

    Holds all of `FIRST_KEYS`, whatever their values, so that work finished with a default that has changed since does
    not match; and of the keys added later those that differ from `ADDED_KEYS` (from their default if they are not
    listed), so that adding a setting changes no hash. `path` is the section's dotted key, such as "models.NAME.train".
    """
    dump = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        key, value = f"{path}.{name}", getattr(section, name)
        if isinstance(value, Section):
            dump[name] = stable_dump(value, key)
            if not dump[name] and not any(first.startswith(f"{key}.") for first in FIRST_KEYS):
                del dump[name]
        elif key not in FIRST_KEYS and not field.is_required():
            default = to_jsonable_python(field.get_default(call_default_factory=True))
            if dump[name] == ADDED_KEYS.get(key, default):
                del dump[name]
    return dump


def as_yaml(config: Section) -> str:
    """Return the resolved settings as YAML that `load` reads back to an equal tree, but for passwords and tokens."""
    return yaml.safe_dump(_tree(config), sort_keys=False)


def _tree(config: Section) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    if isinstance(config, Experiment):
        tree["models"] = {name: model for name, model in tree["models"].items() if config.models[name].seeds}
        # Only what differs from the shared settings, so that overriding `train` of a saved file still has effect.
        for model in tree["models"].values():
            model["train"] = _difference(model["train"], tree["train"])
    return redact_tree(tree)


def save(config: Section, path: Path) -> None:
    """Write the resolved settings as YAML, without passwords and tokens (`redact_tree`).

    In a file inside the run's own folder, a path into that folder is written relative to the file, and any other one
    absolute, so that the folder may be moved and used from any working directory.
    """
    tree = _tree(config)
    if isinstance(config, Experiment) and _inside(path, config.folder):
        tree = map_paths({**tree, "output": str(config.folder)}, partial(_portable, path, config.folder))
    write_text(path, f"{SAVED}\n{yaml.safe_dump(tree, sort_keys=False)}{SAVED_END}\n")


def absolute_path(key: str, value: str) -> str:
    """Return the absolute form of a path setting; URLs, repositories and names of shipped tasks stay as they are."""
    shipped_task = key == "data.task" and not Path(value).exists()
    module = key == "plugins[]" and not value.endswith(".py")
    elsewhere = "://" in value or value.startswith(("pipe:", "hf-hub:"))
    return value if elsewhere or shipped_task or module else os.path.abspath(value)


def _portable(file: Path, run: Path, key: str, value: str) -> str:
    path = absolute_path(key, value)
    if not Path(path).is_absolute() or not _inside(Path(path), run):
        return path
    relative = os.path.relpath(path, os.path.abspath(file.parent))
    return CONFIG_DIR if relative == "." else f"{CONFIG_DIR}/{relative}"


def _inside(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def map_paths(tree: Mapping[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """Apply `change(dotted key, path)` to every path among the settings of an experiment."""
    keys = {"plugins[]", *(key for key, kind, *_ in describe(Experiment) if kind.split()[0] == "path")}

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            return {name: walk(each, f"{key}.{name}" if key else str(name)) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [walk(each, f"{key}[]") for each in value]
        return change(key, str(value)) if key in keys and isinstance(value, str) and value not in NULL else value

    return {str(name): walk(each, str(name)) for name, each in tree.items()}


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read the mapping in a file, laid over that of the file or shipped experiment that it names as `base`. That path
    is relative to the file's own folder, as is one that starts with `${config_dir}`.

    above: the files whose `base` led to this one, to detect a cycle.
    """
    if path.resolve() in above:
        cycle = " -> ".join(each.name for each in (*above[above.index(path.resolve()) :], path))
        raise ConfigError(f"{path}: `base` forms a cycle ({cycle}); remove one of them")
    raw = read_mapping(path, "--config takes a YAML file, or a name that `triderm config list` shows")
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines[:1] == [SAVED] and lines[-1] != SAVED_END:
        raise ConfigError(f"{path}: {_CUT_OFF}")
    raw = _with_config_dir(raw, path.parent)
    base = raw.pop("base", None)
    if base is None or (isinstance(base, Plain) and base in NULL):
        return raw
    if not isinstance(base, str) or not base.isprintable():
        raise ConfigError(f"{path}: base: the name of one file or shipped experiment is expected (got {base!r:.80})")
    below = path.parent / Path(base).expanduser()
    return merge(read_yaml(below if below.is_file() else find_file("experiments", base), (*above, path.resolve())), raw)


def _with_config_dir(value: Any, folder: Path) -> Any:
    """Replace `${config_dir}` at the start of texts by the folder of their file."""
    if isinstance(value, Mapping):
        return {key: _with_config_dir(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_config_dir(each, folder) for each in value]
    if not isinstance(value, str) or not f"{value}/".startswith(f"{CONFIG_DIR}/"):
        return value
    return os.path.normpath(os.path.join(folder, value.removeprefix(CONFIG_DIR).lstrip("/")))


def _difference(tree: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return the part of `tree` that differs from `base`."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            if inner := _difference(value, base.get(key) or {}):
                result[key] = inner
        elif key not in base or value != base[key]:
            result[key] = value
    return result
