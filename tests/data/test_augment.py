"""Augmentation draws belong to the lesion; geometry is what it says."""

import numpy as np
import pytest
import torch

from triderm_dist.config import AugmentConfig
from triderm_dist.data.augment import Draws, dihedral, hide, lesion_keys, normalize, view_transform

IDS = [f"lesion-{i}" for i in range(64)]
KEYS, COPIES = lesion_keys(IDS), np.zeros(64, np.int64)
STILL = AugmentConfig(min_scale=1, dihedral=False, rotation=0, brightness=0, contrast=0, saturation=0)


def photos(number: int = 8, height: int = 24, width: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (number, height, width, 3), dtype=np.uint8))


def test_draws_depend_on_everything_and_on_no_order():
    a = Draws(1, 2, KEYS, COPIES)("scale")
    assert ((a >= 0) & (a < 1)).all()
    assert abs(a.mean() - 0.5) < 0.15
    order = np.random.default_rng(0).permutation(64)
    assert (Draws(1, 2, KEYS[order], COPIES)("scale") == a[order]).all()
    for other in (
        Draws(2, 2, KEYS, COPIES)("scale"),
        Draws(1, 3, KEYS, COPIES)("scale"),
        Draws(1, 2, KEYS, COPIES + 1)("scale"),
        Draws(1, 2, KEYS, COPIES)("flip"),
    ):
        assert not np.isclose(other, a).any()


def test_draws_are_uniform():
    keys = lesion_keys([str(i) for i in range(20_000)])
    draws = Draws(0, 0, keys, np.zeros(20_000, np.int64))("x")
    assert np.abs(np.histogram(draws, 10, (0, 1))[0] / 2000 - 1).max() < 0.1


def test_a_lesion_looks_the_same_however_the_batch_is_split():
    config, x = AugmentConfig(), photos()
    whole = view_transform(x, 16, Draws(0, 1, KEYS[:8], COPIES[:8]), config, "clinical")
    parts = [
        view_transform(x[i : i + 2], 16, Draws(0, 1, KEYS[i : i + 2], COPIES[i : i + 2]), config, "clinical")
        for i in range(0, 8, 2)
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert whole.shape == (8, 3, 16, 16)
    assert whole.min() >= 0 and whole.max() <= 1


def test_without_draws_the_centered_square():
    x = photos()
    torch.testing.assert_close(
        view_transform(x, 24, None, STILL, "clinical"), x[:, :, 4:28].permute(0, 3, 1, 2).float() / 255
    )
    constant = torch.full((2, 48, 64, 3), 100, dtype=torch.uint8)
    torch.testing.assert_close(
        view_transform(constant, 16, None, STILL, "clinical"), torch.full((2, 3, 16, 16), 100 / 255)
    )


def test_still_settings_only_shift():
    x = torch.arange(24 * 32, dtype=torch.int64).remainder(256).to(torch.uint8).view(1, 24, 32, 1).expand(4, -1, -1, 3)
    crops = view_transform(x, 24, Draws(0, 0, KEYS[:4], COPIES[:4]), STILL, "clinical")
    rows = x[0, :, :, 0].float() / 255
    for crop in crops:
        best = min((crop[0, :, 0] - rows[:, left]).abs().max().item() for left in range(9))
        assert best < 1.0  # some column of the photo, up to interpolation between neighbors
    assert crops.std(0).max() > 0


def test_tied_views_share_geometry():
    x, draws = photos(), Draws(0, 0, KEYS[:8], COPIES[:8])
    tied, free = AugmentConfig(tied_views=True), AugmentConfig()
    a, b = (view_transform(x, 16, draws, tied, view) for view in ("clinical", "dermoscopic"))
    torch.testing.assert_close(a, b)
    a, b = (view_transform(x, 16, draws, free, view) for view in ("clinical", "dermoscopic"))
    assert (a - b).abs().max() > 0.05


def test_color_is_brightness_then_contrast_then_saturation():
    x, draws = photos(), Draws(0, 0, KEYS[:8], COPIES[:8])
    plain = view_transform(x, 16, draws, AugmentConfig(brightness=0, contrast=0, saturation=0), "clinical")
    strength = {"brightness": 0.3, "contrast": 0.4, "saturation": 0.5}
    b, c, s = (
        torch.from_numpy(1 + value * (2 * draws(f"clinical/{name}") - 1)).float().view(-1, 1, 1, 1)
        for name, value in strength.items()
    )
    expected = plain * b
    mean = expected.mean((1, 2, 3), keepdim=True)
    expected = mean + (expected - mean) * c
    gray = expected.mean(1, keepdim=True)
    expected = (gray + (expected - gray) * s).clamp(0, 1)
    torch.testing.assert_close(view_transform(x, 16, draws, AugmentConfig(**strength), "clinical"), expected)


def test_dihedral_group():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    images = [dihedral(x, k) for k in range(8)]
    assert len({tuple(image.flatten().tolist()) for image in images}) == 8
    assert torch.equal(images[0], x)
    assert torch.equal(images[4], x.flip(-1))
    assert torch.equal(images[5], torch.rot90(x, 1, (2, 3)).flip(-1))


def test_normalize():
    x = torch.rand(2, 3, 4, 4)
    y = normalize(x.clone(), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    torch.testing.assert_close(y[:, 1], (x[:, 1] - 0.2) / 0.6)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_hide(rate):
    config = AugmentConfig(clinical_dropout=rate, dermoscopic_dropout=rate, concept_dropout=rate)
    keys = lesion_keys([str(i) for i in range(4000)])
    present = np.ones((4000, 2), bool)
    present[:10, 1] = False
    seen, concepts = hide(
        Draws(0, 0, keys, np.zeros(4000, np.int64)), config, present, np.full((4000, 3), 0.5, np.float32)
    )
    assert seen.any(1).all()  # never both
    assert not (seen & ~present).any()
    assert np.isnan(concepts).mean() == pytest.approx(rate, abs=0.03)
    both_kept = (1 - rate) ** 2 + rate**2  # where both would be hidden both stay
    assert seen[10:].all(1).mean() == pytest.approx(both_kept, abs=0.03)
    assert concepts.dtype == np.float32
