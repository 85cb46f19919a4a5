"""What the network of a model reads of a packed set: photos, or cached output of its frozen tower or blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from triderm_dist.config import Experiment, ModelConfig
from triderm_dist.data import host_augment
from triderm_dist.data.augment import build_augmentations
from triderm_dist.data.lesions import Lesions
from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.reader import note_on_open_files
from triderm_dist.data.token_cache import JoinedCache, TokenCache, cache_key
from triderm_dist.data.token_source import JointSource, TokenSource
from triderm_dist.data.union import ExtraSet, LesionUnion, UnionSource
from triderm_dist.distributed.collectives import is_main, on_main
from triderm_dist.engine.extra_towers import ExtraTower, join_towers, open_extra_towers
from triderm_dist.engine.init_overlap import WarmStart, open_warm_start
from triderm_dist.engine.token_extraction import PLAIN, TokenExtractor, augmented_versions
from triderm_dist.engine.trained_network import TrainedNetwork
from triderm_dist.engine.warm_start import transfer_tower, transfer_weights
from triderm_dist.models import build_network, build_towers, network_class
from triderm_dist.models.joined_tower import JoinedTower, ViewLogits
from triderm_dist.models.network import SHARED
from triderm_dist.models.tower_record import FOLDER, TowerRecord, find_tower, load_tower, save_tower
from triderm_dist.models.towers import TokenShape, Tower, frozen_hash, tower_hash
from triderm_dist.runtime.terminal import wrapped
from triderm_dist.schema import UNLABELED, VIEWS, InputError

MAX_FITTED = 20_000
"""Largest number of lesions from which inputs are fitted before training (`Network.fit_inputs`)."""


@dataclass(frozen=True)
class ModelInputs:
    """Loaders of a packed set for the network of one model.

    loaders: of the set, for evaluation.
    tower: record of the tower that the network is built on.
    token_shape: of the tokens of its frozen tower; None if the network holds the towers.
    training: loaders for training, of the union with the extra sets if there are any.
    extra_rows: rows (n,) of that union that come from extra sets.  extra: those sets.
    frozen: if the loaders return the output of frozen blocks, {key of the tower in the network: weights of the blocks}.
    extra_towers: what fold.json records of them.
    start: networks that may provide the initial weights of a training, see `models.NAME.init`.
    """

    loaders: LoaderFactory[ShardIndex]
    tower: TowerRecord
    token_shape: TokenShape | None
    training: LoaderFactory[Lesions]
    extra_rows: np.ndarray
    extra: tuple[ExtraSet, ...] = ()
    frozen: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    extra_towers: Sequence[dict[str, Any]] = ()
    start: WarmStart | None = None


def open_training_inputs(
    experiment: Experiment,
    name: str,
    index: ShardIndex,
    accelerator: Accelerator,
    *,
    extra: Sequence[ExtraSet],
    transforms: int,
    after_chunk: Callable[[], None] = lambda: None,
    printed: set[str] | None = None,
    brief: bool = False,
) -> ModelInputs:
    """Open the inputs for the trainings of model `name`, from the networks and with the towers of other runs that its
    settings name, and record its tower in the run. Call on all ranks; the other arguments are those of `open_inputs`.
    """
    start = open_warm_start(experiment, name, index, accelerator, after_chunk)
    towers = open_extra_towers(experiment, name, index, accelerator, after_chunk)
    return open_inputs(
        experiment, experiment.models[name], index, accelerator,
        train=True, transforms=transforms, after_chunk=after_chunk, extra=extra, save_record=True, start=start,
        extra_towers=towers, printed=printed, brief=brief,
    )  # fmt: skip


def open_inputs(
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
    save_record: bool = False,
    start: WarmStart | None = None,
    extra_towers: Sequence[ExtraTower] = (),
    printed: set[str] | None = None,
    brief: bool = False,
) -> ModelInputs:
    """Open photos for towers that train, or the cached output of a frozen tower or, with `tower.cache_frozen_blocks`,
    of its frozen blocks. Computes what the cache lacks. Call on all ranks.

    train: also open the augmented versions; frozen blocks are cached for training only.
    transforms: number of transforms of the dihedral group that prediction uses.
    after_chunk: called on all ranks equally often while they compute chunks, and may raise.
    extra: sets whose lesions join training.
    recorded, start: see `open_tower`.  save_record: write the record, and the weights of a frozen tower, to
    OUTPUT/towers.
    extra_towers: are joined with the tower, unless it is recorded.
    printed: the notes on the set and the tower that were printed for other models; they are not printed again, and
    those of this call are added.  brief: print none of them, since another process does.
    """
    build_augmentations(model.train.augment)  # raises for unknown ones, also where all tokens are cached

    printed = set() if printed is None else printed

    def print_once(text: str) -> None:
        if not brief and text not in printed:
            printed.add(text)
            accelerator.print(wrapped(text), flush=True)

    for note in index.notes() if train else ():
        print_once(f"note: {note}")
    towers = _open_towers(experiment, model, index, train, recorded, start, extra_towers)
    record, tower = towers.record, towers.tower
    if train and (packed := min(index.canvas)) < record.image_size:
        enlarged = f"tower.image_size {record.image_size} is more than the short side of the packed photos, {packed}"
        print_once(f"note: {enlarged}: they are enlarged; pack with a larger short_side")
    if tower:
        print_once(tower.report)
    if save_record:
        on_main(partial(save_tower, experiment.folder / FOLDER, record, tower))

    sets = [index, *(each.index for each in extra)]
    opener = _Opener(experiment, model, accelerator, train, towers, sets, after_chunk, print_once)
    for each in sets if train and not opener.cached else []:
        if found := note_on_open_files(each, model.train.sampling.window):
            print_once(f"note: {found}")
    loaders = opener.open_set(index, transforms)
    weights = {key: each.frozen_modules().state_dict() for key, (each, _) in towers.frozen_blocks.items()}
    model_inputs = ModelInputs(
        loaders, record, opener.token_shape, training=loaders, extra_rows=np.empty(0, np.int64),
        frozen=weights, extra_towers=towers.extra, start=start,
    )  # fmt: skip
    return _with_extra_sets(model_inputs, extra, opener) if extra else model_inputs


def _with_extra_sets(model_inputs: ModelInputs, extra: Sequence[ExtraSet], opener: _Opener) -> ModelInputs:
    """Return inputs whose training loaders have the lesions of extra sets too."""
    index, data = model_inputs.loaders.index, opener.experiment.data
    union, names = LesionUnion(index, extra), index.signature.views
    read = [view for _, cached in opener.towers.frozen_blocks.values() for view in cached] or names
    sources = [model_inputs.loaders.source, *(opener.open_set(each.index, 1).source for each in extra)]
    training = LoaderFactory(union, UnionSource(union, sources, read), data.workers, data.prefetch)
    rows = union.extra_rows([view for view in names if view in opener.model.use])
    return replace(model_inputs, training=training, extra_rows=rows, extra=union.extra)


@dataclass(frozen=True)
class _Towers:
    """The towers of a model, as far as they are needed to open its inputs.

    record, tower: as `open_tower` returns them.  frozen_blocks: as `_frozen_blocks` does; {} if none are cached.
    extra: what fold.json records of the extra towers that `tower` is joined with.
    """

    record: TowerRecord
    tower: Tower | None
    frozen_blocks: Mapping[str, tuple[Tower, tuple[str, ...]]]
    extra: Sequence[dict[str, Any]]


def _open_towers(
    experiment: Experiment,
    model: ModelConfig,
    index: ShardIndex,
    train: bool,
    recorded: TowerRecord | None,
    start: WarmStart | None,
    extra: Sequence[ExtraTower],
) -> _Towers:
    """Open the towers of a model; the arguments are those of `open_inputs`."""
    labeled = np.flatnonzero(index.labels != UNLABELED)
    network = start.choose(labeled) if start and model.tower.cached else None
    record, tower = open_tower(experiment, model, recorded, pretrained=train, start=network)
    described: list[dict[str, Any]] = []
    if tower and extra and not recorded:
        record, tower, described = join_towers(model, record, tower, extra, labeled)
    caches_blocks = train and model.tower.cached and not tower
    frozen_blocks = _frozen_blocks(experiment, model, index, network) if caches_blocks else {}
    return _Towers(record, tower, frozen_blocks, described)


@dataclass
class _Opener:
    """Opens packed sets for one model: their photos, or the token cache, which it fills. sets: all that are opened."""

    experiment: Experiment
    model: ModelConfig
    accelerator: Accelerator
    train: bool
    towers: _Towers
    sets: Sequence[ShardIndex]
    after_chunk: Callable[[], None]
    print_once: Callable[[str], None]

    def __post_init__(self) -> None:
        self._announced = False
        self.record, self.tower = self.towers.record, self.towers.tower
        self.means = self.tower is not None and network_class(self.model.kind).reads_mean_tokens
        self.cached = [_Cached.blocks(each, views) for each, views in self.towers.frozen_blocks.values()]
        if isinstance(self.tower, JoinedTower):
            self.cached = [_Cached.tower(part.tower, part.weights) for part in self.tower.parts]
        elif self.tower:
            self.cached = [_Cached.tower(self.tower, self.record.weights)]

    @property
    def token_shape(self) -> TokenShape | None:
        """Shape of the tokens that the loaders return; None if the network holds the towers."""
        if self.tower is None:
            return None
        if self.means and not self.record.is_joined:
            return TokenShape(1, self.record.width)
        return self.record.token_shape

    def open_set(self, index: ShardIndex, transforms: int) -> LoaderFactory[ShardIndex]:
        """Open a packed set. Call on all ranks. transforms: see `open_inputs`."""
        if not self.cached:
            self._announce()
            return self._open_photos(index, index.signature.views)
        sources = [self._open_cache(index, part, transforms) for part in self.cached]
        source = sources[0] if len(sources) == 1 else JointSource(sources)
        if isinstance(self.tower, JoinedTower):
            source = _join(self.tower, sources, self.accelerator)
        return LoaderFactory(index, source, self.experiment.data.workers, self.experiment.data.prefetch)

    def _open_photos(self, index: ShardIndex, views: Sequence[str] | None) -> LoaderFactory[ShardIndex]:
        share, record, data = 1.0, self.record, self.experiment.data
        if not self.cached and index.remote:  # of the shard cache's size
            share = index.bytes / sum(other.bytes for other in self.sets if other.remote)
        augment = self.model.train.augment
        photos = PhotoSource(
            index, record.image_size, record.mean, record.std, augment,
            views=views, cache_share=share, frame=record.frame,
        )  # fmt: skip
        return LoaderFactory(index, photos, data.workers, data.prefetch)

    def _open_cache(self, index: ShardIndex, part: _Cached, transforms: int) -> TokenSource:
        model, record, seed = self.model, self.record, self.experiment.seed_of_tokens
        loaders = self._open_photos(index, part.views)
        photos = loaders.source
        assert isinstance(photos, PhotoSource)
        frame = {} if record.frame == "square" else {"frame": record.frame}
        dtype = model.tower.token_dtype
        stored = {} if dtype == "float16" else {"dtype": dtype}
        key = cache_key(**part.identity, index=index.fingerprint, size=record.image_size, **frame, **stored)
        full = TokenCache(self.experiment.token_folder / key, len(index), part.shape, dtype)
        cache = full.means() if self.means else full
        variants = [PLAIN, *augmented_versions(model.train.augment, seed)] if self.train else [PLAIN]
        transformed = [PLAIN, *(f"dihedral-{k}" for k in range(1, transforms))]
        versions = list(dict.fromkeys([*variants, *transformed]))
        extractor = TokenExtractor(
            part.module, loaders, model.train.augment, seed, self.accelerator, photos.views, part.what
        )
        if on_main(partial(cache.missing, versions)):
            self._announce()
            if self.means and not record.is_joined and _needs_full_tokens(self.experiment, model):
                extractor.fill(full, versions, model.train.compile, self.after_chunk)
        extractor.fill(cache, versions, model.train.compile, self.after_chunk, full if self.means else None)
        photos.close()
        return TokenSource(cache, variants, transformed, photos.views)

    def _announce(self) -> None:
        """Say once, for all sets, how photos are augmented on a CPU."""
        if self.accelerator.device.type == "cpu" and not self._announced:
            self.print_once(host_augment.describe())
        self._announced = True


@dataclass(frozen=True)
class _Cached:
    """A module whose output for each photo is cached.

    module: maps pixels (B, 3, H, W) to (B, *shape).  identity: all that its output depends on except photos and their
    size; part of the cache's name.  views: to compute; None for those of each set's task.  what: for the progress bar.
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
    """Concatenate the mean tokens of a joined tower's parts, and the log-probabilities of parts that have heads.

    sources: the mean tokens of each part.
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


def mean_tokens(model_inputs: ModelInputs, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Return {view: mean tokens (n, D) of the photos without augmentation} of those rows (N,) that have the view.

    At most `MAX_FITTED` rows, evenly spaced. model_inputs: of a network that reads mean tokens.
    """
    source, index = model_inputs.loaders.source, model_inputs.loaders.index
    assert isinstance(source, TokenSource)
    result = {}
    for number, view in enumerate(source.views):
        present = rows[index.sizes[rows, VIEWS.index(view)] > 0]
        chosen = present[np.linspace(0, len(present) - 1, min(len(present), MAX_FITTED)).astype(int)]
        result[view] = torch.from_numpy(source.cache.numbers(chosen, number, PLAIN)[:, 0])
    return result


