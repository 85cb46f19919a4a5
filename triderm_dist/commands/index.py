"""Make the index of WebDataset shards that others wrote, by one scan; then they train like packed ones.

triderm index folder=their_shards
triderm index folder=their_shards clinical='[closeup.jpg, closeup.jpeg]' dermoscopic='[derm.jpg]'

Understood: plain .tar files; the members of a lesion side by side under one name, in any order; one JPEG a view; .json
with label (or diagnosis), group (or patient_id), concepts, metadata, named as triderm pack or the challenge's tables
do; .cls with a diagnosis or its number. What is absent is missing. The tars stay as they are.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import Extensible
from triderm_dist.settings import PathText


class IndexConfig(Extensible):
    folder: PathText = Field(description="folder of the tars; index.json and samples.parquet are written into it")
    clinical: tuple[str, ...] = Field(
        ("clinical.jpg", "clinical.jpeg", "closeup.jpg", "closeup.jpeg"),
        min_length=1,
        description="extensions of the clinical photo after the lesion's name and a dot; the first that is there",
    )
    dermoscopic: tuple[str, ...] = Field(
        ("dermoscopic.jpg", "dermoscopic.jpeg", "dermoscopy.jpg", "derm.jpg"),
        min_length=1,
        description="extensions of the dermoscopic photo",
    )
    missing_view: Literal["refuse", "mark"] = Field(
        "refuse", description="a lesion with one photo: refuse it, or keep it with the view marked missing"
    )
    invalid: Literal["refuse", "drop"] = Field(
        "refuse",
        description="lesions that can't be used: refuse the folder, or leave them out of the index and count them",
    )
    workers: int | None = Field(None, ge=1, description="threads; null takes one a core")


def main(config: IndexConfig) -> None:
    from triderm_dist.data.problems import InvalidLesions
    from triderm_dist.data.shards.console import progress_bar, show_index, show_problems
    from triderm_dist.data.shards.index_foreign import index_shards

    table = Path(config.folder).with_name(f"{Path(config.folder).name}.problems.csv")
    try:
        with progress_bar("scanning shards") as progress:
            index = index_shards(
                config.folder,
                extensions={"clinical": config.clinical, "dermoscopic": config.dermoscopic},
                missing_view=config.missing_view,
                invalid=config.invalid,
                workers=config.workers,
                progress=progress,
                note=lambda text: print(f"note: {text}"),
            )
    except InvalidLesions as error:
        show_problems(error.problems, table)
        raise
    show_problems(index.problems, table)
    show_index(index)


def start() -> None:
    run(IndexConfig, main, __doc__)


if __name__ == "__main__":
    start()
