"""Export of a trained run: as a zip file, a folder for the hub, or ONNX and `torch.export` files of its networks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from triderm_dist.config import Experiment, load_run
from triderm_dist.data.shards.photos import QUALITY
from triderm_dist.engine.checkpoint import read_info
from triderm_dist.ensemble.artifact import Ensemble
from triderm_dist.ensemble.run_files import ENSEMBLE_FILE, STACK_FILE, STACKER
from triderm_dist.files import file_sha256, write_json
from triderm_dist.inference.slim_run import safe_name, write_hub_card, write_slim_run, write_zip
from triderm_dist.schema import ConfigError
from triderm_dist.tasks import recorded_task

if TYPE_CHECKING:
    from triderm_dist.inference.exported_network import ExportedNetwork

Format = Literal["zip", "hub", "onnx", "torch_export"]

FORMAT, VERSION = "triderm-network", 1
"""Of the description next to a network's file."""


def export_run(
    run_folder: Path,
    output: Path,
    kind: Format = "zip",
    *,
    models: Sequence[str] | None = None,
    folds: Sequence[int] | None = None,
    license_name: str = "other",
    report: Callable[[str], None] = print,
) -> None:
    """Write a run to `output`, which must not exist: a file for `zip`, else a folder. It is complete or not there.

    models, folds: of the networks to write as `onnx` or `torch_export`; None for all members of the ensemble, and all
    folds.  license_name: the hub's identifier of the license, in the metadata of `hub`.  report: gets lines on what was
    written.

    Raises InputError where the run is incomplete, the output exists, or a network's file does not compute what the
    network computes.
    """
    if output.exists():
        raise ConfigError(f"output={output}: exists; remove it, or set another output")
    if kind == "zip" and output.suffix != ".zip":
        raise ConfigError(f"output={output}: the name of a zip file must end with .zip")
    if kind in ("zip", "hub") and not (models is None and folds is None):
        raise ConfigError(f"models, folds: format={kind} has all networks of the ensemble; remove these settings")
    run = load_run(Experiment, run_folder)
    part = output.with_name(f"{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
    part.mkdir(parents=True)
    try:
        if kind == "zip":
            write_slim_run(run, part)
            write_zip(part, output)
            report(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
            return
        if kind == "hub":
            write_slim_run(run, part)
            write_hub_card(run, part, license_name)
        else:
            _write_networks(run, part, kind, models, folds, report)
        part.rename(output)
        report(f"{output}: {sum(file.stat().st_size for file in output.rglob('*')) / 1e6:.1f} MB")
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_networks(
    run: Experiment,
    folder: Path,
    kind: str,
    models: Sequence[str] | None,
    folds: Sequence[int] | None,
    report: Callable[[str], None],
) -> None:
    """Write MODEL.fold-K.onnx or .pt2 of each network, and its description MODEL.fold-K.json."""
    from triderm_dist.inference.exported_network import describe, load_exported
    from triderm_dist.inference.network_files import BATCHES, SUFFIXES, check_installed, versions, write_network

    check_installed(kind)
    fitted = run.folder / ENSEMBLE_FILE
    ensemble = Ensemble.load(fitted) if fitted.exists() else None
    temperatures = dict(zip(ensemble.members, ensemble.temperatures.tolist(), strict=True)) if ensemble else {}
    known = [name for name in temperatures if name != STACKER] or [*run.models]
    for name in models or known:
        if name not in run.models:
            raise ConfigError(f"models={name}: {run.folder} has the models {', '.join(run.models)}")
        for fold in range(run.data.folds) if folds is None else folds:
            if not 0 <= fold < run.data.folds:
                raise ConfigError(f"folds={fold}: {run.folder} has the folds 0 to {run.data.folds - 1}")
            temperature = temperatures.get(name, 1.0)
            network = load_exported(run, name, fold, temperature)
            file = folder / f"{safe_name(name)}.fold-{fold}{SUFFIXES[kind]}"
            difference = write_network(file, network, kind)
            info = read_info(run.fold_folder(name, fold) / "fold")
            task = recorded_task(info, name)
            description = {
                "format": FORMAT,
                "version": VERSION,
                "file": file.name,
                "sha256": file_sha256(file),
                "model": name,
                "fold": fold,
                "weights": info["weights"],
                "task": task.name,
                "diagnoses": [
                    {"name": each.name, "title": each.title, "malignant": each.malignant} for each in task.diagnoses
                ],
                "head": network.head,
                "temperature": temperature,
                **describe(network),
                "preprocessing": _preprocessing(network, info),
                "ensemble": _ensemble(run, ensemble),
                "checked": {"lesions": BATCHES, "largest_difference": difference, "versions": versions(kind)},
            }
            write_json(file.with_suffix(".json"), description)
            report(f"{file.name}: outputs differ from PyTorch's by at most {difference:.1e}")


def _preprocessing(network: ExportedNetwork, info: Mapping[str, Any]) -> dict[str, Any] | None:
    """Describe how a photo becomes pixels; None for a network without views."""
    if network.tower is None:
        return None
    size, canvas, short_side = network.tower.image_size, info.get("canvas"), info.get("short_side")
    steps = ["decode as RGB, upright (EXIF orientation)"]
    if short_side:
        steps.append(
            f"if the short side is over {short_side} pixels: reduce it to {short_side} (Lanczos), encode as JPEG of "
            f"quality {QUALITY} with 4:2:0 chroma, decode"
        )
    if canvas:
        steps.append(
            f"fit to {canvas[0]} x {canvas[1]} pixels (width x height) unless it has that size: turn by 90 degrees "
            "where the orientation differs, scale the short side (bilinear, antialiased), crop or mirror the long side"
        )
    steps += [
        f"divide by 255; if the short side is over {1.5 * size:g} pixels, reduce it to that (bilinear, antialiased)",
        f"sample the centered square at {size} x {size} points (bilinear)",
        "subtract mean, divide by std, for each channel; channels first",
    ]
    return {
        "size": size,
        "mean": network.tower.mean,
        "std": network.tower.std,
        "short_side": short_side,
        "canvas": canvas,
        "steps": steps,
    }


def _ensemble(run: Experiment, ensemble: Ensemble | None) -> dict[str, Any]:
    """Describe how the run itself makes probabilities and decisions of the networks' outputs."""
    described: dict[str, Any] = {"folds": run.data.folds, "transforms": run.predict.transforms}
    steps = [
        f"average the logits over the {run.data.folds} folds of the model and the first {run.predict.transforms} "
        "transforms of the pixels: k % 4 quarter turns, then a left-right flip where k is 4 or more",
        "divide by the temperature, then softmax or sigmoid (head)",
    ]
    if ensemble is None:
        return {**described, "steps": steps}
    steps.append("average the probabilities of the members with their weights")
    if STACKER in ensemble.members:
        steps.append(f"the member {STACKER!r} is not a network: the run has it as {STACK_FILE}")
    members = dict(zip(ensemble.members, ensemble.weights.tolist(), strict=True))
    thresholds = ensemble.thresholds.tolist()
    return {**described, "weights": members, "thresholds": thresholds, "rule": ensemble.rule, "steps": steps}
