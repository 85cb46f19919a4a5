"""List, copy and locate the files that ship with the package: experiments, search spaces, launchers, tasks.

triderm config list
triderm config copy rtx4090 output=my_experiment.yaml
triderm config copy slurm/train.sh
triderm config copy tasks/derm7pt.yaml
triderm config path slurm/common.sh

A program finds the first three by name too: `--config rtx4090`, `space=losses`, `launcher=ddp`. An experiment with a
`base` is copied with the settings that it takes from there.
"""

from pathlib import Path

from triderm_dist.cli import run_words
from triderm_dist.config import find_file, first_comment, read_yaml, shipped_names
from triderm_dist.files import expanded, write_text
from triderm_dist.schema import ConfigError
from triderm_dist.settings import parse_yaml, to_yaml, untyped

KINDS = ("experiments", "spaces", "accelerate_configs", "tasks", "slurm", "kubernetes", "ray")


def main(arguments: list[str]) -> None:
    match arguments:
        case ["list"]:
            for kind in KINDS:
                print(f"{kind}:")
                for name in shipped_names(kind):
                    print(f"  {name:<26} {first_comment(find_file(kind, name))}")
        case ["path", name]:
            print(locate(name)[1])
        case ["copy", name]:
            copy(name, Path(locate(name)[1].name))
        case ["copy", name, output] if output.startswith("output="):
            copy(name, expanded(output.removeprefix("output=")))
        case _:
            raise ConfigError("write triderm config list, path NAME, or copy NAME and optionally output=FILE")


def locate(name: str) -> tuple[str, Path]:
    """Return the kind and path of a shipped file. Raises ConfigError for an unknown name."""
    for kind in KINDS:
        if name in shipped_names(kind):
            return kind, find_file(kind, name)
    raise ConfigError(f"{name!r} does not ship with the package; triderm config list shows the files that do")


def copy(name: str, output: Path) -> None:
    """Write a shipped file to `output`, with the settings of its `base`. Raises ConfigError for an unknown name."""
    kind, file = locate(name)
    if output.exists():
        raise ConfigError(f"{output}: exists; choose another output=FILE")
    text = file.read_text(encoding="utf-8")
    if kind == "experiments" and "base" in parse_yaml(text, str(file)):
        text = f"# {first_comment(file)}\n{to_yaml(untyped(read_yaml(file)))}"
    write_text(output, text)
    output.chmod(file.stat().st_mode)
    print(output)


def start() -> None:
    run_words(main, __doc__)


if __name__ == "__main__":
    start()
