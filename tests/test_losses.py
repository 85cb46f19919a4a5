"""Losses compared with slow reference formulas, and split over micro-batches and ranks."""

import math

import numpy as np
import pytest
import torch

from triderm_dist.config import LossConfig
from triderm_dist.losses import (
    EXCLUDED_LOGIT,
    LOSS_TERMS,
    CompoundLoss,
    DrawnLesions,
    LossTerm,
    focal_loss,
    soft_f1_loss,
)
from triderm_dist.schema import Batch, ConfigError, Outputs
from triderm_dist.settings import Section

COUNTS = [300, 2500, 40, 500, 50, 50, 9, 450, 700, 470, 47]
C = 11


def random_batch(batch: int, seed: int = 0, classes: int = C) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(batch, classes, dtype=torch.float64) * 2, torch.randint(0, classes, (batch,))


def slow_focal(logits, labels, head, gamma, alpha, weights, smoothing):
    """Return the focal loss of each lesion, computed in Python loops."""
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
                target = (1 - smoothing) * (c == y) + smoothing / len(row)
                loss -= target * weights[c] * (alpha or 1) * (1 - p) ** gamma * math.log(p)
                loss -= (1 - target) * (1 - alpha if alpha else 1) * p**gamma * math.log(1 - p)
            result.append(loss / len(row))
    return torch.tensor(result)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_loss_equals_the_formula(head, gamma, smoothing):
    logits, labels = random_batch(9)
    alpha = 0.3 if head == "sigmoid" else None
    weights = torch.rand(C) + 0.5
    got = focal_loss(logits, labels, head, gamma, alpha, weights, smoothing)
    torch.testing.assert_close(
        got, slow_focal(logits, labels, head, gamma, alpha, weights, smoothing), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_focal_loss_is_linear_in_target_distributions(head):
    logits, labels = random_batch(9)
    others, share = labels.flip(0), torch.rand(9, 1)
    one_hot = [torch.nn.functional.one_hot(each, C).float() for each in (labels, others)]
    mixed = share * one_hot[0] + (1 - share) * one_hot[1]
    separate = [focal_loss(logits, each, head, label_smoothing=0.1) for each in (labels, others)]
    expected = share[:, 0] * separate[0] + (1 - share[:, 0]) * separate[1]
    torch.testing.assert_close(focal_loss(logits, mixed, head, label_smoothing=0.1), expected)


def test_focal_gamma_zero_is_cross_entropy():
    logits, labels = random_batch(9)
    torch.testing.assert_close(
        focal_loss(logits, labels, "softmax", 0.0).double().mean(), torch.nn.functional.cross_entropy(logits, labels)
    )


def test_focal_gradient_is_finite_for_confident_predictions():
    logits = torch.tensor([[80.0, -80.0], [-80.0, 80.0]], requires_grad=True)
    for head in ("softmax", "sigmoid"):
        for gamma in (0.0, 0.5, 2.0):
            grad = torch.autograd.grad(focal_loss(logits, torch.tensor([0, 0]), head, gamma).sum(), logits)[0]
            assert grad.isfinite().all()


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_soft_f1_equals_the_formula(head):
    logits, labels = random_batch(40)
    labels[labels == 4] = 5  # diagnosis 4 has no positive
    p = (logits.softmax(1) if head == "softmax" else logits.sigmoid()).tolist()
    scores = []
    for c in range(C):
        positive = [i for i, y in enumerate(labels.tolist()) if y == c]
        if positive:
            true = sum(p[i][c] for i in positive)
            scores.append(2 * true / (sum(row[c] for row in p) + len(positive)))
    assert soft_f1_loss(logits, labels, head).item() == pytest.approx(1 - sum(scores) / len(scores), abs=1e-6)


def test_absent_diagnosis_gets_no_gradient_from_soft_f1():
    logits, labels = random_batch(20)
    labels[labels == 4] = 5
    logits.requires_grad_()
    soft_f1_loss(logits, labels, "sigmoid").backward()
    assert logits.grad is not None
    assert (logits.grad[:, 4] == 0).all()
    assert (logits.grad[:, 5] != 0).all()


class Recall(LossTerm):
    """1 - mean soft recall to a power, which is not linear in its sums."""

    class Settings(Section):
        power: float = 1.0

    def per_lesion(self, inputs):
        return torch.stack([inputs.probabilities * inputs.targets, inputs.targets], 1)

    def value(self, sums, count):
        true, positive = sums
        return 1 - (true.sum() / positive.sum()) ** self.settings.power


class Disagreement(LossTerm):
    """Mean squared distance between the logits of the views; computed once instead of per head."""

    each_head = False

    def per_lesion(self, inputs):
        return (inputs.outputs.aux_clinical - inputs.outputs.aux_dermoscopic).square().mean(1)


@pytest.fixture
def more_terms(monkeypatch):
    monkeypatch.setitem(LOSS_TERMS, "recall", Recall)
    monkeypatch.setitem(LOSS_TERMS, "disagreement", Disagreement)


def batch_of(labels: torch.Tensor, valid: torch.Tensor, *extra: torch.Tensor) -> Batch:
    nothing = torch.zeros(len(labels), 1)
    names = [str(number) for number in range(len(labels))]
    return Batch(names, nothing, nothing, nothing, nothing, nothing, labels, valid, *extra)


def step_of(loss: CompoundLoss, heads, labels, valid, parts, *extra) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Return the gradients of the logits of all heads and the values, for a step split into `parts`.

    extra: class mask and weights of the lesions.
    """
    leaves = [logits.clone().requires_grad_() for logits in heads]
    own = [
        loss.sums(Outputs(*each[:3], torch.zeros(len(each[3]), 1)), batch_of(*each[3:]))
        for each in zip(*(tensor.split(parts) for tensor in (*leaves, labels, valid, *extra)), strict=True)
    ]
    total = {name: sum(sums[name].detach() for sums in own) for name in own[0]}
    count = int(valid.sum())
    slopes = loss.slopes(total, count)
    sum(loss.surrogate(sums, slopes) for sums in own).backward()
    return [leaf.grad for leaf in leaves], loss.values(total, count)


PLAIN = {"focal_weight": 0.7, "soft_f1_weight": 0.2, "aux_weight": 0.3, "gamma": 1.5}
MORE = {"recall": {"weight": 0.4, "settings": {"power": 1.5}}, "disagreement": {"weight": 0.1}}


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("parts", [[40], [24, 16], [5] * 8, [1] * 40])
def test_split_and_padded_loss_equals_the_formulas(head, parts, more_terms):
    heads = [random_batch(40, seed)[0].float() for seed in (1, 2, 3)]
    labels, valid = random_batch(40, 4)[1], torch.arange(40) < 37  # the last three rows are padding
    loss = CompoundLoss(LossConfig(**PLAIN, terms=MORE), head, COUNTS)
    got, values = step_of(loss, heads, labels, valid, parts)

    leaves = [logits[:37].clone().requires_grad_() for logits in heads]
    y = labels[:37]

    def recall(z):
        p = z.softmax(1) if head == "softmax" else z.sigmoid()
        return 1 - p[torch.arange(37), y].mean() ** 1.5

    terms = [
        0.7 * focal_loss(z, y, head, gamma=1.5).mean() + 0.2 * soft_f1_loss(z, y, head) + 0.4 * recall(z)
        for z in leaves
    ]
    expected = terms[0] + 0.1 * (leaves[1] - leaves[2]).square().mean() + 0.3 * (terms[1] + terms[2])
    expected.backward()
    for gradient, leaf in zip(got, leaves, strict=True):
        torch.testing.assert_close(gradient[:37], leaf.grad, rtol=1e-4, atol=1e-8)
        assert (gradient[37:] == 0).all()
    assert values["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert values["soft_f1"] == pytest.approx(soft_f1_loss(leaves[0], y, head).item(), rel=1e-5)
    assert values["recall"] == pytest.approx(recall(leaves[0]).item(), rel=1e-5)
    assert [*values] == ["loss", "focal", "soft_f1", "recall", "disagreement", "aux"]


def test_losses_that_are_means_need_no_presums(more_terms):
    loss = CompoundLoss(LossConfig(soft_f1_weight=0, terms={"disagreement": {"weight": 1}}), "softmax", COUNTS)
    assert loss.ratios == ()
    assert {name: slope.shape for name, slope in loss.slopes({}, 8).items()} == {"focal": (3,), "disagreement": (1,)}
    assert CompoundLoss(LossConfig(soft_f1_weight=0.1), "softmax", COUNTS).ratios == ("soft_f1",)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"recal": {"weight": 1}}, r"train.loss.terms: 'recal' is not a loss term; known: disagreement, recall \(plu"),
        ({"focal": {"weight": 1}}, "train.loss.terms: focal is built in; set train.loss.focal_weight instead"),
        (
            {"recall": {"weight": 1, "settings": {"powr": 2}}},
            "train.loss.terms.recall.settings: unknown setting 'powr'; did you mean 'power'?",
        ),
    ],
)
def test_invalid_loss_terms_are_refused(terms, message, more_terms):
    with pytest.raises(ConfigError, match=message):
        CompoundLoss(LossConfig(terms=terms), "softmax", COUNTS)


def cross_entropy(inputs):
    return -(inputs.targets * inputs.logits.log_softmax(1)).sum(1)


@pytest.mark.parametrize(
    ("per_lesion", "value", "message"),
    [
        (
            lambda inputs: cross_entropy(inputs).mean(),
            None,
            r"per_lesion returned torch.float32 \(\), not a tensor \(40,\) of the",
        ),
        (lambda inputs: cross_entropy(inputs)[:, None], None, r"float32 \(40, 1\), not a tensor \(40,\) of the"),
        (
            lambda inputs: inputs.probabilities[1:],
            lambda sums, count: sums.sum(),
            r"\(39, 11\), not a tensor \(40, \.\.\.\)",
        ),
        (lambda inputs: 3.0, None, r"per_lesion returned a float, not a tensor \(40,\) of the lesions"),
        (
            lambda inputs: inputs.probabilities,
            lambda sums, count: sums / count,
            "value must return a tensor without dim",
        ),
        (lambda inputs: inputs.probabilities, lambda sums, count: sums.detach().mean(), "value has no gradient"),
        (lambda inputs: inputs.logits.argmax(1), None, "per_lesion returned torch.int64, which has no gradient"),
    ],
)
def test_wrong_shapes_of_a_term_are_refused(per_lesion, value, message, monkeypatch):
    """Some of them would train with another loss without an error."""
    methods = {"per_lesion": lambda self, inputs: per_lesion(inputs)}
    if value:
        methods["value"] = lambda self, sums, count: value(sums, count)
    monkeypatch.setitem(LOSS_TERMS, "wrong", type("Wrong", (LossTerm,), methods))
    loss = CompoundLoss(LossConfig(terms={"wrong": {"weight": 1}}), "softmax", COUNTS)
    heads = [random_batch(40, seed)[0].float() for seed in (1, 2, 3)]
    with pytest.raises(ConfigError, match=rf"train\.loss\.terms\.wrong: .*{message}"):
        step_of(loss, heads, random_batch(40, 4)[1], torch.ones(40, dtype=torch.bool), [40])


def test_loss_without_a_gradient_is_refused(monkeypatch):
    detached = {"per_lesion": lambda self, inputs: inputs.probabilities.detach().sum(1)}
    monkeypatch.setitem(LOSS_TERMS, "detached", type("Detached", (LossTerm,), detached))
    config = LossConfig(focal_weight=0, soft_f1_weight=0, terms={"detached": {"weight": 1}})
    loss, heads = CompoundLoss(config, "softmax", COUNTS), [random_batch(40, seed)[0].float() for seed in (1, 2, 3)]
    with pytest.raises(ConfigError, match=r"train\.loss: detached: no gradient; compute the terms from the outputs"):
        step_of(loss, heads, random_batch(40, 4)[1], torch.ones(40, dtype=torch.bool), [40])


@pytest.mark.parametrize("state", ["buffer", "number", "tensor"])
def test_term_that_changes_in_training_is_refused(state, monkeypatch):
    class Counting(LossTerm):
        def __init__(self, settings, class_counts):
            super().__init__(settings, class_counts)
            if state == "buffer":
                self.register_buffer("steps", torch.zeros(()))
            else:
                self.steps = 0 if state == "number" else torch.zeros(())
            self.count = True

        def per_lesion(self, inputs):
            if self.count:
                self.steps += 1
            return cross_entropy(inputs)

    monkeypatch.setitem(LOSS_TERMS, "counting", Counting)
    loss = CompoundLoss(LossConfig(terms={"counting": {"weight": 1}}), "softmax", COUNTS)
    heads = [random_batch(40, seed)[0].float() for seed in (1, 2, 3)]
    loss.check_unchanged()
    step_of(loss, heads, random_batch(40, 4)[1], torch.ones(40, dtype=torch.bool), [20, 20])
    with pytest.raises(ConfigError, match=r"terms\.counting: changes its steps in training, which no checkpoint holds"):
        loss.check_unchanged()


def test_terms_that_cannot_be_trained_are_refused(monkeypatch):
    class Scaled(LossTerm):
        def __init__(self, settings, class_counts):
            super().__init__(settings, class_counts)
            self.scale = torch.nn.Parameter(torch.ones(()))

        def per_lesion(self, inputs):
            return self.scale * inputs.probabilities.sum(1)

    for name, term, message in (
        ("scaled", Scaled, "no optimizer trains its parameter scale; make it a buffer"),
        ("unfinished", type("Unfinished", (LossTerm,), {}), "' of LOSS_TERMS has no method per_lesion"),
        ("function", cross_entropy, "' of LOSS_TERMS is no subclass of LossTerm"),
        ("module", torch.nn.CrossEntropyLoss, "' of LOSS_TERMS is no subclass of LossTerm"),
    ):
        monkeypatch.setitem(LOSS_TERMS, name, term)
        with pytest.raises(ConfigError, match=rf"train\.loss\.terms\W+{name}\b.*{message}"):
            CompoundLoss(LossConfig(terms={name: {"weight": 1}}), "softmax", COUNTS)


def test_loss_without_weights_is_refused():
    with pytest.raises(ConfigError, match=r"train\.loss: the weight of every term is 0"):
        CompoundLoss(LossConfig(focal_weight=0, soft_f1_weight=0), "softmax", COUNTS)


@pytest.mark.parametrize("parts", [[24, 16], [5] * 8])
def test_class_weights_smoothing_and_logit_adjustment_when_split(parts):
    config = LossConfig(class_weight_power=0.5, logit_adjustment=0.5, label_smoothing=0.1)
    loss = CompoundLoss(config, "softmax", COUNTS)
    heads = [random_batch(40, seed)[0].float() for seed in (1, 2, 3)]
    labels, valid = random_batch(40, 4)[1], torch.ones(40, dtype=torch.bool)
    undivided, undivided_values = step_of(loss, heads, labels, valid, [40])
    split, split_values = step_of(loss, heads, labels, valid, parts)
    for a, b in zip(undivided, split, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-8)
    assert split_values == pytest.approx(undivided_values, rel=1e-5)


def test_a_diagnosis_without_lesions_has_a_finite_adjusted_loss():
    loss = CompoundLoss(LossConfig(logit_adjustment=1.0), "softmax", [0, *COUNTS[1:]])
    logits, labels = random_batch(9)
    gradients, values = step_of(loss, [logits.float()] * 3, labels.clamp(min=1), torch.ones(9, dtype=torch.bool), [9])
    assert all(gradient.isfinite().all() for gradient in gradients) and math.isfinite(values["loss"])


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_class_weights_have_mean_one_over_lesions_and_are_larger_for_rare_classes(power):
    config = LossConfig(class_weight_power=power)
    weights = CompoundLoss(config, "softmax", COUNTS).terms["focal"].class_weights
    assert np.average(weights, weights=COUNTS) == pytest.approx(1)
    absent = CompoundLoss(config, "softmax", [0, *COUNTS[1:]]).terms["focal"].class_weights
    assert np.average(absent[1:], weights=COUNTS[1:]) == pytest.approx(1)  # of a diagnosis without a lesion: no part
    assert weights.argmax() == 6 and weights.argmin() == 1
    assert (CompoundLoss(LossConfig(), "softmax", COUNTS).terms["focal"].class_weights == 1).all()


MASK = torch.arange(C) % 3 > 0
"""Diagnoses that the extra set of the tests below distinguishes: 1, 2, 4, 5, 7, 8, 10."""


@pytest.fixture
def union() -> tuple[torch.Tensor, ...]:
    """Labels, valid, class mask and weights of 40 lesions, every other one of an extra set of weight 0.5."""
    of_extra = torch.arange(40) % 2 == 1
    distinguished = torch.arange(C)[MASK]
    labels = torch.where(of_extra, distinguished[torch.arange(40) % len(distinguished)], random_batch(40, 4)[1])
    mask = torch.where(of_extra[:, None], MASK, True)
    return labels, torch.arange(40) < 37, mask, torch.where(of_extra, 0.5, 1.0)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_focal_loss_of_an_extra_lesion_is_that_of_its_diagnoses_alone(head):
    logits, labels = random_batch(9, classes=int(MASK.sum()))
    full = torch.full((9, C), EXCLUDED_LOGIT, dtype=logits.dtype)
    full[:, MASK] = logits
    smoothing = 0.1 if head == "softmax" else 0.0
    class_weights = torch.rand(C) + 0.5
    expected = focal_loss(logits, labels, head, 1.5, None, class_weights[MASK], smoothing)
    if head == "sigmoid":  # the mean over C diagnoses, to which those outside the mask add 0
        expected = expected * MASK.sum() / C
    among = torch.arange(C)[MASK][labels]
    got = focal_loss(full, among, head, 1.5, None, class_weights, smoothing, MASK.expand(9, -1))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("parts", [[40], [24, 16], [1] * 40])
def test_union_equals_the_formulas_over_masked_and_weighted_lesions(head, parts, union):
    heads = [random_batch(40, seed)[0].float() for seed in (1, 2, 3)]
    labels, valid, mask, weights = union
    loss = CompoundLoss(LossConfig(**PLAIN), head, COUNTS)
    got, values = step_of(loss, heads, labels, valid, parts, mask, weights)

    leaves = [logits.clone().requires_grad_() for logits in heads]
    rows = torch.arange(37)

    def terms(z):
        focal, p = [], torch.zeros(37, C)
        for i in rows:
            own = z[i, mask[i]]
            p[i, mask[i]] = own.softmax(0) if head == "softmax" else own.sigmoid()
            label = int(mask[i, : labels[i]].sum())
            share = 1.0 if head == "softmax" else len(own) / C
            focal.append(weights[i] * share * focal_loss(own[None], torch.tensor([label]), head, gamma=1.5)[0])
        y, w = torch.nn.functional.one_hot(labels[:37], C).float(), weights[:37, None]
        predicted, positive = (w * p).sum(0), (w * y).sum(0)
        present = positive > 0
        f1 = 2 * (w * p * y).sum(0)[present] / (predicted + positive)[present]
        return 0.7 * torch.stack(focal).sum() / 37 + 0.2 * (1 - f1.mean())

    parts_of_loss = [terms(z) for z in leaves]
    expected = parts_of_loss[0] + 0.3 * (parts_of_loss[1] + parts_of_loss[2])
    expected.backward()
    for gradient, leaf in zip(got, leaves, strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-8)
        assert (gradient[~mask] == 0).all()
    assert values["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_full_mask_and_weights_of_one_change_nothing(head, union, more_terms):
    heads = [random_batch(40, seed)[0].float() for seed in (1, 2, 3)]
    labels, valid, mask, weights = union
    config = LossConfig(**PLAIN, terms=MORE, label_smoothing=0.1, class_weight_power=0.5)
    loss = CompoundLoss(config, head, COUNTS)
    without = step_of(loss, heads, labels, valid, [24, 16])
    full = step_of(loss, heads, labels, valid, [24, 16], torch.ones_like(mask), torch.ones_like(weights))
    assert full[1] == pytest.approx(without[1], rel=1e-6)
    for one, other in zip(without[0], full[0], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9)


def test_adjusted_logits_of_several_sets_have_the_likelihoods_as_their_optimum():
    """Sets that distinguish other diagnoses in other shares are all fitted by logits log p(x | diagnosis) of lesions x.

    There the gradient is 0: softmax(logits + log prior) over a set's diagnoses is the posterior of the set, if the
    prior is that of the set.
    """
    likelihood = np.random.default_rng(0).dirichlet(np.ones(6), size=4).T  # of 6 lesions x, for 4 diagnoses
    masks = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]], bool)
    totals = np.array([[50.0, 30, 15, 5], [900, 45, 0, 0], [0, 2.5, 40, 8]])
    group, x, label = (each.ravel() for each in np.indices((3, 6, 4)))
    weights = torch.tensor(totals[group, label] * likelihood[x, label], dtype=torch.float32)
    config = LossConfig(focal_weight=1, soft_f1_weight=0, gamma=0, logit_adjustment=1)
    loss = CompoundLoss(config, "softmax", totals.sum(0), 1, DrawnLesions(masks, totals))
    table = torch.tensor(likelihood, dtype=torch.float32).log().requires_grad_()
    known = torch.ones(len(x), dtype=torch.bool)
    batch = batch_of(torch.tensor(label), known, torch.tensor(masks[group]), weights)
    sums = loss.sums(Outputs(table[torch.tensor(x)], None, None, torch.zeros(len(x), 1)), batch)
    (gradient,) = torch.autograd.grad(loss.surrogate(sums, loss.slopes(sums, len(x))), table)
    assert gradient.abs().max() < 1e-5
