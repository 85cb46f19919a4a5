"""Choose the network from which a training starts (`models.NAME.init`), without leakage: it must not have been trained
on any lesion that the training will predict, held-out or of the test set, nor have begun with one that was.

Lesions are the same if their ids or groups are equal, or if they share a photo (`data.overlap`). Photos are compared if
the packed sets of the other run still exist at the paths in its settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import Accelerator

from triderm_dist.config import Experiment, load_run
from triderm_dist.data.overlap import Thumbnails, find_shared
from triderm_dist.data.shards.format import Text
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.open import is_packed, open_index
from triderm_dist.distributed.collectives import on_main
from triderm_dist.engine.thumbnails import compute_thumbnails
from triderm_dist.engine.trained_network import REFIT, TrainedNetwork
from triderm_dist.engine.warm_start import find_networks
from triderm_dist.predictions import find_predictions
from triderm_dist.predictions.files import PredictionFile
from triderm_dist.runtime.messages import listed
from triderm_dist.runtime.terminal import wrapped
from triderm_dist.schema import UNLABELED, CheckpointError, ConfigError, DataError

MAX_NAMED = 5
"""Lesions that a message lists by name."""


@dataclass(frozen=True)
class WarmStart:
    """The networks of another run from which the trainings of a model may start.

    init: the setting, with its name.  networks: in the order in which they are tried.
    seen: for the training set and the test set, if that is packed, whether each network was trained on each lesion,
    (networks, N) bool.  lesion_ids: of these sets.
    """

    init: str
    networks: tuple[TrainedNetwork, ...]
    seen: tuple[np.ndarray, ...]
    lesion_ids: tuple[Text, ...]

    def choose(self, rows: np.ndarray) -> TrainedNetwork:
        """Return the first network that was trained on none of these rows (n,) of the training set, nor on the test
        set.

        Raises DataError, which names lesions, if there is none.
        """
        predicted = [rows, *(np.arange(len(ids)) for ids in self.lesion_ids[1:])]  # all lesions of the test set
        for number, network in enumerate(self.networks):
            if not any(seen[number, own].any() for seen, own in zip(self.seen, predicted, strict=True)):
                return network
        shared = [
            str(ids[row])
            for seen, ids, own in zip(self.seen, self.lesion_ids, predicted, strict=True)
            for row in own[seen[0, own]]
        ]
        which = self.networks[0].name if len(self.networks) == 1 else f"each of its {len(self.networks)} networks"
        raise DataError(
            f"{self.init}: {which} was trained on lesions that this training is to predict, or began with a network "
            f"that was, so that their scores would be too good: {listed(shared, MAX_NAMED)}; name a run of other "
            "lesions, or RUN/MODEL of one with the same folds"
        )


def open_warm_start(
    experiment: Experiment,
    name: str,
    index: ShardIndex,
    accelerator: Accelerator,
    after_file: Callable[[], None] = lambda: None,
) -> WarmStart | None:
    """Open the networks that `models.NAME.init` names, see `open_networks`; None without the setting."""
    init = experiment.models[name].init
    return None if init is None else open_networks(experiment, name, init, "init", index, accelerator, after_file)


def open_networks(
    experiment: Experiment,
    name: str,
    init: str,
    setting: str,
    index: ShardIndex,
    accelerator: Accelerator,
    after_file: Callable[[], None] = lambda: None,
) -> WarmStart:
    """Find the networks that `init` names, and compare the lesions that they, and the networks that they began with,
    were trained on with the training set and with the test set, if it is packed. Call on all ranks.

    setting: key of model NAME with the value `init`.
    after_file: called on all ranks after every file of thumbnails, and may raise.
    Raises ConfigError if the run is not found.
    """
    networks = find_networks(init, name, setting)
    lineage, notes = list[tuple[int, TrainedNetwork]](), list[str]()  # number in `networks`, it or one before it
    for number, network in enumerate(networks):
        before, missing = _networks_before(network)
        lineage += [(number, one) for one in (network, *before)]
        notes += missing
    sets = dict[tuple[Path, str], list[_TrainingSet]]()  # by run and model
    for _, one in lineage:
        if (one.run, one.model) not in sets:
            sets[one.run, one.model], missing = _training_sets(experiment, one)
            notes += missing
    for its in (each.index for each in chain(*sets.values()) if each.index is not None):
        if its.group_salt != index.group_salt and its.has_groups and index.has_groups:
            notes.append(
                f"groups of {its.folder} and of the training set are not hashes under the same salt, so that patients "
                f"in common are not found; pack it with salt={index.folder}"
            )
    for note in dict.fromkeys(notes):
        accelerator.print(wrapped(f"note: models.{name}.{setting}: {note}"), flush=True)
    own = [index]
    if is_packed(experiment.test_shards):
        own.append(open_index(experiment.test_shards, experiment.data.remote))
    ids, seen = [], []
    for each in own:
        names, found = _names(each), np.zeros((len(networks), len(each)), bool)
        for key, other in ((key, other) for key, others in sets.items() for other in others):
            photos = _shared_photos(other, each, experiment, accelerator, after_file)
            for number, network in lineage:
                if (network.run, network.model) != key:
                    continue
                trained = other.trained(network)
                for own_names, its_names in zip(names, (other.lesion_ids, other.groups), strict=True):
                    found[number] |= _is_in(own_names, its_names.filter(pa.array(trained)))
                for row, own_row in photos:
                    found[number, own_row] |= trained[row]
        ids.append(each.lesion_ids)
        seen.append(found)
    return WarmStart(f"{setting}: {init}", tuple(networks), tuple(seen), tuple(ids))


@dataclass(frozen=True)
class _TrainingSet:
    """The lesions of a set that another run trained on, (n,). lesion_ids, groups: large_string.

    labeled: whether they were used.  index: the packed set, with these rows; None if it no longer exists.
    held_out: {folder of a fold: ids of the lesions that it held out}; empty for an extra set.
    """

    lesion_ids: pa.Array
    groups: pa.Array
    labeled: np.ndarray
    index: ShardIndex | None
    held_out: dict[str, pa.Array]

    def trained(self, network: TrainedNetwork) -> np.ndarray:
        """Return which lesions (n,) the network was trained on."""
        if network.is_refit or network.folder.name not in self.held_out:
            return self.labeled
        return self.labeled & ~_is_in(self.lesion_ids, self.held_out[network.folder.name])


def _networks_before(network: TrainedNetwork) -> tuple[list[TrainedNetwork], list[str]]:
    """Return the networks that a network began with or has towers of, and those before them, and notes on those that
    are gone.
    """
    found, notes = list[TrainedNetwork](), list[str]()
    init = network.info.get("init")
    for about in ([init] if init else []) + list(network.info.get("extra_towers", ())):
        model, _, part = about["network"].rpartition("/")
        folder = Path(about["run"], REFIT, model) if part == REFIT else Path(about["run"], model, part)
        try:
            one = TrainedNetwork.read(folder)
        except CheckpointError:
            one = None
        if one is None or one.weights != about["sha256"]:
            notes.append(
                f"{network.folder} began with {about['network']} of {about['run']}, which is not there or has changed; "
                "the lesions that it was trained on are not compared"
            )
            continue
        before, missing = _networks_before(one)
        found += [one, *before]
        notes += missing
    return found, notes


def _training_sets(experiment: Experiment, network: TrainedNetwork) -> tuple[list[_TrainingSet], list[str]]:
    """Return the sets that the run of a network trained its model on, and notes on what cannot be compared."""
    tables = {path.parent.name: _names_in(path) for path in find_predictions(network.run, [network.model])}
    held_out = {fold: ids for fold, (ids, _) in tables.items()}
    notes, sets = [], []
    try:
        other = load_run(Experiment, network.run)
        shards = [other.train_shards, *(each.shards for each in other.data.extra_sets.values())]
    except ConfigError as error:
        notes.append(f"{error}; the photos of its training set are not compared")
        shards = [""]
    for number, where in enumerate(shards):
        try:
            index = open_index(where, experiment.data.remote) if where else None
        except DataError:
            notes.append(f"{where}, on which {network.run} was trained, is not there; its photos are not compared")
            index = None
        if index is not None:
            ids, groups = _names(index)
            labeled = index.labels != UNLABELED
        elif number == 0 and tables:
            ids, groups = (pa.concat_arrays(columns) for columns in zip(*tables.values(), strict=True))
            labeled = np.ones(len(ids), bool)
        else:
            notes.append(f"{network.run} does not record the lesions that it was trained on; they are not compared")
            continue
        sets.append(_TrainingSet(ids, groups, labeled, index, {} if number else held_out))
    return sets, notes


def _names(index: ShardIndex) -> tuple[pa.Array, pa.Array]:
    """Return ids and groups of all lesions, (N,) large_string each."""
    return index.lesion_ids.column, index.groups.column


def _names_in(path: Path) -> tuple[pa.Array, pa.Array]:
    """Return ids and groups of the lesions in a file of predictions, (n,) large_string each."""
    table = pa.concat_tables(PredictionFile(path).tables(("lesion_id", "group")))
    ids, groups = (table[name].cast(pa.large_string()).combine_chunks() for name in ("lesion_id", "group"))
    return ids, groups


def _is_in(names: pa.Array, others: pa.Array) -> np.ndarray:
    """Return which names (n,) are among others, bool."""
    return pc.is_in(names, others).to_numpy(zero_copy_only=False)


def _shared_photos(
    other: _TrainingSet,
    own: ShardIndex,
    experiment: Experiment,
    accelerator: Accelerator,
    after_file: Callable[[], None],
) -> Sequence[tuple[int, int]]:
    """Return (row of `other`, row of `own`) of lesions that share a photo; [] if photos are not compared."""
    index = other.index
    if index is None or index.fingerprint == own.fingerprint:
        return ()
    theirs, ours = (Thumbnails(each, Path(experiment.token_folder)) for each in (index, own))
    compute_thumbnails([theirs, ours], experiment.data.workers, accelerator, after_file)
    rows = np.flatnonzero(other.labeled)
    shared = on_main(partial(find_shared, theirs, ours, rows, accelerator.device))
    return [(pair.row, pair.main_row) for pair in shared]
