"""Says for each used name how the build under test and the GPU build differ.

Invariant: a name that is missing, a parameter that is gone, renamed, moved or newly required, and a field that is gone
are differences; a new parameter or field with a default is only told.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from gpu_signatures.package_tree import Definition, Missing, PackageTree
from gpu_signatures.touched import Use

SAME, HANDLED, DIFFERENT, UNKNOWN = "same", "handled", "DIFFERENT", "unknown"


@dataclass(frozen=True)
class Row:
    """What was found for a name.

    Attributes:
        verdict: "same"; "handled", with the reason; "DIFFERENT"; "unknown" where no source says what the name is.
        detail: what differs, or what is new.
        places: where the name is used.
    """

    name: str
    kind: str
    verdict: str
    detail: str
    places: tuple[str, ...]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a function: its kind as `inspect` calls it, and whether a call must give it."""

    name: str
    kind: str
    required: bool


def compare(
    uses: Iterable[Use],
    tested: PackageTree,
    gpu: PackageTree,
    types: Mapping[str, str],
    moved: Mapping[str, str],
    handled: Mapping[str, str],
) -> list[Row]:
    """Returns a row for each name that is used.

    Args:
        types: names of objects -> "module:Class", whose attributes they have.
        moved: modules that the GPU build has elsewhere -> where, and where our code makes their names known.
        handled: modules that the GPU build lacks -> why nothing fails.
    """
    by_name: dict[tuple[str, tuple[str, ...]], list[Use]] = {}
    for use in uses:
        typed = _typed(use, types)
        by_name.setdefault((typed.module, typed.attributes), []).append(typed)
    rows = []
    for group in by_name.values():
        module, alias = group[0].module, moved.get(group[0].module)
        verdict, kind, detail = _judge(group, tested, gpu, alias or module)
        if verdict == SAME and alias is not None:
            verdict, detail = HANDLED, f"{alias} is made known under this name"
        elif verdict == DIFFERENT and module in handled:
            verdict, detail = HANDLED, f"{detail}: {handled[module]}"
        rows.append(Row(group[0].name, kind, verdict, detail, tuple(dict.fromkeys(use.place for use in group))))
    return sorted(rows, key=lambda row: row.name)


def _typed(use: Use, types: Mapping[str, str]) -> Use:
    """Replaces an object by its class, so that its attributes are found."""
    for length in range(1, len(use.attributes)):
        if (target := types.get(".".join([use.module, *use.attributes[:length]]))) is not None:
            module, _, name = target.partition(":")
            return replace(use, module=module, attributes=(name, *use.attributes[length:]))
    return use


def _judge(uses: list[Use], tested: PackageTree, gpu: PackageTree, gpu_module: str) -> tuple[str, str, str]:
    """Returns verdict, kind and detail of one name, which the GPU build has in `gpu_module`."""
    module, attributes = uses[0].module, uses[0].attributes
    try:
        ours = tested.resolve(module, attributes)
    except Missing as error:
        ours = None
        missing = f"the build under test: {error}"
    try:
        theirs = gpu.resolve(gpu_module, attributes)
    except Missing as error:
        return DIFFERENT, ours.kind if ours else "", str(error)
    if ours is None:
        return DIFFERENT, theirs.kind, missing
    if "unknown" in (ours.kind, theirs.kind):
        return (
            (UNKNOWN, "", "it is compiled or comes from outside") if ours.kind == theirs.kind else _kinds(ours, theirs)
        )
    if ours.kind != theirs.kind:
        return _kinds(ours, theirs)
    if theirs.abstract and not ours.abstract:
        return DIFFERENT, ours.kind, "only an abstract method is left"
    if ours.kind == "function":
        problems, notes = _signatures(parameters(ours), parameters(theirs))
        problems += [text for use in uses if use.called for text in refused(use, parameters(theirs))]
    elif ours.kind == "class" and any(use.called for use in uses):
        problems, notes = _constructors(uses, ours, theirs, tested, gpu)
    else:
        problems, notes = [], []
    if ours.module != theirs.module and gpu_module == module:
        notes.append(f"it is defined in {theirs.module} instead of {ours.module}")
    return (DIFFERENT if problems else SAME), ours.kind, "; ".join(dict.fromkeys(problems or notes))


