"""From photos to the report with many synthetic lesions: seconds, CPU seconds and peak memory of each stage.

python -m benchmarks.end_to_end [lesions=1000000] [scratch=FOLDER]

Writes a challenge folder of lesions with two tiny photos each, drawn from their diagnosis, then runs `triderm pipeline`
on it: packing, the tokens of a frozen tower with random weights, two folds of a small network on them, the stacker and
the ensemble, a test set, and the report. Where `scratch` is set, an interrupted run resumes by the same command. A
million lesions are two million photos of less than a kilobyte: with blocks of 4 kB they need 8 GB, with blocks of 1 kB
(`mkfs.ext4 -b 1024`) 3 GB. The last line is one JSON object.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

import numpy as np
from pydantic import Field

from benchmarks.cpu_run import this_cpu
from triderm_dist.cli import run
from triderm_dist.data.readers.milk10k import MONET_COLUMNS
from triderm_dist.data.synthetic.milk10k import SHARES, TRAITS
from triderm_dist.environment import read_environment
from triderm_dist.runtime.usage import usage_table, usages
from triderm_dist.settings import PathText, Section
from triderm_dist.tasks import milk10k_task

WIDTH, HEIGHT, QUALITY = 24, 16, 60
PART = 5_000
"""Lesions that are drawn together, and the photos of which are in one folder."""
SETTINGS = """\
output: {folder}/run
data: {{source: {folder}/train, test: {folder}/test, test_truth: {folder}/truth.csv, folds: 2, short_side: null}}
train:
  epochs: 2
  global_batch: 1024
  micro_batch: 1024
  select: last
  validate_every: 2
  trackers: []
  augment: {{token_variants: 0, clinical_dropout: 0.05, concept_dropout: 0.02}}
  optim: {{lr: 3e-3, warmup_epochs: 1}}
models:
  mlp:
    kind: mlp
    width: 32
    tower: {{source: "timm:test_vit", pretrained: false, image_size: 32, frozen: true, shared: true}}
