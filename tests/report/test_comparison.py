"""Comparison of runs on the same lesions."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from tests.ensemble.conftest import experiment, without_file_hashes
from tests.synthetic_run import CLINIC, write_run
from triderm_dist import intervals, metrics
from triderm_dist.config import EnsembleConfig, save
from triderm_dist.ensemble.fit import fit_ensemble
from triderm_dist.ensemble.run_files import read_nested, write_nested
from triderm_dist.report.comparison import Comparison, mcnemar
from triderm_dist.report.content import Content
from triderm_dist.schema import DataError, InputError


def stack(folder: Path, *members: str) -> Path:
    """Stack a run without a stacker, and save its settings."""
    config = experiment(folder, enabled=False)
    config = config.model_copy(update={"ensemble": EnsembleConfig(bootstrap=50, rounds=4, members=members or None)})
    fit_ensemble(folder, config)
    save(config, folder / "config.yaml")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two runs of the same lesions, the second without its better network, and its rows in another order."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("both", "one"):
        write_run(folder / name, lesions=200)
    stack(folder / "both")
    stack(folder / "one", "dual_cnn")
    without_file_hashes(folder / "one")
    rows = read_nested(folder / "one" / "ensemble_oof.parquet")
    order = np.random.default_rng(0).permutation(len(rows.labels))
    write_nested(folder / "one" / "ensemble_oof.parquet", type(rows)(*(value[order] for value in vars(rows).values())))
    return [folder / "both", folder / "one"]


def test_differences_are_paired_by_lesion(runs: list[Path]) -> None:
    comparison = Comparison(runs)
    both, one = comparison.runs
    assert (both.name, one.name) == ("both", "one")
    (pair,) = comparison.pairs
    assert (pair.first, pair.second) == ("one", "both")
    labels = comparison.labels
    scores = [metrics.macro_f1(run.decisions, labels) for run in comparison.runs]
    assert [each.value for each in comparison.macro_f1] == pytest.approx(scores)
    assert pair.macro_f1.value == pytest.approx(scores[1] - scores[0])
    assert pair.beyond_noise and pair.macro_f1.high < 0
    assert pair.corrected == pair.macro_f1  # a single pair needs no correction
    auc = [each["auc"].value for each in comparison.metrics]
    assert pair.metrics["auc"].value == pytest.approx(auc[1] - auc[0])
    assert pair.metrics["auc"].low < pair.metrics["auc"].value < pair.metrics["auc"].high
    assert comparison.f1[0] == intervals.f1_per_class(both.decisions, labels, comparison.groups)
    assert not comparison.other_folds and comparison.grouped == 0
    correct = [(run.decisions == np.eye(11, dtype=bool)[labels]).all(axis=1) for run in comparison.runs]
    assert pair.mcnemar.first == (correct[1] & ~correct[0]).sum()
    assert pair.mcnemar.both + pair.mcnemar.first + pair.mcnemar.second + pair.mcnemar.neither == len(labels)


def test_equal_runs_do_not_differ(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "again")
    (pair,) = Comparison([runs[0], tmp_path / "again"]).pairs
    assert pair.macro_f1 == intervals.Interval(0.0, 0.0, 0.0) and not pair.beyond_noise
    assert all(each == intervals.Interval(0.0, 0.0, 0.0) for each in pair.metrics.values())
    assert (pair.mcnemar.first, pair.mcnemar.second, pair.mcnemar.p) == (0, 0, 1.0)


def test_several_runs_are_corrected_for_the_number_of_pairs(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "again")
    pairs = Comparison([*runs, tmp_path / "again"]).pairs
    assert [(pair.first, pair.second) for pair in pairs] == [("one", "both"), ("again", "both"), ("again", "one")]
    assert pairs[0].corrected.low < pairs[0].macro_f1.low and pairs[0].corrected.high > pairs[0].macro_f1.high
    assert pairs[0].mcnemar.adjusted == pytest.approx(min(1, 3 * pairs[0].mcnemar.p))


def test_settings_that_differ_are_listed_without_places(runs: list[Path], tmp_path: Path) -> None:
    settings = dict(Comparison(runs).settings)
    assert settings == {"ensemble.members": ("null", "[dual_cnn]")}
    shutil.copytree(runs[0], tmp_path / "again")
    config = tmp_path / "again" / "config.yaml"
    text = config.read_text()
    assert "\noof:\n  tta: 1\n" in text
    config.write_text(text.replace("\noof:\n  tta: 1\n", "\n").replace("booster: softprob", "booster: multi_output"))
    settings = dict(Comparison([runs[0], tmp_path / "again"]).settings)
    assert settings == {"stack.booster": ("softprob", "multi_output")}  # a version without oof.tta is no difference


def test_secrets_that_an_earlier_version_saved_are_not_shown(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "again")
    config = tmp_path / "again" / "config.yaml"
    text = config.read_text().replace("transforms: 8", "transforms: 2")
    config.write_text(f"{text}mine: {{api_key: abcdefgh12345}}\n")
    assert Comparison([runs[0], tmp_path / "again"]).runs[1].settings["mine.api_key"] == "***"
    assert Content(tmp_path / "again").transforms == (1, 2)
    assert "abcdefgh12345" not in Content(tmp_path / "again").settings


def test_unreadable_settings_are_named(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("x: [")
    with pytest.raises(InputError, match=f"^{tmp_path}/run/config.yaml: not readable as YAML"):
        Comparison([runs[1], tmp_path / "run"])


def test_other_lesions_labels_and_tasks_are_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name two or more runs"):
        Comparison(runs[:1])
    with pytest.raises(InputError, match="named twice"):
        Comparison([runs[0], runs[0].parent / "one" / ".." / "both"])
    write_run(tmp_path / "clinic", lesions=60, task=CLINIC)
    with pytest.raises(DataError, match=r"clinic.*task 'clinic'.*compare runs of one task"):
        Comparison([runs[0], stack(tmp_path / "clinic")])
    write_run(tmp_path / "few", lesions=190)
    with pytest.raises(DataError, match=r"few: lacks lesion lesion-0190 of .*both \(10 such lesions\)"):
        Comparison([runs[0], stack(tmp_path / "few")])
    with pytest.raises(DataError, match=r"few: lacks lesion lesion-0190"):
        Comparison([tmp_path / "few", runs[0]])
    shutil.copytree(runs[0], tmp_path / "other")
    without_file_hashes(tmp_path / "other")
    nested = tmp_path / "other" / "ensemble_oof.parquet"
    rows = read_nested(nested)
    labels = rows.labels.copy()
    labels[3] = (labels[3] + 1) % 11
    write_nested(nested, replace(rows, labels=labels))
    with pytest.raises(DataError, match=re.escape(f"lesion {rows.lesion_ids[3]} has another label")):
        Comparison([runs[0], tmp_path / "other"])


def test_mcnemar_is_the_published_formula() -> None:
    generator = np.random.default_rng(0)
    for lesions in (3, 20, 400):
        first, second = generator.random((2, lesions)) < np.array([[0.6], [0.7]])
        test = mcnemar(first, second)
        differ = test.first + test.second
        expected = binomtest(test.first, differ).pvalue if differ else 1.0
        assert test.p == pytest.approx(expected, abs=1e-12)


def test_report_of_a_network_that_predicts_alone(runs: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(runs[0], tmp_path / "alone")
    config = experiment(folder, enabled=False)
    ensemble = EnsembleConfig(bootstrap=50, rounds=4, use="dual_cnn")
    fit_ensemble(folder, config.model_copy(update={"ensemble": ensemble}))
    content = Content(folder)
    assert content.ensemble.members == ("dual_cnn",)
    assert len(content.networks) == 2
    assert [each.name for each in content.calibration.by_network] == list(content.networks)
