"""A run without what only training needs: as a folder, as a zip file, and as a folder for the Hugging Face hub.

It holds settings, networks, towers, stacker, ensemble and the model card; no photos, no predictions of single lesions,
no checkpoints, and no paths of this machine. `triderm_dist.load` and `triderm predict` take it as they take the run.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from triderm_dist.config import CONFIG_FILE, Experiment, RemoteConfig, save
from triderm_dist.engine.checkpoint import read_info
from triderm_dist.ensemble.artifact import Ensemble, read_json
from triderm_dist.ensemble.fitted_stacker import FittedStacker, model_path
from triderm_dist.ensemble.predict import check_weights
from triderm_dist.ensemble.run_files import ALIGNMENTS_FILE, ENSEMBLE_FILE, STACK_FILE, STACKER
from triderm_dist.ensemble.stack_inputs import embeddings_path, read_embeddings, write_embeddings
from triderm_dist.files import atomic_path, file_sha256, write_text
from triderm_dist.schema import ConfigError, DataError

CARD_FILE = "README.md"
AS_THEY_ARE = (CARD_FILE, "environment.json", ENSEMBLE_FILE)
"""Files of a run that are copied, if they exist."""
_PART = re.compile(r'[^\x00-\x1f\\/:*?"<>|.][^\x00-\x1f\\/:*?"<>|]*(?<![. ])')
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every file in a zip, so that its bytes depend on the run alone."""


def write_slim_run(run: Experiment, folder: Path) -> None:
    """Write the slim run into an empty folder, and check that its networks are those that the ensemble was fitted on.

    Raises DataError where a file is missing or does not belong to the others.
    """
    members = [name for name in Ensemble.load(run.folder / ENSEMBLE_FILE).members if name != STACKER]
    for name in members:
        if name not in run.models:
            raise DataError(f"{run.folder / CONFIG_FILE}: has no model {name!r}, a member of {ENSEMBLE_FILE}")
    for source, target in _files(run, members):
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / target)
    for name in members:
        for fold in range(run.data.folds):
            _check_fold(run, folder, name, fold)
    _write_settings(run, folder, members)
    if (folder / STACK_FILE).exists() and FittedStacker.load(folder / STACK_FILE).extra == "embeddings":
        # Only the name of the tower and the width of its embeddings are needed, not those of the training lesions.
        path = embeddings_path(run.folder, "train")
        values, tower = read_embeddings(path, np.empty(0))
        write_embeddings(embeddings_path(folder, "train"), [], values, tower)


def _files(run: Experiment, members: Iterable[str]) -> Iterator[tuple[Path, PurePosixPath]]:
    """Yield the files to copy, with their names in the slim run."""
    names = [name for name in AS_THEY_ARE if (run.folder / name).is_file()]
    stack = run.folder / STACK_FILE
    if STACKER in Ensemble.load(run.folder / ENSEMBLE_FILE).members:
        stacker = FittedStacker.load(stack)
        parts = [stack, model_path(stack, type(stacker.model)), stack.with_suffix(".safetensors")]
        parts += [run.folder / ALIGNMENTS_FILE] if stacker.extra == "features" else []
        names += [path.name for path in parts if path.is_file()]
    names += [
        path.relative_to(run.folder).as_posix()
        for path in sorted(run.folder.glob("towers/*"))
        if path.suffix in (".json", ".safetensors")
    ]
    for name in members:
        for fold in range(run.data.folds):
            for file in ("fold.json", "weights.json", "weights.safetensors"):
                path = run.fold_folder(name, fold) / file
                if not path.is_file():
                    raise DataError(f"{path}: no such file; run triderm crossval first")
                names.append(path.relative_to(run.folder).as_posix())
    for name in names:
        yield run.folder / name, safe_name(name)


def _check_fold(run: Experiment, folder: Path, name: str, fold: int) -> None:
    path = folder / name / f"fold-{fold}"
    expected = read_info(path / "weights")["sha256"]
    if file_sha256(path / "weights.safetensors") != expected:
        raise DataError(
            f"{run.fold_folder(name, fold) / 'weights.safetensors'}: changed or damaged: its SHA-256 is not that of "
            "weights.json; train this fold again"
        )
    check_weights(run.folder, [(name, np.array([expected], object))])


def _write_settings(run: Experiment, folder: Path, members: list[str]) -> None:
    """Write the settings without paths of this machine, and without models that are not in the ensemble."""
    nothing: dict[str, Any] = dict.fromkeys(("source", "test", "task", "shards", "test_shards", "test_truth"))
    data = run.data.model_copy(update={**nothing, "extra": (), "remote": RemoteConfig()})
    models = {name: run.models[name] for name in members}
    ensemble = run.ensemble.model_copy(update={"members": None})
    changed = {"output": str(folder), "tokens": None, "data": data, "models": models, "ensemble": ensemble}
    save(run.model_copy(update=changed), folder / CONFIG_FILE)


def safe_name(name: str) -> PurePosixPath:
    """Return a name in a slim run. Raises ConfigError for one that another system might not take, or that leaves the
    folder.
    """
    parts = name.split("/")
    if not all(map(_PART.fullmatch, parts)):
        raise ConfigError(
            f'{name!r}: a file of an export may not have : * ? " < > | \\ in its name, a dot in front or at the end; '
            "rename the model"
        )
    return PurePosixPath(name)


def write_zip(folder: Path, path: Path) -> None:
    """Pack the files of a folder, atomically. Equal files give equal bytes: sorted, uncompressed, without times."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            entry = zipfile.ZipInfo(str(safe_name(file.relative_to(folder).as_posix())), _EPOCH)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            entry.file_size = file.stat().st_size
            with file.open("rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, 2**20)


def write_hub_card(run: Experiment, folder: Path, license_name: str) -> None:
    """Put the metadata that the hub reads in front of the model card of a slim run."""
    card = folder / CARD_FILE
    body = card.read_text(encoding="utf-8") if card.exists() else _short_card(run)
    write_text(card, f"---\n{yaml.safe_dump(hub_metadata(run, license_name), sort_keys=False)}---\n\n{body}")


def hub_metadata(run: Experiment, license_name: str) -> dict[str, Any]:
    """Return the model card's metadata: https://huggingface.co/docs/hub/model-cards."""
    tree = read_json(run.folder / ENSEMBLE_FILE)
    members = [name for name in tree["members"] if name != STACKER]
    sources = [run.models[name].tower.source for name in members if run.models[name].tower.pretrained]
    bases = sorted({source.removeprefix("hf-hub:") for source in sources if source.startswith("hf-hub:")})
    task = str(tree["task"]["name"])
    return {
        "license": license_name,
        "library_name": "triderm-dist",
        "pipeline_tag": "image-classification",
        "tags": ["dermatology", "skin-lesion", "dermoscopy", "ensemble", task.lower()],
        **({"base_model": bases} if bases else {}),
    }


def _short_card(run: Experiment) -> str:
    """Return a model card for a run of a version that wrote none."""
    tree = read_json(run.folder / ENSEMBLE_FILE)
    score = tree["scores"]["ensemble"]["nested"]
    return f"""# {tree["task"].get("title") or tree["task"]["name"]}

An ensemble of {", ".join(tree["members"])}, trained with triderm-dist on {tree["lesions"]} lesions in {tree["folds"]}
folds. Nested macro F1 {score["value"]:.3f} (95% interval {score["low"]:.3f} to {score["high"]:.3f}).
Not a medical device.
"""
