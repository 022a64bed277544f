"""Suggests which key was meant by an unknown one.

Invariant: a suggestion is always a key that holds a value, never a section. A key that the name is an alias of comes
before one that is only spelt alike; among equals, a key of the section that was named comes first.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from aft_ray.config.aliases import KEY_ALIASES, SECTION_ALIASES

Path = tuple[str, ...]

# How similar two names must be: 1 is equal, as `difflib.SequenceMatcher.ratio` counts.
_SIMILAR = 0.75


def suggest(unknown: Sequence[str], known: Sequence[Path]) -> list[str]:
    """The full names of the keys that an unknown key may mean, in declaration order; empty when none fits.

    Args:
        unknown: The path of the unknown key.
        known: The paths of all keys that hold a value.
    """
    if same := [key for key in known if "_".join(key) == "_".join(unknown)]:
        return _names(same)
    *parents, name = unknown
    name = name.lower().replace("-", "_")
    without_counterpart = {alias for alias, keys in KEY_ALIASES.items() if not keys}
    if name in without_counterpart or (without_counterpart - SECTION_ALIASES.keys()).intersection(parents):
        return []
    section = _resolve_section(parents, known)
    if section:
        inside = [key for key in known if key[: len(section)] == section]
        found = _same_name(name, inside)
        if not found and name not in KEY_ALIASES:
            found = _similar_name(name, inside) or _with_words(name, inside)
    else:
        found = [] if parents else _similar_name(name, [key for key in known if len(key) == 1])
    return _names(found or _same_name(name, known) or _similar_name(name, known) or _with_words(name, known))


def _resolve_section(parents: Sequence[str], known: Sequence[Path]) -> Path:
    """The deepest known section that the parents of a key name, perhaps misspelt. Unknown parents are skipped."""
    section: Path = ()
    for parent in parents:
        depth = len(section)
        below = dict.fromkeys(key[depth] for key in known if key[:depth] == section and len(key) > depth + 1)
        aliases = [name for name in SECTION_ALIASES.get(parent, ()) if name in below]
        similar = difflib.get_close_matches(parent, below, n=1, cutoff=_SIMILAR)
        if parent in below:
            section = (*section, parent)
        elif nearest := aliases or similar:
            section = (*section, nearest[0])
    return section


def _same_name(name: str, keys: Iterable[Path]) -> list[Path]:
    """The keys of this name, and those that the name is an alias of; only those that are nested least."""
    aliases = KEY_ALIASES.get(name, ())
    return _least_nested([key for key in keys if key[-1] == name or any(_ends_with(key, alias) for alias in aliases)])


def _ends_with(key: Path, alias: str) -> bool:
    if alias.startswith("."):  # a key that is in no section
        return key == (alias[1:],)
    parts = tuple(alias.split("."))
    ending = key[-len(parts) :]
    return len(ending) == len(parts) and all(part in ("NAME", other) for part, other in zip(parts, ending, strict=True))


def _similar_name(name: str, keys: Sequence[Path]) -> list[Path]:
    """The keys whose names are spelt most like this one."""
    nearest = difflib.get_close_matches(name, dict.fromkeys(key[-1] for key in keys), n=1, cutoff=_SIMILAR)
    return _least_nested([key for key in keys if key[-1] in nearest])


def _with_words(name: str, keys: Iterable[Path]) -> list[Path]:
    """The keys whose paths contain all of the two or more words of this name."""
    words = set(name.split("_"))
    if len(words) < 2:
        return []
    return _least_nested([key for key in keys if words <= set("_".join(key).split("_"))])


def _least_nested(keys: list[Path]) -> list[Path]:
    depth = min(map(len, keys), default=0)
    return [key for key in keys if len(key) == depth]


def _names(keys: Iterable[Path]) -> list[str]:
    return [".".join(key) for key in keys]
