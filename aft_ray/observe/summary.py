"""A run's rounds as a table, read from its events: at the end of `train`, and any time by `status`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from aft_ray.config.run import RunConfig
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import METRICS, RunDir


def read_events(run_dir: RunDir) -> list[dict[str, Any]]:
    """The events of a run so far; a last line still being written is left out."""
    import json

    events = []
    for line in run_dir.read_lines(METRICS):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def rounds_table(events: Iterable[dict[str, Any]]) -> Table:
    """One row a round: who worked how long, who waited, and what was learnt. The last event of a round counts."""
    sampled: dict[int, dict[str, Any]] = {}
    trained: dict[int, dict[str, Any]] = {}
    validated: dict[int, dict[str, Any]] = {}
    by_name = {"sampled": sampled, "trained": trained, "evaluated": validated}
    for event in events:
        if (rows := by_name.get(event["event"])) is not None:
            rows[event["version" if event["event"] == "evaluated" else "round"]] = event
    table = Table(title="rounds")
    for column in (
        "round", "policy", "groups", "signal", "pass rate", "score right", "score wrong", "loss",
        "sampling", "tokens/s", "waited", "training", "tokens/s", "waited", "publish", "validation",
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for number in sorted(sampled.keys() | trained.keys()):
        s, t, v = sampled.get(number, {}), trained.get(number, {}), validated.get(number, {})
        table.add_row(
            str(number),
            _show(s.get("version"), "d"),
            _show(s.get("groups", t.get("groups")), "d"),
            _show(s.get("signal"), ".0%"),
            _show(s.get("pass_rate"), ".1%"),
            _show(s.get("right_score"), ".3f"),
            _show(s.get("wrong_score"), ".3f"),
            _show(t.get("loss"), ".4f"),
            _show(s.get("seconds"), ".0f", " s"),
            _show(s.get("tokens_per_s"), ",.0f"),
            _show(s.get("waited_s"), ".0f", " s"),
            _show(t.get("train_s"), ".0f", " s"),
            _show(t.get("tokens_per_s"), ",.0f"),
            _show(t.get("waited_s"), ".0f", " s"),
            _show(t.get("publish_s"), ".1f", " s"),
            _show(v.get("greedy"), ".1%"),
        )
    return table


def _show(value: Any, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit


def state_lines(config: RunConfig, run_dir: RunDir) -> list[str]:
    """Where a run stands, in sentences: finished, working, or stopped and how to go on."""
    ledger = Ledger(run_dir)
    trained = ledger.trained_rounds()
    last = config.rounds.count
    if trained and trained[-1] >= last:
        return [f"finished: {last} rounds; the model is in {run_dir.uri(run_dir.model(last))}"]
    current = trained[-1] + 1 if trained else (0 if config.vft.epochs else 1)
    lines = [f"trained: {', '.join(map(str, trained)) or 'no round yet'} of rounds up to {last}"]
    for number in range(current, last + 1):
        files, parked = ledger.group_files(number), ledger.parked(number)
        if files or parked:
            groups = sum(len(file.question_ids) for file in files)
            closed = " (complete)" if ledger.sampled(number) else ""
            lines.append(f"round {number}: {groups} groups sampled{closed}, {len(parked)} parked")
    if (busy := run_dir.in_use_by()) is None:
        lines.append("no driver works on it; start the same command again to go on")
    else:
        lines.append(f"working: {run_dir.uri()} is in use by {busy}")
    return lines
