"""The keys of a config model: which exist, what they mean, and which had another name in an earlier release."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from aft_ray.config.section import ConfigError, Section

Path = tuple[str, ...]


def _section_of(field: FieldInfo) -> tuple[type[Section], bool] | None:
    """The section that a field holds, and whether it holds several by name; None for a field with a plain value."""
    for part in (field.annotation, *get_args(field.annotation)):
        if isinstance(part, type) and issubclass(part, Section):
            return part, get_origin(field.annotation) is dict
    return None


def value_keys(model: type[Section], location: Sequence[str] = (), prefix: Path = ()) -> list[Path]:
    """The paths of all keys that hold a value, in declaration order. Keys of sections themselves are not included.

    Args:
        model: The config.
        location: The path that a message is about. Of the sections that a user names, such as `tasks.NAME`, only the
            one on this path is included.
    """
    keys: list[Path] = []
    for name, field in model.model_fields.items():
        path = (*prefix, name)
        section = _section_of(field)
        if section is None:
            keys.append(path)
        elif not section[1]:
            keys += value_keys(section[0], location, path)
        elif tuple(location[: len(path)]) == path and len(location) > len(path):
            keys += value_keys(section[0], location, (*path, location[len(path)]))
    return keys


def describe_keys(model: type[Section], prefix: str = "") -> list[str]:
    """One line for each key: its name, default and meaning. Keys that a section inherits are described once."""
    lines = []
    inherited = model.__bases__[0].__annotations__
    for name, field in model.model_fields.items():
        if name in inherited and name not in model.__annotations__:
            continue
        if section := _section_of(field):
            full_name = f"{prefix}{name}.NAME" if section[1] else f"{prefix}{name}"
            lines.append(f"\n{full_name}: {(section[0].__doc__ or '').strip()}")
            lines += describe_keys(section[0], f"{full_name}.")
        else:
            default = "required" if field.is_required() else f"default {field.default}"
            lines.append(f"  {prefix}{name} ({default}): {field.description}")
    return lines


def rename_keys(model: type[Section], tree: dict[str, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """Replaces the names of earlier releases, which `Section.renamed_keys` lists.

    Returns:
        A copy of the tree with today's names, and the full old names that it contained with the new ones.

    Raises:
        ConfigError: A key is given by its old and its new name.
    """
    result: dict[str, Any] = {}
    renamed: dict[str, str] = {}
    for key, value in tree.items():
        name = model.renamed_keys.get(key, key)
        if name != key:
            if name in tree:
                raise given_twice(f"{prefix}{key}", f"{prefix}{name}")
            renamed[f"{prefix}{key}"] = f"{prefix}{name}"
        section = _section_of(model.model_fields[name]) if name in model.model_fields else None
        if section is None or not isinstance(value, dict):
            result[name] = value
        elif not section[1]:
            result[name], below = rename_keys(section[0], value, f"{prefix}{name}.")
            renamed |= below
        else:
            result[name] = {}
            for entry, keys in value.items():
                result[name][entry] = keys
                if isinstance(keys, dict):
                    result[name][entry], below = rename_keys(section[0], keys, f"{prefix}{name}.{entry}.")
                    renamed |= below
    return result, renamed


def current_name(model: type[Section], key: str) -> str:
    """Today's name of a full key such as `sampling.k`; the key itself when it was not renamed."""
    head, _, rest = key.partition(".")
    name = model.renamed_keys.get(head, head)
    section = _section_of(model.model_fields[name]) if name in model.model_fields else None
    if not rest or section is None:
        return f"{name}.{rest}" if rest else name
    if not section[1]:
        return f"{name}.{current_name(section[0], rest)}"
    entry, _, below = rest.partition(".")
    return f"{name}.{entry}.{current_name(section[0], below)}" if below else f"{name}.{entry}"


def given_twice(old: str, new: str) -> ConfigError:
    """The error of a key that is given by its old and its new name."""
    return ConfigError(f"{old} and {new} are both given; {old} is the former name of {new}, so remove it")
