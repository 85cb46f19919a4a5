"""The doctor: what is missing is told with what to do, whatever is installed."""

import builtins
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from triderm_dist import doctor
from triderm_dist.config import Experiment, TowerConfig, load
from triderm_dist.data.milk10k import read_challenge
from triderm_dist.data.pack import pack_shards
from triderm_dist.data.shards import INDEX
from triderm_dist.doctor import GIB, Gpu, examine, missing, nccl_finding, suggest, tower_weights
from triderm_dist.engine.footprint import of_model
from triderm_dist.schema import InputError

ROOT = Path(__file__).parents[1]
SMALL = ["models.a.tower.source=timm:test_efficientnet", "models.a.tower.pretrained=false"]


def finding(experiment: Experiment, name: str, ranks: int = 1) -> doctor.Finding:
    sections = examine(experiment, ROOT, ranks)
    return next(each for section in sections.values() for each in section if each.name == name)


def run_doctor(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch.doctor", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_missing_data_is_the_last_line_with_status_2(tmp_path):
    done = run_doctor(*SMALL, f"output={tmp_path}", f"data.source={tmp_path / 'nowhere'}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: missing: training (")
    assert "nowhere" in done.stderr and "nowhere" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_can_start_ends_with_status_0(make_challenge, tmp_path):
    done = run_doctor(*SMALL, "ranks=1", f"output={tmp_path / 'run'}", f"data.source={make_challenge().folder}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "a run can start"
    assert "22 lesions" in done.stdout and "96 = " in done.stdout


def test_packed_shards_are_counted_and_damage_is_told(make_challenge, tmp_path):
    experiment = load(Experiment, None, [*SMALL, f"output={tmp_path / 'run'}", f"data.shards={tmp_path / 'shards'}"])
    assert finding(experiment, "training").state == "missing"
    pack_shards(read_challenge(make_challenge().folder), tmp_path / "shards", short_side=None)
    packed = finding(experiment, "training")
    assert packed.state == "note" and "22 lesions" in packed.text and "data.folds 5" in packed.advice
    (tmp_path / "shards" / "shard-000000.tar").unlink()
    assert "missing" in finding(experiment, "training").text and finding(experiment, "training").state == "missing"
    (tmp_path / "shards" / INDEX).unlink()
    assert finding(experiment, "training").state == "missing"


def test_test_set_and_truth(make_challenge, tmp_path):
    base = [*SMALL, f"output={tmp_path / 'run'}"]
    assert finding(load(Experiment, None, base), "test").state == "ok"
    folder = make_challenge(prefix="MILK10k_Test", labelled=False, name="test").folder
    experiment = load(Experiment, None, [*base, f"data.test={folder}"])
    assert "22 lesions" in finding(experiment, "test").text
    experiment = load(Experiment, None, [*base, f"data.source={folder}"])
    assert finding(experiment, "training").text.endswith("no ground truth")
    experiment = load(Experiment, None, [*base, f"data.test={folder}", "data.test_truth=none.csv"])
    assert "none.csv" in finding(experiment, "test").text and finding(experiment, "test").state == "missing"


def test_a_batch_that_does_not_split_names_one_that_does(tmp_path):
    experiment = load(Experiment, None, [*SMALL, f"output={tmp_path}"])
    assert finding(experiment, "a: batch", ranks=2).text == "96 = 2 rank(s) x 16 x 3 accumulated"
    uneven = finding(experiment, "a: batch", ranks=4)
    assert uneven.state == "missing" and uneven.advice == "train.micro_batch=12"
    assert finding(experiment, "a: batch", ranks=5).advice == "train.global_batch=80"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:no_such_network", "no model 'no_such_network'"),
        ("timm:test_efficientnet@none.pth", "none.pth: no such file"),
        ("timm:test_efficientnet@package:no_such_package", "pip install no-such-package"),
        ("none.safetensors", "none.safetensors: no such file"),
        ("local-dir:none", "none/open_clip_config.json: no such file"),
        ("resnet", "'resnet' is unknown"),
    ],
)
def test_weights_that_are_nowhere(source, message):
    with pytest.raises(InputError, match=message):
        tower_weights(TowerConfig(source=source))


def test_hub_weights_are_looked_up_in_the_cache_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text, here = tower_weights(TowerConfig(source="hf-hub:nobody/nothing"))
    assert text.endswith("not cached") and not here
    overrides = ["models.a.tower.source=hf-hub:nobody/nothing", f"output={tmp_path}"]
    found = finding(load(Experiment, None, overrides), "a: tower")
    assert found.state == "missing" and "HF_HUB_OFFLINE" in found.text


