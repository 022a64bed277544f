"""Finds the definition of a dotted name in the source files of packages, as Python would, but without running them.

Invariant: what cannot be decided from the sources, such as a member of a class whose base lies outside the packages, is
a definition of the kind "unknown", never a missing one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

_RECORD_BASES = {"BaseModel", "Struct", "NamedTuple", "TypedDict"}
_RECORD_DECORATORS = {"dataclass", "config"}
_NO_DEFAULT = {"field", "Field"}


class Missing(Exception):
    """A name has no definition. The message says which part of it is missing, and where."""


@dataclass(frozen=True)
class Definition:
    """What a name stands for.

    Attributes:
        kind: "module", "class", "function", "value" or "unknown".
        module: the module with the definition; for a module itself, its name.
        line: line of the definition; 0 for a module.
        node: the syntax of a class or function.
        bound: whether a function is a method, whose first parameter the call gives itself.
        abstract: whether it is a method that subclasses have to define.
    """

    kind: str
    module: str
    line: int = 0
    node: ast.AST | None = None
    bound: bool = False
    abstract: bool = False


@dataclass
class _Module:
    """The top-level names of a module.

    Attributes:
        names: what may define each name, the likeliest first: a syntax node or the dotted name that it was imported by.
        stars: modules whose names are imported by `from module import *`.
    """

    name: str
    tree: ast.Module
    is_package: bool
    names: dict[str, list[ast.AST | str]] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)

    @cached_property
    def lazy(self) -> ast.FunctionDef | None:
        """The function `__getattr__`, which gives names that are not there until they are asked for."""
        return next((n for n in self.tree.body if isinstance(n, ast.FunctionDef) and n.name == "__getattr__"), None)


class PackageTree:
    """Source files below some directories, each with top-level packages in it.

    Args:
        roots: the directories, such as `site-packages`; the first that has a package is taken.
        packages: the names of the packages. All others are outside, and what comes from them is unknown.
    """

    def __init__(self, roots: Sequence[Path], packages: Sequence[str]) -> None:
        self._roots, self.packages = roots, tuple(packages)
        self._modules: dict[str, _Module] = {}
        self._resolving: set[tuple[str, str]] = set()

    def resolve(self, module: str, attributes: Sequence[str] = ()) -> Definition:
        """Returns what `module`, or the member that the attributes lead to, is defined as. Raises Missing."""
        if not self.is_inside(module):
            return Definition("unknown", module)
        if self._file(module) is None:
            raise Missing(f"there is no module {module}")
        found = Definition("module", module)
        for attribute in attributes:
            found = self.member(found, attribute)
        return found

    def member(self, owner: Definition, name: str) -> Definition:
        """Returns an attribute of a module or class. Raises Missing."""
        if owner.kind == "module":
            return self._module_member(owner.module, name)
        if owner.kind == "class":
            return self._class_member(owner, name)
        return Definition("unknown", owner.module, owner.line)

    def is_inside(self, module: str) -> bool:
        return module.split(".")[0] in self.packages

    def fields(self, owner: Definition) -> dict[str, bool] | None:
        """Returns the fields of a dataclass, message or pydantic model, each with whether it must be given.

        None: the class is none of them.
        """
        assert isinstance(owner.node, ast.ClassDef)
        if not self._is_record(owner):
            return None
        result: dict[str, bool] = {}
        for base in self._bases(owner):
            if base.kind == "class":
                result |= self.fields(base) or {}
        for node in _statements(owner.node.body):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                if "ClassVar" not in ast.unparse(node.annotation) and not _given_by_class(node.value):
                    result[node.target.id] = _has_no_default(node.value)
            elif isinstance(node, ast.Assign) and (name := ast.unparse(node.targets[0])) in result:
                result[name] = False  # a new default for the field of a base
        return result

    def constructor(self, owner: Definition) -> Definition | None:
        """Returns `__init__` as the class defines or inherits it; None where a record's fields are its parameters."""
        assert isinstance(owner.node, ast.ClassDef)
        own = any(isinstance(n, ast.FunctionDef) and n.name == "__init__" for n in _statements(owner.node.body))
        if not own and self._is_record(owner):
            return None
        try:
            return self._class_member(owner, "__init__")
        except Missing:
            return Definition("unknown", owner.module)

    def _file(self, module: str) -> Path | None:
        relative = Path(*module.split("."))
        top = relative.parts[0]
        for root in self._roots:
            if not (root / top).is_dir() and not (root / f"{top}.py").is_file():
                continue
            candidates = [root / relative / "__init__.py", (root / relative).with_suffix(".py"), root / relative]
            found = next((path for path in candidates[:2] if path.is_file()), None)
            if found is None and candidates[2].is_dir():
                return candidates[2]
            if found is None:
                found = next((root / relative).parent.glob(f"{relative.name}.*so"), None)
            return found
        return None

    def _module(self, name: str) -> _Module | None:
        """Reads a module; None when it is compiled or a package without a file."""
        if name not in self._modules:
            path = self._file(name)
            if path is None or path.suffix != ".py":
                return None
            read = _Module(name, ast.parse(path.read_text()), path.name == "__init__.py")
            self._modules[name] = read
            self._collect(read)
        return self._modules[name]

    def _collect(self, module: _Module) -> None:
        """Fills `names`: the last statement that binds a name counts, and of its branches the first one.

        Imports for annotations come last; they tell what a module's `__getattr__` gives.
        """
        typing_only: dict[str, list[ast.AST | str]] = {}

        def collect(statements: Sequence[ast.stmt], into: dict[str, list[ast.AST | str]]) -> None:
            for node in statements:
                here: dict[str, list[ast.AST | str]] = {}
                if isinstance(node, ast.If):
                    collect(node.body, typing_only if "TYPE_CHECKING" in ast.unparse(node.test) else here)
                    collect_branch(node.orelse, here)
                elif isinstance(node, ast.Try):
                    for branch in [node.body, *[handler.body for handler in node.handlers], node.orelse]:
                        collect_branch(branch, here)
                elif isinstance(node, ast.With):
                    collect(node.body, here)
                elif isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                    module.stars.append(_absolute(node, module.name, module.is_package))
                else:
                    for name, value in _bound_names(node, module.name, module.is_package):
                        here.setdefault(name, []).append(value)
                for name, values in here.items():
                    into[name] = values + into.get(name, [])

        def collect_branch(statements: Sequence[ast.stmt], here: dict[str, list[ast.AST | str]]) -> None:
            branch: dict[str, list[ast.AST | str]] = {}
            collect(statements, branch)
            for name, values in branch.items():
                here[name] = here.get(name, []) + values

        collect(module.tree.body, module.names)
        for name, values in typing_only.items():
            module.names.setdefault(name, []).extend(values)

    def _module_member(self, module_name: str, name: str) -> Definition:
        module = self._module(module_name)
        if module is None:
            if self._file(f"{module_name}.{name}") is not None:
                return Definition("module", f"{module_name}.{name}")
            path = self._file(module_name)
            if path is not None and path.is_dir():
                raise Missing(f"there is no module {module_name}.{name}")
            return Definition("unknown", module_name)  # compiled
        if (key := (module_name, name)) in self._resolving:
            raise Missing(f"{module_name} imports {name} from itself")
        self._resolving.add(key)
        try:
            missing = ""
            for candidate in module.names.get(name, []):
                try:
                    return self._definition(module, candidate)
                except Missing as error:
                    missing = str(error)
            if self._file(f"{module_name}.{name}") is not None:
                return Definition("module", f"{module_name}.{name}")
            if missing:
                raise Missing(missing)
            for star in module.stars:
                try:
                    return self._imported(star, name)
                except Missing:
                    continue
            if module.lazy is not None and (found := self._lazy(module, name)) is not None:
                return found
        finally:
            self._resolving.discard(key)
        raise Missing(f"{module_name} has no {name}")

    def _definition(self, module: _Module, candidate: ast.AST | str) -> Definition:
        if isinstance(candidate, str):
            name, _, attribute = candidate.partition(":")
            return self._imported(name, attribute)
        if isinstance(candidate, ast.ClassDef):
            return Definition("class", module.name, candidate.lineno, candidate)
        if isinstance(candidate, ast.FunctionDef | ast.AsyncFunctionDef):
            return Definition("function", module.name, candidate.lineno, candidate)
        value = getattr(candidate, "value", None)
        if isinstance(value, ast.Name | ast.Attribute):  # another name of the same thing
            try:
                return self._expression(module, value)
            except Missing:
                pass
        return Definition("value", module.name, getattr(candidate, "lineno", 0))

    def _imported(self, module: str, attribute: str) -> Definition:
        if not self.is_inside(module):
            return Definition("unknown", module)
        return self.resolve(module, [attribute] if attribute else [])

    def _lazy(self, module: _Module, name: str) -> Definition | None:
        """What the module's `__getattr__` gives for a name: the module has a dict with it, or the function tests it."""
        assert module.lazy is not None
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Dict):
                continue
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == name:
                    target = [v.value for v in ast.walk(value) if isinstance(v, ast.Constant)]
                    return self._lazy_target(module, name, [one for one in target if isinstance(one, str)])
        if any(isinstance(node, ast.Constant) and node.value == name for node in ast.walk(module.lazy)):
            return Definition("value", module.name, module.lazy.lineno)
        return None

    def _lazy_target(self, module: _Module, name: str, target: list[str]) -> Definition:
        """Follows an entry such as ".llm:LLM", ".llm" or (".llm", "LLM")."""
        if not target:
            return Definition("value", module.name)
        path, _, attribute = target[0].partition(":")
        attribute = attribute or (target[1] if len(target) > 1 else name)
        if path.startswith("."):
            node = ast.ImportFrom(path.lstrip(".") or None, [], len(path) - len(path.lstrip(".")))
            path = _absolute(node, module.name, module.is_package)
        elif not self.is_inside(path):
            path = f"{module.name}.{path}"
        return self._imported(path, attribute)

    def _class_member(self, owner: Definition, name: str) -> Definition:
        assert isinstance(owner.node, ast.ClassDef)
        if (own := _own_member(owner, name)) is not None:
            return own
        outside = False
        for base in self._bases(owner):
            if base.kind != "class":
                outside = True
                continue
            try:
                found = self._class_member(base, name)
            except Missing:
                continue
            if found.kind != "unknown":
                return found
            outside = True
        if outside:
            return Definition("unknown", owner.module, owner.line)
        raise Missing(f"{owner.module}.{owner.node.name} has no {name}")

    def _bases(self, owner: Definition) -> Iterator[Definition]:
        assert isinstance(owner.node, ast.ClassDef)
        module = self._module(owner.module)
        assert module is not None
        for base in owner.node.bases:
            node = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(node, ast.Name) and node.id in ("object", "ABC", "Generic", "Protocol", "str", "Enum"):
                continue
            try:
                yield self._expression(module, node)
            except Missing:
                yield Definition("unknown", owner.module)

    def _expression(self, module: _Module, node: ast.AST) -> Definition:
        if isinstance(node, ast.Name):
            return self._module_member(module.name, node.id)
        if isinstance(node, ast.Attribute):
            return self.member(self._expression(module, node.value), node.attr)
        return Definition("unknown", module.name)

    def _is_record(self, owner: Definition) -> bool:
        assert isinstance(owner.node, ast.ClassDef)
        if any(_last_name(decorator) in _RECORD_DECORATORS for decorator in owner.node.decorator_list):
            return True
        if any(_last_name(base) in _RECORD_BASES for base in owner.node.bases):
            return True
        # A class below a dataclass is one only with its own decorator, but messages and pydantic models hand it down.
        bases = [base for base in self._bases(owner) if base.kind == "class"]
        return any(self._is_record(base) for base in bases)


