"""The comparison of two builds of a package by their sources, with small packages made up for each case."""

import sysconfig
import textwrap
from pathlib import Path

import pytest
from gpu_signatures.comparison import DIFFERENT, HANDLED, SAME, UNKNOWN, compare
from gpu_signatures.listed import listed_uses
from gpu_signatures.package_tree import Missing, PackageTree
from gpu_signatures.touched import string_keys, uses_in

ROOT = Path(__file__).parents[2]


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return directory


def tree(directory: Path, files: dict[str, str]) -> PackageTree:
    return PackageTree([write(directory, {"pkg/__init__.py": "", **files})], ["pkg"])


def judged(tmp_path, code: str, tested: dict[str, str], gpu: dict[str, str], *, moved=None, handled=None):
    """Compares two builds of `pkg` for what `code` uses; name -> row."""
    ours = write(tmp_path / "ours", {"main.py": code})
    rows = compare(
        uses_in(ours, ours, ["pkg"]),
        tree(tmp_path / "tested", tested),
        tree(tmp_path / "gpu", gpu),
        {},
        moved or {},
        handled or {},
    )
    return {row.name: row for row in rows}


def one(tmp_path, code: str, before: str, after: str):
    """The row of the name that `code` uses of `pkg.a`, whose text differs between the builds."""
    rows = judged(tmp_path, code, {"pkg/a.py": before}, {"pkg/a.py": after})
    assert len(rows) == 1, rows
    return next(iter(rows.values()))


CALL = "from pkg.a import f\n\n\ndef use():\n    return f(1, b=2)\n"


def test_a_missing_module_is_named_with_the_line_that_needs_it(tmp_path):
    code = "import os\n\n\ndef late():\n    from pkg.a import f\n"
    row = judged(tmp_path, code, {"pkg/a.py": "def f(): ..."}, {})["pkg.a.f"]
    assert (row.verdict, row.places) == (DIFFERENT, ("main.py:5",))
    assert "no module pkg.a" in row.detail


def test_a_missing_name_is_named(tmp_path):
    row = one(tmp_path, "from pkg.a import f", "def f(): ...", "def g(): ...")
    assert (row.verdict, row.detail) == (DIFFERENT, "pkg.a has no f")


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ("def f(a, c): ...", "no parameter b"),
        ("def f(a, b, c): ...", "new required parameter c"),
        ("def f(a, *, c, b): ...", "new required parameter c"),
        ("def f(b, a): ...", "parameter a is number 2 instead of 1"),
        ("def f(a, b, /): ...", "parameter b became positional-only"),
        ("class f: ...", "class instead of a function"),
    ],
)
def test_a_changed_signature_differs(tmp_path, after, said):
    row = one(tmp_path, CALL, "def f(a, b): ...", after)
    assert row.verdict == DIFFERENT
    assert said in row.detail


def test_a_lost_default_and_a_lost_star_differ(tmp_path):
    row = one(tmp_path, CALL, "def f(a, b=1, *args, **kwargs): ...", "def f(a, b): ...")
    assert row.verdict == DIFFERENT
    for said in ("b lost its default", "no *args", "no **kwargs"):
        assert said in row.detail


@pytest.mark.parametrize("after", ["def f(a, b, c=1): ...", "def f(a, b=2): ...", "async def f(a, b): ..."])
def test_what_is_new_and_optional_is_the_same(tmp_path, after):
    assert one(tmp_path, CALL, "def f(a, b): ...", after).verdict == SAME


def test_a_call_that_the_function_does_not_take_differs(tmp_path):
    same = "def f(a, *, b): ..."
    assert one(tmp_path / "1", CALL, same, same).verdict == SAME
    row = one(tmp_path / "2", "from pkg.a import f\nf(1, 2, x=3)\n", same, same)
    assert row.verdict == DIFFERENT
    assert "main.py:2 gives x, which is no parameter" in row.detail
    assert "main.py:2 gives 2 arguments by position, but it takes 1" in row.detail


def test_a_class_that_moved_and_is_exported_again_is_the_same(tmp_path):
    row = judged(
        tmp_path,
        "from pkg.a import C\nC(1)\n",
        {"pkg/a.py": "class C:\n    def __init__(self, x): ..."},
        {"pkg/a.py": "from .b import C", "pkg/b.py": "class C:\n    def __init__(self, x): ..."},
    )["pkg.a.C"]
    assert row.verdict == SAME
    assert "pkg.b instead of pkg.a" in row.detail


