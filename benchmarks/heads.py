"""Training on CPUs: heads on cached tokens, and a CNN on photos, today's code against that of an earlier commit.

python -m benchmarks.heads [before=WORKTREE] [rounds=3] [seconds=8] [lesions=512]

Each measurement trains with the engine's step, loader and meter for some seconds, on synthetic photos or random
tokens, with the precision that `train.precision=auto` takes; loading is included. Today's folds are trained in
parallel: as many processes as cores at a time, of one thread each, whose lesions/s are added. `before` is a git
worktree of another commit (`git worktree add ../before 1b72629`), which trained one fold at a time with all cores; its
measurements alternate with today's. Without it only today's are printed. Run it on a machine that does nothing else.
The last line is one JSON object: lesions/s as multiples of those before, or lesions/s.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.data.threads import available_cores
from triderm_dist.environment import cpu_model
from triderm_dist.settings import PathText, Section

TOKENS = (49, 1280)
"""Tokens of a photo: those of tf_efficientnet_lite0 at 224 pixels."""
TRIMODAL = {"kind": "trimodal", "width": 128, "heads": 4, "mlp_ratio": 2, "dropout": 0.3}
DUAL_CNN = {"kind": "dual_cnn", "width": 256, "dropout": 0.4}
CASES: dict[str, dict[str, Any]] = {
    "trimodal_on_tokens": {**TRIMODAL, "train": {"global_batch": 64, "micro_batch": 64}},
    "dual_cnn_on_tokens": {**DUAL_CNN, "train": {"global_batch": 64, "micro_batch": 64}},
    "trained_cnn": {**DUAL_CNN, "train": {"global_batch": 8, "micro_batch": 8}},
    "tuned_cnn": {**DUAL_CNN, "train": {"global_batch": 64, "micro_batch": 64}},
}
"""What is trained: the networks of milk10k_cpu.yaml; then one with its encoder, on photos; then one with the last two
blocks of seven, on the cached output of the others, or on photos where a commit has no such cache.
"""
TUNED = {"freeze_clinical": 5, "freeze_dermoscopic": 5, "cache_frozen_blocks": True}
READY = "ready\n"
"""Printed by a process that is ready to train; it begins when it reads a line."""


class HeadsBenchmark(Section):
    before: PathText | None = Field(None, description="git worktree of the commit to compare with")
    rounds: int = Field(3, ge=1, description="rounds, each case once per round and commit")
    seconds: float = Field(8.0, gt=0, description="seconds of training per measurement")
    lesions: int = Field(512, ge=64, description="lesions of the synthetic set")
    tower: str = Field("timm:tf_efficientnet_lite0", description="encoder that is trained, random weights")
    image_size: int = Field(224, ge=32, description="its input side in pixels")
    cases: list[str] = Field(list(CASES), description="what to measure")


def main(config: HeadsBenchmark) -> None:
    here = Path(__file__).parents[1]
    trees = {"now": here} if config.before is None else {"before": Path(config.before), "now": here}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {case: {name: [] for name in trees} for case in config.cases}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(config.rounds):
            for case in config.cases:
                for name, tree in trees.items():
                    processes = available_cores() if name == "now" else 1
                    found[case][name].append(in_tree(tree, case, config, Path(folder, name), processes))
    print(f"{cpu_model()}, {available_cores()} cores, {config.rounds} rounds of {config.seconds:g} s")
    result: dict[str, float] = {}
    for case, measured in found.items():
        speeds = {name: [each["lesions_per_s"] for each in values] for name, values in measured.items()}
        for name, values in speeds.items():
            text = ", ".join(f"{value:,.0f}" for value in values)
            print(f"{case:<20} {name:<7} {statistics.median(values):9,.1f} lesions/s  ({text})")
        print(f"{'':<20} precision {measured['now'][0]['precision']}: {measured['now'][0]['why']}")
        if "before" in speeds:
            ratios = [now / before for now, before in zip(speeds["now"], speeds["before"], strict=True)]
            result[f"{case}_vs_before"] = round(statistics.median(ratios), 2)
        else:
            result[case] = round(statistics.median(speeds["now"]), 1)
    print(json.dumps(result))


def in_tree(tree: Path, case: str, config: HeadsBenchmark, folder: Path, processes: int) -> dict[str, Any]:
    """Measure a case with the code of a worktree, in new processes that train at the same time.

    Several have one thread each. Returns the values of the first, and lesions_per_s of all together.
    """
    options = config.model_dump(include={"seconds", "lesions", "tower", "image_size"})
    environment = {**os.environ, "PYTHONPATH": str(tree), **({"OMP_NUM_THREADS": "1"} if processes > 1 else {})}
    running = []
    for number in range(processes):
        job = json.dumps({"case": case, "folder": str(folder / str(number)), **options})
        words = [sys.executable, __file__, "measure", job]
        running.append(
            subprocess.Popen(
                words,
                cwd=tree,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    for process in running:
        assert process.stdout
        while (line := process.stdout.readline()) and line != READY:
            pass
    values: list[dict[str, Any]] = []
    for process in running:
        with contextlib.suppress(BrokenPipeError):  # it has failed
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
    for process in running:
        output, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{tree}, {case}: {errors[-2000:]}")
        values.append(json.loads(output.splitlines()[-1]))
    return {**values[0], "lesions_per_s": sum(each["lesions_per_s"] for each in values)}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train for some seconds. Uses only what exists in both commits, or asks whether it does."""
    import torch

    from triderm_dist.config import ModelConfig, TowerConfig
    from triderm_dist.data.loader import LoaderFactory
    from triderm_dist.data.photo_source import PhotoSource
    from triderm_dist.distributed import parallel
    from triderm_dist.engine import bench
    from triderm_dist.models import build_network, build_towers
    from triderm_dist.models.towers import TokenShape

    folder = Path(job["folder"])
    index = bench.synthetic_shards(folder / "shards", job["lesions"], 288)
    on_tokens = job["case"].endswith("_on_tokens")
    tower = {"source": job["tower"], "pretrained": False, "image_size": job["image_size"], "shared": True}
    frozen: dict[str, Any] = {"frozen": on_tokens}
    if job["case"] == "tuned_cnn":
        frozen = {key: value for key, value in TUNED.items() if key in TowerConfig.model_fields}
    model = ModelConfig.model_validate({**CASES[job["case"]], "tower": {**tower, **frozen}})
    torch.manual_seed(0)
    source: Any
    if on_tokens:
        means = reads_mean_tokens(model.kind)
        source = token_source(folder / "tokens", len(index), TOKENS, means)
        network = build_network(model, index.signature, TokenShape(*source.cache.shape))
    else:
        towers = build_towers(model.tower)
        network = build_network(model, index.signature, towers)
    if "cache_frozen_blocks" in frozen:
        network.skip_frozen()
        source = token_source(folder / "blocks", len(index), towers[0].input_shape, False)
    elif not on_tokens:
        source = PhotoSource(index, job["image_size"], towers[0].mean, towers[0].std, model.train.augment)
    precision, why = choose_precision(network, model.train.micro_batch, folder / job["case"])
    train = model.train.model_copy(update={"precision": precision})
    accelerator = parallel.start_training(train)
    loaders = LoaderFactory(index, source, os.cpu_count() or 1)
    print(READY, end="", flush=True)
    sys.stdin.readline()
    values = bench.measure(model.model_copy(update={"train": train}), network, loaders, accelerator, job["seconds"])
    return {**values, "precision": precision, "why": why}


