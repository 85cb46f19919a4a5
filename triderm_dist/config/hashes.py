"""What of the settings is hashed to decide whether finished work is reused."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_jsonable_python

from triderm_dist.settings import Section

FIRST_KEYS = frozenset(
    f"{section}.{key}"
    for section, keys in {
        "data": "source test shards test_shards test_truth folds fold_seed short_side missing_view invalid verify "
        "workers prefetch",
        "data.remote": "cache cache_gb downloads total_seconds stall_seconds allow_commands",
        "models.NAME": "kind width heads depth fusion mlp_ratio dropout head use",
        "models.NAME.tower": "source pretrained image_size quick_gelu shared frozen freeze_clinical freeze_dermoscopic",
        "models.NAME.train": "epochs global_batch micro_batch precision activation_checkpointing compile log_every "
        "save_every keep_last ema_decay select trackers profile peak_tflops",
        "models.NAME.train.sampling": "kind threshold power window last",
        "models.NAME.train.augment": "min_scale dihedral rotation brightness contrast saturation tied_views "
        "clinical_dropout dermoscopic_dropout concept_dropout token_variants",
        "models.NAME.train.loss": "focal_weight soft_f1_weight aux_weight gamma alpha class_weight_power "
        "label_smoothing logit_adjustment soft_f1_sums",
        "models.NAME.train.optim": "lr layer_decay weight_decay min_lr warmup_epochs clip_norm",
        "stack": "enabled booster max_depth learning_rate max_rounds early_stopping subsample colsample_bytree "
        "min_child_weight reg_lambda class_weight_power device memory_gb extra components",
        "ensemble": "members rounds shrinkage bootstrap",
        "predict": "transforms batch",
    }.items()
    for key in keys.split()
)
"""The settings that the first finished runs were hashed with (commit 754ad2d). Never add to this."""

ADDED_KEYS: dict[str, Any] = {
    "data.extra": [],
    "data.groups": "plain",
    "data.task": None,
    "ensemble.use": "ensemble",
    "models.NAME.tower.cache_frozen_blocks": False,
    "models.NAME.tower.drop_path": None,
    "models.NAME.tower.frame": "square",
    "models.NAME.tower.lora.alpha": 16.0,
    "models.NAME.tower.lora.rank": None,
    "models.NAME.tower.lora.targets": ["attention", "mlp"],
    "models.NAME.tower.token_dtype": "float16",
    "models.NAME.train.augment.aspect": 0.0,
    "models.NAME.train.augment.clinical_strength": 1.0,
    "models.NAME.train.augment.cutmix": 0.0,
    "models.NAME.train.augment.extra": {},
    "models.NAME.train.augment.mixup": 0.0,
    "models.NAME.train.augment.unmixed_epochs": 3,
    "models.NAME.train.bucket_mb": 25.0,
    "models.NAME.train.deterministic": False,
    "models.NAME.train.gradient_precision": "fp32",
    "models.NAME.train.graph": "auto",
    "models.NAME.train.keep_checkpoints": False,
    "models.NAME.train.loss.fine_weight": 0.0,
    "models.NAME.train.loss.terms": {},
    "models.NAME.train.optim.head_lr_multiple": 1.0,
    "models.NAME.train.optim.name": "adamw",
    "models.NAME.train.optim.settings": {},
    "models.NAME.train.optim.schedule": "cosine",
    "models.NAME.train.optim.unfreeze_epochs": 0.0,
    "models.NAME.train.save_every_seconds": None,
    "models.NAME.train.swa_epochs": 0,
    "models.NAME.train.tracker_settings": {},
    "models.NAME.train.validate_every": 1,
    "models.NAME.extra_towers": [],
    "models.NAME.init": None,
    "models.NAME.seeds": 1,
    "models.NAME.settings": {},
    "oof.tta": 1,
    "stack.kind": "xgboost",
    "stack.max_rows": 20_000,  # as before for fits of fewer rows, which all were when it was added
    "stack.settings": {},
}
"""Every setting added since, with the value (as in JSON) that gives the behavior from before the setting existed. Keep
the value when a default changes, so that the new default gets another hash than work finished with the former one.
"""


def stable_dump(section: Section, path: str) -> dict[str, Any]:
    """Return the settings of a section as plain values, for the hashes that decide whether finished work is reused.

    Holds all of `FIRST_KEYS`, whatever their values, so that work finished with a default that has changed since does
    not match; and of the keys added later those that differ from `ADDED_KEYS` (from their default if they are not
    listed), so that adding a setting changes no hash. `path` is the section's dotted key, such as "models.NAME.train".
    """
    dump = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        key, value = f"{path}.{name}", getattr(section, name)
        if isinstance(value, Section):
            dump[name] = stable_dump(value, key)
            if not dump[name] and not any(first.startswith(f"{key}.") for first in FIRST_KEYS):
                del dump[name]
        elif key not in FIRST_KEYS and not field.is_required():
            default = to_jsonable_python(field.get_default(call_default_factory=True))
            if dump[name] == ADDED_KEYS.get(key, default):
                del dump[name]
    return dump
