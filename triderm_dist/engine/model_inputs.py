"""What the network of a model reads of a packed set: photos, or cached output of its frozen tower or blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
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
from triderm_dist.distributed.collectives import on_main
from triderm_dist.engine.extra_towers import open_extra_towers
from triderm_dist.engine.init_overlap import WarmStart, open_warm_start
from triderm_dist.engine.model_tower import ModelTower, training_tower
from triderm_dist.engine.token_extraction import PLAIN, TokenExtractor, augmented_versions
from triderm_dist.models import network_class
from triderm_dist.models.joined_tower import JoinedTower, ViewLogits
from triderm_dist.models.tower import TokenShape, Tower, frozen_hash
from triderm_dist.models.tower_record import FOLDER, TowerRecord, save_tower
from triderm_dist.runtime.terminal import wrapped
from triderm_dist.schema import VIEWS

MAX_FITTED = 20_000
"""Largest number of lesions from which inputs are fitted before training (`Network.fit_inputs`)."""


@dataclass(frozen=True)
class ModelInputs:
    """Loaders of a packed set for one model, for the trainings of all its folds or for predictions.

    loaders: of the set, for evaluation.
    tower: record of the tower that the network is built on.
    token_shape: of the tokens of its frozen tower; None if the network holds the towers.
    training: loaders for training, of the union with the extra sets if there are any.
    extra_rows: rows (n,) of that union that come from extra sets.  extra: those sets.
    frozen_blocks: {key of the tower in the network: weights}, if the loaders return the output of frozen blocks.
    extra_towers: what fold.json records of them.
    start: networks that may provide the initial weights of a training, see `models.NAME.init`.
    """

    loaders: LoaderFactory[ShardIndex]
    tower: TowerRecord
    token_shape: TokenShape | None
    training: LoaderFactory[Lesions]
    extra_rows: np.ndarray
    extra: tuple[ExtraSet, ...] = ()
    frozen_blocks: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    extra_towers: Sequence[dict[str, Any]] = ()
    start: WarmStart | None = None


class Notes:
    """Prints each note on sets and towers once, for all models. quiet: prints none, since another process does."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet, self._printed = quiet, set[str]()

    def __call__(self, text: str) -> None:
        if not self._quiet and text not in self._printed:
            self._printed.add(text)
            PartialState().print(wrapped(text), flush=True)


def open_training_inputs(
    experiment: Experiment,
    name: str,
    index: ShardIndex,
    accelerator: Accelerator,
    *,
    extra: Sequence[ExtraSet],
    transforms: int,
    note: Callable[[str], None],
    after_chunk: Callable[[], None] = lambda: None,
) -> ModelInputs:
    """Open the inputs for the trainings of model `name`, with the networks and towers of other runs that its settings
    name, and record its tower in OUTPUT/towers. Call on all ranks; the other arguments are those of `open_inputs`.
    """
    model = experiment.models[name]
    build_augmentations(model.train.augment)  # raises for unknown ones, also where all tokens are cached
    start = open_warm_start(experiment, name, index, accelerator, after_chunk)
    towers = open_extra_towers(experiment, name, index, accelerator, after_chunk)
    tower = training_tower(experiment, model, index, start, towers)
    on_main(partial(save_tower, experiment.folder / FOLDER, tower.record, tower.frozen))
    inputs = open_inputs(
        experiment, model, index, accelerator, tower,
        extra=extra, transforms=transforms, note=note, after_chunk=after_chunk,
    )  # fmt: skip
    return replace(inputs, start=start)


def open_inputs(
    experiment: Experiment,
    model: ModelConfig,
    index: ShardIndex,
    accelerator: Accelerator,
    tower: ModelTower,
    *,
    extra: Sequence[ExtraSet] = (),
    transforms: int = 1,
    note: Callable[[str], None] | None = None,
    after_chunk: Callable[[], None] = lambda: None,
) -> ModelInputs:
    """Open photos for towers that train, or the cached output of a frozen tower or, with `tower.cache_frozen_blocks`,
    of its frozen blocks. Computes what the cache lacks. Call on all ranks.

    extra: sets whose lesions join training.
    transforms: number of transforms of the dihedral group that prediction uses.
    note: prints a note on the set or the tower; `Notes` by default.
    after_chunk: called on all ranks equally often while they compute chunks, and may raise.
    """
    note = note or Notes()
    for text in index.notes() if tower.for_training else ():
        note(f"note: {text}")
    record = tower.record
    if tower.for_training and (packed := min(index.canvas)) < record.image_size:
        enlarged = f"tower.image_size {record.image_size} is more than the short side of the packed photos, {packed}"
        note(f"note: {enlarged}: they are enlarged; pack with a larger short_side")
    if tower.frozen:
        note(tower.frozen.report)
    sets = [index, *(each.index for each in extra)]
    opener = _Opener(experiment, model, accelerator, tower, sets, note, after_chunk)
    for each in sets if tower.for_training and not opener.cached else []:
        if found := note_on_open_files(each, model.train.sampling.window):
            note(f"note: {found}")
    loaders = opener.open_set(index, transforms)
    weights = {key: each.frozen_modules().state_dict() for key, (each, _) in tower.frozen_blocks.items()}
    inputs = ModelInputs(
        loaders, record, opener.token_shape, training=loaders, extra_rows=np.empty(0, np.int64),
        frozen_blocks=weights, extra_towers=tower.extra,
    )  # fmt: skip
    return _with_extra_sets(inputs, extra, opener) if extra else inputs


