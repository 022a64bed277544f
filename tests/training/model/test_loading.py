"""Models of several files loaded into ZeRO-3 partitions on two ranks: the weights, the refusals, and the memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import free_ports
from safetensors.torch import load_file, save_file
from training_helpers import write_tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from aft_ray.training.model.loading import LoadingError, _tensors_by_file, load_model

SUPPORT = Path(__file__).parents[2] / "support"
LAYERS, SHARDS = 12, 8


def write_large_llama(directory: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=8,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(directory, max_shard_size=model.num_parameters() * 4 // SHARDS)


def changed(source: Path, directory: Path, change) -> None:
    """Copies a model of one file and applies `change` to the dict of its tensors."""
    shutil.copytree(source, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("loading")
    plain = write_tiny_llama(work / "0-plain")
    write_large_llama(work / "1-large")
    write_tiny_llama(work / "tied", tied=True)
    shutil.copytree(work / "1-large", work / "2-bfloat16")
    norm = "model.layers.1.input_layernorm.weight"
    changed(plain, work / "missing", lambda tensors: tensors.pop(norm))
    changed(plain, work / "unexpected", lambda tensors: tensors.update(extra=torch.zeros(2)))
    changed(plain, work / "shape", lambda tensors: tensors.update({norm: torch.zeros(3)}))
    # Models that transformers before 4.31 saved have this buffer.
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    changed(plain, work / "old", lambda tensors: tensors.update({old: torch.zeros(16)}))
    changed(plain, work / "torn", lambda tensors: None)
    whole = (work / "torn" / "model.safetensors").read_bytes()
    (work / "torn" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    return work


@pytest.fixture(scope="module")
def outcomes(work):
    """What each rank reports of each model."""
    (port,) = free_ports(1)
    # Freed memory goes back to the system at once, so that what is measured is what is in use.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT)]),
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [sys.executable, str(SUPPORT / "loading_main.py")]
    ranks = []
    for rank in range(2):
        with open(work / f"{rank}.log", "w") as log:
            arguments = [*command, str(rank), str(port), str(work)]
            ranks.append(subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        for rank, process in enumerate(ranks):
            assert process.wait(timeout=500) == 0, (work / f"{rank}.log").read_text()[-3000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [json.loads((work / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["0-plain", "1-large", "2-bfloat16", "tied", "old"])
def test_every_parameter_is_what_the_files_hold(outcomes, name):
    for outcome in outcomes:
        assert outcome[name]["partitioned"]
        assert outcome[name]["dtypes"] == ["torch.bfloat16" if name == "2-bfloat16" else "torch.float32"]
        assert outcome[name]["tied"] is (name == "tied")
    if name != "old":
        assert [outcome[name]["same"] for outcome in outcomes] == [True, True]
    assert outcomes[0][name]["eos"] == 2


def test_no_rank_uses_more_memory_than_its_half_a_layer_and_the_file_that_is_read(outcomes, work):
    files = [path.stat().st_size for path in (work / "1-large").glob("*.safetensors")]
    assert len(files) >= SHARDS
    model, spare = sum(files), 12 << 20
    layer = model / LAYERS
    reading, other = (outcome["1-large"]["peak"] for outcome in outcomes)
    # While a layer is partitioned, the whole layer is in memory, and for a moment also its copy that is sent.
    assert reading < model / 2 + max(files) + 2 * layer + spare < 0.9 * model
    assert other < model / 2 + 2 * layer + spare < 0.8 * model


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing", "missing lacks model.layers.1.input_layernorm.weight of LlamaForCausalLM; it is no whole"),
        ("unexpected", "unexpected has extra, which LlamaForCausalLM has no place for"),
        (
            "shape",
            r"input_layernorm.weight in .*shape/model.safetensors has the shape \[3\] and the .* \[64\]",
        ),
        ("torn", "torn/model.safetensors cannot be read: "),
    ],
)
def test_files_that_do_not_fit_are_refused_on_every_rank_in_one_sentence(outcomes, name, sentence):
    first, second = (outcome[name]["error"] for outcome in outcomes)
    assert first == second
    with pytest.raises(LoadingError, match=sentence):
        raise LoadingError(first)
    assert "\n" not in first


@pytest.mark.parametrize("name", ["missing", "unexpected"])
def test_files_that_do_not_fit_a_whole_model_are_refused_too(work, name):
    with pytest.raises(LoadingError, match=r"lacks model\.layers\.1|has extra, which"):
        load_model(work / name, "float32")


def test_a_directory_without_safetensors_is_refused(tmp_path):
    with pytest.raises(LoadingError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        _tensors_by_file(tmp_path)
