"""The state of a run, read from its run directory: a table of its rounds, and sentences on how far it is.

`aft-ray train` prints the table at the end; `aft-ray status` prints both at any time. Invariant: everything is read
from the run directory, so any machine that can read it can show the state of the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rich.table import Table

from aft_ray.config.run import RunConfig
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import METRICS, RunDir


def read_events(run_dir: RunDir) -> list[dict[str, Any]]:
    """All events of `metrics.jsonl` so far. A line that is not yet written completely is left out."""
    events = []
    for line in run_dir.read_lines(METRICS):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def rounds_table(events: Iterable[dict[str, Any]]) -> Table:
    """One row per round: time of sampling and training, time spent waiting, and quality.

    `k` is the mean number of candidates of a question, and `skipped` are the questions that the round left out. If a
    round was repeated after a failure, its last event counts.
    """
    sampled: dict[int, dict[str, Any]] = {}
    trained: dict[int, dict[str, Any]] = {}
    validated: dict[int, dict[str, Any]] = {}
    by_name = {"sampled": sampled, "trained": trained, "evaluated": validated}
    for event in events:
        if (rows := by_name.get(event["event"])) is not None:
            rows[event["version" if event["event"] == "evaluated" else "round"]] = event
    table = Table(title="rounds")
    for column in (
        "round", "policy", "groups", "skipped", "k", "signal", "pass rate", "score right", "score wrong", "loss",
        "sampling", "tokens", "tokens/s", "waited", "training", "tokens/s", "waited", "publish", "validation",
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for number in sorted(sampled.keys() | trained.keys()):
        sampling, training = sampled.get(number, {}), trained.get(number, {})
        validation = validated.get(number, {})
        table.add_row(
            str(number),
            _cell(sampling.get("version"), "d"),
            _cell(sampling.get("groups", training.get("groups")), "d"),
            _cell(sampling.get("skipped"), "d"),
            _cell(sampling.get("candidates"), ".1f"),
            _cell(sampling.get("signal"), ".0%"),
            _cell(sampling.get("pass_rate"), ".1%"),
            _cell(sampling.get("right_score"), ".3f"),
            _cell(sampling.get("wrong_score"), ".3f"),
            _cell(training.get("loss"), ".4f"),
            _cell(sampling.get("seconds"), ".0f", " s"),
            _cell(sampling.get("tokens"), ",d"),
            _cell(sampling.get("tokens_per_s"), ",.0f"),
            _cell(sampling.get("waited_s"), ".0f", " s"),
            _cell(training.get("train_s"), ".0f", " s"),
            _cell(training.get("tokens_per_s"), ",.0f"),
            _cell(training.get("waited_s"), ".0f", " s"),
            _cell(training.get("publish_s"), ".1f", " s"),
            _cell(validation.get("greedy"), ".1%"),
        )
    return table


def _cell(value: Any, format_spec: str, unit: str = "") -> str:
    return "" if value is None else format(value, format_spec) + unit


def state_lines(config: RunConfig, run_dir: RunDir) -> list[str]:
    """Sentences that say whether a run is finished, running, or stopped and how to continue it."""
    ledger = Ledger(run_dir)
    trained = ledger.trained_rounds()
    last = config.rounds.count
    if trained and trained[-1] >= last:
        return [f"finished: {last} rounds; the model is in {run_dir.uri(run_dir.model(last))}"]
    current = trained[-1] + 1 if trained else (0 if config.vft.epochs else 1)
    lines = [f"trained: {', '.join(map(str, trained)) or 'no round yet'} of rounds up to {last}"]
    if (state := ledger.last_checkpoint()) and not state.complete:
        lines.append(
            f"round {state.round}: the training state after step {state.step} of {state.metrics['steps']} is saved"
        )
    for number in range(current, last + 1):
        groups, failed = ledger.count_groups(number), ledger.failed_questions(number)
        skipped = ledger.skipped(number) or ()
        if groups or failed or skipped:
            complete = " (complete)" if ledger.sampled(number) else ""
            lines.append(
                f"round {number}: {groups} groups sampled{complete}, {len(failed)} failed questions"
                + (f", {len(skipped)} skipped" if skipped else "")
            )
    if (busy := run_dir.in_use_by()) is None:
        lines.append("no driver is running; run the same command again to continue")
    else:
        lines.append(f"working: {run_dir.uri()} is in use by {busy}")
    return lines
