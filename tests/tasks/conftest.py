"""Paths of the real data sets. Tests that need a data set are skipped when its files are missing."""

from pathlib import Path

import pytest


def real_data(name: str) -> Path:
    path = Path(__file__).parents[2].parent / "shared/data" / name
    if not path.is_dir():
        pytest.skip(f"the files of {name} are not here")
    return path


@pytest.fixture(scope="session")
def gsm8k_path() -> Path:
    return real_data("gsm8k")


@pytest.fixture(scope="session")
def aqua_rat_path() -> Path:
    return real_data("aqua_rat")


@pytest.fixture(scope="session")
def ecqa_path() -> Path:
    return real_data("ecqa")
