"""Predict a test set with every fold's model and test-time augmentation, and write the results as CSV.

The results are submission.csv for the task of a challenge, else probabilities.csv and decisions.csv.

accelerate launch --config_file accelerate_configs/ddp.yaml -m triderm_dist.commands.predict run=RUN

With lesion ids it draws the attention maps of the tri-modal networks instead, OUTPUT/explain/MODEL/ID.png and .json:

triderm predict run=RUN explain=[IL_0000652,IL_0003176]

With `networks=refit` the networks of `triderm refit` predict instead of those of the folds, and the results go into
RUN/refit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.commands import programs_using
from triderm_dist.config import TRAINING, Networks, RunReader

if TYPE_CHECKING:
    from triderm_dist.data.shards.index import ShardIndex


class PredictRun(RunReader):
    uses = (*TRAINING, "data.test_shards", "data.test_truth", "ensemble.members", "predict")

    explain: tuple[str, ...] = Field(
        (), description="ids of lesions to draw attention maps of, instead of predicting the test set"
    )
    networks: Networks = Field(
        "folds",
        description="networks that predict: those of all folds, averaged, or the one per model of triderm refit, whose "
        "results go into the folder refit of the run",
    )
    submit: bool = Field(
        True, description="write the results; false only writes each fold's test.parquet, for stack.extra=[features]"
    )


def main(config: PredictRun) -> None:
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.distributed.collectives import is_main
    from triderm_dist.engine.fold import network_folders
    from triderm_dist.engine.predict_test import predict_test
    from triderm_dist.ensemble.artifact import Ensemble, read_task
    from triderm_dist.ensemble.fitted_stacker import FittedStacker
    from triderm_dist.ensemble.predict import check_task, score, submit
    from triderm_dist.ensemble.run_files import ENSEMBLE_FILE, STACK_FILE, STACKER
    from triderm_dist.ensemble.stack_inputs import check_refit

    if config.explain:
        draw(config)
        return
    ensemble = Ensemble.load(config.folder / ENSEMBLE_FILE) if config.submit else None
    members = [name for name in config.models if config.ensemble.members is None or name in config.ensemble.members]
    index = open_index(config.test_shards, config.data.remote, verify=config.data.verify and is_main())
    if ensemble:
        check_task(config.folder, index.task)
        if STACKER in ensemble.members:  # refused before the networks predict for hours
            stacker = FittedStacker.load(config.folder / STACK_FILE)
            if config.networks == "refit":
                check_refit(stacker.extra)
    truth = read_truth(config, index) if ensemble else None
    predict_test(config, index, members, config.networks)
    if ensemble is None or not is_main():
        return
    files = [folder / "test.parquet" for name in members for folder in network_folders(config, name, config.networks)]
    refitted = config.networks == "refit"
    folder = config.folder / "refit" if refitted else config.folder
    paths = submit(config.folder, files, folder)
    print(
        f"wrote {', '.join(map(str, paths))}: {ensemble.weighting} of {', '.join(ensemble.members)}; "
        + ("refitted networks" if refitted else f"{config.data.folds} folds averaged")
    )
    if refitted:
        print("stacker, weights and thresholds are those fitted on the folds, and so is the estimate in ensemble.json")
    if truth is not None:
        partial = config.data.test_truth is None
        result = score(config.folder, truth, partial, folder)
        task = read_task(config.folder / ENSEMBLE_FILE)
        low, high = result["interval"]
        if result["absent"]:
            print(f"no test lesion has {', '.join(result['absent'])}: excluded from the score")
        print(
            f"held-out macro F1{' (official metric)' if task.submission else ''} {result['macro_f1']:.3f} "
            f"[{low:.3f}, {high:.3f}], "
            + (f"argmax {result['argmax']:.3f}, " if task.decision != "argmax" else "")
            + f"{result['n']} lesions"
        )


def read_truth(config: PredictRun, index: ShardIndex) -> dict[str, int] | None:
    """Return the label of each test lesion: of `data.test_truth`, else those packed with the test set, if it has any.

    Unlabeled lesions of a packed set are left out; None without any label.
    """
    from triderm_dist.data.readers.source import reader_of
    from triderm_dist.schema import UNLABELED

    if config.data.test_truth:
        return reader_of(index.task).labels(Path(config.data.test_truth), index.task)
    labels = zip(index.lesion_ids, index.labels.tolist(), strict=True)
    return {str(lesion): label for lesion, label in labels if label != UNLABELED} or None


def draw(config: PredictRun) -> None:
    """Draw the attention maps of `config.explain`, one picture and one JSON file for each model and lesion."""
    from triderm_dist.engine.explain import attention_maps
    from triderm_dist.files import write_json
    from triderm_dist.report.attention import draw_attention

    for name, task, maps in attention_maps(config, config.explain):
        picture = config.results / "explain" / name / f"{maps.lesion_id}.png"
        draw_attention(maps, picture, task)
        write_json(picture.with_suffix(".json"), maps.json())
        print(picture)


def start() -> None:
    run(PredictRun, main, __doc__, users=programs_using)


if __name__ == "__main__":
    start()
