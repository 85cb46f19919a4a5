"""Write the tables of `benchmarks.gpu` into a page of the documentation: python -m benchmarks.gpu_tables

They stand between the lines <!-- gpu tables --> and <!-- end of gpu tables -->, and are made from
benchmarks/results/gpu/part1.json to part4.json alone. The last line is one JSON object: the ratios to the goals.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from benchmarks.gpu import RESULTS
from triderm_dist.cli import run
from triderm_dist.files import write_text
from triderm_dist.schema import InputError
from triderm_dist.settings import PathText, Section

BEGIN, END = "<!-- gpu tables -->", "<!-- end of gpu tables -->"
MODELS = {"base": "base", "large": "large", "dual_cnn": "dual CNN"}
MODES = {"eager": "eager", "compiled": "compiled", "graph": "graph", "compiled-graph": "compiled, graph"}

Cell = dict[str, Any]


class GpuTables(Section):
    results: PathText = Field(RESULTS, description="folder with the results of benchmarks.gpu")
    page: PathText = Field("docs/benchmarks.md", description="page to write the tables into")


def main(config: GpuTables) -> None:
    parts = [read_part(Path(config.results), number) for number in range(1, 5)]
    page = Path(config.page)
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"{page}: has no {BEGIN} and {END}, each on a line of its own; write them where tables belong")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(page, f"{before}{BEGIN}\n\n" + "\n".join(lines_of(parts)).strip() + f"\n\n{END}{after}")
    print(json.dumps(ratios(parts)))


def read_part(folder: Path, number: int) -> dict[str, Cell]:
    """Return the measured cells of a part; those that failed are left out."""
    file = folder / f"part{number}.json"
    cells = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {name: cell for name, cell in cells.items() if "error" not in cell}


def lines_of(parts: Sequence[dict[str, Cell]]) -> Iterator[str]:
    first, second, third, fourth = parts
    yield from training_table(first)
    yield from comparison_table(second)
    yield from memory_table(second)
    yield from recovery(second)
    yield from photo_tables(third)
    yield from fold_tables(fourth)


def measured_on(cells: Sequence[Cell]) -> str:
    """Return device, version, commit and date of cells."""

    def distinct(key: str) -> str:
        return ", ".join(dict.fromkeys(str(cell[key]) for cell in cells if cell.get(key)))

    return f"{distinct('device')}, PyTorch {distinct('torch')}, commit {distinct('commit')}, {distinct('date')}."


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def paragraph(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)
    yield ""


def number(value: float | None, digits: int = 0, unit: str = "") -> str:
    return "" if value is None else f"{value:,.{digits}f}{unit}"


def share(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def training_table(cells: dict[str, Cell]) -> Iterator[str]:
    chosen = {name: cell for name, cell in cells.items() if "mode" in cell and "lesions_per_s" in cell}
    if not chosen:
        return
    yield from paragraph(
        "**Training steps** in bf16, `python -m benchmarks.gpu part=1`: the recipes of `milk10k` (base: two ViT-B/16; "
        "dual CNN: EfficientNet-B3 at 384 pixels) and `milk10k_large` (two ViT-L/16, LoRA), photos in the device's "
        f"memory. Host: CPU time to give a step to an idle device. {measured_on([*chosen.values()])}"
    )
    header = ["network", "lesions", "", "lesions/s", "MFU", "ms per step", "busy ms", "host ms", "kernels", "peak GiB"]
    order = [*MODELS], [*MODES]
    ranked = sorted(
        chosen.values(),
        key=lambda cell: (order[0].index(cell["model"]), cell["lesions"], order[1].index(cell["mode"])),
    )
    rows = [
        [
            MODELS[cell["model"]], str(cell["lesions"]), MODES[cell["mode"]], number(cell["lesions_per_s"]),
            share(cell.get("mfu")), number(cell["step_ms"], 1), number(cell.get("device_ms"), 1),
            number(cell["host_cpu_ms"], 1), number(cell.get("kernels")), number(cell["peak_gib"], 1),
        ]
        for cell in ranked
    ]  # fmt: skip
    if len({cell["commit"] for cell in ranked}) > 1:
        header.append("commit")
        rows = [[*row, cell["commit"]] for row, cell in zip(rows, ranked, strict=True)]
    yield from table(header, rows)


COMPARED = {
    "ours-compiled-graph": "this toolkit, compiled, graph",
    "ours-compiled": "this toolkit, compiled",
    "ours-eager": "this toolkit, eager",
    "bare-loop": "a bare loop over its network, compiled",
    "sketch-bf16": "the guide's sketch, bf16",
    "sketch-tf32": "the guide's sketch, fp32 with TF32",
    "sketch-fp32": "the guide's sketch, fp32",
    "timm-frozen": "timm, two ViT-B/16, 6 and 4 blocks frozen, compiled",
    "timm-all": "timm, one ViT-B/16 trained as a whole on all photos, compiled",
}


def comparison_table(cells: dict[str, Cell]) -> Iterator[str]:
    chosen = {name: cells[name] for name in COMPARED if name in cells}
    if not chosen:
        return
    best = ours(cells)
    yield from paragraph(
        "**Against the build guide's sketch, and timm's towers alone**, `python -m benchmarks.gpu part=2`: ViT-B/16 "
        f"towers, {next(iter(chosen.values()))['lesions']} lesions, twice as many photos. "
        f"{measured_on([*chosen.values()])}"
    )
    rows = [
        [
            COMPARED[name], number(cell["lesions_per_s"]), share(cell.get("mfu")), number(cell["step_ms"], 1),
            number(cell.get("device_ms"), 1), number(cell["peak_gib"], 1),
            number(best and best / cell["lesions_per_s"], 2),
        ]
        for name, cell in chosen.items()
    ]  # fmt: skip
    yield from table(["step", "lesions/s", "MFU", "ms per step", "busy ms", "peak GiB", "ours / this"], rows)


def ours(cells: dict[str, Cell]) -> float | None:
    """Return the lesions/s of this toolkit's fastest step on the towers of the sketch."""
    rates = [cell["lesions_per_s"] for name, cell in cells.items() if name.startswith("ours-")]
    return max(rates, default=None)


