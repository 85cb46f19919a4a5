"""The table of tower sources, and the parser of `tower.source`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from triderm_dist.models.light_imports import import_timm
from triderm_dist.models.open_clip_tower import (
    build_from_folder,
    build_from_hub,
    locate_in_folder,
    locate_on_hub,
    rebuild_open_clip,
)
from triderm_dist.models.panderm import load_panderm, rebuild_panderm, split_panderm
from triderm_dist.models.timm_tower import build_timm, locate_timm
from triderm_dist.models.tower import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OPENAI_MEAN,
    OPENAI_STD,
    InputSpec,
    TokenShape,
    Tower,
    TowerOptions,
    TowerSource,
    WeightsLocation,
    refuse_quick_gelu,
)
from triderm_dist.models.weight_files import INDEX_SUFFIX, WEIGHT_SUFFIXES, existing_weights, read_weight_file
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import ConfigError

# Names of `models.tower` are here for plugins (docs/extending.md).
__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "OPENAI_MEAN",
    "OPENAI_STD",
    "TOWER_SOURCES",
    "TokenShape",
    "Tower",
    "TowerOptions",
    "TowerSource",
    "WeightsLocation",
    "build_tower",
    "locate_weights",
]


def _build_panderm(name: str, options: TowerOptions) -> Tower:
    file = Path(name)
    refuse_quick_gelu(options, name)
    model, weights = load_panderm(read_weight_file(file), file, options.pretrained)
    spec = InputSpec(model.patch_embed.img_size[0], IMAGENET_MEAN, IMAGENET_STD)
    return split_panderm(model, spec, options.image_size, f"{name}: PanDerm, {weights}")


def _locate_panderm(name: str, pretrained: bool) -> WeightsLocation:
    existing_weights(Path(name))  # sizes are read from the file even for random weights
    return WeightsLocation("found", True)


PANDERM = "panderm"

TOWER_SOURCES: dict[str, TowerSource] = {
    "hf-hub": TowerSource("hf-hub:OWNER/NAME", build_from_hub, locate_on_hub, rebuild_open_clip),
    "local-dir": TowerSource("local-dir:PATH", build_from_folder, locate_in_folder, rebuild_open_clip),
    "timm": TowerSource("timm:NAME[@FILE]", build_timm, locate_timm),
    PANDERM: TowerSource(
        "a PanDerm checkpoint file (.pth, .pt, .bin, .safetensors)", _build_panderm, _locate_panderm, rebuild_panderm
    ),
}
"""Kinds of `tower.source` by prefix. Plugins add to this table."""


def build_tower(
    source: str, pretrained: bool = True, image_size: int | None = None, quick_gelu: bool | None = None
) -> Tower:
    """Build the tower that `source` names.

    `hf-hub:ID` and `local-dir:PATH`: an open_clip repository or folder, of which only the visual tower is built (its
    own ViT, a timm model, or PanDerm). A .pth, .pt, .bin or .safetensors file: PanDerm, sizes read from the tensors.
    `timm:NAME`: any timm network that is a chain of blocks, weights from timm's hub; `timm:NAME@FILE`: from a file,
    or `timm:NAME@package:PACKAGE`: from the weight file in an installed Python package.

    pretrained: False builds the architecture with random weights.  image_size: in pixels; positions are resampled to
    it.  quick_gelu: overrides an open_clip config, which may lack this setting; the weights do not show it.

    Raises CheckpointError if weights are missing, incomplete or of another architecture, InputError or ConfigError for
    a source that is unknown or cannot be reached.
    """
    kind, name = parse_source(source)
    import_timm()
    tower = kind.build(name, TowerOptions(pretrained, image_size, quick_gelu))
    if not kind.build.__module__.startswith("triderm_dist."):
        _check_tower(tower, f"tower.source: build of {source!r} returned")
    return tower


def _check_tower(tower: object, where: str) -> None:
    """Raise ConfigError unless what a plugin returned is a tower with tokens of the shape that it states."""
    if not isinstance(tower, Tower):
        raise ConfigError(f"{where} a {type(tower).__name__}, not a Tower")
    side, triples = tower.image_size, (tower.mean, tower.std)
    if not isinstance(side, int) or not all(isinstance(each, Sequence) and len(each) == 3 for each in triples):
        raise ConfigError(
            f"{where} a Tower whose image_size is no int, or whose mean and std are not three numbers each"
        )
    tower.eval()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # computes shapes only
            shape = tuple(tower(torch.empty(1, 3, side, side)).shape)
    except Exception as error:  # a user's modules may raise any type
        text = one_line(error, 200, with_type=True)
        raise ConfigError(f"{where} a Tower that fails on photos of {side} x {side} pixels: {text}") from None
    tower.train()
    if shape != (1, *tower.token_shape):
        raise ConfigError(
            f"{where} a Tower with tokens {shape} instead of (1, num_tokens, width) = {(1, *tower.token_shape)}"
        )


def locate_weights(source: str, pretrained: bool = True) -> WeightsLocation:
    """Find the files of a tower, without loading or downloading anything.

    Raises InputError if they are neither on this machine nor downloadable, or if the source is unknown.
    """
    kind, name = parse_source(source)
    description, is_local = kind.locate(name, pretrained)
    return WeightsLocation(f"{source}: {description}", is_local)


def parse_source(source: str) -> tuple[TowerSource, str]:
    """Split PREFIX:NAME into the entry of `TOWER_SOURCES` and NAME. Raises ConfigError for an unknown source."""
    prefix, colon, name = source.partition(":")
    if colon and prefix in TOWER_SOURCES:
        if not isinstance(kind := TOWER_SOURCES[prefix], TowerSource):
            raise ConfigError(f"tower.source: TOWER_SOURCES holds no TowerSource under {prefix!r}")
        return kind, name
    if Path(source).suffix in WEIGHT_SUFFIXES or source.endswith(INDEX_SUFFIX):
        return TOWER_SOURCES[PANDERM], source
    known = ", ".join(kind.form for kind in TOWER_SOURCES.values() if isinstance(kind, TowerSource))
    raise ConfigError(f"tower.source: {source!r} is not a tower source; known: {known} (plugins may add others)")
