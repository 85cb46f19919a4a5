"""Compute the cached tokens of frozen towers, and the cached output of frozen blocks, on all ranks."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from triderm_dist.config import AugmentConfig, stable_dump
from triderm_dist.data.loader import LoaderFactory, Step
from triderm_dist.data.token_cache import TokenCache
from triderm_dist.data.token_codec import TokenCodec
from triderm_dist.data.upload import HostCopy, read_behind
from triderm_dist.distributed.collectives import on_main
from triderm_dist.distributed.heartbeat import note_progress
from triderm_dist.distributed.out_of_memory import with_smaller_batches
from triderm_dist.files import remove_dead_parts
from triderm_dist.models.cpu_tower import MIN_PHOTOS, CpuTower, Encoder
from triderm_dist.runtime.terminal import wrapped

PLAIN = "plain"
"""Version of the tokens of photos that are not augmented."""
EXTRACT_BATCH = 32
"""Lesions per forward of a frozen tower."""


def augmented_versions(augment: AugmentConfig, seed: int) -> list[str]:
    """Name the augmented versions of the token cache after a hash of the settings that shape the photos."""
    settings = stable_dump(augment, "models.NAME.train.augment")
    settings = {key: value for key, value in settings.items() if key in AugmentConfig.pixel_keys()}
    digest = hashlib.sha256(json.dumps([settings, seed], sort_keys=True).encode()).hexdigest()[:8]
    return [f"augmented-{digest}-{number:02d}" for number in range(augment.token_variants)]


@dataclass
class TokenExtractor:
    """Computes the tokens of a frozen tower, or the output of frozen blocks.

    loaders: of photos.  views: to compute; default those of the set's task.  what: is computed, for the progress bar.
    batch: lesions at a time; halved when memory runs out.
    """

    tower: nn.Module
    loaders: LoaderFactory
    augment: AugmentConfig
    seed: int
    accelerator: Accelerator
    views: Sequence[str] = ()
    what: str = "tokens of the frozen tower"
    batch: int = EXTRACT_BATCH

    def __post_init__(self) -> None:
        self.views = self.views or self.loaders.index.signature.views

    @torch.inference_mode()
    def fill(
        self,
        cache: TokenCache,
        versions: list[str],
        compile_tower: bool,
        after_chunk: Callable[[], None],
        full: TokenCache | None = None,
    ) -> None:
        """Compute the missing chunks, distributed over the ranks; an interrupted run resumes at the next chunk.

        after_chunk: called on all ranks equally often.
        full: the cache of all tokens if `cache` is for mean tokens; chunks that it has are averaged, not recomputed.
        """
        accelerator, ranks = self.accelerator, self.accelerator.num_processes
        missing, in_full = on_main(partial(_missing, cache, versions, full))
        if not missing:
            return

        @functools.cache  # only if something is computed
        def encoder() -> Encoder:
            return self.encoder(compile_tower, cache.lesions * len(self.views) * len(versions))

        def part(version: str, chunk: int, rows: np.ndarray) -> np.ndarray:
            """Return the records (n, views, size) of some lesions of a chunk."""
            if (earlier := cache.earlier(version, rows)) is not None:
                return cache.codec.encode(torch.from_numpy(earlier)).numpy()
            if not full:
                return self.extract(encoder(), rows, version, cache.codec)
            tokens = self._all_tokens(encoder, rows, version, full, is_cached=(version, chunk) in in_full)
            means = tokens.mean(2, keepdims=True, dtype=np.float32)
            return cache.codec.encode(torch.from_numpy(means)).numpy()

        with self._progress(len(missing)) as show:
            for start in range(0, len(missing), ranks):
                # `after_chunk` may synchronize the ranks, so it is called once per round, in which each rank computes a
                # chunk, and after each part of a chunk of several parts.
                calls = len(cache.parts(0))
                if (position := start + accelerator.process_index) < len(missing):
                    version, chunk = missing[position]
                    rows = cache.parts(chunk)
                    computed = (part(version, chunk, each) for each in rows)
                    cache.write_parts(version, chunk, _with_calls(computed, after_chunk))
                    cache.remove_earlier(version, chunk)
                    calls -= len(rows) - 1
                for _ in range(calls):
                    after_chunk()
                show(min(start + ranks, len(missing)))
        accelerator.wait_for_everyone()

    @contextmanager
    def _progress(self, chunks: int) -> Iterator[Callable[[int], None]]:
        """Context with a function that shows how many chunks are done: a bar, or without a terminal a line for every
        tenth.
        """
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        is_main = self.accelerator.is_main_process
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not is_main) as progress:
            task, before = progress.add_task(f"{self.what}, chunks", total=chunks), 0

            def show(done: int) -> None:
                nonlocal before
                progress.update(task, completed=done)
                if is_main and not progress.console.is_terminal and before // 10 < done // 10:
                    print(f"{self.what}: {done} of {chunks} chunks", flush=True)
                before = done

            yield show

    def _all_tokens(
        self, encoder: Callable[[], Encoder], rows: np.ndarray, version: str, full: TokenCache, is_cached: bool
    ) -> np.ndarray:
        """Return the tokens (n, views, L, D) of rows (n,), from the cache `full` if they are in it, else computed."""
        if is_cached:
            return full.numbers_of_all_views(rows, version)
        if (earlier := full.earlier(version, rows)) is not None:
            return earlier
        records = self.extract(encoder(), rows, version, full.codec)
        tokens = full.codec.decode(torch.from_numpy(records).flatten(0, 1)).numpy()
        return tokens.reshape(*records.shape[:2], *full.shape)

    def encoder(self, compile_tower: bool, photos: int) -> Encoder:
        """Prepare the tower: compiled, or on a CPU with many photos as a `CpuTower`.

        photos: number of all photos, cached ones included, so that a resumed run makes the same choice.
        """
        tower, device, accelerator = self.tower.eval(), self.accelerator.device, self.accelerator
        tower.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if device.type == "cpu" and photos >= MIN_PHOTOS:
            return CpuTower(tower, lambda line: accelerator.print(wrapped(line), flush=True))
        if compile_tower:
            tower.compile(dynamic=False)
        return tower

    def extract(self, encoder: Encoder, rows: np.ndarray, version: str, codec: TokenCodec) -> np.ndarray:
        """Return the output for index rows (n,) in one version, encoded as records (n, views, size)."""
        work = partial(self._extract, encoder, rows, version, codec)
        tokens, self.batch = with_smaller_batches(work, self.batch, "lesions at a time", collective=False)
        return tokens

    def _extract(self, encoder: Encoder, rows: np.ndarray, version: str, codec: TokenCodec, batch: int) -> np.ndarray:
        """Extract with `batch` lesions at a time."""
        kind, _, number = version.rpartition("-")
        augmented, device = kind.startswith("augmented"), self.accelerator.device
        loader = self.loaders.sequential(
            rows, batch, device,
            augment=self.augment if augmented else None, seed=self.seed, epoch=int(number) if augmented else 0,
        )  # fmt: skip
        transform = int(number) if kind == "dihedral" else 0

        @torch.inference_mode()
        def tokens_of(step: Step) -> HostCopy:
            photos = self.loaders.source.transformed(step.micro_batches[0], step.rows, transform)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                tokens = [encoder(getattr(photos, view))[: step.count] for view in self.views]
            return HostCopy([codec.encode(torch.stack(tokens, 1))])

        if device.type != "cpu":  # a GPU computes while the next batch is loaded
            # Copied out of pinned memory, so that only two batches are pinned.
            return np.concatenate([tokens.copy() for (tokens,) in read_behind(tokens_of(step) for step in loader)])
        # In a thread, so that the next batch is loaded meanwhile; one at a time, which bounds the memory.
        with ThreadPoolExecutor(1, thread_name_prefix="tokens") as pool:
            parts: list[Future[HostCopy]] = []
            for step in loader:
                if parts:
                    parts[-1].result()
                parts.append(pool.submit(tokens_of, step))
            return np.concatenate([part.result().arrays()[0] for part in parts])


def _with_calls(parts: Iterable[np.ndarray], after_part: Callable[[], None]) -> Iterator[np.ndarray]:
    """Yield the parts of a chunk, and call `after_part` for each but the first."""
    for number, part in enumerate(parts):
        note_progress()
        if number:
            after_part()
        yield part


def _missing(
    cache: TokenCache, versions: Sequence[str], full: TokenCache | None
) -> tuple[list[tuple[str, int]], set[tuple[str, int]]]:
    """Return the chunks that a cache lacks, and those of them that `full` has. Called on rank 0 for all ranks."""
    missing = cache.missing(versions)
    if missing:
        remove_dead_parts(*(cache.folder / version for version in versions))
    in_full = set(missing) - set(full.missing(versions)) if full and missing else set()
    return missing, in_full
