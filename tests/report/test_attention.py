"""The picture of a lesion's attention: its views and inputs have the titles of the task."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.synthetic_run import CLINIC
from triderm_dist.models.attention import AttentionMaps
from triderm_dist.report.attention import FULL_COLOR, LONGEST_LABEL, draw_attention, overlay
from triderm_dist.schema import ConceptColumns, Task, TaskColumns, View
from triderm_dist.tasks import milk10k_task

TWO_VIEWS = replace(
    CLINIC,
    views=(View("clinical", "overview"), View("dermoscopic")),
    columns=TaskColumns(image={"clinical": "a", "dermoscopic": "b"}),
    concepts=ConceptColumns(names=("hair_loss",)),
)


def texts_of(task: Task, semantic: dict[str, float], path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Draw the maps of a lesion without its second photo, if the task has two, and return every text of the picture."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    found: set[str] = set()
    save = Figure.savefig

    def record(figure: Figure, *args: object, **kwargs: object) -> None:
        save(figure, *args, **kwargs)
        found.update(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", record)
    classes = len(task.diagnoses)
    photos = {"clinical": np.random.default_rng(0).random((16, 16, 3))}
    attention = {"clinical": np.full(16, 1 / 16)}
    maps = AttentionMaps(
        "L1", 0, photos, attention, semantic, {"smoker": "yes"}, np.eye(classes)[1], 1, task.diagnosis_names
    )
    draw_attention(maps, path, task)
    assert path.stat().st_size > 0
    return found


def test_one_view_and_titles_of_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = texts_of(CLINIC, {"smoker": 0.7, "null": 0.3}, tmp_path / "a.png", monkeypatch)
    assert {
        "phone photo",
        "attention of the pooling query",
        "smokes & drinks = yes",
        "none of these (learned token)",
    } <= found
    assert not any("dermoscop" in text or "alignment" in text for text in found)
    assert any(text.startswith("L1, diagnosed MEL<em>1   predicted Nävus 1.00") for text in found)


def test_two_views_concepts_and_a_missing_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = texts_of(TWO_VIEWS, {"clinical/hair_loss": 1.0}, tmp_path / "a.png", monkeypatch)
    assert {"overview photo", "dermoscopic photo", "no photo", "attention of view alignment"} <= found
    assert "overview: hair loss" in found


def test_without_semantic_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = texts_of(milk10k_task(), {}, tmp_path / "a.png", monkeypatch)
    assert {"close-up photo", "dermoscopy photo"} <= found and not any("gating" in text for text in found)


def test_nearly_even_attention_stays_gray() -> None:
    photo = np.random.default_rng(0).random((32, 32, 3))
    gray = np.repeat(photo.mean(2, keepdims=True), 3, axis=2)
    even = np.full(64, 1 / 64)
    picture, top = overlay(photo, even)
    np.testing.assert_allclose(picture, gray, atol=1e-6)
    assert top == FULL_COLOR
    noise = even * np.random.default_rng(1).uniform(0.9, 1.1, 64)
    assert np.abs(overlay(photo, noise / noise.sum())[0] - gray).max() < 0.05
    strong = np.full(64, 0.5 / 63)
    strong[27] = 0.5
    picture, top = overlay(photo, strong)
    assert top == pytest.approx(32) and np.abs(picture - gray).max() > 0.3


def test_long_labels_wrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "clinical/" + "_".join(["regression"] * 6)
    found = texts_of(TWO_VIEWS, {name: 1.0}, tmp_path / "a.png", monkeypatch)
    label = next(text for text in found if "regression" in text)
    assert max(map(len, label.split("\n"))) <= LONGEST_LABEL
