"""triderm runs: the runs of a folder with their scores."""

import os
from pathlib import Path

import pytest

from triderm_dist import cli
from triderm_dist.checksums import write_checked_json
from triderm_dist.commands import runs
from triderm_dist.config import Experiment, load, save
from triderm_dist.ensemble.run_list import find_runs
from triderm_dist.environment import record_program
from triderm_dist.files import size_of
from triderm_dist.schema import DataError

HELD_OUT = {"macro_f1": 0.55, "interval": [0.5, 0.6], "argmax": 0.5, "n": 10, "absent": []}


def stacked(folder: Path, score: float) -> Path:
    folder.mkdir(parents=True)
    nested = {"value": score, "low": score - 0.1, "high": score + 0.1}
    content = {"format": "triderm-ensemble", "version": 3, "scores": {"ensemble": {"nested": nested}}}
    write_checked_json(folder / "ensemble.json", content)
    save(load(Experiment, None, [f"output={folder}"]), folder / "config.yaml")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    stacked(tmp_path / "low", 0.4)
    write_checked_json(stacked(tmp_path / "group" / "high", 0.6) / "heldout.json", HELD_OUT)
    begun = tmp_path / "begun" / "tri"
    for fold, names in enumerate((("weights.safetensors", "fold.json"), ("weights.safetensors",))):
        (begun / f"fold-{fold}").mkdir(parents=True)
        for name in names:
            (begun / f"fold-{fold}" / name).write_bytes(bytes(500))
    damaged = stacked(tmp_path / "damaged", 0.9)
    (damaged / "ensemble.json").write_text((damaged / "ensemble.json").read_text().replace("0.9", "0.8"))
    (tmp_path / "photos").mkdir()
    return tmp_path


def test_runs_are_sorted_by_score_and_unstacked_ones_come_last(folder):
    found = find_runs(folder)
    assert [each.folder.name for each in found] == ["high", "low", "begun", "damaged"]
    assert [each.score and round(each.score.value, 3) for each in found] == [0.6, 0.4, None, None]
    assert (found[0].held_out, found[1].held_out) == (0.55, None)
    assert (found[2].finished, found[2].trainings, found[2].size) == (1, 2, 1500)


def test_date_is_that_of_the_last_stage_and_survives_a_copy(folder):
    with record_program(folder / "low", "stack", cli.exit_code):
        pass
    before = find_runs(folder / "low")[0].date
    for path in (folder / "low").iterdir():
        os.utime(path, (0, 0))
    assert find_runs(folder / "low")[0].date == before
    os.utime(folder / "group" / "high" / "ensemble.json", (86400, 86400))
    os.utime(folder / "group" / "high" / "config.yaml", (0, 0))
    assert f"{find_runs(folder / 'group')[0].date:%Y-%m-%d}" == "1970-01-02"


def test_table_fits_80_columns(folder, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(folder.parent)
    cli.run(runs.RunsRun, runs.main, None, [folder.name], first="folder")
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    row = next(line for line in lines if line.startswith("group/high"))
    assert row.split()[1:6] == ["0.600", "0.500", "to", "0.700", "0.550"]
    assert any("1 of 2 folds" in line for line in lines)


def test_missing_folder_and_folder_without_runs(tmp_path, capsys):
    with pytest.raises(DataError, match="no such folder; name the one that holds your runs"):
        find_runs(tmp_path / "none")
    cli.run(runs.RunsRun, runs.main, None, [str(tmp_path)], first="folder")
    assert capsys.readouterr().out == f"{tmp_path}: holds no run\n"


def test_files_that_a_training_removes_meanwhile_count_nothing(folder):
    gone = folder / "begun" / "gone.part"
    gone.write_bytes(bytes(9))
    sizes = map(size_of, [gone, folder / "begun"])
    assert next(sizes) == 9
    gone.unlink()
    assert size_of(gone) == 0 and next(sizes) == 1500
