"""Prediction of new photos: ours against the build guide's loop, and the time to the first answer.

python -m benchmarks.predict [run=RUN input=PHOTOS] [tower=timm:tf_efficientnet_lite0] [frozen=false] [rounds=3]

Both predict the same photo files with the networks of all folds under the 8 transforms of the dihedral group,
alternating in one process, and both include reading and preparing the photos. Ours: what `triderm predict run= input=
output=` does after its start, files included. The guide's (7.1 and 7.2): one lesion at a time; for each transform and
fold a forward of each network, and of the tri-modal one a second for its features. Its stacker, which the guide calls
once for each lesion and transform, is called once for all lesions here. Without `run`, a run of two networks in two
folds is trained for one epoch on synthetic photos, on frozen towers as in the experiments for CPUs.

first_answer_s is the CPU time of `triderm predict` for one photo, less that of `import torch`. The last line is one
JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from triderm_dist.cli import run
from triderm_dist.data.augment import dihedral
from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.photo_set import PhotoSet, PhotoSetSource
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.distributed.malloc import disable_malloc_trim
from triderm_dist.engine.evaluate import Evaluation, mean_outputs
from triderm_dist.engine.fold import as_predictions
from triderm_dist.inference.chunks import PredictionJob
from triderm_dist.inference.inputs import read_input
from triderm_dist.inference.networks import LoadedModel, NetworkLoader
from triderm_dist.inference.output import write_output
from triderm_dist.inference.predictor import Predictor
from triderm_dist.inference.run_folder import RunFolder, open_run_folder
from triderm_dist.models.trimodal import TriModal
from triderm_dist.predictions import NO_FOLD, average_test
from triderm_dist.schema import Outputs
from triderm_dist.settings import PathText, Section

TRANSFORMS = 8
STARTS = 3
"""Starts of the program for `first_answer_s`."""


class PredictBenchmark(Section):
    run: PathText | None = Field(None, description="run whose networks predict; by default one that is trained")
    input: PathText | None = Field(None, description="photos to predict; default the test photos of that run")
    tower: str = Field("timm:tf_efficientnet_lite0", description="tower of the run that is trained, random weights")
    image_size: int = Field(224, ge=32, description="its input side in pixels")
    frozen: bool = Field(True, description="freeze the tower; false trains one for each network and fold")
    lesions: int = Field(16, ge=1, description="lesions to predict")
    rounds: int = Field(3, ge=1, description="rounds, each method once per round")


def main(config: PredictBenchmark) -> None:
    with tempfile.TemporaryDirectory() as folder:
        at = Path(config.run) if config.run else train(Path(folder), config)
        photos = Path(config.input) if config.input else at / "data" / "test"
        measure(config, at, photos, Path(folder))


def measure(config: PredictBenchmark, at: Path, photos: Path, folder: Path) -> None:
    disable_malloc_trim()  # as `triderm predict` does on a CPU; the guide's loop gains from it too
    run_folder = open_run_folder(at)
    lesions = read_input([photos], run_folder).lesions.take(slice(config.lesions))
    predictor = Predictor(run_folder)
    loader = NetworkLoader(run_folder, predictor.device)
    networks = {name: loader.load(name, share=False) for name in run_folder.networks}
    times: dict[str, list[float]] = {"ours": [], "guide": [], "guide, one forward": []}
    for number in range(config.rounds):
        started = time.perf_counter()
        ours = predict(predictor, lesions, folder / f"out-{number}")
        times["ours"].append(time.perf_counter() - started)
        for name, forwards in (("guide", 2), ("guide, one forward", 1)):
            started = time.perf_counter()
            theirs = guide(run_folder, networks, lesions, predictor.device, forwards)
            times[name].append(time.perf_counter() - started)
    difference = float(np.abs(ours - theirs).max())
    ratios = {
        name: statistics.median(other / own for own, other in zip(times["ours"], seconds, strict=True))
        for name, seconds in times.items()
    }
    count = sum(len(each) for each in run_folder.networks.values())
    print(
        f"{len(lesions)} lesions x {TRANSFORMS} transforms x {count} networks, {predictor.device}, "
        f"{torch.get_num_threads()} threads"
    )
    for method, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{method:<18} {median:7.2f} s  {len(lesions) / median:7.2f} lesions/s  {ratios[method]:5.2f}")
    result = {
        "vs_guide": round(ratios["guide"], 2),
        "vs_guide_one_forward": round(ratios["guide, one forward"], 2),
        "first_answer_s": round(first_answer(at, lesions), 2),
        "max_difference": difference,
    }
    print(json.dumps(result))


def train(folder: Path, config: PredictBenchmark) -> Path:
    """Train a tri-modal network and a dual CNN in two folds, and stack them."""
    frozen = str(config.frozen).lower()
    tower = f"{{source: '{config.tower}', pretrained: false, image_size: {config.image_size}, frozen: {frozen}}}"
    words = [
        f"output={folder / 'run'}", "data.folds=2",
        "train={epochs: 1, global_batch: 10, micro_batch: 10, trackers: []}",
        f"models.trimodal={{kind: trimodal, width: 128, heads: 4, tower: {tower}}}",
        f"models.dual_cnn={{kind: dual_cnn, width: 128, tower: {tower}}}",
    ]  # fmt: skip
    sizes = ["lesions=100", f"test_lesions={max(50, config.lesions)}"]
    triderm("synthetic", f"output={folder / 'run' / 'data'}", *sizes)
    dataset = read_challenge(folder / "run" / "data" / "train")
    pack_shards(dataset, folder / "run" / "shards" / "train", short_side=None)
    triderm("crossval", *words)
    triderm("stack", f"run={folder / 'run'}", "ensemble={bootstrap: 20, rounds: 3}")
    return folder / "run"


def triderm(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "triderm_dist", *words], check=True, stdout=subprocess.DEVNULL)


def predict(predictor: Predictor, lesions: PhotoSet, output: Path) -> np.ndarray:
    """Predict as `triderm predict` does, and return the probabilities (N, C)."""
    job = PredictionJob(predictor, lesions, TRANSFORMS, False, output.with_name(f"{output.name}.part"))
    job.run()
    table = job.result()[0]
    task = predictor.run.task
    write_output(output, table, task, {})
    return np.stack([table[name].to_numpy() for name in task.diagnosis_names], 1)


@torch.no_grad()
def guide(
    run_folder: RunFolder, models: dict[str, LoadedModel], lesions: PhotoSet, device: torch.device, forwards: int
) -> np.ndarray:
    """Return the probabilities (N, C). forwards: of a tri-modal network for each transform."""
    outputs: dict[tuple[str, int], list[list[np.ndarray]]] = {}
    for name, model in models.items():
        source = PhotoSetSource(lesions, *model.preprocessing[:3])  # its networks take the central square
        loaders = LoaderFactory(lesions, source, workers=1, prefetch=1)
        for step in loaders.sequential(np.arange(len(lesions)), 1, device):
            batch = step.micro_batches[0]
            rest = (batch.view_present, batch.concepts, batch.metadata)
            for number, network in enumerate(model.networks):
                turned: list[Outputs] = []
                for transform in range(TRANSFORMS):
                    photos = [dihedral(photo, transform) for photo in (batch.clinical, batch.dermoscopic)]
                    for _ in range(forwards if isinstance(network, TriModal) else 1):
                        output = forward(network, model.encoders, photos, rest)
                    turned.append(output)
                means = [mean.cpu().numpy() for mean in mean_outputs(turned)]
                outputs.setdefault((name, number), []).append(means)
    parts = []
    for (name, number), rows in outputs.items():
        arrays = [np.concatenate(column) for column in zip(*rows, strict=True)]
        evaluation = Evaluation(np.arange(len(lesions)), *arrays)
        weights = run_folder.networks[name][number].weights
        parts.append(as_predictions(evaluation, lesions, name, models[name].config.head, NO_FOLD, weights))
    return run_folder.fitted.predict(average_test(parts), parts)[0].probabilities


def forward(network: nn.Module, encoders: dict[str, nn.Module], photos: list[torch.Tensor], rest: Any) -> Outputs:
    """Run a network, and the frozen tower in front of it where it has one."""
    views = [
        encoders[view](photo) if view in encoders else photo
        for view, photo in zip(("clinical", "dermoscopic"), photos, strict=True)
    ]
    output: Outputs = network(*views, *rest)
    return output


def first_answer(at: Path, lesions: PhotoSet) -> float:
    """Return the median CPU seconds of `triderm predict` for one photo beyond `import torch`."""
    view, path = next((view, photos[0]) for view, photos in lesions.photos.items() if photos[0] is not None)
    words = ["-m", "triderm_dist", "predict", f"run={at}", f"input={path!s}", f"view={view}"]
    return statistics.median(cpu_seconds(words) - cpu_seconds(["-c", "import torch"]) for _ in range(STARTS))


def cpu_seconds(words: list[str]) -> float:
    """Return the CPU seconds of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    run(PredictBenchmark, main, __doc__)
