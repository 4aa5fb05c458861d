"""`rbm report`: what was saved, shown again."""

from __future__ import annotations

from rbm.cli import LazyGroup

report = LazyGroup(
    "report",
    {
        "eval": ("rbm.evaluation.cli", "report_eval", "A model's report again, from saved results."),
        "spread": ("rbm.evaluation.cli", "report_spread", "Headline figures over several runs, as a table."),
        "rl": ("policies.report", "report_rl", "Tables and figures of policies that were trained."),
    },
    help="Write a report again from saved results.",
)
