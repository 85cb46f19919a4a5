"""Losses whose value and gradient are those of the whole global batch, however it is split over ranks and
micro-batches.

Focal loss is a sum over lesions divided by the global count. Soft F1 is a ratio of sums, so the sums of the global
batch are taken first and each part then backpropagates a linear surrogate with the exact gradient (see
`soft_f1_surrogate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from triderm_dist.config import LossConfig
from triderm_dist.schema import Outputs

Head = Literal["softmax", "sigmoid"]


def probabilities(logits: torch.Tensor, head: Head) -> torch.Tensor:
    """Probabilities (B, C) in float32 from raw logits (B, C)."""
    return logits.float().softmax(1) if head == "softmax" else logits.float().sigmoid()


def one_hot(labels: torch.Tensor, valid: torch.Tensor, classes: int) -> torch.Tensor:
    """Targets (B, C) float32; a row that is not valid is all zero."""
    return _indicator(labels, classes) * valid[:, None]


def _indicator(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Like `F.one_hot`, which reads the largest label from a CPU tensor and takes five operations."""
    return (labels[:, None] == torch.arange(classes, device=labels.device)).float()


def focal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    head: Head = "softmax",
    gamma: float = 2.0,
    alpha: float | None = None,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Focal loss of each lesion, (B,) float32 (Lin et al. 2017); logits (B, C), labels (B,) int64.

    sigmoid: mean over the C diagnoses of -a (1 - q)^gamma log q, q = p for the lesion's diagnosis and 1 - p for the
    others; a = alpha and 1 - alpha if alpha is given. softmax: -(1 - p_y)^gamma log p_y, and with label smoothing e
    the sum over diagnoses of t_c times that term, t = (1 - e) onehot + e / C. A class weight multiplies the terms
    of its diagnosis as target: in the sigmoid form the positive term alone, so that a rare diagnosis is not pushed
    down harder too.
    """
    logits = logits.float()
    classes = logits.shape[1]
    target = _indicator(labels, classes)
    weights = torch.ones(classes, device=logits.device) if class_weights is None else class_weights
    if head == "softmax":
        target = target * (1 - label_smoothing) + label_smoothing / classes
        log_p = logits.log_softmax(1)
        return -(target * weights * _focus(log_p, gamma) * log_p).sum(1)
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    positive, negative = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    terms = target * weights * positive * _focus(log_p, gamma) * log_p
    terms = terms + (1 - target) * negative * _focus(log_not_p, gamma) * log_not_p
    return -terms.mean(1)


def _focus(log_q: torch.Tensor, gamma: float) -> torch.Tensor:
    """(1 - q) ** gamma; gamma 0 is exactly 1, where the power's gradient at q = 1 would be NaN."""
    if gamma == 0:
        return torch.ones_like(log_q)
    return (-torch.expm1(log_q)).clamp(min=1e-12) ** gamma


