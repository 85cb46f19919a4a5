"""Prepare the blocks of a network for training: grouped casts of weights, activation checkpointing, torch.compile.

`prepare_blocks` replaces the `forward` of each block of a network, from the inside out:

1. torch.compile, block by block, so that compile time does not grow with depth and no key of the state dict changes;
2. under autocast, the weights of linear layers and convolutions are cast together, in one kernel per block instead of
   one per tensor, and so are their gradients. Results equal those of autocast bit for bit. Casts of frozen weights are
   kept; the parameters themselves, which are saved, do not change;
3. activation checkpointing, which recomputes 1 and 2 in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triderm_dist.models.network import Head, Network

RECOMPILE_LIMIT = 128
"""Largest number of compiled graphs per function. All blocks that share a `forward`, such as the stages of a CNN, share
this limit, each with up to three graphs (training, first pass, evaluation). Beyond it (default 8) blocks run eagerly.
"""
_CAST = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
"""Modules whose parameters autocast casts."""

Forward = Callable[..., Any]


def prepare_blocks(
    network: Network,
    activation_checkpointing: bool,
    compile_blocks: bool,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Replace `forward` of the blocks of a network, and compile its other methods, in place.

    backend: of torch.compile.
    """
    if compile_blocks:
        _configure_compiler()
        for name in network.compiled_methods:
            setattr(network, name, torch.compile(getattr(network, name), dynamic=False, backend=backend))
    trained = set(map(id, network.blocks()))
    for module in (inner for block in network.blocks() for inner in block.modules()):
        if isinstance(module, nn.SiLU):
            module.inplace = False  # in place, autograd would copy the input first, which it needs
    for block in network.all_blocks():
        forward: Forward = block.forward
        if compile_blocks:
            # Shapes are static, since the last batch is padded.
            forward = torch.compile(forward, dynamic=False, backend=backend)
        forward = _with_cast_weights(block, forward)
        if activation_checkpointing and id(block) in trained:
            forward = checkpointed(forward)
        block.forward = forward


def checkpointed(forward: Forward) -> Forward:
    """Return `forward` with activation checkpointing."""

    def recomputed(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)

    return recomputed


def _configure_compiler() -> None:
    """Set process-wide options of torch.compile. Imports the compiler, which takes seconds."""
    import torch._dynamo

    config: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(RECOMPILE_LIMIT, getattr(config, name)))
    config.accumulated_recompile_limit = max(2 * RECOMPILE_LIMIT, config.accumulated_recompile_limit)
    # DDP's optimizer would split blocks at bucket boundaries. Blocks are separate graphs, so that gradients are reduced
    # during the backward pass anyway.
    config.optimize_ddp = False


def _with_cast_weights(block: nn.Module, forward: Forward) -> Forward:
    """Return `forward` of a block with its weights cast in one kernel under autocast."""
    slots = _cast_slots(block)
    if not slots:
        return forward
    kept = _KeptCasts()

    def run(*inputs: Any) -> Any:
        device = next((each.device.type for each in inputs if isinstance(each, Tensor)), "cpu")
        if not torch.is_autocast_enabled(device):
            return forward(*inputs)
        weights = [parameters[name] for parameters, name in slots]
        try:
            for (parameters, name), cast in zip(
                slots, kept.cast(weights, torch.get_autocast_dtype(device)), strict=True
            ):
                parameters[name] = cast
            return forward(*inputs)
        finally:
            for (parameters, name), weight in zip(slots, weights, strict=True):
                parameters[name] = weight

    return run


def _cast_slots(block: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Return (parameters of a module, name) of each parameter of a block that autocast casts.

    Excludes those of a `Head`, which computes in float32, and those that a parametrization (LoRA) computes.
    """
    exact = {id(inner) for head in block.modules() if isinstance(head, Head) for inner in head.modules()}
    return [
        (module._parameters, name)
        for module in block.modules()
        if isinstance(module, _CAST) and id(module) not in exact
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


class _KeptCasts:
    """Casts the weights of a block, and keeps the casts of frozen ones."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, int, Tensor]] = {}  # by id of the weight: weight, its version, cast

    def cast(self, weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Return the weights in `dtype`, with gradient if it is on."""
        new = [weight for weight in weights if not self._is_kept(weight, dtype)]
        if new:
            casts: Sequence[Tensor]
            if torch.is_grad_enabled() and any(weight.requires_grad for weight in new):
                casts = _CastTogether.apply(dtype, *new)
            else:
                casts = _cast_together(new, dtype)
            found = {id(weight): cast for weight, cast in zip(new, casts, strict=True)}
            for weight in new:
                if not weight.requires_grad:
                    self._kept[id(weight)] = weight, weight._version, found[id(weight)].detach()
        return [found[id(weight)] if weight.requires_grad else self._kept[id(weight)][2] for weight in weights]

    def _is_kept(self, weight: Tensor, dtype: torch.dtype) -> bool:
        if weight.requires_grad:
            return False
        kept = self._kept.get(id(weight))
        return kept is not None and kept[0] is weight and kept[1] == weight._version and kept[2].dtype == dtype


class _CastTogether(torch.autograd.Function):
    """Cast tensors, and their gradients in the backward pass, in one kernel each on a GPU."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [weight.dtype for weight in weights]
        return tuple(_cast_together(weights, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [gradient for gradient in gradients if gradient is not None]
        found = iter(_cast_together(there, ctx.dtypes[0]))
        return None, *(None if gradient is None else next(found) for gradient in gradients)


def _cast_together(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    casts = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(casts, list(tensors))
    return casts