def test_two_nccl_packages_collide():
    assert nccl_finding(["nvidia-nccl-cu13 2.30.7"], gpu=True).state == "ok"
    both = ["nvidia-nccl-cu12 2.28.9", "nvidia-nccl-cu13 2.30.7"]
    assert nccl_finding(both, gpu=True).state == "missing" and "xgboost-cu13" in nccl_finding(both, gpu=True).advice
    assert nccl_finding(both, gpu=False).state == "note"


@pytest.mark.parametrize(
    ("gpus", "experiment", "launcher", "override"),
    [
        ([], "milk10k_cpu", "single", ""),
        ([Gpu("A100", 79 * GIB, 78 * GIB, (8, 0))], "a100", "single", ""),
        ([Gpu("3090", 24 * GIB, 23 * GIB, (8, 6))], "rtx3090", "single", ""),
        ([Gpu("4090", 24 * GIB, 23 * GIB, (8, 9))], "rtx4090", "single", ""),
        ([Gpu("laptop", 8 * GIB, 7 * GIB, (8, 9))], "rtx3090", "single", "train.micro_batch=4"),
        ([Gpu("H100", 79 * GIB, 78 * GIB, (9, 0))] * 8, "h100x8", "ddp", ""),
        ([Gpu("4090", 24 * GIB, 23 * GIB, (8, 9))] * 2, "milk10k", "ddp", "train.micro_batch=24"),
        ([Gpu("4090", 24 * GIB, 23 * GIB, (8, 9))] * 5, "milk10k", "ddp", "train.global_batch=80 train.micro_batch=16"),
    ],
)
def test_what_suits_a_machine_exists_and_splits(gpus, experiment, launcher, override):
    by_name = {each.name: each.text for each in suggest(gpus, ROOT)}
    assert by_name["experiment"] == f"launch/experiments/{experiment}.yaml"
    assert by_name["accelerate file"].startswith(f"accelerate_configs/{launcher}.yaml")
    assert override in by_name["start"]
    overrides = [word for word in by_name["start"].split() if word.startswith("train.")]
    config = load(Experiment, ROOT / by_name["experiment"], overrides)
    for model in config.models.values():
        assert model.train.global_batch % (max(1, len(gpus)) * model.train.micro_batch) == 0


def test_an_old_or_absent_package_is_told(monkeypatch):
    versions = {"deepspeed": "0.14.0", "torch": "2.14.1"}

    def version(name: str) -> str:
        if name in versions:
            return versions[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {each.name: each for each in doctor._versions(ROOT)}
    assert found["deepspeed"].state == "note" and "deepspeed" in found["deepspeed"].advice
    assert found["accelerate"].state == "missing" and "accelerate" in found["accelerate"].advice
    assert found["ray"].state == "note" and "tune.search" in found["ray"].text
    assert found["packages"].text.startswith("torch 2.14.1")


def test_nothing_installed_is_no_crash(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("triderm_dist.") and name != "triderm_dist.doctor"]:
        if name.split(".")[1] in ("engine", "models"):
            monkeypatch.delitem(sys.modules, name)
    absent = ("torch", "accelerate", "timm", "open_clip", "psutil", "huggingface_hub")
    for name in [name for name in sys.modules if name.split(".")[0] in absent]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name: str, *rest):
        if name.split(".")[0] in absent:
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(importlib, "import_module", lambda name: without(name) and sys.modules[name])
    experiment = load(Experiment, None, [*SMALL, f"output={tmp_path}", f"data.source={tmp_path}"])
    sections = examine(experiment, ROOT)
    assert {each.name for each in missing(sections)} >= {"training"}
    assert any("psutil" in each.advice for each in sections["machine"])
    assert any("without torch" in each.text for each in sections["experiment"])


def test_a_step_that_does_not_fit_is_told_with_what_fits():
    small = [*SMALL, "models.a.tower.image_size=64", "train.global_batch=64", "train.micro_batch=64"]
    experiment = load(Experiment, None, small)

    def memory(gpu: float) -> doctor.Finding:
        findings = examine(experiment, ROOT, 1, gpu_memory=gpu)["experiment"]
        return next(each for each in findings if each.name == "a: memory")

    assert memory(80).state == "ok" and "micro-batches up to 64 fit into 80 GiB" in memory(80).text
    need = of_model(experiment.models["a"], half=True)[0]
    tight = memory((need.total(50) / GIB + doctor.CONTEXT) / doctor.USABLE)
    assert tight.state == "note" and "more than a GPU" in tight.text
    assert "train.micro_batch=32" in tight.advice
    assert memory(1.0).advice.startswith("a larger GPU")
