"""The MLP on mean tokens: its principal components, and the contract of a network."""

import pytest
import torch
from torch import Tensor

from tests.models.test_networks import SIGNATURE, batch, total
from tests.small_tasks import FIELDS, TASKS
from triderm_dist.config import ModelConfig
from triderm_dist.models import build_network, build_towers
from triderm_dist.models.dual_cnn import TabularFeatures
from triderm_dist.models.mlp import MeanComponents, Mlp, Standardize
from triderm_dist.models.towers import TokenShape
from triderm_dist.schema import VIEWS, ConfigError

TOWER = {"source": "timm:test_vit", "pretrained": False, "image_size": 64, "frozen": True, "shared": True}


def config(**settings: object) -> ModelConfig:
    return ModelConfig.model_validate({"kind": "mlp", "tower": TOWER, "width": 16, "heads": 4, **settings})


def fitted(width: int = 64, lesions: int = 40, **settings: object) -> Mlp:
    torch.manual_seed(0)
    network = build_network(config(settings={"components": 5}, **settings), SIGNATURE, TokenShape(1, width))
    concepts, metadata = torch.rand(lesions, len(SIGNATURE.concepts)), torch.zeros(lesions, len(SIGNATURE.fields))
    network.fit_inputs({view: torch.randn(lesions, width) for view in VIEWS}, concepts, metadata)
    assert isinstance(network, Mlp)
    return network.eval()


def tokens(size: int = 4) -> list[Tensor]:
    return batch(size, (7, 64))


def test_components_are_those_of_the_values_with_a_mean_variance_of_one() -> None:
    values = torch.randn(200, 6) * torch.tensor([5.0, 4.0, 3.0, 0.1, 0.1, 0.1]) + 7
    layer = MeanComponents([6], 3, used=True)
    layer.fit(values)
    components = layer(values[:, None], torch.ones(200, dtype=torch.bool))
    covariance = torch.cov(components.T)
    assert torch.allclose(covariance.diag().mean(), torch.ones(()), atol=1e-4)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-4 and covariance.diag().diff().max() < 0
    # The three directions of large variance, and the sign in which the largest weight is positive.
    assert layer.basis.abs().argmax(0).tolist() == [0, 1, 2] and (layer.basis.max(0).values > 0).all()


def test_columns_are_standardized_and_missing_values_are_average_ones() -> None:
    features = TabularFeatures(
        2, FIELDS
    )  # concepts and their flags; a number and its flag; two categories and the flag
    assert features.flag_of == [2, 3, 2, 3, 5, 5, 8, 8, 8]
    concepts, metadata = torch.rand(500, 2), torch.stack([100 * torch.rand(500), (torch.rand(500) < 0.2).float()], 1)
    concepts[:100, 0] = metadata[100:200, 0] = torch.nan
    layer = Standardize(features.flag_of)
    layer.fit(columns := features(concepts, metadata))
    result = layer(columns)
    values = [0, 1, 4, 6, 7]
    for at in values:
        there = result[:, at][columns[:, features.flag_of[at]] == 0]
        assert abs(there.mean()) < 1e-4 and there.std(correction=0) == pytest.approx(1, abs=1e-4)
    nothing = layer(features(torch.full((1, 2), torch.nan), torch.full((1, 2), torch.nan)))
    assert nothing[0].tolist() == [0, 0, 1, 1, 0, 1, 0, 0, 1]


def test_value_that_training_hardly_had_stays_small() -> None:
    layer = Standardize([1, 1])
    layer.fit(torch.zeros(1000, 2))
    assert layer(torch.tensor([[1.0, 0.0]])).abs().max() == pytest.approx(10)


def test_fewer_lesions_than_components_give_finite_ones() -> None:
    for lesions in (0, 1, 3):
        outputs = fitted(lesions=lesions)(*tokens())
        assert all(torch.isfinite(each).all() for each in outputs)


def test_components_of_a_single_lesion_are_zero() -> None:
    layer = MeanComponents([8], 4, used=True)
    layer.fit(torch.randn(1, 8))
    assert (layer(torch.randn(3, 2, 8), torch.ones(3, dtype=torch.bool)) == 0).all()


def test_mean_tokens_give_what_all_tokens_give() -> None:
    network, inputs = fitted(), tokens()
    means = [inputs[0].mean(1, keepdim=True), inputs[1].mean(1, keepdim=True), *inputs[2:]]
    for one, other in zip(network(*inputs), network(*means), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_missing_view_has_no_effect_and_every_parameter_gets_a_gradient() -> None:
    network, inputs = fitted(), tokens()
    total(outputs := network(*inputs)).backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in network.parameters())
    other = [inputs[0].clone(), inputs[1].clone(), *inputs[2:]]
    other[0][1], other[1][2] = 9.0, -9.0  # hidden in `batch`
    for before, after in zip(outputs, network(*other), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("task", TASKS)
def test_smaller_tasks_have_smaller_networks(task: str) -> None:
    signature = TASKS[task].signature(TASKS[task].concepts.names)
    network = build_network(config(settings={"components": 5}), signature, TokenShape(1, 64))
    tables = [torch.zeros(9, len(each)) for each in (signature.concepts, signature.fields)]
    network.fit_inputs({view: torch.randn(9, 64) for view in signature.views}, *tables)
    absent = torch.zeros(3, 0)
    views = [torch.randn(3, 1, 64) if view in signature.views else absent for view in VIEWS]
    rows = [torch.full((3, len(each)), torch.nan) for each in (signature.concepts, signature.fields)]
    present = torch.tensor([view in signature.views for view in VIEWS]).expand(3, -1)
    outputs = network(*views, present, *rows)
    assert torch.isfinite(outputs.logits).all()
    assert [outputs.aux_clinical is None, outputs.aux_dermoscopic is None] == [v not in signature.views for v in VIEWS]


def test_view_that_is_not_used_has_no_effect() -> None:
    network, inputs = fitted(use=["dermoscopic", "metadata"]), tokens()
    other = [inputs[0] + 1, inputs[1], inputs[2], inputs[3] + 1, inputs[4]]
    for before, after in zip(network(*inputs), network(*other), strict=True):
        assert torch.equal(before, after)


def test_tower_that_trains_is_refused() -> None:
    trains = config(tower={**TOWER, "frozen": False})
    with pytest.raises(ConfigError, match="kind mlp takes the tokens of a frozen tower"):
        build_network(trains, SIGNATURE, build_towers(trains.tower))
