"""Open the extra sets of a training, match them with the training set, and drop lesions that both have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations

import numpy as np
from accelerate import Accelerator

from triderm_dist.config import Experiment
from triderm_dist.data.overlap import Shared, Thumbnails, find_shared
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.open import is_packed, open_index
from triderm_dist.data.union import ExtraSet, match_extra_set
from triderm_dist.distributed.collectives import on_main
from triderm_dist.distributed.parallel import start_training
from triderm_dist.engine.model_inputs import Notes, open_training_inputs
from triderm_dist.engine.thumbnails import compute_thumbnails
from triderm_dist.runtime.terminal import counted, wrapped
from triderm_dist.schema import UNLABELED, ConfigError, DataError

MAX_NAMED = 10
"""Pairs of lesions that a message lists by name."""


def open_extra_sets(experiment: Experiment, index: ShardIndex, verify: bool = False) -> tuple[ExtraSet, ...]:
    """Open the extra sets that have a weight, and match them with the training set. verify: hash their shards first.

    Raises DataError as `open_index` does, ConfigError as `match_extra_set` does and for lesions that would join twice.
    """
    sets = {
        where: match_extra_set(config, open_index(config.shards, experiment.data.remote, verify), index, where)
        for where, config in experiment.data.extra_sets.items()
    }
    for (first, one), (second, other) in combinations(sets.items(), 2):
        if one.index.fingerprint == other.index.fingerprint and len(np.intersect1d(one.rows, other.rows)):
            raise ConfigError(
                f"{second}: is the same set as {first}, so its lesions would join twice; remove one, or map each "
                "diagnosis to null in one of them"
            )
    return tuple(sets.values())


def without_shared_photos(
    extra: Sequence[ExtraSet],
    index: ShardIndex,
    experiment: Experiment,
    accelerator: Accelerator,
    after_file: Callable[[], None] = lambda: None,
) -> tuple[ExtraSet, ...]:
    """Drop lesions of extra sets that share a photo with the training set, or with the test set if that is packed.

    Call on all ranks, which share the work through the folder of the token cache.
    after_file: called on all ranks after every file of thumbnails, and may raise.
    Raises DataError that names such lesions for sets with `overlap: refuse`.
    """
    if not extra:
        return ()
    for where, each in zip(experiment.data.extra_sets, extra, strict=True):
        for line in [*describe_extra_set(where, each, index), *(f"{where}: {note}" for note in each.index.notes())]:
            accelerator.print(wrapped(line), flush=True)
    known = {"training set": index}
    if is_packed(experiment.test_shards):
        known["test set"] = open_index(experiment.test_shards, experiment.data.remote)
    prints = [Thumbnails(each, experiment.token_folder) for each in (*known.values(), *(each.index for each in extra))]
    compute_thumbnails(prints, experiment.data.workers, accelerator, after_file)
    result = []
    for (where, config), each, own in zip(experiment.data.extra_sets.items(), extra, prints[len(known) :], strict=True):
        for (name, other), thumbnails in zip(known.items(), prints, strict=False):
            shared = on_main(partial(find_shared, own, thumbnails, each.rows, accelerator.device))
            if not shared:
                continue
            text = _named(shared, each, name, other)
            if config.overlap == "refuse":
                raise DataError(
                    f"{where}: {text}; set its overlap to drop to leave them out, or pack the set without them"
                )
            each = each.without(np.array([pair.row for pair in shared]))
            accelerator.print(wrapped(f"note: {where}: left out, {text}"), flush=True)
            if not len(each.rows):
                raise DataError(f"{where}: every lesion of it shares a photo with the {name}; remove the set")
        result.append(each)
    return tuple(result)


def prepare_trainings(experiment: Experiment, index: ShardIndex, names: Sequence[str]) -> None:
    """Compute what several trainings of these models share: thumbnails of extra sets, and the token caches."""
    extra = open_extra_sets(experiment, index)
    if extra:
        accelerator = start_training(experiment.models[names[0]].train)
        extra = without_shared_photos(extra, index, experiment, accelerator)
    note = Notes()
    for name in names:
        if (model := experiment.models[name]).tower.cached:
            accelerator = start_training(model.train)
            # Computes what the cache lacks.
            open_training_inputs(
                experiment, name, index, accelerator, extra=extra, transforms=experiment.oof.tta, note=note
            )


def describe_extra_set(where: str, extra: ExtraSet, index: ShardIndex) -> list[str]:
    """Describe which lesions of an extra set join, and how it was matched with the training set, one line each."""
    labels = extra.labels[extra.rows]
    counts = [f"{name} {(labels == label).sum():,}" for label, name in enumerate(index.diagnoses)
              if extra.class_mask[label]]  # fmt: skip
    unused = int((extra.index.labels != UNLABELED).sum()) - len(labels)
    left_out = f"; {unused:,} labeled ones do not" if unused else ""
    found = int((extra.concepts >= 0).sum())
    matched = f"; {found} of {counted(len(index.concepts), 'concept')} match by name" if index.concepts else ""
    return [
        f"{where}: {len(labels):,} lesions of {extra.name} join the training with weight {extra.weight:g} as "
        f"{', '.join(counts)}{left_out}{matched}",
        *(f"{where}: {note}" for note in extra.notes),
    ]


def _named(shared: Sequence[Shared], extra: ExtraSet, name: str, other: ShardIndex) -> str:
    pairs = sorted(
        (extra.index.lesion_ids[pair.row], other.lesion_ids[pair.main_row], pair.similarity) for pair in shared
    )
    named = [
        f"{own} and {main} " + ("(same file)" if similarity is None else f"(similarity {similarity:.3f})")
        for own, main, similarity in pairs[:MAX_NAMED]
    ]
    more = f", and {len(pairs) - MAX_NAMED:,} more" if len(pairs) > MAX_NAMED else ""
    of = f"{len(pairs):,} of {len(extra.rows):,} lesions of {extra.name}"
    return f"{of} share a photo with the {name}: {', '.join(named)}{more}"
