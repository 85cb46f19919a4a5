"""The HTML report of a run."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.ensemble.conftest import experiment
from tests.synthetic_run import CLINIC
from triderm_dist import metrics
from triderm_dist.checksums import read_checked_json, write_checked_json
from triderm_dist.ensemble.fit import fit_ensemble
from triderm_dist.ensemble.thresholds import Rule
from triderm_dist.predictions import read_oof, write_oof
from triderm_dist.report import write_report
from triderm_dist.report.content import MIN_COMMON_LESIONS, Content
from triderm_dist.report.elements import Figure, Share
from triderm_dist.report.page import sections_of
from triderm_dist.report.render import write_page
from triderm_dist.report.sections.confusion import confusion
from triderm_dist.report.sections.ensemble import ensemble
from triderm_dist.report.sections.head import head
from triderm_dist.report.sections.malignancy import malignancy
from triderm_dist.report.sections.manuscript import manuscript
from triderm_dist.report.slices import GROUP
from triderm_dist.report.wording import RULES, predicts_alone
from triderm_dist.schema import DIAGNOSES, DataError, Task


class Page(HTMLParser):
    """Parses a page into its tags with attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(content: Content, folder: Path) -> Page:
    """Write the page of some content, with empty figures, and parse it."""

    def empty(figure: Figure) -> Figure:
        return replace(figure, draw=lambda canvas: None, size=(1, 1))

    sections = [
        replace(section, figures=[empty(figure) for figure in section.figures]) for section in sections_of(content)
    ]
    path = write_page(folder / "page.html", folder / "page", "page", sections)
    return Page(path.read_text(encoding="utf-8"))


def test_page_is_self_contained_and_shows_the_score(run: Path) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    score = json.loads((run / "ensemble.json").read_text())["scores"]["ensemble"]["nested"]
    assert f"{score['value']:.3f}" in page.text
    assert f"{score['low']:.3f} to {score['high']:.3f}" in page.text
    assert not re.search(r"(src|href)=\"?https?:", html) and "<script" not in html
    pictures = [attributes for tag, attributes in page.tags if tag in ("img", "svg")]
    assert len(pictures) == len(list((run / "report").glob("*.png"))) == len(list((run / "report").glob("*.svg"))) == 12
    for attributes in pictures:
        assert "src" not in attributes or (attributes["src"] or "").startswith("data:image/png;base64,")
        assert len(attributes.get("alt") or attributes.get("aria-label") or "") > 30
    assert "0.544 nested" in page.text and "Published results" in page.text
    assert "output: " in page.text  # the resolved settings
    for name in DIAGNOSES:
        assert name in page.text
    assert "SYNTHETIC" not in page.text
    assert not list(run.rglob("*.part*"))


@pytest.mark.slow
def test_page_is_reproducible(run: Path) -> None:
    before = (run / "report.html").read_bytes()
    assert write_report(run).read_bytes() == before


def test_held_out_score_and_synthetic_data_are_shown(run: Path, tmp_path: Path) -> None:
    (run / "data").mkdir()
    (run / "data" / "README.txt").write_text("SYNTHETIC DEMO DATA. NOT A MEDICAL DATA SET.\n")
    text = page_of(Content(run), tmp_path).text
    assert "0.432" in text and "150 lesions · without INF, absent from the test set" in text
    assert "SYNTHETIC data." in text and "0.544" not in text
    shutil.rmtree(run / "data")


def test_counts_and_confusion_agree_with_the_decisions(run: Path) -> None:
    content = Content(run)
    decisions, labels = content.rows.decisions, content.labels
    np.testing.assert_allclose(content.counts.f1, metrics.f1_per_class(decisions, labels))
    assert content.score.value == pytest.approx(np.mean(content.counts.f1))
    for row in range(len(DIAGNOSES)):
        own = decisions[labels == row]
        assert content.confusion[row, row] == content.counts.true_positives[row] == own[:, row].sum()
        assert content.confusion[row, -1] == (own.sum(axis=1) == 0).sum()
    share = content.rows.probabilities / content.rows.probabilities.sum(axis=1, keepdims=True)
    least = np.sort(share[np.arange(len(labels)), labels])[:20]
    np.testing.assert_allclose([lesion.label_probability for lesion in content.lesion_lists.hardest], least)


