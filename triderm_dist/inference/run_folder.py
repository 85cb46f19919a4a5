"""Read the description of a run's networks and ensemble from its folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from triderm_dist.config import CONFIG_FILE, Experiment, Networks, load_run
from triderm_dist.data.shards.open import is_packed, open_index
from triderm_dist.engine.fold import model_config, network_folders
from triderm_dist.engine.trained_network import TrainedNetwork
from triderm_dist.ensemble.fitted_ensemble import FittedEnsemble
from triderm_dist.ensemble.predict import trained_on
from triderm_dist.ensemble.run_files import ENSEMBLE_FILE, OOF_PREFIX
from triderm_dist.ensemble.stack_inputs import check_refit
from triderm_dist.files import why_no_folder
from triderm_dist.runtime.terminal import counted
from triderm_dist.schema import DataError, Signature, Task, check_choice
from triderm_dist.submission import result_files
from triderm_dist.tasks import recorded_task


@dataclass(frozen=True)
class RunFolder:
    """The content of a run's folder, without the networks themselves.

    concepts: of the networks.  networks: of each model of the ensemble, one per fold, or the refitted one.
    canvas: (width, height) of the photos that they were trained on, short_side: to which packing reduced larger ones.
    """

    path: Path
    experiment: Experiment
    fitted: FittedEnsemble
    concepts: tuple[str, ...]
    networks: dict[str, list[TrainedNetwork]]
    canvas: tuple[int, int]
    short_side: int | None

    @property
    def task(self) -> Task:
        return self.fitted.task

    @property
    def refitted(self) -> bool:
        """Whether the networks are those of a refit."""
        return any(each.refit_of for trained in self.networks.values() for each in trained)

    @property
    def signature(self) -> Signature:
        return self.task.signature(self.concepts)

    @cached_property
    def trained_ids(self) -> set[str]:
        """The ids of the lesions in oof.parquet; none in an export. Raises DataError for a damaged file."""
        return trained_on(self.path)[0]

    def notes_on_training(self, lesion_ids: Iterable[str]) -> Iterator[str]:
        """Yield how many lesions have the id of a training lesion; nothing for an export, which has no ids.

        Raises DataError if oof.parquet is damaged.
        """
        ids = [*lesion_ids]
        if count := sum(name in self.trained_ids for name in ids):
            held_out = self.path / result_files(self.task, OOF_PREFIX)[0]
            yield (
                f"{count:,} of {counted(len(ids), 'lesion')} {'has' if count == 1 else 'have'} the id of a training "
                f"lesion; a score on the same lesions is not held out, their held-out predictions are in {held_out}"
            )


def open_run_folder(path: Path, networks: Networks = "folds") -> RunFolder:
    """Read the settings, the ensemble and the fold.json of every network of a run.

    Raises ConfigError for settings that this version cannot read, DataError for a folder that is no run, whose ensemble
    is not fitted or does not take these networks, CheckpointError for a fold.json that is damaged.
    """
    check_choice("networks", networks, get_args(Networks))
    if not path.is_dir():
        raise DataError(f"{path}: {why_no_folder(path)}; give the folder of a run, a zip of it, or hf-hub:USER/NAME")
    if not (path / CONFIG_FILE).is_file():
        raise DataError(f"{path}: has no {CONFIG_FILE}; give the folder of a run, such as runs/demo")
    experiment = load_run(Experiment, path)
    fitted = FittedEnsemble.load(path)
    task = fitted.task
    if networks == "refit" and fitted.stacker:
        check_refit(fitted.stacker.extra)
    found = {name: _trained(experiment, name, networks) for name in fitted.models}
    trained = [each for networks_of_model in found.values() for each in networks_of_model]
    for each in trained:
        where = str(each.folder / "fold.json")
        if not (other := recorded_task(each.info, where)).matches(task):
            raise DataError(
                f"{where}: trained for task {other.name!r}, and {ENSEMBLE_FILE} is for {other.named_other(task)}; "
                "run triderm stack again"
            )
    concepts = tuple(trained[0].info["concepts"])
    if any(tuple(each.info["concepts"]) != concepts for each in trained):
        raise DataError(f"{path}: its networks were trained with different concepts; train them again on one set")
    return RunFolder(path, experiment, fitted, concepts, found, *_preparation(experiment, trained[0].info))


def _trained(experiment: Experiment, name: str, networks: Networks) -> list[TrainedNetwork]:
    model_config(experiment, name)
    folders = network_folders(experiment, name, networks)
    return [TrainedNetwork.read(folder) for folder in folders]


def _preparation(experiment: Experiment, info: Mapping[str, Any]) -> tuple[tuple[int, int], int | None]:
    """Return the canvas and the short side of the photos that a fold was trained on.

    Folds trained before fold.json recorded them need a packed set of the run.
    """
    if recorded := info.get("photos"):
        width, height = recorded["canvas"]
        return (width, height), recorded["short_side"]
    for shards in (experiment.train_shards, experiment.test_shards):
        if is_packed(shards):
            return open_index(shards, experiment.data.remote).canvas, experiment.data.short_side
    raise DataError(
        f"{experiment.train_shards}: no packed set, and this run does not record the size of its photos; put the set "
        "back, or train again"
    )
