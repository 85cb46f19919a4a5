"""The learning curve by the number of training lesions, and its extrapolation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.report.test_comparison import stack
from tests.synthetic_run import write_run
from triderm_dist import metrics
from triderm_dist.checksums import write_checked_json
from triderm_dist.predictions import PARTS, find_predictions, part_folder, read_predictions, write_predictions
from triderm_dist.report.content import Content
from triderm_dist.report.learning_curve import fit_learning_curve
from triderm_dist.report.render import write_page
from triderm_dist.report.sections.learning_curve import learning_curve
from triderm_dist.schema import DataError

SIZES = (250.0, 500.0, 1000.0)


def decisions_with(errors: tuple[float, ...], lesions: int = 4000) -> tuple[list[np.ndarray], np.ndarray]:
    """Return decisions of two diagnoses with these shares of errors, and the labels."""
    generator = np.random.default_rng(0)
    labels = np.arange(lesions) % 2
    noise = generator.random(lesions)
    return [np.eye(2, dtype=bool)[np.where(noise < error, 1 - labels, labels)] for error in errors], labels


def test_power_law_is_recovered_and_extrapolated() -> None:
    exact = tuple(2.0 * size**-0.4 for size in SIZES)
    decisions, labels = decisions_with(exact)
    curve = fit_learning_curve("net", SIZES, decisions, labels, np.arange(len(labels)).astype(str), 200)
    scores = [metrics.macro_f1(each, labels) for each in decisions]
    slope, intercept = np.polyfit(np.log(SIZES), np.log([1 - score for score in scores]), 1)
    assert curve.exponent == pytest.approx(-slope, abs=1e-12)
    assert curve.scale == pytest.approx(np.exp(intercept), rel=1e-12)
    assert curve.exponent == pytest.approx(0.4, abs=0.1)
    assert curve.expected.value == pytest.approx(1 - 2.0 * 2000**-0.4, abs=0.01)
    assert curve.expected.low < curve.expected.value < curve.expected.high
    assert curve.gain.value == pytest.approx(
        float(curve.power_law(np.array(2000.0)) - curve.power_law(np.array(1000.0)))
    )
    assert curve.helps and curve.half.value == pytest.approx(scores[2] - scores[1])


def test_a_flat_curve_promises_nothing() -> None:
    decisions, labels = decisions_with((0.2, 0.2, 0.2))
    shuffled = [
        each[np.random.default_rng(seed).permutation(len(labels) // 2) * 2] for seed, each in enumerate(decisions)
    ]
    for each, part in zip(decisions, shuffled, strict=True):
        each[::2] = part
    curve = fit_learning_curve("net", SIZES, decisions, labels, np.arange(len(labels)).astype(str), 200)
    assert not curve.helps and abs(curve.gain.value) < 0.01


def test_without_errors_the_curve_is_finite() -> None:
    decisions, labels = decisions_with((0.1, 0.0, 0.0), 200)
    curve = fit_learning_curve("net", SIZES, decisions, labels, np.arange(len(labels)).astype(str), 50)
    assert curve.expected.value <= 1 and np.isfinite(curve.exponent)


def write_parts(folder: Path, model: str) -> None:
    """Write predictions of a network that was trained on parts of the lesions: the fewer, the noisier."""
    for path in find_predictions(folder, [model]):
        whole = read_predictions(path)
        for percent in PARTS:
            part = part_folder(folder, model, percent, int(whole.fold[0]))
            noise = np.random.default_rng(percent).normal(scale=60 / percent, size=whole.logits.shape)
            hashes = np.array([f"{each[:-1]}{percent}" for each in whole.model_hash], object)
            write_predictions(
                part / "predictions.parquet", replace(whole, logits=whole.logits + noise, model_hash=hashes)
            )
            write_checked_json(part / "fold.json", {"lesions": percent})


def test_the_page_says_whether_more_lesions_would_help(tmp_path: Path) -> None:
    write_run(tmp_path / "run", lesions=200)
    content = Content(stack(tmp_path / "run"))
    assert learning_curve(content) is None
    write_parts(tmp_path / "run", "trimodal")
    content = Content(tmp_path / "run")
    (curve,) = content.learning_curves
    assert curve.model == "trimodal" and curve.lesions[:2] == PARTS
    assert curve.lesions[2] == pytest.approx(200 * 2 / 3)
    whole = metrics.argmax_macro_f1(content.table.logits["trimodal"], content.labels)
    scores = [each.value for each in curve.macro_f1]
    assert scores[2] == pytest.approx(whole) and scores == sorted(scores)
    section = learning_curve(content)
    assert section is not None
    page = write_page(tmp_path / "page.html", tmp_path / "files", "page", [section]).read_text(encoding="utf-8")
    assert f"{curve.gain.value:+.3f}" in page and ("Probably yes" in page) == curve.helps
    (part_folder(tmp_path / "run", "trimodal", 25, 1) / "fold.json").write_text("{}")
    with pytest.raises(DataError, match=r"fold-1/fold.json: .*; delete its folder and run triderm report"):
        Content(tmp_path / "run").learning_curves  # noqa: B018
