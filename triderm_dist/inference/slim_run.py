"""A run without what only training needs: as a folder, as a zip file, and as a folder for the Hugging Face hub.

It holds settings, networks, towers, stacker, ensemble and the model card; no photos, no predictions of single lesions,
no checkpoints, and no paths of this machine. `triderm_dist.load` and `triderm predict` take it as they take the run.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml

from triderm_dist.config import CONFIG_FILE, Experiment, RemoteConfig, save
from triderm_dist.engine.model_tower import open_tower
from triderm_dist.engine.network_files import read_info, write_info
from triderm_dist.engine.trained_network import TrainedNetwork
from triderm_dist.ensemble.fitted_stacker import model_path
from triderm_dist.ensemble.model_card import CARD_FILE, card_text
from triderm_dist.ensemble.run_files import ALIGNMENTS_FILE, ENSEMBLE_FILE, NESTED_FILE, STACK_FILE
from triderm_dist.ensemble.stack_inputs import EmbeddingTower, embeddings_path, read_embeddings, write_embeddings
from triderm_dist.environment import ENVIRONMENT_FILE
from triderm_dist.files import atomic_path, copy_file, file_sha256, write_text
from triderm_dist.inference.networks import embedding_model
from triderm_dist.inference.run_folder import RunFolder
from triderm_dist.inference.seen_values import read_seen, write_seen
from triderm_dist.models import tower_record
from triderm_dist.models.tower_record import save_tower
from triderm_dist.schema import ConfigError, DataError

_METADATA = re.compile(r"\A---\n.*?^---\n\n?", re.M | re.S)
_PART = re.compile(r'[^\x00-\x1f\\/:*?"<>|.][^\x00-\x1f\\/:*?"<>|]*(?<![. ])')
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time stamp of every file in a zip, constant so that its bytes depend only on the run."""


def write_slim_run(run: RunFolder, folder: Path) -> None:
    """Write the slim run into an empty folder, and check that its networks are those that the ensemble was fitted on.

    What a run of an earlier version does not record (towers, sizes of photos) is added. Raises DataError if a file
    is missing or does not belong to the others.
    """
    write_seen(folder, run.task.fields, read_seen(run.path, run.task.fields))
    for name in _shared_files(run):
        (folder / safe_name(name)).parent.mkdir(parents=True, exist_ok=True)
        copy_file(run.path / name, folder / name)
    for name, trained in run.networks.items():
        refitted = run.experiment.refit_folder(name)
        refit = [TrainedNetwork.read(refitted)] if (refitted / "fold.json").exists() else []
        for network in (*trained, *refit):
            _write_network(run, folder, name, network)
    if run.fitted.stacker and run.fitted.stacker.extra == "embeddings":
        _write_embedding(run, folder)
    _write_settings(run.experiment, folder)
    if (run.path / NESTED_FILE).exists():
        write_text(folder / CARD_FILE, card_text(run.experiment, folder))


def _shared_files(run: RunFolder) -> list[str]:
    """Return the names of the files to copy that belong to no network."""
    names = [name for name in (CARD_FILE, ENVIRONMENT_FILE) if (run.path / name).is_file()]
    names.append(ENSEMBLE_FILE)
    if stacker := run.fitted.stacker:
        stack = run.path / STACK_FILE
        parts = [stack, model_path(stack, type(stacker.model)), stack.with_suffix(".safetensors")]
        names += [path.name for path in parts if path.is_file()]
        names += [ALIGNMENTS_FILE] if stacker.extra == "features" else []
    return names


def _write_network(run: RunFolder, folder: Path, name: str, network: TrainedNetwork) -> None:
    """Copy the weights of a network, its fold.json and its tower."""
    target = folder / safe_name(network.folder.relative_to(run.path).as_posix())
    target.mkdir(parents=True, exist_ok=True)
    for file in ("weights.json", "weights.safetensors", "fold.json"):
        if not (network.folder / file).is_file():
            raise DataError(f"{network.folder / file}: no such file; run triderm crossval first")
        copy_file(network.folder / file, target / file)
    recorded = read_info(network.folder / "weights")["sha256"]
    if not file_sha256(target / "weights.safetensors") == network.weights == recorded:
        raise DataError(
            f"{network.folder / 'weights.safetensors'}: changed or damaged: its SHA-256 is not that of fold.json; "
            "train this fold again"
        )
    run.fitted.check_weights([(name, network.refit_of or [network.weights])])
    towers, record = folder / tower_record.FOLDER, network.tower
    if record is None or not (towers / f"{record.name}.json").exists():
        with torch.random.fork_rng(devices=[]):
            record, tower = open_tower(run.experiment, run.experiment.models[name], record)
        save_tower(towers, record, tower)
    if not network.info.keys() >= {"tower", "photos"}:
        photos = {"canvas": run.canvas, "short_side": run.short_side}
        info = {key: value for key, value in network.info.items() if key not in ("format", "version")}
        write_info(target / "fold", **{"tower": record.name, "photos": photos, **info})


def _write_embedding(run: RunFolder, folder: Path) -> None:
    """Write the tower whose embeddings the stacker reads, and name it in a table of no lesions."""
    values, named = read_embeddings(embeddings_path(run.path, "train"), [])
    with torch.random.fork_rng(devices=[]):
        record, tower = open_tower(run.experiment, *embedding_model(run))
    save_tower(folder / tower_record.FOLDER, record, tower)
    write_embeddings(embeddings_path(folder, "train"), [], values, EmbeddingTower(named.source, record.name))


def _write_settings(run: Experiment, folder: Path) -> None:
    """Write the settings without paths of this machine."""
    nothing: dict[str, Any] = dict.fromkeys(("source", "test", "task", "shards", "test_shards", "test_truth"))
    data = run.data.model_copy(update={**nothing, "extra": (), "remote": RemoteConfig()})
    save(run.model_copy(update={"output": str(folder), "tokens": None, "data": data}), folder / CONFIG_FILE)


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


def write_hub_card(run: RunFolder, folder: Path, license_name: str) -> None:
    """Put the metadata that the hub reads in front of the model card of a slim run."""
    card = folder / CARD_FILE
    # An export of an export may have none.
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    body = _METADATA.sub("", text)
    write_text(card, f"---\n{yaml.safe_dump(hub_metadata(run, license_name), sort_keys=False)}---\n\n{body}")


def hub_metadata(run: RunFolder, license_name: str) -> dict[str, Any]:
    """Return the model card's metadata: https://huggingface.co/docs/hub/model-cards."""
    towers = [run.experiment.models[name].tower for name in run.networks]
    hub = [tower.source.removeprefix("hf-hub:") for tower in towers if tower.source.startswith("hf-hub:")]
    return {
        "license": license_name,
        "library_name": "triderm-dist",
        "pipeline_tag": "image-classification",
        "tags": ["dermatology", "skin-lesion", "dermoscopy", "ensemble", run.task.name.lower()],
        **({"base_model": sorted(set(hub))} if hub else {}),
    }