def test_a_constructor_is_compared_where_it_is_inherited(tmp_path):
    before = "class B:\n    def __init__(self, x): ...\nclass C(B): ..."
    row = one(tmp_path, "from pkg.a import C\nC(1)\n", before, before.replace("x", "x, y"))
    assert (row.verdict, row.detail) == (DIFFERENT, "new required parameter y")


def test_an_inherited_method_is_found_and_one_from_outside_is_unknown(tmp_path):
    code = "from pkg.a import C\nC.run(1)\n"
    inherited = "from pkg.b import B\nclass C(B): ..."
    rows = judged(
        tmp_path / "1",
        code,
        {"pkg/a.py": "class C:\n    def run(self, x): ..."},
        {"pkg/a.py": inherited, "pkg/b.py": "class B:\n    def run(self, x, y): ..."},
    )
    assert rows["pkg.a.C.run"].detail == "new required parameter y"
    outside = "from torch.nn import Module\nclass C(Module): ..."
    assert one_of(judged(tmp_path / "2", code, {"pkg/a.py": outside}, {"pkg/a.py": outside}), "run") == UNKNOWN
    gone = judged(
        tmp_path / "3", code, {"pkg/a.py": "class C:\n    def run(self, x): ..."}, {"pkg/a.py": "class C: ..."}
    )
    assert gone["pkg.a.C.run"].detail == "pkg.a.C has no run"


def test_a_method_of_which_only_the_abstract_one_is_left_differs(tmp_path):
    base = "class B:\n    @abstractmethod\n    def run(self): ...\nclass C(B):"
    rows = judged(
        tmp_path,
        "from pkg.a import C\nC.run()\n",
        {"pkg/a.py": f"{base}\n    def run(self): ..."},
        {"pkg/a.py": f"{base} ..."},
    )
    assert rows["pkg.a.C.run"].detail == "only an abstract method is left"


def one_of(rows, ending: str) -> str:
    return next(row.verdict for name, row in rows.items() if name.endswith(ending))


def test_what_a_method_sets_on_its_object_is_an_attribute(tmp_path):
    build = tree(tmp_path, {"pkg/a.py": "class C:\n    def __init__(self):\n        self.size: int = 1\n"})
    assert build.resolve("pkg.a", ["C", "size"]).kind == "value"
    with pytest.raises(Missing):
        build.resolve("pkg.a", ["C", "length"])


@pytest.mark.parametrize(
    "init",
    [
        "from .a import *",
        "from pkg import a\nf = a.f",
        "_NAMES = {'f': '.a:f'}\ndef __getattr__(name): return load(_NAMES[name])",
        "_NAMES = {'f': ('.a', 'f')}\ndef __getattr__(name): return load(*_NAMES[name])",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import f\ndef __getattr__(name): ...",
        "try:\n    from .a import f\nexcept ImportError:\n    f = None",
        "def f(): ...\nif NEW:\n    from .a import f",
    ],
)
def test_a_name_is_followed_to_its_definition(tmp_path, init):
    build = tree(tmp_path, {"pkg/__init__.py": init, "pkg/a.py": "def f(a, b): ..."})
    found = build.resolve("pkg", ["f"])
    assert (found.kind, found.module) == ("function", "pkg.a")


def test_a_name_that_neither_stands_there_nor_is_loaded_lazily_is_missing(tmp_path):
    lazy = "_NAMES = {'f': '.a:f'}\ndef __getattr__(name): return load(_NAMES[name])"
    build = tree(tmp_path, {"pkg/__init__.py": lazy, "pkg/a.py": "def f(): ..."})
    with pytest.raises(Missing, match="pkg has no g"):
        build.resolve("pkg", ["g"])
    gone = tree(tmp_path / "gone", {"pkg/__init__.py": lazy, "pkg/a.py": "def g(): ..."})
    with pytest.raises(Missing, match=r"pkg\.a has no f"):
        gone.resolve("pkg", ["f"])


