"""Warm start: a network begins with the weights of a network of another run, as `models.NAME.init` names it.

    RUN                                       the model of the same name, or the only one
    RUN/MODEL                                 its refit if there is one, else its folds
    RUN/MODEL/fold-K, RUN/MODEL/refit         one network; also by the path of its weights.safetensors

RUN is a folder, a zip file, or hf-hub:USER/NAME. The other run may have another task, other settings and another kind
of network: what fits is taken, and the rest begins as the settings say. A tower is taken completely or not at all. Any
other parameter is taken where name and shape agree, and what it means (`Network.parameter_meanings`): the head only
where the diagnoses are the same ones, the token of a concept only where the concepts are.

`engine.init_overlap` decides which of several networks a fold begins with, so that none has seen what it predicts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triderm_dist.config import Experiment, ModelConfig
from triderm_dist.engine.locate import HUB, locate_run
from triderm_dist.engine.network_files import read_info, read_weights
from triderm_dist.engine.trained_network import REFIT, TrainedNetwork
from triderm_dist.models import build_network
from triderm_dist.models.network import SHARED, Network
from triderm_dist.models.tower import Tower
from triderm_dist.models.tower_record import FOLDER, load_tower
from triderm_dist.schema import CheckpointError, ConfigError

Weights = dict[str, Tensor]


def find_networks(init: str, model: str, setting: str = "init") -> list[TrainedNetwork]:
    """Return the networks that `models.NAME.init` names: a single one, a model's refit if it has one, or all its folds.

    model: the one to take where `init` names a run of several.  setting: of that model, for messages. Raises
    ConfigError if there is none, or it is not clear which.
    """
    path = _path(init)
    key = f"models.{model}.{setting}: {init}"
    if path.name == "weights.safetensors":
        path = path.parent
    if path.name == REFIT and not path.exists():
        path = path.parents[1] / REFIT / path.parent.name
    if (path / "fold.json").is_file():
        return [TrainedNetwork.read(path)]
    if not path.is_dir():
        raise ConfigError(
            f"{key}: no such run; write RUN, RUN/MODEL or RUN/MODEL/fold-K with a folder, a zip file or {HUB}USER/NAME "
            "for RUN (weights of a tower alone are given by tower.source)"
        )
    if any(path.glob("fold-*/fold.json")):
        path, model = path.parent, path.name
    models = sorted(
        {each.parents[1].name for each in path.glob("*/fold-*/fold.json")}
        | {each.parent.name for each in path.glob(f"{REFIT}/*/fold.json")}
    )
    if not models:
        raise ConfigError(f"{key}: no trained network there; name the folder of a run, after triderm crossval")
    if model not in models:
        if len(models) > 1:
            raise ConfigError(f"{key}: has the models {', '.join(models)}; name one: {init}/{models[0]}")
        model = models[0]
    refit = path / REFIT / model
    if (refit / "fold.json").is_file():
        return [TrainedNetwork.read(refit)]
    folds = sorted(path.glob(f"{model}/fold-*"), key=lambda folder: (len(folder.name), folder.name))
    return [TrainedNetwork.read(folder) for folder in folds if (folder / "fold.json").is_file()]


def init_identity(experiment: Experiment, name: str, folder: Path) -> list[str]:
    """Return the SHA-256 of the weights of all networks from which a model's training may start; [] without `init`.

    folder: that of the training. Where the other run is gone, they are those that a finished training recorded there.
    """
    init = experiment.models[name].init
    return [] if init is None else _identity(init, name, "init", folder)


def extra_identity(experiment: Experiment, name: str, folder: Path) -> list[tuple[bool, list[str]]]:
    """Return (`logits`, the hashes that `init_identity` returns) of each of a model's extra towers."""
    return [
        (each.logits, _identity(each.init, name, f"extra_towers.{number}", folder))
        for number, each in enumerate(experiment.models[name].extra_towers)
    ]


def _identity(init: str, name: str, setting: str, folder: Path) -> list[str]:
    """See `init_identity`. setting: dotted key of model `name`, with the value `init`."""
    try:
        return [network.weights for network in find_networks(init, name, setting)]
    except (ConfigError, CheckpointError):
        if recorded := _recorded_networks(folder, setting):
            return recorded
        raise


def _recorded_networks(folder: Path, setting: str) -> list[str]:
    """Return the hashes that the fold.json in a folder records of a setting; [] without any."""
    try:
        part: Any = read_info(folder / "fold")
        for key in setting.split("."):
            part = part[int(key) if isinstance(part, list) else key]
        return list(part["networks"])
    except (CheckpointError, KeyError, IndexError):
        return []


@dataclass(frozen=True)
class Transfer:
    """Names of parameters and buffers. taken: loaded from `source`.  new: initialized.  left: of `source` only.

    frozen_tower: a frozen tower, which is not part of the network, has the weights of `source` too (`transfer_tower`).
    """

    source: TrainedNetwork
    taken: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]
    frozen_tower: bool

    def describe(self) -> str:
        """Describe in one line what was taken, initialized and left out, by part of the network."""
        taken = ", ".join([*(["frozen tower"] if self.frozen_tower else []), *_parts(self.taken)]) or "nothing"
        text = f"starts from {self.source.folder}: {taken} taken"
        for names, what in ((self.new, "new"), (self.left, "left")):
            if names:
                text += f"; {', '.join(_parts(names))} {what}"
        return text

    def json(self) -> dict[str, Any]:
        """What fold.json records."""
        return {
            "run": str(self.source.run), "network": self.source.name, "sha256": self.source.weights,
            "taken": _counts(self.taken), "new": _counts(self.new), "left": _counts(self.left),
        }  # fmt: skip


