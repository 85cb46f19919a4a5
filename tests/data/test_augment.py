"""Augmentation: random numbers per lesion, exact geometry and color, and augmentations of plugins."""

import numpy as np
import pytest
import torch

from triderm_dist.config import AugmentConfig
from triderm_dist.data.augment import (
    AUGMENTATIONS,
    Augmentation,
    LesionRng,
    PhotoTransform,
    dihedral,
    drop_inputs,
    lesion_keys,
    normalize,
)
from triderm_dist.schema import ConfigError

IDS = [f"lesion-{i}" for i in range(64)]
KEYS, COPIES = lesion_keys(IDS), np.zeros(64, np.int64)
IDENTITY = AugmentConfig(min_scale=1, dihedral=False, rotation=0, brightness=0, contrast=0, saturation=0)


def photos(number: int = 8, height: int = 24, width: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (number, height, width, 3), dtype=np.uint8))


def test_random_numbers_are_independent_of_the_order_of_lesions():
    a = LesionRng(1, 2, KEYS, COPIES).uniform("scale")
    assert ((a >= 0) & (a < 1)).all()
    assert abs(a.mean() - 0.5) < 0.15
    order = np.random.default_rng(0).permutation(64)
    assert (LesionRng(1, 2, KEYS[order], COPIES).uniform("scale") == a[order]).all()
    assert (LesionRng(1, 2, KEYS, COPIES).take(order[:9]).uniform("scale") == a[order[:9]]).all()
    for other in (
        LesionRng(2, 2, KEYS, COPIES).uniform("scale"),
        LesionRng(1, 3, KEYS, COPIES).uniform("scale"),
        LesionRng(1, 2, KEYS, COPIES + 1).uniform("scale"),
        LesionRng(1, 2, KEYS, COPIES).uniform("flip"),
    ):
        assert not np.isclose(other, a).any()


def test_random_numbers_are_uniform():
    keys = lesion_keys([str(i) for i in range(20_000)])
    numbers = LesionRng(0, 0, keys, np.zeros(20_000, np.int64)).uniform("x")
    assert np.abs(np.histogram(numbers, 10, (0, 1))[0] / 2000 - 1).max() < 0.1


def test_augmentation_is_independent_of_the_split_of_the_batch():
    transform, x = PhotoTransform(16, AugmentConfig()), photos()
    together = transform(x, "clinical", LesionRng(0, 1, KEYS[:8], COPIES[:8]))
    parts = [
        transform(x[i : i + 2], "clinical", LesionRng(0, 1, KEYS[i : i + 2], COPIES[i : i + 2])) for i in range(0, 8, 2)
    ]
    torch.testing.assert_close(torch.cat(parts), together)
    assert together.shape == (8, 3, 16, 16)
    assert together.min() >= 0 and together.max() <= 1


def test_center_crop_without_rng():
    x = photos()
    torch.testing.assert_close(
        PhotoTransform(24, IDENTITY)(x, "clinical"), x[:, :, 4:28].permute(0, 3, 1, 2).float() / 255
    )
    constant = torch.full((2, 48, 64, 3), 100, dtype=torch.uint8)
    torch.testing.assert_close(
        PhotoTransform(16, IDENTITY)(constant, "clinical"), torch.full((2, 3, 16, 16), 100 / 255)
    )


