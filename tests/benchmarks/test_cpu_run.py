"""The slice of benchmarks.cpu_run, and when it compares."""

import csv

import pytest

from benchmarks.cpu_run import BEFORE, CpuRun, compared, take_slice, this_cpu
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.schema import ConfigError


def test_slice_is_every_kth_lesion_with_its_photos(make_challenge, tmp_path):
    source = make_challenge(lesions=22)
    take_slice(source.folder, tmp_path / "slice", 11)
    dataset = read_challenge(str(tmp_path / "slice"))
    ids = sorted(row["lesion_id"] for row in source.truth)
    assert sorted(lesion.lesion_id for lesion in dataset.lesions) == ids[::2]
    with next((tmp_path / "slice").glob("*_GroundTruth.csv")).open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 11
    with pytest.raises(ConfigError, match="has 22, fewer than 23"):
        take_slice(source.folder, tmp_path / "more", 23)


def test_figures_of_another_cpu_or_other_work_are_not_compared(capsys):
    own = {"seconds": 50.0, "cpu_seconds": 80.0, "peak_mb": 900}
    record = {"commit": BEFORE, "lesions": 500, "cpu": this_cpu(), "seconds": 100.0, "cpu_seconds": 120.0, "peak_mb": 1}
    config = CpuRun(source="x")
    assert compared(config, own, [record]) == {f"vs_{BEFORE}": 2.0, f"cpu_vs_{BEFORE}": 1.5, **own}
    other = {**record, "cpu": {**this_cpu(), "number": -1}}
    capsys.readouterr()
    for settings, records in (
        (config, [other]),
        (CpuRun(source="x", lesions=100), [record]),
        (CpuRun(source="x", config="demo"), [record]),
    ):
        assert compared(settings, own, records) == {f"vs_{BEFORE}": None, **own}
        assert "not compared" in capsys.readouterr().out
