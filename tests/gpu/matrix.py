"""Train, stop, resume, evaluate and predict under every strategy, with every network, eager, compiled and as a graph.

python -m tests.gpu.matrix FOLDER [strategies=single,ddp] [networks=trimodal] [modes=eager,graph] [accumulation=2]

On one GPU, or on a stub of one. Each strategy runs in a process of its own, as rank 0 of one rank, so that collectives
and sharding are those of several GPUs. Prints a line for each cell, and ends with 1 if one fails. A cell that is
refused by one line is no failure if `REFUSED` names its setting. Losses are compared with those of the first cell of
the network where the device computes.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ZERO = {f"zero{stage}": {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} for stage in (1, 2, 3)}
OFFLOADED = {
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
}
STRATEGIES: dict[str, dict[str, str]] = {
    "single": {},
    "ddp": {"NULLGPU_REAL": "1"},  # a stub must hold the addresses that DDP copies to the device
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    **{name: {"ACCELERATE_USE_DEEPSPEED": "true", **stage} for name, stage in ZERO.items()},
    "zero3_offload": {"ACCELERATE_USE_DEEPSPEED": "true", **ZERO["zero3"], **OFFLOADED},
}
"""Environment of a rank, as Accelerate's launcher sets it."""
TOWERS = {
    "trimodal": "{source: 'timm:test_vit', pretrained: false, image_size: 32, freeze_clinical: 2, "
    "freeze_dermoscopic: 1}",
    "dual_cnn": "{source: 'timm:test_efficientnet', pretrained: false, image_size: 32, freeze_clinical: 2, "
    "freeze_dermoscopic: 1}",
}
MODES = {
    "eager": ("train.compile=false", "train.graph=false"),
    "compiled": ("train.compile=true", "train.graph=false"),
    "graph": ("train.compile=false", "train.graph=true"),
    "compiled_graph": ("train.compile=true", "train.graph=true"),
}
SHARDED = [name for name in STRATEGIES if name not in ("single", "ddp")]
REFUSED = {
    **{(mode, name): "train.graph" for mode in ("graph", "compiled_graph") for name in SHARDED},
    **{(mode, name): "train.compile" for mode in ("compiled", "compiled_graph") for name in ("zero3", "zero3_offload")},
}
"""Cells by (mode, strategy), and the setting that is refused there."""
TOLERANCE = 0.05
"""Relative difference between losses in bf16."""


def main(words: list[str]) -> int:
    folder, options = Path(words[0]).resolve(), dict(word.split("=", 1) for word in words[1:])
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "shards" / "test").exists():
        run("shards.demo", f"output={folder}/demo", "lesions=100", "test_lesions=50")
        for part in ("train", "test"):
            run("shards.pack", f"source={folder}/demo/{part}", f"output={folder}/shards/{part}", "short_side=null")
    failed = 0
    for strategy in options.pop("strategies", ",".join(STRATEGIES)).split(","):
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        ranks = {} if strategy == "single" else {**rank, "MASTER_PORT": str(free_port()), **STRATEGIES[strategy]}
        code = f"from tests.gpu.matrix import cells; cells({str(folder)!r}, {strategy!r}, {options!r})"
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **ranks}, check=False)
        if done.returncode:
            print(f"{strategy}: exit status {done.returncode}", flush=True)
        failed += done.returncode != 0
    return int(failed > 0)


def run(module: str, *words: str) -> None:
    subprocess.run([sys.executable, "-m", module, *words], check=True, stdout=subprocess.DEVNULL)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return int(listening.getsockname()[1])


def cells(folder: str, strategy: str, options: dict[str, str]) -> None:
    """Run the cells of one strategy in this process, print their outcomes, and end it: with 1 if one failed."""
    failed = False
    if is_stub():
        skip_comparisons(strategy)
    for network in options.get("networks", ",".join(TOWERS)).split(","):
        for mode in options.get("modes", ",".join(MODES)).split(","):
            began, what = time.process_time(), ""
            try:
                cell(Path(folder), strategy, network, mode, int(options.get("accumulation", 1)))
            except Exception as error:
                expected = REFUSED.get((mode, strategy))
                refused = type(error).__name__ == "ConfigError" and expected and str(error).startswith(expected)
                if not refused:
                    failed = True
                    traceback.print_exc()
                what = f"{'refused' if refused else 'FAILED'}: {type(error).__name__}: {' '.join(str(error).split())}"
            print(f"{strategy} {network} {mode}: {what or 'ok'} ({time.process_time() - began:.1f} s CPU)", flush=True)
    sys.stderr.flush()
    os._exit(int(failed))  # without the process group's own end, which waits for ranks


