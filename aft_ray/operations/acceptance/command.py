"""Runs the acceptance suite and says a line for each check, for the module's command line and for `aft-ray doctor`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aft_ray.config.run import ConfigError
from aft_ray.operations.acceptance.machine import describe_machine
from aft_ray.operations.acceptance.suite import Setting, chosen, run_checks


def accept(names: Sequence[str], setting: Setting, say: Callable[[str], None]) -> bool:
    """Runs the checks of these names and parts, and says a line for each as soon as it ends.

    Returns:
        Whether no check failed. A skipped check has not failed.

    Raises:
        ConfigError: a name is unknown.
    """
    try:
        checks = chosen(names)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    machine = describe_machine()
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for outcome in run_checks(checks, setting):
        counts[outcome.result] += 1
        say(outcome.line(machine))
    say(", ".join(f"{count} {result}" for result, count in counts.items()))
    return not counts["failed"]
