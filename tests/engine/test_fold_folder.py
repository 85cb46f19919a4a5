"""The folder of a fold: checkpoints that a killed process was about to remove."""

from triderm_dist.engine.fold_folder import mark_checkpoints_obsolete, remove_obsolete_checkpoints


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
