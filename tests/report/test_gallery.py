"""Photos of lesions in the report."""

import base64
import io
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.trained_run import TrainedRun
from triderm_dist.commands.report import ReportRun
from triderm_dist.config import load_run
from triderm_dist.engine.explain import attention_maps, out_of_fold_attention
from triderm_dist.report.content import Content
from triderm_dist.report.gallery import SIDE, gallery_of
from triderm_dist.report.render import write_page
from triderm_dist.report.sections.hardest import hardest
from triderm_dist.report.sections.typical import typical
from triderm_dist.schema import DataError


@pytest.fixture(scope="module")
def run(trained_run: TrainedRun) -> Path:
    return trained_run.folder


def test_lesions_are_shown_with_their_photos_without_metadata(run: Path) -> None:
    content = Content(run)
    gallery = gallery_of(content, content.lesion_lists.hardest)
    assert [each.lesion for each in gallery.lesions] == content.lesion_lists.hardest and not gallery.why
    for each in gallery.lesions:
        assert [photo.view for photo in each.photos] == ["close-up", "dermoscopy"]
        for photo in each.photos:
            data = base64.b64decode(photo.source.removeprefix("data:image/jpeg;base64,"))
            image = Image.open(io.BytesIO(data))
            assert image.size == (photo.width, photo.height) and max(image.size) <= SIDE
            assert not image.getexif() and b"Exif" not in data and len(data) < 20_000


def test_best_and_median_lesions_of_each_diagnosis(run: Path) -> None:
    content = Content(run)
    share = content.rows.probabilities / content.rows.probabilities.sum(axis=1, keepdims=True)
    of_label = share[np.arange(len(content.labels)), content.labels]
    for label, name in enumerate(content.diagnoses):
        own = [lesion for lesion in content.lesion_lists.typical if lesion.label == name]
        values = np.sort(of_label[content.labels == label])[::-1]
        assert [lesion.label_probability for lesion in own] == pytest.approx([values[0], values[len(values) // 2]])


def test_photos_are_shown_with_the_attention_of_the_model_of_their_fold(run: Path, tmp_path: Path) -> None:
    experiment = load_run(ReportRun, run).experiment
    content = Content(run, attend=partial(out_of_fold_attention, experiment))
    gallery = gallery_of(content, content.lesion_lists.typical)
    assert gallery.shows_attention and not gallery.why_unattended
    ids = [each.lesion.lesion_id for each in gallery.lesions]
    expected = {maps.lesion_id: maps.attention for _, _, maps in attention_maps(experiment, ids)}
    for each in gallery.lesions:
        assert [photo.view for photo in each.attention] == [photo.view for photo in each.photos]
        shares = [float(part.max()) * len(part) for part in expected[each.lesion.lesion_id].values()]
        assert [photo.strongest for photo in each.attention] == pytest.approx(shares)
    assert "times the even share" in page_of(content, tmp_path) and "times the even" not in page_of(
        Content(run), tmp_path
    )

    def untrained(lesion_ids: list[str]) -> dict:
        raise DataError("fold-0: not trained")

    text = page_of(Content(run, attend=untrained), tmp_path)
    assert "cannot be shown (fold-0: not trained)" in text and "data:image/jpeg" in text


def page_of(content: Content, folder: Path) -> str:
    """Write a page of the two sections that hold photos only of lesions."""
    sections = [section for section in (hardest(content), typical(content)) if section]
    return write_page(folder / "page.html", folder / "files", "photos", sections).read_text(encoding="utf-8")


def test_page_holds_photos_only_where_they_are_asked_for(run: Path, tmp_path: Path) -> None:
    shown, hidden = page_of(Content(run), tmp_path), page_of(Content(run, shows_photos=False), tmp_path)
    assert "data:image/jpeg" in shown and "part of this file; report.photos=false" in shown
    assert "data:image/jpeg" not in hidden and "Photos are left out (report.photos=false)." in hidden
    assert "Typical lesions" in shown and "Typical lesions" not in hidden
    moved = shutil.copytree(run, tmp_path / "moved")
    shutil.rmtree(moved / "shards")
    text = page_of(Content(moved), tmp_path)
    assert "not at hand, so none are shown" in text and "data:image/jpeg" not in text
