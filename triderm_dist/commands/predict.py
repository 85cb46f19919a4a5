"""Predict lesions with every fold's model, the stacker and the ensemble of a run, and test-time augmentation.

triderm predict run=RUN input=PHOTOS output=FOLDER
triderm predict run=RUN input=lesions.csv output=predictions.csv
triderm predict run=RUN input=mole.dermoscopic.jpg
triderm ranks --config_file ddp -m predict run=RUN input=PHOTOS output=FOLDER

The input is a folder of photos (`X.clinical.jpg` and `X.dermoscopic.jpg` are lesion X), a table that names them, or
photos; what is absent is missing. The output is a .csv or .parquet file, or a folder with both and, for a challenge,
its submission.csv; without it the answers are printed. Nothing is written into RUN, and the same command resumes.
RUN may be a zip file that `triderm export` wrote, or `hf-hub:USER/NAME`.

Without input, the packed test set of the run is predicted and scored, and the results are written into RUN:

triderm predict run=RUN

With lesion ids it draws the attention maps of the tri-modal networks instead, OUTPUT/explain/MODEL/ID.png and .json:

triderm predict run=RUN explain=[IL_0000652,IL_0003176]

With `networks=refit` the networks of `triderm refit` predict instead of those of the folds; results for the test set of
the run then go into RUN/refit.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.commands import programs_using
from triderm_dist.config import INFERENCE, Invalid, Networks, RunReader, mean_of_seeds
from triderm_dist.environment import record_data
from triderm_dist.files import resolve_dots
from triderm_dist.runtime.terminal import counted, wrapped
from triderm_dist.schema import ConfigError, DataError, Task
from triderm_dist.settings import PathText

if TYPE_CHECKING:
    from triderm_dist.data.shards.index import ShardIndex
    from triderm_dist.ensemble.artifact import Ensemble
    from triderm_dist.inference.chunks import PredictionJob
    from triderm_dist.inference.table import ReadInput

MAX_PRINTED = 20
"""Lesions whose predictions are printed if there is no output."""


class PredictRun(RunReader):
    uses = (*INFERENCE, "data.test_truth", "ensemble.members")

    input: tuple[PathText, ...] = Field(
        (), description="folder of photos, table or photos to predict; by default the packed test set of the run"
    )
    photos: PathText | None = Field(None, description="folder of the photos of a table; default that of the table")
    view: str | None = Field(None, description="view of the photos whose names do not state it, such as dermoscopic")
    tta: Literal[1, 2, 4, 8] | None = Field(
        None, description="number of test-time transforms to average over; default predict.transforms"
    )
    invalid: Invalid = "refuse"
    device: str | None = Field(None, description="such as cpu or cuda:1; default the GPU if there is one")
    explain: tuple[str, ...] = Field(
        (), description="ids of lesions to draw attention maps of, instead of predicting the test set"
    )
    networks: Networks = Field(
        "folds",
        description="networks that predict: those of all folds, averaged, or the one per model of triderm refit, whose "
        "results for the test set of the run go into its folder refit",
    )
    submit: bool = Field(
        True, description="write the results; false only writes each fold's test.parquet, for stack.extra=[features]"
    )

    @property
    def without_effect(self) -> Mapping[str, str]:
        of_input, of_test_set = ("photos", "view", "tta", "invalid", "device"), ("submit", "data.test_truth")
        if self.explain:
            return dict.fromkeys(
                ("input", "networks", *of_input, *of_test_set, "predict"), "has no effect with explain; remove it"
            )
        if self.input:
            fixed = (*of_test_set, "ensemble.members", *(["predict.transforms"] if self.tta is not None else []))
            return dict.fromkeys(fixed, "has no effect with input; remove it")
        where = "has an effect with input only; name a folder, a table or photos by input"
        chosen = {"ensemble.members": "has an effect with submit=false only; remove it"} if self.submit else {}
        return {**dict.fromkeys(of_input, where), **chosen}

    @property
    def writes(self) -> bool:
        return not self.input or self.results != self.folder  # else it prints

    @property
    def is_stage(self) -> bool:
        return not self.explain and not self.input and self.results == self.folder


def main(config: PredictRun) -> None:
    from triderm_dist.distributed.collectives import interrupt_on_lost_rank

    if config.explain:
        draw(config)
    elif config.input:
        with interrupt_on_lost_rank():
            predict_input(config)
    else:
        predict_test_set(config)


def predict_test_set(config: PredictRun) -> None:
    """Predict the packed test set of the run, and write the results and their score into it."""
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.distributed.collectives import is_main
    from triderm_dist.engine.fold import network_folders
    from triderm_dist.engine.predict_test import predict_test
    from triderm_dist.ensemble.fitted_ensemble import FittedEnsemble
    from triderm_dist.ensemble.predict import write_test_results
    from triderm_dist.ensemble.stack_inputs import check_refit

    _check_test_set(config)
    ensemble = FittedEnsemble.load(config.folder) if config.submit else None
    wanted = config.ensemble.members if ensemble is None else ensemble.members
    members = [name for name in config.models if wanted is None or name in wanted]
    index = open_index(config.test_shards, config.data.remote, verify=config.data.verify and is_main())
    if ensemble:
        ensemble.check_task(index.task)
        stacker = ensemble.stacker  # refused before the networks predict for hours
        if stacker and config.networks == "refit":
            check_refit(stacker.extra)
    truth = read_truth(config, index) if ensemble else None
    predict_test(config, index, members, config.networks)
    if is_main():
        facts = {"fingerprint": index.fingerprint, "lesions": len(index), "flow": index.flow()}
        record_data(config.folder, "test", facts)
    if ensemble is None or not is_main():
        return
    files = [folder / "test.parquet" for name in members for folder in network_folders(config, name, config.networks)]
    folder = config.folder / "refit" if config.networks == "refit" else config.folder
    for path in write_test_results(ensemble, files, folder):
        print(wrapped(f"wrote {path}"))
    _print_networks(config, ensemble.ensemble)
    if truth is not None:
        _score(config, ensemble.task, truth, folder, _with_trained_photo(config, index))


def _check_test_set(config: PredictRun) -> None:
    """Raise ConfigError for settings of predictions of an input, and for a run without a packed test set."""
    if config.results != config.folder:
        raise ConfigError("output: without input the test set of the run is predicted, into its own folder; remove it")
    if not config.data.test_shards and not Path(config.test_shards).exists():
        raise ConfigError(
            f"run={config.folder}: has no packed test set ({config.test_shards}); name new photos by input, or a "
            "packed set by data.test_shards"
        )


def _print_networks(config: PredictRun, ensemble: Ensemble) -> None:
    """Print what predicted, and what it was fitted on."""
    from triderm_dist.ensemble.run_files import FITTED

    refitted = config.networks == "refit"
    networks = "refitted networks" if refitted else f"{config.data.folds} folds averaged"
    if ensemble.weighting in ensemble.members:
        print(wrapped(f"predicted by {ensemble.weighting}; {networks}"))
    elif ensemble.weighting == mean_of_seeds(ensemble.members[0]):
        print(wrapped(f"predicted by the mean of {', '.join(ensemble.members)}; {networks}"))
    else:
        weights = "fitted weights" if ensemble.weighting == FITTED else ensemble.weighting
        print(wrapped(f"{weights} of {', '.join(ensemble.members)}; {networks}"))
    if refitted:
        fitted = "stacker, weights and thresholds are those fitted on the folds"
        print(wrapped(f"{fitted}, and so is the estimate in ensemble.json"))


def _with_trained_photo(config: PredictRun, index: ShardIndex) -> list[str]:
    """Return the lesions of the test set with a photo of the training set; none where that is not there any more."""
    from triderm_dist.data.overlap import rows_with_equal_photo
    from triderm_dist.data.shards.open import is_url, open_index

    if is_url(config.train_shards) or not Path(config.train_shards).exists():
        return []
    try:
        training = open_index(config.train_shards, config.data.remote)
        return index.lesion_ids[rows_with_equal_photo(index, training)].tolist()
    except DataError as error:
        print(wrapped(f"note: photos are not compared with those of the training set: {error}"))
        return []


def _score(
    config: PredictRun, task: Task, truth: Mapping[str, int], folder: Path, with_trained_photo: Collection[str]
) -> None:
    """Score the results in a folder, print the score and send it to the trackers.

    truth: {lesion id: label}.  with_trained_photo: see `score`.
    """
    from triderm_dist.ensemble.predict import score
    from triderm_dist.ensemble.run_files import in_training
    from triderm_dist.monitoring.tracking import log_scores

    partial = config.data.test_truth is None
    result = score(config.folder, truth, partial, folder, with_trained_photo)
    low, high = result["interval"]
    if result["absent"]:
        print(wrapped(f"no test lesion has {', '.join(result['absent'])}: excluded from the score"))
    metric = f"held-out macro F1{' (official)' if task.submission else ''}"
    argmax = f"argmax {result['argmax']:.3f}, " if task.decision != "argmax" else ""
    print(wrapped(f"{metric} {result['macro_f1']:.3f} [{low:.3f}, {high:.3f}], {argmax}{result['n']} lesions"))
    if count := result.get("in_training"):
        print(wrapped(f"note: {in_training(count, result['n'])}; pack the test set without them"))
    found = {"macro F1": result["macro_f1"], "low": low, "high": high}
    scores = {f"{'refit ' if config.networks == 'refit' else ''}held out/{key}": value for key, value in found.items()}
    log_scores(config.folder, scores, config.train)


def predict_input(config: PredictRun) -> None:
    """Predict `config.input`, and write `config.results`, or print the predictions if it is the run's folder."""
    from triderm_dist.data.problems import InvalidLesions
    from triderm_dist.data.shards.console import print_problems
    from triderm_dist.distributed.collectives import is_main, world_size
    from triderm_dist.distributed.malloc import disable_malloc_trim, use_expandable_segments
    from triderm_dist.ensemble.xgboost_stacker import import_xgboost_alone
    from triderm_dist.inference.chunks import PredictionJob
    from triderm_dist.inference.inputs import read_input
    from triderm_dist.inference.networks import choose_device
    from triderm_dist.inference.output import check_output, part_of
    from triderm_dist.inference.predictor import Predictor
    from triderm_dist.inference.run_folder import open_run_folder

    inputs, output = [Path(path) for path in config.input], config.results
    printed = output == config.folder
    if not printed:
        check_output(output, config.folder, inputs)
    if not config.plugins:  # they may need its estimators
        import_xgboost_alone()
    if not str(config.device).startswith("cpu"):
        use_expandable_segments()
    if config.device:
        choose_device(config.device)  # refused before a long table is read
    run = open_run_folder(config.folder, config.networks)
    photos = Path(config.photos) if config.photos else None
    try:
        read = read_input(inputs, run, photos=photos, view=config.view, invalid=config.invalid)
    except InvalidLesions as error:
        if is_main() and not printed:
            print_problems(error.problems, Path(f"{resolve_dots(output)}.problems.csv"))
        raise
    if printed and (len(read.lesions) > MAX_PRINTED or world_size() > 1):
        raise ConfigError(f"output: name a file or folder for the predictions of {len(read.lesions):,} lesions")
    for note in (*read.notes, *run.notes_on_training(read.lesions.lesion_ids)) if is_main() else ():
        print(wrapped(f"note: {note}"))
    if world_size() > 1:
        from triderm_dist.distributed.parallel import start_inference

        start_inference("fp32", config.rank_timeout)
    predictor = Predictor(run, device=config.device, batch=config.predict.batch)
    if predictor.device.type == "cpu":
        disable_malloc_trim()
    transforms = config.tta or config.predict.transforms
    report = (lambda line: print(wrapped(line), flush=True)) if is_main() else (lambda line: None)
    predictor.prepare(len(read.lesions), transforms, report)
    job = PredictionJob(predictor, read.lesions, transforms, config.invalid == "drop", part_of(output))
    if printed:
        print_predictions(job, read)
    else:
        predict_to_output(config, job, read)


