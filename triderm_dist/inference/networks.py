"""The networks of a run in memory; modules that all folds share are computed once."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from triderm_dist.config import AugmentConfig, Frame, ModelConfig
from triderm_dist.data.augment import PhotoTransform, normalize
from triderm_dist.distributed.parallel import choose_precision
from triderm_dist.engine.embed import frozen_model
from triderm_dist.engine.model_tower import open_tower
from triderm_dist.engine.network_files import load_weights
from triderm_dist.engine.trained_network import TrainedNetwork
from triderm_dist.ensemble.stack_inputs import embedding_tower, embeddings_path
from triderm_dist.inference.run_folder import RunFolder
from triderm_dist.models import build_network, build_towers
from triderm_dist.models.cpu_tower import MIN_PHOTOS, CpuTower
from triderm_dist.models.network import SHARED, Network
from triderm_dist.models.tower import Tower
from triderm_dist.models.tower_record import FOLDER, TowerRecord, find_tower, read_tower
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import ConfigError, DataError

ModuleType = TypeVar("ModuleType", bound=nn.Module)
Device = str | torch.device
Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Preprocessing(NamedTuple):
    """How photos become the input of a tower: their frame (see `TowerConfig`) at `size` pixels, normalized."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    frame: Frame = "square"

    def __call__(self, photos: Tensor, view: str = "") -> Tensor:
        """Map photos (B, H, W, 3) uint8 of one canvas to pixels (B, 3, size, size) float32."""
        crops = PhotoTransform(self.size, AugmentConfig(), self.frame)(photos, view)
        return normalize(crops.contiguous(memory_format=torch.channels_last), self.mean, self.std)

    @classmethod
    def of(cls, tower: TowerRecord) -> Preprocessing:
        return cls(tower.image_size, tower.mean, tower.std, tower.frame)


class FrozenTower(nn.Module):
    """Tokens of a frozen tower as training reads them from the token cache: pixels (B, 3, H, W) to (B, L, width).

    They are rounded as there (`Tower.as_cached`). On a GPU the tower computes in bf16, as when the cache was filled.
    """

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower
        self._on_cpu: CpuTower | None = None

    def prepare(self, report: Callable[[str], None]) -> None:
        """Compute tokens as `CpuTower` does from now on. report: as that of `CpuTower`."""
        self._on_cpu = self._on_cpu or CpuTower(self.tower, report)

    def forward(self, pixels: Tensor) -> Tensor:
        if self._on_cpu:
            return self.tower.as_cached(self._on_cpu(pixels))
        on_gpu = pixels.device.type == "cuda"
        # Not by a disabled autocast, which `torch.export` cannot save around a frozen tower.
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            tokens = self.tower(pixels)
        return self.tower.as_cached(tokens)


@dataclass(frozen=True)
class LoadedModel:
    """The networks of one model, one per fold, in evaluation mode.

    encoders: by view, what the networks of all folds have in common at the input: a frozen tower, or the frozen blocks
    of a tower; empty if nothing is. The networks take its output instead of pixels.  dtype: of autocast, None
    for none.
    """

    name: str
    config: ModelConfig
    trained: list[TrainedNetwork]
    preprocessing: Preprocessing
    networks: list[Network]
    encoders: dict[str, nn.Module]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Embedding:
    """The mean token of a photo by a frozen tower, as `triderm embed` computes it."""

    tower: FrozenTower
    preprocessing: Preprocessing

    def __call__(self, pixels: Tensor) -> Tensor:
        """Map pixels (B, 3, H, W) to (B, width) float32."""
        mean: Tensor = self.tower(pixels).mean(1)
        return mean


