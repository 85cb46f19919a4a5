"""Every file of a run, damaged in every way: the programs that read it name it in one line, or need it not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import triderm_dist
from tests.test_run_folder import program
from triderm_dist.checksums import KEY
from triderm_dist.schema import InputError

Damage = Callable[[Path], None]


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def other_json(text: str) -> Damage:
    def damage(path: Path) -> None:
        path.write_text(text)

    return damage


DAMAGES: dict[str, Damage] = {
    **{each.__name__: each for each in (empty, cut, garbage, zeros, not_utf8, folder)},
    "a list": other_json("[1, 2]"),
    "a number": other_json("3"),
    "no keys": other_json("{}"),
    "deep": other_json("[" * 100_000),
}


def changes_of(content: dict) -> Iterator[tuple[str, dict]]:
    """Yield a JSON mapping without its checksum, and without each of its keys or with a value of another type."""
    content = {key: value for key, value in content.items() if key != KEY}
    for key, value in content.items():
        yield f"without {key}", {name: each for name, each in content.items() if name != key}
        for other in (None, {"a": [1]}, "text", [[]], -1):
            if type(other) is not type(value):
                yield f"{key}={other!r}", {**content, key: other}


def outcome(read: Callable[[], object], path: Path) -> str:
    """Return "" where a program reads a run with a damaged file, or names it in one line; else what it did."""
    try:
        read()
    except (InputError, OSError) as error:
        text = str(error)
        named = path.name in text or path.stem in text or (path.suffix == ".ubj" and "stack.json" in text)
        return "" if named and "\n" not in text else f"{type(error).__name__}: {text}"
    except Exception as error:  # a traceback
        return f"{type(error).__name__}: {error}"
    return ""


def predict(run: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    triderm_dist.load(run, device="cpu").predict(dermoscopic=photo, tta=1)


def predict_packed(run: Path) -> None:
    from triderm_dist.commands import predict

    program(predict, f"run={run}")


def stack(run: Path) -> None:
    from triderm_dist.commands import stack

    program(stack, f"run={run}")


def report(run: Path) -> None:
    from triderm_dist.cli import read_settings
    from triderm_dist.commands.report import ReportRun
    from triderm_dist.ensemble.model_card import card_text
    from triderm_dist.report.content import Content, extra_sets

    config = read_settings(ReportRun, [f"run={run}"])
    content = Content(run)
    for name in ("scores", "held_out", "settings", "transforms", "synthetic", "curves", "stacker", "importance"):
        getattr(content, name)
    extra_sets(run, content.networks)
    card_text(config, run)


def refit(run: Path) -> None:
    from triderm_dist.commands import refit

    program(refit, f"run={run}")


def crossval(run: Path) -> None:
    from triderm_dist.commands import crossval

    program(crossval, f"run={run}")


def export(run: Path) -> None:
    from triderm_dist.inference.export import export_run

    (run.parent / "e.zip").unlink(missing_ok=True)
    export_run(run, run.parent / "e.zip", report=lambda line: None)


def runs(run: Path) -> None:
    from triderm_dist.ensemble.run_list import find_runs

    find_runs(run.parent)


def clean(run: Path) -> None:
    from triderm_dist.engine.clean import find_removable

    find_removable(run)


PROGRAMS = (runs, clean, predict, report, predict_packed, export, stack, refit, crossval)
