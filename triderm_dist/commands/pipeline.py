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
    if config.data.source is None and config.data.shards is None:
        raise ConfigError(
            "data.source is missing: name a folder of photos with a table, or packed shards as data.shards"
        )
    for model in config.models.values():
        check_network(model)
    if config.stack.enabled:
        from triderm_dist.ensemble.fitted_stacker import stacker_kind

        stacker_kind(config.stack)  # refuses unknown kinds and settings before anything is trained
    from triderm_dist.doctor.preflight import check_pipeline

    folder, settings = config.folder, config.folder / CONFIG_FILE
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
    found = stages(config, settings)
    for note in check_pipeline(config.experiment):
        print(wrapped(f"note: {note}"))
    used = run_stages(found, folder, begin=lambda: save(config.experiment, settings))
    if used:
        print(usage_table(used))
        print(wrapped(f"data, disk, other: what the main thread waited for; {folder / ENVIRONMENT_FILE} keeps this"))
    for path in (path for stage in found for path in stage.outputs):
        if path.parent == folder and path.suffix in (".csv", ".html"):
            print(path)


def stages(config: PipelineRun, settings: Path) -> list[Stage]:
    """Return all stages in order; `run_stages` decides which are skipped."""
    from triderm_dist.data.shards.open import index_file
    from triderm_dist.ensemble.run_files import OOF_PREFIX
    from triderm_dist.submission import result_files

    folder, of_run = config.folder, [f"run={config.folder}"]
    data, extra = config.data, config.stack.extra if config.stack.enabled else ()
    packing = stable_dump(data, "data")
    for key in ("workers", "prefetch", "verify", "remote", "task", "groups"):  # task and groups are in the index
        packing.pop(key, None)
    launcher = find_file("accelerate_configs", config.launcher) if config.launcher else None
    models = {name: stable_dump(model, "models.NAME") for name, model in config.models.items()}
    folds = [config.fold_folder(name, fold) for name in models for fold in range(data.folds)]
    out_of_fold = stable_dump(config.oof, "oof")

    def training(data: dict[str, Any]) -> list[Any]:
        return [models, data, config.seed, config.token_seed]

    def held_out(data: dict[str, Any]) -> list[Any]:
        return [*training(data), out_of_fold] if out_of_fold else training(data)

    def predicting(data: dict[str, Any]) -> list[Any]:
        return [stable_dump(config.predict, "predict"), data]

    def stage(
        name: str,
        command: list[str],
        settings: Callable[[dict[str, Any]], list[Any]],
        inputs: list[Path],
        outputs: list[Path],
    ) -> Stage:
        return Stage(name, command, settings(_without_paths(packing)), inputs, outputs, settings(packing))

    train_index = index_file(config.train_shards, data.remote)
    extra_indices = [index_file(each.shards, data.remote) for each in data.extra_sets.values()]
    test_index = [index_file(config.test_shards, data.remote)] if data.test or data.test_shards else []
    if "features" in extra and not test_index:
        raise ConfigError("stack.extra: features are aligned on a test set; set data.test")
    setting, task = run_task(config)
    result = _packing_stages(config, setting, task)
    oof = folder / "oof.parquet"
    given = config.model_dump(include=config.model_fields_set & {"parallel_folds", *PARALLEL_FOLDS_KEYS})
    parallel = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]
    predictions = [oof, *(fold / "predictions.parquet" for fold in folds)]
    crossval = [*program("crossval", launcher), *of_run, *parallel]
    begun_with = [path for name in models for path in _warm_start(config, name)]
    result.append(stage("crossval", crossval, held_out, [train_index, *extra_indices, *begun_with], predictions))
    extra_files = []
    if "embeddings" in extra:
        indices = [train_index, *test_index]
        embedded = [folder / f"embeddings.{split}.parquet" for split in ("train", "test")[: len(indices)]]
        result.append(stage("embed", [*program("embed", launcher), *of_run], training, indices, embedded))
        extra_files += embedded
    trained = [fold / "fold.json" for fold in folds]
    predict = [*program("predict", launcher), *of_run]
    if "features" in extra:
        predicted = [fold / "test.parquet" for fold in folds]
        result.append(
            stage("predict folds", [*predict, "submit=false"], predicting, [*test_index, *trained], predicted)
        )
        extra_files += predicted
    stacking = [stable_dump(config.stack, "stack"), stable_dump(config.ensemble, "ensemble"), config.seed]
    ensemble = folder / "ensemble.json"
    stacked = [ensemble, *(folder / name for name in result_files(task, OOF_PREFIX))]
    result.append(Stage("stack", [*program("stack"), *of_run], stacking, [oof, *extra_files], stacked))
    reported = [ensemble, oof, settings]
    if test_index:
        truth = [Path(data.test_truth)] if data.test_truth else []
        results = [folder / name for name in result_files(task)]
        result.append(stage("predict", predict, predicting, [ensemble, *test_index, *trained, *truth], results))
        reported += [*results, *truth]
    result.append(Stage("report", [*program("report"), *of_run], [], reported, [folder / "report.html"]))
    return result


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

    model = config.models[name]
    settings = {f"extra_towers.{number}": each.init for number, each in enumerate(model.extra_towers)}
    if model.init:
        settings["init"] = model.init
    try:
        found = [each for key, init in settings.items() for each in find_networks(init, name, key)]
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
