"""Losses with the value and gradient of the undivided global batch, however it is split over ranks and micro-batches.

A loss is a weighted list of terms (`LOSS_TERMS`). A term defines what is summed over the lesions of the global batch,
and how its value follows from these sums; `CompoundLoss` derives everything that a split batch needs from that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from triderm_dist.config import LossConfig, build
from triderm_dist.schema import Batch, ConfigError, FineOutputs, Outputs
from triderm_dist.schema.plugins import check_known, check_subclass, described
from triderm_dist.settings import Section

HeadKind = Literal["softmax", "sigmoid"]
"""What turns a head's logits into probabilities: one diagnosis per lesion, or each diagnosis independently."""
Sums = dict[str, torch.Tensor]
"""Sums over the lesions of a batch, or of a part of it: term name -> (heads, ...) float32."""
Count = int | torch.Tensor
"""The valid lesions of a global batch: a number, or in a CUDA graph a scalar on the device, since it may change."""
EXCLUDED_LOGIT = -1e4
"""Logit of a diagnosis outside a lesion's `Batch.class_mask`: in float32 its probability is exactly 0 for both kinds of
head, and it neither gets a gradient nor adds to a loss.
"""


def probabilities(logits: torch.Tensor, head: HeadKind) -> torch.Tensor:
    """Return probabilities (B, C) float32 of raw logits (B, C)."""
    return logits.float().softmax(1) if head == "softmax" else logits.float().sigmoid()


def _one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return one-hot labels (B, C) float32. `F.one_hot` reads the largest label first and takes five operations."""
    return (labels[:, None] == torch.arange(classes, device=labels.device)).float()


def focal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    head: HeadKind = "softmax",
    gamma: float = 2.0,
    alpha: float | None = None,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    class_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the focal loss of each lesion, (B,) float32 (Lin et al. 2017).

    logits: (B, C).  labels: (B,) int64, or target distributions (B, C) float that sum to 1, as mixing lesions gives.

    softmax: the sum over the C diagnoses of -t_c (1 - p_c)^gamma log p_c. sigmoid: the mean over them of
    -a t_c (1 - p_c)^gamma log p_c - b (1 - t_c) p_c^gamma log (1 - p_c), with a = alpha and b = 1 - alpha if alpha is
    given, else 1. t is one-hot for labels, and with label smoothing e it becomes (1 - e) t + e / C. A class weight
    multiplies the terms of its diagnosis as target: in the sigmoid form only the positive term, so that a rare
    diagnosis is not pushed down harder too. class_mask (B, C) bool: label smoothing is spread over these diagnoses
    only; the logits of the others are `EXCLUDED_LOGIT`.
    """
    logits = logits.float()
    classes = logits.shape[1]
    target = _one_hot(labels, classes) if labels.ndim == 1 else labels
    weights = torch.ones(classes, device=logits.device) if class_weights is None else class_weights
    if label_smoothing:
        among = classes if class_mask is None else class_mask.sum(1, keepdim=True)
        target = target * (1 - label_smoothing) + label_smoothing / among
        target = target if class_mask is None else target * class_mask
    if head == "softmax":
        log_p = logits.log_softmax(1)
        return -(target * weights * _focus(log_p, gamma) * log_p).sum(1)
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    positive, negative = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    terms = target * weights * positive * _focus(log_p, gamma) * log_p
    terms = terms + (1 - target) * negative * _focus(log_not_p, gamma) * log_not_p
    return -terms.mean(1)