def _with_extra_sets(inputs: ModelInputs, extra: Sequence[ExtraSet], opener: _Opener) -> ModelInputs:
    """Return the inputs with training loaders that have the lesions of extra sets too."""
    index, settings = inputs.loaders.index, opener.experiment.data
    union, names = LesionUnion(index, extra), index.signature.views
    read = [view for _, cached in opener.tower.frozen_blocks.values() for view in cached] or names
    sources = [inputs.loaders.source, *(opener.open_set(each.index, 1).source for each in extra)]
    training = LoaderFactory(union, UnionSource(union, sources, read), settings.workers, settings.prefetch)
    rows = union.extra_rows([view for view in names if view in opener.model.use])
    return replace(inputs, training=training, extra_rows=rows, extra=union.extra)


@dataclass
class _Opener:
    """Opens packed sets for one model: their photos, or the token cache, which it fills. sets: all that are opened."""

    experiment: Experiment
    model: ModelConfig
    accelerator: Accelerator
    tower: ModelTower
    sets: Sequence[ShardIndex]
    note: Callable[[str], None]
    after_chunk: Callable[[], None]

    @cached_property
    def cached(self) -> list[_Cached]:
        """The modules whose output is read from the cache; [] if photos are."""
        frozen = self.tower.frozen
        if frozen is None:
            return [_Cached.blocks(tower, views) for tower, views in self.tower.frozen_blocks.values()]
        if isinstance(frozen, JoinedTower):
            return [_Cached.tower(part.tower, part.weights) for part in frozen.parts]
        return [_Cached.tower(frozen, self.tower.record.weights)]

    @property
    def reads_means(self) -> bool:
        """Whether only the mean tokens of a frozen tower are read."""
        return self.tower.frozen is not None and network_class(self.model.kind).reads_mean_tokens

    @property
    def token_shape(self) -> TokenShape | None:
        """Shape of the tokens that the loaders return; None if the network holds the towers."""
        record = self.tower.record
        if self.tower.frozen is None:
            return None
        return TokenShape(1, record.width) if self.reads_means and not record.is_joined else record.token_shape

    def open_set(self, index: ShardIndex, transforms: int) -> LoaderFactory[ShardIndex]:
        """Open a packed set. Call on all ranks. transforms: see `open_inputs`."""
        if not self.cached:
            self._note_augmentation()
            return self._open_photos(index)
        sources = [self._open_cache(index, part, transforms) for part in self.cached]
        source = sources[0] if len(sources) == 1 else JointSource(sources)
        if isinstance(self.tower.frozen, JoinedTower):
            source = _join(self.tower.frozen, sources, self.accelerator)
        return LoaderFactory(index, source, self.experiment.data.workers, self.experiment.data.prefetch)

    def _open_photos(self, index: ShardIndex, views: Sequence[str] | None = None) -> LoaderFactory[ShardIndex]:
        share, record, data = 1.0, self.tower.record, self.experiment.data
        if not self.cached and index.remote:  # of the shard cache's size
            share = index.bytes / sum(other.bytes for other in self.sets if other.remote)
        augment = self.model.train.augment
        photos = PhotoSource(
            index, record.image_size, record.mean, record.std, augment,
            views=views, cache_share=share, frame=record.frame,
        )  # fmt: skip
        return LoaderFactory(index, photos, data.workers, data.prefetch)

    def _open_cache(self, index: ShardIndex, part: _Cached, transforms: int) -> TokenSource:
        model, record, seed = self.model, self.tower.record, self.experiment.seed_of_tokens
        loaders = self._open_photos(index, part.views)
        photos = loaders.source
        assert isinstance(photos, PhotoSource)
        frame = {} if record.frame == "square" else {"frame": record.frame}
        dtype = model.tower.token_dtype
        stored = {} if dtype == "float16" else {"dtype": dtype}
        key = cache_key(**part.identity, index=index.fingerprint, size=record.image_size, **frame, **stored)
        full = TokenCache(self.experiment.token_folder / key, len(index), part.shape, dtype)
        cache = full.means() if self.reads_means else full
        variants = [PLAIN, *augmented_versions(model.train.augment, seed)] if self.tower.for_training else [PLAIN]
        transformed = [PLAIN, *(f"dihedral-{k}" for k in range(1, transforms))]
        versions = list(dict.fromkeys([*variants, *transformed]))
        extractor = TokenExtractor(
            part.module, loaders, model.train.augment, seed, self.accelerator, photos.views, part.what
        )
        if on_main(partial(cache.missing, versions)):
            self._note_augmentation()
            if self.reads_means and not record.is_joined and _needs_full_tokens(self.experiment, model):
                extractor.fill(full, versions, model.train.compile, self.after_chunk)
        extractor.fill(cache, versions, model.train.compile, self.after_chunk, full if self.reads_means else None)
        photos.close()
        return TokenSource(cache, variants, transformed, photos.views)

    def _note_augmentation(self) -> None:
        """Note how photos are augmented on a CPU."""
        if self.accelerator.device.type == "cpu":
            self.note(host_augment.describe())


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


def mean_tokens(inputs: ModelInputs, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Return {view: mean tokens (n, D) of the photos without augmentation} of those rows (N,) that have the view.

    At most `MAX_FITTED` rows, evenly spaced. inputs: of a network that reads mean tokens.
    """
    source, index = inputs.loaders.source, inputs.loaders.index
    assert isinstance(source, TokenSource)
    result = {}
    for number, view in enumerate(source.views):
        present = rows[index.sizes[rows, VIEWS.index(view)] > 0]
        chosen = present[np.linspace(0, len(present) - 1, min(len(present), MAX_FITTED)).astype(int)]
        result[view] = torch.from_numpy(source.cache.numbers(chosen, number, PLAIN)[:, 0])
    return result


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
