"""Real data where it is there, and a tiny tokenizer."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from aft_ray.tasks.arithmetic_model import build_tokenizer


@pytest.fixture(scope="session")
def gsm8k_path() -> Path:
    path = Path(__file__).parents[2].parent / "shared/data/gsm8k"
    if not path.is_dir():
        pytest.skip("the GSM8K files are not here")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()