def print_predictions(job: PredictionJob, read: ReadInput) -> None:
    """Print the decision for each lesion, and its most probable diagnoses."""
    from triderm_dist.data.shards.photos import describe_changes

    names = job.predictor.run.task.diagnosis_names
    predictions = job.predictor.predict(job.lesions, job.transforms, job.drop)
    for row in job.predictor.table(predictions).to_pylist():
        ranked = sorted(names, key=lambda name: -row[name])[:3]
        values = ", ".join(f"{name} {row[name]:.3f}" for name in ranked)
        print(wrapped(f"{row['lesion_id']}: {row['decision'] or 'no diagnosis'} ({values})"))
    for problem in (*read.problems, *predictions.problems.values()):
        print(wrapped(f"left out: {problem}"))
    for note in describe_changes(predictions.changes):
        print(wrapped(f"note: {note}"))


def predict_to_output(config: PredictRun, job: PredictionJob, read: ReadInput) -> None:
    """Predict in chunks on all ranks, and write the output on rank 0."""
    from triderm_dist.data.shards.console import print_problems, progress_bar
    from triderm_dist.data.shards.photos import describe_changes
    from triderm_dist.distributed.collectives import is_main, on_main, rank, world_size
    from triderm_dist.files import lock_part
    from triderm_dist.inference.chunks import run_hash
    from triderm_dist.inference.output import is_written, write_output

    output, run = config.results, job.predictor.run
    with ExitStack() as stack:

        def prepare() -> bool:
            """Return whether the output is already there; else lock the folder of the chunks."""
            if is_written(output, job.key):
                return True
            refusal = f"{job.part}: another process predicts into it; wait for it or end it"
            stack.enter_context(lock_part(job.part, refusal))
            written = True  # also where this raises: this may have waited for another process that wrote it
            try:
                written = is_written(output, job.key)
            finally:
                if written:
                    shutil.rmtree(job.part, ignore_errors=True)
            return written

        if on_main(prepare):
            if is_main():
                print(wrapped(f"{output}: holds these predictions already"))
            return
        if not is_main():
            job.run(rank(), world_size())
            return
        with progress_bar("lesions") as progress:
            job.run(rank(), world_size(), progress)
        table, problems, changes = job.result()
        for note in describe_changes(changes):
            print(wrapped(f"note: {note}"))
        print_problems([*read.problems, *problems], Path(f"{resolve_dots(output)}.problems.csv"))
        about = {
            "key": job.key, "run": run_hash(run), "task": run.task.to_mapping(), "members": [*job.predictor.members],
            "transforms": job.transforms,
        }  # fmt: skip
        paths = write_output(output, table, run.task, about)
        shutil.rmtree(job.part, ignore_errors=True)
    transforms, models = counted(job.transforms, "transform"), counted(len(run.networks), "model")
    print(wrapped(f"{counted(len(table), 'lesion')}, mean of {transforms}, {models}"))
    for path in paths:
        print(path)


def read_truth(config: PredictRun, index: ShardIndex) -> dict[str, int] | None:
    """Return the label of each test lesion: of `data.test_truth`, else those packed with the test set, if it has any.

    Unlabeled lesions of a packed set are left out; None without any label.
    """
    from triderm_dist.doctor.preflight import match_truth
    from triderm_dist.schema import UNLABELED

    if config.data.test_truth:
        return match_truth(config.data.test_truth, index.task, index.lesion_ids)[0]
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
    from triderm_dist.engine.locate import locate_run

    run(PredictRun, main, __doc__, users=programs_using, locate=locate_run, on_ranks=lambda config: True)


if __name__ == "__main__":
    start()
