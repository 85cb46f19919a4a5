"""List and copy the experiments, search spaces and accelerate files that ship with the package.

triderm config list
triderm config copy rtx4090 output=my_experiment.yaml

A program finds them by name too: `--config rtx4090`, `space=losses`, `launcher=ddp`. An experiment that names another
one as `base` is copied with all that it takes from there.
"""

import sys
from pathlib import Path

import yaml

from triderm_dist.cli import guarded
from triderm_dist.config import SHIPPED, first_comment, read_yaml, shipped, shipped_names
from triderm_dist.files import write_text
from triderm_dist.schema import ConfigError
from triderm_dist.settings import parse_yaml, untyped


def main(arguments: list[str]) -> None:
    match arguments:
        case ["list"]:
            for kind in SHIPPED:
                print(f"{kind}:")
                for name in shipped_names(kind):
                    print(f"  {name:<24} {first_comment(shipped(kind) / f'{name}.yaml')}")
        case ["copy", name]:
            copy(name, Path(f"{name}.yaml"))
        case ["copy", name, output] if output.startswith("output="):
            copy(name, Path(output.removeprefix("output=")).expanduser())
        case _:
            raise ConfigError("write triderm config list, or triderm config copy NAME and optionally output=FILE")


def copy(name: str, output: Path) -> None:
    """Write a shipped file to `output`, with what it takes from its `base`. Raises ConfigError for an unknown name."""
    for kind in SHIPPED:
        if name in shipped_names(kind):
            break
    else:
        raise ConfigError(f"{name!r} does not ship with the package; triderm config list names what does")
    if output.exists():
        raise ConfigError(f"{output}: exists; choose another output=FILE")
    file = shipped(kind) / f"{name}.yaml"
    text = file.read_text(encoding="utf-8")
    if kind == "experiments" and "base" in parse_yaml(text, str(file)):
        text = f"# {first_comment(file)}\n{yaml.safe_dump(untyped(read_yaml(file)), sort_keys=False)}"
    write_text(output, text)
    print(output)


def start() -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(__doc__)
        return
    guarded(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    start()
