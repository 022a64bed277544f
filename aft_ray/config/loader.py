"""Reads a config from YAML and `key.sub=value` overrides, and writes it as YAML.

Invariants: every mistake of the user is a ConfigError of one sentence; a config that was written reads back equal.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from aft_ray.config.errors import explain
from aft_ray.config.keys import current_name, given_twice, rename_keys
from aft_ray.config.section import ConfigError, Section

S = TypeVar("S", bound=Section)

# Without a logging configuration, Python prints a warning as a plain line on standard error.
_logger = logging.getLogger(__name__)
_reported: set[str] = set()


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The nested dicts of a YAML file. Raises ConfigError."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str | bytes, source: str) -> dict[str, Any]:
    """The nested dicts of a YAML text. Raises ConfigError, which names the source of the text."""
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} must be a mapping of keys to values, not a {type(tree).__name__}")
    return tree


def parse_section(model: type[S], tree: dict[str, Any], overrides: Sequence[str] = ()) -> S:
    """A whole config from nested dicts and `key.sub=value` overrides.

    Keys may have the names of earlier releases; each old name is reported once as a warning of the logger.

    Raises:
        ConfigError: The message names the first wrong key.
    """
    tree, renamed = rename_keys(model, tree)
    given: dict[str, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        name = current_name(model, key)
        if given.setdefault(name, key) != key:
            raise given_twice(key if name != key else given[name], name)
        if name != key:
            renamed[key] = name
        apply_override(tree, f"{name}{equals}{value}")
    try:
        config = model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, model)) from None
    for old, new in renamed.items():
        if old not in _reported:
            _reported.add(old)
            _logger.warning("%s is now called %s; the old name is still understood in this release", old, new)
    return config


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one `key.sub=value` in nested dicts; the value is read as YAML. Raises ConfigError."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not of the form key.sub=value")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:  # YAML reads a section without keys as None
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"{override!r}: {parent} is a value, not a section")
    node[last] = _parse_value(value)


def _parse_value(text: str) -> Any:
    """The plain value that YAML reads, else the text itself: `####` and `{question}` are texts."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if value is None:
        return None if text.strip().lower() in {"", "~", "null"} else text
    if isinstance(value, str):
        # YAML 1.1 reads 2e-5 as a string, but users mean the number.
        try:
            return float(value)
        except ValueError:
            return value if text[0] in "'\"" else text
    return value if isinstance(value, bool | int | float) else text


def dump_config(config: Section) -> str:
    """The resolved config as YAML, in declaration order. It reads back to an equal config."""
    return yaml.safe_dump(config.tree(), sort_keys=False, allow_unicode=True)


def config_difference(old: Section, new: Section) -> list[str]:
    """One line `key: old -> new` for each value that differs; `key: new` or `key: gone` for a key that only one has."""
    return list(_differences(old.tree(), new.tree(), ""))


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str) -> Iterator[str]:
    for key in dict.fromkeys([*before, *after]):
        if key not in before or key not in after:
            yield f"{prefix}{key}: {'new' if key in after else 'gone'}"
        elif isinstance(before[key], dict) and isinstance(after[key], dict):
            yield from _differences(before[key], after[key], f"{prefix}{key}.")
        elif before[key] != after[key]:
            yield f"{prefix}{key}: {before[key]} -> {after[key]}"
