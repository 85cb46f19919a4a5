"""`Experiment`, the settings of a run, and what programs add to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from triderm_dist.config.data import DataConfig
from triderm_dist.config.ensemble import EnsembleConfig, OofConfig, PredictConfig, ReportConfig, StackConfig
from triderm_dist.config.limits import MAX_SECONDS, MAX_SEED
from triderm_dist.config.model import DEFAULT_MODEL, ModelConfig, check_model_names, with_seeds
from triderm_dist.config.training import TrainConfig
from triderm_dist.files import cache_folder, expanded, is_writable
from triderm_dist.settings import PathText, Section, merge

TRAINING = (
    *("plugins", "output", "seed", "token_seed", "tokens", "rank_timeout", "train", "models", "oof"),
    *("data.shards", "data.test_shards", "data.extra", "data.folds", "data.fold_seed", "data.verify", "data.workers"),
    *("data.prefetch", "data.remote"),
)
"""The settings that have an effect on training, as `Experiment.uses` lists them."""
INFERENCE = (
    *(key for key in TRAINING if key not in ("train", "oof", "data.extra")),
    *("train.precision", "train.compile", "predict"),
)
"""Those that have an effect on predictions of trained networks."""


class Extensible(Section):
    """Settings of a program that plugins can extend."""

    plugins: tuple[str, ...] = Field(
        (),
        description="Python files or modules to import first, which add networks, losses, optimizers and other parts "
        "(docs/extending.md)",
    )

    @field_validator("plugins")
    @classmethod
    def _locate_plugins(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Make the paths of files absolute, so that processes with another working directory find them."""
        return tuple(str(expanded(name).absolute()) if name.endswith(".py") else name for name in names)


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
        description="seconds to wait for a rank that does not answer, before the run ends as interrupted; raise it if "
        "rank 0 checks very large shards (data.verify)",
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
    def without_effect(self) -> Mapping[str, str]:
        """Settings without effect on a program as it is called, with the reason; the command line may not set them."""
        return {}

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
        description="parallel_folds: CPU cores and threads per fold; null: with auto, the number of cores divided by "
        "that of trainings; with true, 1",
    )
    gpus: float | None = Field(
        None, gt=0, le=1, description="parallel_folds: share of a GPU per fold; null: one GPU if there are any"
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


def has_effect(kind: type[Section], key: str) -> bool:
    """Return whether a dotted key is a setting of the program itself, or one of the experiment that it uses."""
    uses = kind.uses if issubclass(kind, Experiment) else None
    if uses is None or key.split(".")[0] not in Experiment.model_fields:
        return True
    return any(f"{key}.".startswith(f"{used}.") or f"{used}.".startswith(f"{key}.") for used in uses)
