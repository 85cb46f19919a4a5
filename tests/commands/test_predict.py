"""`triderm predict run= input= output=`."""

import hashlib
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import triderm_dist
from tests.conftest import draw_photo, write_challenge, write_table
from tests.processes import launch, written_meanwhile
from tests.trained_run import TrainedRun
from triderm_dist.cli import read_settings
from triderm_dist.commands.predict import PredictRun, main
from triderm_dist.commands.refit import RefitRun
from triderm_dist.commands.refit import main as refit
from triderm_dist.commands.stack import StackRun
from triderm_dist.commands.stack import main as stack
from triderm_dist.config import load
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.ensemble.run_files import read_held_out
from triderm_dist.schema import VIEWS, ConfigError, DataError, InputError
from triderm_dist.submission import read_submission


def predict(run: TrainedRun, *words: str) -> None:
    main(load(PredictRun, None, [f"run={run.folder}", *words]))


def printed(capsys) -> str:
    """Return what was printed, without line breaks: lines are wrapped."""
    return " ".join(capsys.readouterr().out.split())


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_folder_of_results(trained_run, tmp_path, capsys):
    before = hashes(trained_run.folder)
    output = tmp_path / "new" / "out"
    predict(trained_run, f"input={trained_run.test.folder}", f"output={output}", "tta=2")
    assert sorted(path.name for path in output.iterdir()) == [
        "probabilities.csv", "probabilities.parquet", "submission.csv",
    ]  # fmt: skip
    assert not Path(f"{output}.part").exists() and hashes(trained_run.folder) == before
    ids = list(dict.fromkeys(row["lesion_id"] for row in trained_run.test.metadata))
    table, parquet = pd.read_csv(output / "probabilities.csv"), pd.read_parquet(output / "probabilities.parquet")
    assert table["lesion_id"].tolist() == parquet["lesion_id"].tolist() == ids
    diagnoses = list(table.columns[1:-1])
    np.testing.assert_allclose(table[diagnoses].sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(table[diagnoses], parquet[diagnoses], atol=1e-9)
    np.testing.assert_allclose(
        parquet["MEL"], sum(parquet[f"{member}/MEL"] for member in ("tri", "cnn", "stack")) / 3, atol=0.2
    )
    submitted, probabilities = read_submission(output / "submission.csv")
    assert submitted == sorted(ids)
    rows = table.set_index("lesion_id").loc[submitted]
    assert [
        ";".join(name for name, own in zip(diagnoses, row, strict=True) if own > 0.5) for row in probabilities
    ] == rows["decision"].fillna("").tolist()
    assert "10 lesions, mean of 2 transforms, 2 models" in printed(capsys)
    predict(trained_run, f"input={trained_run.test.folder}", f"output={output}", "tta=2")
    assert printed(capsys).endswith(f" {output}: holds these predictions already")
    with pytest.raises(DataError, match="exists and is not the result of this command; name another output"):
        predict(trained_run, f"input={trained_run.test.folder}", f"output={output}", "tta=1")


@pytest.mark.parametrize("networks", ["folds", "refit"])
def test_equal_to_the_packed_test_set(trained_run, tmp_path, networks, capsys):
    """The run's own test set, predicted from shards, has the same results."""
    from triderm_dist.data.readers.milk10k import read_challenge
    from triderm_dist.data.shards.pack import pack_shards

    shutil.copytree(trained_run.folder, tmp_path / "run")
    pack_shards(read_challenge(trained_run.test.folder), tmp_path / "run" / "shards" / "test", short_side=None)
    copy = TrainedRun(tmp_path / "run", trained_run.test)
    input_output = [f"input={copy.test.folder}", f"output={tmp_path / 'out'}"]
    if networks == "refit":
        with pytest.raises(DataError, match="run/refit/tri: not trained; run triderm refit first"):
            predict(copy, "networks=refit", *input_output)
        refit(load(RefitRun, None, [f"run={copy.folder}"]))
    predict(copy, f"networks={networks}")
    predict(copy, f"networks={networks}", *input_output)
    packed = copy.folder / "refit" if networks == "refit" else copy.folder
    assert f"wrote {packed / 'submission.csv'}" in printed(capsys)
    assert (copy.folder / "submission.csv").exists() == (networks == "folds")
    expected, found = (read_submission(folder / "submission.csv") for folder in (packed, tmp_path / "out"))
    assert expected[0] == found[0]
    np.testing.assert_allclose(expected[1], found[1], atol=2e-6)


@pytest.mark.parametrize(
    ("use", "line"),
    [
        ("stack", "predicted by stack; 2 folds averaged"),
        ("cnn", "predicted by cnn; 2 folds averaged"),
        ("ensemble", " of tri, cnn, stack; 2 folds averaged"),
    ],
)
def test_what_predicted_is_named(trained_run, tmp_path, use, line, capsys):
    run = replace(trained_run, folder=tmp_path / "run")
    shutil.copytree(trained_run.folder, run.folder)
    pack_shards(read_challenge(run.test.folder), tmp_path / "packed", short_side=None)
    stack(load(StackRun, None, [f"run={run.folder}", f"ensemble.use={use}"]))
    capsys.readouterr()
    predict(run, f"data.test_shards={tmp_path / 'packed'}", "predict.transforms=1")
    assert line in printed(capsys)


def test_photos_alone_without_an_output(trained_run, capsys):
    photo = trained_run.test.photo(0)
    predict(trained_run, f"input={photo}", "view=clinical", "tta=1")
    *notes, line = capsys.readouterr().out.splitlines()
    assert notes[0].startswith("note: 1 of 1 lesions with one photo; the other")
    assert line.startswith(f"{photo.stem}: ") and line.count(",") == 2


def test_lesions_of_the_training_set_are_counted(trained_run, tmp_path, capsys):
    """By the ids of a table; an export has none of them."""
    ids = sorted(pq.read_table(trained_run.folder / "oof.parquet")["lesion_id"].unique().to_pylist())
    photo, table = trained_run.test.photo(1), tmp_path / "lesions.csv"
    write_table(table, [{"id": name, "dermoscopic": str(photo)} for name in (ids[0], "new", ids[1])])
    predict(trained_run, f"input={table}", f"output={tmp_path / 'out.csv'}", "tta=1")
    note = "2 of 3 lesions have the id of a training lesion; a score on the same lesions is not held out"
    held_out = trained_run.folder / "oof_submission.csv"
    assert f"note: {note}, their held-out predictions are in {held_out}" in printed(capsys) and held_out.exists()
    with pytest.warns(UserWarning, match=f"^{note}"):
        triderm_dist.load(trained_run.folder, device="cpu").predict_table(table, tta=1)
    triderm_dist.load(trained_run.folder, device="cpu").export(tmp_path / "hub", format="hub")
    predict(replace(trained_run, folder=tmp_path / "hub"), f"input={table}", f"output={tmp_path / 'other.csv'}")
    assert "training lesion" not in printed(capsys)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_table_to_one_file(trained_run, tmp_path, kind, capsys):
    photo = trained_run.test.photo(1)
    table = tmp_path / "lesions.csv"
    write_table(table, [{"id": name, "dermoscopic": str(photo), "Age": age} for name, age in (("a", 30), ("b", ""))])
    output = tmp_path / f"out.{kind}"
    predict(trained_run, f"input={table}", f"output={output}", "tta=1")
    frame = pd.read_csv(output) if kind == "csv" else pd.read_parquet(output)
    assert frame["lesion_id"].tolist() == ["a", "b"] and (frame["MEL"].iloc[0] != frame["MEL"].iloc[1])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["lesions.csv", output.name]
    out = printed(capsys)
    assert "note: lesions.csv: no column for sex, skin tone, site, concept scores: missing for every lesion" in out
    if kind == "parquet":
        assert b"triderm-probabilities" in pq.read_schema(output).metadata[b"triderm"]
        predict(trained_run, f"input={table}", f"output={output}", "tta=1")
        assert "holds these predictions already" in printed(capsys)
    else:
        with pytest.raises(DataError, match=r"out\.csv: exists and is not"):
            predict(trained_run, f"input={table}", f"output={output}", "tta=1")


@pytest.mark.parametrize("kind", ["", ".csv"])
def test_output_that_another_process_writes_meanwhile_is_kept(trained_run, tmp_path, capsys, kind):
    words = (f"input={trained_run.test.folder}", "tta=1")
    theirs, output = tmp_path / f"theirs{kind}", tmp_path / f"mine{kind}"
    predict(trained_run, *words, f"output={theirs}")
    refused = pytest.raises(DataError, match="exists and is not the result") if kind else nullcontext()
    with written_meanwhile(output, lambda: theirs.rename(output), capsys), refused:
        predict(trained_run, *words, f"output={output}")
    assert kind or printed(capsys) == f"{output}: holds these predictions already"
    assert list(tmp_path.iterdir()) == [output]


def test_output_that_is_a_symbolic_link_is_written_where_it_leads(trained_run, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    words = (f"input={trained_run.test.photo(1)}", "view=clinical", "tta=1")
    predict(trained_run, *words, f"output={tmp_path / 'link'}")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]
    assert (tmp_path / "disk" / "out" / "probabilities.csv").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"] and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("output", [".", "../here", "../here/new/.."])
def test_output_in_the_working_folder(trained_run, tmp_path, monkeypatch, output):
    photo = trained_run.test.photo(1)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    predict(trained_run, f"input={photo}", "view=clinical", f"output={output}", "tta=1")
    assert (tmp_path / "here" / "probabilities.csv").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_lesions_that_cannot_be_used(trained_run, tmp_path, capsys):
    shutil.copytree(trained_run.test.folder, tmp_path / "in")
    photo = next((tmp_path / "in").rglob("*.jpg"))
    photo.write_bytes(b"no photo")
    words = (f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "tta=1")
    with pytest.raises(DataError, match=rf"^{photo}: unreadable photo .*; replace it, or .* invalid=drop$"):
        predict(trained_run, *words)
    assert not (tmp_path / "out").exists()
    predict(trained_run, *words, "invalid=drop")
    problems = pd.read_csv(tmp_path / "out.problems.csv")
    assert problems["where"].tolist() == [str(photo)]
    assert len(pd.read_csv(tmp_path / "out" / "probabilities.csv")) == 9
    assert "1 problems: 1 unreadable photo" in printed(capsys)


def test_lesion_that_is_left_out_is_not_printed_as_predicted(trained_run, tmp_path, capsys):
    for number in (0, 1):
        shutil.copy(trained_run.test.photo(number), tmp_path / f"{number}.clinical.jpg")
    (tmp_path / "2.clinical.jpg").write_bytes(b"no photo")
    predict(trained_run, f"input={tmp_path}", "tta=1", "invalid=drop")
    out = capsys.readouterr().out
    assert [line.partition(":")[0] for line in out.splitlines() if line.count(",") == 2 and "(" in line] == ["0", "1"]
    assert f"left out: {tmp_path / '2.clinical.jpg'}: no JPEG" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["output={run}/new"], "is inside the run, which predictions do not change"),
        (["output={input}/new"], "is inside the input"),
        (["output={tmp}/new.xlsx"], "name a file that ends in .csv or .parquet, or a folder"),
        (["output=/proc"], "output=/proc: is a mount point, "),
        (["output={tmp}/new", "view=front"], "view=front: known are clinical, dermoscopic"),
        (["output={tmp}/new", "photos={tmp}/none"], "no photo"),
        (["output={tmp}/new", "device=tpu"], "device=tpu: Expected one of cpu, "),
        (["output={tmp}/new", "device=cuda:99"], "this machine has cpu"),
        (["output={tmp}/new", "device=meta"], "this machine has cpu"),
    ],
)
def test_what_is_refused(trained_run, tmp_path, words, message):
    paths = {"run": trained_run.folder, "input": trained_run.test.folder, "tmp": tmp_path}
    with pytest.raises(InputError) as error:
        predict(trained_run, f"input={trained_run.test.folder}", *(word.format(**paths) for word in words))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_that_need_an_input(trained_run, tmp_path):
    with pytest.raises(ConfigError, match=r"has no packed test set .*; name new photos by input, or a packed set by"):
        predict(trained_run)
    with pytest.raises(ConfigError, match="output: without input the test set of the run is predicted"):
        predict(trained_run, f"output={tmp_path}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tta=1"], "tta: has an effect with input only; name a folder, a table or photos by input"),
        (["invalid=drop"], "invalid: has an effect with input only"),
        (["ensemble.members=cnn"], "ensemble.members: has an effect with submit=false only"),
        (["input=a.jpg", "submit=false"], "submit: has no effect with input; remove it"),
        (["input=a.jpg", "data.test_truth=truth.csv"], "data.test_truth: has no effect with input; remove it"),
        (["input=a.jpg", "tta=1", "predict.transforms=2"], "predict.transforms: has no effect with input"),
        (["input=a.jpg", "explain=IL_1"], "input: has no effect with explain; remove it"),
        (["explain=IL_1", "networks=refit"], "networks: has no effect with explain; remove it"),
        (["input=a.jpg", "train.optim.lr=1"], "train.optim.lr: this program does not use the setting"),
    ],
)
def test_settings_without_effect_are_refused(trained_run, words, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        read_settings(PredictRun, [f"run={trained_run.folder}", *words])


@pytest.mark.slow
def test_ranks_share_the_lesions_and_give_the_same_bytes(trained_run, tmp_path):
    words = ("triderm_dist.commands.predict", f"run={trained_run.folder}", "tta=1", "invalid=drop")
    shutil.copytree(trained_run.test.folder, tmp_path / "in")
    launch(*words, f"input={tmp_path / 'in'}", f"output={tmp_path / 'one'}")
    done = launch(*words, f"input={tmp_path / 'in'}", f"output={tmp_path / 'two'}", ranks=2, config="ddp")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") and len(hashes(tmp_path / "one")) == 3
    assert done.stdout.count("10 lesions, mean of 1 transform,") == 1
    assert not (tmp_path / "two.part").exists()
    again = launch(*words, f"input={tmp_path / 'in'}", f"output={tmp_path / 'two'}", ranks=2, config="ddp")
    assert " ".join(again.stdout.split()).count("holds these predictions already") == 1
    photo = trained_run.test.photo(2 * 5)  # of a lesion of rank 1
    (tmp_path / "in" / photo.relative_to(trained_run.test.folder)).write_bytes(b"no photo")
    words = (*words[:-1], f"input={tmp_path / 'in'}", f"output={tmp_path / 'three'}")
    failed = launch(*words, ranks=2, config="ddp", check=False)
    assert failed.returncode == 2 and f"{photo.name}: unreadable photo" in failed.stderr
    assert not (tmp_path / "three").exists()


def test_test_lesions_with_photos_of_the_training_set_are_counted(trained_run, tmp_path, capsys):
    """Under other ids and of other patients: 3 of 7, each with one or both photos of a training lesion."""
    own = read_challenge(write_challenge(tmp_path / "own", 44).folder)
    lesions = [replace(each, lesion_id=f"T{row}", group=f"T{row}") for row, each in enumerate(own.lesions)][:8]
    for row, lesion in enumerate(lesions[3:], start=3):
        files = {view: str(tmp_path / f"{row}-{view}.jpg") for view in VIEWS}
        for number, path in enumerate(files.values()):
            draw_photo(1000 + 2 * row + number, (56, 36) if row == 7 else (48, 36)).save(path, quality=90)
        lesions[row] = replace(lesion, images=files)
    lesions[2] = replace(lesions[2], images={**lesions[3].images, "clinical": lesions[2].images["clinical"]})
    pack_shards(replace(own, lesions=lesions[:3] + lesions[4:]), tmp_path / "packed", short_side=None)
    run = replace(trained_run, folder=Path(shutil.copytree(trained_run.folder, tmp_path / "run")))
    predict(run, f"data.test_shards={tmp_path / 'packed'}", "predict.transforms=1")
    out, said = printed(capsys), "3 of 7 test lesions have the id, the group or a photo of a training lesion"
    assert said in out and read_held_out(run.folder)["in_training"] == 3
    assert "photos are not 48x36" not in out  # packing said so
    (run.folder / "shards" / "train" / "samples.parquet").unlink()
    predict(run, f"data.test_shards={tmp_path / 'packed'}", "predict.transforms=1")
    assert "note: photos are not compared with those of the training set: " in printed(capsys)
