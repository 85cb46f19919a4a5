"""Masks of dropout are functions of lesion and layer, uniform, and independent of each other."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from triderm_dist.config import ModelConfig
from triderm_dist.data.augment import LesionRng, lesion_keys
from triderm_dist.models import build_network
from triderm_dist.models.dropout import (
    LesionDropout,
    LesionDropPath,
    LesionMasks,
    LesionVectorDropout,
    use_lesion_masks,
)
from triderm_dist.models.fusion import CrossAttention
from triderm_dist.models.network import SHARED
from triderm_dist.models.towers import Tower
from triderm_dist.schema import Batch, ConfigError
from triderm_dist.tasks import milk10k_task

CPU = torch.device("cpu")


def batch(names, copies=None, seed=0, epoch=0) -> Batch:
    copies = np.zeros(len(names), np.int64) if copies is None else np.asarray(copies)
    nothing = torch.zeros(len(names))
    draws = LesionRng(seed, epoch, lesion_keys(names), copies).bits
    return Batch(list(names), nothing, nothing, nothing, nothing, nothing, nothing, nothing, draws=draws)


def masks(network: nn.Module, lesions: Batch, *shape: int) -> torch.Tensor:
    """Return what the network makes of ones (B, *shape)."""
    drop = LesionMasks(network, CPU)
    with drop.using(drop.draw(lesions)):
        return network(torch.ones(len(lesions.lesion_ids), *shape))


def layers(count: int = 1, p: float = 0.5) -> nn.Module:
    network = nn.Sequential(*[nn.Dropout(p) for _ in range(count)]).train()
    use_lesion_masks(network)
    return network


def test_mask_of_a_lesion_does_not_depend_on_the_rest_of_the_batch():
    network = layers()
    together = masks(network, batch("abcd"), 5, 16)
    assert torch.equal(masks(network, batch("db"), 5, 16), together[[3, 1]])
    assert torch.equal(masks(network, batch("abcd"), 5, 16), together)


def test_mask_differs_between_lesions_copies_epochs_seeds_and_layers():
    found = [
        masks(layers(), each, 4, 64)[0]
        for each in (batch("a"), batch("b"), batch("a", [1]), batch("a", epoch=1), batch("a", seed=1))
    ]
    network = layers(2, 0.3)
    network[0].p = 1e-9  # only the second layer's mask is left
    found.append(masks(network, batch("a"), 4, 64)[0])
    kept = [tensor > 0 for tensor in found]
    for i, mask in enumerate(kept):
        for other in kept[:i]:
            assert 0.3 < (mask == other).float().mean() < 0.7


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_share_of_dropped_elements_and_independence_of_pairs(p):
    names = [str(number) for number in range(400)]
    dropped = (masks(layers(p=p), batch(names), 49, 64) == 0).double()
    noise = (p * (1 - p)) ** 0.5
    assert dropped.mean().item() == pytest.approx(p, abs=5 * noise / dropped.numel() ** 0.5)
    # The mean over lesions of each position and channel, and of each row and column.
    for dim in ((0,), (0, 1), (0, 2), (1, 2)):
        means = dropped.mean(dim)
        each = noise / (dropped.numel() / means.numel()) ** 0.5
        assert (means - p).abs().max() < 6 * each
        assert means.std().item() == pytest.approx(each, rel=0.5)
    # Correlation of every pair of channels, of positions and of lesions.
    for order in ((2, 0, 1), (1, 0, 2), (0, 1, 2)):
        matrix = torch.corrcoef(dropped.permute(order).flatten(1))
        observed = dropped.numel() / len(matrix)
        pairs = matrix[~torch.eye(len(matrix), dtype=torch.bool)]
        assert pairs.abs().max() < 6 / observed**0.5
        assert pairs.std().item() == pytest.approx(1 / observed**0.5, rel=0.2)


def test_kept_elements_are_scaled_and_gradients_masked():
    network = layers(p=0.25)
    x = torch.randn(3, 2, 8, requires_grad=True)
    drop = LesionMasks(network, CPU)
    with drop.using(drop.draw(batch("abc"))):
        y = network(x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y == 0, 0.0, 1 / 0.75))
    torch.testing.assert_close(y, x.detach() * x.grad)


@pytest.mark.parametrize("kind", [LesionDropout, LesionVectorDropout, LesionDropPath])
@pytest.mark.parametrize("p", [1e-9, 0.3, 0.999])
def test_masks_computed_by_arithmetic_are_those_of_the_definition(kind, p):
    network = nn.Sequential(kind(p)).train()
    x = torch.randn(6, 2, 7, 16)
    drop = LesionMasks(network, CPU)
    with drop.using(drop.draw(batch("abcdef"))):
        dropped = network[0]._uniform(x) < int(p * 2**32) - 2**31
        assert torch.equal(network(x), x.masked_fill(dropped, 0.0) * (1 / (1 - p)))


def test_mask_at_the_threshold():
    threshold = int(0.3 * 2**32) - 2**31
    layer = LesionDropout(0.3).train()
    layer.keys = torch.zeros(1, dtype=torch.int64)
    layer._uniform = lambda x: torch.tensor([[-(2**31), threshold - 1, threshold, 2**31 - 1]], dtype=torch.int32)
    assert (layer(torch.ones(1, 4)) == 0).tolist() == [[True, True, False, False]]


def test_evaluation_changes_nothing_and_training_without_lesions_uses_the_generator():
    network = layers()
    x = torch.ones(2, 100)
    assert torch.equal(network.eval()(x), x)
    torch.manual_seed(0)
    first = network.train()(x)
    assert 20 < (first == 0).sum() < 180
    assert not torch.equal(network(x), first)
    for layer in (LesionVectorDropout(0.5), LesionDropPath(0.5)):
        dropped = (layer(torch.ones(400, 3, 4)) == 0).flatten(2 if type(layer) is LesionVectorDropout else 1)
        assert torch.equal(dropped.all(-1), dropped.any(-1))
        assert 0.4 < dropped.float().mean() < 0.6


def test_attention_dropout_hides_context_tokens_from_heads():
    attention = CrossAttention(16, 2, 0.5).train()
    query, context = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    drop = LesionMasks(attention, CPU)
    with drop.using(drop.draw(batch("abc"))):
        got = attention(query, context)
        values = attention.dropout(attention._split(attention.value(context)))
    weights = attention._split(attention.query(query)) @ attention._split(attention.key(context)).transpose(2, 3)
    expected = attention.out(((weights / 8**0.5).softmax(-1) @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, expected)
    hidden = (values == 0).all(-1)
    assert hidden.any() and not hidden.all()
    assert torch.equal(hidden, (values == 0).any(-1))


def test_drop_path_drops_whole_lesions():
    from timm.layers import DropPath

    network = nn.Sequential(DropPath(0.5)).train()
    use_lesion_masks(network)
    names = [str(number) for number in range(100)]
    got = masks(network, batch(names), 3, 4).flatten(1)
    assert set(got.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(got.min(1).values, got.max(1).values)
    assert 30 < (got[:, 0] == 0).sum() < 70


def test_windows_of_a_lesion_follow_each_other():
    network = layers()
    whole = masks(network, batch("ab"), 6, 8)
    drop = LesionMasks(network, CPU)
    with drop.using(drop.draw(batch("ab"))):
        windows = network(torch.ones(2 * 3, 2, 8))
    assert torch.equal(windows.view(2, 6, 8), whole)


@pytest.mark.parametrize("kind", ["Dropout", "DropPath"])
def test_views_in_a_shared_tower_have_masks_of_their_own(kind):
    from timm.layers import DropPath

    config = ModelConfig.model_validate({"width": 8, "heads": 1, "tower": {"shared": True}})
    layer = DropPath(0.5) if kind == "DropPath" else nn.Dropout(0.5)
    rest = {"image_size": 1, "mean": (0.5,) * 3, "std": (0.2,) * 3, "architecture": "", "report": ""}
    tower = Tower(nn.Identity(), [layer], nn.Identity(), width=8, num_tokens=4, **rest)
    network = build_network(config, milk10k_task().signature(()), [tower]).train()
    use_lesion_masks(network)
    drop = LesionMasks(network, CPU)

    def kept(names: list[str]) -> torch.Tensor:
        """Return (views, lesions, tokens, channels)."""
        with drop.using(drop.draw(batch(names))):
            return network.towers[SHARED](torch.ones(2 * len(names), 4, 8)).unflatten(0, (2, -1)) > 0

    names = [str(number) for number in range(100)]
    views = kept(names)
    assert 0.3 < (views[0] == views[1]).float().mean() < 0.7
    assert torch.equal(kept(names[7:9]), views[:, 7:9])


def test_modules_with_other_random_numbers_are_refused():
    with pytest.raises(ConfigError, match="0 is a Dropout2d, whose mask cannot be drawn for each lesion"):
        use_lesion_masks(nn.Sequential(nn.Dropout2d(0.1)))
    use_lesion_masks(nn.Sequential(nn.Dropout2d(0.0), nn.MultiheadAttention(4, 1)))
    with pytest.raises(ConfigError, match="MultiheadAttention"):
        use_lesion_masks(nn.Sequential(nn.MultiheadAttention(4, 1, dropout=0.1)))


def test_replacing_keeps_parameters_and_mode():
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3)).eval()
    before = network.state_dict().keys()
    use_lesion_masks(network)
    assert type(network[1]) is LesionDropout and network[1].p == 0.3 and not network[1].training
    assert network.state_dict().keys() == before
    assert torch.equal(F.dropout(torch.ones(3), 0.3, training=False), network[1](torch.ones(3)))