def test_a_moved_module_is_handled_only_with_the_name_in_its_new_place(tmp_path):
    before, moved = {"pkg/a.py": "def f(a): ..."}, {"pkg.a": "pkg.b"}
    code = "from pkg.a import f\nf(1)\n"
    assert (
        judged(tmp_path / "1", code, before, {"pkg/b.py": "def f(a): ..."}, moved=moved)["pkg.a.f"].verdict == HANDLED
    )
    assert judged(tmp_path / "2", code, before, {"pkg/b.py": "g = 1"}, moved=moved)["pkg.a.f"].verdict == DIFFERENT
    changed = judged(tmp_path / "3", code, before, {"pkg/b.py": "def f(a, b): ..."}, moved=moved)["pkg.a.f"]
    assert (changed.verdict, changed.detail) == (DIFFERENT, "new required parameter b")


def test_a_known_difference_is_told_with_its_reason(tmp_path):
    row = judged(tmp_path, "import pkg.a", {"pkg/a.py": ""}, {}, handled={"pkg.a": "nobody calls it"})["pkg.a"]
    assert row.verdict == HANDLED
    assert "nobody calls it" in row.detail


RECORD = "from pkg.a import R\nR(x=1)\n"


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ("@dataclass\nclass R:\n    x: int\n    z: int = 1", SAME),  # y is not used
        ("@dataclass\nclass B:\n    x: int\n@dataclass\nclass R(B):\n    w: int = 2", SAME),
        ("@dataclass\nclass R:\n    y: int = 0", DIFFERENT),
        ("@dataclass\nclass R:\n    x: int\n    z: int", DIFFERENT),
        ("@dataclass\nclass R:\n    x: int\n    z: int = field(init=True)", DIFFERENT),
        ("@dataclass\nclass R:\n    x: int\n    z: int = field(init=False)", SAME),
        ("@dataclass\nclass R:\n    x: int\n    z: list = field(default_factory=list)", SAME),
    ],
)
def test_fields_of_a_record_are_its_parameters(tmp_path, after, verdict):
    assert one(tmp_path, RECORD, "@dataclass\nclass R:\n    x: int\n    y: int = 0", after).verdict == verdict


@pytest.mark.parametrize("base", ["BaseModel", "msgspec.Struct"])
def test_messages_and_models_are_records(tmp_path, base):
    before = f"class B({base}):\n    x: int\nclass R(B):\n    y: int = 0"
    assert one(tmp_path / "1", RECORD, before, before.replace("x:", "renamed:")).verdict == DIFFERENT
    assert one(tmp_path / "2", RECORD, before, before + "\n    z: int = Field(..., gt=0)").verdict == DIFFERENT
    assert one(tmp_path / "3", RECORD, before, before + "\n    z: int = Field(3, gt=0)").verdict == SAME


def test_uses_are_found_in_functions_but_not_in_annotations_or_behind_other_names(tmp_path):
    code = """
        from typing import TYPE_CHECKING
        import pkg
        if TYPE_CHECKING:
            from pkg.typing_only import T
        vllm = try_import("pkg.engine")
        def early(pkg):
            return pkg.not_ours
        def later():
            from pkg.a import C as D
            D.make(1, *rest, key=2).other
            vllm.args.Args(**given)
            return pkg.b.value
    """
    ours = write(tmp_path, {"main.py": code})
    uses = {use.name: use for use in uses_in(ours, ours, ["pkg"])}
    assert set(uses) == {"pkg", "pkg.a.C", "pkg.a.C.make", "pkg.engine.args.Args", "pkg.b.value"}
    made = uses["pkg.a.C.make"]
    assert (made.called, made.positional, made.keywords, made.place) == (True, -1, frozenset({"key"}), "main.py:11")


def test_keys_of_a_dict_of_arguments_are_found(tmp_path):
    code = "def f():\n    a = {'x': {'inner': 1}}\n    a |= {'y': 2}\n    a['z'] = 3\n    return a\n"
    file = write(tmp_path, {"a.py": code}) / "a.py"
    assert dict(string_keys(file, "f")) == {"x": 2, "y": 3, "z": 4}


def test_every_listed_member_is_still_used_by_its_file():
    assert len(list(listed_uses(ROOT, Path(sysconfig.get_path("purelib"))))) > 100
