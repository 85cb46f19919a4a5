"""Draw the photos of synthetic lesions: simple shapes on skin, whose appearance encodes one level of the diagnosis."""

from __future__ import annotations

import math

import numpy as np

HEIGHT, WIDTH = 84, 112
SKIN = np.array([(74, 48, 36), (110, 74, 54), (150, 106, 80), (196, 150, 122), (222, 180, 154), (238, 204, 184)], float)
SKIN_TONE_SHARES = (0.05, 0.08, 0.12, 0.45, 0.2, 0.1)
BROWN, RED = np.array((105.0, 66, 38)), np.array((205.0, 70, 75))
GROUND, BLUE = np.array((165.0, 118, 95)), np.array((70.0, 90, 130))

Y, X = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)


def draw_outline(generator: np.random.Generator) -> np.ndarray:
    """Draw amplitude and phase of the waves along a lesion's edge, (4, 2), the same in both of its photos."""
    return np.stack([generator.uniform(0.0, 0.12, 4), generator.uniform(0, 2 * np.pi, 4)], axis=1)


def within(distance: np.ndarray, sharpness: float) -> np.ndarray:
    """Return 1 where a signed distance is negative and 0 where it is positive, with a logistic transition."""
    return 0.5 - 0.5 * np.tanh(distance * (sharpness / 2))


def lesion_field(generator: np.random.Generator, outline: np.ndarray, radius: float) -> tuple[np.ndarray, ...]:
    """Return two maps (H, W): distance from the center, relative to the edge's, and coverage from 0 to 1."""
    y, x = Y - HEIGHT / 2 - generator.uniform(-5, 5), X - WIDTH / 2 - generator.uniform(-8, 8)
    angle = np.arctan2(y, x)
    edge = 1 + sum(size * np.cos((wave + 2) * angle + phase) for wave, (size, phase) in enumerate(outline.tolist()))
    distance = np.hypot(y, x) / (radius * edge)
    return distance, within(distance - 1, 14)


def smooth_noise(generator: np.random.Generator, cells: int) -> np.ndarray:
    """Draw noise (H, W) with about `cells` bumps across, mean 0, standard deviation 1."""
    waves = generator.uniform(-1, 1, (6, 2)) * 2 * np.pi * cells
    # Six plane waves, each the real part of a product of one along y and one along x.
    along_y = np.exp(1j * (np.outer(np.arange(HEIGHT) / HEIGHT, waves[:, 0]) + generator.uniform(0, 2 * np.pi, 6)))
    along_x = np.exp(1j * np.outer(np.arange(WIDTH) / WIDTH, waves[:, 1]))
    return ((along_y @ along_x.T).real / np.sqrt(3)).astype(np.float32)


def draw_skin(generator: np.random.Generator, tone: int) -> np.ndarray:
    skin = SKIN[tone] * generator.uniform(0.92, 1.08) + generator.normal(0, 2, 3)
    return (skin + (4 * smooth_noise(generator, 4) + 0.002 * skin.mean() * (X - WIDTH / 2))[..., None]).astype(
        np.float32
    )


def vary(generator: np.random.Generator, color: np.ndarray) -> np.ndarray:
    """Make a color (3,) lighter or darker, and slightly warmer or colder."""
    return color + generator.normal(0, 12) + generator.normal(0, 4, 3)


def paint(picture: np.ndarray, mask: np.ndarray, color: np.ndarray) -> np.ndarray:
    return picture + mask[..., None] * (color.astype(np.float32) - picture)


def add_hairs(generator: np.random.Generator, picture: np.ndarray, hairs: int) -> np.ndarray:
    for _ in range(hairs):
        angle, offset = generator.uniform(0, np.pi), generator.uniform(-35, 35)
        away = (X - WIDTH / 2) * math.sin(angle) - (Y - HEIGHT / 2) * math.cos(angle) - offset
        away += 4 * np.sin((X + Y) / 25 + offset)
        picture = paint(picture, 0.8 * np.exp(-((away / 0.7) ** 2)), np.array([35.0, 25, 20]))
    return picture


def finish(generator: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    grain = 5 * generator.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(picture + grain, 0, 255).astype(np.uint8)


def draw_clinical(
    generator: np.random.Generator, tone: int, outline: np.ndarray, hairs: int, level: float
) -> np.ndarray:
    """Draw the close-up (H, W, 3): a flat patch below level 0.5, from there a dome lit from one side; brown to red."""
    skin = draw_skin(generator, tone)
    distance, inside = lesion_field(generator, outline, generator.uniform(16, 26))
    hue = BROWN + level * (RED - BROWN)
    if level < 0.5:
        color = 0.30 * SKIN[tone] + 0.70 * vary(generator, hue)
        picture = paint(skin, 0.9 * inside, color + (12 * smooth_noise(generator, 6))[..., None])
    else:
        color = 0.35 * SKIN[tone] + 0.65 * vary(generator, hue)
        dome = np.clip(1 - distance**2, 0, 1)
        light = generator.uniform(0, 2 * np.pi)
        slope = (np.cos(light) * (X - WIDTH / 2) + np.sin(light) * (Y - HEIGHT / 2)) / 25
        picture = paint(skin, 0.9 * inside, color + (30 * dome * (1 + slope) - 12)[..., None])
    return finish(generator, add_hairs(generator, picture, hairs))


def draw_dermoscopic(
    generator: np.random.Generator, tone: int, outline: np.ndarray, hairs: int, level: float
) -> np.ndarray:
    """Draw the dermatoscope's photo (H, W, 3): larger, dark in the corners.

    A pigment network below level 0.5, from there clods; the ground is brown at levels 0 and 1, bluish between them.
    """
    skin = draw_skin(generator, tone)
    _, inside = lesion_field(generator, outline, generator.uniform(32, 40))
    ground = 0.4 * SKIN[tone] + 0.6 * vary(generator, GROUND + 4 * level * (1 - level) * (BLUE - GROUND))
    picture = paint(skin, 0.85 * inside, ground + (8 * smooth_noise(generator, 4))[..., None])
    if level < 0.5:
        dark = vary(generator, np.array((70.0, 42, 34)))
        rotation, period = generator.uniform(0, np.pi), generator.uniform(9, 12)
        cos, sin = math.cos(rotation), math.sin(rotation)
        u, v = X * cos + Y * sin, Y * cos - X * sin
        bend = 1.5 * smooth_noise(generator, 3)
        lines = np.maximum(np.cos(2 * np.pi * (u + bend) / period), np.cos(2 * np.pi * (v + bend) / period))
        pattern = within(0.75 - lines, 12)
    else:
        dark = vary(generator, np.array((95.0, 32, 49)))
        centers = np.stack([generator.uniform(6, HEIGHT - 6, 26), generator.uniform(10, WIDTH - 10, 26)], axis=1)
        away = np.full_like(X, np.inf)
        for (y, x), size in zip(centers.tolist(), generator.uniform(4, 6.5, 26).tolist(), strict=True):
            away = np.minimum(away, np.sqrt((Y - y) ** 2 + (X - x) ** 2) - size)
        pattern = within(away, 1.8)
    picture = add_hairs(generator, paint(picture, 0.85 * inside * pattern, dark), hairs)
    corner = np.hypot((X - WIDTH / 2) / WIDTH, (Y - HEIGHT / 2) / HEIGHT) / 0.62
    return finish(generator, picture * within(corner - 1, 18)[..., None])
