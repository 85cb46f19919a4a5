"""Export of a trained run: as a zip file, a folder for the hub, or ONNX and `torch.export` files of its networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from triderm_dist.config import Networks
from triderm_dist.data.shards.photos import QUALITY
from triderm_dist.ensemble.run_files import STACK_FILE, STACKER
from triderm_dist.files import file_sha256, follow_link, new_folder, size_of, size_text, write_json
from triderm_dist.inference.exported_files import BATCHES, SUFFIXES, check_installed, versions, write_network
from triderm_dist.inference.exported_network import ExportedNetwork, describe_network
from triderm_dist.inference.networks import NetworkLoader, Preprocessing
from triderm_dist.inference.run_folder import RunFolder, open_run_folder
from triderm_dist.inference.slim_run import safe_name, write_hub_card, write_slim_run, write_zip
from triderm_dist.schema import ConfigError

Format = Literal["zip", "hub", "onnx", "torch_export"]

FORMAT, VERSION = "triderm-network", 1
"""Of the description next to a network's file."""


def export_run(
    run_folder: Path,
    output: Path,
    kind: Format = "zip",
    *,
    networks: Networks = "folds",
    models: Sequence[str] | None = None,
    folds: Sequence[int] | None = None,
    license_name: str = "other",
    report: Callable[[str], None] = print,
) -> None:
    """Write a run to `output`, which must not exist: a file for `zip`, else a folder. It is complete or not there.

    networks, models, folds: the networks to write as `onnx` or `torch_export`: of the folds or of the refit; None for
    all members of the ensemble, and all folds.  license_name: the hub's identifier of the license, in the metadata of
    `hub`.  report: gets lines on what was written.

    Raises Busy where another process writes the output; InputError if the run is incomplete, the output exists, or a
    network's file does not compute what the network computes.
    """
    if kind == "zip" and output.suffix != ".zip":
        raise ConfigError(f"output={output}: the name of a zip file must end with .zip")
    if kind in ("zip", "hub") and (models, folds, networks) != (None, None, "folds"):
        raise ConfigError(f"models, folds, networks: format={kind} has all networks of a run; remove these settings")
    if kind != "hub" and license_name != "other":
        raise ConfigError(f"license={license_name}: format={kind} names no license; remove it, or set format=hub")
    if folds is not None and networks == "refit":
        raise ConfigError("folds: a refit has one network per model; remove the setting")
    run = open_run_folder(run_folder, networks)
    if kind != "zip":
        output = follow_link(output)
    with new_folder(output) as part:
        if output.exists():  # only now: this may have waited for another process that wrote it
            raise ConfigError(f"output={output}: exists; remove it, or set another output")
        if kind == "zip":
            write_slim_run(run, part)
            write_zip(part, output)
            report(f"{output}: {size_text(size_of(output))}")
            return
        if kind == "hub":
            write_slim_run(run, part)
            write_hub_card(run, part, license_name)
        else:
            _write_networks(run, part, kind, models, folds, report)
        part.rename(output)
        report(f"{output}: {size_text(size_of(output))}")


def _write_networks(
    run: RunFolder,
    folder: Path,
    kind: str,
    models: Sequence[str] | None,
    folds: Sequence[int] | None,
    report: Callable[[str], None],
) -> None:
    """Write each network as NAME.onnx or NAME.pt2, described in NAME.json; NAME is MODEL.fold-K or MODEL.refit."""
    check_installed(kind)
    ensemble = run.fitted.ensemble
    temperatures = dict(zip(ensemble.members, ensemble.temperatures.tolist(), strict=True))
    loader = NetworkLoader(run, torch.device("cpu"), "fp32")
    for name in models or run.networks:
        if name not in run.networks:
            raise ConfigError(f"models={name}: the ensemble has the networks {', '.join(run.networks)}")
        loaded = loader.load(name, share=False)
        for fold in range(len(loaded.networks)) if folds is None else folds:
            if not 0 <= fold < len(loaded.networks):
                raise ConfigError(f"folds={fold}: {name} has the folds 0 to {len(loaded.networks) - 1}")
            network = ExportedNetwork.of(loaded, fold, temperatures[name])
            which = "refit" if run.refitted else f"fold-{fold}"
            file = folder / f"{safe_name(name)}.{which}{SUFFIXES[kind]}"
            difference = write_network(file, network, kind)
            description = {
                "format": FORMAT,
                "version": VERSION,
                "file": file.name,
                "sha256": file_sha256(file),
                "model": name,
                "fold": None if run.refitted else fold,
                "weights": loaded.trained[fold].weights,
                "task": run.task.name,
                "diagnoses": [
                    {"name": each.name, "title": each.title, "malignant": each.malignant} for each in run.task.diagnoses
                ],
                "head": loaded.config.head,
                "temperature": temperatures[name],
                **describe_network(network),
                "preprocessing": _preprocessing(run, loaded.preprocessing),
                "ensemble": _ensemble(run),
                "checked": {"lesions": BATCHES, "largest_difference": difference, "versions": versions(kind)},
            }
            write_json(file.with_suffix(".json"), description)
            report(f"{file.name}: outputs differ from PyTorch's by at most {difference:.1e}")


def _preprocessing(run: RunFolder, preprocessing: Preprocessing) -> dict[str, Any]:
    """Describe the preprocessing from a photo to pixels."""
    size, (width, height), short_side = preprocessing.size, run.canvas, run.short_side
    most = f"is over {1.5 * size:g} pixels, reduce it to that (bilinear, antialiased)"
    reduced, shown = {
        "square": (f"if the short side {most}", "the centered square"),
        "whole": (
            f"if the long side {most}",
            "the centered square of the long side, mirrored where it leaves the photo",
        ),
        "squash": (f"where a side {most}", "the whole photo"),
    }[preprocessing.frame]
    steps = ["decode as RGB, upright (EXIF orientation)"]
    if short_side:
        steps.append(
            f"if the short side is over {short_side} pixels: reduce it to {short_side} (Lanczos), encode as JPEG of "
            f"quality {QUALITY} with 4:2:0 chroma, decode"
        )
    steps += [
        f"fit to {width} x {height} pixels (width x height) unless it has that size: turn by 90 degrees where the "
        "orientation differs, scale the short side (bilinear, antialiased), crop or mirror the long side",
        f"divide by 255; {reduced}",
        f"sample {shown} at {size} x {size} points (bilinear)",
        "subtract mean, divide by std, for each channel; channels first",
    ]
    numbers = {"size": size, "mean": preprocessing.mean, "std": preprocessing.std}
    return {**numbers, "short_side": short_side, "canvas": [width, height], "steps": steps}


def _ensemble(run: RunFolder) -> dict[str, Any]:
    """Describe how the run computes probabilities and decisions from the networks' outputs."""
    networks, transforms = max(map(len, run.networks.values())), run.experiment.predict.transforms
    steps = [
        f"average the logits over the {networks} network(s) of the model and the first {transforms} transforms of the "
        "pixels: k % 4 quarter turns, then a left-right flip where k is 4 or more",
        "divide by the temperature, then softmax or sigmoid (head)",
        "average the probabilities of the members with their weights",
    ]
    if run.fitted.stacker:
        steps.append(f"the member {STACKER!r} is not a network: the run has it as {STACK_FILE}")
    ensemble = run.fitted.ensemble
    return {
        "networks": networks,
        "transforms": transforms,
        "weights": dict(zip(ensemble.members, ensemble.weights.tolist(), strict=True)),
        "thresholds": ensemble.thresholds.tolist(),
        "rule": ensemble.rule,
        "steps": steps,
    }
