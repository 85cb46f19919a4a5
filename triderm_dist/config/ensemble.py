"""Settings of what follows training: stacker, ensemble, prediction, report."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from triderm_dist.config.limits import MAX_BATCH
from triderm_dist.settings import Section


class StackConfig(Section):
    enabled: bool = Field(True, description="fit a stacker on the out-of-fold rows")
    kind: str = Field("xgboost", description="stacker; plugins may add others")
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="settings of a stacker that a plugin adds; those of XGBoost are booster to device",
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
        description="most lesions in one fit; of more, a weighted sample is drawn, of each diagnosis in proportion to "
        "the square root of its number. null: fit on all, above memory_gb in XGBoost's external memory",
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
        description="what predicts: ensemble, the name of one member (stack is the stacker), NAME-seeds (the mean of a "
        "model's seeds), or auto: the best network or mean of a model's seeds, unless the ensemble beats it beyond "
        "the noise",
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
        description="number of transforms of the dihedral group to average out-of-fold predictions over; if equal to "
        "predict.transforms, stacker and thresholds are fitted on the kind of prediction that they are applied to",
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
