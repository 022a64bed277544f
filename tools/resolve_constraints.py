"""Writes the constraints file of an extra: one version of every package that an installation of it brings.

    make constraints TORCH_INDEX=URL                                          # both files, for all Pythons
    python tools/resolve_constraints.py gpu constraints/gpu.txt python3.11    # one of them

pip resolves the dependencies of `pyproject.toml`, of the extra, of `dev` and of `quantization` in a fresh, empty
environment of each Python and installs nothing. Where the Pythons need different versions, the lines have markers. The
file has no hashes, index URLs or local paths, so that every index and every build of torch can serve it. The CPU build
of vLLM asks for the CPU build of torch, which comes from the index in the environment variable TORCH_INDEX, as for
`make install`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
# Packages that tools/install.sh installs before the rest.
BUILD_TOOLS = ["setuptools>=77", "wheel", "ninja", "numpy", "packaging", "py-cpuinfo"]


def main() -> None:
    """Resolves for each Python and writes the file. Exits with a sentence if it cannot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extra", choices=["cpu", "gpu"])
    parser.add_argument("output", type=Path)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="an interpreter, such as python3.12")
    arguments = parser.parse_args()
    asked = requirements(arguments.extra)
    resolved: dict[str, dict[str, str]] = {}
    for python in arguments.pythons:
        version, pins = resolve(python, asked)
        print(f"Python {version}, {arguments.extra}: {len(pins)} packages", flush=True)
        resolved[version] = pins
    arguments.output.write_text(header(arguments.extra, sorted(resolved, key=order)) + "".join(lines(resolved)))


def requirements(extra: str) -> list[str]:
    """Returns what an installation of the extra with `dev` and `quantization` asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *optional[extra], *optional["dev"], *optional["quantization"], *BUILD_TOOLS]


def resolve(python: str, asked: list[str]) -> tuple[str, dict[str, str]]:
    """Returns the Python's version, such as "3.12", and the version of each package, by its normalised name."""
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory)
        run([python, "-m", "venv", str(here / "venv")])
        inner = str(here / "venv/bin/python")
        version = run([inner, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).strip()
        pip = [inner, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
        run([*pip, "--upgrade", "pip"])
        (here / "requirements.txt").write_text("\n".join(asked) + "\n")
        report = here / "report.json"
        if index := os.environ.get("TORCH_INDEX"):
            pip += ["--extra-index-url", index]
        run([*pip, "--dry-run", "--ignore-installed", "--report", str(report), "-r", str(here / "requirements.txt")])
        return version, pins(json.loads(report.read_text()))


def pins(report: dict[str, list[dict[str, dict[str, str]]]]) -> dict[str, str]:
    """Returns normalised name -> version from pip's report.

    A local label, such as that of torch's CPU build, belongs to one index; a version without it matches all builds.
    """
    found = [one["metadata"] for one in report["install"]]
    return {re.sub(r"[-_.]+", "-", one["name"]).lower(): one["version"].partition("+")[0] for one in found}


def lines(resolved: dict[str, dict[str, str]]) -> list[str]:
    """Returns the sorted lines of the file; with a marker for each Python where the versions differ.

    A package that some Pythons do not need has no marker, because a constraint does not install anything.
    """
    result = []
    for name in sorted({name for pins in resolved.values() for name in pins}):
        versions = {
            python: resolved[python][name] for python in sorted(resolved, key=order) if name in resolved[python]
        }
        if len(set(versions.values())) == 1:
            result.append(f"{name}=={next(iter(versions.values()))}\n")
        else:
            result += [f'{name}=={pin} ; python_version == "{python}"\n' for python, pin in versions.items()]
    return result


def order(version: str) -> tuple[int, ...]:
    """Sorts versions of Python."""
    return tuple(map(int, version.split(".")))


def header(extra: str, pythons: list[str]) -> str:
    return (
        f"# The versions that `make install` gives the extra `{extra}`, for Python {', '.join(pythons)}.\n"
        "# Written by `make constraints`, which resolves pyproject.toml anew; do not edit.\n"
    )


def run(command: list[str]) -> str:
    """Returns the standard output of a command. Exits with its last lines if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        fail(f"there is no {command[0]}; install that Python, or name others: make constraints PYTHONS=...")
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
        fail(f"`{' '.join(command[:6])} ...` failed:\n{said}")
    return done.stdout


def fail(message: str) -> NoReturn:
    sys.exit(f"constraints: {message}")


if __name__ == "__main__":
    main()
