"""The settings of a search, and the paths of its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from triderm_dist.config import TRAINING, Experiment, load
from triderm_dist.schema import DataError
from triderm_dist.settings import PathText, Section, merge

BASELINE = 1
"""Number of the trial with the experiment's own settings."""


class SearchConfig(Section):
    space: PathText = Field(
        "losses",
        description="YAML file of settings and their ranges, or a shipped space: losses, llrd, all, recipe, pbt",
    )
    trials: int = Field(12, ge=1, description="number of trials; the first has the experiment's own settings")
    model: str | None = Field(None, description="the model of `models` whose settings vary; null takes the first")
    folds: tuple[int, ...] = Field(
        (0,),
        min_length=1,
        description="folds that each trial trains; the objective is the mean of their macro F1 (argmax)",
    )
    searcher: Literal["tpe", "random"] = Field(
        "tpe", description="how settings are drawn: by Optuna's tree-structured Parzen estimator, or at random"
    )
    scheduler: Literal["asha", "pbt", "none"] = Field(
        "asha",
        description="asha stops trials that lag behind at an equal epoch; pbt lets them copy the checkpoint of a "
        "leading trial and changes their settings (the first settings are random with any searcher); none lets "
        "all trials end",
    )
    grace_epochs: int = Field(1, ge=1, description="asha: epochs before a trial may be stopped")
    exploit_epochs: int = Field(1, ge=1, description="pbt: epochs after which lagging trials copy leading ones")
    concurrent: int | None = Field(None, ge=1, description="trials at once; null runs as many as fit")
    workers: int = Field(1, ge=1, description="ranks per trial (DDP, by Ray Train)")
    cpus: int = Field(1, ge=1, description="CPU cores and threads per worker")
    gpus: float | None = Field(
        None, ge=0, le=1, description="share of a GPU per worker; null: one GPU if there are any"
    )
    retries: int = Field(2, ge=0, description="times that a failed trial is restarted from its last checkpoint")
    seeds: int = Field(
        3,
        ge=0,
        description="number of other seeds that the best trial and the baseline are trained with after the search, to "
        "estimate how much of the gain is noise",
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="seed of the searcher; all trials train with the experiment's seed"
    )
    resume: bool = Field(False, description="resume the search in OUTPUT")
    address: str | None = Field(
        None,
        description="address of a Ray cluster, whose token is read from RAY_AUTH_TOKEN; null starts Ray locally",
    )


class SearchRun(Experiment):
    """An experiment and a search around it. `space=FILE` is short for `search.space=FILE`, and so on."""

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
        """Epochs of a complete trial, over all its folds."""
        return len(self.search.folds) * self.models[self.model].train.epochs

    def trial_folder(self, number: int, seed: int = 0) -> Path:
        return self.search_folder / trial_name(number, seed)


def trial_name(number: int, seed: int = 0) -> str:
    """Return the name of a trial, or of its repetition with another seed."""
    return f"trial-{number:03d}" + (f"-seed-{seed}" if seed else "")


def parse_trial_name(name: str) -> tuple[int, int]:
    """Return the number and the seed of a `trial_name`."""
    number, _, seed = name.removeprefix("trial-").partition("-seed-")
    return int(number), int(seed or 0)


def read_search(output: Path) -> SearchRun:
    """Read the search in a run folder. Raises DataError if there is none."""
    record = output / "search" / "search.yaml"
    if not record.exists():
        raise DataError(f"{output}: contains no search; run triderm search first")
    run = load(SearchRun, record)
    return run.model_copy(update={"output": str(output)})  # the folder may have been moved