def open_tower(
    experiment: Experiment,
    model: ModelConfig,
    recorded: TowerRecord | None = None,
    pretrained: bool = False,
    start: TrainedNetwork | None = None,
) -> tuple[TowerRecord, Tower | None]:
    """Return the record of a model's tower, and the tower with its weights if it is frozen, else None.

    recorded: the run's record of the tower, which needs no pretrained file. None builds the tower of the settings; if
    its source is missing, the tower that the run recorded for these settings is used.
    pretrained: load the weights of a tower that trains too, to check that they exist.
    start: the network whose weights a frozen tower gets.
    Raises as `build_towers`, `load_tower` and `transfer_tower`.
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
        transfer_tower(tower, start)
    return TowerRecord.of(tower, model.tower, tower_hash(tower) if frozen else None), tower if frozen else None


def _frozen_blocks(
    experiment: Experiment, model: ModelConfig, index: ShardIndex, start: TrainedNetwork | None
) -> dict[str, tuple[Tower, tuple[str, ...]]]:
    """Return {key in the network: (tower, its views)} of the towers whose frozen blocks are cached.

    start: the network that provides the weights; None for pretrained ones.
    """
    torch.manual_seed(experiment.seed_of_tokens)  # random weights are the same in every process
    network = build_network(model, index.signature, build_towers(model.tower, index.signature.views))
    if start:
        transfer_weights(network, model, start)
    network.skip_frozen()
    towers: dict[str, Tower] = dict(network.towers.items())  # type: ignore[arg-type]
    return {key: (tower, network.used_views if key == SHARED else (key,)) for key, tower in towers.items()}


def _needs_full_tokens(experiment: Experiment, model: ModelConfig) -> bool:
    """Return whether another model of the run reads all tokens of which this one reads the means.

    All tokens are then computed first, so that the tower runs once, whichever model comes first.
    """
    seed = experiment.seed_of_tokens
    versions = augmented_versions(model.train.augment, seed)
    return any(
        other.tower == model.tower
        and not network_class(other.kind).reads_mean_tokens
        and augmented_versions(other.train.augment, seed) == versions
        for other in experiment.models.values()
    )
