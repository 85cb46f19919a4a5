"""The folder of a fold: checkpoints that a killed process was about to remove."""

import pytest

from triderm_dist.checksums import write_checked_json
from triderm_dist.engine.fold_folder import FoldFolder, mark_checkpoints_obsolete, remove_obsolete_checkpoints
from triderm_dist.engine.network_files import write_info
from triderm_dist.files import write_tensors


def write_finished(path, identity):
    path.mkdir(parents=True, exist_ok=True)
    write_info(path / "fold", identity=identity, model={"train": {}}, concepts=[], weights="")


def write_unfinished(path, identity):
    checkpoint = path / "checkpoints" / "epoch-0001-step-00000004"
    checkpoint.mkdir(parents=True)
    for name in ("weights", "optimizer"):
        write_tensors(checkpoint / f"{name}.safetensors", {})
    progress = {"epoch": 1, "batch": 0, "step": 4, "best_score": 0.0, "best_epoch": 1}
    record = {"version": 3, "identity": identity, "state": progress, "scheduler": {}, "scaler": None, "sums": None}
    write_checked_json(checkpoint / "state.json", record)


@pytest.mark.parametrize("found", ["finished", "unfinished"])
def test_what_is_in_the_place_of_a_training_that_was_moved_aside_is_kept(found, tmp_path):
    """Also an unfinished training from which this one could resume, such as one with another micro-batch."""
    path, aside = tmp_path / "fold-0", tmp_path / "other-settings"
    write_finished(aside / "fold-0-result", "result")
    if found == "finished":
        write_finished(path, "other")
    else:
        write_unfinished(path, "resume")
    folder = FoldFolder(path, ["result"], ["resume"])
    assert folder.is_trained()
    folder.claim()
    assert folder.is_trained() and folder.locate() == path and (path / "fold.json").exists()
    (kept,) = aside.iterdir()
    assert kept.name == ("fold-0-other" if found == "finished" else "fold-0-resume")


def test_checkpoints_of_a_killed_process_are_removed_once_the_fold_is_finished(tmp_path):
    mark_checkpoints_obsolete(tmp_path)  # without checkpoints
    assert not list(tmp_path.iterdir())
    checkpoint = tmp_path / "checkpoints" / "epoch-0001-step-00000004"
    checkpoint.mkdir(parents=True)
    (tmp_path / "fold.json").touch()
    remove_obsolete_checkpoints(tmp_path)
    assert checkpoint.exists()  # kept by train.keep_checkpoints, or by an earlier version
    (tmp_path / "fold.json").unlink()
    mark_checkpoints_obsolete(tmp_path)
    remove_obsolete_checkpoints(tmp_path)
    assert checkpoint.exists()
    (tmp_path / "fold.json").touch()
    remove_obsolete_checkpoints(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
