"""Scores and gradients of packed rows and of plain rows are those of each model's own forward pass, in float32."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from aft_ray.training.forward.packed_attention import use_packed_attention
from aft_ray.training.forward.packing import pack
from aft_ray.training.forward.scoring import install_scoring, response_logprobs, shares_prompts
from aft_ray.training.forward.scoring_check import check_scoring

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Responses are longer than this, also without their prompt.
WINDOW = {"sliding_window": 3}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARING = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2, biases": ("qwen2", {}),
    "qwen3, norms of queries and keys": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 moe": ("qwen3_moe", EXPERTS),
    "mistral, sliding window": ("mistral", WINDOW),
    "gemma2, soft caps and sliding window": (
        "gemma2",
        {**ALTERNATING, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    ),
    "gemma3, sliding window": ("gemma3_text", {**ALTERNATING, "query_pre_attn_scalar": 16}),
    "granite, scaled logits": ("granite", {"logits_scaling": 3.0}),
    "cohere, scaled logits": ("cohere", {"logit_scale": 0.3, "tie_word_embeddings": True}),
    "gpt neox": ("gpt_neox", {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
}
WITH_ROWS = {
    "mamba, state space": ("mamba", {"state_size": 8}),
    "bloom, distances": ("bloom", {"n_layer": 2, "n_head": 2}),
    "mpt, distances": ("mpt", {"d_model": 32, "n_heads": 2, "n_layers": 2}),
    "lfm2, convolutions": ("lfm2", {"full_attn_idxs": [1]}),
    "recurrent gemma, soft cap": ("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 32}),
}
PROMPTS = [[5, 17, 33, 8, 21, 9], [40, 41]]
RESPONSES = [[[3, 60, 61, 62, 63, 64, 3], [70], [3, 60, 80, 81, 2]], [[90, 91, 92, 93, 94, 2], [90, 2]]]
WEIGHTS = torch.tensor([0.7, -1.3, 0.4, 1.1, -0.6])


def build(family, options):
    """A model as transformers builds it, whose eager attention honours all that its config says."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases that differ from token to token
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def scored(model):
    model = copy.deepcopy(model)
    use_packed_attention(model)
    install_scoring(model)
    check_scoring(model, CPU)
    return model


def own_logprobs(model):
    """The log-probability of each response by the model's own forward pass on its prompt and itself alone."""
    sums = []
    for prompt, responses in zip(PROMPTS, RESPONSES, strict=True):
        for response in responses:
            logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits
            logprobs = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            sums.append(logprobs.gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(sums)


def assert_equal_to_own(model, own):
    """No score per token is off by 2e-6 nats, and no number of the gradient by a millionth of the gradient's norm."""
    row = pack(PROMPTS, RESPONSES)
    model.zero_grad()
    own.zero_grad()
    sums, expected = response_logprobs(model, row), own_logprobs(own)
    assert (sums - expected).abs().div(row.lengths).max() <= 2e-6
    (sums * WEIGHTS).sum().backward()
    (expected * WEIGHTS).sum().backward()
    norm = torch.stack([p.grad.norm() for p in own.parameters() if p.grad is not None]).norm()
    for (name, parameter), other in zip(model.named_parameters(), own.parameters(), strict=True):
        if other.grad is not None:
            assert (parameter.grad - other.grad).abs().max() <= 1e-6 * norm, name


@pytest.mark.parametrize(("family", "options"), SHARING.values(), ids=SHARING)
def test_a_model_that_shares_prompts_scores_as_its_own_forward_pass_does(family, options, capsys):
    own = build(family, options)
    model = scored(own)
    assert shares_prompts(model)
    assert capsys.readouterr().err == ""
    assert_equal_to_own(model, own)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_equal_to_own(model, own)
    model.scoring = replace(model.scoring, shares_prompts=False)
    assert_equal_to_own(model, own)


@pytest.mark.parametrize(("family", "options"), WITH_ROWS.values(), ids=WITH_ROWS)
def test_a_model_that_cannot_share_prompts_says_so_and_scores_as_its_own_forward_pass_does(family, options, capsys):
    own = build(family, options)
    model = scored(own)
    assert not shares_prompts(model)
    assert "computes a prompt again for each of its responses, because" in capsys.readouterr().err
    assert_equal_to_own(model, own)


def test_a_model_whose_logits_are_not_known_computes_them_itself(capsys):
    own = build("falcon_h1", {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16})
    model = scored(own)
    assert "computes all logits of a pass at once" in capsys.readouterr().err
    assert_equal_to_own(model, own)


def test_a_sliding_window_and_soft_caps_matter_here():
    """Without them the models score differently, so that the comparisons above would see one that is not honoured."""
    for label, without in [
        ("mistral, sliding window", {"sliding_window": None}),
        ("gemma3, sliding window", {"layer_types": ["full_attention"] * 2}),
        ("gemma2, soft caps and sliding window", {"layer_types": ["full_attention"] * 2}),
        ("gemma2, soft caps and sliding window", {"attn_logit_softcapping": None}),
    ]:
        family, options = SHARING[label]
        with torch.no_grad():
            difference = own_logprobs(build(family, options)) - own_logprobs(build(family, {**options, **without}))
        assert difference.abs().max() > 1e-3, (label, without)
