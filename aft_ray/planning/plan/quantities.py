"""A figure of a plan: a number, its unit, and how it came about, so that every line of a plan can be checked by hand.

Units: bytes, s, tokens, tokens/s, FLOP, GPU-hours, or a plain count. GB are 10^9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True, slots=True)
class Quantity:
    """how: the formula with its numbers. total: whether the lines above add up to it."""

    label: str
    value: float
    unit: str
    how: str
    total: bool = False

    def shown(self) -> str:
        return show(self.value, self.unit)


@dataclass(frozen=True, slots=True)
class QuantityTable:
    """Figures that belong together, under a title."""

    title: str
    figures: tuple[Quantity, ...]


def show(value: float, unit: str) -> str:
    """A number as a person reads it."""
    if unit == "bytes":
        return gigabytes(value)
    if unit == "s":
        return duration(value)
    if unit == "FLOP":
        return f"{value:.3g} FLOP"
    number = f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:,.3g}"
    return f"{number} {unit}".rstrip()


def gigabytes(value: float) -> str:
    size = value / GB
    if size >= 0.1:
        return f"{size:,.1f} GB"
    return f"{value / 1e6:,.1f} MB" if value >= 1e7 else f"{value:,.0f} bytes"


def duration(seconds: float) -> str:
    if seconds < 0.1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def giga(value: float) -> str:
    """A count in thousands of millions, for formulas."""
    return f"{value / 1e9:.4g}e9"


def counted(number: int, what: str) -> str:
    """`1 sampler`, `2 samplers`."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")
