"""Chunks of predictions: equal to one pass, kept after an interruption, shared by ranks."""

import threading

import numpy as np
import pytest
import torch

from tests.processes import wait_for
from triderm_dist.inference.chunks import PredictionJob, run_hash
from triderm_dist.inference.inputs import read_input
from triderm_dist.inference.predictor import Predictor
from triderm_dist.schema import DataError

LESIONS = 10


@pytest.fixture(scope="module")
def predictor(trained_run) -> Predictor:
    return Predictor(trained_run.folder, batch=4)


@pytest.fixture
def lesions(trained_run, predictor):
    return read_input([trained_run.test.folder], predictor.run).lesions


@pytest.fixture
def predicted(monkeypatch) -> list[list[str]]:
    """The ids of the lesions of each call of `Predictor.predict`."""
    calls: list[list[str]] = []
    predict = Predictor.predict

    def record(self, photos, *arguments):
        calls.append(photos.lesion_ids.tolist())
        return predict(self, photos, *arguments)

    monkeypatch.setattr(Predictor, "predict", record)
    return calls


def job_of(predictor, lesions, folder, drop=False, transforms=2) -> PredictionJob:
    return PredictionJob(predictor, lesions, transforms, drop, folder / "out.part")


def test_chunks_equal_one_pass(predictor, lesions, tmp_path):
    job = job_of(predictor, lesions, tmp_path)
    progress = []
    job.run(progress=lambda done, total: progress.append((done, total)))
    assert [len(job._rows(number)) for number in range(len(job.chunks))] == [4, 4, 2]
    assert progress[-1] == (LESIONS, LESIONS) and [done for done, _ in progress[:3]] == [4, 8, 10]
    table, problems, _ = job.result()
    expected = predictor.table(predictor.predict(lesions, 2))
    assert not problems and table.column_names == expected.column_names
    assert table["lesion_id"].to_pylist() == lesions.lesion_ids.tolist()
    assert table["decision"].to_pylist() == expected["decision"].to_pylist()
    for name in set(table.column_names) - {"lesion_id", "decision"}:
        np.testing.assert_allclose(table[name], expected[name], atol=1e-6)
    assert {"tri/MEL", "cnn/MEL", "stack/MEL"} <= set(table.column_names)


def test_interrupted_work_continues(predictor, lesions, tmp_path, predicted):
    job = job_of(predictor, lesions, tmp_path)
    job.run()
    first, ids = job.result()[0], lesions.lesion_ids.tolist()
    assert predicted == [ids[:4], ids[4:8], ids[8:]]
    (job.part / "000001.parquet").unlink()
    damaged = (job.part / "000002.parquet").read_bytes()
    (job.part / "000002.parquet").write_bytes(damaged[:200] + bytes(50) + damaged[250:])
    predicted.clear()
    again = job_of(predictor, lesions, tmp_path)
    again.run()
    assert predicted == [ids[4:8], ids[8:]]
    assert again.result()[0].equals(first)


def test_only_chunks_of_other_lesions_or_settings_are_predicted_again(predictor, lesions, tmp_path, predicted):
    job_of(predictor, lesions, tmp_path).run()
    ids = lesions.lesion_ids.tolist()
    lesions.metadata[9, 0] = 33
    predicted.clear()
    job_of(predictor, lesions.take(slice(0, 10)), tmp_path).run()
    assert predicted == [ids[8:]]
    predicted.clear()
    job_of(predictor, lesions.take(slice(0, 10)), tmp_path, transforms=1).run()
    assert len(predicted) == 3


def test_rank_0_waits_for_the_chunks_of_other_ranks(predictor, lesions, tmp_path, predicted):
    job_of(predictor, lesions, tmp_path / "one").run()
    expected = job_of(predictor, lesions, tmp_path / "one").result()[0]
    predicted.clear()
    main = job_of(predictor, lesions, tmp_path / "two")
    thread = threading.Thread(target=main.run, args=(0, 2))
    thread.start()
    wait_for(lambda: len(predicted) == 2)  # its own chunks
    assert thread.is_alive()
    job_of(predictor, lesions, tmp_path / "two").run(1, 2)
    thread.join()
    assert main.result()[0].equals(expected)
    assert len(predicted) == 3


def test_a_rank_that_runs_out_of_memory_writes_chunks_that_rank_0_takes(trained_run, predictor, lesions, tmp_path):
    small = Predictor(trained_run.folder, batch=4)

    def run_out(network, inputs):
        if len(inputs[-1]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    small.models[0].networks[0].register_forward_pre_hook(run_out)
    job_of(small, lesions, tmp_path).run(1, 2)
    assert job_of(predictor, lesions, tmp_path).read(1) is not None


def test_unreadable_photo_is_refused_or_its_lesion_left_out(predictor, lesions, tmp_path):
    (tmp_path / "no.jpg").write_bytes(b"no photo")
    lesions.photos["clinical"][5] = str(tmp_path / "no.jpg")
    with pytest.raises(DataError, match=rf"^{tmp_path}/no.jpg: unreadable photo"):
        job_of(predictor, lesions, tmp_path).run()
    job = job_of(predictor, lesions, tmp_path, drop=True)
    job.run()
    table, problems, _ = job.result()
    assert table["lesion_id"].to_pylist() == [name for at, name in enumerate(lesions.lesion_ids) if at != 5]
    assert [(problem.lesion_id, problem.where) for problem in problems] == [
        (lesions.lesion_ids[5], str(tmp_path / "no.jpg"))
    ]


@pytest.mark.parametrize(
    ("number", "batch", "size"), [(1, 4, 4), (300, 4, 4), (1024, 4, 16), (10**6, 4, 64), (10**6, 64, 1024)]
)
def test_size_of_chunks(number, batch, size):
    class Sized(list):
        pass

    class Batch:
        pass

    job = PredictionJob(Batch(), Sized([0] * number), 1, False, None)  # type: ignore[arg-type]
    job.predictor.batch = batch
    chunks = job.chunks
    assert chunks[0] == slice(0, size) and sum(len(range(number)[each]) for each in chunks) == number


def test_identity_changes_with_the_ensemble(trained_run, predictor, tmp_path):
    import shutil

    from triderm_dist.inference.run_folder import open_run_folder

    shutil.copytree(trained_run.folder, tmp_path / "run")
    run = open_run_folder(tmp_path / "run")
    assert run_hash(run) == run_hash(predictor.run)
    with (tmp_path / "run" / "ensemble.json").open("a") as file:
        file.write("\n")
    assert run_hash(run) != run_hash(predictor.run)
