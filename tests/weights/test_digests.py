"""The digest of a tensor depends on all of its bits, their order, its dtype and its shape, and on nothing else."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from aft_ray.weights import digests
from aft_ray.weights.digests import read_digests, tensor_digest, write_digests

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int64, torch.float8_e4m3fn]
# Around a word, and around a row, of the digest.
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([16383, 16384, 16385, 32768, 40_001, 81_920]))


def random_tensor(size, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    content = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return content.view(dtype)


@settings(max_examples=150, deadline=None)
@given(SIZES, st.sampled_from(DTYPES), st.integers(0, 1000), st.randoms())
def test_every_flipped_bit_changes_it(size, dtype, seed, choose: random.Random):
    tensor = random_tensor(size, dtype, seed)
    before = tensor_digest(tensor)
    content = tensor.clone().view(torch.uint8)
    content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    assert tensor_digest(content.view(dtype)) != before
    assert tensor_digest(tensor) == before


@settings(max_examples=150, deadline=None)
@given(SIZES, st.sampled_from([torch.bfloat16, torch.float32]), st.integers(0, 1000), st.randoms())
def test_two_swapped_elements_change_it(size, dtype, seed, choose: random.Random):
    tensor = random_tensor(size + 1, dtype, seed)
    one, other = choose.sample(range(size + 1), 2)
    swapped = tensor.clone()
    swapped[[one, other]] = tensor[[other, one]]
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    same = torch.equal(swapped.view(bits), tensor.view(bits))
    assert (tensor_digest(swapped) == tensor_digest(tensor)) is same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_swap_with_the_negative_changes_it(dtype):
    """Only the highest bit of each differs."""
    tensor = torch.ones(1 << 16, dtype=dtype)
    seen = set()
    for place in range(0, len(tensor), 97):
        negative = tensor.clone()
        negative[place] = -1
        seen.add(tensor_digest(negative))
    assert len(seen) == len(range(0, len(tensor), 97))


def test_order_shape_and_dtype_change_it():
    square = torch.randn(64, 64)
    variants = [
        square,
        square.T,
        square.flip(0),
        square.flip(1),
        square.roll(1, 0),
        square.view(32, 128),
        square.view(-1),
        square.view(1, 64, 64),
        square.view(torch.int32),
        square[:63],
        torch.cat([square, square.new_zeros(1, 64)]),
        square * 1.01,
        torch.zeros(64, 64),
        torch.zeros(0),
        torch.zeros(0, 3),
        torch.tensor(0.0),
        torch.tensor(-0.0),
    ]
    assert len({tensor_digest(one) for one in variants}) == len(variants)
    half = torch.randn(8).half()
    assert tensor_digest(half) != tensor_digest(half.view(torch.bfloat16))


def test_swapped_rows_and_blocks_of_a_large_tensor_change_it():
    tensor = torch.randn(8, 1 << 14)
    seen = {tensor_digest(tensor)}
    for one in range(8):
        for other in range(one):
            swapped = tensor.clone()
            swapped[[one, other]] = tensor[[other, one]]
            seen.add(tensor_digest(swapped))
    assert len(seen) == 1 + 28


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_layout_and_alignment_do_not_change_it(dtype):
    tensor = random_tensor(30_003, dtype, 0).view(73, 411)
    digest = tensor_digest(tensor)
    assert tensor_digest(tensor.T.contiguous().T) == digest
    wide = tensor.new_zeros(73, 1000)
    wide[:, 7:418] = tensor
    assert tensor_digest(wide[:, 7:418]) == digest
    for offset in range(1, 5):
        buffer = tensor.new_zeros(30_010)
        buffer[offset : offset + 30_003] = tensor.view(-1)
        assert tensor_digest(buffer[offset : offset + 30_003].view(73, 411)) == digest


def test_the_size_of_the_steps_does_not_change_it(monkeypatch):
    tensor = torch.randn(300_000)
    digest = tensor_digest(tensor)
    for rows in (1, 3, 256):
        monkeypatch.setitem(digests._ROWS_AT_ONCE, "cpu", rows)
        assert tensor_digest(tensor) == digest


def test_parameters_and_scalars_have_one():
    parameter = torch.nn.Parameter(torch.randn(5))
    assert tensor_digest(parameter) == tensor_digest(parameter.data)
    assert -(2**63) <= tensor_digest(torch.tensor(3)) < 2**63


def test_it_is_the_same_number_in_every_version():
    """Files and streams carry digests from one process to another."""
    assert tensor_digest(torch.arange(100_000, dtype=torch.float32)) == -8389371238304452167


def test_a_file_carries_digests_in_its_metadata(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}
    expected = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", **write_digests(expected)})
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert read_digests(file.metadata()) == expected
    assert read_digests(None) == read_digests({"format": "pt"}) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")
def test_a_gpu_gives_the_same_number():
    for dtype in DTYPES:
        tensor = random_tensor(5_000_001, dtype, 1)
        assert tensor_digest(tensor.cuda()) == tensor_digest(tensor)
