"""Export a trained run: to keep it, to hand it on, or to use its networks without this package.

triderm export run=RUN output=demo.zip
triderm export run=RUN output=onnx format=onnx models=trimodal folds=0
triderm export run=RUN output=demo-hub format=hub license=cc-by-nc-4.0

zip: the run without what only training needs.
hub: the same as a folder for `hf upload`.
onnx, torch_export: each network as MODEL.fold-K.onnx or .pt2, for any number of lesions, compared with PyTorch, and
MODEL.fold-K.json: its inputs, outputs, preprocessing, temperature.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import Networks
from triderm_dist.settings import PathText, Section


class ExportRun(Section):
    run: PathText = Field(description="folder of the run, a zip file of it, or hf-hub:USER/NAME")
    output: PathText = Field(description="file (zip) or folder to write; must not exist")
    format: Literal["zip", "hub", "onnx", "torch_export"] = Field(
        "zip",
        description="the run as one file, as a folder for the Hugging Face hub, or its networks as ONNX or "
        "torch.export files",
    )
    models: tuple[str, ...] | None = Field(
        None, min_length=1, description="onnx, torch_export: the models to write; null writes those of the ensemble"
    )
    folds: tuple[int, ...] | None = Field(
        None, min_length=1, description="onnx, torch_export: the folds to write; null writes all"
    )
    networks: Networks = Field(
        "folds", description="onnx, torch_export: the networks of the folds, or the one per model of triderm refit"
    )
    license: str = Field("other", description="hub: identifier of the license, which the hub shows")


def main(config: ExportRun) -> None:
    from triderm_dist.engine.locate import locate_run
    from triderm_dist.inference.export import export_run

    export_run(
        locate_run(config.run), Path(config.output), config.format, networks=config.networks, models=config.models,
        folds=config.folds, license_name=config.license,
    )  # fmt: skip


def start() -> None:
    run(ExportRun, main, __doc__)


if __name__ == "__main__":
    start()
