"""A small MLP on the concatenated inputs of a lesion: mean tokens of frozen towers, concepts and metadata.

The mean token of each view (of each tower) is projected on its principal components; concepts and metadata are
standardized. Both are fitted once before training, on the training lesions of the fold (`Mlp.fit_inputs`), and stored
with the weights. Training takes seconds, since photos are read as mean tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from triderm_dist.config import ModelConfig
from triderm_dist.models.concepts import learned_token
from triderm_dist.models.dual_cnn import TabularFeatures
from triderm_dist.models.network import Head, Network
from triderm_dist.models.tower import JoinedShape, TokenShape, Tower
from triderm_dist.schema import ConfigError, Outputs, Signature
from triderm_dist.settings import Section

MIN_DEVIATION = 0.1
"""Lower bound of a standard deviation, so that standardized values that are rare or new in prediction stay below 10."""


class MlpSettings(Section):
    components: int = Field(96, ge=1, description="principal components of each view's mean token, by each tower")


class Mlp(Network):
    """Classify principal components of each view's mean token, concepts and metadata by one hidden layer.

    See `Network` for the inputs. A missing view is one learned vector. The auxiliary heads are linear in the components
    of their view. The hidden layer has `config.width` units. Raises ConfigError for towers that train, since principal
    components need fixed tokens.
    """

    Settings = MlpSettings
    settings: MlpSettings
    reads_mean_tokens = True
    compiled_methods = ("fuse",)

    def __init__(self, config: ModelConfig, signature: Signature, towers: Sequence[Tower] | TokenShape) -> None:
        super().__init__(config, signature, towers)
        if self.holds_towers and not config.tower.frozen:
            raise ConfigError("models.NAME.kind mlp takes the tokens of a frozen tower; set models.NAME.tower.frozen")
        width, dropout, classes = config.width, config.dropout, len(signature.diagnoses)
        shape = self.token_shape
        widths = shape.parts if isinstance(shape, JoinedShape) else (shape.width,)
        self.views = nn.ModuleDict(
            {
                view: MeanComponents(widths, self.settings.components, view in self.used_views)
                for view in signature.views
            }
        )
        components = sum(min(width, self.settings.components) for width in widths)
        self.tabular = TabularFeatures(len(self.used_concepts), self.used_fields)
        self.scale = Standardize(self.tabular.flag_of)
        self.hidden = nn.Sequential(
            nn.Linear(len(signature.views) * components + self.tabular.width, width), nn.GELU(), nn.Dropout(dropout)
        )
        self.head = Head(width, classes, config.head, 0.0)
        self.aux_heads = nn.ModuleDict({view: Head(components, classes, config.head, 0.0) for view in signature.views})

    def fuse(
        self, tokens: dict[str, Tensor], present: dict[str, Tensor], concepts: Tensor, metadata: Tensor
    ) -> Outputs:
        views = {view: self.views[view](tokens.get(view), present[view]) for view in self.signature.views}
        parts = list(views.values())
        if self.tabular.width:
            parts.append(self.scale(self.tabular(concepts, metadata)))
        features = self.hidden(torch.cat(parts, 1)).float()
        aux = {view: self.aux_heads[view](values) for view, values in views.items()}
        return Outputs(self.head(features), aux.get("clinical"), aux.get("dermoscopic"), features)

    def fit_inputs(self, mean_tokens: Mapping[str, Tensor], concepts: Tensor, metadata: Tensor) -> None:
        for view in self.used_views:
            self.views[view].fit(mean_tokens[view])  # type: ignore[operator]
        if self.tabular.width:
            self.scale.fit(self.tabular(concepts, metadata))

    def fusion_stages(self) -> list[nn.Module]:
        return []


class Standardize(nn.Module):
    """Standardize the columns (B, F) of `TabularFeatures`, except for flags; missing values become 0, the average."""

    mean: Tensor
    deviation: Tensor
    flag_of: Tensor

    def __init__(self, flag_of: Sequence[int]) -> None:
        """flag_of: as `TabularFeatures.flag_of`."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(flag_of)))
        self.register_buffer("deviation", torch.ones(len(flag_of)))
        self.register_buffer("flag_of", torch.tensor(flag_of, dtype=torch.long), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        missing, is_flag = self._masks(values)
        standardized = ((values - self.mean) / self.deviation).masked_fill(missing, 0.0)
        return torch.where(is_flag, values, standardized)

    def fit(self, values: Tensor) -> None:
        """Set mean and standard deviation of values (N, F), over the lesions that have one."""
        present = (~self._masks(values)[0]).float()
        count = present.sum(0).clamp(min=1)
        mean = (values * present).sum(0) / count
        self.mean.copy_(mean)
        self.deviation.copy_((((values - mean).square() * present).sum(0) / count).sqrt().clamp(min=MIN_DEVIATION))

    def _masks(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the value of a column is missing (B, F), and which columns are flags (F,)."""
        return values[:, self.flag_of] > 0, self.flag_of == torch.arange(len(self.flag_of), device=values.device)


class MeanComponents(nn.Module):
    """Average a view's tokens, (B, L, width), and project them on K principal components, (B, K).

    widths: of the parts of a token; each has up to `components` principal components of its own.
    used: False if the network does not use the view; every lesion then gets the learned vector of a missing view.
    """

    center: Tensor
    basis: Tensor

    def __init__(self, widths: Sequence[int], components: int, used: bool) -> None:
        super().__init__()
        self.parts = [(width, min(width, components)) for width in widths]
        total = sum(number for _, number in self.parts)
        self.missing = learned_token(1, total)
        self.used = used
        if used:
            self.register_buffer("center", torch.zeros(sum(widths)))
            self.register_buffer("basis", torch.zeros(sum(widths), total))

    def forward(self, tokens: Tensor | None, present: Tensor) -> Tensor:
        missing = self.missing.expand(present.shape[0], -1)
        if not self.used or tokens is None:
            return missing
        with torch.autocast(tokens.device.type, enabled=False):
            components = (tokens.float().mean(1) - self.center.float()) @ self.basis.float()
        return torch.where(present[:, None], components, missing)

    def fit(self, values: Tensor) -> None:
        """Fit the principal components of each part of values (N, width), scaled to a mean variance of 1.

        A single lesion has no variance: all components then stay 0.
        """
        if len(values) < 2:
            return
        row = column = 0
        for width, components in self.parts:
            rows, columns = slice(row, row + width), slice(column, column + components)
            center, basis = _principal_components(values[:, rows].double(), components)
            self.center[rows].copy_(center)
            self.basis[rows, columns].copy_(basis)
            row, column = rows.stop, columns.stop


def _principal_components(values: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Return the mean of values (N, D), and their first principal components (D, K), scaled to a mean variance of 1."""
    center = values.mean(0)
    covariance = (values - center).T @ (values - center) / max(1, len(values) - 1)
    variances, directions = torch.linalg.eigh(covariance)
    basis = directions.flip(1)[:, :components]
    basis = basis * basis.gather(0, basis.abs().argmax(0)[None]).sign()  # fixes the sign, which is arbitrary
    variances = variances.flip(0)[:components].clamp(min=0)
    return center, basis / variances.mean().clamp(min=1e-12).sqrt()
