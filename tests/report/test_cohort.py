"""Characteristics of the lesions, and the flow of lesions from the tables to the figures."""

import numpy as np

from tests.synthetic_run import CLINIC
from triderm_dist.intervals import Interval
from triderm_dist.report.cohort import Cohort, PackingFacts, characteristics, exclusions, packing_facts
from triderm_dist.report.elements import Share
from triderm_dist.schema import UNLABELED


def test_counts_shares_quartiles_and_missing_values():
    nan = np.nan
    metadata = np.array([[0, 10, 0], [2, 20, 1], [nan, nan, 1], [2, 40, 1]], float)
    photos = np.array([[True, True], [False, True], [True, True], [True, True]])
    concepts = np.array([[0.1], [nan], [0.2], [0.3]])
    groups = np.array(["a", "a", "b", "c"])
    every = Cohort("all", np.array([0, 1, 1, UNLABELED]), groups, metadata, concepts, photos)
    test = Cohort("test", None, groups[:1], metadata[:1], concepts[:1], None, {"Nävus": 1})
    rows = {
        (row.title, row.value): row.cells for row in characteristics(CLINIC, [every, every.take("x", [2, 3]), test])
    }
    assert rows["lesions", ""] == (4, 2, 1)
    assert rows["groups (patient)", ""] == (3, 2, 1)
    assert rows["diagnosis", "Nävus"] == (Share(2, 3), Share(1, 1), Share(1, 1))
    assert rows["diagnosis", "$x$"] == (Share(0, 3), Share(0, 1), Share(0, 1))
    assert rows["fototyp", "III&"] == (Share(2, 4), Share(1, 2), Share(0, 1))
    assert rows["fototyp", "missing"] == (Share(1, 4), Share(1, 2), Share(0, 1))
    assert ("fototyp", "II<") not in rows  # nobody has it
    about = "n lesions (per m$^2$ <b>)"
    assert rows[about, "median (quartiles)"] == (Interval(20, 15, 30), Interval(40, 40, 40), Interval(10, 10, 10))
    assert rows[about, "missing"] == (Share(1, 4), Share(1, 2), Share(0, 1))
    assert rows["missing", "phone photo"] == (Share(1, 4), Share(0, 2), None)
    assert rows["missing", "concept scores, any"] == (Share(1, 4), Share(0, 2), Share(0, 1))


def test_diagnoses_of_a_test_set_without_labels_are_not_known():
    lesions = Cohort("test", None, np.array(["a"]), np.zeros((1, 3)), np.zeros((1, 0)))
    rows = {(row.title, row.value): row.cells for row in characteristics(CLINIC, [lesions])}
    assert rows["diagnosis", "Nävus"] == (None,)
    assert not any(about == "missing" for about, _ in rows)


def test_flow_subtracts_to_the_scored_lesions():
    facts = PackingFacts(dropped={"unreadable photo": 3, "no photo": 2})
    steps = exclusions(95, 90, 80, facts)
    assert [(step.kind, step.lesions) for step in steps] == [
        *(("count", 100), ("minus", 3), ("minus", 2), ("count", 95), ("minus", 5), ("minus", 10), ("count", 80)),
    ]
    remaining = steps[0].lesions - sum(step.lesions for step in steps if step.kind == "minus")
    assert remaining == steps[-1].lesions
    assert [step.what for step in exclusions(80, 80, 80, None)] == ["packed", "scored"]
    assert [step.what for step in exclusions(None, None, 80, None)] == ["scored"]


def test_records_of_earlier_versions_have_no_flow():
    assert packing_facts({"lesions": 5}) is None
    assert packing_facts({"flow": {"dropped": {"x": "many"}}}) is None
    assert packing_facts({"flow": {"dropped": {"x": 2}}}) == PackingFacts(dropped={"x": 2})