predict: {{transforms: 1}}
"""


class EndToEnd(Section):
    lesions: int = Field(1_000_000, ge=100, description="lesions to train on")
    test_lesions: int = Field(1_000, ge=100, description="lesions of the test set")
    scratch: PathText | None = Field(
        None, description="folder for all files; null takes one that is removed at the end"
    )
    output: Path | None = Field(None, description="JSON file of the figures of each stage")


def main(config: EndToEnd) -> None:
    if config.scratch:
        return run_in(config, Path(config.scratch).absolute())
    with tempfile.TemporaryDirectory() as folder:
        run_in(config, Path(folder))


def run_in(config: EndToEnd, folder: Path) -> None:
    if not (folder / "settings.yaml").exists():
        write_challenge(folder / "train", folder / "train", "Training", config.lesions, 0)
        write_challenge(folder / "test", folder, "Test", config.test_lesions, 1)
        (folder / "settings.yaml").write_text(SETTINGS.format(folder=folder), encoding="utf-8")
    command = [sys.executable, "-m", "triderm_dist", "pipeline", "--config", str(folder / "settings.yaml")]
    started = time.perf_counter()
    if status := subprocess.run(command).returncode:
        sys.exit(status)
    stages = read_environment(folder / "run")["stages"]
    result = {
        "lesions": config.lesions,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(sum(row["cpu_seconds"] for row in stages), 1),
        "peak_mb": round(max(row["peak_mb"] for row in stages)),
        "written_mb": round(sum(path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file()) / 1e6),
        "pipeline_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
    }
    print(f"\n{config.lesions:,} lesions on {this_cpu()['model']}, {this_cpu()['cores']} cores")
    print(usage_table(usages(stages)))
    if config.output:
        config.output.write_text(json.dumps({**result, "stages": stages}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def write_challenge(folder: Path, truth: Path, name: str, lesions: int, seed: int) -> None:
    """Write photos and tables of one part; the labels into `truth`, in a folder of labeled lesions with their official
    name.
    """
    diagnoses = milk10k_task().diagnosis_names
    (folder / f"MILK10k_{name}_Input").mkdir(parents=True, exist_ok=True)
    labels = truth / f"MILK10k_{name}_GroundTruth.csv" if truth == folder else truth / "truth.csv"
    with (folder / f"MILK10k_{name}_Metadata.csv").open("w") as metadata, labels.open("w") as table:
        fields = ("age_approx", "sex", "skin_tone_class", "site")
        metadata.write(",".join(["lesion_id", "image_type", "isic_id", *fields, *MONET_COLUMNS]) + "\n")
        table.write(",".join(["lesion_id", *diagnoses]) + "\n")
        for start in range(0, lesions, PART):
            drawn = draw_lesions(start, min(PART, lesions - start), seed)
            photos = folder / f"MILK10k_{name}_Input" / f"{start // PART:04d}"
            write_lesions(drawn, photos, metadata, table)


class _Lesions:
    """Lesions of one part, drawn together."""

    def __init__(self, first: int, count: int, seed: int) -> None:
        random = np.random.default_rng([seed, first])
        names = [*SHARES]
        share = np.array([*SHARES.values()])
        self.diagnosis = random.choice(len(names), count, p=share / share.sum())
        self.names = names
        traits = np.array([TRAITS[name] for name in names])[self.diagnosis]
        traits ^= random.random(traits.shape) < 0.1
        self.ids = [f"{'LT'[seed]}{row:08d}" for row in range(first, first + count)]
        older = traits[:, 3]
        age = np.clip(np.round(np.where(older, 70, 40) + 10 * random.normal(size=count), -1), 5, 85).astype(int)
        sites = np.array(["trunk", "head_neck_face", "lower_extremity", "upper_extremity"])
        self.cells = [
            f"{years},{sex},{tone},{site}"
            for years, sex, tone, site in zip(
                age.tolist(), np.array(["female", "male"])[random.integers(0, 2, count)].tolist(),
                random.integers(0, 6, count).tolist(), sites[(random.integers(0, 3, count) + older) % 4].tolist(),
                strict=True,
            )
        ]  # fmt: skip
        scores = random.random((2, count, len(MONET_COLUMNS)))
        scores[:, :, 0] = np.clip(0.3 + 0.4 * traits[:, 2] + 0.1 * random.normal(size=(2, count)), 0, 1)
        self.scores = scores
        # A color that shows the trait of the view, a darker middle, and noise, so that no two photos are equal.
        color = np.array([[(150, 110, 90), (190, 90, 90)], [(170, 130, 100), (110, 90, 140)]])
        y, x = np.mgrid[:HEIGHT, :WIDTH]
        middle = np.exp(-(((x - WIDTH / 2) / 7) ** 2 + ((y - HEIGHT / 2) / 5) ** 2))[None, :, :, None]
        self.photos = []
        for view in range(2):
            pixels = color[view][traits[:, view]][:, None, None, :] * (1 - 0.5 * middle)
            pixels = pixels + random.normal(scale=12, size=(count, HEIGHT, WIDTH, 1))
            self.photos.append(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_lesions(first: int, count: int, seed: int) -> _Lesions:
    return _Lesions(first, count, seed)


def write_lesions(drawn: _Lesions, folder: Path, metadata: TextIO, table: TextIO) -> None:
    from simplejpeg import encode_jpeg

    folder.mkdir(exist_ok=True)
    diagnoses = milk10k_task().diagnosis_names
    for row, lesion in enumerate(drawn.ids):
        for view, kind in enumerate(("clinical: close-up", "dermoscopic")):
            photo = f"{lesion}{'cd'[view]}"
            (folder / f"{photo}.jpg").write_bytes(encode_jpeg(drawn.photos[view][row], QUALITY, colorsubsampling="420"))
            scores = ",".join(f"{score:.3f}" for score in drawn.scores[view, row].tolist())
            metadata.write(f"{lesion},{kind},{photo},{drawn.cells[row]},{scores}\n")
        own = drawn.names[drawn.diagnosis[row]]
        table.write(f"{lesion},{','.join('1.0' if name == own else '0.0' for name in diagnoses)}\n")


if __name__ == "__main__":
    run(EndToEnd, main, __doc__)