def soft_f1_sums(probabilities: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """T = sum p y, P = sum p, Y = sum y of each diagnosis over valid lesions, (3, C) float32 without gradient."""
    p = probabilities.detach().float() * valid[:, None]
    return torch.stack([(p * targets).sum(0), p.sum(0), targets.sum(0)])


def soft_f1_from_sums(sums: torch.Tensor) -> torch.Tensor:
    """1 - mean of F_c = 2 T_c / (P_c + Y_c) over the diagnoses with a positive in the batch; sums (3, C), a scalar."""
    true, predicted, positive = sums
    present = positive > 0
    f1 = 2 * true / (predicted + positive).clamp(min=torch.finfo(sums.dtype).tiny)
    return 1 - (f1 * present).sum() / present.sum().clamp(min=1)


def soft_f1_surrogate(
    probabilities: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor, sums: torch.Tensor
) -> torch.Tensor:
    """A scalar, linear in p, whose gradient is this part's exact share of d(1 - mean F)/dp of the global batch.

    With F = 2T / D and D = P + Y of the global batch, dF/dp_i = (2 y_i - F) / D needs only two global numbers of each
    diagnosis. So each part backpropagates -(1/C') sum_c sum_i p_ic (2 y_ic - F_c) / D_c with F, D fixed and C' the
    diagnoses present in the global batch: no differentiable collective.
    """
    true, predicted, positive = sums
    present = (positive > 0).float()
    denominator = (predicted + positive).clamp(min=torch.finfo(sums.dtype).tiny)
    slope = (2 * targets - 2 * true / denominator) / denominator * present / present.sum().clamp(min=1)
    return -(probabilities.float() * slope * valid[:, None]).sum()


def soft_f1_loss(logits: torch.Tensor, labels: torch.Tensor, head: Head = "softmax") -> torch.Tensor:
    """1 - macro soft F1 over the diagnoses present in the batch, a scalar; logits (B, C), labels (B,).

    The plain form of one undivided batch. `CompoundLoss` computes the same over a split batch.
    """
    p = probabilities(logits, head)
    targets = F.one_hot(labels, logits.shape[1]).float()
    return soft_f1_from_sums(torch.stack([(p * targets).sum(0), p.sum(0), targets.sum(0)]))


class CompoundLoss(nn.Module):
    """focal_weight * focal + soft_f1_weight * soft F1, of the main head and, times aux_weight, of each view's own head.

    Call `sums(outputs, ...)` on every part of the global batch, add them up over micro-batches and ranks, then call the
    module on every part: the sum of what it returns over all parts has value and gradient of the undivided batch.
    """

    class_weights: torch.Tensor
    log_prior: torch.Tensor

    def __init__(self, config: LossConfig, head: Head, class_counts: Sequence[int] | np.ndarray) -> None:
        super().__init__()
        self.config, self.head = config, head
        counts = torch.as_tensor(np.asarray(class_counts), dtype=torch.float32).clamp(min=1)
        share = counts / counts.sum()
        weights = share**-config.class_weight_power
        self.register_buffer("class_weights", weights / weights.mean(), persistent=False)
        self.register_buffer("log_prior", share.log(), persistent=False)
        self.weights = (1.0, config.aux_weight, config.aux_weight)

    def sums(self, outputs: Outputs, labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Soft F1 sums of the three heads, (3 heads, 3, C), without gradient."""
        targets = one_hot(labels, valid, outputs.logits.shape[1])
        return torch.stack([soft_f1_sums(self._probabilities(z), targets, valid) for z in outputs[:3]])

    def forward(
        self, outputs: Outputs, labels: torch.Tensor, valid: torch.Tensor, count: int, sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This part's share of the loss to backpropagate, and of the focal value of the three heads, (3,) detached.

        count: valid lesions of the global batch. sums: (3, 3, C) of the global batch.
        """
        targets = one_hot(labels, valid, outputs.logits.shape[1])
        total = outputs.logits.new_zeros((), dtype=torch.float32)
        focal_parts = []
        for weight, logits, head_sums in zip(self.weights, outputs[:3], sums, strict=True):
            focal = (self._focal(logits, labels) * valid).sum() / count
            surrogate = soft_f1_surrogate(self._probabilities(logits), targets, valid, head_sums)
            total = total + weight * (self.config.focal_weight * focal + self.config.soft_f1_weight * surrogate)
            focal_parts.append(focal.detach())
        return total, torch.stack(focal_parts)

    def values(self, focal: torch.Tensor, sums: torch.Tensor) -> dict[str, float]:
        """The loss and its parts as numbers, from the focal values (3,) and the sums (3, 3, C) of the global batch."""
        soft_f1 = torch.stack([soft_f1_from_sums(head_sums) for head_sums in sums])
        heads = self.config.focal_weight * focal + self.config.soft_f1_weight * soft_f1
        numbers = torch.cat([focal[:1], soft_f1[:1], heads]).tolist()
        aux = numbers[3] + numbers[4]
        return {
            "loss": numbers[2] + self.config.aux_weight * aux,
            "focal": numbers[0],
            "soft_f1": numbers[1],
            "aux": aux,
        }

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return probabilities(self._adjusted(logits), self.head)

    def _focal(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        c = self.config
        return focal_loss(
            self._adjusted(logits), labels, self.head, c.gamma, c.alpha, self.class_weights, c.label_smoothing
        )

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        """Logit adjustment while training, logits + tau log(prior) (Menon et al. 2021)."""
        tau = self.config.logit_adjustment
        return logits if tau == 0 else logits + tau * self.log_prior
