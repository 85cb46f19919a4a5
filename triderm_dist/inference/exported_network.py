"""A trained network on plain tensors, with its frozen tower: what ONNX and `torch.export` files hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from triderm_dist.config import Experiment
from triderm_dist.engine.checkpoint import load_weights, read_info
from triderm_dist.engine.fold import fold_tower, model_config
from triderm_dist.engine.views import open_tower
from triderm_dist.losses import HeadKind, probabilities
from triderm_dist.models import build_network, build_towers
from triderm_dist.models.network import Network
from triderm_dist.models.towers import Tower
from triderm_dist.schema import VIEWS, DataError
from triderm_dist.tasks import recorded_task

PRESENT, CONCEPTS, METADATA = "view_present", "concepts", "metadata"
"""Names of the inputs besides the views."""


class ExportedNetwork(nn.Module):
    """Map the inputs that a network uses to its outputs, all of them tensors with the lesions in the first axis.

    network: in evaluation mode, on the CPU.  temperature: divides the logits before they become probabilities.
    frozen: the tower whose tokens the network takes, None where it holds its towers.

    inputs, in this order, as far as the network uses them: the pixels of each view (B, 3, S, S) float32, normalized;
    `view_present` (B, V) bool of these views; `concepts` (B, K) and `metadata` (B, M) float32, NaN where missing.
    Pixels of a view that is not present have no effect, but must be finite.
    outputs: `probabilities` and `logits` (B, C), `aux_VIEW` (B, C) of each view of the task, `features` (B, D).
    """

    def __init__(self, network: Network, head: HeadKind, temperature: float = 1.0, frozen: Tower | None = None) -> None:
        super().__init__()
        self.network, self.frozen, self.head, self.temperature = network, frozen, head, temperature
        self.signature, self.views = network.signature, network.used_views
        self.inputs = (
            *self.views,
            *([PRESENT] if self.views else []),
            *([CONCEPTS] if network.used_concepts else []),
            *([METADATA] if network.used_fields else []),
        )
        self.outputs = ("probabilities", "logits", *(f"aux_{view}" for view in self.signature.views), "features")
        self.eval()

    @property
    def tower(self) -> Tower | None:
        """One of the network's towers, for its input size and normalization; None where it uses no view."""
        return self.frozen or next(iter(self.network._towers()), None)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, inputs, strict=True))
        lesions, like = inputs[0].shape[0], inputs[-1]
        none = torch.zeros(lesions, 0, device=like.device)
        images = {view: self._tokens(given[view]) for view in self.views}
        absent = torch.zeros(lesions, dtype=torch.bool, device=like.device)
        present = dict(zip(self.views, given[PRESENT].unbind(1), strict=True)) if self.views else {}
        result = self.network(
            *(images.get(view, none) for view in VIEWS),
            torch.stack([present.get(view, absent) for view in VIEWS], 1),
            given.get(CONCEPTS, none),
            given.get(METADATA, none),
        )
        aux = [logits for logits in (result.aux_clinical, result.aux_dermoscopic) if logits is not None]
        return probabilities(result.logits / self.temperature, self.head), result.logits, *aux, result.features

    def _tokens(self, pixels: Tensor) -> Tensor:
        """Return what the network takes of a view: its pixels, or the tokens of the frozen tower.

        Tokens are rounded to float16, as the token cache holds them.
        """
        return pixels if self.frozen is None else self.frozen(pixels).half().float()

    def example(self, lesions: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Draw random inputs of B lesions, about a third of the views, concepts and metadata values missing."""
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        def with_gaps(values: Tensor) -> Tensor:
            return values.masked_fill(uniform(*values.shape) < 1 / 3, torch.nan)

        fields = [
            field.low + (field.high - field.low) * uniform(lesions)
            if field.is_number
            else (uniform(lesions) * len(field.categories)).floor()
            for field in self.signature.fields
        ]
        size = self.tower.image_size if self.tower else 0
        drawn = {view: 4 * uniform(lesions, 3, size, size) - 2 for view in self.views}
        drawn[PRESENT] = uniform(lesions, len(self.views)) > 1 / 3
        drawn[CONCEPTS] = with_gaps(uniform(lesions, len(self.signature.concepts)))
        drawn[METADATA] = with_gaps(torch.stack(fields, 1) if fields else uniform(lesions, 0))
        return tuple(drawn[name] for name in self.inputs)


def load_exported(experiment: Experiment, name: str, fold: int, temperature: float = 1.0) -> ExportedNetwork:
    """Load the network of one fold of one model, with its frozen tower if it has one.

    Raises DataError where the fold is not trained, CheckpointError for damaged weights.
    """
    folder, model = experiment.fold_folder(name, fold), model_config(experiment, name)
    if not (folder / "fold.json").exists():
        raise DataError(f"{folder}: this fold is not trained; run triderm crossval first")
    info = read_info(folder / "fold")
    signature = recorded_task(info, str(folder / "fold.json")).signature(info["concepts"])
    tower, frozen = open_tower(experiment, model, fold_tower(folder, info))
    towers = tower.token_shape if frozen else build_towers(model.tower, signature.views, tower.build())
    network = build_network(model, signature, towers)
    load_weights(folder / "weights", network)
    return ExportedNetwork(network, model.head, temperature, frozen)


def describe(network: ExportedNetwork) -> dict[str, Any]:
    """Return, as JSON types, the inputs and outputs of a network in their order."""
    signature, size = network.signature, network.tower.image_size if network.tower else 0
    fields = [
        {"name": field.name, "kind": field.kind, "low": field.low, "high": field.high, "unit": field.unit}
        if field.is_number
        else {"name": field.name, "kind": field.kind, "categories": list(field.categories), "unit": field.unit}
        for field in signature.fields
    ]
    inputs: dict[str, dict[str, Any]] = {
        **{
            view: {"type": "float32", "shape": ["batch", 3, size, size], "missing": "zeros, with view_present false"}
            for view in network.views
        },
        PRESENT: {"type": "bool", "shape": ["batch", len(network.views)], "columns": list(network.views)},
        CONCEPTS: {
            "type": "float32",
            "shape": ["batch", len(signature.concepts)],
            "columns": list(signature.concepts),
            "values": "scores from 0 to 1",
            "missing": "NaN",
        },
        METADATA: {
            "type": "float32",
            "shape": ["batch", len(fields)],
            "columns": fields,
            "values": "numbers as they are, categories by their index",
            "missing": "NaN",
        },
    }
    with torch.no_grad():
        widths = [value.shape[1] for value in network(*network.example(1))]
    outputs = [
        {"name": name, "type": "float32", "shape": ["batch", width]}
        for name, width in zip(network.outputs, widths, strict=True)
    ]
    for output in outputs[:-1]:
        output["columns"] = list(signature.diagnoses)
    return {"inputs": [{"name": name, **inputs[name]} for name in network.inputs], "outputs": outputs}