@dataclass
class NetworkLoader:
    """Loads the networks of a run onto a device, on the towers that the run keeps (see `models.tower_record`).

    A frozen tower is loaded once for all models that use it.
    """

    run: RunFolder
    device: torch.device
    precision: Precision | None = None
    _frozen: dict[tuple[str, str], FrozenTower] = field(default_factory=dict)

    def load(self, name: str, share: bool = True) -> LoadedModel:
        """Load the networks of a model.

        share: split off what all folds have in common, at the input of each view; else every network takes pixels.
        Raises InputError if weights are missing, damaged or of another architecture.
        """
        run, views = self.run, self.run.signature.views
        config, trained = run.experiment.models[name], run.networks[name]
        tower, frozen = self.tower(config, self.recorded(name))
        with torch.random.fork_rng(devices=[]):  # initial weights, which are replaced
            inputs = tower.token_shape if frozen else build_towers(config.tower, views, tower.build())
            network = build_network(config, run.signature, inputs)
        networks = [network, *(copy.deepcopy(network) for _ in trained[1:])]
        for each, network in zip(trained, networks, strict=True):
            load_weights(each.folder / "weights", network)
        encoders: dict[str, nn.Module] = {}
        if frozen and share:
            encoders = dict.fromkeys(views, frozen)
        elif frozen:
            for network in networks:
                network.add_tower(frozen)
        elif share and len(networks) > 1:
            encoders = split_common(networks, views)
        for module in (*networks, *encoders.values()):
            self._prepare(module)
        dtype = DTYPES[choose_precision(self.precision or config.train.precision, self.device)[0]]
        return LoadedModel(name, config, trained, Preprocessing.of(tower), networks, encoders, dtype)

    def load_embedding(self) -> Embedding | None:
        """Return the tower whose embeddings the stacker reads, None if it reads none.

        Raises DataError if no model of the run has it.
        """
        stacker = self.run.fitted.stacker
        if stacker is None or stacker.extra != "embeddings":
            return None
        tower, frozen = self.tower(*embedding_model(self.run))
        assert frozen is not None
        return Embedding(self._prepare(frozen), Preprocessing.of(tower))

    def prepare(self, photos: int, report: Callable[[str], None]) -> None:
        """Compute the loaded frozen towers with `CpuTower`, if on a CPU and for enough photos to save time."""
        if self.device.type == "cpu" and photos >= MIN_PHOTOS:
            for tower in self._frozen.values():
                tower.prepare(report)

    def recorded(self, name: str) -> TowerRecord | None:
        """Return the tower of a model's folds, None if they were trained before towers were recorded.

        Raises DataError if they were trained on different ones.
        """
        towers = {each.tower for each in self.run.networks[name]} - {None}
        if len(towers) > 1:
            raise DataError(f"{self.run.path / name}: its folds were trained on different towers; train them again")
        return towers.pop() if towers else None

    def tower(self, config: ModelConfig, recorded: TowerRecord | None) -> tuple[TowerRecord, FrozenTower | None]:
        """Return the record of a model's tower, and the tower with its weights if it is frozen."""
        dtype = config.tower.token_dtype
        if recorded and config.tower.frozen and (recorded.name, dtype) in self._frozen:
            return recorded, self._frozen[recorded.name, dtype]
        with torch.random.fork_rng(devices=[]):
            record, tower = open_tower(self.run.experiment, config, recorded)
        if tower is None:
            return record, None
        tower.store_tokens_as(dtype)
        return record, self._frozen.setdefault((record.name, dtype), FrozenTower(tower))

    def _prepare(self, module: ModuleType) -> ModuleType:
        module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module.eval().requires_grad_(False)


def embedding_model(run: RunFolder) -> tuple[ModelConfig, TowerRecord | None]:
    """Return the settings of the model whose frozen tower computes the embeddings of a run, and the tower's record, if
    the run has one.

    Raises DataError if no model of the run has that tower.
    """
    source, name = embedding_tower(run.path)
    record = read_tower(run.path / FOLDER, name) if name else None
    for model in run.experiment.models.values():
        if record.is_of(model.tower) if record else model.tower.source == source:
            return frozen_model(model), record or find_tower(run.path / FOLDER, model.tower, True)
    path = embeddings_path(run.path, "train")
    raise DataError(
        f"{path}: was written by the tower {source}, which no model of the run has; run triderm embed again"
    )


def split_common(networks: Sequence[Network], views: Sequence[str]) -> dict[str, nn.Module]:
    """Remove the frozen modules at the input of the networks' towers if they are equal in all, and return them.

    Returns a module by view. Frozen blocks keep their pretrained weights, so that those of all folds are equal.
    """
    common: dict[str, nn.Module] = {}
    for key in networks[0].towers:
        towers: list[Tower] = [network.towers[key] for network in networks]  # type: ignore[misc]
        frozen = [tower.frozen_modules() for tower in towers]
        if not len(frozen[0]) or not all(_equal(frozen[0], other) for other in frozen[1:]):
            continue
        for tower in towers:
            tower.detach_frozen()
        common |= dict.fromkeys(views if key == SHARED else [key], frozen[0])
    return common


def _equal(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def choose_device(device: Device | None) -> torch.device:
    """Return the device, by default the GPU if there is one. Raises ConfigError for one that cannot be used here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # Torch without CUDA raises AssertionError
        gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        known = f"this machine has {', '.join(['cpu', *gpus])}"
        raise ConfigError(f"device={device}: {one_line(error, 100)}; {known}") from None
    return chosen
