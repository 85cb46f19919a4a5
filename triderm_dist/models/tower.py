"""One interface for every image encoder: a stem, a list of blocks, a tail, and patch tokens as output.

A tower of any library is split into these three parts, so that freezing, layer-wise learning rates,
activation checkpointing and compilation work on blocks and depend on no library's parameter names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from triderm_dist.data.token_codec import TokenDtype, as_stored
from triderm_dist.schema import ConfigError

Triple = tuple[float, float, float]

OPENAI_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


class TokenShape(NamedTuple):
    """L and width of a tower's tokens (B, L, width)."""

    num_tokens: int
    width: int


class JoinedShape(TokenShape):
    """The shape of one token that is the concatenation of several. parts: their widths.

    Without parts if it is called with two numbers, as `torch.export` rebuilds named tuples.
    """

    parts: tuple[int, ...]

    def __new__(cls, num_tokens: int, width: int, parts: Sequence[int] = ()) -> JoinedShape:
        shape = super().__new__(cls, num_tokens, width)
        shape.parts = tuple(parts)
        return shape

    @classmethod
    def of(cls, parts: Sequence[int]) -> JoinedShape:
        return cls(1, sum(parts), parts)

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (*self, self.parts)


class InputSpec(NamedTuple):
    """The square input that an encoder was trained on: side in pixels, and normalization."""

    size: int
    mean: Triple
    std: Triple


_DROP_PATHS = ("drop_path", "drop_path1", "drop_path2")
"""Attributes of timm's residual units that hold a module after a branch, or None."""


class Tower(nn.Module):
    """Encode images: pixels (B, 3, H, W), normalized with the tower's `mean` and `std`, to tokens (B, L, width).

    stem: everything before the first block (patch embedding, class token, positions, first norm); has parameters.
    blocks: the units of freezing, learning-rate decay, checkpointing and compilation.  tail: everything after the last
    block (last norm or convolution), with or without parameters.
    layout: of the tail's output: NLC tokens of which the first `prefix_tokens` (class, registers) are dropped, or an
    NCHW or NHWC map, which is read row by row.
    input_shape: of one photo's pixels, or of the input after `skip_frozen`.
    architecture: text that identifies the function apart from its tensors, part of `tower_hash`.
    description: JSON values from which `TowerSource.rebuild` builds the same architecture.
    report: one line on the loaded weights and their source.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        tail: nn.Module,
        *,
        width: int,
        num_tokens: int,
        image_size: int,
        mean: Triple,
        std: Triple,
        layout: str = "NLC",
        prefix_tokens: int = 0,
        architecture: str = "",
        description: Mapping[str, Any] | None = None,
        report: str = "",
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.tail = tail
        self.width = width
        self.num_tokens = num_tokens
        self.image_size = image_size
        self.mean = mean
        self.std = std
        self.architecture = architecture
        self.description = description
        self.report = report
        self.frozen_blocks = 0
        self.input_shape: tuple[int, ...] = (3, image_size, image_size)
        self.skips_frozen = False
        self.token_dtype: TokenDtype = "float16"
        self._layout = layout
        self._prefix_tokens = prefix_tokens

    @property
    def token_shape(self) -> TokenShape:
        return TokenShape(self.num_tokens, self.width)

    def freeze(self, num_blocks: int) -> None:
        """Freeze the stem and the first `num_blocks` blocks, and the tail if that is all blocks; 0 freezes nothing.

        Frozen modules run without autograd, so that their activations are not stored, and in evaluation mode: without
        dropout and drop path, and with fixed statistics of batch norms.
        """
        self.frozen_blocks = min(num_blocks, len(self.blocks))
        for module in self._frozen():
            module.requires_grad_(False)
        self.train(self.training)

    def set_drop_path(self, rate: float) -> None:
        """Drop the residual branches of a lesion at random in training (stochastic depth, Huang et al. 2016).

        The probability rises linearly over the residual units, from 0 in the first to `rate` in the last one. Raises
        ConfigError if the blocks have no residual branch that can be dropped.
        """
        from timm.layers import DropPath

        units = []
        for block in self.blocks:
            for unit in block.modules():
                names = [name for name in _DROP_PATHS if hasattr(unit, name)]
                if type(unit).__name__ == "ResidualAttentionBlock":  # of open_clip, which has layer scale instead
                    names = [name for name in ("ls_1", "ls_2") if type(getattr(unit, name)) is nn.Identity]
                units += [(unit, names)] if names else []
        if not units:
            raise ConfigError(f"tower.drop_path: {self.architecture} has no branch that can be dropped; remove it")
        for number, (unit, names) in enumerate(units):
            for name in names:
                setattr(unit, name, DropPath(rate * number / max(1, len(units) - 1)))

    @property
    def trained_blocks(self) -> list[nn.Module]:
        """The blocks that are not frozen."""
        return list(self.blocks)[self.frozen_blocks :]

    def train(self, mode: bool = True) -> Tower:
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        modules = [self.stem, *self.blocks, self.tail]
        num_frozen = len(self._frozen())
        if parameters := list(self.stem.parameters()):
            x = x.to(parameters[0].dtype)
        if not self.skips_frozen:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not num_frozen):
                for module in modules[:num_frozen]:
                    x = module(x)
        for module in modules[num_frozen:]:
            x = module(x)
        if self._layout == "NLC":
            return x[:, self._prefix_tokens :]
        return x.flatten(1, 2) if self._layout == "NHWC" else x.flatten(2).transpose(1, 2)

    def as_cached(self, tokens: Tensor) -> Tensor:
        """Return tokens of `forward` as training reads them from the token cache: float32, rounded to `token_dtype`."""
        return as_stored(tokens, self.token_dtype)

    def store_tokens_as(self, dtype: TokenDtype) -> None:
        """Round as the token cache does, see `TowerConfig.token_dtype`."""
        self.token_dtype = dtype

    def frozen_modules(self) -> nn.Sequential:
        """Return the frozen modules at the input, in their order."""
        return nn.Sequential(*self._frozen())

    def skip_frozen(self) -> None:
        """Take the output of `frozen_modules` (B, ...) instead of pixels, but keep them among the tower's weights."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # computes shapes only
            self.input_shape = tuple(self.frozen_modules()(torch.empty(1, *self.input_shape)).shape[1:])
        self.skips_frozen = True

    def detach_frozen(self) -> None:
        """Remove the frozen modules: the tower then takes the output of `frozen_modules` instead of pixels."""
        if self.frozen_blocks:
            self.tail = nn.Identity() if self.frozen_blocks == len(self.blocks) else self.tail
            self.stem, self.blocks, self.frozen_blocks = nn.Identity(), nn.ModuleList(self.trained_blocks), 0

    def _frozen(self) -> list[nn.Module]:
        if not self.frozen_blocks:
            return []
        modules = [self.stem, *list(self.blocks)[: self.frozen_blocks]]
        return [*modules, self.tail] if self.frozen_blocks == len(self.blocks) else modules


