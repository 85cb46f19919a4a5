"""Settings of a training: sampling, augmentation, loss, optimizer, and how a step is computed."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from triderm_dist.config.limits import MAX_BATCH
from triderm_dist.settings import Section


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
        "Beta(cutmix, cutmix), such as 1; with mixup too, each mixes half of the lesions",
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
        "lesions, each counted once: the term as a whole gets more weight only where sampling.kind=balanced repeats "
        "rare ones (1.3 times on MILK10k with power 0.5 and the default sampling); 0 weights all equally",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target that is spread over all diagnoses")
    logit_adjustment: float = Field(
        0.0,
        ge=0,
        description="softmax head: tau of the training-time adjustment logits + tau * log(prior); the prior is the "
        "share of a diagnosis among the lesions as drawn, with the repeats of sampling.kind=balanced",
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
    weight_decay: float = Field(
        0.05, ge=0, description="weight decay of matrices; vectors, embeddings and LoRA updates have none"
    )
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
        description="precision in which ranks sum their gradients; bf16 sends half of the bytes and rounds each sum "
        "(docs/clusters.md says where that pays off)",
    )
    bucket_mb: float = Field(
        25.0,
        gt=0,
        description="DDP: MiB of gradients per all-reduce, which overlaps with the rest of the backward pass",
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass to save memory"
    )
    compile: bool = Field(False, description="torch.compile tower blocks, fusion, heads and losses")
    graph: Literal["auto"] | bool = Field(
        "auto",
        description="on a GPU, launch each training step as one CUDA graph; auto: in one process and under DDP, with "
        "bf16 or fp32; true: end with an error if a step cannot be captured",
    )
    deterministic: bool = Field(
        False,
        description="on a GPU, use only algorithms that give the same numbers each time, so that a resumed training "
        "equals an undisturbed one bit for bit on the same hardware and versions; slower. On a CPU this always holds",
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
        description="seconds between checkpoints, saved at log lines and ends of epochs, instead of one at the end of "
        "each epoch; for epochs that take seconds",
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
        description="decay per step of an exponential moving average of the weights, such as 0.999, which is validated "
        "and kept instead of them; 0 keeps none; not with DeepSpeed",
    )
    swa_epochs: int = Field(
        0,
        ge=0,
        description="stochastic weight averaging: the mean of the weights at the ends of this many last epochs is "
        "validated and kept instead of them; 0 keeps none; not with DeepSpeed or ema_decay",
    )
    validate_every: int = Field(
        1, ge=1, description="validate after every so many epochs, and after the last one; a search uses 1"
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
        "[a]}, mlflow: {experiment_name: skin}}; they override WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME and so on",
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
