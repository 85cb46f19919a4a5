"""What was run, on what and when, and what was fitted on which lesions."""

from __future__ import annotations

from triderm_dist.ensemble.run_files import STACKER
from triderm_dist.report.content import Content
from triderm_dist.report.elements import Column, Row, Section, Table
from triderm_dist.report.extra_sets import extra_sets
from triderm_dist.report.provenance import duration, fitted_parts, seeds


def run(content: Content) -> Section:
    """Return the facts of a run, its stages, and what was fitted where."""
    made, data, name = content.provenance, content.provenance.data, content.task.name
    facts = [
        Row("task", (content.title if content.title == name else f"{content.title} ({name})",)),
        Row("training set", (data.get("fingerprint"),), note="SHA-256"),
    ]
    if made.test:
        facts.append(Row("test set", (made.test.get("fingerprint"),), note="SHA-256"))
    facts += [
        Row("date", (made.date,)),
        Row("triderm-dist", (made.version,), note="version and commit"),
        Row("hardware", (made.hardware,)),
        Row("duration", (None if made.seconds is None else duration(made.seconds),), note="all stages"),
    ]
    if content.experiment is not None:
        values = seeds(content.experiment, content.networks)
        facts.append(Row("seeds", (", ".join(f"{name} {seed}" for name, seed in values.items()),)))
    about = [Column("value", "value", long=True)]
    tables = [Table("run", "Facts of the run", about, facts, "fact")]
    if made.stages:
        columns = [
            Column("duration", "duration"),
            Column("started", "started (UTC)"),
            Column("hardware", "hardware", long=True),
            Column("version", "triderm-dist", long=True),
        ]
        stages = [
            Row(
                stage.program,
                (duration(stage.seconds), " to ".join(dict.fromkeys(stage.started)), stage.hardware, stage.version),
            )
            for stage in made.stages
        ]
        tables.append(Table("stages", "Stages, all starts of each together", columns, stages, "stage"))
    parts = fitted_parts(
        content.networks,
        int(content.fit["folds"]),
        STACKER in content.ensemble.members,
        content.task.decision != "argmax",
        content.test_cohort is not None,
        extra_sets(content.folder, content.networks),
    )
    columns = [Column("fitted_on", "fitted on", long=True), Column("used_for", "used for", long=True)]
    fitted = [Row(each.part, (each.fitted_on, each.used_for)) for each in parts]
    tables.append(Table("fitted", "What was fitted on which lesions", columns, fitted, "part"))
    return Section("The run", "run.html", tables=tables, values={"recorded": bool(made.stages)})
