"""The names that `aft_ray` exports: all can be imported, and importing the package imports no library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import aft_ray


def test_importing_the_package_imports_no_library():
    code = "import sys; before = set(sys.modules); import aft_ray; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "ray", "vllm", "pyarrow", "pydantic", "yaml", "numpy"} & set(done.stdout.split())


@pytest.mark.parametrize("name", aft_ray.__all__)
def test_every_exported_name_can_be_imported(name):
    assert getattr(aft_ray, name) is not None
    assert name in dir(aft_ray)


def test_type_checkers_see_the_exported_names():
    tree = ast.parse(Path(aft_ray.__file__).read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {alias.name for node in guarded.body for alias in node.names}
    assert imported == set(aft_ray.__all__) - {"__version__"}
    assert Path(aft_ray.__file__).with_name("py.typed").exists()


def test_a_name_that_is_not_exported_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        aft_ray.nothing  # noqa: B018
