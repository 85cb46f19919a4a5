"""The interface of every network: towers or tokens in, `Outputs` out, learned tokens in place of a missing view.

A network is a subclass of `Network` in the table `triderm_dist.models.NETWORKS`. The other packages rely on this:

    Settings           a `Section` with the network's own settings, `models.NAME.settings`; an instance of it is
                       `self.settings`
    __init__           calls `super().__init__(config, signature, towers)`, which registers the towers
    fuse()             tokens of the used views, concepts and metadata to `Outputs`: logits and the auxiliary logits of
                       each view of the task (B, C), raw; features (B, D) with D of the network's choice, which is
                       `config.width` where finer labels are to be learned; all float32. In training, a named tuple
                       with the same fields, further ones behind them, and `heads = Outputs.heads` serves as well:
                       loss terms read `LossInputs.outputs`
    fusion_stages()    modules after the towers that are checkpointed, compiled and sharded (FSDP2) one by one; `fuse`
                       must call them, not their parts; [] for none

and on this of every forward:

    - Lesion b depends on row b of the inputs only (batch norms of trained towers aside).
    - Nothing of a view whose `present` is False reaches the outputs, and the NaN of a missing concept or metadata value
      is replaced before anything is computed with it. `ViewTokens`, `SemanticTokens` and `TabularFeatures` do both.
    - Every trainable parameter takes part in every forward, as DDP requires.
    - Random numbers come from `nn.Dropout`, timm's `DropPath` and the modules of `models.dropout` only. They are off in
      evaluation mode, and draw by lesion in training (`use_lesion_masks`).

What the task lacks (`Signature`: a view, concepts, fields) has no part in the network. What the task has and
`config.use` leaves out, for ablations, has no tower and no projection, and counts as missing.
`triderm predict explain=LESION` draws attention maps of `TriModal` and its subclasses.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triderm_dist.config import LoraConfig, ModelConfig
from triderm_dist.models import network_settings
from triderm_dist.models.concepts import learned_token
from triderm_dist.models.lora import add_lora, merge_lora
from triderm_dist.models.tower import TokenShape, Tower
from triderm_dist.schema import VIEWS, ConfigError, FineOutputs, Outputs, Signature
from triderm_dist.schema.plugins import described
from triderm_dist.settings import Section

SHARED = "shared"
FINE_HEAD = "fine_head."
"""Prefix of the parameters of the head for finer labels."""


def finished_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights for prediction: without the head for finer labels, and with LoRA merged."""
    return {name: tensor for name, tensor in merge_lora(weights).items() if not name.startswith(FINE_HEAD)}


