"""Views of a packed set for one model: its photos, or the cached output of its frozen tower or frozen blocks."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from triderm_dist.config import AugmentConfig, Experiment, ModelConfig, stable_dump
from triderm_dist.data import host_augment
from triderm_dist.data.augment import build_augmentations
from triderm_dist.data.lesions import Lesions
from triderm_dist.data.loader import JointSource, LoaderFactory, PhotoSource, Step, TokenSource
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.reader import note_on_open_files
from triderm_dist.data.token_cache import JoinedCache, TokenCache, cache_key
from triderm_dist.data.token_codec import TokenCodec
from triderm_dist.data.union import ExtraSet, LesionUnion, UnionSource
from triderm_dist.data.upload import HostCopy, read_behind
from triderm_dist.distributed.collectives import is_main, on_main
from triderm_dist.distributed.heartbeat import note_progress
from triderm_dist.distributed.out_of_memory import with_smaller_batches
from triderm_dist.engine.extra_towers import ExtraTower, join_towers
from triderm_dist.engine.init_overlap import WarmStart
from triderm_dist.engine.trained_network import TrainedNetwork
from triderm_dist.engine.warm_start import fill_network, fill_tower
from triderm_dist.files import remove_dead_parts
from triderm_dist.models import build_network, build_towers, network_class
from triderm_dist.models.cpu_tower import MIN_PHOTOS, CpuTower, Encoder
from triderm_dist.models.joined_tower import JoinedTower, ViewLogits
from triderm_dist.models.network import SHARED
from triderm_dist.models.tower_record import FOLDER, TowerRecord, find_tower, load_tower, save_tower
from triderm_dist.models.towers import TokenShape, Tower, frozen_hash, tower_hash
from triderm_dist.runtime.terminal import wrapped
from triderm_dist.schema import UNLABELED, VIEWS, InputError

PLAIN = "plain"
"""Version of the tokens of photos that are not augmented."""
EXTRACT_BATCH = 32
"""Lesions per forward of a frozen tower."""
MAX_FITTED = 20_000
"""Lesions that what is fitted before training is fitted on."""


@dataclass(frozen=True)
class Views:
    """Loaders of a packed set for one network.

    tower: the record of the tower that the network is built on.  token_shape: of the tokens of its frozen tower; None
    where the network holds the towers.  frozen: where the loaders give what the frozen blocks of these towers return,
    the weights of these blocks, by the key of the tower in the network; empty where they give photos.
    training: the loaders for training, of the union with the extra sets where there are any.  extra_rows: the rows (n,)
    of that union that join from extra sets.  extra: those sets.  beside: what fold.json records of the extra towers.
    """

    loaders: LoaderFactory[ShardIndex]
    tower: TowerRecord
    token_shape: TokenShape | None
    training: LoaderFactory[Lesions]
    extra_rows: np.ndarray
    extra: tuple[ExtraSet, ...] = ()
    frozen: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    beside: Sequence[dict[str, Any]] = ()


def open_views(
    experiment: Experiment,
    model: ModelConfig,
    index: ShardIndex,
    accelerator: Accelerator,
    *,
    train: bool,
    transforms: int = 1,
    after_chunk: Callable[[], None] = lambda: None,
    extra: Sequence[ExtraSet] = (),
    recorded: TowerRecord | None = None,
    record: bool = False,
    start: WarmStart | None = None,
    beside: Sequence[ExtraTower] = (),
    brief: bool = False,
) -> Views:
    """Open photos for towers that train, or what a frozen tower or, with `tower.cache_frozen_blocks`, the frozen blocks
    return, computing what the cache lacks.

    Call on all ranks. train: also open the augmented versions; frozen blocks are cached for training only. transforms:
    how many transforms of the dihedral group prediction uses. after_chunk: called on all ranks equally
    often while they compute chunks, and may raise. extra: sets whose lesions join training. recorded, start: the tower,
    see `open_tower`. record: write it to OUTPUT/towers. beside: the towers beside one that is not recorded. brief:
    another process prints the notes on the set and the tower.
    """
    augment, data, seed = model.train.augment, experiment.data, experiment.seed_of_tokens
    build_augmentations(augment)  # raises for unknown ones, also where all tokens are cached

    def say(text: str) -> None:
        if not brief:
            accelerator.print(wrapped(text), flush=True)

    for note in index.notes():
        say(f"note: {note}")
    labeled = np.flatnonzero(index.labels != UNLABELED)
    first = start.choose(labeled) if start and model.tower.cached else None
    about, tower = open_tower(experiment, model, recorded, pretrained=train, start=first)
    described: list[dict[str, Any]] = []
    if tower and beside and not recorded:
        about, tower, described = join_towers(model, about, tower, beside, labeled)
    means = tower is not None and network_class(model.kind).reads_mean_tokens
    shape = about.token_shape if tower else None
    if shape and means and not about.is_joined:
        shape = TokenShape(1, about.width)
    frozen = _frozen_blocks(experiment, model, index, first) if train and model.tower.cached and not tower else {}
    if (packed := min(index.canvas)) < about.image_size:
        enlarged = f"tower.image_size {about.image_size} is more than the short side of the packed photos, {packed}"
        say(f"note: {enlarged}: they are enlarged; pack with a larger short_side")
    if tower:
        say(tower.report)
    if record:
        on_main(partial(save_tower, experiment.folder / FOLDER, about, tower))

    cached = [_Cached.blocks(each, views) for each, views in frozen.values()]
    if isinstance(tower, JoinedTower):
        cached = [_Cached.tower(part.tower, part.weights) for part in tower.parts]
    elif tower:
        cached = [_Cached.tower(tower, about.weights)]
    sets = [index, *(each.index for each in extra)]

    @functools.cache  # once, also for several sets
    def announce() -> None:
        if accelerator.device.type == "cpu":
            say(host_augment.describe())

    def open_photos(each: ShardIndex, views: Sequence[str] | None) -> LoaderFactory[ShardIndex]:
        share = 1.0 if cached or not each.remote else each.bytes / sum(other.bytes for other in sets if other.remote)
        photos = PhotoSource(each, about.image_size, about.mean, about.std, augment, views, share, about.frame)
        return LoaderFactory(each, photos, data.workers, data.prefetch)

    window = model.train.sampling.window
    for each in [] if cached or not train else sets:
        if found := note_on_open_files(each, window):
            say(f"note: {found}")

    def open_cache(each: ShardIndex, part: _Cached, transforms: int) -> TokenSource:
        loaders = open_photos(each, part.views)
        photos = loaders.source
        assert isinstance(photos, PhotoSource)
        frame = {} if about.frame == "square" else {"frame": about.frame}
        dtype = model.tower.token_dtype
        stored = {} if dtype == "float16" else {"dtype": dtype}
        key = cache_key(**part.identity, index=each.fingerprint, size=about.image_size, **frame, **stored)
        whole = TokenCache(experiment.token_folder / key, len(each), part.shape, dtype)
        cache = whole.means() if means else whole
        variants = [PLAIN, *augmented_versions(augment, seed)] if train else [PLAIN]
        transformed = [PLAIN, *(f"dihedral-{k}" for k in range(1, transforms))]
        versions = list(dict.fromkeys([*variants, *transformed]))
        extractor = TokenExtractor(part.module, loaders, augment, seed, accelerator, photos.views, part.what)
        if on_main(partial(cache.missing, versions)):
            announce()
            if means and not about.is_joined and _needs_whole_tokens(experiment, model):
                extractor.fill(whole, versions, model.train.compile, after_chunk)
        extractor.fill(cache, versions, model.train.compile, after_chunk, whole if means else None)
        photos.close()
        return TokenSource(cache, variants, transformed, photos.views)

    def open_set(each: ShardIndex, transforms: int) -> LoaderFactory[ShardIndex]:
        if not cached:
            announce()
            return open_photos(each, index.signature.views)
        sources = [open_cache(each, part, transforms) for part in cached]
        source = sources[0] if len(sources) == 1 else JointSource(sources)
        if isinstance(tower, JoinedTower):
            source = _join(tower, sources, accelerator)
        return LoaderFactory(each, source, data.workers, data.prefetch)

    loaders = open_set(index, transforms)
    weights = {key: each.frozen_modules().state_dict() for key, (each, _) in frozen.items()}
    if not extra:
        return Views(loaders, about, shape, loaders, np.empty(0, np.int64), frozen=weights, beside=described)
    union, views = LesionUnion(index, extra), index.signature.views
    read = [view for _, own in frozen.values() for view in own] or views
    source = UnionSource(union, [loaders.source, *(open_set(each, 1).source for each in sets[1:])], read)
    training = LoaderFactory(union, source, data.workers, data.prefetch)
    rows = union.extra_rows([view for view in views if view in model.use])
    return Views(loaders, about, shape, training, rows, union.extra, weights, described)


@dataclass(frozen=True)
class _Cached:
    """What is computed once from photos.

    module: pixels (B, 3, H, W) to (B, *shape).  identity: all that its output depends on but photos and their size, for
    the name of the cache.  views: to compute; None for those of each set's task.  what: for the progress bar.
    """

    module: nn.Module
    shape: tuple[int, ...]
    identity: Mapping[str, object]
    views: Sequence[str] | None
    what: str

    @classmethod
    def tower(cls, tower: Tower, weights: str | None) -> _Cached:
        """Return the tokens of a frozen tower. weights: its `tower_hash`."""
        return cls(tower, tower.token_shape, {"tower": weights}, None, "tokens of the frozen tower")

    @classmethod
    def blocks(cls, tower: Tower, views: Sequence[str]) -> _Cached:
        """Return the frozen blocks of a tower after `Tower.skip_frozen`."""
        identity = {"frozen_blocks": frozen_hash(tower), "views": [*views]}
        what = f"frozen blocks, {' and '.join(views)}"
        return cls(tower.frozen_modules(), tower.input_shape, identity, views, what)


def _join(tower: JoinedTower, sources: Sequence[TokenSource], accelerator: Accelerator) -> TokenSource:
    """Return the mean tokens of the parts of a joined tower side by side, with the log-probabilities of those that have
    some. sources: the mean tokens of each part.
    """
    caches: list[TokenCache] = []
    variants, transforms = sources[0].variants, sources[0].transforms
    for part, source in zip(tower.parts, sources, strict=True):
        assert isinstance(source.cache, TokenCache)
        caches.append(source.cache)
        if part.logits:
            versions = list(dict.fromkeys([*variants, *transforms]))
            caches.append(_fill_logits(source.cache, part.logits, part.logits_hash, versions, accelerator))
    return TokenSource(JoinedCache(caches), variants, transforms, sources[0].views)


@torch.inference_mode()
def _fill_logits(
    means: TokenCache, logits: ViewLogits, weights: str, versions: Sequence[str], accelerator: Accelerator
) -> TokenCache:
    """Compute the missing log-probabilities from cached mean tokens, and return their cache. Call on all ranks.

    weights: the hash of `logits`.
    """
    folder = means.folder.with_name(f"{means.folder.name}-{weights[:16]}")
    cache = TokenCache(folder, means.lesions, (1, logits.width), "float32")
    missing = on_main(partial(cache.missing, versions))

    def values(version: str, rows: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(means.numbers_of_all_views(rows, version))  # (n, views, 1, D)
        return cache.codec.encode(logits(tokens.flatten(0, 1)).view(*tokens.shape[:2], 1, logits.width)).numpy()

    for version, chunk in missing[accelerator.process_index :: accelerator.num_processes]:
        cache.write_parts(version, chunk, (values(version, rows) for rows in cache.parts(chunk)))
    accelerator.wait_for_everyone()
    return cache


def mean_tokens(views: Views, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the mean tokens (n, D) of photos that are not augmented by view, of those rows (N,) that have the view.

    At most `MAX_FITTED` rows, evenly spaced. views: of a network that reads mean tokens.
    """
    source, index = views.loaders.source, views.loaders.index
    assert isinstance(source, TokenSource)
    result = {}
    for number, view in enumerate(source.views):
        own = rows[index.sizes[rows, VIEWS.index(view)] > 0]
        own = own[np.linspace(0, len(own) - 1, min(len(own), MAX_FITTED)).astype(int)]
        result[view] = torch.from_numpy(source.cache.numbers(own, number, PLAIN)[:, 0])
    return result