def memory_rows(cells: dict[str, Cell]) -> list[Cell]:
    """Return the measured peaks with their estimates and errors."""
    rows = []
    for name, cell in cells.items():
        estimate = cells.get(name.replace("memory-", "estimate-"), {}).get("estimate_gib")
        if name.startswith("memory-") and estimate and cell["peak_gib"]:
            rows.append({**cell, "estimate_gib": estimate, "estimate_error": estimate / cell["peak_gib"] - 1})
    return rows


def memory_table(cells: dict[str, Cell]) -> Iterator[str]:
    chosen = memory_rows(cells)
    if not chosen:
        return
    yield from paragraph(
        f"**Estimated and measured peak memory** of an eager step of each experiment file. {measured_on(chosen)}"
    )
    rows = [
        [
            f"`{cell['experiment']}`", cell["model"], f"{cell['micro_batch']} x {cell['accumulation']}",
            cell["precision"], "yes" if cell["checkpointing"] else "", number(cell["estimate_gib"], 2),
            number(cell["peak_gib"], 2), share(cell["estimate_error"]),
        ]
        for cell in chosen
    ]  # fmt: skip
    header = ["experiment", "model", "micro-batches", "", "checkpointing", "estimate, GiB", "peak, GiB", "error"]
    yield from table(header, rows)


def recovery(cells: dict[str, Cell]) -> Iterator[str]:
    cell = cells.get("out-of-memory")
    if cell and cell["exit"] == 0 and cell["micro_batch_kept"]:
        yield from paragraph(
            "**Out of memory**: with 9 GiB left by another process, `triderm train` with micro-batches of 96 lesions "
            f"went on with {cell['micro_batch_kept']} and ended well. {measured_on([cell])}"
        )


