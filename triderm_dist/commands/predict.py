"""Predict a test set with every fold's model and test-time augmentation, and write submission.csv.

accelerate launch --config_file accelerate_configs/ddp.yaml -m triderm_dist.commands.predict --config RUN/config.yaml

With ids of lesions it draws instead where the tri-modal networks look in them, OUTPUT/explain/MODEL/ID.png and .json:

triderm predict --config RUN/config.yaml explain=[IL_0000652,IL_0003176]
"""

from pathlib import Path

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import Experiment


class PredictRun(Experiment):
    submit: bool = Field(
        True, description="write the submission; false only leaves what each fold says, for stack.extra=[features]"
    )


def main(config: PredictRun) -> None:
    from triderm_dist.data.readers.milk10k import read_labels
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.distributed.collectives import is_main
    from triderm_dist.engine.predict_test import predict_test
    from triderm_dist.ensemble.artifact import Ensemble
    from triderm_dist.ensemble.predict import score, submit
    from triderm_dist.ensemble.run_files import ENSEMBLE_FILE

    if config.explain:
        draw(config)
        return
    truth = read_labels(Path(config.data.test_truth)) if config.data.test_truth else None
    fitted = Ensemble.load(config.folder / ENSEMBLE_FILE) if config.submit else None
    members = [name for name in config.models if config.ensemble.members is None or name in config.ensemble.members]
    index = open_index(config.test_shards, config.data.remote, verify=config.data.verify and is_main())
    predict_test(config, index, members)
    if fitted is None or not is_main():
        return
    files = [config.fold_folder(name, fold) / "test.parquet" for name in members for fold in range(config.data.folds)]
    path = submit(config.folder, files)
    print(f"{path}: the {fitted.weighting} of {', '.join(fitted.members)} over {config.data.folds} folds")
    if truth is not None:
        result = score(path, truth, config.ensemble.bootstrap, config.seed)
        low, high = result["interval"]
        if result["absent"]:
            print(f"no lesion of the truth has {', '.join(result['absent'])}: scored without")
        print(
            f"held-out macro F1 by the official rule {result['macro_f1']:.3f} [{low:.3f}, {high:.3f}], "
            f"argmax {result['argmax']:.3f}, {result['n']} lesions"
        )


def draw(config: Experiment) -> None:
    from triderm_dist.engine.explain import explain
    from triderm_dist.files import write_json
    from triderm_dist.report.attention import draw_explanation

    for name, seen in explain(config, config.explain):
        picture = config.folder / "explain" / name / f"{seen.lesion_id}.png"
        draw_explanation(seen, picture)
        write_json(picture.with_suffix(".json"), seen.json())
        print(picture)


def start() -> None:
    run(PredictRun, main, __doc__)


if __name__ == "__main__":
    start()
