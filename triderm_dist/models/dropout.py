"""Dropout with one mask per lesion, a function of (seed, epoch, lesion, copy, layer).

A mask is independent of micro-batch, rank, strategy and order, and a second forward pass of the same lesions repeats
it, as needed by the first pass for the loss sums, activation checkpointing and resumed trainings. No random state is
kept. `use_lesion_masks` replaces the dropout modules of a network once; `LesionMasks` passes them the lesions of each
batch.

Element (r, c) of a lesion's activations, with position r and channel c, is dropped if the 32-bit number h_r * m_c
(modulo 2^32) is below p * 2^32. h_r = (k * n_r) >> 32 is a multiply-shift hash (Dietzfelbinger et al. 1997) of the
position with the lesion's 64-bit key k for this layer; m_c and n_r are odd numbers from fixed tables. One integer
multiplication and one comparison per element are cheaper than PyTorch's generators, and compile into one kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from triderm_dist.models.network import SHARED, Network
from triderm_dist.schema import Batch, ConfigError

TABLE = 2**17
"""Largest number of positions, and of channels, of one lesion's activations."""


class LesionDropout(nn.Module):
    """Drop single elements of x (B, ..., D) in training, as `nn.Dropout`.

    keys: (lesions,) int64, see `LesionMasks`; without them masks are drawn from PyTorch's generator.
    B may be a multiple of the number of lesions, with consecutive parts of a lesion, such as windows of an image.
    """

    keys: Tensor | None = None
    positions: Tensor
    channels: Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        scale = 1 / (1 - self.p)
        if self.keys is None:
            return x.masked_fill(self._plain(x), 0.0).mul_(scale)
        numbers, threshold = self._uniform(x), self._threshold
        if x.device.type == "cpu":
            # On a CPU, comparisons and operations on their results take up to 20 times as long as arithmetic.
            below = max(threshold, 1 - 2**31) - 1
            return (x * numbers.clamp_(below, below + 1).sub_(below).to(x.dtype)).mul_(scale)
        return x.masked_fill(numbers < threshold, 0.0).mul_(scale)

    def extra_repr(self) -> str:
        return f"p={self.p}"

    @property
    def _threshold(self) -> int:
        """The number of `_uniform` below which an element is dropped, int32."""
        return int(self.p * 2**32) - 2**31

    def _plain(self, x: Tensor) -> Tensor:
        """Return a mask from PyTorch's generator, broadcastable to `x`."""
        return torch.rand_like(x) < self.p

    def _uniform(self, x: Tensor) -> Tensor:
        """Return uniform int32 numbers of the lesions in new memory, broadcastable to `x`."""
        channels = x.shape[-1]
        return (self._of_positions(x.numel() // channels)[..., None] * self.channels[:channels]).view(x.shape)

    def _of_positions(self, positions: int) -> Tensor:
        """Return a uniform number for each position, (lesions, positions / lesions) int32."""
        assert self.keys is not None
        per_lesion = positions // len(self.keys)
        return ((self.keys[:, None] * self.positions[:per_lesion]) >> 32).to(torch.int32)


class LesionVectorDropout(LesionDropout):
    """Drop whole vectors x[b, ..., :] in training. Applied to attention values: attention dropout with one mask for all
    queries.
    """

    def _plain(self, x: Tensor) -> Tensor:
        return torch.rand_like(x[..., :1]) < self.p

    def _uniform(self, x: Tensor) -> Tensor:
        return self._of_positions(x.numel() // x.shape[-1]).view(*x.shape[:-1], 1)


class LesionDropPath(LesionDropout):
    """Drop x[b] as a whole in training, as timm's `DropPath` (stochastic depth, Huang et al. 2016)."""

    threshold: Tensor
    keep: Tensor
    factors: tuple[Tensor, ...] = ()
    """The factor of each lesion (B,), one tensor per precision, from `LesionMasks`."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        for factors in self.factors:
            if factors.dtype == x.dtype and len(factors) == len(x):
                return x * factors.view(-1, *[1] * (x.ndim - 1))
        if self.keys is None:
            return x * self._scale(~self._plain(x), 1 - self.p, x.dtype)
        # A tensor, since `p` differs between blocks: a Python number would make every block compile separately.
        return x * self._scale(self._uniform(x) >= self.threshold, self.keep, x.dtype)

    def _scale(self, kept: Tensor, share: float | Tensor, dtype: torch.dtype) -> Tensor:
        return (kept.float() / share).to(dtype)  # a small tensor, so that x is read once

    def _plain(self, x: Tensor) -> Tensor:
        return torch.rand_like(x[(slice(None), *[slice(1)] * (x.ndim - 1))]) < self.p

    def _uniform(self, x: Tensor) -> Tensor:
        return self._of_positions(len(x)).view(-1, *[1] * (x.ndim - 1))


def use_lesion_masks(network: nn.Module) -> None:
    """Replace the `nn.Dropout` and timm `DropPath` modules of a network by those of this module, in place.

    Raises ConfigError for another module that draws random numbers.
    """
    for name, module in [*network.named_modules()]:
        kind, p = type(module), getattr(module, "p", 0.0)
        if kind.__name__ == "DropPath":  # by name, since importing timm takes seconds
            replacement: nn.Module = LesionDropPath(module.drop_prob) if module.drop_prob else nn.Identity()
        elif kind is nn.Dropout:
            replacement = LesionDropout(p)
        elif (isinstance(module, _DropoutNd) and p) or (isinstance(module, nn.MultiheadAttention) and module.dropout):
            raise ConfigError(
                f"{type(network).__name__}: {name} is a {kind.__name__}, whose mask cannot be drawn for each lesion; "
                "use nn.Dropout, or set its dropout to 0"
            )
        else:
            continue
        network.set_submodule(name, replacement.train(module.training))


def has_dropout(network: nn.Module) -> bool:
    """Return whether a network drops anything in training, before or after `use_lesion_masks`."""
    return any(isinstance(module, nn.Dropout | LesionDropout) and module.p for module in network.modules())


class LesionMasks:
    """Passes the lesions of each batch to the dropout modules of a network."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        """network: the bare one, after `use_lesion_masks`."""
        self.modules: list[LesionDropout] = []
        self._names: list[list[str]] = []
        self._device = device
        self._path_limits: tuple[Tensor, Tensor] | None = None
        views = network.used_views if isinstance(network, Network) else ()
        modules = [each for each in network.named_modules() if isinstance(each[1], LesionDropout) and each[1].p]
        # Modules that drop whole lesions come first: their factors are computed together.
        for name, module in sorted(modules, key=lambda each: not isinstance(each[1], LesionDropPath)):
            assert isinstance(module, LesionDropout)
            self.modules.append(module)
            # A shared tower gets the photos of all used views one after the other, in one batch.
            shared = views and name.startswith(f"towers.{SHARED}.")
            self._names.append([f"{name}/{view}" for view in views] if shared else [name])
            module.positions, module.channels = _tables(device)
            if isinstance(module, LesionDropPath):
                module.threshold = torch.tensor(module._threshold, dtype=torch.int32, device=device)
                module.keep = torch.tensor(1 - module.p, device=device)

    def draw(self, batch: Batch) -> Tensor | None:
        """Draw the keys of the lesions of `batch`, (names x B,) int64 on the host; None if nothing is dropped or the
        batch has no `draws`.
        """
        if batch.draws is None or not self.modules:
            return None
        drawn = batch.draws([name for names in self._names for name in names])
        return torch.from_numpy(drawn.T.view(np.int64).ravel())

    @contextmanager
    def using(self, keys: Tensor | None) -> Iterator[None]:
        """Use these keys of `draw`, on any device, in forward and backward passes in the block.

        Without keys, masks are drawn from PyTorch's generator.
        """
        if keys is None:
            yield
            return
        on_device = keys.to(self._device, non_blocking=True)
        lesions = len(keys) // sum(map(len, self._names))
        sizes = [len(names) * lesions for names in self._names]
        for module, own in zip(self.modules, on_device.split(sizes), strict=True):
            module.keys = own
        self._set_factors(on_device, lesions)
        try:
            yield
        finally:
            for module in self.modules:
                module.keys = None
                if isinstance(module, LesionDropPath):
                    module.factors = ()

    def _set_factors(self, keys: Tensor, lesions: int) -> None:
        """Compute the factors of all `LesionDropPath` modules together, in few kernels."""
        paths = [module for module in self.modules if isinstance(module, LesionDropPath)]
        if not paths:
            return
        names = [len(names) for names in self._names[: len(paths)]]
        if self._path_limits is None:
            limits = zip(paths, names, strict=True)
            pairs = [(module.threshold, module.keep) for module, number in limits for _ in range(number)]
            thresholds, keeps = zip(*pairs, strict=True)
            self._path_limits = torch.stack(thresholds)[:, None], torch.stack(keeps)[:, None]
        threshold, keep = self._path_limits
        uniform = ((keys[: sum(names) * lesions] * paths[0].positions[0]) >> 32).to(torch.int32)
        exact = (uniform.view(-1, lesions) >= threshold).float() / keep
        parts = [each.split(names) for each in (exact, exact.bfloat16(), exact.half())]
        for module, *factors in zip(paths, *parts, strict=True):
            module.factors = tuple(each.flatten() for each in factors)


@functools.lru_cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return TABLE odd numbers for positions, int64, and for channels, int32."""
    random = np.random.Generator(np.random.Philox(key=0)).integers(0, 2**64, (2, TABLE), np.uint64) | np.uint64(1)
    positions, channels = random.view(np.int64)
    return torch.from_numpy(positions).to(device), torch.from_numpy(channels.astype(np.int32)).to(device)
