"""Held-out macro F1 of the tri-modal network with all modalities, and without each.

python -m benchmarks.modalities --config demo [key.subkey=value ...]

Needs data.test_truth; demo.yaml's comes with make demo. The networks go into the folder `modalities` next to `output`.
Every network is trained from the same seed on the same folds; the score is the held-out macro F1 by the official rule,
thresholds fitted out of fold. The last line is one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys

from triderm_dist.cli import run
from triderm_dist.config import Experiment, save
from triderm_dist.ensemble.run_files import HELD_OUT_FILE
from triderm_dist.schema import ConfigError

MODALITIES = ("clinical", "dermoscopic", "concepts", "metadata")


def main(config: Experiment) -> None:
    if not config.data.test_truth:
        raise ConfigError("data.test_truth: needed to score; run make demo, then use --config demo")
    name = next(iter(config.models))
    results = {}
    for left_out in (None, *MODALITIES):
        label = f"without {left_out}" if left_out else "all"
        output = config.folder.with_name("modalities") / label.replace(" ", "-")
        kept = tuple(modality for modality in MODALITIES if modality != left_out)
        experiment = config.model_copy(
            update={
                "output": str(output),
                "data": config.data.model_copy(
                    update={"shards": config.train_shards, "test_shards": config.test_shards, "test": None}
                ),
                "models": {name: config.models[name].model_copy(update={"use": kept})},
                "stack": config.stack.model_copy(update={"enabled": False}),
            }
        )
        settings = output / "benchmark.yaml"
        save(experiment, settings)
        status = subprocess.run(
            [sys.executable, "-m", "triderm_dist.commands.pipeline", "--config", str(settings)]
        ).returncode
        if status:
            sys.exit(status)
        results[label] = json.loads((output / HELD_OUT_FILE).read_text(encoding="utf-8"))
    print(f"\n{'modalities':<22} {'macro F1':>9}  95% interval     argmax")
    for label, result in results.items():
        low, high = result["interval"]
        print(f"{label:<22} {result['macro_f1']:>9.3f}  [{low:.3f}, {high:.3f}]   {result['argmax']:.3f}")
    print(json.dumps({label: round(result["macro_f1"], 4) for label, result in results.items()}))


if __name__ == "__main__":
    run(Experiment, main, __doc__)
