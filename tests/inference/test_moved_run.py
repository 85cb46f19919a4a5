"""A run is moved and made read-only, and used after its pretrained file and photos are gone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.inference.small_run import train
from tests.inference.use_run import use
from tests.processes import HANG_SECONDS, ROOT, drop_root
from triderm_dist.cli import read_settings
from triderm_dist.commands import embed
from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.shards.index import read_index
from triderm_dist.ensemble.stack_inputs import read_embeddings
from triderm_dist.files import file_sha256
from triderm_dist.inference.networks import NetworkLoader
from triderm_dist.inference.run_folder import open_run_folder


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


@pytest.mark.slow  # `tests/engine/test_run_towers.py` and `tests/test_run_folder.py` test parts of it
def test_moved_run_gives_the_same_bytes_without_its_pretrained_file(tmp_path: Path) -> None:
    """Also in another process, working directory and home, and for a user who may not write the run."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    tower = f"source: 'timm:test_vit@{tmp_path / 'w.safetensors'}', image_size: 32"
    models = [
        f"models.frozen={{width: 16, heads: 2, tower: {{{tower}, frozen: true}}}}",
        f"models.trained={{width: 16, heads: 2, tower: {{{tower}}}}}",
    ]
    run, photos = train(tmp_path, models, shards="run/shards/train"), tmp_path / "photos"
    (run / "shards" / "train-photos").rename(photos)
    for path in photos.iterdir():
        lesion, _, view = path.stem.rpartition("-")
        path.rename(photos / f"{lesion}.{view}.jpg")
    embed.main(read_settings(embed.EmbedRun, [f"run={run}", "model=trained"]))
    use(str(run), str(photos), str(tmp_path / "before"))

    moved, home = tmp_path / "elsewhere" / "run", tmp_path / "home"
    moved.parent.mkdir()
    home.mkdir()
    shutil.move(run, moved)
    shutil.rmtree(moved / "tokens")
    (tmp_path / "w.safetensors").unlink()
    contents = hashes(moved)
    for path in (moved, *moved.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-m", "tests.inference.use_run", "run", str(photos), str(tmp_path / "after")],
        cwd=moved.parent, preexec_fn=drop_root, capture_output=True, text=True, timeout=HANG_SECONDS,
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    after = hashes(tmp_path / "after")
    assert after == hashes(tmp_path / "before")
    assert {"run.zip", "predicted/probabilities.csv", "reported/report.html"} <= set(after)
    assert {Path(name).parts[1] for name in after if name.startswith("explained/")} == {"explain"}
    assert hashes(moved) == contents

    # A stacker that reads embeddings has the tower of triderm embed.
    found = open_run_folder(moved)
    found.fitted.__dict__["stacker"] = replace(found.fitted.stacker, extra="embeddings")
    embedding = NetworkLoader(found, torch.device("cpu")).load_embedding()
    index = read_index(moved / "shards" / "train")
    source = PhotoSource(index, embedding.preprocessing.size, embedding.preprocessing.mean, embedding.preprocessing.std)
    (step,) = LoaderFactory(index, source).sequential(np.arange(24), 24, torch.device("cpu"))
    views = [embedding(getattr(step.micro_batches[0], view)) for view in index.signature.views]
    expected = read_embeddings(moved / "embeddings.train.parquet", index.lesion_ids)[0]
    np.testing.assert_allclose(torch.cat(views, 1), expected, atol=1e-5)
