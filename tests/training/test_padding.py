"""Padding attends to itself, and the scores and gradients of tokens are those without padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_helpers import PAD, SIZES, random_groups, write_tiny_llama
from transformers import AttentionMaskInterface, AutoModelForCausalLM, MistralConfig, MistralForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, sdpa_mask

from aft_ray.objectives import build_objective
from aft_ray.training.collate import collate
from aft_ray.training.loading import load_model
from aft_ray.training.step import response_logprobs

OBJECTIVE = build_objective("aft_boundary")


def write_windowed(directory):
    """Writes a random model whose queries see 4 tokens at most, fewer than a row can have of padding."""
    torch.manual_seed(1)
    MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["full attention", "sliding window"])
def model(request, tmp_path_factory):
    write = write_tiny_llama if request.param == "full attention" else write_windowed
    return load_model(write(tmp_path_factory.mktemp("model")), "float32")


def masks(model, batch):
    """The masks that the model makes of a batch, as transformers builds them with what is registered."""
    embeddings = torch.zeros(*batch.input_ids.shape, 1)
    make = create_sliding_window_causal_mask if getattr(model.config, "sliding_window", None) else create_causal_mask
    return make(model.config, embeddings, batch.attention_mask, None, batch.position_ids)


def scores_and_gradients(model, batch):
    model.zero_grad()
    sums, tokens = response_logprobs(model, batch)
    (sums / tokens).sum().backward()
    return sums.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 5))
def test_every_query_of_every_batch_attends_to_something_and_tokens_to_what_they_did(model, seed, count):
    batch = collate(random_groups(count, seed=seed), OBJECTIVE, PAD)
    mask = masks(model, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AttentionMaskInterface._global_mapping, "sdpa", sdpa_mask)
        before = masks(model, batch)
    if mask is None:  # no padding: plain causal attention
        assert before is None
        return
    assert mask.any(dim=-1).all()
    token = batch.attention_mask.bool()
    assert torch.equal(mask[:, 0][token], before[:, 0][token])  # the rows of tokens
    seen_by = mask[:, 0].transpose(1, 2)[~token]  # for each padding key, the queries that attend to it
    assert (seen_by.sum(dim=1) <= 1).all()


def test_scores_and_gradients_are_those_of_rows_without_padding(model):
    groups = random_groups(6, seed=3)
    batch = collate(groups, OBJECTIVE, PAD)
    assert not batch.attention_mask.all()
    padded, gradients = scores_and_gradients(model, batch)
    alone = [torch.zeros_like(gradient) for gradient in gradients]
    for row in range(len(batch.input_ids)):
        token = batch.attention_mask[row].bool()
        responses = int(batch.response_mask[row].sum())
        lone = type(batch)(
            question_ids=(),
            input_ids=batch.input_ids[row : row + 1, token],
            attention_mask=torch.ones(1, int(token.sum()), dtype=torch.long),
            position_ids=torch.arange(int(token.sum()))[None],
            response_mask=torch.ones(1, responses, dtype=torch.bool),
            **{
                name: getattr(batch, name)
                for name in ("group_of_row", "slot_of_row", "rewards", "correct", "sampler_scores", "mask")
            },
        )
        score, own = scores_and_gradients(model, lone)
        assert score.item() == pytest.approx(padded[row].item(), abs=1e-5)
        for total, gradient in zip(alone, own, strict=True):
            total += gradient
    for gradient, total in zip(gradients, alone, strict=True):
        assert torch.allclose(gradient, total, atol=1e-5)


def test_transformers_alone_leaves_rows_empty(tmp_path):
    """The reason for the mask: when this fails, transformers fills the rows itself."""
    model = AutoModelForCausalLM.from_pretrained(write_tiny_llama(tmp_path), attn_implementation="sdpa")
    batch = collate(random_groups(6, seed=3), OBJECTIVE, PAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AttentionMaskInterface._global_mapping, "sdpa", sdpa_mask)
        assert not masks(model, batch).any(dim=-1).all()