def open_tower(
    experiment: Experiment,
    model: ModelConfig,
    recorded: TowerRecord | None = None,
    pretrained: bool = False,
    start: TrainedNetwork | None = None,
) -> tuple[TowerRecord, Tower | None]:
    """Return the record of a model's tower, and the tower itself with its weights where it is frozen.

    recorded: the tower that the run recorded, read without its pretrained file; None builds the one of the settings,
    with its pretrained weights if it is frozen, or where its source is missing takes the one that the run recorded for
    these settings. pretrained: load those of one that trains too, to check that they are there. start: the network
    whose weights a frozen tower gets. Raises as `build_towers`, `load_tower` and `fill_tower` do.
    """
    frozen = model.tower.frozen
    if recorded:
        return recorded, load_tower(experiment.folder / FOLDER, recorded) if frozen else None
    torch.manual_seed(experiment.seed_of_tokens)  # a frozen tower with random weights is the same in every process
    weights = {} if pretrained or frozen else {"pretrained": False}
    try:
        tower = build_towers(model.tower.model_copy(update=weights))[0]
    except InputError as error:
        kept = find_tower(experiment.folder / FOLDER, model.tower, frozen)
        if kept is None:
            raise
        if is_main():
            print(f"note: {error}; the encoder of {experiment.folder / FOLDER} is used", flush=True)
        return open_tower(experiment, model, kept)
    if frozen and start:
        fill_tower(tower, start)
    return TowerRecord.of(tower, model.tower, tower_hash(tower) if frozen else None), tower if frozen else None


