"""Findings of the doctor on data sets and reading speed."""

import json

import pytest

from tests.doctor.conftest import SMALL, finding
from tests.union_sets import MAP, main_set, other_set
from triderm_dist.config import Experiment, load
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.format import INDEX
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.data.synthetic import write_synthetic
from triderm_dist.doctor.data import RequiredSpeed, _required_speed, reading_finding, reading_speed
from triderm_dist.doctor.findings import GIB
from triderm_dist.doctor.machine import Gpu
from triderm_dist.monitoring.flops import training_flops
from triderm_dist.monitoring.memory_estimate import network_without_weights
from triderm_dist.tasks import load_task, milk10k_task

SIGNATURE = milk10k_task().signature(())


def test_packed_shards_are_counted_and_damage_is_reported(make_challenge, tmp_path):
    experiment = load(Experiment, None, [*SMALL, f"output={tmp_path / 'run'}", f"data.shards={tmp_path / 'shards'}"])
    assert finding(experiment, "training").state == "error"
    pack_shards(read_challenge(make_challenge().folder), tmp_path / "shards", short_side=None)
    packed = finding(experiment, "training")
    assert packed.state == "warning" and "22 lesions" in packed.text and "data.folds 5" in packed.advice
    (tmp_path / "shards" / "shard-000000.tar").unlink()
    assert "missing" in finding(experiment, "training").text and finding(experiment, "training").state == "error"
    (tmp_path / "shards" / INDEX).unlink()
    assert finding(experiment, "training").state == "error"
    unreadable = load(Experiment, None, [*SMALL, f"output={tmp_path / 'run'}", f"data.shards={'x' * 300}"])
    text = finding(unreadable, "training").text  # since Python 3.14 a path that is too long does not exist
    assert text.endswith(("File name too long", "no such folder; create it by triderm pack"))


def test_test_set_and_truth(make_challenge, tmp_path):
    base = [*SMALL, f"output={tmp_path / 'run'}"]
    assert finding(load(Experiment, None, base), "test").state == "ok"
    folder = make_challenge(prefix="MILK10k_Test", labeled=False, name="test").folder
    experiment = load(Experiment, None, [*base, f"data.test={folder}"])
    assert "22 lesions" in finding(experiment, "test").text
    experiment = load(Experiment, None, [*base, f"data.source={folder}"])
    assert finding(experiment, "training").text.endswith("no lesion has a diagnosis")
    experiment = load(Experiment, None, [*base, f"data.test={folder}", "data.test_truth=none.csv"])
    assert "none.csv" in finding(experiment, "test").text and finding(experiment, "test").state == "error"


def test_folder_of_another_task(tmp_path):
    """The folder is read by its own task, whose rarest diagnosis fills no fold; networks are those for its one view."""
    write_synthetic(tmp_path / "set", load_task("ham10000"), 100, 50, seed=0)
    base = [*SMALL, f"output={tmp_path / 'run'}", "data.task=ham10000", "data.folds=20"]
    experiment = load(Experiment, None, [*base, f"data.source={tmp_path / 'set' / 'train'}"])
    training = finding(experiment, "training")
    assert training.state == "warning" and "lesions of ham10000" in training.text
    one_view = finding(experiment, "a: memory").text
    assert one_view != finding(load(Experiment, None, [*SMALL]), "a: memory").text
    experiment = load(Experiment, None, [*base, f"data.source={tmp_path / 'set' / 'test'}"])
    unlabeled = finding(experiment, "training")
    assert unlabeled.state == "error" and "columns.diagnosis of the task names 'dx'" in unlabeled.advice


def test_reading_speed_is_measured_and_compared_with_the_need(make_challenge, tmp_path):
    folder = tmp_path / "shards"
    index = pack_shards(read_challenge(make_challenge().folder), folder, short_side=None)
    assert reading_speed(index, workers=2, seconds=0.1) > 0
    experiment = load(Experiment, None, [*SMALL, f"output={tmp_path / 'run'}", f"data.shards={folder}"])
    assert "lesions/s read and decoded by 2 thread(s)" in finding(experiment, "reading").text
    (shard,) = folder.glob("*.tar")
    shard.write_bytes(bytes(shard.stat().st_size))
    assert finding(experiment, "reading").state == "error" and "decode" in finding(experiment, "reading").text

    need = RequiredSpeed("a", 900.0, "assumed")
    assert reading_finding(1000, 2, need, ranks=1, cores=8).state == "ok"
    slow = reading_finding(300, 2, need, ranks=1, cores=8)
    assert slow.state == "warning" and slow.advice == "data.workers=6"
    crowded = reading_finding(1000, 2, need, ranks=8, cores=8)
    assert crowded.state == "warning" and "about 500 for each of 8 ranks on 8 cores" in crowded.text
    assert crowded.advice.startswith("2 cores per GPU")
    assert reading_finding(1000, 8, need, ranks=1, cores=2).state == "ok"


def test_required_reading_speed_follows_from_counted_flops():
    experiment = load(Experiment, None, [*SMALL, "models.a.tower.image_size=64"])
    gpu = Gpu("NVIDIA H100 80GB HBM3", 79 * GIB, 78 * GIB, (9, 0))
    need = _required_speed(experiment, SIGNATURE, "a", [gpu])
    flops = training_flops(network_without_weights(experiment.models["a"], SIGNATURE)[0])
    # Fusion takes most of the FLOPs with this small tower, hence the MFU of a transformer.
    assert need.lesions_per_s == pytest.approx(0.3 * 989e12 / flops)
    assert "an assumed MFU of 30% of 989 TFLOP/s" in need.source
    convolutions = [*SMALL, "models.a.tower.source=timm:test_resnet", "models.a.width=8"]
    assert "MFU of 2%" in _required_speed(load(Experiment, None, convolutions), SIGNATURE, "a", [gpu]).source
    assert _required_speed(experiment, SIGNATURE, "a", []) is None


def test_extra_sets_are_matched(tmp_path):
    main, other = main_set(tmp_path / "main"), other_set(tmp_path / "other")
    for changed, state, text in (
        ({}, "ok", "12 of 18 lesions of other join the training; site: no such category as scalp in"),
        ({"map": {"naevus": "NV"}}, "error", "data.extra.0.map: lacks melanoma (4 lesions)"),
        ({"shards": str(tmp_path / "absent")}, "error", "no such folder"),
    ):
        entry = {"shards": str(other.folder), "map": MAP, **changed}
        words = [f"output={tmp_path / 'run'}", f"data.shards={main.folder}", f"data.extra={json.dumps([entry])}"]
        found = finding(load(Experiment, None, [*SMALL, *words]), "data.extra.0")
        assert found.state == state and text in found.text
