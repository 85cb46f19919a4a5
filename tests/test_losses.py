"""Losses against slow references written from the formulas, and their split over parts."""

import math

import pytest
import torch

from triderm_dist.config import LossConfig
from triderm_dist.losses import (
    CompoundLoss,
    focal_loss,
    one_hot,
    soft_f1_from_sums,
    soft_f1_loss,
    soft_f1_sums,
    soft_f1_surrogate,
)
from triderm_dist.schema import Outputs

COUNTS = [300, 2500, 40, 500, 50, 50, 9, 450, 700, 470, 47]
C = 11


def some(batch: int, seed: int = 0, classes: int = C) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(batch, classes, dtype=torch.float64) * 2, torch.randint(0, classes, (batch,))


def slow_focal(logits, labels, head, gamma, alpha, weights, smoothing):
    """Number by number."""
    result = []
    for row, y in zip(logits.tolist(), labels.tolist(), strict=True):
        loss = 0.0
        if head == "softmax":
            total = sum(math.exp(z) for z in row)
            for c, z in enumerate(row):
                p = math.exp(z) / total
                target = (1 - smoothing) * (c == y) + smoothing / len(row)
                loss -= weights[c] * target * (1 - p) ** gamma * math.log(p)
            result.append(loss)
        else:
            for c, z in enumerate(row):
                p = 1 / (1 + math.exp(-z))
                if c == y:
                    loss -= weights[c] * (alpha or 1) * (1 - p) ** gamma * math.log(p)
                else:
                    loss -= (1 - alpha if alpha else 1) * p**gamma * math.log(1 - p)
            result.append(loss / len(row))
    return torch.tensor(result)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal(head, gamma):
    logits, labels = some(9)
    alpha = 0.3 if head == "sigmoid" else None
    smoothing = 0.1 if head == "softmax" else 0.0
    weights = torch.rand(C) + 0.5
    got = focal_loss(logits, labels, head, gamma, alpha, weights, smoothing)
    torch.testing.assert_close(
        got, slow_focal(logits, labels, head, gamma, alpha, weights, smoothing), rtol=1e-4, atol=1e-6
    )


def test_focal_gamma_zero_is_cross_entropy():
    logits, labels = some(9)
    torch.testing.assert_close(
        focal_loss(logits, labels, "softmax", 0.0).double().mean(), torch.nn.functional.cross_entropy(logits, labels)
    )


def test_focal_gradient_is_finite_when_sure():
    logits = torch.tensor([[80.0, -80.0], [-80.0, 80.0]], requires_grad=True)
    for head in ("softmax", "sigmoid"):
        for gamma in (0.0, 0.5, 2.0):
            grad = torch.autograd.grad(focal_loss(logits, torch.tensor([0, 0]), head, gamma).sum(), logits)[0]
            assert grad.isfinite().all()


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_soft_f1_against_the_formula(head):
    logits, labels = some(40)
    labels[labels == 4] = 5  # a diagnosis without a positive
    p = (logits.softmax(1) if head == "softmax" else logits.sigmoid()).tolist()
    scores = []
    for c in range(C):
        positive = [i for i, y in enumerate(labels.tolist()) if y == c]
        if positive:
            true = sum(p[i][c] for i in positive)
            scores.append(2 * true / (sum(row[c] for row in p) + len(positive)))
    assert soft_f1_loss(logits, labels, head).item() == pytest.approx(1 - sum(scores) / len(scores), abs=1e-6)


