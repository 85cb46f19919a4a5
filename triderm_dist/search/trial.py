"""One trial: trained as by `triderm train`, reported after each epoch, and recorded in trial.json."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pydantic import BaseModel, create_model

from triderm_dist.checksums import DamagedFile, read_checked_json
from triderm_dist.config import Experiment
from triderm_dist.distributed import collectives
from triderm_dist.files import write_json
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import DataError, InputError
from triderm_dist.search.space import with_settings

if TYPE_CHECKING:
    from triderm_dist.data.shards.index import ShardIndex

State = Literal["running", "complete", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """The record of a trial: its settings, progress and scores.

    macro_f1 (argmax) and official are means over the folds trained so far, each of the epoch whose weights are kept;
    curve is macro_f1 after each epoch. seed is added to the experiment's: above 0 the trial repeats that of its number.
    bad_input: it failed for invalid input, which a retry cannot fix. changes: where population-based training copied a
    leading trial, oldest first, each {"epoch", "trial" that was copied, "settings" until then}.
    """

    number: int
    settings: dict[str, Any]
    seed: int = 0
    state: State = "running"
    epochs: int = 0
    macro_f1: float | None = None
    official: float | None = None
    seconds: float = 0.0
    error: str = ""
    bad_input: bool = False
    curve: list[float] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write FOLDER/trial.json."""
        write_json(folder / "trial.json", asdict(self))


_TYPES = get_type_hints(Trial)
_TrialKeys: type[BaseModel] = create_model(
    "_TrialKeys",
    **{  # type: ignore[call-overload]
        each.name: (_TYPES[each.name], ... if each.default is each.default_factory is MISSING else None)
        for each in fields(Trial)
    },
)
"""Keys of trial.json with their types; those with a default may be absent."""


def read_trial(folder: Path) -> Trial | None:
    """Read the trial in a folder; None if none has started. Raises DataError for an invalid trial.json."""
    path = folder / "trial.json"
    try:
        return Trial(**read_checked_json(path, _TrialKeys))
    except FileNotFoundError:
        return None
    except (DamagedFile, TypeError) as error:
        raise DataError(f"{path}: not the record of a trial ({one_line(error)}); remove its folder") from None


def read_trials(folder: Path, repeats: bool = False) -> list[Trial]:
    """Read all trials in a search folder by number, or their repetitions with other seeds."""
    found = [read_trial(path) for path in folder.glob("trial-*")]
    chosen = [trial for trial in found if trial and bool(trial.seed) == repeats]
    return sorted(chosen, key=lambda trial: (trial.number, trial.seed))


def last_checkpoint(folder: Path) -> int:
    """Return the epoch of the newest checkpoint in a trial's folder, 0 if there is none."""
    found = folder.glob("*/fold-*/checkpoints/epoch-*/state.json")
    return max((int(path.parent.name.split("-")[1]) for path in found), default=0)