def _frozen_blocks(
    experiment: Experiment, model: ModelConfig, index: ShardIndex, start: TrainedNetwork | None
) -> dict[str, tuple[Tower, tuple[str, ...]]]:
    """Return the towers whose frozen blocks are cached, with the views of each, by their keys in the network.

    Their weights are the pretrained ones, or those of the network that the training starts from.
    """
    torch.manual_seed(experiment.seed_of_tokens)  # random weights are the same in every process
    network = build_network(model, index.signature, build_towers(model.tower, index.signature.views))
    if start:
        fill_network(network, model, start)
    network.skip_frozen()
    towers: dict[str, Tower] = dict(network.towers.items())  # type: ignore[arg-type]
    return {key: (tower, network.used_views if key == SHARED else (key,)) for key, tower in towers.items()}


def _needs_whole_tokens(experiment: Experiment, model: ModelConfig) -> bool:
    """Return whether another model of the run reads all tokens of the versions of which this one reads the means.

    They are then computed once, whichever model comes first.
    """
    seed = experiment.seed_of_tokens
    versions = augmented_versions(model.train.augment, seed)
    return any(
        other.tower == model.tower
        and not network_class(other.kind).reads_mean_tokens
        and augmented_versions(other.train.augment, seed) == versions
        for other in experiment.models.values()
    )


