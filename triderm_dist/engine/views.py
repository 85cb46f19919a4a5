"""Views of a packed set for one model: its photos, or the tokens of its frozen tower, computed once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from triderm_dist.config import AugmentConfig, DataConfig, Experiment, ModelConfig, stable_dump
from triderm_dist.data.augment import build_augmentations
from triderm_dist.data.loader import Loader, PhotoSource, TokenSource, ViewSource
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.token_cache import TokenCache, cache_key
from triderm_dist.distributed.parallel import start
from triderm_dist.models import build_towers
from triderm_dist.models.towers import TokenShape, Tower, tower_hash

PLAIN = "plain"
EXTRACT_BATCH = 32


@dataclass
class Views:
    """Where a network gets its views, and the frozen tower's token shape, or None where the network holds the
    towers.
    """

    source: ViewSource
    tokens: TokenShape | None


def open_views(
    model: ModelConfig,
    index: ShardIndex,
    folder: Path,
    accelerator: Accelerator,
    data: DataConfig,
    *,
    seed: int,
    train: bool,
    transforms: int = 1,
    between: Callable[[], None] = lambda: None,
) -> Views:
    """Photos for towers that learn; for a frozen tower its tokens, after computing those that FOLDER lacks. Call on
    all ranks.

    train: also the augmented versions. transforms: how many transforms of the dihedral group prediction will ask for.
    between: called on all ranks after every chunk of tokens, and may raise.
    """
    augment = model.train.augment
    build_augmentations(augment)  # refuses unknown ones, also where all tokens are cached
    for note in index.notes():
        accelerator.print(f"note: {note}")
    torch.manual_seed(seed)  # a frozen tower with random weights is the same in every process
    tower = build_towers(model.tower)[0]
    if not model.tower.frozen:
        return Views(PhotoSource(index, tower.image_size, tower.mean, tower.std, augment), None)
    accelerator.print(tower.report)
    shape = TokenShape(tower.num_tokens, tower.width)
    key = cache_key(tower=tower_hash(tower), index=index.fingerprint, size=tower.image_size)
    cache = TokenCache(folder / key, len(index), (shape.num_tokens, shape.width))
    variants = [PLAIN, *augmented_versions(augment, seed)] if train else [PLAIN]
    turned = [PLAIN, *(f"dihedral-{k}" for k in range(1, transforms))]
    _extract(
        tower,
        index,
        cache,
        list(dict.fromkeys([*variants, *turned])),
        augment,
        seed,
        accelerator,
        data,
        model.train.compile,
        between,
    )
    return Views(TokenSource(cache, variants, turned), shape)


def prepare_tokens(experiment: Experiment, index: ShardIndex, name: str) -> None:
    """Compute what the cache lacks of the tokens that training a model reads; nothing where its towers learn."""
    model = experiment.models[name]
    if not model.tower.frozen:
        return
    train = model.train
    accelerator = start(train.precision, train.micro_batch, train.global_batch, train.optim.clip_norm)
    seed = experiment.seed_of_tokens
    open_views(model, index, experiment.token_folder, accelerator, experiment.data, seed=seed, train=True)


def augmented_versions(augment: AugmentConfig, seed: int) -> list[str]:
    """Names of the augmented versions of the token cache; the name tells the settings that shape the photos."""
    settings = stable_dump(augment, "models.NAME.train.augment")
    settings = {key: value for key, value in settings.items() if key in AugmentConfig.pixel_keys()}
    digest = hashlib.sha256(json.dumps([settings, seed], sort_keys=True).encode()).hexdigest()[:8]
    return [f"augmented-{digest}-{number:02d}" for number in range(augment.token_variants)]


@torch.inference_mode()
def _extract(
    tower: Tower,
    index: ShardIndex,
    cache: TokenCache,
    versions: list[str],
    augment: AugmentConfig,
    seed: int,
    accelerator: Accelerator,
    data: DataConfig,
    compile_tower: bool,
    between: Callable[[], None],
) -> None:
    """Compute what is missing; ranks take turns by chunk, and an interrupted extraction goes on at the next chunk."""
    missing = cache.missing(versions)
    accelerator.wait_for_everyone()  # all ranks have looked before one writes
    if not missing:
        return
    tower = tower.to(accelerator.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    if compile_tower:
        tower.compile(dynamic=False)
    source = PhotoSource(index, tower.image_size, tower.mean, tower.std, augment)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not accelerator.is_main_process) as progress:
        task = progress.add_task("tokens of the frozen tower, chunks", total=len(missing))
        for number, (version, chunk) in enumerate(missing):
            if number % accelerator.num_processes == accelerator.process_index:
                cache.write(
                    version,
                    chunk,
                    _tokens(tower, index, source, cache.rows(chunk), version, augment, seed, accelerator, data),
                )
            between()
            progress.update(task, completed=number + 1)
            if accelerator.is_main_process and not progress.console.is_terminal and (number + 1) % 10 == 0:
                print(f"tokens of the frozen tower: {number + 1} of {len(missing)} chunks", flush=True)
    source.close()
    accelerator.wait_for_everyone()


def _tokens(
    tower: Tower,
    index: ShardIndex,
    source: PhotoSource,
    rows: np.ndarray,
    version: str,
    augment: AugmentConfig,
    seed: int,
    accelerator: Accelerator,
    data: DataConfig,
) -> np.ndarray:
    """(n, 2 views, L, D) float16."""
    kind, _, number = version.rpartition("-")
    augmented = kind.startswith("augmented")
    plan = EpochPlan(Samples.of(index, rows), Sampling("sequential"), 0, 0)
    loader = Loader(
        index, source, plan.batches(0, 1, EXTRACT_BATCH), EXTRACT_BATCH, accelerator.device,
        augment=augment if augmented else None, seed=seed, epoch=int(number) if augmented else 0,
        workers=data.workers, prefetch=data.prefetch,
    )  # fmt: skip
    parts = []
    for step in loader:
        batch = source.transformed(step.micro_batches[0], step.rows, int(number) if kind == "dihedral" else 0)
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=accelerator.device.type == "cuda"):
            both = [tower(pixels)[: step.count] for pixels in (batch.clinical, batch.dermoscopic)]
        parts.append(torch.stack(both, 1).half().cpu().numpy())
    return np.concatenate(parts)