def _kinds(ours: Definition, theirs: Definition) -> tuple[str, str, str]:
    return DIFFERENT, ours.kind, f"it is a {theirs.kind} instead of a {ours.kind}"


def _constructors(
    uses: list[Use], ours: Definition, theirs: Definition, tested: PackageTree, gpu: PackageTree
) -> tuple[list[str], list[str]]:
    our_init, their_init = tested.constructor(ours), gpu.constructor(theirs)
    if (our_init is None) != (their_init is None):
        return ["it became a record of fields, or is none any more"], []
    if our_init is not None and their_init is not None:
        if "function" not in (our_init.kind, their_init.kind):
            return [], []
        problems, notes = _signatures(parameters(our_init), parameters(their_init))
        return problems + [t for use in uses if use.called for t in refused(use, parameters(their_init))], notes
    before, after = tested.fields(ours) or {}, gpu.fields(theirs) or {}
    given = {keyword for use in uses for keyword in use.keywords}
    problems = [f"no field {name}" for name in sorted(given - set(after))]
    problems += [f"new required field {name}" for name, needed in after.items() if needed and not before.get(name)]
    positional = max((use.positional for use in uses), default=0)
    if list(before)[: max(positional, 0)] != list(after)[: max(positional, 0)]:
        problems.append(f"the first {positional} fields are now {', '.join(list(after)[:positional])}")
    return problems, [f"new field {name}" for name in after if name not in before][:5]


def parameters(function: Definition) -> list[Parameter]:
    """Returns the parameters of a function; of a method without the object itself."""
    assert isinstance(function.node, ast.FunctionDef | ast.AsyncFunctionDef)
    given = function.node.args
    positional = [
        *((one, "positional-only") for one in given.posonlyargs),
        *((one, "positional") for one in given.args),
    ]
    without = len(positional) - len(given.defaults)
    result = [Parameter(one.arg, kind, index < without) for index, (one, kind) in enumerate(positional)]
    if function.bound:
        result = result[1:]
    if given.vararg:
        result.append(Parameter(given.vararg.arg, "*args", False))
    for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        result.append(Parameter(one.arg, "keyword", default is None))
    if given.kwarg:
        result.append(Parameter(given.kwarg.arg, "**kwargs", False))
    return result


def _signatures(before: list[Parameter], after: list[Parameter]) -> tuple[list[str], list[str]]:
    """Returns the differences that matter, and what is new."""
    problems, notes = [], []
    later = {one.name: (index, one) for index, one in enumerate(after)}
    kinds = {one.kind for one in after}
    for index, one in enumerate(before):
        if one.kind in ("*args", "**kwargs"):
            if one.kind not in kinds:
                problems.append(f"it takes no {one.kind} any more")
        elif one.name not in later:
            problems.append(f"no parameter {one.name}")
        else:
            position, now = later[one.name]
            if now.kind != one.kind and not (one.kind == "keyword" and now.kind == "positional"):
                problems.append(f"parameter {one.name} became {now.kind}")
            if now.required and not one.required:
                problems.append(f"parameter {one.name} lost its default")
            if one.kind != "keyword" and position != index:
                problems.append(f"parameter {one.name} is number {position + 1} instead of {index + 1}")
    for one in after:
        if one.name not in {other.name for other in before} and one.kind not in ("*args", "**kwargs"):
            if one.required:
                problems.append(f"new required parameter {one.name}")
            else:
                notes.append(f"new parameter {one.name}")
    return problems, notes


def refused(use: Use, taken: list[Parameter]) -> list[str]:
    """Returns what is wrong with a call, for a function with these parameters."""
    kinds = {one.kind for one in taken}
    named = {one.name for one in taken if one.kind in ("positional", "keyword")}
    problems = []
    if "**kwargs" not in kinds:
        problems += [f"{use.place} gives {keyword}, which is no parameter" for keyword in sorted(use.keywords - named)]
    most = sum(one.kind in ("positional", "positional-only") for one in taken)
    if "*args" not in kinds and use.positional > most:
        problems.append(f"{use.place} gives {use.positional} arguments by position, but it takes {most}")
    return problems
