"""Augmentation of single photos on the CPU equals that of batches."""

import sys
import threading
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from triderm_dist.config import AugmentConfig, Frame
from triderm_dist.data.augment import LesionRng, PhotoTransform, lesion_keys, normalize
from triderm_dist.data.host_augment import HostTransform, describe, opencv

cv2 = pytest.importorskip("cv2", reason="needs the extra cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUMBER = 32
RNG = LesionRng(3, 1, lesion_keys(map(str, range(NUMBER))), np.zeros(NUMBER, np.int64))
STRONG = AugmentConfig(min_scale=0.3, rotation=180, brightness=0.5, contrast=0.5, saturation=0.5)


def photos(height: int, width: int) -> torch.Tensor:
    """Return (NUMBER, height, width, 3) uint8: smooth shades, sharp dark shapes and fine noise, black and white."""
    rng = np.random.default_rng(height)
    y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    result = np.empty((NUMBER, height, width, 3), np.uint8)
    for photo in result:
        a, b, phase = rng.uniform(-3, 3, 3)
        shade = 150 + 70 * np.sin(a * x + b * y + phase)[..., None] + [30, 0, -30]
        center, radius = rng.uniform(0.3, 0.7, 2), rng.uniform(0.1, 0.3)
        shade[np.hypot(x - center[0], y - center[1]) < radius] *= 0.4
        shade[:: height // 5, : width // 2] = 255
        shade[:, :: width // 4] = 0
        noisy = shade + rng.normal(0, 6, shade.shape)
        photo[:] = Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
    return torch.from_numpy(result)


def difference(
    batch: torch.Tensor, size: int, config: AugmentConfig, rng: LesionRng | None, frame: Frame = "square"
) -> float:
    """Return the largest difference of the two ways, in levels of 256."""
    transform = PhotoTransform(size, config, frame)
    expected = normalize(transform(batch, "clinical", rng), MEAN, STD).permute(0, 2, 3, 1)
    height, width = batch.shape[1:3]
    host = HostTransform(transform, height, width, MEAN, STD, cv2)
    crops, out = host.crops(len(batch), "clinical", rng), np.full((len(batch), size, size, 3), np.nan, np.float32)
    for number, photo in enumerate(batch.numpy()):
        host(photo, crops, number, out[number])
    return float(((torch.from_numpy(out) - expected).abs() * torch.tensor(STD)).max() * 255)


@pytest.mark.parametrize("canvas", [(72, 96), (96, 72), (72, 72), (60, 91)])
@pytest.mark.parametrize("config", [AugmentConfig(), STRONG, AugmentConfig(rotation=0, tied_views=True)])
def test_augmented_photo_equals_that_of_a_batch(canvas, config):
    assert difference(photos(*canvas), 56, config, RNG) < 0.02


@pytest.mark.parametrize("frame", ["whole", "squash"])
def test_other_frames_equal_those_of_a_batch(frame):
    for rng in (RNG, None):
        assert difference(photos(60, 80), 56, STRONG, rng, frame) < 0.02


@pytest.mark.parametrize("frame", ["whole", "squash"])
@pytest.mark.parametrize("rng", [RNG, None])
def test_every_frame_equals_that_of_a_batch(frame, rng):
    config = AugmentConfig(aspect=0.3, clinical_strength=1.5)
    assert difference(photos(72, 80), 56, config, rng, frame) < 0.02


def test_all_eight_orientations_are_compared():
    drawn = RNG.scoped("clinical").uniform_table(["turns", "flip"]) * [4, 2]
    assert len({tuple(pair) for pair in drawn.astype(int).tolist()}) == 8


def test_enlarged_photo_equals_that_of_a_batch():
    assert difference(photos(40, 52), 64, STRONG, RNG) < 0.02


@pytest.mark.parametrize("canvas", [(150, 200), (200, 150), (96, 131)])
def test_photo_far_larger_than_the_crop_differs_by_rounding_alone(canvas):
    """It is reduced first, in uint8."""
    assert 0.1 < difference(photos(*canvas), 56, AugmentConfig(), RNG) < 2


@pytest.mark.parametrize(("canvas", "size"), [((72, 96), 56), ((72, 97), 56), ((56, 80), 56), ((57, 40), 56)])
def test_photo_that_is_not_augmented_equals_that_of_a_batch(canvas, size):
    assert difference(photos(*canvas), size, AugmentConfig(), None) < 0.02


def test_photo_that_is_reduced_without_augmentation_is_left_to_the_batch():
    """Predictions do not round to uint8."""
    large, small = (
        HostTransform(PhotoTransform(24, AugmentConfig()), height, 200, MEAN, STD, cv2) for height in (120, 36)
    )
    assert large.supports(RNG) and not large.supports(None)
    assert small.supports(RNG) and small.supports(None)


def test_black_photo_stays_black():
    assert difference(torch.zeros(NUMBER, 36, 48, 3, dtype=torch.uint8), 24, STRONG, RNG) < 1e-3


def test_threads_share_one_transform():
    batch, transform = photos(72, 96), PhotoTransform(56, STRONG)
    host = HostTransform(transform, 72, 96, MEAN, STD, cv2)
    crops = host.crops(NUMBER, "clinical", RNG)
    one, many = (np.empty((NUMBER, 56, 56, 3), np.float32) for _ in range(2))

    def work(out: np.ndarray, part: slice) -> None:
        for _ in range(5):
            for number in range(NUMBER)[part]:
                host(batch[number].numpy(), crops, number, out[number])

    work(one, slice(None))
    threads = [threading.Thread(target=work, args=(many, slice(start, None, 4))) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(one, many)


class Rounding:
    """OpenCV that rounds coordinates, as its version 4 does."""

    def __getattr__(self, name):
        return getattr(cv2, name)

    def warpAffine(self, photo, matrix, *arguments):
        return cv2.warpAffine(photo, np.round(matrix * 32) / 32, *arguments)


@pytest.fixture
def anew():
    """Search for OpenCV in the test, and again after it."""
    opencv.cache_clear()
    yield
    opencv.cache_clear()


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (cv2, "by OpenCV "),
        (Rounding(), "by PyTorch (the installed OpenCV does not load or gives other pixels; pip install"),
        (types.SimpleNamespace(__spec__=cv2.__spec__), "by PyTorch (the installed OpenCV does not load"),
        (None, "by PyTorch (OpenCV is several times faster: pip install 'triderm-dist[cpu]')"),
    ],
)
def test_only_opencv_that_gives_the_same_pixels_is_used(module, says, anew, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", module)
    assert opencv() is (module if module is cv2 else None)
    assert f"photos are cropped and colored {says}" in describe()