def test_absent_diagnosis_gets_no_gradient_from_soft_f1():
    logits, labels = some(20)
    labels[labels == 4] = 5
    logits.requires_grad_()
    soft_f1_loss(logits, labels, "sigmoid").backward()
    assert logits.grad is not None
    assert (logits.grad[:, 4] == 0).all()
    assert (logits.grad[:, 5] != 0).all()


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("parts", [[40], [10, 30], [7, 7, 7, 7, 12], [1] * 40])
def test_split_soft_f1_has_the_gradient_of_the_whole(head, parts):
    logits, labels = some(40, seed=len(parts))
    whole = logits.clone().requires_grad_()
    soft_f1_loss(whole, labels, head).backward()

    valid = torch.ones(40, dtype=torch.bool)
    probs = (lambda z: z.softmax(1)) if head == "softmax" else torch.sigmoid
    sums = sum(
        soft_f1_sums(probs(z), one_hot(y, v, C), v)
        for z, y, v in zip(logits.split(parts), labels.split(parts), valid.split(parts), strict=True)
    )
    split = logits.clone().requires_grad_()
    for z, y, v in zip(split.split(parts), labels.split(parts), valid.split(parts), strict=True):
        soft_f1_surrogate(probs(z), one_hot(y, v, C), v, sums).backward(retain_graph=True)
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-4, atol=1e-8)
    assert soft_f1_from_sums(sums).item() == pytest.approx(soft_f1_loss(logits, labels, head).item(), abs=1e-6)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("parts", [[24, 16], [5] * 8])
def test_compound_loss_split_with_padding_equals_the_whole(head, parts):
    config = LossConfig(
        class_weight_power=0.5,
        logit_adjustment=0.5 if head == "softmax" else 0.0,
        label_smoothing=0.1 if head == "softmax" else 0,
    )
    loss = CompoundLoss(config, head, COUNTS)
    heads = [some(40, seed)[0].float() for seed in (1, 2, 3)]
    labels = some(40, 4)[1]
    valid = torch.arange(40) < 37  # the last three only fill up

    def run(sizes: list[int], rows: slice) -> tuple[list[torch.Tensor], dict[str, float]]:
        leaves = [z[rows].clone().requires_grad_() for z in heads]
        split = [
            (Outputs(*zs, torch.zeros(len(y), 1)), y, v)
            for *zs, y, v in zip(
                *(leaf.split(sizes) for leaf in leaves),
                labels[rows].split(sizes),
                valid[rows].split(sizes),
                strict=True,
            )
        ]
        sums = sum(loss.sums(*part) for part in split)
        results = [loss(*part, 37, sums) for part in split]
        sum(total for total, _ in results).backward()
        return [leaf.grad for leaf in leaves], loss.values(sum(focal for _, focal in results), sums)

    whole, whole_values = run([37], slice(0, 37))
    split, split_values = run(parts, slice(0, 40))
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(b[:37], a, rtol=1e-4, atol=1e-8)
        assert (b[37:] == 0).all()
    assert split_values == pytest.approx(whole_values, rel=1e-5)


def test_logged_loss_is_the_weighted_sum_of_plain_losses():
    config = LossConfig(focal_weight=0.7, soft_f1_weight=0.2, aux_weight=0.3, gamma=1.5)
    loss = CompoundLoss(config, "softmax", COUNTS)
    heads = [some(16, seed)[0].float() for seed in (1, 2, 3)]
    labels = some(16, 4)[1]
    valid = torch.ones(16, dtype=torch.bool)
    outputs = Outputs(*heads, torch.zeros(16, 1))
    sums = loss.sums(outputs, labels, valid)
    values = loss.values(loss(outputs, labels, valid, 16, sums)[1], sums)
    plain = [0.7 * focal_loss(z, labels, gamma=1.5).mean() + 0.2 * soft_f1_loss(z, labels) for z in heads]
    assert values["loss"] == pytest.approx((plain[0] + 0.3 * (plain[1] + plain[2])).item(), rel=1e-5)


def test_class_weights_have_mean_one_and_favor_the_rare():
    weights = CompoundLoss(LossConfig(class_weight_power=0.5), "softmax", COUNTS).class_weights
    assert weights.mean().item() == pytest.approx(1)
    assert weights.argmax() == 6 and weights.argmin() == 1
    assert (CompoundLoss(LossConfig(), "softmax", COUNTS).class_weights == 1).all()
