"""Shipped tasks, the JSON round trip, and one-line errors for contradictory tasks."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import ROOT
from triderm_dist.data.readers.milk10k import CONCEPT_PREFIX, GROUP_COLUMN
from triderm_dist.schema import DIAGNOSES, VIEWS, ConfigError, Task, TaskColumns
from triderm_dist.tasks import load_task, milk10k_task, task_names

SMALL: dict[str, Any] = {
    "name": "small",
    "diagnoses": [{"name": "MEL", "words": ["melanoma"], "malignant": True}, {"name": "NV"}],
    "views": [{"name": "dermoscopic"}],
    "fields": [{"name": "age", "column": "age", "kind": "number", "high": 120}],
    "columns": {"image": "image_id", "diagnosis": "dx"},
}


def test_milk10k_task_equals_the_constants() -> None:
    task = load_task("milk10k")
    assert task.diagnosis_names == DIAGNOSES and all(each.title for each in task.diagnoses)
    assert task.view_names == VIEWS
    assert task.concepts.prefix == CONCEPT_PREFIX and task.field_names == ("age", "sex", "skin_tone", "site")
    assert task.columns.group == GROUP_COLUMN


@pytest.mark.parametrize("name", task_names())
def test_task_json_round_trip(name: str) -> None:
    task = load_task(name)
    mapping = json.loads(json.dumps(task.to_mapping()))
    assert Task.from_mapping(mapping, "index.json") == task
    assert Path(load_task.__code__.co_filename).with_name(f"{name}.yaml").read_text().startswith("# ")


def test_task_file_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(SMALL))
    task = load_task(tmp_path / "task.yaml")
    assert task == Task.from_mapping(SMALL, "task.yaml")
    assert task.fields[0].high == 120.0 and task.diagnoses[0].malignant is True and task.columns.lesion_id is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("milk10", "did you mean 'milk10k'?"),
        ("nevi", "known are "),
        ("none.yaml", "no such file; triderm task init"),
    ],
)
def test_unknown_tasks_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"\A[^\n]+\Z") as error:
        load_task(name)
    assert message in str(error.value)


def changed(**keys: Any) -> dict[str, Any]:
    return {**SMALL, **keys}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (changed(diagnosis=[]), "unknown key 'diagnosis'; did you mean 'diagnoses'?"),
        (
            changed(columns={"image": "a", "pictures": "b"}),
            "unknown key 'columns.pictures'; known are image, lesion_id",
        ),
        (changed(columns={"view": "kind"}), "columns.view: needs columns.image, the column of the photos"),
        (changed(diagnoses=[{"name": "MEL"}]), "at least 2, got 1"),
        (changed(diagnoses=[]), "at least 2, got 0"),
        (changed(diagnoses=[{"name": "MEL"}, {"name": "mel"}]), "'mel' is written twice"),
        (changed(diagnoses=[{"name": "MEL"}, {"name": "NV", "words": ["MEL"]}]), "'mel' is written twice"),
        (changed(diagnoses=[{"name": "a b"}, {"name": "NV"}]), "diagnosis 'a b'"),
        (changed(diagnoses=[{"name": "a", "malignant": "maybe"}]), "diagnoses[0].malignant: expected true or false"),
        (changed(diagnoses="MEL"), "diagnoses: expected a list, got 'MEL'"),
        (changed(views=[]), "list one or both of clinical, dermoscopic"),
        (changed(views=[{"name": "dermoscopic"}, {"name": "clinical"}]), "in this order"),
        (changed(views=[{"name": "confocal"}]), "unknown view 'confocal'"),
        (changed(views=[{"name": "clinical"}, {"name": "dermoscopic"}]), "columns.view: name the column"),
        (changed(columns={"image": {"clinical": "a"}}), "columns.image: needs a column for each view: dermoscopic"),
        (changed(concepts={"prefix": "x", "names": ["y"]}), "not both"),
        (changed(concepts={"names": ["y"], "words": {"present": 5}}), "the score of 'present' is 5; write one from 0"),
        (changed(concepts={"names": ["y"], "words": {"No": 0, "no": 1}}), "concepts.words: 'no' is written twice"),
        (
            changed(fields=[{"name": "age", "column": "age", "kind": "number", "high": 10**400}]),
            "fields[0].high: expected a number, got 1000",
        ),
        (changed(fields=[{"name": "age", "column": "age", "kind": "numeric"}]), "known are number, category"),
        (changed(fields=[*SMALL["fields"], *SMALL["fields"]]), "'age' is written twice"),
        (
            changed(fields=[{"name": "sex", "column": "s", "kind": "category", "categories": ["f", "unknown"]}]),
            "'unknown' is a category of sex and a missing word",
        ),
        (changed(decision="best"), "decision: unknown value 'best'; known are argmax, threshold, fitted"),
        (changed(submission="isic"), "submission: unknown value 'isic'"),
        ([], "expected a mapping of keys, got a list"),
    ],
)
def test_contradictory_tasks_give_one_line(raw: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=r"\Atask\.yaml: [^\n]+\Z") as error:
        Task.from_mapping(raw, "task.yaml")
    assert message in str(error.value)


def test_page_lists_every_key() -> None:
    page = (ROOT / "docs" / "your-own-data.md").read_text(encoding="utf-8")
    listed = {key for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for key in re.findall(r"`([\w.]+)`", row)}
    keys = {each.name for each in fields(Task)} - {"columns"} | {f"columns.{each.name}" for each in fields(TaskColumns)}
    assert listed == keys


def test_task_of_a_packed_set_is_read_from_its_index(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    for content, task in (("{}", milk10k_task()), (json.dumps({"task": SMALL}), Task.from_mapping(SMALL, ""))):
        path.write_text(content)
        assert load_task(path) == task
    for content, message in (
        ("{", "not the index of a packed set"),
        ("[]", "not the index"),
        ('{"task": 1}', "task: "),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=rf"index.json: {message}"):
            load_task(path)
    with pytest.raises(ConfigError, match=r"none/index.json: No such file or directory; give a packed set"):
        load_task(tmp_path / "none" / "index.json")