def is_stub() -> bool:
    """Return whether the GPU is a stub, which computes nothing."""
    return hasattr(ctypes.CDLL(None), "nullgpu_reset")


def skip_comparisons(strategy: str) -> None:
    """Leave out what compares values that ranks have gathered: a stub has none."""
    if strategy == "ddp":
        import torch.nn.parallel.distributed as ddp
        from accelerate import Accelerator

        from triderm_dist.engine import trainer
        from triderm_dist.engine.finite import NonFiniteGuard

        trainer.damaged_weight = lambda weights: ""  # memory holds anything there
        Accelerator.gather = lambda self, tensors: tensors
        NonFiniteGuard.check = lambda self: self._lesion_ids.clear()
        ddp._verify_param_shape_across_processes = lambda *_: None
    if strategy.startswith("zero3"):
        from deepspeed.runtime.zero import partitioned_param_coordinator

        partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda *_: None


def cell(folder: Path, strategy: str, network: str, mode: str, accumulation: int) -> None:
    """Train fold 0 in two parts and fold 1 in one, evaluate both, and predict with both networks."""
    import torch

    from triderm_dist.cli import Interrupted
    from triderm_dist.config import Experiment, load
    from triderm_dist.data.shards.index import read_index
    from triderm_dist.engine.crossval import run_folds
    from triderm_dist.engine.predict_test import predict_test
    from triderm_dist.monitoring.metrics_log import read_metrics

    assert torch.cuda.is_available(), "no GPU"
    # DeepSpeed refuses batch norms in 16 bits.
    precision = "fp32" if network == "dual_cnn" and strategy.startswith("zero") else "bf16"
    output = folder / f"{strategy}-{network}-{mode}-{accumulation}"
    words = [
        f"data.shards={folder}/shards/train", f"data.test_shards={folder}/shards/test", "data.folds=2",
        f"output={output}", f"models.net.kind={network}",
        "models.net.width=32", "models.net.heads=2", "models.net.dropout=0.2", f"models.net.tower={TOWERS[network]}",
        "train.epochs=2", "train.global_batch=4", f"train.micro_batch={4 // accumulation}", "train.log_every=1",
        "train.sampling={kind: shuffle}", f"train.precision={precision}",
        "stack.enabled=false", "predict.transforms=2", *MODES[mode],
    ]  # fmt: skip
    if strategy in ("single", "ddp", "fsdp2"):
        words.append("train.ema_decay=0.8")
    experiment = load(Experiment, None, words)
    index = read_index(experiment.train_shards)

    def stop(epoch: int, scores: dict[str, float]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    fold = output / "net" / "fold-0"
    if not (fold / "fold.json").exists():
        try:
            run_folds(experiment, index, ["net"], [0], stop)
        except Interrupted:
            pass
        else:
            raise AssertionError("the training did not stop")
        assert list((fold / "checkpoints").glob("epoch-*")), "no checkpoint"
    run_folds(experiment, index, ["net"], [0, 1])
    train = [line for line in read_metrics(fold / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, len(train) + 1)) and len(train) >= 20, len(train)
    if not is_stub():
        compare(folder / f"losses-{network}-{accumulation}.json", [line["loss"] for line in train])
    assert (fold / "predictions.parquet").exists()
    predict_test(experiment, read_index(experiment.test_shards), ["net"])
    assert (fold / "test.parquet").exists()


def compare(file: Path, losses: list[float]) -> None:
    """Compare losses with those of the first cell of the network."""
    if not file.exists():
        file.write_text(json.dumps(losses))
    expected: list[Any] = json.loads(file.read_text())
    for step, (loss, other) in enumerate(zip(losses, expected, strict=True), 1):
        assert abs(loss - other) <= TOLERANCE * abs(other), f"step {step}: loss {loss} instead of {other}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