def test_frames_without_augmentation() -> None:
    x = photos(height=24, width=36).float()
    smooth = x.permute(0, 3, 1, 2) / 255
    squashed = torch.nn.functional.interpolate(smooth, (24, 24), mode="bilinear", align_corners=False)
    got = PhotoTransform(24, IDENTITY, "squash")(x.byte(), "clinical")
    torch.testing.assert_close(got, squashed, atol=1e-5, rtol=0)
    whole = PhotoTransform(36, IDENTITY, "whole")(x.byte(), "clinical")
    torch.testing.assert_close(whole[:, :, 6:30], smooth, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole[:, :, :6], smooth[:, :, :6].flip(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("frame", ["whole", "squash"])
def test_augmented_crop_of_full_size_is_the_frame(frame) -> None:
    x, rng = photos(height=24, width=32), LesionRng(0, 0, KEYS[:8], COPIES[:8])
    transform = PhotoTransform(24, IDENTITY, frame)
    torch.testing.assert_close(transform(x, "clinical", rng), transform(x, "clinical"), atol=1e-5, rtol=0)
    turned = PhotoTransform(24, IDENTITY.model_copy(update={"dihedral": True}), frame)(x, "clinical", rng)
    for plain, crop in zip(transform(x, "clinical"), turned, strict=True):
        assert any(torch.allclose(crop, dihedral(plain, k), atol=1e-4) for k in range(8))


def test_large_photos_are_reduced_so_far_that_the_frame_is_not_aliased() -> None:
    sizes = {
        frame: PhotoTransform(100, IDENTITY, frame).reduced_size(400, 500) for frame in ("square", "whole", "squash")
    }
    assert sizes == {"square": (150, 188), "whole": (120, 150), "squash": (150, 150)}
    assert PhotoTransform(100, IDENTITY, "squash").reduced_size(120, 200) == (120, 150)


def test_identity_settings_only_translate():
    x = torch.arange(24 * 32, dtype=torch.int64).remainder(256).to(torch.uint8).view(1, 24, 32, 1).expand(4, -1, -1, 3)
    crops = PhotoTransform(24, IDENTITY)(x, "clinical", LesionRng(0, 0, KEYS[:4], COPIES[:4]))
    rows = x[0, :, :, 0].float() / 255
    for crop in crops:
        best = min((crop[0, :, 0] - rows[:, left]).abs().max().item() for left in range(9))
        assert best < 1.0  # equals some column of the photo, up to interpolation
    assert crops.std(0).max() > 0


def test_tied_views_share_geometry():
    x, rng = photos(), LesionRng(0, 0, KEYS[:8], COPIES[:8])
    tied, independent = (PhotoTransform(16, AugmentConfig(tied_views=value)) for value in (True, False))
    torch.testing.assert_close(tied(x, "clinical", rng), tied(x, "dermoscopic", rng))
    a, b = (independent(x, view, rng) for view in ("clinical", "dermoscopic"))
    assert (a - b).abs().max() > 0.05


def test_color_is_brightness_then_contrast_then_saturation():
    x, rng = photos(), LesionRng(0, 0, KEYS[:8], COPIES[:8])
    plain = PhotoTransform(16, AugmentConfig(brightness=0, contrast=0, saturation=0))(x, "clinical", rng)
    strength = {"brightness": 0.3, "contrast": 0.4, "saturation": 0.5}
    b, c, s = (
        torch.from_numpy(1 + value * (2 * rng.uniform(f"clinical/{name}") - 1)).float().view(-1, 1, 1, 1)
        for name, value in strength.items()
    )
    expected = plain * b
    mean = expected.mean((1, 2, 3), keepdim=True)
    expected = mean + (expected - mean) * c
    gray = expected.mean(1, keepdim=True)
    expected = (gray + (expected - gray) * s).clamp(0, 1)
    torch.testing.assert_close(PhotoTransform(16, AugmentConfig(**strength))(x, "clinical", rng), expected)


class Stripe(Augmentation):
    """Blackens one column of each photo."""

    brightness: float = 0.0

    def __call__(self, pixels: torch.Tensor, rng: LesionRng) -> torch.Tensor:
        for crop, number in zip(pixels, rng.uniform("column"), strict=True):
            crop[:, :, int(number * crop.shape[-1])] = self.brightness
        return pixels


def test_registered_augmentation_is_independent_of_the_split(monkeypatch):
    monkeypatch.setattr("triderm_dist.data.augment.AUGMENTATIONS", {"stripe": Stripe})
    x, rng = photos(), LesionRng(0, 1, KEYS[:8], COPIES[:8])
    plain = PhotoTransform(16, AugmentConfig())(x, "clinical", rng)
    transform = PhotoTransform(16, AugmentConfig(extra={"stripe": {"brightness": 0.25}}))
    striped = transform(x, "clinical", rng)
    changed = (striped != plain).any(1).any(1)  # (B, columns)
    assert (changed.sum(1) == 1).all()
    assert (striped.transpose(1, 3)[changed] == 0.25).all()
    assert len(changed.int().argmax(1).unique()) > 2  # a different column for each lesion
    assert (transform(x, "dermoscopic", rng) != striped).any()
    parts = [transform(x[i : i + 2], "clinical", LesionRng(0, 1, KEYS[i : i + 2], COPIES[i : i + 2])) for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), striped[:4])
    torch.testing.assert_close(transform(x, "clinical"), PhotoTransform(16, AugmentConfig())(x, "clinical"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"strip": {}},
            r"train.augment.extra: 'strip' is not an augmentation; known: stripe",
        ),
        ({"stripe": {"bright": 1}}, "train.augment.extra.stripe: unknown setting 'bright'"),
        ({"stripe": {"brightness": "x"}}, "train.augment.extra.stripe: brightness: "),
    ],
)
def test_unknown_augmentation_or_setting_is_refused(extra, message, monkeypatch):
    monkeypatch.setattr("triderm_dist.data.augment.AUGMENTATIONS", {"stripe": Stripe})
    with pytest.raises(ConfigError, match=message):
        PhotoTransform(16, AugmentConfig(extra=extra))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda pixels: pixels[:, :, ::2],
            r"returned torch.float32 \(8, 3, 8, 16\), not torch.float32 \(8, 3, 16, 16\)",
        ),
        (lambda pixels: pixels.double(), r"returned torch.float64 \(8, 3, 16, 16\), not torch.float32"),
        (lambda pixels: None, r"returned a NoneType, not torch.float32"),
    ],
)
def test_augmentation_that_returns_other_crops_is_refused(call, message, monkeypatch):
    class Wrong(Augmentation):
        def __call__(self, pixels, rng):
            return call(pixels)

    monkeypatch.setitem(AUGMENTATIONS, "wrong", Wrong)
    transform = PhotoTransform(16, AugmentConfig(extra={"wrong": {}}))
    with pytest.raises(ConfigError, match=rf"train\.augment\.extra\.wrong: {message}"):
        transform(photos(), "clinical", LesionRng(0, 1, KEYS[:8], COPIES[:8]))
    monkeypatch.setitem(AUGMENTATIONS, "wrong", torch.nn.Identity)
    with pytest.raises(ConfigError, match="'wrong' of AUGMENTATIONS is no subclass of Augmentation"):
        PhotoTransform(16, AugmentConfig(extra={"wrong": {}}))


