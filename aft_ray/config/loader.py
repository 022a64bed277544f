"""Configs as people write and read them: YAML and `key.sub=value` in, one sentence for a mistake, keys and values out.

Invariant: nothing here knows what a section is about; a config that was written reads back equal.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from aft_ray.config.section import ConfigError, Section
from aft_ray.config.tasks import in_place

S = TypeVar("S", bound=Section)


def read_tree(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The nested dicts of a YAML file, if one is given, with `key.sub=value` overrides. Raises ConfigError."""
    tree = _read_yaml(path) if path is not None else {}
    for override in overrides:
        apply_override(tree, override)
    return tree


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values, not a {type(tree).__name__}")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one `key.sub=value` in a nested dict; the value is read as YAML."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not of the form key.sub=value")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:  # a section without keys is none in YAML
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"{override!r}: {parent} is a value, not a section")
    node[last] = _value(value)


def _value(text: str) -> Any:
    """A value from the command line, read as YAML where that gives a plain value; `####` or `{question}` is text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if value is None:
        return None if text.strip().lower() in {"", "~", "null"} else text
    if isinstance(value, str):
        # YAML 1.1 reads 2e-5 as a string; users mean the number.
        try:
            return float(value)
        except ValueError:
            return value if text[0] in "'\"" else text
    return value if isinstance(value, bool | int | float) else text


def parse_section(model: type[S], tree: dict[str, Any]) -> S:
    """A whole config from nested dicts. Raises ConfigError naming the first wrong key."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_sentence(error, model)) from None


def dump_config(config: Section) -> str:
    """The resolved config as YAML, in declaration order, which reads back to an equal config."""
    return yaml.safe_dump(config.tree(), sort_keys=False, allow_unicode=True)


def config_difference(old: Section, new: Section) -> list[str]:
    """Lines `key: old -> new` for every value in which two configs differ; of what only one has, the name alone."""
    return list(_differences(old.tree(), new.tree(), ""))


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str) -> Iterator[str]:
    for key in dict.fromkeys([*before, *after]):
        if key not in before or key not in after:
            yield f"{prefix}{key}: {'new' if key in after else 'gone'}"
        elif isinstance(before[key], dict) and isinstance(after[key], dict):
            yield from _differences(before[key], after[key], f"{prefix}{key}.")
        elif before[key] != after[key]:
            yield f"{prefix}{key}: {before[key]} -> {after[key]}"


def _section(field: FieldInfo) -> tuple[str, type[Section]] | None:
    """What a key is prolonged by, and the section it leads to; None for a plain value."""
    for part in (field.annotation, *get_args(field.annotation)):
        if isinstance(part, type) and issubclass(part, Section):
            return (".NAME." if get_origin(field.annotation) is dict else "."), part
    return None


def _known_keys(model: type[Section], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if section := _section(field):
            keys += _known_keys(section[1], f"{prefix}{name}{section[0]}")
    return keys


def _sentence(error: ValidationError, model: type[Section]) -> str:
    """The first error of a validation, as one sentence that names the key and the way out."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    entry = str(first["loc"][1]) if first["loc"][:1] == ("tasks",) and len(first["loc"]) > 1 else "NAME"
    known_keys = [known.replace("tasks.NAME", f"tasks.{entry}") for known in _known_keys(model)]
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, known_keys, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else "; `aft-ray keys` lists the known ones"
        return f"unknown key {key}{hint}"
    if first["type"] == "missing":
        key = next((known for known in known_keys if known.startswith(key + ".")), key)
        return f"{key} is missing; set it in the file or as {key}=VALUE on the command line"
    if first["type"] == "value_error":
        sentence = str(first["ctx"]["error"])
        return sentence if entry == "NAME" else in_place(sentence, f"tasks.{entry}")
    problem = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}={first['input']!r}: {problem}"


def describe_keys(model: type[Section], prefix: str = "") -> list[str]:
    """One line a key: name, default, meaning. Keys that a section shares with its parent class are not said again."""
    lines = []
    inherited = model.__bases__[0].__annotations__
    for name, field in model.model_fields.items():
        if name in inherited and name not in model.__annotations__:
            continue
        if section := _section(field):
            lines.append(f"\n{prefix}{name}{section[0].rstrip('.')}: {(section[1].__doc__ or '').strip()}")
            lines += describe_keys(section[1], f"{prefix}{name}{section[0]}")
        else:
            default = "required" if field.is_required() else f"default {field.default}"
            lines.append(f"  {prefix}{name} ({default}): {field.description}")
    return lines
