"""Settings of the networks: towers, fusion, heads; names of models and of their seeds."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from triderm_dist.config.training import TrainConfig
from triderm_dist.runtime.messages import quoted
from triderm_dist.settings import PathText, Section, SourceText

Frame = Literal["square", "whole", "squash"]
Modality = Literal["clinical", "dermoscopic", "concepts", "metadata"]


class LoraConfig(Section):
    rank: int = Field(ge=1, description="rank of the trained update of each frozen matrix")
    alpha: float = Field(16.0, gt=0, description="the update is multiplied by alpha / rank")
    targets: tuple[Literal["attention", "mlp"], ...] = Field(
        ("attention", "mlp"), min_length=1, description="matrices of a block: those of attention, of the MLP, or both"
    )


class TowerConfig(Section):
    source: SourceText = Field(
        "hf-hub:redlessone/DermLIP_ViT-B-16",
        description="hf-hub:ID, local-dir:PATH, a PanDerm checkpoint file, timm:NAME, timm:NAME@FILE or "
        "timm:NAME@package:PACKAGE",
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
    use: tuple[Modality, ...] = Field(
        get_args(Modality),
        description="modalities that the network uses, if the task has them; the others are treated as missing, in "
        "training and prediction",
    )
    train: TrainConfig = TrainConfig()

    @property
    def inits(self) -> dict[str, str]:
        """The networks of other runs that a training needs, by the name of their setting."""
        extra = {f"extra_towers.{number}": each.init for number, each in enumerate(self.extra_towers)}
        return extra | ({} if self.init is None else {"init": self.init})

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width * self.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio:g} of width {self.width} leaves no hidden unit; raise it")
        if self.tower.cache_frozen_blocks and not self.tower.frozen and self.train.augment.cutmix:
            raise ValueError("cutmix mixes pixels, and with tower.cache_frozen_blocks there are none; use mixup")
        if self.extra_towers and not self.tower.frozen:
            raise ValueError("extra_towers are joined with a frozen tower; set tower.frozen")
        if self.head == "sigmoid" and self.train.loss.logit_adjustment:
            raise ValueError("logit_adjustment works with head=softmax only")
        if self.head == "softmax" and self.train.loss.alpha is not None:
            raise ValueError("alpha works with head=sigmoid only")
        return self


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


def mean_of_seeds(name: str) -> str:
    """Return the name of the mean of a model's seeds, which stands for the model where single networks are compared."""
    return f"{name}-seeds"


def seeds_of_models(models: Mapping[str, ModelConfig], names: Collection[str]) -> dict[str, list[str]]:
    """Return the trainings among `names` of each model of which several seeds are there, by the model's name."""
    found = {name: [each for each in seed_names(name, model.seeds) if each in names] for name, model in models.items()}
    return {name: seeds for name, seeds in found.items() if len(seeds) > 1}


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
        if model.seeds > 1 and (mean := mean_of_seeds(name)) in models:
            raise ValueError(f"{mean!r} is a model, and the name of the mean of the seeds of {name!r}; rename one")
    if without_model := sorted(set(models) - set(result)):
        base = models.get(without_model[0].rpartition("-s")[0])
        if base is None or not base.seeds:
            raise ValueError(f"{without_model[0]}.seeds: write 1 or more")
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