def test_dihedral_transforms_are_eight_rotations_and_flips():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    images = [dihedral(x, k) for k in range(8)]
    assert len({tuple(image.flatten().tolist()) for image in images}) == 8
    assert torch.equal(images[0], x)
    assert torch.equal(images[4], x.flip(-1))
    assert torch.equal(images[5], torch.rot90(x, 1, (2, 3)).flip(-1))


def test_channels_are_normalized_by_mean_and_std():
    x = torch.rand(2, 3, 4, 4)
    y = normalize(x.clone(), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    torch.testing.assert_close(y[:, 1], (x[:, 1] - 0.2) / 0.6)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_inputs_are_dropped_at_the_configured_rate(rate):
    config = AugmentConfig(clinical_dropout=rate, dermoscopic_dropout=rate, concept_dropout=rate)
    keys = lesion_keys([str(i) for i in range(4000)])
    present = np.ones((4000, 2), bool)
    present[:10, 1] = False
    seen, concepts = drop_inputs(
        LesionRng(0, 0, keys, np.zeros(4000, np.int64)), config, present, np.full((4000, 3), 0.5, np.float32)
    )
    assert seen.any(1).all()  # at most one view is hidden
    assert not (seen & ~present).any()
    assert np.isnan(concepts).mean() == pytest.approx(rate, abs=0.03)
    both_kept = (1 - rate) ** 2 + rate**2  # if both were drawn, none is hidden
    assert seen[10:].all(1).mean() == pytest.approx(both_kept, abs=0.03)
    assert concepts.dtype == np.float32


EXTRA = {
    "blur": {"clinical": 1.5},
    "cutout": {"clinical": 0.6},
    "hue": {"clinical": 40.0},
    "noise": {"clinical": 0.2},
}


def crops_of(extra: dict, view: str = "clinical", config: AugmentConfig = IDENTITY, number: int = 8) -> torch.Tensor:
    transform = PhotoTransform(24, config.model_copy(update={"extra": extra}))
    return transform(photos(number), view, LesionRng(0, 1, KEYS[:number], COPIES[:number]))


@pytest.mark.parametrize("name", EXTRA)
def test_built_in_augmentation_is_independent_of_the_split_and_has_a_strength_for_each_view(name):
    extra = {name: EXTRA[name]}
    together = crops_of(extra)
    assert together.min() >= 0 and together.max() <= 1
    assert sum((a - b).abs().max() > 0.01 for a, b in zip(together, crops_of({}), strict=True)) > 4
    assert torch.equal(crops_of(extra, "dermoscopic"), crops_of({}, "dermoscopic"))
    transform = PhotoTransform(24, IDENTITY.model_copy(update={"extra": extra}))
    part = transform(photos()[4:6], "clinical", LesionRng(0, 1, KEYS[4:6], COPIES[4:6]))
    torch.testing.assert_close(part, together[4:6], atol=1e-5, rtol=0)


def test_hue_turns_colors_and_keeps_gray():
    rng, gray = LesionRng(0, 0, KEYS, COPIES), torch.rand(64, 1, 4, 4).expand(-1, 3, -1, -1).contiguous()
    hue = AUGMENTATIONS["hue"](clinical=90.0).of_view("clinical")
    torch.testing.assert_close(hue(gray, rng), gray)
    red = torch.tensor([0.6, 0.4, 0.4]).view(1, 3, 1, 1).expand(64, -1, 1, 1).contiguous()
    turned = hue(red, rng) - 0.4667
    angle = torch.atan2(
        3**0.5 * (turned[:, 1] - turned[:, 2]), 2 * turned[:, 0] - turned[:, 1] - turned[:, 2]
    ).flatten()
    drawn = torch.from_numpy(np.radians(90 * (2 * rng.uniform("angle") - 1))).float()
    torch.testing.assert_close(angle, drawn, atol=1e-3, rtol=0)


def test_blur_is_a_normalized_gaussian():
    impulse = torch.zeros(64, 3, 15, 15).contiguous(memory_format=torch.channels_last)
    impulse[:, :, 7, 7] = 1
    rng = LesionRng(0, 0, KEYS, COPIES)
    blurred = AUGMENTATIONS["blur"](clinical=2.0).of_view("clinical")(impulse, rng)
    torch.testing.assert_close(blurred.sum((2, 3)), torch.ones(64, 3))
    variance = (blurred[:, 0].sum(1) * (torch.arange(15) - 7) ** 2).sum(1)
    wide = torch.from_numpy(2 * rng.uniform("deviation")) > 0.5
    expected = torch.from_numpy(2 * rng.uniform("deviation")) ** 2
    torch.testing.assert_close(variance[wide].double(), expected[wide], rtol=0.1, atol=0)


def test_noise_has_the_drawn_deviation_and_no_pattern():
    rng, gray = LesionRng(0, 0, KEYS, COPIES), torch.full((64, 3, 32, 32), 0.5)
    noise = AUGMENTATIONS["noise"](clinical=0.2).of_view("clinical")(gray.clone(), rng) - 0.5
    drawn = torch.from_numpy(0.2 * rng.uniform("deviation")).float()
    torch.testing.assert_close(noise.flatten(1).std(1), drawn, rtol=0.05, atol=0)
    rows = (noise / drawn.view(-1, 1, 1, 1)).flatten(1)
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.1
    assert torch.corrcoef(rows.view(64, 3, -1).transpose(0, 1).flatten(1)).fill_diagonal_(0).abs().max() < 0.03
    assert (noise[..., 1:] * noise[..., :-1]).mean((1, 2, 3)).abs().max() < 0.1 * 0.2**2


def test_cutout_fills_one_square_with_the_mean_color():
    plain, cut = crops_of({}, number=64), crops_of({"cutout": {"clinical": 0.6}}, number=64)
    sides = []
    for before, after in zip(plain, cut, strict=True):
        changed = (before != after).any(0)
        rows, columns = changed.any(1), changed.any(0)
        assert torch.equal(changed, rows[:, None] & columns[None, :])
        torch.testing.assert_close(after[:, changed].T, before.mean((1, 2)).expand(int(changed.sum()), 3))
        sides.append(int(rows.sum()))
    assert 10 <= max(sides) <= 15 and len(set(sides)) > 5


def test_aspect_and_strength_of_the_clinical_photo():
    config = IDENTITY.model_copy(update={"aspect": 0.5})
    matrix = PhotoTransform(24, config).crops(64, 24, 24, "dermoscopic", LesionRng(0, 0, KEYS, COPIES)).matrix
    ratio = matrix[:, 0, 0] / matrix[:, 1, 1]
    assert ratio.min() == pytest.approx(1 / 1.5, abs=0.05) and ratio.max() == pytest.approx(1.5, abs=0.05)
    np.testing.assert_allclose(matrix[:, 0, 0] * matrix[:, 1, 1], 1)

    def crops(view: str, **settings: float):
        transform = PhotoTransform(24, AugmentConfig(tied_views=True, **settings))
        return transform.crops(64, 24, 24, view, LesionRng(0, 0, KEYS, COPIES))

    halved = crops("clinical", clinical_strength=0.5)
    expected = crops("clinical", min_scale=0.85, rotation=7.5, brightness=0.075, contrast=0.075, saturation=0.075)
    np.testing.assert_allclose(halved.matrix, expected.matrix, atol=1e-12)
    np.testing.assert_allclose(halved.color, expected.color)
    assert np.array_equal(crops("dermoscopic", clinical_strength=0.5).matrix, crops("dermoscopic").matrix)
