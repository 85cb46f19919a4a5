"""A slice of the run with frozen encoders on a CPU: from photos to the report, against figures of earlier commits.

python -m benchmarks.cpu_run [source=MILK10k] [lesions=500]

Takes every k-th lesion in the order of ids, runs `triderm pipeline --config cpu` on them, the networks and settings of
commit 754ad2d's run without a GPU, and prints what each stage needed. cpu_run.json in benchmarks/results
holds the figures of earlier commits with the CPU that they were measured on; on another CPU model, or with other
settings, nothing is compared. The last line is one JSON object: how many times faster than commit 754ad2d, by wall time
and by CPU time of the stages, and the own figures. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.data.threads import available_cores
from triderm_dist.environment import cpu_model, read_environment
from triderm_dist.runtime.terminal import table
from triderm_dist.runtime.usage import usage_table, usages
from triderm_dist.schema import ConfigError
from triderm_dist.settings import PathText, Section

RECORDS = Path(__file__).with_name("results") / "cpu_run.json"
BEFORE = "754ad2d"


class CpuRun(Section):
    source: PathText = Field("../shared/milk10k", description="challenge folder with photos of at most 384 x 288")
    lesions: int = Field(500, ge=1, description="lesions of the slice")
    config: PathText = Field("cpu", description="experiment, the name of a shipped one or a YAML file")
    scratch: PathText | None = Field(None, description="folder for the run; null takes the system's temporary folder")


def main(config: CpuRun) -> None:
    with tempfile.TemporaryDirectory(dir=config.scratch) as folder:
        take_slice(Path(config.source), Path(folder) / "slice", config.lesions)
        words = [f"data.source={folder}/slice", f"output={folder}/run"]
        command = [sys.executable, "-m", "triderm_dist", "pipeline", "--config", config.config, *words]
        started = time.perf_counter()
        if status := subprocess.run(command).returncode:
            sys.exit(status)
        seconds = time.perf_counter() - started
        stages = read_environment(Path(folder) / "run")["stages"]
    cpu_seconds = sum(row["cpu_seconds"] for row in stages)  # processes of folds are no children of this one
    own = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
    own["peak_mb"] = round(max(row["peak_mb"] for row in stages))
    print(f"\n{config.lesions} lesions on {this_cpu()['model']}, {this_cpu()['cores']} cores")
    print(usage_table(usages(stages)))
    shares = {row["stage"]: row["cpu_seconds"] / cpu_seconds for row in stages}
    print("share of the CPU time: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    print(json.dumps(compared(config, own, json.loads(RECORDS.read_text(encoding="utf-8")))))


def compared(config: CpuRun, own: dict[str, float], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Print the figures of earlier commits where they can be compared, and return the JSON object."""
    work = {"config": CpuRun.model_fields["config"].default, "lesions": config.lesions}
    same = [record for record in records if record["cpu"] == this_cpu() and record["lesions"] == config.lesions]
    if config.config != work["config"] or not same:
        known = {f"{each['cpu']['model']}, family {each['cpu']['family']}, model {each['cpu']['number']}, "
                 f"{each['cpu']['cores']} cores, {each['lesions']} lesions" for each in records}  # fmt: skip
        print(f"not compared: the figures of {work['config']} are those of {'; '.join(sorted(known))}")
        return {f"vs_{BEFORE}": None, **own}
    rows = [[record["commit"], *(f"{record[key]:,}" for key in own)] for record in same]
    rows.append(["this", *(f"{value:,}" for value in own.values())])
    print(table(["commit", *own], rows))
    record = next(record for record in same if record["commit"] == BEFORE)
    ratios = {key: round(record[key] / own[key], 2) for key in ("seconds", "cpu_seconds")}
    return {f"vs_{BEFORE}": ratios["seconds"], f"cpu_vs_{BEFORE}": ratios["cpu_seconds"], **own}


def take_slice(source: Path, output: Path, count: int) -> None:
    """Write a challenge folder with `count` lesions, every k-th in the order of ids, and links to their photos."""
    tables = sorted(source.glob("*.csv"))
    truth = next((path for path in tables if path.name.endswith("_GroundTruth.csv")), None)
    photos = next(source.glob("*_Input"), None)
    if truth is None or photos is None:
        raise ConfigError(f"source: {source} is not a challenge folder with labels; name one")
    with truth.open(encoding="utf-8-sig", newline="") as file:
        ids = sorted({row["lesion_id"] for row in csv.DictReader(file)})
    if len(ids) < count:
        raise ConfigError(f"lesions: {source} has {len(ids)}, fewer than {count}")
    kept = {ids[number * len(ids) // count] for number in range(count)}
    (output / photos.name).mkdir(parents=True)
    for lesion in kept:
        (output / photos.name / lesion).symlink_to((photos / lesion).absolute())
    for path in tables:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file)
        if "lesion_id" not in header:
            continue
        at = header.index("lesion_id")
        with (output / path.name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *(row for row in rows if row[at] in kept)])


def this_cpu() -> dict[str, Any]:
    """Return what identifies the CPU: virtual machines show the same name for several models."""
    found = {"model": cpu_model(), "family": None, "number": None, "cores": available_cores()}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else ():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in ("cpu family", "model"):
            found["family" if key == "cpu family" else "number"] = int(value)
    return found


if __name__ == "__main__":
    run(CpuRun, main, __doc__)
