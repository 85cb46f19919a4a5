"""Run all stages: pack, train all folds of all models, stack, predict with test-time augmentation, report.

triderm pipeline --config milk10k_cpu data.source=MILK10k output=runs/milk10k

With data.test=FOLDER it also predicts a test set and writes the results. A second run skips finished stages; an
interrupted run resumes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.commands import programs_using
from triderm_dist.config import (
    CONFIG_FILE,
    PARALLEL_FOLDS_KEYS,
    Experiment,
    ParallelFoldsRun,
    find_file,
    load_run,
    save,
    stable_dump,
)
from triderm_dist.environment import ENVIRONMENT_FILE
from triderm_dist.models import check_network
from triderm_dist.runtime.extras import DEEPSPEED, require
from triderm_dist.runtime.terminal import wrapped
from triderm_dist.runtime.usage import usage_table
from triderm_dist.schema import ConfigError, InputError, Task
from triderm_dist.settings import PathText
from triderm_dist.stages import Stage, run_stages
from triderm_dist.tasks import check_packed_for, load_task, milk10k_task


class PipelineRun(ParallelFoldsRun):
    uses = None

    launcher: PathText | None = Field(
        None,
        description="accelerate file, or the name of a shipped one, for the stages that run the networks; null runs "
        "one process",
    )

    @property
    def log_folder(self) -> Path:
        return self.folder


def main(config: PipelineRun) -> None:
    from triderm_dist.doctor.preflight import check_pipeline

    _check(config)
    settings = config.folder / CONFIG_FILE
    planned = stages(config, settings)
    for note in check_pipeline(config.experiment):
        print(wrapped(f"note: {note}"))
    used = run_stages(planned, config.folder, begin=lambda: save(config.experiment, settings))
    if used:
        environment = config.folder / ENVIRONMENT_FILE
        print(usage_table(used))
        print(wrapped(f"data, disk, other: what the main thread waited for; {environment} keeps this"))
    for path in (path for stage in planned for path in stage.outputs):
        if path.parent == config.folder and path.suffix in (".csv", ".html"):
            print(path)


def _check(config: PipelineRun) -> None:
    """Raise InputError for settings that do not go together, and for missing packages, before any file is read."""
    if config.data.source is None and config.data.shards is None:
        raise ConfigError(
            "data.source is missing: name a folder of photos with a table, or packed shards as data.shards"
        )
    for model in config.models.values():
        check_network(model)
    if config.stack.enabled:
        from triderm_dist.ensemble.fitted_stacker import stacker_kind

        stacker_kind(config.stack)  # refuses unknown kinds and settings before anything is trained
    if config.launcher and not find_file("accelerate_configs", config.launcher).is_file():
        raise ConfigError(
            f"launcher: {config.launcher}: no such file, nor a shipped one of that name; triderm config list names them"
        )
    if config.launcher:
        from triderm_dist.doctor.launcher import read_launcher

        if read_launcher(config.launcher).strategy == "deepspeed":
            require("DeepSpeed ZeRO", *DEEPSPEED)
    if config.parallel_folds is True:
        require("parallel_folds", "ray")
    if config.launcher and config.parallel_folds is True:
        raise ConfigError("parallel_folds: trains each fold in one process; remove parallel_folds or launcher")


def stages(config: PipelineRun, settings: Path) -> list[Stage]:
    """Return all stages in order; `run_stages` decides which are skipped. settings: the saved config.yaml."""
    extra = config.stack.extra if config.stack.enabled else ()
    has_test = bool(config.data.test or config.data.test_shards)
    if "features" in extra and not has_test:
        raise ConfigError("stack.extra: features are aligned on a test set; set data.test")
    setting, task = run_task(config)
    run = _RunStages(config, task)
    result = [*_packing_stages(config, setting, task), run.crossval()]
    columns = []
    if "embeddings" in extra:
        columns.append(run.embed())
    if "features" in extra:
        columns.append(run.predict_folds())
    result += [*columns, run.stack([path for stage in columns for path in stage.outputs])]
    if has_test:
        result.append(run.predict())
    return [*result, run.report(settings)]


class _RunStages:
    """The stages that work on packed sets and on the run folder, each with its command, settings and files."""

    def __init__(self, config: PipelineRun, task: Task) -> None:
        from triderm_dist.data.shards.open import index_file

        self.config, self.task, self.folder, data = config, task, config.folder, config.data
        self.launcher = find_file("accelerate_configs", config.launcher) if config.launcher else None
        self.train_index = index_file(config.train_shards, data.remote)
        self.extra_indices = [index_file(each.shards, data.remote) for each in data.extra_sets.values()]
        self.test_index = [index_file(config.test_shards, data.remote)] if data.test or data.test_shards else []
        self.oof, self.ensemble = self.folder / "oof.parquet", self.folder / "ensemble.json"
        self.folds = [config.fold_folder(name, fold) for name in config.models for fold in range(data.folds)]
        self.packing = stable_dump(data, "data")
        for key in ("workers", "prefetch", "verify", "remote", "task", "groups"):  # task and groups are in the index
            self.packing.pop(key, None)

    def crossval(self) -> Stage:
        """Train all folds of all models."""
        config = self.config
        given = config.model_dump(include=config.model_fields_set & {"parallel_folds", *PARALLEL_FOLDS_KEYS})
        parallel = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]
        inputs = [self.train_index, *self.extra_indices]
        inputs += [path for name in config.models for path in _warm_start(config, name)]
        predictions = [self.oof, *(fold / "predictions.parquet" for fold in self.folds)]
        out_of_fold = stable_dump(config.oof, "oof")

        def held_out(data: dict[str, Any]) -> list[Any]:
            return [*self._training(data), out_of_fold] if out_of_fold else self._training(data)

        return self._on_data("crossval", [*self._on_ranks("crossval"), *parallel], held_out, inputs, predictions)

    def embed(self) -> Stage:
        """Compute the embeddings that the stacker reads."""
        indices = [self.train_index, *self.test_index]
        embedded = [self.folder / f"embeddings.{split}.parquet" for split in ("train", "test")[: len(indices)]]
        return self._on_data("embed", self._on_ranks("embed"), self._training, indices, embedded)

    def predict_folds(self) -> Stage:
        """Predict the test set by the models of all folds, for the features that the stacker reads."""
        command, inputs = [*self._on_ranks("predict"), "submit=false"], [*self.test_index, *self._trained()]
        predicted = [fold / "test.parquet" for fold in self.folds]
        return self._on_data("predict folds", command, self._predicting, inputs, predicted)

    def stack(self, columns: list[Path]) -> Stage:
        """Fit the stacker and the ensemble. columns: files with further columns for the stacker."""
        from triderm_dist.ensemble.run_files import OOF_PREFIX
        from triderm_dist.submission import result_files

        config = self.config
        settings = [stable_dump(config.stack, "stack"), stable_dump(config.ensemble, "ensemble"), config.seed]
        outputs = [self.ensemble, *(self.folder / name for name in result_files(self.task, OOF_PREFIX))]
        return Stage("stack", [*program("stack"), self._run], settings, [self.oof, *columns], outputs)

    def predict(self) -> Stage:
        """Predict the test set and write the results."""
        inputs = [self.ensemble, *self.test_index, *self._trained(), *self._truth()]
        return self._on_data("predict", self._on_ranks("predict"), self._predicting, inputs, self._results())

    def report(self, settings: Path) -> Stage:
        """Write the report. settings: the saved config.yaml."""
        inputs = [self.ensemble, self.oof, settings]
        if self.test_index:
            inputs += [*self._results(), *self._truth()]
        return Stage("report", [*program("report"), self._run], [], inputs, [self.folder / "report.html"])

    @property
    def _run(self) -> str:
        return f"run={self.folder}"

    def _on_ranks(self, name: str) -> list[str]:
        return [*program(name, self.launcher), self._run]

    def _on_data(
        self,
        name: str,
        command: list[str],
        settings: Callable[[dict[str, Any]], list[Any]],
        inputs: list[Path],
        outputs: list[Path],
    ) -> Stage:
        """Return a stage whose settings hold those of the data. Earlier versions recorded the paths of data too."""
        return Stage(name, command, settings(_without_paths(self.packing)), inputs, outputs, settings(self.packing))

    def _training(self, data: dict[str, Any]) -> list[Any]:
        models = {name: stable_dump(model, "models.NAME") for name, model in self.config.models.items()}
        return [models, data, self.config.seed, self.config.token_seed]

    def _predicting(self, data: dict[str, Any]) -> list[Any]:
        return [stable_dump(self.config.predict, "predict"), data]

    def _trained(self) -> list[Path]:
        return [fold / "fold.json" for fold in self.folds]

    def _truth(self) -> list[Path]:
        return [Path(self.config.data.test_truth)] if self.config.data.test_truth else []

    def _results(self) -> list[Path]:
        from triderm_dist.submission import result_files

        return [self.folder / name for name in result_files(self.task)]


def _packing_stages(config: PipelineRun, setting: str, task: Task) -> list[Stage]:
    """Return the stages that pack the training and the test set, unless they are given packed. See `_pack`."""
    from triderm_dist.data.group_hashes import groups_file

    data, result = config.data, []
    if data.shards is None and not _is_gone(config, "source", config.train_shards):
        result.append(_pack("pack", config, str(data.source), setting, task, config.train_shards))
    salt = config.train_shards if result or groups_file(config.train_shards).is_file() else None
    if data.test and data.test_shards is None and not _is_gone(config, "test", config.test_shards):
        result.append(_pack("pack test", config, data.test, setting, task, config.test_shards, salt))
    return result


def _warm_start(config: Experiment, name: str) -> list[Path]:
    """Return the files that describe a model's initial weights; [] if their run no longer exists and all is trained.

    Raises ConfigError if it is not there and a fold is not finished.
    """
    from triderm_dist.engine.warm_start import find_networks

    try:
        found = [each for key, init in config.models[name].inits.items() for each in find_networks(init, name, key)]
        return [each.folder / "weights.json" for each in found]
    except InputError:
        if all((config.fold_folder(name, fold) / "fold.json").is_file() for fold in range(config.data.folds)):
            return []
        raise


def _without_paths(data: dict[str, Any]) -> dict[str, Any]:
    """Remove paths of data: inputs of the stages are compared by content."""
    paths = ("source", "test", "shards", "test_shards", "test_truth")
    kept = {key: value for key, value in data.items() if key not in paths}
    return {key: [_without_paths(each) for each in value] if key == "extra" else value for key, value in kept.items()}


def _is_gone(config: Experiment, key: Literal["source", "test"], shards: str) -> bool:
    """Return whether a folder was packed into this run and has been deleted, or the run was moved away from it."""
    from triderm_dist.data.shards.open import is_packed

    folder = getattr(config.data, key)
    if folder is None or Path(folder).exists() or not is_packed(shards) or not (config.folder / CONFIG_FILE).exists():
        return False
    before = getattr(load_run(Experiment, config.folder).data, key)
    return before is not None and Path(before).absolute() == Path(folder).absolute()


def run_task(config: PipelineRun) -> tuple[str, Task]:
    """Return the task of the training set, and the name or file that gives it to `triderm pack`.

    Raises DataError for a packed set of another task.
    """
    from triderm_dist.data.readers.source import find_task, task_setting
    from triderm_dist.data.shards.open import index_file

    data = config.data
    if data.shards is None and not _is_gone(config, "source", config.train_shards):
        setting = task_setting(str(data.source), data.task)
        task = find_task(str(data.source), setting)
    else:
        setting = str(index_file(config.train_shards, data.remote))
        task = load_task(setting)
        if data.task and data.shards:
            advice = "remove data.task, or pack the training set again"
            check_packed_for(task, load_task(data.task), data.shards, advice)
    if data.test_shards:
        packed = load_task(index_file(data.test_shards, data.remote))
        check_packed_for(packed, task, data.test_shards, "pack the test set for the task of the training set")
    return setting, task


def program(name: str, launcher: Path | None = None) -> list[str]:
    """Return the command of a program, on the ranks of an accelerate file if one is given."""
    ranks = ["triderm_dist.commands.ranks", "--config_file", str(launcher), "-m"] if launcher else []
    return ["python", "-m", *ranks, f"triderm_dist.commands.{name}"]


def _pack(
    name: str, config: Experiment, source: str, setting: str, task: Task, output: str, salt: str | None = None
) -> Stage:
    """Return the stage that packs a folder. setting, task: see `run_task`.  salt: the set whose salt hashes groups."""
    from triderm_dist.data.readers.source import reader_of

    data = config.data
    keys: dict[str, Any] = {"short_side": data.short_side, "missing_view": data.missing_view, "invalid": data.invalid}
    overrides = [f"{key}={'null' if value is None else value}" for key, value in keys.items()]
    if data.groups == "plain":
        keys["groups"] = "plain"
        overrides.append("groups=plain")
    elif salt:
        overrides.append(f"salt={salt}")
    if config.plugins:
        overrides.append(f"plugins=[{','.join(map(json.dumps, config.plugins))}]")
    if task != milk10k_task():  # stages of MILK10k were recorded before there were other tasks
        keys["task"] = task.to_mapping()
    overrides.append(f"task={setting}")
    command = [*program("pack"), f"source={source}", f"output={output}", *overrides]
    return Stage(name, command, keys, reader_of(task).inputs(Path(source), task), [Path(output) / "index.json"])


def start() -> None:
    run(
        PipelineRun, main, __doc__, users=programs_using,
        on_ranks=lambda config: not config.launcher and config.parallel_folds is not True,
    )  # fmt: skip


if __name__ == "__main__":
    start()
