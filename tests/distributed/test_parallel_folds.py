"""Folds trained in parallel equal folds trained sequentially bit for bit, also after kills and stops."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import finish, start, wait_for
from triderm_dist.commands.crossval import CrossvalRun, main
from triderm_dist.config import Experiment, load
from triderm_dist.engine.parallel_folds import (
    PROCESS_BYTES,
    _memory_per_fold,
    prepare_folds,
    processes_that_fit,
    run_tasks,
)
from triderm_dist.engine.ray_folds import RayTasks, _schedule
from triderm_dist.schema import ConfigError, InputError

from .conftest import TINY_TRIMODAL
from .test_resume import records

SETTINGS = """
data: {folds: 2}
train:
  epochs: 2
  global_batch: 16
  micro_batch: 8
  log_every: 1
  trackers: []
  optim: {lr: 1e-3, warmup_epochs: 1}
"""
SETTINGS += TINY_TRIMODAL
SETTINGS += """\
  cnn:
    kind: dual_cnn
    width: 16
    tower: {source: "timm:test_efficientnet", pretrained: false, image_size: 32}
    train: {epochs: 12}
"""
FOLDS = ["tri/fold-0", "tri/fold-1", "cnn/fold-0", "cnn/fold-1"]


# Two folds at once on any machine.
AT_ONCE = {"auto": {"OMP_NUM_THREADS": "2"}, "true": {"RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'}}


def crossval(folder: Path, log: Path, parallel: str, *words: str) -> subprocess.Popen:
    environment = AT_ONCE.get(parallel, {})
    with log.open("w") as file:
        return start(
            "launch.crossval",
            "--config",
            str(folder / "tiny.yaml"),
            f"parallel_folds={parallel}",
            *words,
            environment=environment,
            output=file,
            errors=subprocess.STDOUT,
        )


def saved_steps(fold: Path) -> list[int]:
    """Return the steps of a fold's checkpoints."""
    return [int(path.name.split("-")[-1]) for path in fold.glob("checkpoints/epoch-*") if path.suffix != ".part"]


def process_of(run: Path, name: str, fold: int) -> int:
    """Return the ID of the process that trains a fold."""
    return int((run / name / f".fold-{fold}.lock").read_text().split()[0])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", AT_ONCE)
def test_killed_and_stopped_parallel_folds_equal_sequential_folds(packed, tmp_path, parallel):
    (tmp_path / "tiny.yaml").write_text(SETTINGS)
    log, first, second = (tmp_path / f"{name}.log" for name in ("sequential", "first", "second"))
    sequential = crossval(tmp_path, log, "false", f"data.shards={packed}", f"output={tmp_path / 'sequential'}")
    words = [parallel, f"data.shards={packed}", f"output={tmp_path / 'parallel'}", "cpus=1"]
    process = crossval(tmp_path, first, *words)
    fold = tmp_path / "parallel" / "cnn" / "fold-0"
    output = first.read_text
    wait_for(lambda: len(records(fold)) > 5 and saved_steps(fold), process, output)
    os.kill(process_of(tmp_path / "parallel", "cnn", 0), signal.SIGKILL)
    wait_for(lambda: "cnn fold 0 failed, restarting it from its last checkpoint" in output(), process, output)
    before = len(records(fold))
    wait_for(lambda: len(records(fold)) > before, process, output)
    process.send_signal(signal.SIGTERM)
    assert finish(process).returncode == 3, first.read_text()
    assert "interrupted: rerun the same command to resume" in first.read_text()
    assert not (fold / "predictions.parquet").exists()
    assert max(saved_steps(fold)) == records(fold)[-1]["step"]  # a checkpoint of the last step
    assert not list((tmp_path / "parallel").rglob("*.part"))

    process = crossval(tmp_path, second, *words)
    assert finish(process).returncode == 0, second.read_text()
    assert finish(sequential).returncode == 0, log.read_text()
    logs = first.read_text() + second.read_text()
    for name in ("tri fold 0", "tri fold 1", "cnn fold 0", "cnn fold 1"):
        assert len(re.findall(rf"{name} +1/", logs)) == 1, f"{name} did not resume\n{logs}"
    for name in FOLDS:
        one, other = tmp_path / "sequential" / name, tmp_path / "parallel" / name
        assert records(one) == records(other) and records(one)
        for file in ("weights.safetensors", "predictions.parquet"):
            assert (one / file).read_bytes() == (other / file).read_bytes(), f"{name}/{file}"
    tables = [(tmp_path / name / "oof.parquet").read_bytes() for name in ("sequential", "parallel")]
    assert tables[0] == tables[1]


