"""The names of the engine arguments that the installed vLLM takes, read from its source without importing it.

Importing vLLM takes ten seconds and sets up a platform, which the driver of a run has no use for.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from aft_ray.config.engine_arguments import refuse_unknown


def check_engine_arguments(given: Mapping[str, object], section: str) -> None:
    """Raises ConfigError when an argument is none of the installed vLLM's. Where vLLM is not installed, none is known.

    Args:
        given: the arguments by name, as the config gives them under the key `section`.
    """
    if given and (known := engine_argument_names()):
        refuse_unknown(given, section, known)


@functools.cache
def engine_argument_names() -> frozenset[str]:
    """The names of the fields of vLLM's EngineArgs; empty where vLLM is not installed."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    return arguments_in((Path(spec.submodule_search_locations[0]) / "engine" / "arg_utils.py").read_text())


def arguments_in(source: str) -> frozenset[str]:
    """The public fields of the class EngineArgs in the source of vLLM's `engine/arg_utils.py`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs":
            fields = [entry.target for entry in node.body if isinstance(entry, ast.AnnAssign)]
            names = [target.id for target in fields if isinstance(target, ast.Name)]
            return frozenset(name for name in names if not name.startswith("_"))
    raise RuntimeError("vLLM's engine/arg_utils.py has no class EngineArgs")