@pytest.mark.parametrize("rule", RULES)
def test_fitted_rule_is_described_wherever_decisions_are(rule: Rule, run: Path) -> None:
    content = Content(run)
    assert content.task.decision == "threshold"
    content.ensemble = replace(content.ensemble, rule=rule)
    opening, methods, members = head(content), manuscript(content), ensemble(content)
    assert opening.values["rule"] == methods.values["rule"] == RULES[rule]
    assert RULES[rule] in str(members.values["text"])
    assert not [text for text in RULES.values() if text != RULES[rule] and text in str(members.values["text"])]


def test_groups_are_numbered_in_the_order_of_their_names(run: Path) -> None:
    content = Content(run)
    names = np.array([f"patient-{row % 13}" for row in range(len(content.labels))], object)
    content.table = replace(content.table, groups=names)
    np.testing.assert_array_equal(content.groups, np.unique(names.astype(str), return_inverse=True)[1])


def test_yardsticks_beside_macro_f1(run: Path, tmp_path: Path) -> None:
    content = Content(run)
    decisions, labels = content.rows.decisions, content.labels
    content.rows = replace(content.rows, decisions=np.where(labels[:, None] == 0, False, decisions))  # AKIEC: F1 of 0
    assert content.class_intervals[0].low == 0 and 0 < content.class_intervals[0].high < 0.5
    f1 = metrics.f1_per_class(content.rows.decisions, labels)
    common = content.counts.positives >= MIN_COMMON_LESIONS
    assert 0 < common.sum() < len(common)
    assert content.common_score is not None and content.common_score.value == pytest.approx(f1[common].mean())
    lesions, spread = content.test_set
    assert lesions == 150 and spread.low < f1.mean() < spread.high
    assert len(content.fold_scores) == 3
    folds = next(table for section in sections_of(content) for table in section.tables if table.name == "folds")
    for fold, score in enumerate(content.fold_scores):
        own = content.rows.folds == fold
        assert (
            folds.value(f"fold {fold}", "ensemble")
            == score
            == metrics.macro_f1(content.rows.decisions[own], labels[own])
        )
        for name in content.networks:
            expected = metrics.argmax_macro_f1(content.table.logits[name][own], labels[own])
            assert folds.value(f"fold {fold}", name) == expected
    text = page_of(content, tmp_path).text
    for figure in (content.common_score.value, spread.low, spread.high, *content.metric_values["auc"].json().values()):
        assert f"{figure:.3f}" in text
    first = content.discrimination.diagnoses[0]
    for value in (first.area_under_roc, first.average_precision, first.rates.negative_predictive_value):
        assert f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})" in text


def test_a_row_better_than_the_figure_is_explained(run: Path, tmp_path: Path) -> None:
    content = Content(run)
    best = max(content.scores, key=lambda row: row.nested.value)
    explained = f"best row ({best.name}, {best.nested.value:.3f})"
    assert (explained in page_of(content, tmp_path).text) == (best.nested.value > content.score.value)
    content.score = replace(content.score, value=best.nested.value + 0.01)
    assert "includes the choice" not in page_of(content, tmp_path).text
    content.score = replace(content.score, value=0.0)
    assert "includes the choice" in page_of(content, tmp_path).text


