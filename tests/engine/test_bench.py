"""Measurement, recording and comparison of training throughput on synthetic photos."""

import json

import pytest

from tests.processes import launch
from triderm_dist.commands.bench import BenchRun, main
from triderm_dist.config import load
from triderm_dist.engine import cpu_precision
from triderm_dist.engine.bench import add_record, comparison, find_comparable, read_records, synthetic_shards
from triderm_dist.schema import DataError

SETTINGS = [
    "models.tri={width: 32, heads: 2, tower: {source: 'timm:test_vit', image_size: 32, freeze_clinical: 1}}",
    "train={global_batch: 16, micro_batch: 8, peak_tflops: 0.1}",
    "data.short_side=40",
    "seconds=0.5",
]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    done = launch("launch.bench", *SETTINGS, f"output={folder}", f"record={folder}/records.json", ranks=2)
    assert "no committed record of this model and batch" in done.stdout
    (found,) = read_records(folder / "records.json")
    return found


def test_record_has_measurements_and_their_conditions(record):
    assert (record["ranks"], record["strategy"], record["precision"], record["frozen"]) == (2, "ddp", "fp32", "1+4")
    # Includes the time between steps; both values are rounded.
    assert 0 < record["lesions_per_s"] <= 1.001 * 16 / record["seconds_per_step"]
    assert 0 <= record["data_wait"] < 1 and 0 < record["mfu"] < 1 and 0 < record["memory_gib"] < 10
    assert record["steps"] >= 3 and record["date"] and record["commit"] and record["versions"]["torch"]


def test_only_equal_models_and_devices_are_compared(record, tmp_path):
    path = tmp_path / "records.json"
    assert read_records(path) == []
    older = {**record, "lesions_per_s": 2 * record["lesions_per_s"], "date": "2020-01-01"}
    other = {**record, "device": "another one"}
    for each in (older, other):
        add_record(path, each)
    assert find_comparable(read_records(path), record) == older
    assert "0.50 of the throughput measured on 2020-01-01" in comparison(record, older)
    add_record(path, record)  # replaces the older record
    assert sorted(read_records(path), key=str) == sorted([other, record], key=str)
    assert find_comparable([other], record) is None
    path.write_text(json.dumps([{"device": "x"}]))
    with pytest.raises(DataError, match=r"records\.json: not a list of benchmark records"):
        read_records(path)


def test_invalid_record_file_is_refused_before_measuring(tmp_path):
    (tmp_path / "bad.json").write_text("{}x")
    words = [*SETTINGS, f"output={tmp_path / 'run'}", f"record={tmp_path / 'bad.json'}"]
    with pytest.raises(DataError, match=r"bad\.json: not a list of benchmark records"):
        main(load(BenchRun, None, words))
    assert not (tmp_path / "run").exists()


def test_only_records_of_the_same_task_are_compared(record, tmp_path):
    assert record["task"] == "milk10k"
    without = {key: value for key, value in record.items() if key != "task"}
    (tmp_path / "records.json").write_text(json.dumps([without]))  # as before there were other tasks
    assert read_records(tmp_path / "records.json") == [record]
    assert find_comparable([record], {**record, "task": "ham10000"}) is None


def test_any_task_is_measured_in_the_precision_of_its_trainings(tmp_path, capsys, monkeypatch):
    path = tmp_path / "records.json"
    monkeypatch.setattr(cpu_precision, "choose", lambda *arguments: ("bf16", "faster here; kept in precision.json"))
    main(load(BenchRun, None, [*SETTINGS, "data.task=ham10000", f"output={tmp_path}", f"record={path}"]))
    assert (read_records(path)[0]["task"], read_records(path)[0]["precision"]) == ("ham10000", "bf16")
    printed = capsys.readouterr().out
    assert "no committed record" in printed and "precision bf16 (faster here)" in printed


def test_synthetic_photos_are_created_once(tmp_path):
    index = synthetic_shards(tmp_path / "shards", 12, 40)
    before = (tmp_path / "shards" / "index.json").stat().st_mtime_ns
    assert len(index) == 12 and (index.sizes > 0).all()
    assert synthetic_shards(tmp_path / "shards", 12, 40).fingerprint == index.fingerprint
    assert (tmp_path / "shards" / "index.json").stat().st_mtime_ns == before