def tower_hash(tower: Tower) -> str:
    """Return the SHA-256 of all that determines a tower's tokens: architecture, input, normalization, weights."""
    return module_hash(tower, tower.architecture, tower.image_size, tower.mean, tower.std)


def frozen_hash(tower: Tower) -> str:
    """Return the SHA-256 of everything that determines the output of a tower's frozen modules."""
    about = [tower.architecture, tower.image_size, tower.mean, tower.std, tower.frozen_blocks]
    return module_hash(tower.frozen_modules(), *about)


def module_hash(module: nn.Module, *identity: object) -> str:
    """Return the SHA-256 of a module's tensors and of JSON values that identify its function."""
    return tensors_hash(module.state_dict(), *identity)


def tensors_hash(tensors: Mapping[str, Tensor], *identity: object) -> str:
    """Return the SHA-256 of named tensors, in their order, and of JSON values."""
    digest = hashlib.sha256(json.dumps(identity).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # Viewed as bytes, since NumPy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class TowerOptions(NamedTuple):
    """The settings of a tower except for its source; see `TowerConfig`."""

    pretrained: bool = True
    image_size: int | None = None
    quick_gelu: bool | None = None


class WeightsLocation(NamedTuple):
    """The location of a tower's weights: a description, and whether all files that it needs are on this machine."""

    description: str
    is_local: bool


def _built_in_code(name: str, pretrained: bool) -> WeightsLocation:
    return WeightsLocation("built without a file", True)


@dataclass(frozen=True)
class TowerSource:
    """One kind of `tower.source`, written PREFIX:NAME.

    form: how it is written, for messages.  build: makes the tower from NAME; raises CheckpointError where weights are
    missing, do not fill the tower or belong to another architecture.  locate: finds the weights from NAME and
    `pretrained` without loading or downloading them; raises InputError where they cannot be found.  rebuild: makes the
    architecture with random weights from a tower's `description` and an image size, without any file or network, for
    trained networks; None if `build` without `pretrained` needs neither.
    """

    form: str
    build: Callable[[str, TowerOptions], Tower]
    locate: Callable[[str, bool], WeightsLocation] = _built_in_code
    rebuild: Callable[[Mapping[str, Any], int], Tower] | None = None


def checked_size(image_size: int | None, own_size: int, patch: int) -> int:
    """Return the input side, `own_size` by default. Raises ConfigError unless it is a multiple of the patch size."""
    if image_size is not None and image_size % patch:
        raise ConfigError(f"tower.image_size: {image_size} is not a multiple of the tower's patch size, {patch} pixels")
    return image_size or own_size


def refuse_quick_gelu(options: TowerOptions, source: str) -> None:
    """Raise ConfigError if `quick_gelu` is set for a tower without this option."""
    if options.quick_gelu is not None:
        raise ConfigError(f"tower.quick_gelu: {source} is not an open_clip ViT; remove the setting")
