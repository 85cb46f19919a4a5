"""One trial: training by what `launch.train` calls, told epoch by epoch, and what is known of it on disk."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from triderm_dist.config import Experiment
from triderm_dist.files import write_json
from triderm_dist.schema import DataError, InputError
from triderm_dist.search.space import with_settings

State = Literal["running", "complete", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """What is known of a trial: its settings, how far it came and what it scores there.

    macro_f1 (argmax) and official are means over the folds trained so far, each of the epoch whose weights are kept.
    """

    number: int
    settings: dict[str, Any]
    state: State = "running"
    epochs: int = 0
    macro_f1: float | None = None
    official: float | None = None
    seconds: float = 0.0
    error: str = ""

    def write(self, folder: Path) -> None:
        """Write FOLDER/trial.json."""
        write_json(folder / "trial.json", asdict(self))


def read_trial(folder: Path) -> Trial | None:
    """The trial of a folder; None where none has begun. Raises DataError for a trial.json that is no trial."""
    path = folder / "trial.json"
    try:
        return Trial(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a trial ({' '.join(str(error).split())}); delete its folder") from None


def read_trials(folder: Path) -> list[Trial]:
    """All trials of a search folder, by number."""
    found = [read_trial(path) for path in folder.glob("trial-*")]
    return sorted((trial for trial in found if trial), key=lambda trial: trial.number)


class _Curve:
    """The scores of a trial, fold after fold."""

    def __init__(self, select: str) -> None:
        self.select, self.epochs = select, 0
        self._finished: list[dict[str, float]] = []
        self._kept: dict[str, float] | None = None
        self._epoch = 0

    def add(self, epoch: int, scores: dict[str, float]) -> bool:
        """Take the scores of an epoch of the fold; False where it was told before, as it is after a resume."""
        if epoch <= self._epoch:
            return False
        if self._kept is None or self.select == "last" or scores["macro_f1"] > self._kept["macro_f1"]:
            self._kept = scores
        self.epochs, self._epoch = self.epochs + epoch - self._epoch, epoch
        return True

    def end_fold(self) -> None:
        assert self._kept is not None, "a fold ends after an epoch"
        self._finished.append(self._kept)
        self._kept, self._epoch = None, 0

    def mean(self, name: str) -> float:
        scores = [*self._finished, *([self._kept] if self._kept else [])]
        return sum(score[name] for score in scores) / len(scores)


def run_trial(
    trial: Trial,
    experiment: Experiment,
    model: str,
    folds: Sequence[int],
    folder: Path,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Train `folds` of one model with the trial's settings in FOLDER, by what `launch.train` calls; resumes.

    `report` is told {"epoch" (over all folds), "macro_f1", "official"} after every epoch, the last when the
    predictions are written. Leaves FOLDER/trial.json. Shards and tokens are those of the experiment.
    """
    from triderm_dist.data.cache import open_index
    from triderm_dist.engine.crossval import run_folds
    from triderm_dist.engine.tracking import read_metrics

    earlier, started = read_trial(folder), time.monotonic()
    if earlier and earlier.settings != trial.settings:
        shutil.rmtree(folder)  # of a trial that Ray had forgotten when it was killed
        earlier = None
    before = earlier.seconds if earlier else 0.0
    trial.write(folder)
    # Nobody resumes a trial from an older checkpoint than its last.
    own = with_settings(experiment, model, {**trial.settings, "train.keep_last": 1})
    data = own.data.model_copy(update={"shards": experiment.train_shards})
    own = own.model_copy(update={"output": str(folder), "data": data, "tokens": str(experiment.token_folder)})
    train = own.models[model].train
    curve, all_epochs = _Curve(train.select), len(folds) * train.epochs

    def tell(state: State) -> None:
        macro_f1, official = curve.mean("macro_f1"), curve.mean("official")
        seconds = round(before + time.monotonic() - started, 2)
        replace(
            trial, state=state, epochs=curve.epochs, macro_f1=macro_f1, official=official, seconds=seconds
        ).write(folder)  # fmt: skip
        report({"epoch": curve.epochs, "macro_f1": macro_f1, "official": official})

    def on_validation(epoch: int, scores: dict[str, float]) -> None:
        # The last epoch waits for the predictions, since a trial may be stopped as soon as it has reported.
        if curve.add(epoch, scores) and curve.epochs < all_epochs:
            tell("running")

    try:
        index = open_index(own.train_shards, own.data.remote)
        for fold in folds:
            for record in read_metrics(own.fold_folder(model, fold) / "metrics.jsonl"):
                if record["kind"] == "validation":
                    on_validation(int(record["epoch"]), {name: record[name] for name in ("macro_f1", "official")})
            run_folds(own, index, [model], [fold], on_validation)
            curve.end_fold()
        tell("complete")
    except Exception as error:
        text = f"{'' if isinstance(error, InputError) else f'{type(error).__name__}: '}{' '.join(str(error).split())}"
        replace(read_trial(folder) or trial, state="failed", error=text).write(folder)
        raise
