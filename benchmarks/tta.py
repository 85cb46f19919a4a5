"""Test-time augmentation: ours against the build guide's loop, equal outputs from half the forwards.

python -m benchmarks.tta [tower=timm:tf_efficientnet_lite0] [image_size=224] [lesions=64] [rounds=5]

Both predict the same packed synthetic lesions under the 8 transforms of the dihedral group, with a tri-modal network on
random weights. Ours: `engine.evaluate`, one forward per transform gives features and all logits, photos are decoded
once. The guide's (7.2, with its ensemble's `predict`): for each transform one forward for the features and one for the
logits; its photos are decoded beforehand, and transformed in the memory layout that ours uses. The last line is one
JSON object.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import ModelConfig
from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.distributed import parallel
from triderm_dist.engine.evaluate import Evaluation, evaluate, forward
from triderm_dist.models import build_network, build_towers
from triderm_dist.models.network import Network
from triderm_dist.schema import Batch
from triderm_dist.settings import Section

TRANSFORMS = 8


class TtaRun(Section):
    tower: str = Field("timm:tf_efficientnet_lite0", description="tower source, with random weights")
    image_size: int = Field(224, ge=32, description="input side in pixels")
    lesions: int = Field(64, ge=50, description="synthetic lesions to predict")
    batch: int = Field(16, ge=1, description="lesions per forward")
    rounds: int = Field(5, ge=1, description="rounds, each method once per round")


def main(config: TtaRun) -> None:
    accelerator = parallel.start_inference("fp32")
    model = ModelConfig.model_validate(
        {
            "width": 128,
            "heads": 4,
            "tower": {"source": config.tower, "pretrained": False, "image_size": config.image_size, "shared": True},
        }
    )
    torch.manual_seed(0)
    towers = build_towers(model.tower)
    with tempfile.TemporaryDirectory() as folder:
        index = packed_demo(Path(folder), config)
        rows = np.arange(len(index))
        source = PhotoSource(index, towers[0].image_size, towers[0].mean, towers[0].std)
        network = build_network(model, index.signature, towers).to(accelerator.device).eval()
        loaders = LoaderFactory(index, source)
        batches = [
            (step.micro_batches[0], step.rows) for step in loaders.sequential(rows, config.batch, accelerator.device)
        ]
        times: dict[str, list[float]] = {"ours": [], "guide": []}
        for _ in range(config.rounds):
            started = time.perf_counter()
            ours = evaluate(network, loaders, rows, accelerator, micro_batch=config.batch, transforms=TRANSFORMS)
            times["ours"].append(time.perf_counter() - started)
            started = time.perf_counter()
            logits, features = guide(network, source, batches)
            times["guide"].append(time.perf_counter() - started)
    check(ours, logits, features)
    medians = {method: statistics.median(seconds) for method, seconds in times.items()}
    ratios = [guide / ours for ours, guide in zip(times["ours"], times["guide"], strict=True)]
    print(
        f"{config.tower} at {config.image_size}, {len(rows)} lesions x {TRANSFORMS} transforms on {accelerator.device}"
    )
    for method, seconds in medians.items():
        print(f"{method:<6} {seconds:7.2f} s  {len(rows) / seconds:7.2f} lesions/s")
    print("equal outputs: largest difference of logits and features below 1e-4")
    print(json.dumps({"vs_guide": round(statistics.median(ratios), 3)}))


def packed_demo(folder: Path, config: TtaRun) -> ShardIndex:
    """Pack the held-out part of the demo's synthetic lesions."""
    sizes = ["lesions=100", f"test_lesions={config.lesions}"]
    command = [sys.executable, "-m", "triderm_dist.commands.synthetic", f"output={folder / 'demo'}", *sizes]
    subprocess.run(command, check=True)
    return pack_shards(read_challenge(folder / "demo" / "test"), folder / "shards", short_side=None)


@torch.no_grad()
def guide(
    network: Network, source: PhotoSource, batches: list[tuple[Batch, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return (N, C) logits and (N, D) features, by two forwards for each transform and batch."""
    logits: dict[int, list[torch.Tensor]] = {}
    features: dict[int, list[torch.Tensor]] = {}
    for transform in range(TRANSFORMS):
        for batch, rows in batches:
            transformed = source.transformed(batch, rows, transform)
            batch_features = forward(network, transformed).features
            batch_logits = forward(network, transformed).logits
            for i, row in enumerate(rows):
                if batch.valid[i]:
                    features.setdefault(int(row), []).append(batch_features[i])
                    logits.setdefault(int(row), []).append(batch_logits[i])
    return tuple(  # type: ignore[return-value]
        np.stack([torch.stack(parts[row]).mean(0).cpu().numpy() for row in sorted(parts)])
        for parts in (logits, features)
    )


def check(ours: Evaluation, logits: np.ndarray, features: np.ndarray) -> None:
    np.testing.assert_allclose(ours.logits, logits, atol=1e-4)
    np.testing.assert_allclose(ours.features, features, atol=1e-4)


if __name__ == "__main__":
    run(TtaRun, main, __doc__)
