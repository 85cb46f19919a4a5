"""Refit: one network per model, trained on all labeled lesions."""

import pytest

from triderm_dist.config import Experiment, load
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.engine.bench import synthetic_shards
from triderm_dist.engine.crossval import run_folds
from triderm_dist.engine.network_files import read_info, write_info
from triderm_dist.engine.predict_test import predict_test
from triderm_dist.engine.refit import refit
from triderm_dist.monitoring.metrics_log import read_metrics
from triderm_dist.predictions import read_predictions, read_transforms
from triderm_dist.schema import DataError

LESIONS, EPOCHS = 24, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Experiment, ShardIndex]:
    """A run of three folds, which kept the weights of epochs 1, 4 and 2."""
    folder = tmp_path_factory.mktemp("refit")
    index = synthetic_shards(folder / "shards", LESIONS, 40)
    words = [
        f"output={folder / 'run'}",
        "models.cnn={kind: dual_cnn, width: 16, tower: {source: 'timm:test_efficientnet', pretrained: false, "
        "image_size: 32}}",
        "data.folds=3",
        f"train={{epochs: {EPOCHS}, global_batch: 8, micro_batch: 8, trackers: [], select: best, log_every: 1}}",
        "train.sampling.kind=shuffle",
        "train.optim.warmup_epochs=0",
    ]
    experiment = load(Experiment, None, words)
    run_folds(experiment, index, ["cnn"], range(3))
    for fold, epoch in enumerate((1, 4, 2)):
        path = experiment.fold_folder("cnn", fold) / "weights"
        write_info(path, **{**read_info(path), "epoch": epoch})
    return experiment, index


def weights_of_folds(experiment: Experiment) -> list[str]:
    return sorted(read_info(experiment.fold_folder("cnn", fold) / "weights")["sha256"] for fold in range(3))


def test_refit_trains_on_all_lesions_up_to_the_median_epoch(run, capsys):
    experiment, index = run
    refit(experiment, index, ["cnn"])
    folder = experiment.refit_folder("cnn")
    assert f"{LESIONS} to train, none to validate" in capsys.readouterr().out
    records = read_metrics(folder / "metrics.jsonl")
    assert {record["kind"] for record in records} == {"train"}  # nothing is validated
    assert records[-1]["step"] == 2 * LESIONS / 8
    of_fold = read_metrics(experiment.fold_folder("cnn", 1) / "metrics.jsonl")
    rates = {round(record["epoch"], 3): record["lr"] for record in of_fold if record["kind"] == "train"}
    assert records[-1]["lr"] == pytest.approx(rates[2.0], rel=0.15)  # in the midst of the schedule, as in a fold
    weights, fold = read_info(folder / "weights"), read_info(folder / "fold")
    assert weights["epoch"] == 2 and "validation_macro_f1" not in weights
    assert fold["refit_of"] == weights_of_folds(experiment) and fold["weights"] == weights["sha256"]
    assert not list(folder.glob("*.parquet"))


def test_refit_is_skipped_when_finished_and_resumes_when_interrupted(run):
    experiment, index = run
    refit(experiment, index, ["cnn"])
    folder = experiment.refit_folder("cnn")
    before = (folder / "weights.safetensors").read_bytes()
    trained = (folder / "weights.safetensors").stat().st_mtime_ns
    refit(experiment, index, ["cnn"])
    assert (folder / "weights.safetensors").stat().st_mtime_ns == trained

    (folder / "fold.json").unlink()
    for checkpoint in folder.glob("checkpoints/epoch-0002-*"):
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    refit(experiment, index, ["cnn"])
    steps = [record["step"] for record in read_metrics(folder / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (folder / "weights.safetensors").read_bytes() == before


def test_weights_of_folds_that_were_trained_again_are_recorded(run):
    experiment, index = run
    refit(experiment, index, ["cnn"])
    path, folder = experiment.fold_folder("cnn", 0) / "weights", experiment.refit_folder("cnn")
    trained, info = (folder / "weights.safetensors").stat().st_mtime_ns, read_info(path)
    try:
        write_info(path, **{**info, "sha256": "other"})
        refit(experiment, index, ["cnn"])
        assert "other" in read_info(folder / "fold")["refit_of"]
        assert (folder / "weights.safetensors").stat().st_mtime_ns == trained
    finally:
        write_info(path, **info)


def test_refitted_networks_predict_a_test_set(run):
    experiment, index = run
    refit(experiment, index, ["cnn"])
    predict_test(experiment, index, ["cnn"], "refit")
    predictions = read_predictions(experiment.refit_folder("cnn") / "test.parquet")
    assert list(predictions.refit_of) == weights_of_folds(experiment) and len(predictions) == LESIONS
    assert not list(experiment.folder.glob("cnn/*/test.parquet"))
    missing = experiment.model_copy(update={"output": str(experiment.folder.parent / "other")})
    with pytest.raises(DataError, match=r"other/refit/cnn: not trained; run triderm refit first"):
        predict_test(missing, index, ["cnn"], "refit")


def test_killed_before_the_stamp_of_test_predictions_is_written(run, monkeypatch):
    """Files as a kill leaves them: test.parquet of other settings, whose test.json was not written yet."""
    experiment, index = run
    refit(experiment, index, ["cnn"])
    folder = experiment.refit_folder("cnn")
    predict_test(experiment, index, ["cnn"], "refit")
    two = experiment.predict.model_copy(update={"transforms": 2})

    def killed(path, **info):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("triderm_dist.engine.predict_test.write_info", killed)
        predict_test(experiment.model_copy(update={"predict": two}), index, ["cnn"], "refit")
    assert read_transforms(folder / "test.parquet") == 2
    predict_test(experiment, index, ["cnn"], "refit")
    assert read_transforms(folder / "test.parquet") == experiment.predict.transforms != 2


def test_refit_may_be_computed_in_other_micro_batches(run):
    experiment, index = run
    refit(experiment, index, ["cnn"])
    folder = experiment.refit_folder("cnn")
    model = experiment.models["cnn"]
    train = model.train.model_copy(update={"micro_batch": 4})
    other = experiment.model_copy(update={"models": {"cnn": model.model_copy(update={"train": train})}})
    refit(other, index, ["cnn"])
    assert read_info(folder / "fold")["model"]["train"]["micro_batch"] == 4
    assert list((folder.parent / "other-settings").iterdir())


def test_refit_needs_all_folds_with_these_settings(run):
    experiment, index = run
    with pytest.raises(DataError, match=r"fold-0: not trained with these settings and data.*run triderm crossval"):
        refit(experiment.model_copy(update={"seed": 7}), index, ["cnn"])
