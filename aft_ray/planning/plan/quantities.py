"""The numbers of a plan: each has a unit and the formula that gave it, so that every line can be checked by hand.

Units are bytes, s, tokens, tokens/s, FLOP, GPU-hours, or none for a count. A GB is 10^9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True, slots=True)
class Quantity:
    """One line of a plan.

    Attributes:
        label: What the number is.
        value: The number.
        unit: Its unit; empty for a count.
        how: The formula with its numbers.
        total: Whether it is the sum of the lines above it.
    """

    label: str
    value: float
    unit: str
    how: str
    total: bool = False

    def text(self) -> str:
        """The number with its unit, rounded for reading."""
        return format_value(self.value, self.unit)


@dataclass(frozen=True, slots=True)
class QuantityTable:
    """Quantities under a common title."""

    title: str
    quantities: tuple[Quantity, ...]


def format_value(value: float, unit: str) -> str:
    """A number with its unit, rounded for reading."""
    if unit == "bytes":
        return gigabytes(value)
    if unit == "s":
        return duration(value)
    if unit == "FLOP":
        return f"{value:.3g} FLOP"
    number = f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:,.3g}"
    return f"{number} {unit}".rstrip()


def gigabytes(value: float) -> str:
    """Bytes as `138.0 GB`; small numbers as MB or bytes."""
    size = value / GB
    if size >= 0.1:
        return f"{size:,.1f} GB"
    return f"{value / 1e6:,.1f} MB" if value >= 1e7 else f"{value:,.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as ms, s, min or h."""
    if seconds < 0.1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def giga(value: float) -> str:
    """A count as `68.98e9`, for formulas."""
    return f"{value / 1e9:.4g}e9"


def counted(number: int, noun: str) -> str:
    """`1 sampler`, `2 samplers`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
