"""A trained network with plain tensors as inputs and outputs, for ONNX and `torch.export` files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from triderm_dist.inference.networks import LoadedModel
from triderm_dist.losses import HeadKind, probabilities
from triderm_dist.models.network import Network
from triderm_dist.schema import VIEWS

PRESENT, CONCEPTS, METADATA = "view_present", "concepts", "metadata"
"""Names of the inputs other than views."""


class ExportedNetwork(nn.Module):
    """Map the inputs that a network uses to its outputs, all of them tensors with the lesions in the first axis.

    network: takes pixels; in evaluation mode, on the CPU.  size: S.  temperature: divides the logits before they become
    probabilities.

    inputs, in this order, as far as the network uses them: the pixels of each view (B, 3, S, S) float32, normalized;
    `view_present` (B, V) bool of these views; `concepts` (B, K) and `metadata` (B, M) float32, NaN where missing.
    Pixels of a view that is not present have no effect, but must be finite.
    outputs: `probabilities` and `logits` (B, C), `aux_VIEW` (B, C) of each view of the task, `features` (B, D).
    """

    def __init__(self, network: Network, head: HeadKind, size: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.network, self.head, self.size, self.temperature = network, head, size, temperature
        self.signature, self.views = network.signature, network.used_views
        self.inputs = (
            *self.views,
            *([PRESENT] if self.views else []),
            *([CONCEPTS] if network.used_concepts else []),
            *([METADATA] if network.used_fields else []),
        )
        self.outputs = ("probabilities", "logits", *(f"aux_{view}" for view in self.signature.views), "features")
        self.eval()

    @classmethod
    def of(cls, loaded: LoadedModel, number: int, temperature: float = 1.0) -> ExportedNetwork:
        """Take one network of a model that was loaded by `share=False`."""
        return cls(loaded.networks[number], loaded.config.head, loaded.preprocessing.size, temperature)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, inputs, strict=True))
        lesions, like = inputs[0].shape[0], inputs[-1]
        none = torch.zeros(lesions, 0, device=like.device)
        absent = torch.zeros(lesions, dtype=torch.bool, device=like.device)
        present = dict(zip(self.views, given[PRESENT].unbind(1), strict=True)) if self.views else {}
        result = self.network(
            *(given.get(view, none) for view in VIEWS),
            torch.stack([present.get(view, absent) for view in VIEWS], 1),
            given.get(CONCEPTS, none),
            given.get(METADATA, none),
        )
        aux = [logits for logits in (result.aux_clinical, result.aux_dermoscopic) if logits is not None]
        return probabilities(result.logits / self.temperature, self.head), result.logits, *aux, result.features

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
        drawn = {view: 4 * uniform(lesions, 3, self.size, self.size) - 2 for view in self.views}
        drawn[PRESENT] = uniform(lesions, len(self.views)) > 1 / 3
        drawn[CONCEPTS] = with_gaps(uniform(lesions, len(self.signature.concepts)))
        drawn[METADATA] = with_gaps(torch.stack(fields, 1) if fields else uniform(lesions, 0))
        return tuple(drawn[name] for name in self.inputs)


def describe_network(network: ExportedNetwork) -> dict[str, Any]:
    """Return, as JSON types, the inputs and outputs of a network in their order."""
    signature, size = network.signature, network.size
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
