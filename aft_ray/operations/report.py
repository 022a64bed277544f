"""The output of `aft-ray doctor`: a table of nodes and checks, and the cure of every warning and failure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table

from aft_ray.operations.findings import ClusterFacts, Finding

_SEVERITY = {"ok": 0, "warn": 1, "fail": 2}
_STYLE = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def healthy(findings: Sequence[Finding]) -> bool:
    """Whether no check failed. Warnings do not count."""
    return all(finding.level != "fail" for finding in findings)


def table(findings: Sequence[Finding]) -> Table:
    """A table with a row per node and a column per check, which shows the worst finding."""
    checks = list(dict.fromkeys(finding.check for finding in findings))
    nodes = list(dict.fromkeys(finding.node for finding in findings))
    result = Table()
    for column in ("node", *checks):
        result.add_column(column, no_wrap=True)
    for node in nodes:
        cells = []
        for check in checks:
            levels = [finding.level for finding in findings if (finding.check, finding.node) == (check, node)]
            worst = max(levels, key=_SEVERITY.__getitem__, default=None)
            cells.append(f"[{_STYLE[worst]}]{worst}[/]" if worst else "")
        result.add_row(node, *cells)
    return result


def lines(findings: Sequence[Finding]) -> list[str]:
    """A line for every failure, then for every warning, with its cure."""
    faults = sorted((f for f in findings if f.level != "ok"), key=lambda finding: -_SEVERITY[finding.level])
    return [f"{f.level}: {f.check}, {f.node}: {f.message}. {f.cure}" for f in faults]


def as_json(facts: ClusterFacts, findings: Sequence[Finding]) -> str:
    """Findings and the facts behind them as JSON, for other programs."""
    seen = asdict(facts)
    seen["blocked"] = [{"from": at, "to": to, "why": why} for (at, to), why in facts.blocked.items()]
    seen["pings"] = [{**asdict(ping), "bus_bandwidth": ping.bus_bandwidth} for ping in facts.pings]
    record = {"healthy": healthy(findings), "findings": [asdict(finding) for finding in findings], "facts": seen}
    return json.dumps(record, indent=1, ensure_ascii=False)
