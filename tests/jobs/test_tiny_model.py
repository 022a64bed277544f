"""The tiny model's tokenizer loses nothing, and the model directory loads like any other."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from aft_ray.config.run import ArithmeticConfig
from aft_ray.tasks.arithmetic.problems import generate
from aft_ray.verify.answers.numbers import extract_after_marker
from jobs.tiny_model import build_tiny_model, build_tokenizer

TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"), seed=3, hidden_size=64, layers=2, heads=2)


def test_the_vocabulary_is_closed_over_the_generator(tokenizer: PreTrainedTokenizerFast) -> None:
    config = ArithmeticConfig(max_operand=1000, max_value=100_000, distractors=1)
    for question in generate(config, "train", 1000):
        for text in (question.text, question.reference):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids, text
            assert tokenizer.decode(ids) == text


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
def test_numbers_round_trip_and_every_digit_is_a_token(numbers: list[int]) -> None:
    text = " ".join(map(str, numbers))
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert len(ids) == sum(len(str(n)) for n in numbers)


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_the_answer_is_read_off_decoded_tokens(number: int) -> None:
    ids = TOKENIZER(f"16 + 4 = 20. #### {number}")["input_ids"] + [TOKENIZER.eos_token_id]
    assert extract_after_marker(TOKENIZER.decode(ids, skip_special_tokens=True), "####") == str(number)


def test_unknown_words_are_unknown(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("zeppelin")["input_ids"] == [tokenizer.unk_token_id]


def test_the_directory_loads_with_the_auto_classes(model_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    text = "Ana has 16 apples. how many apples does Ana have?"
    assert tokenizer(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert str(next(model.parameters()).dtype) == "torch.float32"
    assert model.config.head_dim == 32
    assert model.config.vocab_size == len(tokenizer)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sorted(p.name for p in model_directory.glob("*.safetensors")) == ["model.safetensors"]


def test_the_seed_fixes_the_weights(model_directory: Path, tmp_path: Path) -> None:
    same = build_tiny_model(tmp_path / "same", seed=3, hidden_size=64, layers=2, heads=2)
    other = build_tiny_model(tmp_path / "other", seed=4, hidden_size=64, layers=2, heads=2)
    weights = (model_directory / "model.safetensors").read_bytes()
    assert (same / "model.safetensors").read_bytes() == weights
    assert (other / "model.safetensors").read_bytes() != weights


def test_untied_weights(tmp_path: Path) -> None:
    directory = build_tiny_model(tmp_path, seed=0, hidden_size=64, layers=1, heads=1, tied=False)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
