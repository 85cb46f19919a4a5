"""Several frozen towers as one: their mean tokens and log-probabilities of trained networks, concatenated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triderm_dist.config import ModelConfig, build
from triderm_dist.data.token_codec import TokenDtype
from triderm_dist.models import build_network
from triderm_dist.models.network import Network
from triderm_dist.models.tower import JoinedShape, TokenShape, Tower, module_hash
from triderm_dist.schema import VIEWS, ConfigError
from triderm_dist.tasks import recorded_task

PARTS = "parts"
"""Key of a joined tower's description."""
NOT_OF_NETWORK = ("train", "init", "extra_towers", "seeds")
"""Settings of a model that do not shape its network."""


class ViewLogits(nn.Module):
    """Log-probabilities from the auxiliary heads of a trained network, for the mean token of one photo.

    The photo is input as each view that the network uses in turn, without concepts and metadata.
    """

    def __init__(self, network: Network, head: str) -> None:
        """network: reads mean tokens, and holds no tower; its main head is removed.  head: its `ModelConfig.head`."""
        super().__init__()
        network.head = nn.Identity()  # `torch.export` cannot save a disabled autocast whose result is not used
        self.network, self.softmax = network, head == "softmax"
        self.width = len(network.used_views) * len(network.signature.diagnoses)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of a trained network that belong to it."""
        own = self.network.state_dict()
        self.network.load_state_dict({name: weights[name] for name in own})

    def forward(self, mean: Tensor) -> Tensor:
        """Map mean tokens (B, 1, D) to (B, 1, width)."""
        network, lesions = self.network, mean.shape[0]
        signature = network.signature
        present = {view: mean.new_full((lesions,), view in network.used_views, dtype=torch.bool) for view in VIEWS}
        concepts, metadata = (
            mean.new_full((lesions, len(columns)), torch.nan) for columns in (signature.concepts, signature.fields)
        )
        outputs = network.fuse(dict.fromkeys(network.used_views, mean), present, concepts, metadata)
        heads = dict(zip(VIEWS, (outputs.aux_clinical, outputs.aux_dermoscopic), strict=True))
        logits = torch.stack([each for view, each in heads.items() if view in network.used_views and each is not None])
        log_p = logits.float().log_softmax(2) if self.softmax else F.logsigmoid(logits.float())
        return log_p.permute(1, 0, 2).flatten(1)[:, None]


@dataclass(frozen=True)
class Part:
    """One of the towers of a joined one.

    record: its `TowerRecord`, as JSON values.  logits_json: the description from which `build_logits` builds `logits`.
    """

    tower: Tower
    record: Mapping[str, Any]
    logits: ViewLogits | None = None
    logits_json: Mapping[str, Any] | None = None

    @property
    def widths(self) -> list[int]:
        """Widths of its mean token and of its logits, if it has some."""
        return [self.tower.width, *([self.logits.width] if self.logits else [])]

    @property
    def weights(self) -> str:
        """The `tower_hash` of its tower."""
        return str(self.record["weights"])

    @property
    def logits_hash(self) -> str:
        """Hash of everything that the log-probabilities depend on, except for the tower."""
        assert self.logits
        return module_hash(self.logits, self.logits_json)


class JoinedTower(Tower):
    """Map pixels (B, 3, H, W) to the concatenated mean tokens of several frozen towers, (B, 1, D).

    All towers read the same pixels. `as_cached` appends log-probabilities. `token_shape.parts` has the order of the
    columns: mean token and log-probabilities of the first part, then those of the second, and so on.
    """

    def __init__(self, parts: Sequence[Part], report: str = "") -> None:
        """parts: with towers in evaluation mode that agree in image size and normalization."""
        first = parts[0].tower
        self._shape = JoinedShape.of([width for part in parts for width in part.widths])
        super().__init__(
            nn.Identity(), [], nn.Identity(),
            width=self._shape.width, num_tokens=1, image_size=first.image_size, mean=first.mean, std=first.std,
            architecture=" | ".join(part.tower.architecture for part in parts),
            description={
                PARTS: [{"tower": part.record, "widths": part.widths, "logits": part.logits_json} for part in parts]
            },
            report=report,
        )  # fmt: skip
        self.parts = tuple(parts)
        self.towers = nn.ModuleList(part.tower for part in parts)
        self.logits = nn.ModuleDict({str(n): part.logits for n, part in enumerate(parts) if part.logits})
        self.freeze(0)

    @property
    def token_shape(self) -> TokenShape:
        return self._shape

    def freeze(self, num_blocks: int) -> None:
        """Freeze everything for any number of blocks, since a joined tower does not train."""
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> JoinedTower:
        nn.Module.train(self, False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean tokens (B, 1, sum of the towers' widths), of tokens as the cache holds them."""
        return torch.cat([part.tower.as_cached(part.tower(x)).mean(1, keepdim=True) for part in self.parts], 2)

    def store_tokens_as(self, dtype: TokenDtype) -> None:
        for part in self.parts:
            part.tower.store_tokens_as(dtype)

    def as_cached(self, tokens: Tensor) -> Tensor:
        means = tokens.float().split([part.tower.width for part in self.parts], 2)
        columns = []
        for part, mean in zip(self.parts, means, strict=True):
            columns.append(mean)
            if part.logits:
                columns.append(part.logits(mean))
        return torch.cat(columns, 2)


def describe_logits(config: ModelConfig, task: Mapping[str, Any], concepts: Sequence[str]) -> dict[str, Any]:
    """Return the description, for JSON, from which `build_logits` builds the auxiliary heads of a trained network."""
    model = config.model_dump(mode="json", exclude=set(NOT_OF_NETWORK))
    return {"model": model, "task": dict(task), "concepts": list(concepts)}


def build_logits(description: Mapping[str, Any], width: int) -> ViewLogits:
    """Build the auxiliary heads that `describe_logits` describes, with random weights. width: of the tower's tokens.

    Raises ConfigError for a network of a missing plugin, and for one without views, or that does not read mean tokens.
    """
    config = build(ModelConfig, description["model"])
    signature = recorded_task(description, "extra_towers").signature(description["concepts"])
    network = build_network(config, signature, TokenShape(1, width))
    if not network.reads_mean_tokens or not network.used_views:
        raise ConfigError(f"logits: a network of kind {config.kind} does not classify the mean tokens of a photo")
    return ViewLogits(network, config.head)
