"""What each modality is worth: the tri-modal network with all of them, and with each one left out, on held-out lesions.

python -m benchmarks.modalities [--config launch/experiments/demo.yaml] [key.subkey=value ...]

Needs the demo data (make demo). Every network is trained from the same seed on the same folds; the score is the
held-out macro F1 by the official rule, thresholds fitted out of fold. The last line is one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from triderm_dist.cli import run
from triderm_dist.config import Experiment, load, save

MODALITIES = ("clinical", "dermoscopic", "concepts", "metadata")


def main(config: Experiment) -> None:
    base = config if config.data.test_truth else load(Experiment, "launch/experiments/demo.yaml")
    name = next(iter(base.models))
    results = {}
    for left_out in (None, *MODALITIES):
        label = f"without {left_out}" if left_out else "all"
        output = base.folder.with_name("modalities") / label.replace(" ", "-")
        kept = tuple(modality for modality in MODALITIES if modality != left_out)
        experiment = base.model_copy(
            update={
                "output": str(output),
                "data": base.data.model_copy(
                    update={"shards": base.train_shards, "test_shards": base.test_shards, "test": None}
                ),
                "models": {name: base.models[name].model_copy(update={"use": kept})},
                "stack": base.stack.model_copy(update={"enabled": False}),
            }
        )
        settings = output / "benchmark.yaml"
        save(experiment, settings)
        subprocess.run([sys.executable, "-m", "launch.pipeline", "--config", str(settings)], check=True)
        results[label] = json.loads((Path(output) / "heldout.json").read_text(encoding="utf-8"))
    print(f"\n{'modalities':<22} {'macro F1':>9}  95% interval     argmax")
    for label, result in results.items():
        low, high = result["interval"]
        print(f"{label:<22} {result['macro_f1']:>9.3f}  [{low:.3f}, {high:.3f}]   {result['argmax']:.3f}")
    print(json.dumps({label: round(result["macro_f1"], 4) for label, result in results.items()}))


if __name__ == "__main__":
    run(Experiment, main, __doc__)