def _focus(log_q: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return (1 - q) ** gamma; gamma 0 gives exactly 1, where the power's gradient at q = 1 would be NaN."""
    if gamma == 0:
        return torch.ones_like(log_q)
    return (-torch.expm1(log_q)).clamp(min=1e-12) ** gamma


def soft_f1_from_sums(sums: torch.Tensor) -> torch.Tensor:
    """Compute 1 - mean of F_c = 2 T_c / (P_c + Y_c) over the diagnoses with a positive in the batch, a scalar.

    sums: (3, C), of each diagnosis T = sum p y, P = sum p, Y = sum y over lesions.
    """
    true, predicted, positive = sums
    present = positive > 0
    f1 = 2 * true / torch.where(present, predicted + positive, 1.0)
    return 1 - (f1 * present).sum() / present.sum().clamp(min=1)


def soft_f1_loss(logits: torch.Tensor, labels: torch.Tensor, head: HeadKind = "softmax") -> torch.Tensor:
    """Compute 1 - macro soft F1 over the diagnoses present in the batch, a scalar; logits (B, C), labels (B,).

    For one undivided batch. `CompoundLoss` computes the same over a split batch.
    """
    p = probabilities(logits, head)
    targets = F.one_hot(labels, logits.shape[1]).float()
    return soft_f1_from_sums(torch.stack([(p * targets).sum(0), p.sum(0), targets.sum(0)]))


@dataclass(frozen=True)
class LossInputs:
    """Inputs of a term: the logits of one head, and the lesions that they belong to.

    logits: (B, C) float32, with the logit adjustment of `train.loss`, and `EXCLUDED_LOGIT` outside `batch.class_mask`.
    batch: the lesions; `batch.labels` (B,) are all known.  targets: what the network is to predict, one-hot labels, or
    the distributions of mixed lesions, (B, C) float32.  outputs: all outputs of the network, for terms that compare
    views or features; the logits of a view that the task lacks are None.
    """

    logits: torch.Tensor
    head: HeadKind
    batch: Batch
    targets: torch.Tensor
    outputs: Outputs | FineOutputs

    @property
    def probabilities(self) -> torch.Tensor:
        """(B, C) float32."""
        return probabilities(self.logits, self.head)


class LossTerm(nn.Module, ABC):
    """A term of the loss. By default the mean of `per_lesion` over the lesions of the global batch.

    A subclass that overrides `value` may be any differentiable function of sums over lesions, such as a ratio. Padding,
    weights of lesions, ranks and micro-batches are handled by `CompoundLoss`.

    A term depends on the batch alone. It has no parameters, and its buffers and attributes keep the values of
    `__init__`: how often it is called depends on the split of the batch, and no checkpoint holds it.
    """

    each_head: ClassVar[bool] = True
    """Whether the auxiliary heads have the term too; False for a term that reads `LossInputs.outputs`."""

    class Settings(Section):
        """Settings of the term, read from train.loss.terms.NAME.settings."""

    def __init__(self, settings: Section, class_counts: torch.Tensor) -> None:
        """class_counts: (C,) float training lesions of each diagnosis, of all sets; 0 for one that none has."""
        super().__init__()
        self.settings = settings

    @abstractmethod
    def per_lesion(self, inputs: LossInputs) -> torch.Tensor:
        """Return what is summed over lesions, with gradient: (B,), or (B, ...) for a `value` of several sums, of the
        same shape (...) in every batch.
        """

    def value(self, sums: torch.Tensor, count: Count) -> torch.Tensor:
        """Compute the term's value, a scalar, from the sums (...) over all `count` lesions of the global batch."""
        return sums / count

    @property
    def is_mean(self) -> bool:
        """Whether the gradient can be computed before the sums are known."""
        return type(self).value is LossTerm.value


class Focal(LossTerm):
    """`focal_loss`, or cross-entropy where gamma is 0."""

    settings: LossConfig
    class_weights: torch.Tensor

    def __init__(self, settings: LossConfig, class_counts: torch.Tensor) -> None:
        super().__init__(settings, class_counts)
        weights = (class_counts.clamp(min=1) / class_counts.sum()) ** -settings.class_weight_power
        # Mean 1 over the training lesions, so that the power alone does not change the weight of the term as a whole.
        mean = (class_counts * weights).sum() / class_counts.sum()
        self.register_buffer("class_weights", weights / mean, persistent=False)

    def per_lesion(self, inputs: LossInputs) -> torch.Tensor:
        c = self.settings
        return focal_loss(
            inputs.logits, inputs.targets, inputs.head, c.gamma, c.alpha, self.class_weights, c.label_smoothing,
            inputs.batch.class_mask,
        )  # fmt: skip


class SoftF1(LossTerm):
    """`soft_f1_loss`."""

    def per_lesion(self, inputs: LossInputs) -> torch.Tensor:
        p, y = inputs.probabilities, inputs.targets
        return torch.stack([p * y, p, y], 1)

    def value(self, sums: torch.Tensor, count: Count) -> torch.Tensor:
        return soft_f1_from_sums(sums)


class Fine(LossTerm):
    """Cross-entropy of the finer labels, over lesions that have one; the mean is over all lesions."""

    each_head = False

    def per_lesion(self, inputs: LossInputs) -> torch.Tensor:
        labels = inputs.batch.fine
        assert isinstance(inputs.outputs, FineOutputs) and labels is not None
        return -(labels * inputs.outputs.fine.float().log_softmax(1)).sum(1)


BUILT_IN: dict[str, type[LossTerm]] = {"focal": Focal, "soft_f1": SoftF1}
"""Terms that every training has, with the weight `train.loss.NAME_weight` and settings in `train.loss`."""
LOSS_TERMS: dict[str, type[LossTerm]] = {}
"""Terms for `train.loss.terms`, by name; plugins add theirs."""


def is_built_in(name: str) -> bool:
    """Return whether a term is not one of `train.loss.terms`."""
    return name in (*BUILT_IN, "fine")


@dataclass(frozen=True)
class DrawnLesions:
    """The lesions that an epoch draws on average, for the priors of the logit adjustment.

    masks: (G, C) bool, the different class masks of lesions.  totals: (G, C) lesions of each diagnosis that have this
    mask, with repeats, each times its weight relative to the mean weight of those with this mask.
    """

    masks: np.ndarray
    totals: np.ndarray


class CompoundLoss(nn.Module):
    """Weighted sum of terms, of the main head and, times `aux_weight`, of the auxiliary heads.

    Over a split batch it needs no differentiable collective. The loss is L = f(S), S the sums over all lesions of the
    global batch, S = sum of the parts' sums s. By the chain rule a parameter's gradient is the sum over parts of
    f'(S) . ds, so that a part needs only the numbers S from the others:

    1. `sums` of each part, added up without gradient over micro-batches and ranks;
    2. `slopes`, f'(S), once;
    3. `surrogate` of each part, the linear function f'(S) . s: its gradient is the part's share of the exact one;
    4. `values` for the log.

    For a mean over a known number of lesions f' does not depend on S: without `ratios`, `slopes` needs no sums.

    Lesions of an extra set have a class mask and a weight w. The diagnoses outside the mask, which the set does not
    distinguish, leave the lesion's softmax, sigmoids and soft F1 sums: its probabilities are p_c = exp z_c / sum of
    exp z_k over the mask (ER-ACE, Caccia et al. 2022; for sigmoids the masked loss of Cohen et al. 2020). Everything
    that is summed over lesions is multiplied by w; means still divide by the number of lesions.

    The logit adjustment of training, logits + tau log(prior) (Menon et al. 2021), takes the prior of the distribution
    that lesions are drawn from, with repeats and weights, among the lesions with the same class mask: sets that
    distinguish other diagnoses have shares of their own, and one prior for all would favor diagnoses that a large
    extra set leaves out.

    Raises ConfigError for an unknown term, wrong settings of a term, or weights that are all 0.
    """

    masks: torch.Tensor
    log_priors: torch.Tensor

    def __init__(
        self,
        config: LossConfig,
        head: HeadKind,
        class_counts: Sequence[int] | np.ndarray,
        heads: int = 3,
        drawn: DrawnLesions | None = None,
    ) -> None:
        """class_counts: (C,) training lesions of each diagnosis.  heads: of the network, the main one and one per view.
        drawn: None if each lesion is drawn once, with weight 1, and all diagnoses are distinguished.
        """
        super().__init__()
        self.config, self.head, self.heads = config, head, heads
        counts = torch.as_tensor(np.asarray(class_counts), dtype=torch.float32)
        self.classes = len(counts)
        masks, totals = torch.ones(1, self.classes, dtype=torch.bool), counts[None]
        if drawn:
            masks, totals = torch.as_tensor(drawn.masks), torch.as_tensor(drawn.totals, dtype=torch.float32)
        totals = torch.where(totals > 0, totals, 1.0)  # a diagnosis without lesions: as if it had one
        self.register_buffer("masks", masks, persistent=False)
        self.register_buffer("log_priors", (totals / totals.sum(1, keepdim=True)).log(), persistent=False)
        self.weights = {name: float(getattr(config, f"{name}_weight")) for name in BUILT_IN}
        self.terms = nn.ModuleDict({name: kind(config, counts) for name, kind in BUILT_IN.items()})
        if config.fine_weight:
            self.weights["fine"], self.terms["fine"] = config.fine_weight, Fine(Section(), counts)
        for name, term in config.terms.items():
            self.weights[name], self.terms[name] = term.weight, _build_term(name, term.settings, counts)
        if not any(self.weights.values()):
            raise ConfigError("train.loss: the weight of every term is 0; set one")
        self._initial = {name: _state(self.terms[name]) for name in config.terms}
        for name, built in self._terms():
            if built.is_mean:
                of_heads = torch.full((self._num_heads(built),), self.weights[name])
                of_heads[1:] *= config.aux_weight
                self.register_buffer(_mean_weights(name), of_heads, persistent=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts that `values` returns in addition to the loss."""
        return (*self.terms, "aux")

    @property
    def ratios(self) -> tuple[str, ...]:
        """Names of the terms whose slopes depend on the sums of the global batch."""
        return tuple(name for name, term in self._active() if not term.is_mean)

    def sums(self, outputs: Outputs | FineOutputs, batch: Batch) -> Sums:
        """Return the sums of each term over the valid lesions of a part, with gradient."""
        targets = _one_hot(batch.labels, self.classes) if batch.targets is None else batch.targets
        inputs = [
            LossInputs(self._adjusted(logits, batch), self.head, batch, targets, outputs) for logits in outputs.heads
        ]
        return {
            name: torch.stack(
                [_weighted_sum(_rows(name, term, each), batch) for each in inputs[: self._num_heads(term)]]
            )
            for name, term in self._terms()
        }

    def check_unchanged(self) -> None:
        """Raise ConfigError if a plugin's term has changed its own state. Waits for the device."""
        for name, before in self._initial.items():
            now = _state(self.terms[name])
            for key in before:
                if not _equal(before[key], now.get(key)):
                    raise ConfigError(
                        f"train.loss.terms.{name}: changes its {key} in training, which no checkpoint holds and which "
                        "depends on how the batch is split; compute it from the batch alone"
                    )

    @torch.enable_grad()
    def slopes(self, sums: Sums, count: Count) -> Sums:
        """Return df/dS of each term with a weight; sums: over the global batch, count: its valid lesions."""
        found, at, parts = Sums(), {}, []
        for name, term in self._active():
            if term.is_mean:
                found[name] = self.get_buffer(_mean_weights(name)) / count
                continue
            found[name] = at[name] = sums[name].detach().requires_grad_()
            main, *aux = self._head_values(name, term, at[name], count)
            if not main.requires_grad:
                raise ConfigError(f"train.loss.terms.{name}: value has no gradient; compute it from the sums by torch")
            parts.append(self.weights[name] * (main + self.config.aux_weight * sum(aux)))
        if at:
            found |= zip(at, torch.autograd.grad(torch.stack(parts).sum(), list(at.values())), strict=True)
        return found

    def surrogate(self, sums: Sums, slopes: Sums) -> torch.Tensor:
        """Return the scalar that a part backpropagates, of which only the gradient means something.

        sums: of the part, with gradient.
        """
        total = torch.stack([(slope * sums[name]).sum() for name, slope in slopes.items()]).sum()
        if not total.requires_grad:
            raise ConfigError(
                f"train.loss: {', '.join(slopes)}: no gradient; compute the terms from the outputs by torch"
            )
        return total

    @torch.no_grad()
    def values(self, sums: Sums, count: int) -> dict[str, float]:
        """Return the loss and its parts as numbers: each term of the main head, and as aux the terms of the others.

        sums, count: of the global batch. Waits for the device.
        """
        numbers = {
            name: torch.stack(self._head_values(name, term, sums[name], count)).tolist() for name, term in self._terms()
        }
        main = {name: values[0] for name, values in numbers.items()}
        aux = sum(self.weights[name] * sum(values[1:]) for name, values in numbers.items())
        loss = sum(self.weights[name] * value for name, value in main.items()) + self.config.aux_weight * aux
        return {"loss": loss, **main, "aux": aux}

    def _terms(self) -> list[tuple[str, LossTerm]]:
        return list(self.terms.items())  # type: ignore[arg-type]

    def _active(self) -> list[tuple[str, LossTerm]]:
        return [(name, term) for name, term in self._terms() if self.weights[name]]

    def _num_heads(self, term: LossTerm) -> int:
        """Return the number of heads that have a term."""
        return self.heads if term.each_head else 1

    def _head_values(self, name: str, term: LossTerm, sums: torch.Tensor, count: Count) -> list[torch.Tensor]:
        """Return the value of a term for each head that has it, scalars."""
        values = [term.value(each, count) for each in sums.unbind(0)]
        if any(not isinstance(value, torch.Tensor) or value.ndim for value in values):
            raise ConfigError(f"train.loss.terms.{name}: value must return a tensor without dimensions, a scalar")
        return values

    def _adjusted(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Apply the logit adjustment of training and the class mask."""
        logits = logits.float()
        if tau := self.config.logit_adjustment:
            logits = logits + tau * self._log_prior(batch)
        return logits if batch.class_mask is None else logits.masked_fill(~batch.class_mask, EXCLUDED_LOGIT)

    def _log_prior(self, batch: Batch) -> torch.Tensor:
        """Return the logarithm of the prior of each lesion, (B, C), or of all, (C,)."""
        if batch.class_mask is None:
            return self.log_priors[0]
        return self.log_priors[(batch.class_mask[:, None] == self.masks).all(2).int().argmax(1)]


def _mean_weights(name: str) -> str:
    """Return the name of the buffer with the weight of a mean's term for each head."""
    return f"mean_weights_{name}".replace(".", "_")


def _build_term(name: str, settings: dict[str, object], class_counts: torch.Tensor) -> LossTerm:
    if is_built_in(name):
        raise ConfigError(f"train.loss.terms: {name} is built in; set train.loss.{name}_weight instead")
    check_known("train.loss.terms", name, LOSS_TERMS, "a loss term")
    kind = LOSS_TERMS[name]
    check_subclass("train.loss.terms", name, kind, LossTerm, "LOSS_TERMS")
    try:
        term = kind(build(kind.Settings, settings), class_counts)
    except ConfigError as error:
        raise ConfigError(f"train.loss.terms.{name}.settings: {error}") from None
    if trained := next(term.named_parameters(), None):
        raise ConfigError(
            f"train.loss.terms.{name}: no optimizer trains its parameter {trained[0]}; make it a buffer, or train it "
            "in a network"
        )
    return term


def _state(term: nn.Module) -> dict[str, object]:
    """Return what a term could change: its plain attributes, and copies of its tensors and buffers on the host."""
    attributes = {key: each for key, each in vars(term).items() if key != "training"}
    plain = {key: each for key, each in attributes.items() if isinstance(each, int | float | str)}
    tensors = {key: each for key, each in attributes.items() if isinstance(each, torch.Tensor)}
    return plain | {key: each.detach().cpu().clone() for key, each in (tensors | dict(term.named_buffers())).items()}


def _equal(one: object, other: object) -> bool:
    both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return torch.equal(one, other) if both else one == other  # type: ignore[arg-type]


def _rows(name: str, term: LossTerm, inputs: LossInputs) -> torch.Tensor:
    """Return `term.per_lesion`. Raises ConfigError for another shape."""
    rows, lesions = term.per_lesion(inputs), len(inputs.logits)
    if not isinstance(rows, torch.Tensor) or rows.shape[:1] != (lesions,) or (term.is_mean and rows.ndim > 1):
        returned, expected = described(rows), f"({lesions},)" if term.is_mean else f"({lesions}, ...)"
        raise ConfigError(
            f"train.loss.terms.{name}: per_lesion returned {returned}, not a tensor {expected} of the lesions"
        )
    if not rows.is_floating_point():
        raise ConfigError(f"train.loss.terms.{name}: per_lesion returned {rows.dtype}, which has no gradient")
    return rows


def _weighted_sum(rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum over lesions times their weights, (B, ...) -> (...) float32, excluding rows that pad the batch."""
    shape = (-1, *[1] * (rows.ndim - 1))
    rows = rows.float()
    if batch.weights is not None:
        rows = rows * batch.weights.view(shape)
    return torch.where(batch.valid.view(shape), rows, 0.0).sum(0)
