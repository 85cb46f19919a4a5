"""One fold of one model: its lesions, the hashes that identify its training, and its network.

Does not import the trainer, so that programs that only read networks start faster.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist.config import COSMETIC, EXECUTION, DataConfig, Experiment, ModelConfig, Networks, stable_dump
from triderm_dist.data.photo_set import PhotoSet
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.open import is_packed, set_fingerprint
from triderm_dist.data.synthetic import is_synthetic
from triderm_dist.engine.evaluate import Evaluation
from triderm_dist.engine.fold_folder import is_finished
from triderm_dist.engine.model_inputs import ModelInputs
from triderm_dist.engine.network_files import load_weights, read_info
from triderm_dist.engine.trained_network import TrainedNetwork
from triderm_dist.engine.warm_start import extra_identity, init_identity
from triderm_dist.environment import read_environment
from triderm_dist.models import build_network, build_towers, check_network
from triderm_dist.models.network import Network
from triderm_dist.predictions import Predictions, predicted_by, read_transforms
from triderm_dist.schema import UNLABELED, ConfigError, DataError, Signature, Task


def assigned_folds(index: ShardIndex, data: DataConfig) -> np.ndarray:
    """Return the fold of each lesion, (N,), -1 for lesions without a label."""
    return index.folds(data.folds, data.fold_seed)


def new_network(model: ModelConfig, model_inputs: ModelInputs, pretrained: bool = True) -> Network:
    """Build a network that takes what the loaders return: tokens, photos, or the output of frozen blocks.

    pretrained: load the pretrained weights of towers in the network; False needs no file, if all weights are loaded
    afterwards.
    """
    signature = model_inputs.loaders.index.signature
    if model_inputs.token_shape is not None:
        return build_network(model, signature, model_inputs.token_shape)
    tower = None if pretrained else model_inputs.tower.build()
    network = build_network(model, signature, build_towers(model.tower, signature.views, tower))
    if model_inputs.frozen_blocks:
        network.load_frozen(model_inputs.frozen_blocks)
        network.skip_frozen()
    return network


def load_network(model: ModelConfig, model_inputs: ModelInputs, folder: Path) -> Network:
    """Build the network that was trained in a folder, with its selected weights, for these inputs."""
    network = new_network(model, model_inputs, pretrained=False)
    load_weights(folder / "weights", network)
    return network


def add_trained_parts(network: Network, model: ModelConfig, task: Task) -> Network:
    """Add the parts that a network has in training only (see `finished_weights`): the head of finer labels, LoRA.

    Raises ConfigError if finer labels are to be learned and the task has none, and as `add_lora`.
    """
    if model.tower.lora:
        network.add_lora(model.tower.lora)
    if model.train.loss.fine_weight:
        if task.fine is None:
            raise ConfigError(
                f"train.loss.fine_weight: task {task.name!r} has no finer labels; set it to 0, or add `fine` to the "
                "task and pack again"
            )
        network.add_fine_head(len(task.fine.names))
    return network


def hidden_inputs(model: ModelConfig, signature: Signature) -> tuple[str, ...]:
    """Return the inputs that are treated as missing in turn in a fold's further predictions: all that the network uses,
    if several.
    """
    used = tuple(name for name in signature.inputs if name in model.use)
    return used if len(used) > 1 else ()


def as_predictions(
    evaluation: Evaluation,
    index: ShardIndex | PhotoSet,
    name: str,
    head: str,
    fold: int,
    model_hash: str,
    refit_of: Sequence[str] = (),
) -> Predictions:
    """Build the table of one model's predictions for `evaluation.rows`. refit_of: see `Predictions`."""
    rows = evaluation.rows
    return Predictions(
        lesion_ids=index.lesion_ids[rows],
        groups=index.groups[rows],
        labels=index.labels[rows],
        fold=fold,  # type: ignore[arg-type]
        model=name,  # type: ignore[arg-type]
        model_hash=model_hash,  # type: ignore[arg-type]
        head=head,  # type: ignore[arg-type]
        logits=evaluation.logits,
        aux_clinical=evaluation.aux_clinical,
        aux_dermoscopic=evaluation.aux_dermoscopic,
        features=evaluation.features,
        concepts=index.concept_scores[rows],
        metadata=index.metadata[rows],
        task=index.task,
        concept_names=index.concepts,
        refit_of=tuple(refit_of),
    )


