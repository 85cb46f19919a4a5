"""The whole way: pack, train all folds of all models, stack, predict with test-time augmentation, submission, report.

python -m launch.pipeline --config launch/experiments/milk10k_cpu.yaml data.source=MILK10k output=runs/milk10k

With data.test=FOLDER it also predicts a test set and writes the submission.

Run again, it skips what is done; killed and run again, it goes on where it was.
"""

from pathlib import Path

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import Experiment, save
from triderm_dist.schema import ConfigError
from triderm_dist.stages import Stage, run_stages


class PipelineRun(Experiment):
    launcher: str | None = Field(
        None, description="accelerate config file for the stages that use the network; null runs one process"
    )
    side_by_side: bool = Field(
        False, description="train folds at the same time, one process and GPU each, scheduled by Ray on this machine"
    )


def main(config: PipelineRun) -> None:
    if config.data.source is None and config.data.shards is None:
        raise ConfigError("data.source: the challenge folder is needed, or data.shards with packed shards")
    folder, settings = config.folder, config.folder / "config.yaml"
    if config.launcher and not Path(config.launcher).is_file():
        raise ConfigError(f"launcher: {config.launcher} is no file; see accelerate_configs/")
    if config.launcher and config.side_by_side:
        raise ConfigError("side_by_side: trains each fold in one process; leave it or launcher away")
    save(Experiment(**config.model_dump(exclude={"launcher", "side_by_side"})), settings)
    run_stages(list(stages(config, settings)), folder)
    for name in ("submission.csv", "oof_submission.csv", "report.html"):
        if (folder / name).exists():
            print(f"{folder / name}")


def stages(config: PipelineRun, settings: Path) -> list[Stage]:
    """What has to run, in order; what is skipped is decided by `run_stages`."""
    from triderm_dist.data.cache import index_file

    folder, with_config = config.folder, ["--config", str(settings)]
    data = config.data
    packing = data.model_dump(mode="json", exclude={"workers", "prefetch", "verify", "remote"})
    accelerate = ["launch.ranks", "--config_file", config.launcher, "-m"] if config.launcher else []
    network = ["python", "-m", *accelerate]
    models = {name: model.model_dump(mode="json") for name, model in config.models.items()}
    folds = [config.fold_folder(name, fold) for name in models for fold in range(config.data.folds)]
    tests = bool(config.data.test or config.data.test_shards)
    result = []
    if config.data.shards is None:
        result.append(_pack("pack", config, config.data.source, config.train_shards))
    if config.data.test:
        result.append(_pack("pack test", config, config.data.test, config.test_shards))
    oof = folder / "oof.parquet"
    spread = ["side_by_side=true"] if config.side_by_side else []
    result.append(
        Stage("crossval", [*network, "launch.crossval", *with_config, *spread], [models, packing, config.seed],
              [index_file(config.train_shards, data.remote)], [oof, *(fold / "predictions.parquet" for fold in folds)])
    )  # fmt: skip
    after = [config.stack.model_dump(mode="json"), config.ensemble.model_dump(mode="json"), config.seed]
    ensemble, stacked = folder / "ensemble.json", folder / "oof_submission.csv"
    embedded = []
    if config.stack.enabled and "embeddings" in config.stack.extra:
        shards = [config.train_shards, *([config.test_shards] if tests else [])]
        embedded = [folder / f"embeddings.{split}.parquet" for split in ("train", "test")[: len(shards)]]
        result.append(
            Stage("embed", [*network, "launch.embed", *with_config], [models, packing, config.seed],
                  [index_file(shard, data.remote) for shard in shards], embedded)
        )  # fmt: skip
    result.append(
        Stage("stack", ["python", "-m", "launch.stack", *with_config], after, [oof, *embedded], [ensemble, stacked])
    )
    shown = [ensemble, oof, settings]
    if tests:
        truth = [Path(config.data.test_truth)] if config.data.test_truth else []
        submission = folder / "submission.csv"
        needs = [ensemble, index_file(config.test_shards, data.remote), *(fold / "fold.json" for fold in folds), *truth]
        command = [*network, "launch.predict", *with_config]
        how = [config.predict.model_dump(mode="json"), packing]
        result.append(Stage("predict", command, how, needs, [submission]))
        shown += [submission, *truth]
    result.append(Stage("report", ["python", "-m", "launch.report", *with_config], [], shown, [folder / "report.html"]))
    return result


def _pack(name: str, config: Experiment, source: str | None, output: str) -> Stage:
    data = config.data
    keys = {"short_side": data.short_side, "missing_view": data.missing_view, "invalid": data.invalid}
    words = [f"{key}={'null' if value is None else value}" for key, value in keys.items()]
    command = ["python", "-m", "shards.pack", f"source={source}", f"output={output}", *words]
    return Stage(name, command, keys, [Path(str(source))], [Path(output) / "index.json"])


if __name__ == "__main__":
    run(PipelineRun, main, __doc__)
