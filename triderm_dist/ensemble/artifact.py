"""The fitted ensemble, and its file ensemble.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field

from triderm_dist.checksums import DamagedFile, check_mapping, read_checked_json, write_checked_json
from triderm_dist.ensemble.calibration import weighted_sum
from triderm_dist.ensemble.run_files import FITTED
from triderm_dist.ensemble.thresholds import Rule, decide
from triderm_dist.schema import ConfigError, DataError, Task
from triderm_dist.tasks import recorded_task

FORMAT = "triderm-ensemble"
VERSION = 3


class _Interval(BaseModel):
    value: float
    low: float
    high: float


class _Score(BaseModel):
    official: float | None
    argmax: float | None
    argmax_tau: float | None
    fitted: float
    nested: _Interval
    chosen_minus_this: _Interval


class _Pair(BaseModel):
    first: str
    second: str
    difference: _Interval


class _Choice(BaseModel):
    used: str
    ensemble: str
    network: str
    difference: _Interval
    stacker: _Interval | None
    counted: float


class EnsembleKeys(BaseModel):
    """Keys of ensemble.json that predicting needs, with their types."""

    members: Annotated[list[str], Field(min_length=1)]
    weights: list[Annotated[float, Field(ge=0, le=1.001)]]  # rounded
    temperatures: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    thresholds: list[Annotated[float, Field(gt=0, le=1)]]
    weighting: str
    rule: Rule
    shrinkage: float | None
    tau: float | None
    diagnoses: list[str]
    files: dict[str, str] = {}
    embeddings_of: str = ""


class FitKeys(EnsembleKeys):
    """Keys of ensemble.json that describe the fit, for the report and the model card."""

    lesions: int
    folds: int
    bootstrap: int
    scores: dict[str, _Score]
    pairs: list[_Pair]
    weights_of: dict[str, list[str]]
    notes: list[str]
    choice: _Choice | None = None


@dataclass(frozen=True)
class Ensemble:
    """Weights of the members, thresholds and rule: everything between members' probabilities and a decision.

    members: M names.  weights: (M,) on the simplex.  thresholds: (C,) in (0, 1].  temperatures: (M,) that divide a
    member's logits before they become probabilities; 1 for the stacker.
    """

    members: tuple[str, ...]
    weights: np.ndarray
    thresholds: np.ndarray
    rule: Rule = "any"
    shrinkage: float | None = 0.0
    tau: float | None = None
    weighting: str = FITTED
    temperatures: np.ndarray = field(default_factory=lambda: np.empty(0))

    def combine(self, probabilities: Sequence[np.ndarray]) -> np.ndarray:
        """Return the (N, C) weighted mean of the members' (N, C), given in the order of `members`."""
        if len(probabilities) != len(self.members):
            raise DataError(
                f"the ensemble has {len(self.members)} members ({', '.join(self.members)}), got {len(probabilities)} "
                "tables"
            )
        combined = weighted_sum(self.weights, probabilities)
        return np.minimum(combined, 1.0)  # rounded weights may add up to a bit more

    def decide(self, probabilities: Sequence[np.ndarray]) -> np.ndarray:
        """Return (N, C) bool decisions."""
        return decide(self.combine(probabilities), self.thresholds, self.rule)

    def of_networks(self, names: Sequence[str]) -> Ensemble:
        """Return the ensemble of some networks, which have all of its weight and need no other member."""
        rows = [self.members.index(name) for name in names]
        return replace(self, members=tuple(names), weights=self.weights[rows], temperatures=self.temperatures[rows])

    def with_temperatures(self, temperatures: Mapping[str, float]) -> Ensemble:
        """Return the ensemble with temperatures of the members; 1 for members that are not named."""
        return replace(self, temperatures=np.array([temperatures.get(name, 1.0) for name in self.members]))

    def save(self, path: Path, task: Task, **extra: Any) -> None:
        """Write as JSON, with the task and the keys of `extra` (scores, notes), atomically."""
        tree = {
            "format": FORMAT,
            "version": VERSION,
            "members": self.members,
            "weights": self.weights.tolist(),
            "temperatures": self.temperatures.tolist(),
            "weighting": self.weighting,
            "diagnoses": task.diagnosis_names,
            "thresholds": self.thresholds.tolist(),
            "shrinkage": self.shrinkage,
            "tau": self.tau,
            "rule": self.rule,
            "task": task.to_mapping(),
            **extra,
        }
        write_checked_json(path, tree)

    @staticmethod
    def load(path: Path) -> Ensemble:
        """Read what `save` wrote. Raises DataError naming the file."""
        return Ensemble.of(read_artifact(path, schema=EnsembleKeys), path)

    @staticmethod
    def of(tree: Mapping[str, Any], path: Path) -> Ensemble:
        """Build the ensemble from the content of its file. Raises DataError naming the file."""
        numbers = {"weights": tree["members"], "temperatures": tree["members"], "thresholds": tree["diagnoses"]}
        for key, names in numbers.items():
            if len(tree[key]) != len(names):
                raise DataError(f"{path}: has {len(tree[key])} {key} for {len(names)} names; run triderm stack again")
        return Ensemble(
            members=tuple(tree["members"]),
            weights=np.array(tree["weights"]),
            thresholds=np.array(tree["thresholds"]),
            rule=tree["rule"],
            shrinkage=tree["shrinkage"],
            tau=tree["tau"],
            weighting=tree["weighting"],
            temperatures=np.array(tree["temperatures"]),
        )


def read_artifact(
    path: Path, format_name: str = FORMAT, version: int = VERSION, schema: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Read a JSON file that triderm stack wrote, by default ensemble.json, with the keys of a schema.

    Raises DataError naming the file.
    """
    try:
        tree = read_checked_json(path)
        if (tree.get("format"), tree.get("version")) != (format_name, version):
            raise DataError(f"{path}: not {format_name} version {version}; run triderm stack again")
        if schema:
            check_mapping(tree, schema)
            if tree["diagnoses"] != [*recorded_task(tree, str(path)).diagnosis_names]:
                raise DamagedFile("changed or damaged: its diagnoses are not those of its task")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run triderm stack first") from None
    except DamagedFile as error:
        raise DataError(f"{path}: {error}; run triderm stack again") from None
    except ConfigError as error:
        raise DataError(f"{error}; run triderm stack again") from None
    return tree


def read_task(path: Path) -> Task:
    """Return the task of ensemble.json; MILK10k's if it names none."""
    try:
        return recorded_task(read_artifact(path), str(path))
    except ConfigError as error:
        raise DataError(f"{error}; run triderm stack again") from None