def model_config(experiment: Experiment, name: str) -> ModelConfig:
    """Return a model's settings. Raises ConfigError for a name that is not under `models`, or an unknown network."""
    if name not in experiment.models:
        raise ConfigError(f"model={name}: the settings have the models {', '.join(experiment.models)}")
    check_network(experiment.models[name])
    return experiment.models[name]


def data_facts(experiment: Experiment, index: ShardIndex) -> dict[str, Any]:
    """Return the description of the training set in environment.json."""
    earlier = read_environment(experiment.folder)["data"].get("train", {})
    known = earlier.get("fingerprint") == index.fingerprint and bool(earlier.get("synthetic"))  # photos may be gone
    facts = {
        "task": index.task.name,
        "fingerprint": index.fingerprint,
        "lesions": len(index),
        "labeled": int((index.labels != UNLABELED).sum()),
        "synthetic": known or (experiment.data.source is not None and is_synthetic(experiment.data.source)),
        "flow": index.flow(),
    }
    if extra := experiment.data.extra_sets:
        facts["extra"] = {key: set_fingerprint(each.shards, experiment.data.remote) for key, each in extra.items()}
    return facts


def is_fold_finished(experiment: Experiment, index: ShardIndex, name: str, fold: int) -> bool:
    """Return whether this fold was trained and predicted with these settings and data."""
    folder = experiment.fold_folder(name, fold)
    if not is_finished(folder, result_hashes(experiment, index, name, fold)):
        return False
    held_out, weights = folder / "predictions.parquet", read_info(folder / "fold")["weights"]
    # Those with hidden inputs are replaced before it: a process killed in between leaves them of other transforms.
    files = (held_out, *folder.glob("without_*.parquet"))
    return {read_transforms(file) for file in files} == {experiment.oof.tta} and predicted_by(held_out) <= {weights}


def check_run_task(experiment: Experiment, index: ShardIndex) -> None:
    """Raise DataError if the run has a finished fold of another task than that of `index`."""
    for name in experiment.models:
        for fold in range(experiment.data.folds):
            folder = experiment.fold_folder(name, fold)
            if (folder / "fold.json").exists():
                trained = TrainedNetwork.read(folder)
                if not trained.task.matches(index.task):
                    raise DataError(f"{_other_task(trained, index)}; set another output")


def network_folders(experiment: Experiment, name: str, networks: Networks = "folds") -> list[Path]:
    """Return the folders of the networks with which a model predicts new lesions: one per fold, or that of the refit.

    Raises DataError if one of them is not trained.
    """
    folders = [experiment.fold_folder(name, fold) for fold in range(experiment.data.folds)]
    program = "crossval"
    if networks == "refit":
        folders, program = [experiment.refit_folder(name)], "refit"
    for folder in folders:
        if not (folder / "fold.json").exists():
            raise DataError(f"{folder}: not trained; run triderm {program} first")
    return folders


def trained_fold(folder: Path, index: ShardIndex) -> tuple[TrainedNetwork, ShardIndex]:
    """Return the network of the fold trained in a folder, and `index` with its concepts in the network's order.

    Raises DataError if no fold is trained there, or if `index` is of another task or has other concepts.
    """
    if not (folder / "fold.json").exists():
        raise DataError(f"{folder}: this fold is not trained; run triderm crossval first")
    trained = TrainedNetwork.read(folder)
    if not trained.task.matches(index.task):
        raise DataError(f"{_other_task(trained, index)}; pack both sets with the same task.yaml")
    concepts = trained.info["concepts"]
    if sorted(concepts) != sorted(index.concepts):
        raise DataError(
            f"{index.folder}: its concepts are not those of the training set ({_difference(concepts, index)}); "
            "pack the test set from matching metadata"
        )
    return trained, index.with_concepts(concepts)


def _difference(concepts: Sequence[str], index: ShardIndex) -> str:
    """Describe which concepts a set lacks or adds."""
    lacks = [name for name in concepts if name not in index.concepts]
    adds = [name for name in index.concepts if name not in concepts]
    return "; ".join(f"{what} {', '.join(names)}" for what, names in (("without", lacks), ("also", adds)) if names)


