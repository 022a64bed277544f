"""Turns a validation error of a config into one sentence that names the key and says what to do."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from aft_ray.config.hints import suggest
from aft_ray.config.keys import value_keys
from aft_ray.config.section import Section
from aft_ray.config.tasks import rename_data_keys


def explain(error: ValidationError, model: type[Section]) -> str:
    """The first error of a validation as one sentence."""
    first = error.errors(include_url=False)[0]
    location = tuple(str(part) for part in first["loc"])
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        location = _first_value(location, first["input"])
        suggestions = suggest(location, value_keys(model, location))
        hint = (
            f"did you mean {_joined_by_or(suggestions)}?" if suggestions else f"{model.key_list} lists the known ones"
        )
        return f"unknown key {'.'.join(location)}; {hint}"
    if first["type"] == "missing":
        required = [path for path in value_keys(model, location) if path[: len(location)] == location]
        key = ".".join(required[0]) if required else key
        return f"{key} is missing; set it in the file or as {key}=VALUE on the command line"
    if first["type"] == "value_error":
        sentence = str(first["ctx"]["error"])
        return rename_data_keys(sentence, f"tasks.{location[1]}") if location[:1] == ("tasks",) else sentence
    if first["type"] == "model_type":
        below = [path for path in value_keys(model, (*location, "NAME")) if path[: len(location)] == location]
        return f"{key}={first['input']!r}: {key} is a section of keys, such as {'.'.join(below[0])}"
    problem = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}={first['input']!r}: {problem}"


def _first_value(location: tuple[str, ...], value: Any) -> tuple[str, ...]:
    """The path of the first value in an unknown key that is a section."""
    while isinstance(value, dict) and value:
        key, value = next(iter(value.items()))
        location = (*location, str(key))
    return location


def _joined_by_or(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
