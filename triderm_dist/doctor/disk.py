"""Estimate the disk space that a run takes: when it is finished, and at its peak."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, cast

from triderm_dist.config import Experiment, ModelConfig
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.doctor.findings import Finding, State, try_import
from triderm_dist.files import size_text
from triderm_dist.schema import InputError, Signature

if TYPE_CHECKING:
    from triderm_dist.models.tower import Tower

PACKED_BYTES_PER_PIXEL = 0.35
"""Size of a packed JPEG; MILK10k's have 0.2 to 0.3."""
ROW_BYTES = 100
"""Size of the ids, hash and fold in a row of predictions."""
PHOTOS = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class DiskEstimate:
    """Bytes of a run's files.

    folds: weights and predictions of all folds.  tables: of the run.  tokens: caches of towers.
    towers: weights of frozen towers.  checkpoints: of one training, removed when its fold is finished.
    """

    folds: int = 0
    tables: int = 0
    tokens: int = 0
    towers: int = 0
    shards: int = 0
    checkpoints: int = 0

    @property
    def finished(self) -> int:
        return self.peak - self.checkpoints

    @property
    def peak(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def disk_finding(
    experiment: Experiment, signature: Signature, packed: ShardIndex | str, test: ShardIndex | str
) -> Finding:
    """Compare what a run still needs with the free space at its folder.

    packed, test: the packed sets, as `data.open_shards` returns them.
    """
    if try_import("torch") is None or try_import("timm") is None:
        return Finding("disk needed", "unknown without torch and timm")
    try:
        need = estimate_disk(experiment, signature, packed, test)
    except InputError as error:
        return Finding("disk needed", f"not estimated: {error}")
    folder = experiment.folder.absolute()
    used = sum(size for _, size in _files(folder))
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    parts = {field.name: getattr(need, field.name) for field in fields(need)}
    listed = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size and name != "checkpoints")
    text = f"about {size_text(need.finished)} when finished ({listed}), {size_text(need.peak)} while training"
    if used:
        text += f"; {size_text(used)} are there"
    if need.peak - used <= free:
        return Finding("disk needed", text)
    remedies = ["free some", "set another output"]
    remedies += ["a smaller train.augment.token_variants"] if need.tokens > need.finished / 2 else []
    if any(model.train.keep_checkpoints for model in experiment.models.values()):
        remedies.append("train.keep_checkpoints=false")
    # An estimate may be wrong by half, not by more.
    state: State = "error" if need.finished - used > 2 * free else "warning"
    return Finding("disk needed", f"{text}; {size_text(free)} are free", state, " or ".join(remedies))


def estimate_disk(
    experiment: Experiment, signature: Signature, packed: ShardIndex | str, test: ShardIndex | str
) -> DiskEstimate:
    """Estimate the disk space of a run. packed, test: see `disk_finding`. Raises InputError for an unknown tower."""
    from triderm_dist.engine.fold import hidden_inputs
    from triderm_dist.models import network_class

    data, views = experiment.data, max(1, len(signature.views))
    train_lesions, train_shards = _lesions(packed, data.source, data.short_side, views)
    test_lesions, test_shards = _lesions(test, data.test, data.short_side, views)
    folds = checkpoints = tables = 0
    towers: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for model in experiment.models.values():
        sizes = _model_sizes(model, signature)
        train = model.train
        checkpoint = sizes.changing * (2 if train.averages else 1) + sizes.optimizer
        last = train.keep_last if train.save_every else min(train.keep_last, train.epochs)
        kept = last * checkpoint if train.keep_checkpoints else 0
        numbers = 3 * len(signature.diagnoses) + model.width + len(signature.concepts) + len(signature.fields)
        row = 4 * numbers + ROW_BYTES
        predicted = 1 + len(hidden_inputs(model, signature))  # tables of the held-out lesions
        folds += data.folds * (sizes.weights + kept + test_lesions * row) + train_lesions * row * predicted
        # The oldest checkpoint is removed after the next one is complete.
        checkpoints = max(checkpoints, (last + 1) * checkpoint - kept)
        tables += (train_lesions + test_lesions) * row
        if model.tower.cached:
            key, number = f"{model.tower.model_dump_json()} {model.extra_towers}", 1 + len(model.extra_towers)
            towers[key] = sizes.tower * number
            key += f" {network_class(model.kind).reads_mean_tokens}"
            cached = train_lesions * (train.augment.token_variants + experiment.oof.tta)
            if model.tower.frozen:  # of frozen blocks only the training set is cached
                cached += test_lesions * experiment.predict.transforms
            tokens[key] = max(tokens.get(key, 0), sizes.tokens * cached * number)
    in_run = experiment.tokens is None
    return DiskEstimate(
        folds, tables, sum(tokens.values()) if in_run else 0, sum(towers.values()),
        (train_shards if data.shards is None else 0) + (test_shards if data.test_shards is None else 0), checkpoints,
    )  # fmt: skip


@dataclass(frozen=True)
class _ModelSizes:
    """Bytes of a model. changing: weights that are not frozen.  tower: a frozen tower.  tokens: cached per lesion."""

    weights: int
    changing: int
    optimizer: int
    tower: int
    tokens: int


def _model_sizes(model: ModelConfig, signature: Signature) -> _ModelSizes:
    from triderm_dist.data.token_codec import TokenCodec
    from triderm_dist.models import build_towers, network_class
    from triderm_dist.models.network import SHARED
    from triderm_dist.monitoring.memory_estimate import bare_network, local_tower
    from triderm_dist.optim import state_size

    network, _ = bare_network(model, signature)
    trained = sum(each.numel() for each in network.parameters() if each.requires_grad)
    frozen = sum(each.numel() * each.element_size() for each in network.parameters() if not each.requires_grad)
    tower, tokens, dtype = 0, 0, model.tower.token_dtype
    if model.tower.frozen:
        built = build_towers(local_tower(model.tower)[0], signature.views)[0]
        mean = network_class(model.kind).reads_mean_tokens
        codec = TokenCodec("float32", (built.width,)) if mean else TokenCodec(dtype, tuple(built.token_shape))
        tower, tokens = _state_bytes(built), codec.size * max(1, len(signature.views))
    elif model.tower.cached:
        keys = [SHARED if SHARED in network.towers else view for view in network.used_views]
        tokens = sum(TokenCodec(dtype, cast("Tower", network.towers[key]).input_shape).size for key in keys)
    weights, optimizer = _state_bytes(network), round(4 * state_size(model.train.optim) * trained)
    return _ModelSizes(weights, weights - frozen, optimizer, tower, tokens)


def _state_bytes(module: object) -> int:
    return sum(each.numel() * each.element_size() for each in module.state_dict().values())  # type: ignore[attr-defined]


def _lesions(packed: ShardIndex | str, source: str | None, short_side: int | None, views: int) -> tuple[int, int]:
    """Return the number of lesions of a set and the bytes of its shards; estimated from the photos before packing."""
    if not isinstance(packed, str):
        return len(packed), packed.bytes
    if not source:
        return 0, 0
    folder = Path(source)
    photos = [size for path, size in _files(folder if folder.is_dir() else folder.parent) if path.endswith(PHOTOS)]
    size = sum(photos)
    if short_side:
        size = min(size, round(len(photos) * short_side**2 * 4 / 3 * PACKED_BYTES_PER_PIXEL))
    return len(photos) // views, size


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield the lower-case name and size of every file below a folder."""
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                yield name.lower(), os.stat(os.path.join(where, name)).st_size
            except OSError:  # removed meanwhile, a broken link
                continue