def _other_task(trained: TrainedNetwork, index: ShardIndex) -> str:
    task = trained.task
    return (
        f"{trained.folder}: trained for task {task.name!r}, and {index.folder} is packed for "
        f"{task.named_other(index.task)}"
    )


def result_hashes(experiment: Experiment, index: ShardIndex, name: str, fold: int | str) -> tuple[str, ...]:
    """Return the hashes by which a finished fold of these settings is known: the one to record, and that of earlier
    versions, which included settings without effect. fold: see `result_hash`.
    """
    return _of_equal_settings(result_hash, experiment, index, name, fold)


def resume_hashes(experiment: Experiment, index: ShardIndex, name: str, fold: int | str) -> tuple[str, ...]:
    """Return the hashes by which a checkpoint of these settings is known, see `result_hashes`."""
    return _of_equal_settings(resume_hash, experiment, index, name, fold)


def _of_equal_settings(
    formula: Callable[..., str], experiment: Experiment, index: ShardIndex, name: str, fold: int | str
) -> tuple[str, ...]:
    equal = (experiment.without_idle_settings(name), experiment)
    return tuple(dict.fromkeys(formula(each, index, name, fold) for each in equal))


def result_hash(
    experiment: Experiment, index: ShardIndex, name: str, fold: int | str, *, exclude: Iterable[str] = ()
) -> str:
    """Hash everything that the fold's result depends on, and the settings of `Experiment.without_idle_settings`.

    fold: its number; a text for trainings without a held-out fold, which names what else the result depends on.
    exclude: dotted keys of `train`.
    """
    model = stable_dump(experiment.models[name], "models.NAME")
    for key in ("init", "extra_towers"):  # the hash is over the weights, not over their paths
        model.pop(key, None)
    model.pop("seeds", None)
    for key in (*COSMETIC, *exclude):
        section, _, key = key.rpartition(".")
        (model["train"][section] if section else model["train"]).pop(key, None)
    seed = experiment.seed_of(name)
    content = [model, seed, experiment.data.folds, experiment.data.fold_seed, fold, index.fingerprint]
    if experiment.token_seed is not None or seed != experiment.seed:
        content.append(experiment.seed_of_tokens)
    folder = experiment.fold_folder(name, fold) if isinstance(fold, int) else experiment.refit_folder(name)
    if networks := init_identity(experiment, name, folder):
        content.append(["init", networks])
    if towers := extra_identity(experiment, name, folder):
        content.append(["extra_towers", towers])
    if extra := experiment.data.extra_sets.values():
        sets = [set_fingerprint(each.shards, experiment.data.remote) for each in extra]
        content.append([[one, each.map, each.weight, each.overlap] for one, each in zip(sets, extra, strict=True)])
        if any(each.overlap == "drop" for each in extra) and is_packed(experiment.test_shards):
            content.append(set_fingerprint(experiment.test_shards, experiment.data.remote))
    if _has_prior_as_drawn(experiment, index, name):
        content.append("prior as drawn")  # earlier versions took that of the training lesions
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _has_prior_as_drawn(experiment: Experiment, index: ShardIndex, name: str) -> bool:
    """Return whether a training adjusts logits by shares other than those of its lesions (see `CompoundLoss`)."""
    train = experiment.models[name].train
    is_balanced = train.sampling.kind == "balanced" and train.sampling.power > 0
    sets = experiment.data.extra_sets.values()
    differ = any(each.weight != 1 or not {*index.diagnoses} <= {*each.map.values()} for each in sets)
    return train.loss.logit_adjustment > 0 and (is_balanced or differ)


def resume_hash(experiment: Experiment, index: ShardIndex, name: str, fold: int | str) -> str:
    """Hash everything that a training must share with a checkpoint to resume from it.

    Excludes execution settings, so that a training may resume on other hardware, and the learning rate, so that a
    training that diverged may resume with a lower one.
    """
    return result_hash(experiment, index, name, fold, exclude=(*EXECUTION, "optim.lr", "optim.min_lr"))