def test_failed_folds_are_restarted_and_final_failures_reported(tmp_path):
    from triderm_dist.distributed.ray_cluster import running_ray

    def count(name: str) -> int:
        with (tmp_path / name).open("a") as file:
            file.write(".")
        return (tmp_path / name).stat().st_size

    def dies_once() -> None:
        if count("once") == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def raises() -> None:
        count("raises")
        raise OSError("no space\nleft")

    def refuses() -> None:
        count("refuses")
        raise ConfigError("train.optim.lr: too high")

    def lasts() -> None:
        time.sleep(1)
        count("lasts")

    with running_ray(None, 1, setting="address"):
        import ray

        tasks = {f.__name__: ray.remote(max_retries=0)(f).remote for f in (dies_once, raises, refuses, lasts)}
        with pytest.raises(InputError) as error:
            run_tasks(RayTasks(tasks), list(tasks), retries=2)
        with pytest.raises(ConfigError, match=r"cpus=9999, gpus=0: no machine has the resources of one fold"):
            _schedule(Experiment(), [("trimodal", 0)], 9999, None, 0)
    text = str(error.value)
    assert "raises: OSError: no space left" in text and "refuses: train.optim.lr: too high" in text
    assert "dies_once" not in text and "2 of 4 finished" in text and "\n" not in text
    times = {name: len((tmp_path / name).read_text()) for name in ("once", "raises", "refuses", "lasts")}
    assert times == {"once": 2, "raises": 3, "refuses": 1, "lasts": 1}


@pytest.mark.parametrize(
    ("processes", "gib", "need", "expected"),
    [(4, None, None, 4), (4, 32, None, 4), (4, 31, 10, 3), (4, 31, 1, 4), (4, 2, 10, 1), (0, 64, None, 1)],
)
def test_memory_limits_the_folds_at_once(processes, gib, need, expected):
    memory = None if gib is None else gib << 30
    assert processes_that_fit(processes, memory, lambda: need * 2**30) == expected


@pytest.mark.slow
def test_estimate_of_a_process_counts_its_training(packed, tmp_path):
    (tmp_path / "tiny.yaml").write_text(SETTINGS)
    experiment = load(Experiment, tmp_path / "tiny.yaml", [f"data.shards={packed}", f"output={tmp_path}"])
    on_tokens, on_photos = (_memory_per_fold(str(Path.cwd()), experiment, 1, [name]) for name in ("tri", "cnn"))
    assert PROCESS_BYTES < on_tokens < on_photos


def test_fold_process_imports_plugins(packed, tmp_path, monkeypatch):
    (tmp_path / "my_optimizer.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    monkeypatch.chdir(tmp_path)
    words = [f"data.shards={packed}", f"output={tmp_path}", "plugins=[my_optimizer.py]"]
    experiment = load(Experiment, None, words)
    for name in [name for name in sys.modules if "plugin_my_optimizer" in name]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "imported").unlink()
    prepare_folds(str(tmp_path), experiment, 1, [])
    assert (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("words", "world", "message"),
    [
        (["parallel_folds=true"], "2", "parallel_folds: starts its own processes; run `triderm crossval` without"),
        (["side_by_side=true"], None, "side_by_side is now called parallel_folds"),
        (["gpus=0.5"], None, "gpus: has effect with parallel_folds=true only"),
        (["parallel_folds=false", "cpus=2"], None, "cpus: has no effect with parallel_folds=false"),
        (["parallel_folds=true", "address=localhost:1"], None, "address=localhost:1: Ray did not start"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(packed, tmp_path, monkeypatch, words, world, message):
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(InputError, match=message) as error:
        main(load(CrossvalRun, None, [f"data.shards={packed}", f"output={tmp_path}", *words]))
    assert "\n" not in str(error.value)