def photo_tables(cells: dict[str, Cell]) -> Iterator[str]:
    loaders = [cell for name, cell in cells.items() if name.startswith("loader-")]
    if loaders:
        yield from paragraph(
            "**The loader alone**, `python -m benchmarks.gpu part=3`: JPEG photos with a short side of "
            f"{loaders[0]['packed_side']} pixels, augmented on the device by the recipe. {measured_on(loaders)}"
        )
        rows = [
            [
                MODELS[cell["model"]], str(cell["side"]), str(cell["workers"]), number(cell["photos_per_s"]),
                number(cell["photos_per_cpu_s"]),
            ]
            for cell in loaders
        ]  # fmt: skip
        yield from table(["network", "pixels", "threads", "photos/s", "photos per CPU second"], rows)
    trained = [(name, cell) for name, cell in cells.items() if name.startswith(("photos-", "two-"))]
    if trained:
        yield from paragraph(
            f"**Trainings on photos**, compiled and as a graph. {measured_on([c for _, c in trained])}"
        )
        rows = [
            [
                MODELS[cell["model"]], "2" if name.startswith("two-") else "1", str(cell["lesions"]),
                str(cell["workers"]), number(cell["lesions_per_s"]), share(cell.get("data_wait")),
            ]
            for name, cell in trained
        ]  # fmt: skip
        header = [
            "network",
            "trainings at once",
            "lesions per step",
            "threads of each",
            "lesions/s in sum",
            "data wait",
        ]
        yield from table(header, rows)
    rest = {
        "tokens-base": ("tokens of a frozen ViT-B/16, eager", "photos_per_s", "photos/s"),
        "tokens-base-compiled": ("the same, compiled", "photos_per_s", "photos/s"),
        "tta-base": ("evaluation with 8 transforms, base", "lesions_per_s", "lesions/s"),
        "tta-dual_cnn": ("evaluation with 8 transforms, dual CNN", "lesions_per_s", "lesions/s"),
        "predict": ("`triderm predict`, four networks, 8 transforms, from photo files", "lesions_per_s", "lesions/s"),
    }
    found = {name: cells[name] for name in rest if name in cells}
    if found:
        yield from paragraph(f"**Without training**, from photos to the result. {measured_on([*found.values()])}")
        rows = [[rest[name][0], f"{number(cell[rest[name][1]])} {rest[name][2]}"] for name, cell in found.items()]
        yield from table(["", ""], rows)


def fold_tables(cells: dict[str, Cell]) -> Iterator[str]:
    folds = [cell for name, cell in cells.items() if name.startswith("fold-")]
    if folds:
        yield from paragraph(
            "**One fold of MILK10k** by the recipe of `milk10k` at 384 pixels; the tower is EfficientNet-Lite0 of "
            "ImageNet, photos are compressed to 4.5 kB each, a quarter of the original. Scores of the last epoch by "
            f"argmax and by the official rule, without fitted thresholds. {measured_on(folds)}"
        )
        rows = [
            [
                MODELS.get(cell["model"], "tri-modal"), number(cell["lesions"]),
                str(cell["epochs"]) + ("" if cell.get("ended", True) else ", not all"),
                number(cell["seconds"]), number(cell["lesions_per_s"]), share(cell["data_wait"]),
                number(cell["macro_f1"], 3), number(cell["official"], 3),
            ]
            for cell in folds
        ]  # fmt: skip
        header = ["network", "lesions", "epochs", "seconds", "lesions/s", "data wait", "macro F1", "official"]
        yield from table(header, rows)
    fits = [cell for name, cell in cells.items() if name.startswith("xgboost-")]
    if fits:
        yield from paragraph(
            "**The stacker** (XGBoost, at most 100 rounds, early stopping) on the GPU and on "
            f"{fits[0]['threads']} threads. {measured_on(fits)}"
        )
        rows = [
            [number(cell["rows"]), number(cell["columns"]), number(cell["cpu_s"], 2), number(cell.get("cuda_s"), 2)]
            for cell in fits
        ]
        yield from table(["rows", "columns", "CPU, s", "GPU, s"], rows)


def ratios(parts: Sequence[dict[str, Cell]]) -> dict[str, Any]:
    """Return what the goals ask for: MFU at 96 lesions, and lesions/s of ours over the sketch's and timm's."""
    first, second = parts[0], parts[1]
    found: dict[str, Any] = {}
    for model in ("base", "large"):
        shares = [cell.get("mfu") for name, cell in first.items() if re.match(rf"{model}-96-.*graph", name)]
        found[f"mfu_{model}"] = max((value for value in shares if value), default=None)
    best = ours(second)
    for key, name in (("vs_sketch_bf16", "sketch-bf16"), ("vs_sketch_fp32", "sketch-fp32"), ("vs_timm", "timm-frozen")):
        rate = second.get(name, {}).get("lesions_per_s")
        found[key] = round(best / rate, 3) if best and rate else None
    timm, own = (second.get(name, {}).get("device_ms") for name in ("timm-frozen", "ours-compiled-graph"))
    found["vs_timm_busy"] = round(timm / own, 3) if timm and own else None
    errors = [abs(cell["estimate_error"]) for cell in memory_rows(second)]
    found["memory_worst_error"] = round(max(errors), 4) if errors else None
    return found


if __name__ == "__main__":
    run(GpuTables, main, __doc__)