def _own_member(owner: Definition, name: str) -> Definition | None:
    """Returns what the body of a class defines, or what its methods set on `self`."""
    assert isinstance(owner.node, ast.ClassDef)
    for node in _statements(owner.node.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name and not _is_overload(node):
            decorators = {_last_name(one) for one in node.decorator_list}
            if decorators & {"property", "cached_property"}:
                return Definition("value", owner.module, node.lineno)
            bound, abstract = "staticmethod" not in decorators, "abstractmethod" in decorators
            return Definition("function", owner.module, node.lineno, node, bound, abstract)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Definition("class", owner.module, node.lineno, node)
        for other, _ in _bound_names(node, "", False):
            if other == name:
                return Definition("value", owner.module, node.lineno)
    for found in ast.walk(owner.node):
        if not isinstance(found, ast.Attribute) or not isinstance(found.ctx, ast.Store):
            continue
        if found.attr == name and ast.unparse(found.value) in ("self", "cls"):
            return Definition("value", owner.module, found.lineno)
    return None


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields the statements of a class body, those under conditions too."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])
        else:
            yield node


def _bound_names(node: ast.stmt, module: str, is_package: bool) -> Iterator[tuple[str, ast.AST | str]]:
    """Yields the names that a statement binds, with the syntax that defines each or the name that it imports."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        if not _is_overload(node):
            yield node.name, node
    elif isinstance(node, ast.ClassDef):
        yield node.name, node
    elif isinstance(node, ast.Import):
        for alias in node.names:
            yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield alias.asname or alias.name, f"{_absolute(node, module, is_package)}:{alias.name}"
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                    yield name.id, node
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id, node
    elif type(node).__name__ == "TypeAlias":  # `type X = ...`, which Python 3.11 has no syntax for
        yield node.name.id, node  # type: ignore[attr-defined]


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """Returns the absolute name of the module that `from ... import` names."""
    if node.level == 0:
        return node.module or ""
    parts = module.split(".")
    above = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*above, *([node.module] if node.module else [])])


def _last_name(node: ast.AST) -> str:
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_overload(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(_last_name(decorator) == "overload" for decorator in node.decorator_list)


def _given_by_class(value: ast.expr | None) -> bool:
    """Whether a field is not a parameter of the constructor: `field(init=False)`."""
    return isinstance(value, ast.Call) and any(
        one.arg == "init" and isinstance(one.value, ast.Constant) and one.value.value is False for one in value.keywords
    )


def _has_no_default(value: ast.expr | None) -> bool:
    if value is None:
        return True
    if not isinstance(value, ast.Call) or _last_name(value) not in _NO_DEFAULT:
        return False
    if value.args:
        return isinstance(value.args[0], ast.Constant) and value.args[0].value is Ellipsis
    return not any(one.arg in ("default", "default_factory") for one in value.keywords)
