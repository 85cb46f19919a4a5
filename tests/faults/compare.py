"""Compare the files of two runs, bit for bit except for stated times and measured speeds."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

TIMES = {
    "seconds", "seconds_left", "lesions_per_s", "data_wait", "memory_gib", "started", "duration",
}  # fmt: skip
"""Keys of JSON files, and columns of tables, whose values are times, speeds or measured memory."""
NOT_COMPARED = (
    "log.txt",
    "environment.json",
    ".lock",
    "run/search/ray/*",
    "run/search/report.html",
    "run/search/report/*",
)
"""Files that record when and where programs ran, empty locks, and the state of Ray, whose names hold the time."""


def contents(folder: Path) -> dict[str, str]:
    """Return a hash of each file by its relative path; of a folder without files, an empty text."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(fnmatch(name, f"*{pattern}") for pattern in NOT_COMPARED):
            continue
        if path.is_file():
            found[name] = hashlib.sha256(stable(path)).hexdigest()
        elif not any(path.iterdir()):
            found[f"{name}/"] = ""
    return found


def stable(path: Path) -> bytes:
    """Return the content of a file without times. A file that cannot be parsed is compared as it is."""
    content = path.read_bytes()
    try:
        if path.name == "precision.json":  # its checksum covers measured seconds
            return json.dumps(json.loads(content)["precision"]).encode()
        if path.name == "stages.json":  # the report that the last stage writes states how long the others took
            stages = json.loads(content)
            return json.dumps({**stages, "report": stages["report"][:1]}).encode()
        if path.suffix == ".json":
            return json.dumps(without_times(json.loads(content))).encode()
        if path.suffix == ".jsonl":
            return "\n".join(json.dumps(without_times(json.loads(line))) for line in content.splitlines()).encode()
        if path.name == "README.md":
            return re.sub(rb"(?m)^\| \w+ \| \d{4}-\d\d-\d\d .*\n", b"", content)  # when its programs ran
        if path.name == "report.html":
            return re.sub(rb">(\d+ s|\d+ min|\d+ h \d+ min)<", b"><", content)
        if path.name == "run.csv":
            return re.sub(rb"(?m)^duration,.*\n", b"", content)
        if path.name in ("trials.csv", "stages.csv"):
            rows = csv.DictReader(io.StringIO(content.decode()))
            return json.dumps([without_times(row) for row in rows]).encode()
    except (ValueError, KeyError):
        pass
    return content


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in TIMES}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Return one line per file that is missing, left over or different."""
    lines = [f"missing {name}" for name in expected.keys() - found.keys()]
    lines += [f"left over {name}" for name in found.keys() - expected.keys()]
    lines += [f"different {name}" for name in expected.keys() & found.keys() if expected[name] != found[name]]
    return sorted(lines)
