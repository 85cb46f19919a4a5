"""What launch.bench measures, keeps and compares; on photos that it makes up."""

import json

import pytest

from tests.processes import launch
from triderm_dist.commands.bench import BenchRun, main
from triderm_dist.config import load
from triderm_dist.engine.bench import add_record, alike, comparison, read_records, synthetic_shards
from triderm_dist.schema import DataError

SETTINGS = [
    "models.tri={width: 32, heads: 2, tower: {source: 'timm:test_vit', image_size: 32, freeze_clinical: 1}}",
    "train={global_batch: 16, micro_batch: 8, peak_tflops: 0.1}", "data.short_side=40", "seconds=0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    done = launch("launch.bench", *SETTINGS, f"output={folder}", f"record={folder}/records.json", ranks=2)
    assert "no committed figure of this work" in done.stdout
    (found,) = read_records(folder / "records.json")
    return found


def test_a_record_says_what_was_measured_on_what(record):
    assert (record["ranks"], record["way"], record["precision"], record["frozen"]) == (2, "ddp", "fp32", "1+4")
    assert 0 < record["lesions_per_s"] <= 16 / record["seconds_a_step"]  # what is around the steps counts as well
    assert 0 <= record["data_wait"] < 1 and 0 < record["mfu"] < 1 and 0 < record["memory_gib"] < 10
    assert record["steps"] >= 3 and record["date"] and record["commit"] and record["versions"]["torch"]


def test_only_the_same_work_on_the_same_device_is_compared(record, tmp_path):
    path = tmp_path / "records.json"
    assert read_records(path) == []
    older = {**record, "lesions_per_s": 2 * record["lesions_per_s"], "date": "2020-01-01"}
    other = {**record, "device": "another one"}
    for each in (older, other):
        add_record(path, each)
    assert alike(read_records(path), record) == older
    assert "0.50 of the speed measured on 2020-01-01" in comparison(record, older)
    add_record(path, record)  # takes the place of the older one
    assert sorted(read_records(path), key=str) == sorted([other, record], key=str)
    assert alike([other], record) is None
    path.write_text(json.dumps([{"device": "x"}]))
    with pytest.raises(DataError, match=r"records\.json: is no list of measured records"):
        read_records(path)


def test_a_bad_file_of_records_is_refused_before_measuring(tmp_path):
    (tmp_path / "bad.json").write_text("{}x")
    words = [*SETTINGS, f"output={tmp_path / 'run'}", f"record={tmp_path / 'bad.json'}"]
    with pytest.raises(DataError, match=r"bad\.json: is no list of measured records"):
        main(load(BenchRun, None, words))
    assert not (tmp_path / "run").exists()


def test_photos_are_made_once(tmp_path):
    index = synthetic_shards(tmp_path / "shards", 12, 40)
    before = (tmp_path / "shards" / "index.json").stat().st_mtime_ns
    assert len(index) == 12 and (index.sizes > 0).all()
    assert synthetic_shards(tmp_path / "shards", 12, 40).fingerprint == index.fingerprint
    assert (tmp_path / "shards" / "index.json").stat().st_mtime_ns == before
