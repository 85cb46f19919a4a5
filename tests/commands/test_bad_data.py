"""Invalid data for triderm pack and verify: exit status 2, one line on stderr, no output folder."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Challenge, draw_photo, write_table
from tests.processes import launch
from triderm_dist.data.shards.index import read_index
from triderm_dist.tasks import load_task

Make = Callable[..., Challenge]


def run(program: str, *settings: str) -> subprocess.CompletedProcess[str]:
    return launch(program, *settings, check=False)


def truncate(challenge: Challenge) -> None:
    path = challenge.photo(4)
    path.write_bytes(path.read_bytes()[:500])


def forget_folder(challenge: Challenge) -> None:
    challenge.folder = challenge.folder.with_name("absent")


def cut_column(challenge: Challenge) -> None:
    for row in challenge.metadata:
        del row["sex"]


def rename_diagnosis(challenge: Challenge) -> None:
    challenge.truth = [{("SCC" if name == "SCCKA" else name): v for name, v in row.items()} for row in challenge.truth]


BROKEN: dict[str, tuple[Callable[[Challenge], Any], str]] = {
    "missing folder": (forget_folder, "absent: no such folder"),
    "missing table": (
        lambda c: c.metadata_path.rename(c.folder / "tables.csv"),
        "no task.yaml says what the table holds, and the layout is not MILK10k's; triderm task init",
    ),
    "missing column": (cut_column, "MILK10k_Training_Metadata.csv: column 'sex' is missing"),
    "one photo only": (lambda c: c.metadata.pop(5), "row 6: lesion IL_1014 has no dermoscopic photo"),
    "missing photo": (lambda c: c.photo(5).unlink(), "row 7: isic_id: no photo ISIC_5005 ("),
    "truncated photo": (truncate, "ISIC_5004.jpg: truncated"),
    "unknown diagnosis": (rename_diagnosis, "MILK10k_Training_GroundTruth.csv: column 'SCCKA' is missing"),
    "extra diagnosis": (lambda c: [r.update(SCC=0.0) for r in c.truth], "unknown diagnosis 'SCC' in the header"),
    "duplicate lesion": (lambda c: c.truth.append(c.truth[1]), "row 13: lesion IL_1007 occurs twice"),
    "second view": (
        lambda c: c.metadata[5].update(image_type="clinical: close-up"),
        "row 7: lesion IL_1014 has two",
    ),
    "unknown site": (lambda c: c.metadata[5].update(site="torso"), "row 7: unknown site 'torso'"),
    "score over one": (lambda c: c.metadata[5].update(MONET_hair=2), "row 7: MONET_hair '2'"),
    "age as text": (lambda c: c.metadata[5].update(age_approx="old"), "row 7: age_approx 'old'"),
    "two diagnoses": (lambda c: c.truth[5].update(AKIEC=1.0), "row 7: lesion IL_1035 needs a single 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_pack_refuses_invalid_data(make_challenge: Make, tmp_path: Path, name: str) -> None:
    challenge = make_challenge(lesions=11)
    change, message = BROKEN[name]
    change(challenge)
    if challenge.folder.exists() and challenge.metadata_path.exists():
        challenge.write()
    output = tmp_path / "shards"
    result = run("shards.pack", f"source={challenge.folder}", f"output={output}")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and result.stderr.endswith("\n")
    assert message in result.stderr
    assert not output.exists() and not list(tmp_path.glob("*.part"))


CLINIC: dict[str, Any] = {
    "name": "clinic",
    "diagnoses": [{"name": "MEL", "malignant": True}, {"name": "NV", "words": ["mole"]}],
    "views": [{"name": "dermoscopic"}],
    "fields": [{"name": "sex", "column": "sex", "kind": "category", "categories": ["female", "male"]}],
    "columns": {"image": "photo", "diagnosis": "dx", "group": "patient"},
}


def write_clinic(folder: Path, task: Any = None, lesions: int = 6, **cells: Any) -> Path:
    """Write photos, their table and a task.yaml; cells: of the third row, which is row 4 of the spreadsheet."""
    rows = [
        {"photo": f"p{at}.jpg", "dx": ("MEL", "mole")[at % 2], "sex": "Male", "patient": at // 2, "hair": "dark"}
        for at in range(lesions)
    ]
    rows[2].update(cells)
    write_table(folder / "lesions.csv", rows)
    for at in range(lesions):
        draw_photo(at).save(folder / f"p{at}.jpg")
    (folder / "task.yaml").write_text(yaml.safe_dump(CLINIC if task is None else task))
    return folder


BROKEN_CLINIC: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unknown key": ({"concept": {}}, {}, "task.yaml: unknown key 'concept'; did you mean 'concepts'?"),
    "one diagnosis": ({"diagnoses": [{"name": "MEL"}]}, {}, "task.yaml: diagnoses: a task needs at least 2, got 1"),
    "a diagnosis twice": (
        {"diagnoses": [{"name": "MEL"}, {"name": "mel"}]},
        {},
        "task.yaml: diagnoses: 'mel' is written twice",
    ),
    "unknown reader": ({"reader": "excel"}, {}, "reader 'excel' is unknown; known are milk10k, lesions_csv"),
    "value outside the categories": (
        {},
        {"sex": "mael"},
        "lesions.csv, row 4: unknown sex 'mael'; did you mean 'male'? Known are female, male; correct it, list it "
        "under synonyms of sex or under missing_words in task.yaml (1 problem in 1 of 6 lesions;",
    ),
    "unknown diagnosis": ({}, {"dx": "moles"}, "lesions.csv, row 4: unknown dx 'moles'; did you mean 'mole'?"),
    "missing photo": ({}, {"photo": "p9.jpg"}, "lesions.csv, row 4: photo: no photo p9 ("),
    "photo name that is no lesion id": (
        {},
        {"photo": "p.2.jpg"},
        "row 4: photo 'p.2' holds a dot, a slash or an unusual space; name another column by "
        "columns.lesion_id in task.yaml, or rename the photo",
    ),
}


@pytest.mark.parametrize("name", BROKEN_CLINIC)
def test_pack_refuses_invalid_data_of_any_task(tmp_path: Path, name: str) -> None:
    keys, cells, message = BROKEN_CLINIC[name]
    folder = write_clinic(tmp_path / "clinic", {**CLINIC, **keys}, **cells)
    result = run("triderm_dist.commands.pack", f"source={folder}", f"output={tmp_path / 'shards'}")
    assert result.returncode == 2 and message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "shards").exists() and not list(tmp_path.glob("*.part"))


def test_folder_of_any_task_is_packed_and_verified(tmp_path: Path) -> None:
    """A test folder without labels is packed for the task of the training set, also from its index.json."""
    train = write_clinic(tmp_path / "clinic", sex="")
    packed = run("triderm_dist.commands.pack", f"source={train}", f"output={tmp_path / 'train'}")
    assert packed.returncode == 0 and packed.stderr == ""
    assert packed.stdout.count("columns that are not used: hair") == 1
    assert "note: 1 of 6 lesions without sex" in packed.stdout and "note: sex: no row has female" in packed.stdout
    test = write_clinic(tmp_path / "test", task={"name": "of another study"})
    rows = (test / "lesions.csv").read_text().splitlines()
    (test / "lesions.csv").write_text("\n".join(row.split(",")[0] for row in rows))
    task = f"task={tmp_path / 'train' / 'index.json'}"
    packed = run("triderm_dist.commands.pack", f"source={test}", f"output={tmp_path / 'test_shards'}", task)
    assert packed.returncode == 0 and "note: no column 'dx': no lesion has a diagnosis" in packed.stdout
    train_index, test_index = read_index(tmp_path / "train"), read_index(tmp_path / "test_shards")
    assert train_index.task == test_index.task == load_task(train / "task.yaml")
    assert train_index.counts() == {"MEL": 3, "NV": 3} and test_index.unlabeled == 6
    assert train_index.concepts == () and len(set(train_index.groups)) == 3 and "0" not in train_index.groups
    verified = run("triderm_dist.commands.verify", f"folder={tmp_path / 'train'}", "folds=2")
    assert verified.returncode == 0 and "6 photos (0 views missing)" in verified.stdout


def test_incomplete_lesions_can_be_allowed(make_challenge: Make, tmp_path: Path) -> None:
    """A lesion with one photo is kept with a missing view, one with an unreadable photo is dropped; `verify` passes."""
    challenge = make_challenge(lesions=11)
    del challenge.metadata[1]
    truncate(challenge.write())
    output = tmp_path / "shards"
    packed = run("shards.pack", f"source={challenge.folder}", f"output={output}", "missing_view=mark", "invalid=drop")
    assert packed.returncode == 0 and packed.stderr == ""
    assert "note: 1 of 11 lesions with one photo" in packed.stdout
    assert "1 problems: 1 unreadable photo; all in" in packed.stdout
    assert "10 lesions, 1 dropped, 1 shard," in packed.stdout
    table = (tmp_path / "shards.problems.csv").read_text().splitlines()
    assert table[0] == "lesion_id,kind,where,what" and table[1].startswith("IL_1014,unreadable photo,")
    verified = run("shards.verify", f"folder={output}")
    assert verified.returncode == 0 and "19 photos (1 views missing)" in verified.stdout

    shard = output / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 255
    shard.write_bytes(data)
    refused = run("shards.verify", f"folder={output}")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith(f"error: {shard}: checksum ")


@pytest.mark.parametrize(
    ("program", "settings", "message"),
    [
        ("shards.pack", ["sorce=x", "output=y"], "unknown setting 'sorce'; did you mean 'source'?"),
        ("shards.pack", ["source=x"], "output: field required"),
        ("shards.verify", ["folder=absent"], "absent: no such folder"),
        (
            "triderm_dist.commands.synthetic",
            ["output=y", "lesions=3"],
            "lesions: input should be greater than or equal to 100",
        ),
    ],
)
def test_invalid_settings_are_refused(program: str, settings: list[str], message: str) -> None:
    result = run(program, *settings)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