def token_source(folder: Path, lesions: int, shape: tuple[int, ...], means: bool) -> Any:
    """Return a source of random tokens, or of outputs of frozen blocks, of this shape, written once."""
    import numpy as np

    from triderm_dist.data.token_cache import TokenCache
    from triderm_dist.data.token_source import TokenSource

    versions, generator = ["plain", "augmented-00"], np.random.default_rng(0)
    whole = cache = TokenCache(folder, lesions, shape)
    if means:
        cache = whole.means()
    for version, chunk in cache.missing(versions):
        tokens = generator.standard_normal((len(cache.rows(chunk)), 2, *shape), np.float32)
        cache.write(version, chunk, tokens.mean(2, keepdims=True) if means else tokens)
    return TokenSource(cache, versions, versions[:1])


def reads_mean_tokens(kind: str) -> bool:
    try:
        from triderm_dist.models import network_class
    except ImportError:  # commits before networks could read mean tokens
        return False
    return getattr(network_class(kind), "reads_mean_tokens", False)


def choose_precision(network: Any, micro_batch: int, folder: Path) -> tuple[str, str]:
    try:
        from triderm_dist.engine.cpu_precision import choose
    except ImportError:  # commits in which auto was fp32 on every CPU
        return "fp32", "always on a CPU"
    return choose(network, micro_batch, folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        run(HeadsBenchmark, main, __doc__)
