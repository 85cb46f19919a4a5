"""Conditions select the lesions that a plain loop over the table finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Challenge
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.select import select_rows
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.schema import DIAGNOSES, UNLABELED, ConfigError


@pytest.fixture
def index(make_challenge: Callable[..., Challenge], tmp_path: Path) -> ShardIndex:
    """22 lesions, one without a dermoscopic photo, one without a diagnosis."""
    challenge = make_challenge()
    del challenge.metadata[9]
    challenge.truth[7].update(dict.fromkeys(DIAGNOSES, ""))
    dataset = read_challenge(challenge.write().folder, missing_view="mark")
    return pack_shards(dataset, tmp_path / "out", short_side=24)


def rows(index: ShardIndex) -> list[dict[str, Any]]:
    """Return what conditions name, lesion by lesion; None where missing."""
    result = []
    for row, label in enumerate(index.labels.tolist()):
        values: dict[str, Any] = {"diagnosis": None if label == UNLABELED else index.diagnoses[label]}
        for field, value in zip(index.task.fields, index.metadata[row].tolist(), strict=True):
            known = value if field.is_number else field.categories[int(value)] if value == value else None
            values[field.name] = None if value != value else known
        values |= dict(zip(index.concepts, index.concept_scores[row].tolist(), strict=True))
        result.append(values | {"has_dermoscopic": index.sizes[row, 1] > 0})
    return result


def test_condition_selects_the_lesions_that_python_selects(index: ShardIndex) -> None:
    lesions = rows(index)
    age = float(np.nanmedian(index.metadata[:, index.task.field_names.index("age")]))
    sex, concept = index.task.fields[index.task.field_names.index("sex")].categories[0], index.concepts[0]
    two = tuple(index.diagnoses[:2])
    score = str(index.concept_scores[3, 0])  # as the table has it: float32 rounds it
    assert float(score) != index.concept_scores[3, 0].item()
    cases: list[tuple[str, Callable[[dict[str, Any]], bool]]] = [
        (f"diagnosis in {two!r}", lambda lesion: lesion["diagnosis"] in two),
        ("diagnosis is None", lambda lesion: lesion["diagnosis"] is None),
        ("not (diagnosis is not None)", lambda lesion: lesion["diagnosis"] is None),
        (f"age >= {age}", lambda lesion: lesion["age"] is not None and lesion["age"] >= age),
        (f"sex == '{sex}' and age < {age}",
         lambda lesion: lesion["sex"] == sex and lesion["age"] is not None and lesion["age"] < age),
        (f"sex != '{sex.upper()}' or {concept!r} > 0.5",
         lambda lesion: (lesion["sex"] not in (None, sex)) or lesion[concept] > 0.5),
        (f"diagnosis not in ['{two[0]}']", lambda lesion: lesion["diagnosis"] not in (None, two[0])),
        ("not has_dermoscopic", lambda lesion: not lesion["has_dermoscopic"]),
        (f"{concept!r} in ({score},)", lambda lesion: lesion[concept] == float(np.float32(score))),
    ]  # fmt: skip
    for condition, expected in cases:
        assert select_rows(index, condition).tolist() == [bool(expected(lesion)) for lesion in lesions], condition


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("sx == 'male'", "'sx' is not known; did you mean 'sex'"),
        ("sex == 'mael'", "'mael' is no value of sex; known: "),
        ("sex < 'male'", "sex is compared by ==, !="),
        ("age == 'old'", "age holds numbers, not 'old'"),
        ("age = 3", "is not a condition"),
        ("__import__('os').remove('x')", "is not a condition"),
        ("age == (3).real", "is not a condition"),
        ("1 < age < 3", "is not a condition"),
        ("(" * 500 + "age == 3" + ")" * 500, "is not a condition"),
        ("", "is not a condition"),
    ],
)
def test_what_is_no_condition_is_refused(index: ShardIndex, condition: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^select: ") as error:
        select_rows(index, condition)
    assert message in str(error.value) and "\n" not in str(error.value)
