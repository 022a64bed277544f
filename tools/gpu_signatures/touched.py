"""Finds in our sources, and in Ray's serve code, which names of a package they use, and how they call them.

A name is followed from its import through attributes of it, such as `vllm.LLMEngine.from_engine_args(...)`. What is
reached through an object, such as a method of an engine, no source shows: `listed` names it. Imports for annotations
only (under `TYPE_CHECKING`) are left out, because they do not run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Use:
    """One use of a name.

    Attributes:
        module: the module that is imported.
        attributes: the attributes that lead from it to what is used; empty for the module itself.
        place: file and line, or for a listed name why it is needed.
        called: whether it is called; only then the next two count.
        positional: how many arguments the call gives by position; -1: not known.
        keywords: the names of the arguments that it gives by name.
    """

    module: str
    attributes: tuple[str, ...]
    place: str
    called: bool = False
    positional: int = 0
    keywords: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return ".".join([self.module, *self.attributes])


def uses_in(root: Path, directory: Path, packages: Sequence[str]) -> Iterator[Use]:
    """Yields the uses of some packages in the Python files of a directory; places are relative to `root`."""
    for path in sorted(directory.rglob("*.py")):
        finder = _Finder(str(path.relative_to(root)), packages)
        finder.visit(ast.parse(path.read_text()))
        yield from finder.uses


def string_keys(path: Path, function: str) -> Iterator[tuple[str, int]]:
    """Yields each key, and its line, of the dicts that a function of a file makes; not those of dicts inside dicts."""
    tree = ast.parse(path.read_text())
    definition = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function)
    yield from _keys(definition)


def _keys(node: ast.AST) -> Iterator[tuple[str, int]]:
    if isinstance(node, ast.Dict):
        for key in node.keys:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, key.lineno
        return
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.slice, ast.Constant):
        yield str(node.slice.value), node.lineno
    for child in ast.iter_child_nodes(node):
        yield from _keys(child)


def attributes_of(path: Path, variable: str) -> Iterator[tuple[str, int]]:
    """Yields the attributes of a variable that a file reads, each with its line; not those given to `getattr`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == variable:
            yield node.attr, node.lineno


class _Finder(ast.NodeVisitor):
    def __init__(self, file: str, packages: Sequence[str]) -> None:
        self.uses: list[Use] = []
        self._file, self._packages = file, packages
        # Of each function that encloses the present line, and of the module: name -> what it was imported as.
        self._scopes: list[dict[str, tuple[str, tuple[str, ...]] | None]] = [{}]

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if self._wanted(alias.name):
                self._add(alias.name, (), node)
                target = alias.name if alias.asname else alias.name.split(".")[0]
                self._scopes[-1][alias.asname or target] = target, ()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0 and node.module and self._wanted(node.module):
            for alias in node.names:
                self._add(node.module, (alias.name,), node)
                self._scopes[-1][alias.asname or alias.name] = node.module, (alias.name,)
        elif node.module != "__future__":
            for alias in node.names:
                self._scopes[-1][alias.asname or alias.name] = None

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for decorator in node.decorator_list:
            self.visit(decorator)
        parameters = node.args
        for default in [*parameters.defaults, *parameters.kw_defaults]:
            if default is not None:
                self.visit(default)
        every = [*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs, parameters.vararg, parameters.kwarg]
        self._scopes.append({one.arg: None for one in every if one is not None})
        for statement in node.body:
            self.visit(statement)
        self._scopes.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self._scopes[-1][target.id] = self._given(node.value)
            else:
                self.visit(target)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:  # annotations are strings, and do not run
        if node.value is not None:
            self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        if (target := self._target(node.func)) is not None:
            starred = any(isinstance(one, ast.Starred) for one in node.args)
            keywords = frozenset(one.arg for one in node.keywords if one.arg is not None)
            self._add(*target, node, True, -1 if starred else len(node.args), keywords)
        else:
            self.visit(node.func)
        for child in [*node.args, *[one.value for one in node.keywords]]:
            self.visit(child)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if (target := self._target(node)) is not None:
            self._add(*target, node)
        else:
            self.generic_visit(node)

    def _given(self, value: ast.expr) -> tuple[str, tuple[str, ...]] | None:
        """What an assignment makes a name stand for: Ray imports vLLM by `vllm = try_import("vllm")`."""
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "try_import":
            name = value.args[0].value if isinstance(value.args[0], ast.Constant) else ""
            return (str(name), ()) if self._wanted(str(name)) else None
        return self._target(value)

    def _target(self, node: ast.expr) -> tuple[str, tuple[str, ...]] | None:
        attributes: list[str] = []
        while isinstance(node, ast.Attribute):
            attributes.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return None
        for scope in reversed(self._scopes):
            if node.id in scope:
                found = scope[node.id]
                return None if found is None else (found[0], (*found[1], *attributes))
        return None

    def _wanted(self, module: str) -> bool:
        return module.split(".")[0] in self._packages

    def _add(
        self,
        module: str,
        attributes: tuple[str, ...],
        node: ast.AST,
        called: bool = False,
        positional: int = 0,
        keywords: frozenset[str] = frozenset(),
    ) -> None:
        place = f"{self._file}:{node.lineno}"  # type: ignore[attr-defined]
        self.uses.append(Use(module, attributes, place, called, positional, keywords))