class Network(nn.Module, ABC):
    """Map both views, concepts and metadata of B lesions to `Outputs` in one forward; see the module's contract.

    Given towers (one for both views, or one per view) it takes pixels (B, 3, H, W), and after `skip_frozen` what their
    frozen blocks return; given a `TokenShape` it takes tokens (B, L, width) that a tower computed before. Pixels of a
    missing view must be finite. They pass the tower, so that hiding a photo in training does not change the batch that
    its batch norms see.

    signature: the diagnoses, views, concepts and fields of the task.  used_views, used_concepts, used_fields: those of
    the task that `config.use` does not leave out.  token_shape: of the tokens that `fuse` gets.  settings: an instance
    of `Settings`.

    Raises ConfigError if the task has nothing of what the network is to use.
    """

    Settings: ClassVar[type[Section]] = Section
    reads_mean_tokens: ClassVar[bool] = False
    """Whether `fuse` reads only the mean of a view's tokens; the token cache then holds the mean, as one token."""
    compiled_methods: ClassVar[tuple[str, ...]] = ()
    """Further methods to compile with the blocks: `fuse`, or those that it calls in addition to the fusion stages."""

    def __init__(self, config: ModelConfig, signature: Signature, towers: Sequence[Tower] | TokenShape) -> None:
        super().__init__()
        self.config = config
        self.settings = network_settings(config)
        self.signature = signature
        self.used_concepts = signature.concepts if "concepts" in config.use else ()
        self.used_fields = signature.fields if "metadata" in config.use else ()
        self.used_views: tuple[str, ...] = tuple(view for view in signature.views if view in config.use)
        if not (self.used_views or self.used_concepts or self.used_fields):
            raise ConfigError(
                f"models.NAME.use: the network would have no input; the task has {', '.join(signature.inputs)}"
            )
        self.fine_head: Head | None = None
        self.towers = nn.ModuleDict()
        self.holds_towers = not isinstance(towers, TokenShape)
        self._given_tokens = False
        self._second_stream: torch.cuda.Stream | None = None
        if isinstance(towers, TokenShape):
            self.token_shape = towers
            return
        self.token_shape = TokenShape(towers[0].num_tokens, towers[0].width)
        if not config.tower.shared:
            for view, tower in zip(signature.views, towers, strict=True):
                if view in self.used_views:
                    self.towers[view] = tower
        elif self.used_views:
            self.towers[SHARED] = towers[0]

    def forward(
        self, clinical: Tensor, dermoscopic: Tensor, view_present: Tensor, concepts: Tensor, metadata: Tensor
    ) -> Outputs | FineOutputs:
        """Encode the used views and fuse them.

        clinical, dermoscopic: pixels (B, 3, H, W) or tokens (B, L, width); not read where the task lacks the view.
        view_present: (B, 2) bool, in the order of `VIEWS`.  concepts: (B, K), metadata: (B, M), NaN where missing.
        """
        tokens, present = self._views(clinical, dermoscopic, view_present)
        outputs = self.fuse(tokens, present, concepts, metadata)
        self._check(outputs, view_present.shape[0])
        if not self.training:
            # Further outputs of a plugin's network are for its loss terms only.
            return Outputs(outputs.logits, outputs.aux_clinical, outputs.aux_dermoscopic, outputs.features)
        if self.fine_head is None:
            return outputs
        self._check_fine(outputs)
        return FineOutputs(*outputs, self.fine_head(outputs.features))

    def add_fine_head(self, labels: int) -> None:
        """Add the auxiliary head of F finer labels, a linear layer on the features, for training only.

        `finished_weights` removes it. Features must be `config.width` wide.
        """
        self.fine_head = Head(self.config.width, labels, "softmax", self.config.dropout)

    def add_lora(self, config: LoraConfig) -> None:
        """Train only low-rank updates of the towers' weights, see `models.lora`."""
        for tower in self._towers():
            add_lora(tower, config)

    @abstractmethod
    def fuse(
        self, tokens: dict[str, Tensor], present: dict[str, Tensor], concepts: Tensor, metadata: Tensor
    ) -> Outputs:
        """Compute the outputs.

        tokens: (B, L, width) by view, used views only.  present: (B,) bool by view.  concepts: (B, K), metadata:
        (B, M), NaN where missing.
        """

    @abstractmethod
    def fusion_stages(self) -> list[nn.Module]:
        """Return the modules after the towers that are checkpointed, compiled and sharded one by one."""

    def fit_inputs(self, mean_tokens: Mapping[str, Tensor], concepts: Tensor, metadata: Tensor) -> None:
        """Fit buffers once before training, from the training lesions. The base class has none.

        Called if `reads_mean_tokens`. mean_tokens: {view: (n, width) of the lesions that have it}.
        concepts: (N, K), metadata: (N, M), NaN where missing.
        """

    def parameter_meanings(self) -> dict[str, Any]:
        """Return {prefix of parameter names: what they depend on beyond name and shape}; the longest prefix counts.

        A warm start loads a parameter only from a network with an equal meaning. By default all parameters depend on
        everything in the task.
        """
        fields = [each.meaning() for each in self.used_fields]
        return {"": (self.signature.diagnoses, self.signature.views, self.used_views, self.used_concepts, fields)}

    def add_tower(self, tower: nn.Module) -> None:
        """Add a frozen tower to a network that was built on tokens, which then takes pixels."""
        self.holds_towers = True
        if self.used_views:
            self.towers[SHARED] = tower

    def load_frozen(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load the weights of the towers' frozen blocks. weights: of `Tower.frozen_modules`, by key of the tower."""
        for key, state in weights.items():
            cast("Tower", self.towers[key]).frozen_modules().load_state_dict(state)

    def skip_frozen(self) -> None:
        """Take the output of the towers' frozen blocks as input instead of pixels, see `Tower.skip_frozen`."""
        for tower in self._towers():
            tower.skip_frozen()

    def left_out(self) -> list[str]:
        """Name the parts that are not built because the task lacks their input."""
        has = self.signature.inputs
        return [
            *(f"tower, tokens and auxiliary head of the {view} view" for view in VIEWS if view not in has),
            *(f"input of {name}" for name in ("concepts", "metadata") if name not in has),
        ]

    def blocks(self) -> list[nn.Module]:
        """Return the units of activation checkpointing: trained tower blocks and fusion stages."""
        return [*(block for tower in self._towers() for block in tower.trained_blocks), *self.fusion_stages()]

    def all_blocks(self) -> list[nn.Module]:
        """Return the units of compilation: `blocks`, and the frozen tower blocks that are computed in training."""
        frozen = (list(tower.blocks)[: tower.frozen_blocks] for tower in self._towers() if not tower.skips_frozen)
        return [*(block for blocks in frozen for block in blocks), *self.blocks()]

    def parameter_depths(self) -> dict[str, int]:
        """Return each parameter's distance from the heads, for layer-wise learning rates.

        0: everything after the towers. Block i of a tower with n blocks: n - i. The tower's tail: 1, as its last block.
        Its stem (patch embedding, class token, positions): n + 1.
        """
        depths = {name: 0 for name, _ in self.named_parameters()}
        for name in depths:
            parts = name.split(".")
            if parts[0] == "towers":
                depth = len(self.towers[parts[1]].blocks)  # type: ignore[arg-type]
                depths[name] = {"stem": depth + 1, "tail": 1}.get(parts[2]) or depth - int(parts[3])
        return depths

    def encode(self, clinical: Tensor, dermoscopic: Tensor) -> dict[str, Tensor]:
        """Return the tokens (B, L, width) of each used view, which `forward` takes within `given_tokens`."""
        images = {view: x for view, x in zip(VIEWS, (clinical, dermoscopic), strict=True) if view in self.used_views}
        if not self.holds_towers or self._given_tokens or not images:
            return images
        if SHARED in self.towers:
            # One pass over both views, so that batch norms compute their statistics over both.
            sizes = [pixels.shape[0] for pixels in images.values()]
            tokens = self.towers[SHARED](torch.cat(list(images.values())))
            return dict(zip(images, tokens.split(sizes), strict=True))
        if self._second_stream is None or len(images) < 2:
            return {view: self.towers[view](pixels) for view, pixels in images.items()}
        (first, pixels), (second, other_pixels) = images.items()
        current = torch.cuda.current_stream()
        self._second_stream.wait_stream(current)
        with torch.cuda.stream(self._second_stream):
            other_tokens = self.towers[second](other_pixels)
        tokens = self.towers[first](pixels)
        current.wait_stream(self._second_stream)
        other_tokens.record_stream(current)
        return {first: tokens, second: other_tokens}

    @contextmanager
    def given_tokens(self) -> Iterator[None]:
        """Let `forward` take the tokens of `encode` instead of pixels in the block."""
        self._given_tokens = True
        try:
            yield
        finally:
            self._given_tokens = False

    @contextmanager
    def towers_on_two_streams(self, second: torch.cuda.Stream | None) -> Iterator[None]:
        """Compute the second view's tower on another stream in the block, so that a GPU works on both at the same time.

        The operations are the same. For the capture of a CUDA graph: launched one by one, kernels come too slowly to
        overlap. None: both on the current stream.
        """
        self._second_stream = second
        try:
            yield
        finally:
            self._second_stream = None

    def _views(
        self, clinical: Tensor, dermoscopic: Tensor, view_present: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the tokens (B, L, width) of the used views, and whether each view is present, (B,) bool."""
        present = dict(zip(VIEWS, view_present.unbind(1), strict=True))
        return self.encode(clinical, dermoscopic), present

    def _check(self, outputs: Outputs, lesions: int) -> None:
        """Raise ConfigError for outputs that `fuse` must not return, which could silently change the loss."""
        where = f"models.NAME.kind: fuse of the network {self.config.kind!r} returned"
        fields = getattr(outputs, "_fields", ())[: len(Outputs._fields)]
        if fields != Outputs._fields or not hasattr(outputs, "heads"):
            raise ConfigError(f"{where} a {type(outputs).__name__}, not Outputs")
        diagnoses = len(self.signature.diagnoses)
        for name, logits in zip(Outputs._fields[:3], outputs, strict=False):
            if name != "logits" and name.removeprefix("aux_") not in self.signature.views:
                if logits is not None:
                    raise ConfigError(f"{where} {name}, a view that the task lacks; return None")
            elif logits is None:
                raise ConfigError(f"{where} no {name}; return the main logits for a view without a head of its own")
            elif not isinstance(logits, Tensor) or tuple(logits.shape) != (lesions, diagnoses):
                raise ConfigError(f"{where} {name}, {described(logits)}, not a tensor {(lesions, diagnoses)}")
        features = outputs.features
        if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[0] != lesions:
            raise ConfigError(f"{where} features, {described(features)}, not a tensor ({lesions}, D)")

    def _check_fine(self, outputs: Outputs) -> None:
        """Raise ConfigError for outputs that do not allow a head of finer labels."""
        where = f"train.loss.fine_weight: fuse of the network {self.config.kind!r} returned"
        if further := outputs._fields[len(Outputs._fields) :]:
            raise ConfigError(f"{where} {further[0]} besides Outputs, which excludes finer labels; set it to 0")
        if (width := outputs.features.shape[1]) != self.config.width:
            raise ConfigError(
                f"{where} features of width {width}, and finer labels need those of models.NAME.width, "
                f"{self.config.width}; set it to 0"
            )

    def _towers(self) -> list[Tower]:
        return list(self.towers.values())  # type: ignore[arg-type]


class ViewTokens(nn.Module):
    """Normalize and project a view's tokens, (B, L, width) to (B, L, D); learned tokens where the view is missing.

    used: False if the network does not use the view; every lesion then gets the learned tokens.
    """

    def __init__(self, shape: TokenShape, width: int, used: bool) -> None:
        super().__init__()
        self.missing = learned_token(1, shape.num_tokens, width)
        self.project = nn.Sequential(nn.LayerNorm(shape.width), nn.Linear(shape.width, width)) if used else None

    def forward(self, tokens: Tensor | None, present: Tensor) -> Tensor:
        if self.project is None or tokens is None:
            return self.missing.expand(present.shape[0], -1, -1)
        tokens = tokens.to(self.missing.dtype)
        # Not in evaluation, so that predictions of finished runs stay equal bit for bit.
        project = self._project_fixed if self.training and not tokens.requires_grad else self.project
        return torch.where(present[:, None, None], project(tokens), self.missing)

    def _project_fixed(self, tokens: Tensor) -> Tensor:
        """Return `self.project(tokens)` for tokens that need no gradient, up to rounding.

        W (g x + b) + c = (W g) x + (W b + c), with x the tokens normalized without scale and shift. The backward pass
        then needs only the gradient of the small matrix W g, instead of that of the normalized tokens, a matrix
        product as large as the forward pass.
        """
        norm, linear = cast("nn.Sequential", self.project)
        assert isinstance(norm, nn.LayerNorm) and isinstance(linear, nn.Linear)
        normalized = F.layer_norm(tokens, norm.normalized_shape, eps=norm.eps)
        bias = linear.bias + (linear.weight * norm.bias).sum(1)
        return F.linear(normalized, linear.weight * norm.weight, bias)


class Head(nn.Module):
    """Classify features, (B, D) to logits (B, C), in float32 also under autocast.

    classes: C.  kind: softmax or sigmoid. The bias of a sigmoid head starts at the prior of one diagnosis in C,
    -log(C - 1); otherwise the negatives, C - 1 of C, dominate the first steps (RetinaNet, Lin et al. 2017).
    """

    def __init__(self, width: int, classes: int, kind: str, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.constant_(self.linear.bias, -math.log(classes - 1) if kind == "sigmoid" else 0.0)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(self.dropout(features.float()), self.linear.weight.float(), self.linear.bias.float())
