"""The result of an acceptance check, and the line that is printed for it.

Invariant: a check passes only if every figure with a limit is a number within it, so a NaN fails.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Result = Literal["passed", "failed", "skipped"]


class Skipped(Exception):
    """The check cannot run on this machine. The message is a phrase that says why."""


class NotAccepted(Exception):
    """What was checked is wrong, and no figure tells it. The message is one sentence."""


@dataclass(frozen=True, slots=True)
class Figure:
    """Something that a check has measured.

    Attributes:
        name: what it is.
        value: a number, or words.
        unit: its unit; empty without one.
        limit: the largest number that is accepted; None when it is only reported.
    """

    name: str
    value: float | str
    unit: str = ""
    limit: float | None = None

    @property
    def accepted(self) -> bool:
        """Whether the value is within its limit. NaN never is."""
        return self.limit is None or (not isinstance(self.value, str) and abs(self.value) <= self.limit)

    def __str__(self) -> str:
        value = self.value if isinstance(self.value, str) else f"{self.value:,.4g}"
        unit = f" {self.unit}" if self.unit else ""
        limit = "" if self.limit is None else f" (at most {self.limit:g})"
        return f"{self.name} {value}{unit}{limit}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one check.

    Attributes:
        name: the check.
        figures: what was measured.
        reason: why it failed or was skipped; empty when it passed or when a figure says it.
        seconds: how long it took.
    """

    name: str
    result: Result
    figures: Sequence[Figure] = ()
    reason: str = ""
    seconds: float = 0.0

    def line(self, machine: Mapping[str, str]) -> str:
        """One line with everything that a ticket needs.

        Args:
            machine: the card and the versions, as `machine.describe_machine` returns them.
        """
        figures = [str(figure) + ("" if figure.accepted else " NOT ACCEPTED") for figure in self.figures]
        said = "; ".join(([self.reason] if self.reason else []) + figures)
        versions = ", ".join(f"{name} {version}" for name, version in machine.items() if name != "card")
        return f"{self.result}: {self.name} | {said} | {self.seconds:.0f} s | {machine['card']} | {versions}"

    def as_json(self) -> str:
        """One line of JSON from which `from_json` makes the outcome again."""
        return json.dumps(asdict(self))


def from_json(line: str) -> Outcome:
    """The outcome of a line that `Outcome.as_json` wrote."""
    record: dict[str, Any] = json.loads(line)
    return Outcome(**{**record, "figures": [Figure(**figure) for figure in record["figures"]]})


def judge(name: str, figures: Sequence[Figure], seconds: float) -> Outcome:
    """The outcome of a check that has measured these figures."""
    return Outcome(name, "passed" if all(one.accepted for one in figures) else "failed", figures, seconds=seconds)
