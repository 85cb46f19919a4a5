"""Index WebDataset shards written by other programs in one scan, so that they can be used like packed ones.

triderm index folder=their_shards
triderm index folder=their_shards task=TASK.yaml
triderm index folder=their_shards clinical='[closeup.jpg, closeup.jpeg]' dermoscopic='[derm.jpg]'

Supported: plain .tar files; consecutive members with one key per lesion, in any order; one JPEG per view; .json with
label (or diagnosis), group (or patient_id), concepts, metadata, named as by triderm pack or in the challenge's tables;
.cls with a diagnosis. Labels by other words, or numbers, need a task whose diagnoses list them as words. What is absent
is missing. The tars are not changed.
"""

from pathlib import Path

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import Extensible, Groups, Invalid, MissingView, Threads
from triderm_dist.settings import PathText


class IndexConfig(Extensible):
    folder: PathText = Field(description="folder of the tars; index.json and samples.parquet are written into it")
    task: PathText | None = Field(
        None,
        description="task.yaml, or the name of a shipped task, whose diagnoses list the words of the labels; default "
        "task.yaml in the folder, else milk10k",
    )
    clinical: tuple[str, ...] = Field(
        ("clinical.jpg", "clinical.jpeg", "closeup.jpg", "closeup.jpeg"),
        min_length=1,
        description="extensions of the clinical photo after the key and a dot; the first that exists is used",
    )
    dermoscopic: tuple[str, ...] = Field(
        ("dermoscopic.jpg", "dermoscopic.jpeg", "dermoscopy.jpg", "derm.jpg"),
        min_length=1,
        description="extensions of the dermoscopic photo",
    )
    groups: Groups = "hash"
    salt: PathText | None = Field(
        None, description="groups=hash: the .groups.csv of another set, or that set's folder; see triderm pack"
    )
    missing_view: MissingView = "refuse"
    invalid: Invalid = "refuse"
    workers: Threads = None


def main(config: IndexConfig) -> None:
    from triderm_dist.data.problems import InvalidLesions
    from triderm_dist.data.shards.console import print_index, print_problems, progress_bar
    from triderm_dist.data.shards.index_foreign import index_shards
    from triderm_dist.tasks import TASK_FILE, load_task, milk10k_task

    own = Path(config.folder) / TASK_FILE
    table = Path(config.folder).with_name(f"{Path(config.folder).name}.problems.csv")
    try:
        with progress_bar("scanning shards") as progress:
            index = index_shards(
                config.folder,
                task=load_task(config.task or own) if config.task or own.is_file() else milk10k_task(),
                extensions={"clinical": config.clinical, "dermoscopic": config.dermoscopic},
                missing_view=config.missing_view,
                invalid=config.invalid,
                workers=config.workers,
                progress=progress,
                note=lambda text: print(f"note: {text}"),
                hash_groups=config.groups == "hash",
                salt=config.salt,
                asked="groups" in config.model_fields_set,
            )
    except InvalidLesions as error:
        print_problems(error.problems, table)
        raise
    print_problems(index.problems, table)
    print_index(index)


def start() -> None:
    run(IndexConfig, main, __doc__)


if __name__ == "__main__":
    start()
