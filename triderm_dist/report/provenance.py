"""How a run was made: its data, settings that matter, versions, hardware, dates and durations, and what was fitted on
which lesions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from triderm_dist.config import Experiment
from triderm_dist.environment import hardware_of, version_of
from triderm_dist.runtime.messages import joined

STAGES = ("crossval", "train", "stack", "predict")
"""Programs whose starts date a run. triderm report is left out: writing the page again must not change it."""


@dataclass(frozen=True)
class StageRecord:
    """All starts of a program in a run.

    started: the day of the first and of the last start, as YYYY-MM-DD.  seconds: of all starts together.  hardware,
    version: of the last one; version with the commit, where it is known.
    """

    program: str
    started: tuple[str, str]
    seconds: float
    hardware: str
    version: str


@dataclass(frozen=True)
class Provenance:
    """What environment.json records of a run; empty or None where it lacks it, as in runs of earlier versions.

    data: of the training set by key: fingerprint, lesions, labeled, ...  test: of the test set.  packages: version by
    name, of the last start of a training.
    """

    stages: tuple[StageRecord, ...]
    data: Mapping[str, Any]
    test: Mapping[str, Any]
    packages: Mapping[str, str]

    @staticmethod
    def of(record: Mapping[str, Any]) -> Provenance:
        """Sum up the content of environment.json."""
        starts, made = record["starts"], record["environments"]
        stages = []
        for program in STAGES:
            own = [start for start in starts if start["program"] == program]
            if own:
                last = made[own[-1]["environment"]]
                days = sorted(str(start["started"])[:10] for start in own)
                seconds = float(sum(start.get("seconds") or 0 for start in own))
                stages.append(StageRecord(program, (days[0], days[-1]), seconds, hardware_of(last), version_of(last)))
        trained = [start for start in starts if start["program"] in ("crossval", "train")]
        packages = made[trained[-1]["environment"]].get("packages", {}) if trained else {}
        data = record["data"]
        return Provenance(tuple(stages), data.get("train", {}), data.get("test", {}), packages)

    @property
    def date(self) -> str | None:
        """The day of the last start of a stage."""
        return max((stage.started[1] for stage in self.stages), default=None)

    @property
    def seconds(self) -> float | None:
        """The duration of all stages."""
        return sum(stage.seconds for stage in self.stages) if self.stages else None

    @property
    def version(self) -> str | None:
        """Version and commit that trained the networks."""
        return self.stages[0].version if self.stages else None

    @property
    def hardware(self) -> str | None:
        """The hardware that trained the networks."""
        return self.stages[0].hardware if self.stages else None


def duration(seconds: float) -> str:
    """Format a duration: 45 s, 12 min, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True)
class Fitted:
    """A part of the pipeline: what it was fitted on, and the lesions whose figures depend on it."""

    part: str
    fitted_on: str
    used_for: str


def fitted_parts(
    networks: Sequence[str], folds: int, stacker: bool, thresholds: bool, tested: bool, extra_sets: Sequence[str] = ()
) -> Iterator[Fitted]:
    """Yield what was fitted where, from the encoders to the test set.

    stacker, thresholds: whether there are such.  tested: whether a test set was predicted.  extra_sets: the sets whose
    lesions joined the training.
    """
    with_sets = f", and {', '.join(extra_sets)}" if extra_sets else ""
    others = "the other fold" if folds == 2 else f"the other {folds - 1} folds"
    yield Fitted(
        f"networks of fold k ({', '.join(networks)})",
        f"training lesions of {others}{with_sets}",
        "held-out predictions of fold k" + ("; test lesions, averaged over the folds" if tested else ""),
    )
    parts = ["temperatures"] + ["stacker"] * stacker + ["weights"] + ["thresholds"] * thresholds
    names = joined(parts)
    yield Fitted(f"{names}, nested", f"held-out predictions of {others}", "all figures of fold k")
    if tested:
        yield Fitted(f"{names}, final", f"held-out predictions of all {folds} folds", "test lesions")


def seeds(experiment: Experiment, networks: Sequence[str]) -> dict[str, int]:
    """Return the seeds of a run: of the folds, and of each network."""
    known = [name for name in networks if name in experiment.models]
    return {"folds": experiment.data.fold_seed, **{name: experiment.seed_of(name) for name in known}}