def test_report_states_what_predicts(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    assert "The ensemble predicts." in Page((run / "report.html").read_text(encoding="utf-8")).text
    fit_ensemble(tmp_path / "run", experiment(tmp_path / "run", use="trimodal", enabled=False))
    content = Content(tmp_path / "run")
    assert content.networks == ("trimodal", "dual_cnn")
    text = page_of(content, tmp_path).text
    gap = content.fit["choice"]["difference"]
    assert text.count("trimodal predicts alone.") == 2  # of the ensemble, and of the text for a paper
    assert "thresholds and weights fitted on the other folds" in text and "and stacker" not in text  # there is none
    assert text.count(f"{gap['value']:+.3f}") >= 3 and f"{gap['low']:+.3f} to {gap['high']:+.3f}" in text
    for weighting, members, sentence in (
        ("trimodal-seeds", ("trimodal", "trimodal-s1"), "The mean of the 2 seeds of trimodal predicts alone."),
        ("stack", ("trimodal", "dual_cnn", "stack"), "The stacker predicts alone."),
        ("mean", ("trimodal", "dual_cnn"), ""),
    ):
        content.ensemble = replace(content.ensemble, members=members, weighting=weighting)
        assert predicts_alone(content) == sentence


def test_slices_of_every_field_cover_all_lesions(run: Path) -> None:
    content = Content(run)
    sizes = {(part.field, part.value): part.lesions for part in content.slices}
    for field in ("sex", "skin_tone", "site", "age"):
        assert sum(size for key, size in sizes.items() if key[0] == field) == len(content.labels)
    male = content.table.metadata[:, 1] == 1
    blind = np.eye(len(DIAGNOSES), dtype=bool)[content.labels]
    blind[male & (np.arange(len(male)) % 2 == 0)] = False
    content.rows = replace(content.rows, decisions=blind)
    del content.slices
    tables = {table.name: table for section in sections_of(content) for table in section.tables}
    verdict = tables["slice_gaps"].text("male", "verdict", group="sex")
    assert verdict.startswith("lower macro F1, lower mean recall") and "AUC" not in verdict
    assert tables["slice_gaps"].text("missing", "verdict", group="skin tone (0 very dark, 5 very light)") == (
        "too few lesions"
    )


def test_predictions_of_different_weights_are_refused(run: Path, tmp_path: Path) -> None:
    for name in ("ensemble.json", "ensemble_oof.parquet", "oof.parquet"):
        shutil.copy(run / name, tmp_path / name)
    table = read_oof(tmp_path / "oof.parquet")
    model = table.models[0]
    write_oof(tmp_path / "oof.parquet", replace(table, hashes=table.hashes | {model: table.hashes[model] + "x"}))
    with pytest.raises(DataError, match=f"other weights of {model}.*run triderm stack again"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_run_without_stacking_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(DataError, match=r"ensemble.json: no such file; run triderm stack first"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
    for name in ("ensemble.json", "ensemble_oof.parquet", "oof.parquet"):
        shutil.copy(run / name, tmp_path / name)
    text = page_of(Content(tmp_path), tmp_path).text  # without curves, stacker, settings or held-out score
    assert "Training curves" not in text and "Settings" not in text and "held-out test set" not in text
    content = Content(tmp_path)
    assert f"test sets of {len(content.labels) // 3} such lesions" in text  # as many as a fold has


def test_swapped_labels_are_listed_as_probable_label_errors(run: Path) -> None:
    """Lesions with confident predictions and a wrong label are listed first, with their true diagnosis."""
    content = Content(run)
    confident = np.flatnonzero((content.rows.labels == DIAGNOSES.index("NV")) & content.rows.decisions[:, 8])[:6]
    for name in content.networks:
        content.table.logits[name][confident] = 9.0 * np.eye(len(DIAGNOSES))[8]
    labels, probabilities = content.rows.labels.copy(), content.rows.probabilities.copy()
    labels[confident] = DIAGNOSES.index("MEL")
    probabilities[confident] = 0.9 * np.eye(len(DIAGNOSES))[8] + 0.01
    content.rows = replace(content.rows, labels=labels, probabilities=probabilities)
    found = content.lesion_lists.mislabeled
    assert {lesion.lesion_id for lesion in found[:6]} == set(content.rows.lesion_ids[confident])
    assert all((lesion.label, lesion.alternative, lesion.agree) == ("MEL", "NV", 2) for lesion in found[:6])
    assert len(found) < len(content.labels) / 4


def copy_run(run: Path, folder: Path, task: Task) -> None:
    """Copy the run, as if the ensemble had been fitted for another description of its task."""
    shutil.copytree(run, folder)
    path = folder / "ensemble.json"
    write_checked_json(path, read_checked_json(path) | {"task": task.to_mapping()})


def test_extra_sets_of_the_training_are_named(clinic: Path, tmp_path: Path) -> None:
    shutil.copytree(clinic, tmp_path / "run")
    assert "joined the training" not in (clinic / "report.html").read_text(encoding="utf-8")
    for fold, lesions in enumerate((3028, 3028, 3000)):
        path = tmp_path / "run" / Content(clinic).networks[0] / f"fold-{fold}" / "fold.json"
        info = read_checked_json(path) if path.exists() else {}
        write_checked_json(path, {**info, "extra": [{"task": "ham10000", "lesions": lesions, "weight": 0.5}]})
    page = page_of(Content(tmp_path / "run"), tmp_path).text
    assert "Lesions of other sets joined the training: ham10000 (3,028 lesions, weight 0.5), ham10000 (3,000" in page


def test_report_of_any_task(clinic: Path) -> None:
    html = (clinic / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "Lesions of a <clinic> & $practice$: clinic" in page.text
    for name in (*CLINIC.diagnosis_names, "thin [melanoma]", "wart & co", "smokes & drinks", "II<", "III&"):
        assert name in page.text, name
    assert "n lesions (per m$^2$ <b>)" in page.text and "lesions of the same patient" in page.text
    for word in ("milk", "monet", "isic", "leaderboard", "challenge", "official", "melanoma [", "dermoscop", "site"):
        assert word not in page.text.lower(), word
    assert "an expert <b>" in page.text and "a & b" in page.text
    assert not {"b", "clinic", "em"} & {tag for tag, _ in page.tags}
    assert "Lesions with one photo" not in page.text  # there is one view


@pytest.mark.parametrize("decision", ["argmax", "fitted", "threshold"])
def test_report_says_what_its_main_figure_counts(clinic: Path, tmp_path: Path, decision: str) -> None:
    copy_run(clinic, tmp_path / "run", replace(CLINIC, decision=decision))
    content = Content(tmp_path / "run")
    text = page_of(content, tmp_path).text
    label = {"argmax": "most probable diagnosis", "fitted": "one diagnosis by fitted thresholds",
             "threshold": "each diagnosis with p > 0.5"}[decision]  # fmt: skip
    assert f"Macro F1, out of fold, nested, {label}" in text and f"Macro F1, {label}" in text
    assert ("fitted (too high)" in text) == (decision == "threshold")
    assert ("Thresholds: from the fit on all lesions" in text) == (decision != "argmax")
    tables = {table.name: table for section in sections_of(content) for table in section.tables}
    for name, same in (("metrics", "Mean recall over diagnoses"), ("macro_f1", "most probable diagnosis")):
        assert (same in {row.name for row in tables[name].rows}) == (decision != "argmax"), name


def test_report_without_reference_results_kinds_and_fields(clinic: Path, tmp_path: Path) -> None:
    unknown = tuple(replace(each, malignant=None, title="") for each in CLINIC.diagnoses)
    copy_run(clinic, tmp_path / "run", replace(CLINIC, title="", diagnoses=unknown, reference_results=()))
    table = read_oof(clinic / "oof.parquet")
    write_oof(tmp_path / "run" / "oof.parquet", replace(table, groups=table.lesion_ids))
    text = page_of(Content(tmp_path / "run"), tmp_path).text
    assert "clinic: run" in text
    (tmp_path / "run").rename(tmp_path / "clinic")
    content = Content(tmp_path / "clinic")
    head = next(section for section in sections_of(content) if "heading" in section.values)
    assert head.values["heading"] == "clinic"
    rankings = next(table for section in sections_of(content) for table in section.tables if table.name == "rankings")
    assert not any(row.note for row in rankings.rows)  # a title that is the name is not repeated
    for heading in ("Published results", "Malignant against benign", "lesions of the same"):
        assert heading not in text


def test_diagnoses_and_fields_of_equal_titles_are_told_apart(clinic: Path, tmp_path: Path) -> None:
    content = Content(clinic)
    same = [replace(each, title="carcinoma", malignant=at < 2) for at, each in enumerate(CLINIC.diagnoses)]
    phototype, lesions, _ = CLINIC.fields
    numbers = [replace(lesions, name=name, column=name, title="moles", unit="") for name in ("Anzahl", "Male")]
    content.task = replace(CLINIC, diagnoses=tuple(same), fields=(phototype, *numbers))
    text = page_of(content, tmp_path).text
    for name in CLINIC.diagnosis_names[:2]:
        assert f"carcinoma ({name}), target sensitivity 90%: sensitivity" in text
    for column in ("Anzahl", "Male"):
        assert f"Median of moles, {column}: " in text


def test_columns_of_every_table_have_different_names(run: Path) -> None:
    for path in (run / "report").glob("*.csv"):
        header = path.read_text(encoding="utf-8").splitlines()[0].split(",")
        assert len(set(header)) == len(header), path.name


def test_main_figure_has_one_interval(run: Path) -> None:
    tables = {table.name: table for section in sections_of(Content(run)) for table in section.tables}
    assert tables["macro_f1"].rows[0].values == tables["metrics"].rows[0].values


@pytest.mark.parametrize("several", [False, True])
def test_confusion_says_whether_lesions_have_several_predictions(run: Path, several: bool) -> None:
    content = Content(run)
    decisions = np.eye(len(DIAGNOSES), dtype=bool)[content.labels]
    decisions[0] = several
    content.rows = replace(content.rows, decisions=decisions)
    section = confusion(content)
    caption = section.figures[0].caption
    assert ("several predictions" in caption) == several and "no diagnosis was predicted" in caption


def test_malignant_against_benign_counts_the_kinds_that_the_task_states(clinic: Path) -> None:
    content = Content(clinic)
    labels, decisions = content.labels, content.rows.decisions
    section = malignancy(content)
    assert section is not None
    assert f"{(labels == 2).sum()} lesions with another diagnosis left out" in section.values["note"]
    found = (decisions[:, 0] & (labels == 0)).sum()
    rates, counts = section.tables
    assert counts.value("malignant lesions", "malignant") == Share(found, (labels == 0).sum())
    assert counts.value("benign lesions", "malignant").total == np.isin(labels, [1, 3]).sum()
    assert rates.value("Sensitivity", "nested").value == pytest.approx(found / (labels == 0).sum())


def test_slices_of_groups(clinic: Path) -> None:
    content = Content(clinic)
    slices = {part.value: part.lesions for part in content.slices if part.field == GROUP}
    assert slices == {"one": (content.table.folds != 0).sum(), "several": (content.table.folds == 0).sum()}
    assert {part.field for part in content.slices} == {*CLINIC.field_names, GROUP}


def test_report_of_another_task_than_the_ensembles_is_refused(clinic: Path, tmp_path: Path) -> None:
    shutil.copytree(clinic, tmp_path / "run")
    table = read_oof(clinic / "oof.parquet")
    write_oof(tmp_path / "run" / "oof.parquet", replace(table, task=replace(CLINIC, name="other")))
    with pytest.raises(
        DataError, match=r"ensemble\.json: was fitted for task 'clinic', .* for 'other'; run triderm stack"
    ):
        write_report(tmp_path / "run")


def test_report_where_one_network_predicts_alone(run: Path) -> None:
    content = Content(run)
    first = content.networks[0]
    content.ensemble = replace(content.ensemble, members=(first,), weights=(1.0,), temperatures=(0.8,))
    assert len(content.networks) == 2
    tables = {table.name: table for section in sections_of(content) for table in section.tables}
    assert tables["members"].text(first, "temperature") == "0.80"
    networks = [row.name for row in tables["calibration_networks"].rows]
    assert networks == list(content.networks)


def test_gaps_that_are_not_judged_are_not_said_to_be(clinic: Path, tmp_path: Path) -> None:
    content = Content(clinic)
    text = page_of(content, tmp_path / "judged").text
    assert "gaps that are judged" in text and "Adjusted p-values" in text
    content.slices = [replace(part, p=np.nan, adjusted=np.nan) for part in content.slices]
    text = page_of(content, tmp_path / "small").text
    assert "nothing is judged" in text and "gaps that are judged" not in text and "Adjusted p-values" not in text
