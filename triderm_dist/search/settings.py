"""What a search is told, and where its files lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from triderm_dist.config import TRAINING, Experiment, load
from triderm_dist.schema import DataError
from triderm_dist.settings import PathText, Section, merge

BASELINE = 1
"""The number of the trial with the experiment's own settings."""


class SearchConfig(Section):
    space: PathText = Field("tune/spaces/losses.yaml", description="YAML file of the settings to vary and their ranges")
    trials: int = Field(12, ge=1, description="trials in all; the first has the experiment's own settings")
    model: str | None = Field(None, description="the model of `models` whose settings vary; null takes the first")
    folds: tuple[int, ...] = Field(
        (0,), min_length=1, description="folds that a trial trains; the aim is the mean of their macro F1 (argmax)"
    )
    searcher: Literal["tpe", "random"] = Field(
        "tpe", description="Optuna's tree-structured Parzen estimator, or random"
    )
    scheduler: Literal["asha", "pbt", "none"] = Field(
        "asha",
        description="asha stops the trials that lag behind at an equal epoch; pbt lets them go on from the checkpoint "
        "of a leading one with changed settings (its first settings are random, whatever the searcher)",
    )
    grace_epochs: int = Field(1, ge=1, description="epochs before asha may stop a trial")
    exploit_epochs: int = Field(1, ge=1, description="epochs between two looks of pbt at who leads")
    concurrent: int | None = Field(None, ge=1, description="trials at once; null takes as many as the machine holds")
    workers: int = Field(1, ge=1, description="processes that train one trial together (DDP, by Ray Train)")
    cpus: int = Field(1, ge=1, description="CPU cores a worker, and its threads")
    gpus: float | None = Field(
        None, ge=0, le=1, description="share of a GPU that a worker takes; null: one where there are GPUs"
    )
    retries: int = Field(
        2, ge=0, description="times that a trial whose process died or failed goes on from its last checkpoint"
    )
    seeds: int = Field(
        3,
        ge=0,
        description="other seeds that the best trial and the baseline are trained with after the search, which tells "
        "how much of the gain is noise",
    )
    seed: int = Field(0, ge=0, description="seed of the searcher's draws; all trials train with the experiment's seed")
    resume: bool = Field(False, description="go on with the search that OUTPUT holds")
    address: str | None = Field(
        None,
        description="Ray cluster to run on, a token that it asks for in RAY_AUTH_TOKEN; null starts Ray here",
    )


class SearchRun(Experiment):
    """An experiment and how to search around it. `space=FILE` is short for `search.space=FILE`, and so on."""

    uses = TRAINING

    search: SearchConfig = SearchConfig()

    @model_validator(mode="before")
    @classmethod
    def _short_names(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        short = [key for key in raw if key in SearchConfig.model_fields and key not in cls.model_fields]
        rest = {key: value for key, value in raw.items() if key not in short}
        return merge(rest, {"search": {key: raw[key] for key in short}}) if short else raw

    @property
    def model(self) -> str:
        return self.search.model or next(iter(self.models))

    @property
    def search_folder(self) -> Path:
        return self.folder / "search"

    @property
    def epochs(self) -> int:
        """Epochs of a trial that runs to its end, over all its folds."""
        return len(self.search.folds) * self.models[self.model].train.epochs

    def trial_folder(self, number: int, seed: int = 0) -> Path:
        return self.search_folder / trial_name(number, seed)


def trial_name(number: int, seed: int = 0) -> str:
    """Of a trial, or of its repetition with another seed."""
    return f"trial-{number:03d}" + (f"-seed-{seed}" if seed else "")


def read_search(output: Path) -> SearchRun:
    """The search that a run folder holds. Raises DataError where there is none."""
    record = output / "search" / "search.yaml"
    if not record.exists():
        raise DataError(f"{output}: holds no search; run triderm search first")
    run = load(SearchRun, record)
    return run.model_copy(update={"output": str(output)})  # it may have been copied from elsewhere