def augmented_versions(augment: AugmentConfig, seed: int) -> list[str]:
    """Name the augmented versions of the token cache after a hash of the settings that shape the photos."""
    settings = stable_dump(augment, "models.NAME.train.augment")
    settings = {key: value for key, value in settings.items() if key in AugmentConfig.pixel_keys()}
    digest = hashlib.sha256(json.dumps([settings, seed], sort_keys=True).encode()).hexdigest()[:8]
    return [f"augmented-{digest}-{number:02d}" for number in range(augment.token_variants)]


@dataclass(frozen=True)
class TokenExtractor:
    """Computes tokens of a frozen tower, or what frozen blocks return. `loaders` give photos.

    views: to compute; default those of the set's task.  what: is computed, for the progress bar.
    batch: lesions at a time, fewer where memory runs out.
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
        object.__setattr__(self, "views", self.views or self.loaders.index.signature.views)

    @torch.inference_mode()
    def fill(
        self,
        cache: TokenCache,
        versions: list[str],
        compile_tower: bool,
        after_chunk: Callable[[], None],
        whole: TokenCache | None = None,
    ) -> None:
        """Compute the missing chunks, distributed over the ranks; an interrupted run resumes at the next chunk.

        after_chunk: called on all ranks equally often.  whole: given where `cache` is for mean tokens; those of its
        chunks are averaged, not computed again.
        """
        accelerator, ranks = self.accelerator, self.accelerator.num_processes
        missing, there = on_main(partial(_missing, cache, versions, whole))
        if not missing:
            return

        @functools.cache  # where there is something to compute
        def encoder() -> Encoder:
            return self.encoder(compile_tower, cache.lesions * len(self.views) * len(versions))

        def part(version: str, chunk: int, rows: np.ndarray) -> np.ndarray:
            """Return the records (n, views, size) of some lesions of a chunk."""
            if (earlier := cache.earlier(version, rows)) is not None:
                return cache.codec.encode(torch.from_numpy(earlier)).numpy()
            if not whole:
                return self.extract(encoder(), rows, version, cache.codec)
            if (version, chunk) in there:
                tokens = whole.numbers_of_all_views(rows, version)
            elif (earlier := whole.earlier(version, rows)) is not None:
                tokens = earlier
            else:
                records = self.extract(encoder(), rows, version, whole.codec)
                tokens = whole.codec.decode(torch.from_numpy(records).flatten(0, 1)).numpy()
                tokens = tokens.reshape(*records.shape[:2], *whole.shape)
            means = tokens.mean(2, keepdims=True, dtype=np.float32)
            return cache.codec.encode(torch.from_numpy(means)).numpy()

        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not accelerator.is_main_process) as progress:
            task = progress.add_task(f"{self.what}, chunks", total=len(missing))
            for start in range(0, len(missing), ranks):
                # Each rank computes a chunk of its own, then all agree on going on: a call for every chunk would let
                # most of them wait. In a chunk of several parts they agree after each part.
                calls = len(cache.parts(0))
                if (own := start + accelerator.process_index) < len(missing):
                    version, chunk = missing[own]
                    rows = cache.parts(chunk)
                    computed = (part(version, chunk, each) for each in rows)
                    cache.write_parts(version, chunk, _with_calls(computed, after_chunk))
                    cache.remove_earlier(version, chunk)
                    calls -= len(rows) - 1
                for _ in range(calls):
                    after_chunk()
                done = min(start + ranks, len(missing))
                progress.update(task, completed=done)
                if accelerator.is_main_process and not progress.console.is_terminal and start // 10 < done // 10:
                    print(f"{self.what}: {done} of {len(missing)} chunks", flush=True)
        accelerator.wait_for_everyone()

    def encoder(self, compile_tower: bool, photos: int) -> Encoder:
        """Prepare the tower for this number of photos, those of cached versions included, so that a resumed run
        computes the rest in the same way.
        """
        tower, device, accelerator = self.tower.eval(), self.accelerator.device, self.accelerator
        tower.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if device.type == "cpu" and photos >= MIN_PHOTOS:
            return CpuTower(tower, lambda line: accelerator.print(wrapped(line), flush=True))
        if compile_tower:
            tower.compile(dynamic=False)
        return tower

    def extract(self, encoder: Encoder, rows: np.ndarray, version: str, codec: TokenCodec) -> np.ndarray:
        """Return the tokens, or what blocks return, of index rows (n,) in one version as records (n, views, size)."""
        work = partial(self._extract, encoder, rows, version, codec)
        tokens, batch = with_smaller_batches(work, self.batch, "lesions at a time", alone=True)
        object.__setattr__(self, "batch", batch)
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

        if device.type != "cpu":  # which computes while the next batch is loaded anyway
            # Copied from pinned memory, of which only that of two batches is needed then.
            return np.concatenate([tokens.copy() for (tokens,) in read_behind(tokens_of(step) for step in loader)])
        # In a thread, so that the next batch is finished meanwhile; one at a time, which bounds the memory.
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
    cache: TokenCache, versions: Sequence[str], whole: TokenCache | None
) -> tuple[list[tuple[str, int]], set[tuple[str, int]]]:
    """Return the chunks that a cache lacks, and those of them that `whole` has. Only rank 0 looks, for all."""
    missing = cache.missing(versions)
    if missing:
        remove_dead_parts(*(cache.folder / version for version in versions))
    there = set(missing) - set(whole.missing(versions)) if whole and missing else set()
    return missing, there
