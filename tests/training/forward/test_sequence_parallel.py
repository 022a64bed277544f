"""Ranks that compute a packed row together: their scores and gradients against those of one process."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import free_ports
from training_helpers import SIZES
from transformers import LlamaConfig, LlamaForCausalLM

from aft_ray.config.run import ConfigError, TrainingConfig
from aft_ray.training.forward.packing import pack
from aft_ray.training.forward.sequence_parallel import SequenceParallel, check_heads, share_of_row

SUPPORT = Path(__file__).parents[2] / "support"


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=0, max_size=4)), min_size=1, max_size=3
    ),
    size=st.integers(2, 5),
)
def test_the_shares_of_a_row_are_the_row(lengths, size):
    row = pack(
        [list(range(1, prompt + 1)) for prompt, _ in lengths],
        [[list(range(50, 50 + tokens)) for tokens in responses] for _, responses in lengths],
    )
    shares = [share_of_row(row, SequenceParallel(None, rank, size)) for rank in range(size)]
    assert len({share.input_ids.shape for share in shares}) == 1
    ids, positions = (
        torch.cat([getattr(one, name) for one in shares], dim=1) for name in ("input_ids", "position_ids")
    )
    assert torch.equal(ids[:, : row.columns], row.input_ids)
    assert torch.equal(positions[:, : row.columns], row.position_ids)
    for share in shares:
        assert share.layout[: len(row.layout)] == row.layout
        assert share.layout[-1].stop == ids.shape[1] < row.columns + size
    # Each target is predicted once, by the column that predicts it in the whole row.
    width = shares[0].input_ids.shape[1]
    own = torch.cat([share.own_targets for share in shares])
    assert own.sort().values.tolist() == list(range(len(row.targets)))
    columns = torch.cat([share.predicting + rank * width for rank, share in enumerate(shares)])
    assert torch.equal(columns, row.predicting[own])


def test_heads_that_cannot_be_shared_are_refused():
    for size, heads, key_heads in [(2, 4, 2), (4, 4, 2), (4, 8, 8), (4, 28, 4)]:
        check_heads(size, heads, key_heads)
    for size, heads, key_heads in [(3, 4, 4), (4, 12, 6), (8, 28, 4)]:
        with pytest.raises(ConfigError, match=f"{heads} attention heads and {key_heads} key-value heads"):
            check_heads(size, heads, key_heads)


def test_the_config_says_what_goes_together():
    with pytest.raises(ValueError, match="does not divide"):
        TrainingConfig(workers=3, sequence_parallel_size=2)
    with pytest.raises(ValueError, match="=packed, not sdpa"):
        TrainingConfig(workers=2, sequence_parallel_size=2, attn_implementation="sdpa")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sequence")
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2})
    LlamaForCausalLM(config).save_pretrained(directory / "model")
    run_ranks(directory, 1, 1)
    return directory


def run_ranks(work, ranks, size):
    """What rank 0 of so many ranks found, `size` of them to a row."""
    (port,) = free_ports(1)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT)])}
    logs = [work / f"{ranks}-{size}-{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        arguments = [sys.executable, SUPPORT / "sequence_main.py", rank, ranks, port, work, size]
        with log.open("w") as output:
            processes.append(
                subprocess.Popen(list(map(str, arguments)), env=environment, stdout=output, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, "\n".join(log.read_text()[-2000:] for log in logs)
    return torch.load(work / f"sequence-{ranks}-{size}.pt")


@pytest.mark.slow
@pytest.mark.timeout(1200)
# Four ranks have two of a row each; or all have one row, and two share each of the two key-value heads.
@pytest.mark.parametrize(("ranks", "size"), [(2, 2), (4, 2), (4, 4)])
def test_scores_and_gradients_are_those_of_one_process(work, ranks, size):
    alone = torch.load(work / "sequence-1-1.pt")[0]
    for stage, found in run_ranks(work, ranks, size).items():
        assert torch.allclose(found["scores"], alone["scores"], atol=1e-5, rtol=1e-6)
        for name, gradient in alone["gradients"].items():
            off = (found["gradients"][name] - gradient).abs().max()
            assert off < 1e-6 * max(1.0, float(gradient.abs().max())), (stage, name)
        for own, expected in zip(found["stats"], alone["stats"], strict=True):
            assert own["tokens"] == expected["tokens"]
            for key in ("loss", "vft_loss", "alignment_loss", "grad_norm", "right_score", "wrong_score"):
                assert math.isclose(own[key], expected[key], rel_tol=1e-5, abs_tol=1e-6), (stage, key)
