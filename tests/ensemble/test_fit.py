"""Stacking end to end: fitted out of fold, applied to a test set, refused if input is missing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.ensemble.conftest import experiment
from tests.synthetic_run import CLINIC, MODELS, folds_of, labels_of, predictions_of, write_run
from triderm_dist import metrics, submission
from triderm_dist.checksums import read_checked_json, read_checked_parquet, write_checked_json
from triderm_dist.ensemble import calibration, predict
from triderm_dist.ensemble.artifact import Ensemble, FitKeys, read_artifact
from triderm_dist.ensemble.fit import FitResult, fit_ensemble
from triderm_dist.ensemble.fitted_ensemble import FittedEnsemble
from triderm_dist.ensemble.predict import score, write_test_results
from triderm_dist.ensemble.run_files import read_nested
from triderm_dist.ensemble.stack_inputs import check_refit
from triderm_dist.intervals import Interval
from triderm_dist.predictions import (
    DataSplit,
    average_test,
    gather,
    read_oof,
    read_predictions,
    write_oof,
    write_predictions,
)
from triderm_dist.schema import DIAGNOSES, ConfigError, DataError, TaskColumns
from triderm_dist.tasks import milk10k_task

C = len(DIAGNOSES)


def test_fit_and_predict_end_to_end(tmp_path: Path) -> None:
    labels = write_run(tmp_path)
    config = experiment(tmp_path)
    fit = fit_ensemble(tmp_path, config)
    assert [row.name for row in fit.rows] == [*MODELS, "stack", "plain mean", "fitted weights", "ensemble"]
    files = ("stack.ubj", "stack.json", "ensemble.json", "ensemble_oof.parquet", "oof_submission.csv")
    rows, read = {row.name: row for row in fit.rows}, read_oof(tmp_path / "oof.parquet")
    for model in MODELS:  # nothing is fitted, including temperatures
        plain = calibration.probabilities_of(read.logits[model], read.heads[model])
        assert rows[model].official == pytest.approx(metrics.official_macro_f1(plain, read.labels))
    assert [row.title for row in fit.rows][-2:] == ["fitted weights", "final model"]
    assert rows["fitted weights"].official is rows["fitted weights"].argmax is rows["ensemble"].official is None
    rivals = [row.nested.value for name, row in rows.items() if name not in ("fitted weights", "ensemble")]
    assert fit.chosen == ("fitted" if rows["fitted weights"].nested.value > max(rivals) else "mean")
    first = {name: (tmp_path / name).read_bytes() for name in files}
    fit_ensemble(tmp_path, config)
    assert first == {name: (tmp_path / name).read_bytes() for name in files}
    assert not list(tmp_path.glob("*.part"))

    ids, table = submission.read_submission(tmp_path / "oof_submission.csv")
    place = {f"lesion-{row:04d}": label for row, label in enumerate(labels)}
    score = metrics.official_macro_f1(table, np.array([place[lesion] for lesion in ids]))
    assert score == pytest.approx(fit.rows[-1].nested.value)
    assert score > 0.6
    nested = read_nested(tmp_path / "ensemble_oof.parquet")
    np.testing.assert_array_equal(nested.decisions, table > 0.5)

    tests = average_test(read_predictions(path) for path in sorted(tmp_path.glob("*/fold-*/test.parquet")))
    on_test = metrics.macro_f1(FittedEnsemble.load(tmp_path).predict(tests)[0].decisions, tests.labels)
    assert on_test > score - 0.1  # the mean of three fold models is at least as good as one
    with pytest.raises(DataError, match="needs predictions of model 'dual_cnn'"):
        FittedEnsemble.load(tmp_path).predict(replace(tests, models=("trimodal",)))


def test_the_mean_of_a_models_seeds_predicts_alone_unless_the_ensemble_is_better(tmp_path: Path) -> None:
    """Not the seed that is the best by luck."""
    write_run(tmp_path, 150, models=("trimodal", "trimodal-s1"))
    config = experiment(tmp_path, use="auto", enabled=False)
    config = config.model_copy(
        update={"models": {"trimodal": config.models["trimodal"].model_copy(update={"seeds": 2})}}
    )
    fit = fit_ensemble(tmp_path, config)
    assert fit.chosen == "trimodal-seeds"
    assert [row.name for row in fit.rows][:3] == ["trimodal", "trimodal-s1", "trimodal-seeds"]
    ensemble = Ensemble.load(tmp_path / "ensemble.json")
    assert ensemble.members == ("trimodal", "trimodal-s1") and ensemble.weights.tolist() == [0.5, 0.5]
    tests = average_test(read_predictions(path) for path in sorted(tmp_path.glob("*/fold-*/test.parquet")))
    assert metrics.macro_f1(FittedEnsemble.load(tmp_path).predict(tests)[0].decisions, tests.labels) > 0.5

    write_run(tmp_path / "both", 150, models=("trimodal", "trimodal-s1", "dual_cnn"))
    config = config.model_copy(update={"ensemble": config.ensemble.model_copy(update={"use": "trimodal-seeds"})})
    fit = fit_ensemble(tmp_path / "both", config)
    assert any(note.startswith("as ensemble.use says, trimodal-seeds predicts; ") for note in fit.notes)
    assert Ensemble.load(tmp_path / "both" / "ensemble.json").members == ("trimodal", "trimodal-s1")


def test_a_member_that_predicts_alone_needs_no_other(tmp_path: Path) -> None:
    write_run(tmp_path, 150)
    notes = fit_ensemble(tmp_path, experiment(tmp_path, use="trimodal", enabled=False)).notes
    assert any(note.startswith("as ensemble.use says, trimodal predicts; the ensemble (") for note in notes)
    alone, fitted = Ensemble.load(tmp_path / "ensemble.json"), read_artifact(tmp_path / "ensemble.json", schema=FitKeys)
    assert alone.members == ("trimodal",) and alone.weights.tolist() == [1.0] and len(alone.temperatures) == 1
    assert [*fitted["weights_of"]] == [*MODELS] and set(fitted["picks"].values()) == {"trimodal"}
    rows = fitted["scores"]
    assert rows["ensemble"]["nested"] == rows["trimodal"]["nested"]
    assert rows["trimodal"]["chosen_minus_this"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    tests = average_test(read_predictions(path) for path in sorted(tmp_path.glob("trimodal/fold-*/test.parquet")))
    results = FittedEnsemble.load(tmp_path).predict(tests)[0]  # without predictions of dual_cnn
    expected = calibration.member_probabilities(tests, "trimodal", alone.temperatures[0])
    np.testing.assert_allclose(results.probabilities, expected, atol=1e-12)
    for use in ("other", "stack"):  # there is no stacker
        with pytest.raises(ConfigError, match=rf"ensemble\.use={use}: no such member; "):
            fit_ensemble(tmp_path, experiment(tmp_path, use=use, enabled=False))
    fit_ensemble(tmp_path, experiment(tmp_path, use="stack"))
    assert Ensemble.load(tmp_path / "ensemble.json").members == (*MODELS, "stack")  # whose columns are of all networks


def test_a_single_network_may_be_named_and_have_any_name(tmp_path: Path) -> None:
    """Also the name by which the estimate calls its best network."""
    write_run(tmp_path, 150, models=("network",))
    alone = fit_ensemble(tmp_path, experiment(tmp_path, use="network", enabled=False))
    assert alone.chosen == "network" and "a single member: no weights to fit" in alone.notes
    write_run(tmp_path / "two", 150, models=("network", "dual_cnn"))
    for use in ("auto", "network"):
        fit = fit_ensemble(tmp_path / "two", experiment(tmp_path / "two", use=use, enabled=False))
        assert [row.name for row in fit.rows] == ["network", "dual_cnn", "plain mean", "fitted weights", "ensemble"]
        assert fit.rows[0].nested == alone.rows[0].nested


def test_labels_of_a_fold_do_not_affect_its_submission_rows(tmp_path: Path) -> None:
    """Changed labels in fold 0 do not change its rows through temperatures, stacker, weights or thresholds."""
    write_run(tmp_path)
    table = read_oof(tmp_path / "oof.parquet")
    inside = table.folds == 0
    poisoned = table.labels.copy()
    poisoned[inside] = np.roll(poisoned[inside], 1)
    submissions = []
    for labels in (table.labels, poisoned):
        write_oof(tmp_path / "oof.parquet", replace(table, labels=labels))
        fit_ensemble(tmp_path, experiment(tmp_path))
        ids, submitted = submission.read_submission(tmp_path / "oof_submission.csv")
        assert ids == table.lesion_ids.tolist()
        submissions.append(submitted)
    np.testing.assert_array_equal(submissions[0][inside], submissions[1][inside])
    assert (submissions[0][~inside] != submissions[1][~inside]).any()


def assert_choice_is_explained(folder: Path, fit: FitResult) -> None:
    """Compare the note on what predicts with the comparisons in ensemble.json."""
    choice = read_artifact(folder / "ensemble.json", schema=FitKeys)["choice"]
    assert choice["used"] == fit.chosen
    (note,) = [note for note in fit.notes if "predicts" in note]
    for key in ("difference", "stacker"):
        value, low, high = Interval(**choice[key]).signed()
        assert f"(nested difference {value}, {low} to {high})" in note
    network = read_artifact(folder / "ensemble.json", schema=FitKeys)["scores"][choice["network"]]["nested"]["value"]
    assert f"({network + choice['difference']['value']:.3f}, its weights" in note
    assert note.startswith("the ensemble predicts" if fit.chosen == choice["ensemble"] else "one model predicts")


def test_shuffled_labels_are_at_chance(tmp_path: Path) -> None:
    write_run(tmp_path, lesions=450, informed=False)
    fit = fit_ensemble(tmp_path, experiment(tmp_path, use="auto"))
    assert_choice_is_explained(tmp_path, fit)
    labels = read_oof(tmp_path / "oof.parquet").labels
    decisions = read_nested(tmp_path / "ensemble_oof.parquet").decisions
    chance = [metrics.macro_f1(decisions, np.random.default_rng(seed).permutation(labels)) for seed in range(50)]
    assert fit.rows[-1].nested.value < np.mean(chance) + 3 * np.std(chance)
    assert fit.rows[-1].nested.value < 0.16
    # Scored on the rows it was fitted on, noise appears better than chance.
    assert fit.rows[-1].fitted > fit.rows[-1].nested.value


def test_incomplete_folds_are_reported_and_a_single_fold_is_refused(tmp_path: Path) -> None:
    labels = write_run(tmp_path)
    ids, folds = [f"lesion-{row:04d}" for row in range(len(labels))], folds_of(labels)
    (tmp_path / "dual_cnn" / "fold-1" / "predictions.parquet").unlink()
    write_oof(tmp_path / "oof.parquet", gather(tmp_path, None, DataSplit(ids, labels, folds)))
    fit = fit_ensemble(tmp_path, experiment(tmp_path, enabled=False))
    assert any(f"{(folds == 1).sum()} of {len(labels)} lesions are excluded" in note for note in fit.notes)
    assert not (tmp_path / "stack.ubj").exists()
    (tmp_path / "dual_cnn" / "fold-2" / "predictions.parquet").unlink()
    write_oof(tmp_path / "oof.parquet", gather(tmp_path, None, DataSplit(ids, labels, folds)))
    with pytest.raises(DataError, match="lie in 1 fold, two are needed"):
        fit_ensemble(tmp_path, experiment(tmp_path))


def test_a_fold_that_was_trained_again_after_gathering_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, 120)
    table, config = read_oof(tmp_path / "oof.parquet"), experiment(tmp_path, enabled=False)
    weights = str(table.hashes["dual_cnn"][table.folds == 1][0])
    file = tmp_path / "dual_cnn" / "fold-1" / "fold.json"
    write_checked_json(file, {"weights": weights})
    fit_ensemble(tmp_path, config)
    before = (tmp_path / "ensemble.json").read_bytes()
    write_checked_json(file, {"weights": "again"})
    with pytest.raises(DataError, match=r"gathered from other networks than that in .*fold-1; run triderm crossval"):
        fit_ensemble(tmp_path, config)
    file.write_text("{")
    with pytest.raises(DataError, match=r"fold\.json: .*; delete .*fold-1 and train this fold again"):
        fit_ensemble(tmp_path, config)
    assert (tmp_path / "ensemble.json").read_bytes() == before


def test_two_folds_with_one_lesion_of_each_diagnosis_are_fitted(tmp_path: Path) -> None:
    """Nothing is left to fit inner weights and thresholds on; those of the fold are fitted all the same."""
    labels, folds = np.tile(np.arange(C), 2), np.repeat([0, 1], C)
    ids = [f"lesion-{row}" for row in range(2 * C)]
    for model in MODELS:
        for fold in (0, 1):
            own = predictions_of(model, labels[folds == fold], fold, ids[fold * C : fold * C + C], fold)
            own.model_hash[:] = f"{model}-{fold}"
            write_predictions(tmp_path / model / f"fold-{fold}" / "predictions.parquet", own)
    write_oof(tmp_path / "oof.parquet", gather(tmp_path, [*MODELS], DataSplit(ids, labels, folds)))
    fit = fit_ensemble(tmp_path, experiment(tmp_path, enabled=False))
    assert fit.rows[-1].nested.value > 0.3


def test_refit_of_the_folds_is_accepted_and_of_others_is_not(tmp_path: Path) -> None:
    write_run(tmp_path)
    fit_ensemble(tmp_path, experiment(tmp_path))
    paths = []
    for model in MODELS:
        folds = [read_predictions(path) for path in sorted(tmp_path.glob(f"{model}/fold-*/test.parquet"))]
        part = replace(
            folds[0], model_hash=np.array("refit"), refit_of=tuple(str(each.model_hash[0]) for each in folds)
        )
        paths.append(tmp_path / "refit" / model / "test.parquet")
        write_predictions(paths[-1], part, split="test")
        assert read_predictions(paths[-1]).refit_of == part.refit_of
    written = write_test_results(FittedEnsemble.load(tmp_path), paths, tmp_path / "refit")
    assert written == [tmp_path / "refit" / "submission.csv"] and not (tmp_path / "submission.csv").exists()
    ids, probabilities, decisions = submission.read_probabilities(tmp_path / "refit", milk10k_task())
    submitted = submission.read_submission(written[0])
    assert submitted[0] == ids
    np.testing.assert_allclose(submitted[1], submission.map_to_half(probabilities, decisions), atol=2e-9)
    table = read_checked_parquet(tmp_path / "refit" / "probabilities.parquet")
    members = [np.array(table[f"{name}/MEL"]) for name in (*MODELS, "stack")]
    weights = Ensemble.load(tmp_path / "ensemble.json").weights
    np.testing.assert_allclose(weights @ members, table["MEL"], atol=1e-12)
    truth = {f"test-{row:04d}": int(label) for row, label in enumerate(labels_of(150, seed=7))}
    assert score(tmp_path, truth, folder=tmp_path / "refit")["macro_f1"] > 0.6
    assert (tmp_path / "refit" / "heldout.json").exists() and not (tmp_path / "heldout.json").exists()
    folds = read_predictions(paths[0])
    write_predictions(paths[0], replace(folds, refit_of=(*folds.refit_of[1:], "other")), split="test")
    with pytest.raises(DataError, match=r"ensemble.json: was fitted on other weights of trimodal"):
        write_test_results(FittedEnsemble.load(tmp_path), paths, tmp_path / "refit")
    with pytest.raises(DataError, match="networks=refit: the stacker takes fused features"):
        check_refit("features")


@pytest.fixture(scope="module", params=["argmax", "fitted", "threshold"])
def clinic(request, tmp_path_factory) -> tuple[Path, FitResult]:
    """A fitted run of a task with four diagnoses, one view, no concepts, under each decision."""
    folder = tmp_path_factory.mktemp(request.param)
    write_run(folder, 250, task=replace(CLINIC, decision=request.param))
    return folder, fit_ensemble(folder, experiment(folder))


def test_run_of_any_task_end_to_end(clinic: tuple[Path, FitResult]) -> None:
    folder, fit = clinic
    nested, table = read_nested(folder / "ensemble_oof.parquet"), read_oof(folder / "oof.parquet")
    assert fit.decision == table.task.decision
    assert fit.rows[-1].nested.value > 0.8
    assert fit.rows[-1].nested.value == pytest.approx(metrics.macro_f1(nested.decisions, nested.labels))
    if fit.decision != "threshold":
        assert (nested.decisions.sum(axis=1) == 1).all()
    if fit.decision == "argmax":  # the main figure and the one by argmax are the same
        np.testing.assert_array_equal(nested.decisions, metrics.argmax_decisions(nested.probabilities))
        assert fit.rows[-1].argmax == fit.rows[-1].nested.value
    ids, decisions = submission.read_decisions(folder / "oof_decisions.csv", table.diagnoses)
    assert ids == nested.lesion_ids.tolist()
    np.testing.assert_array_equal(decisions, nested.decisions)

    for path in folder.glob("*/fold-*/test.parquet"):  # the decision is that of the ensemble, not of the test set
        part = read_predictions(path)
        write_predictions(path, replace(part, task=replace(part.task, decision="threshold")), split="test")
    paths = write_test_results(FittedEnsemble.load(folder), sorted(folder.glob("*/fold-*/test.parquet")))
    assert [path.name for path in paths] == ["probabilities.csv", "decisions.csv"]
    truth = {f"test-{row:04d}": int(label) for row, label in enumerate(labels_of(150, seed=7, classes=4))}
    tests = average_test(read_predictions(path) for path in sorted(folder.glob("*/fold-*/test.parquet")))
    results = FittedEnsemble.load(folder).predict(tests)[0]
    ids, written = submission.read_submission(paths[0], table.diagnoses)
    order = [results.lesion_ids.index(lesion) for lesion in ids]
    np.testing.assert_allclose(written, results.probabilities[order], atol=1e-9)
    result = score(folder, truth)
    assert result["macro_f1"] > 0.9 and result["n"] == 150 and result["absent"] == []
    assert read_checked_json(folder / "heldout.json") == result
    assert [*result["diagnoses"].values()] == np.bincount([*truth.values()], minlength=4).tolist()
    del truth["test-0003"], truth["test-0007"]
    with pytest.raises(DataError, match=r"probabilities.csv: 2 lesions are not in the ground truth, .* is test-0003"):
        score(folder, truth)
    assert score(folder, truth, partial=True)["n"] == 148
    assert "in_training" not in result
    ids, groups = table.lesion_ids.copy(), table.groups.copy()
    ids[:2], groups[1:4] = ["test-0003", "test-0004"], ["test-0004", "test-0005", "test-0006"]
    write_oof(folder / "oof.parquet", replace(table, lesion_ids=ids, groups=groups))
    assert score(folder, truth, partial=True)["in_training"] == 3  # test-0003 has no truth
    photos = ["test-0006", "test-0009"]  # the first has the group of a training lesion, too
    assert score(folder, truth, partial=True, with_trained_photo=photos)["in_training"] == 4
    assert not list(folder.glob("*submission*"))
    write_test_results(FittedEnsemble.load(folder), sorted(folder.glob("*/fold-*/test.parquet")))
    assert not (folder / "heldout.json").exists()  # the score of earlier results


def test_results_do_not_depend_on_how_many_lesions_are_predicted_at_once(
    clinic: tuple[Path, FitResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = clinic
    files = sorted(folder.glob("*/fold-*/test.parquet"))
    read = list[int]()
    monkeypatch.setattr(predict, "average_test", lambda parts: read.append(len(parts[0])) or average_test(parts))

    def results(name: str) -> dict[str, bytes]:
        write_test_results(FittedEnsemble.load(folder), files, tmp_path / name)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    at_once = results("at_once")
    monkeypatch.setattr(predict, "LESIONS", 40)
    assert results("in_parts") == at_once and len(at_once) == 4
    assert read == [150, 40, 40, 40, 30]
    part, rows = read_predictions(files[-1]), np.arange(150)[::-1]
    columns = {key: value[rows] for key, value in vars(part).items() if isinstance(value, np.ndarray)}
    files[-1] = tmp_path / "reversed.parquet"
    write_predictions(files[-1], replace(part, **columns), split="test")
    assert results("reversed") == at_once and read[-1] == 150


def test_stacker_and_ensemble_of_another_task_are_refused(clinic: tuple[Path, FitResult], tmp_path: Path) -> None:
    folder, fit = clinic
    tests = average_test(read_predictions(path) for path in sorted(folder.glob("*/fold-*/test.parquet")))
    for name in ("ensemble.json", "stack.json"):
        assert json.loads((folder / name).read_text())["task"] == replace(CLINIC, decision=fit.decision).to_mapping()
    # A test folder may be described with other columns, and a report with other titles.
    renamed = replace(tests.task, title="", columns=TaskColumns(image="photo"), reference_results=())
    FittedEnsemble.load(folder).predict(replace(tests, task=renamed))
    smoker = replace(tests.task.fields[2], categories=("no", "yes"))
    for other, message in (
        (replace(tests.task, name="other"), "was fitted for task 'clinic', the predictions are for 'other'"),
        (replace(tests.task, fields=(*tests.task.fields[:2], smoker)), "are for 'clinic', described differently"),
    ):
        with pytest.raises(DataError, match=rf"ensemble\.json: .*{message}; run triderm stack again"):
            FittedEnsemble.load(folder).predict(replace(tests, task=other))
    shutil.copy(folder / "ensemble.json", tmp_path)
    stack = read_checked_json(folder / "stack.json")
    stack["task"] = replace(tests.task, name="other").to_mapping()
    write_checked_json(tmp_path / "stack.json", stack)
    with pytest.raises(DataError, match=r"stack\.json: was fitted for task 'other', not for task 'clinic'; run"):
        FittedEnsemble.load(tmp_path).load_stacker()
    del stack["task"]  # of a run from before there were other tasks
    write_checked_json(tmp_path / "stack.json", stack)
    with pytest.raises(DataError, match=r"stack\.json: changed or damaged: its diagnoses are not those of its task"):
        FittedEnsemble.load(tmp_path).load_stacker()