def tower_weights(network: TrainedNetwork, weights: Weights) -> dict[str, Weights]:
    """Return the weights of each of a network's towers by its view, or of the one that is shared.

    weights: of the network, which hold those of a tower that trained; a frozen one is in RUN/towers.
    """
    found: dict[str, Weights] = {}
    for name, tensor in weights.items():
        if match := re.fullmatch(r"towers\.(\w+)\.(.+)", name):
            found.setdefault(match[1], {})[match[2]] = tensor
    tower = network.tower
    if not found and tower is not None and tower.weights is not None:
        found[SHARED] = load_tower(network.run / FOLDER, tower).state_dict()
    return found


def transfer_weights(network: Network, config: ModelConfig, source: TrainedNetwork) -> Transfer:
    """Load the weights of another network that fit into this one. config: settings of this network.

    Raises CheckpointError if nothing fits, or if the other network's files are damaged.
    """
    weights = read_weights(source.folder / "weights")
    own = network.state_dict()
    taken: Weights = {}
    used: set[str] = set()
    towers = tower_weights(source, weights) if network.towers else {}
    for key, tower in network.towers.items():
        fitting = fitting_tower(tower, key, towers)
        if fitting:
            taken |= {f"towers.{key}.{name}": tensor for name, tensor in towers[fitting].items()}
            used |= {name for name in weights if name.startswith(f"towers.{fitting}.")}
    its = source.config
    if (config.kind, config.head) == (its.kind, its.head):
        with torch.device("meta"):  # the other network without weights, for what its parameters mean
            others = build_network(its, source.signature, network.token_shape).parameter_meanings()
        meanings = network.parameter_meanings()
        for name, tensor in own.items():
            fits = name in weights and name not in taken and weights[name].shape == tensor.shape
            if fits and not name.startswith("towers.") and _meaning(name, meanings) == _meaning(name, others):
                taken[name] = weights[name]
                used.add(name)
    new = tuple(name for name in own if name not in taken)
    frozen = config.tower.frozen
    left = tuple(name for name in weights if name not in used and not (frozen and name.startswith("towers.")))
    transfer = Transfer(source, tuple(taken), new, left, frozen)
    if not taken and not frozen:
        raise CheckpointError(f"{source.folder}: nothing in it fits this network ({transfer.describe()}); remove init")
    network.load_state_dict(taken, strict=False)
    return transfer


def transfer_tower(tower: Tower, source: TrainedNetwork) -> None:
    """Load the weights of another network's tower into a tower that stays frozen.

    Raises CheckpointError if none fits completely.
    """
    towers = tower_weights(source, read_weights(source.folder / "weights"))
    key = fitting_tower(tower, SHARED, towers)
    if key is None:
        known = source.tower
        its = f", {known.source}, with image_size {known.image_size}" if known else ""
        raise CheckpointError(
            f"{source.folder}: its towers do not fit the frozen tower of this model; set tower to the one of that run"
            f"{its}"
        )
    tower.load_state_dict(towers[key])
    tower.report = f"{tower.report}; weights of {source.folder}"


def _path(init: str) -> Path:
    """Return the path of `init`, after downloading or extracting its run."""
    if init.startswith(HUB):
        user, _, rest = init.removeprefix(HUB).partition("/")
        name, _, rest = rest.partition("/")
        return locate_run(f"{HUB}{user}/{name}") / rest
    path = Path(init)
    for parent in (path, *path.parents):
        if parent.is_file() and parent.suffix == ".zip":
            return locate_run(parent) / path.relative_to(parent)
    return path.absolute()


def fitting_tower(tower: nn.Module, key: str, towers: Mapping[str, Weights]) -> str | None:
    """Return the other network's tower that fits this one: of the same view, the shared one, or any; None if none."""
    shapes = {name: tensor.shape for name, tensor in tower.state_dict().items()}
    order = [key, SHARED, "dermoscopic", "clinical"]
    fitting = [name for name, each in towers.items() if {k: tensor.shape for k, tensor in each.items()} == shapes]
    return next((name for name in order if name in fitting), None)


def _meaning(name: str, meanings: Mapping[str, Any]) -> Any:
    """Return the meaning with the longest prefix of a parameter's name."""
    parts = name.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
    return next((meanings[prefix] for prefix in prefixes if prefix in meanings), None)


def _part(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "towers" else parts[0]


def _counts(names: tuple[str, ...]) -> dict[str, int]:
    return dict(Counter(map(_part, names)))


def _parts(names: tuple[str, ...]) -> list[str]:
    """Name the parts of the network that tensors belong to, with the number of tensors."""
    return [f"{part} ({count})" for part, count in _counts(names).items()]
