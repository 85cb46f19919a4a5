"""Small tasks of every kind: one view or two, with and without concepts and fields."""

from __future__ import annotations

from dataclasses import replace

from triderm_dist.schema import VIEWS, ConceptColumns, Diagnosis, FineLabels, MetadataField, Task, TaskColumns, View

FIELDS = (MetadataField("age", "age", "number", high=100.0), MetadataField("limb", "limb", "category", ("no", "yes")))


def task_of(
    views: tuple[str, ...] = VIEWS,
    concepts: tuple[str, ...] = ("veil", "dots"),
    fields: bool = True,
    name: str = "small",
) -> Task:
    """Return a task with three diagnoses."""
    return Task(
        name=name,
        diagnoses=(Diagnosis("mole"), Diagnosis("melanoma"), Diagnosis("wart")),
        columns=TaskColumns(image="photo", lesion_id="lesion", view="kind" if len(views) > 1 else None, diagnosis="dx"),
        views=tuple(map(View, views)),
        concepts=ConceptColumns(names=concepts),
        fields=FIELDS if fields else (),
    )


TASKS: dict[str, Task] = {
    "everything": task_of(),
    "dermoscopic only": task_of(views=("dermoscopic",)),
    "clinical only": task_of(views=("clinical",)),
    "no concepts": task_of(concepts=()),
    "no fields": task_of(fields=False),
    "photos only": task_of(concepts=(), fields=False),
    "dermoscopic photos only": task_of(views=("dermoscopic",), concepts=(), fields=False),
}

FINE = replace(
    task_of(name="finer"),
    fine=FineLabels("subtype", {"mole": ("dermal", "junctional", "blue"), "melanoma": ("nodular",)}),
)
"""A task with finer labels; wart has none."""