class _Curve:
    """The scores of a trial, fold after fold."""

    def __init__(self, select: str) -> None:
        self.select, self.epochs = select, 0
        self.means: list[float] = []
        self._finished: list[dict[str, float]] = []
        self._kept: dict[str, float] | None = None
        self._epoch = 0

    def add(self, epoch: int, scores: dict[str, float]) -> bool:
        """Add the scores of an epoch of the fold; False if that epoch is known already, as after a resume."""
        if epoch <= self._epoch:
            return False
        if self._kept is None or self.select == "last" or scores["macro_f1"] > self._kept["macro_f1"]:
            self._kept = scores
        self.epochs, self._epoch = self.epochs + epoch - self._epoch, epoch
        self.means.append(round(self.mean("macro_f1"), 6))
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
    leader: Path | None = None,
) -> None:
    """Train `folds` of one model with the trial's settings in FOLDER, as `triderm train` does; resumes. Call on all
    ranks.

    report: is called with {"epoch" (over all folds), "macro_f1", "official"} after every epoch, for the last one when
    the predictions are written. Writes FOLDER/trial.json. Shards and tokens are those of the experiment. leader: a copy
    of the folder of a trial that this one continues with its own settings, unless it has done so before.
    """
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.engine.crossval import run_folds

    started, before, on_main = time.monotonic(), 0.0, collectives.is_main()
    try:
        own = _own_experiment(trial, experiment, model, folder)
        index = open_index(own.train_shards, own.data.remote)
        if on_main:
            trial, before = _open_folder(trial, own, index, model, folds, folder, leader)
        collectives.barrier()
        train = own.models[model].train
        curve, all_epochs = _Curve(train.select), len(folds) * train.epochs

        def publish(state: State) -> None:
            macro_f1, official = curve.mean("macro_f1"), curve.mean("official")
            known = read_trial(folder) if on_main else None
            if known and known.state == "running":  # not stopped in the meantime
                seconds = round(before + time.monotonic() - started, 2)
                now = replace(trial, state=state, epochs=curve.epochs, seconds=seconds, curve=list(curve.means))
                replace(now, macro_f1=macro_f1, official=official).write(folder)
            report({"epoch": curve.epochs, "macro_f1": macro_f1, "official": official})

        def on_validation(epoch: int, scores: dict[str, float]) -> None:
            # The last epoch is reported after the predictions, since a trial may be stopped as soon as it reports.
            if curve.add(epoch, scores) and curve.epochs < all_epochs:
                publish("running")

        for fold in folds:
            for epoch, scores in _validations(own.fold_folder(model, fold)):
                on_validation(epoch, scores)
            run_folds(own, index, [model], [fold], on_validation)
            curve.end_fold()
        publish("complete")
    except Exception as error:
        bad_input = isinstance(error, InputError)
        text = one_line(error, with_type=not bad_input)
        replace(read_trial(folder) or trial, state="failed", error=text, bad_input=bad_input).write(folder)
        raise


def _validations(fold_folder: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the epochs that a fold has validated before, and their scores."""
    from triderm_dist.monitoring.metrics_log import read_metrics

    for record in read_metrics(fold_folder / "metrics.jsonl"):
        if record["kind"] == "validation":
            yield int(record["epoch"]), {name: record[name] for name in ("macro_f1", "official")}


def _own_experiment(trial: Trial, experiment: Experiment, model: str, folder: Path) -> Experiment:
    """Return the experiment that a trial trains in its folder. Raises ConfigError for settings that contradict."""
    # A trial resumes from its last checkpoint, so that one is enough; another may continue from that of a complete one.
    kept = {"train.keep_last": 1, "train.keep_checkpoints": True, "train.save_every_seconds": None}
    own = with_settings(experiment, model, {**trial.settings, **kept, "train.validate_every": 1})
    # Extra sets leave out photos of the test set, as in a training outside of the search.
    data = own.data.model_copy(update={"shards": experiment.train_shards, "test_shards": experiment.test_shards})
    changes = {"output": str(folder), "data": data, "tokens": str(experiment.token_folder)}
    if trial.seed:  # the tokens of a frozen tower are shared by all trials
        changes |= {"seed": experiment.seed + trial.seed, "token_seed": experiment.seed_of_tokens}
    return own.model_copy(update=changes)


def _open_folder(
    trial: Trial,
    own: Experiment,
    index: ShardIndex,
    model: str,
    folds: Sequence[int],
    folder: Path,
    leader: Path | None,
) -> tuple[Trial, float]:
    """Prepare the folder of a trial: keep that of an interrupted one, copy its leader's, or start with an empty one.

    Returns the trial with its history, and the seconds that it has taken so far.
    """
    from triderm_dist.engine.checkpoint import Checkpoints
    from triderm_dist.engine.fold import resume_hashes

    earlier, leading = read_trial(folder), read_trial(leader) if leader else None
    before = earlier.seconds if earlier else 0.0
    same = earlier is not None and earlier.settings == trial.settings
    if leader and leading and (not same or leading.number != trial.number):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(leader, folder)
        for fold in folds:
            fold_folder = own.fold_folder(model, fold)
            Checkpoints(fold_folder, resume_hashes(own, index, model, fold), keep_last=1).adopt()
        change = {"epoch": leading.epochs, "trial": leading.number, "settings": leading.settings}
        changes = leading.changes if leading.number == trial.number else [*leading.changes, change]
        trial = replace(trial, changes=changes)
    elif earlier and same:
        trial = replace(trial, changes=earlier.changes)
    elif earlier:
        shutil.rmtree(folder)  # of a trial that Ray had not recorded when it was killed
        before = 0.0
    trial.write(folder)
    return trial, before
