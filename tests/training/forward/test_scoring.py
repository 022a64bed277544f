"""Log-probabilities in chunks equal those of whole logits and hold no more than a chunk; the check before training."""

import copy
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_main import LORA
from torch.profiler import ProfilerActivity, profile
from training_helpers import write_tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from aft_ray.config.run import LoraConfig
from aft_ray.training.forward import scoring
from aft_ray.training.forward.packed_attention import use_packed_attention
from aft_ray.training.forward.packing import empty_row, pack
from aft_ray.training.forward.scoring import (
    LogitsRule,
    chunk_tokens,
    install_scoring,
    response_logprobs,
    shares_prompts,
)
from aft_ray.training.forward.scoring_check import ScoringError, check_scoring
from aft_ray.training.model.loading import load_model
from aft_ray.training.model.lora import add_adapters
from aft_ray.weights.export import write_adapter

SUPPORT = Path(__file__).parents[2] / "support"
CPU = torch.device("cpu")
VOCABULARY, WIDTH = 50, 16


def llama(seed=0, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.15, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def with_scoring(model):
    use_packed_attention(model)
    install_scoring(model)
    return model


def tokens(count, seed=0):
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a few tokens, of whose logits none are kept."""
    monkeypatch.setattr(scoring, "_CHUNK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(scoring, "_SMALLEST_CHUNK", 3)
    monkeypatch.setattr(scoring, "_KEPT_ELEMENTS", 0)


class OwnHead(torch.nn.Linear):
    """A head that is not known, so that it is called chunk by chunk."""


def head_logprobs(head, hidden, targets, rule):
    head.forward = scoring._head_forward.__get__(head)
    return head(hidden, targets=targets, rule=rule)


def whole_logprobs(head, hidden, targets, rule):
    logits = type(head).forward(head, hidden).float() * rule.scale
    if rule.softcap is not None:
        logits = torch.tanh(logits / rule.softcap) * rule.softcap
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def results(compute, head, hidden, targets, rule, weights):
    """The log-probabilities, and the gradients of the hidden states and of the head's parameters that are trained."""
    head, hidden = copy.deepcopy(head), hidden.clone().requires_grad_()
    logprobs = compute(head, hidden, targets, rule)
    logprobs.backward(weights)
    return [logprobs.detach(), hidden.grad, *(p.grad for p in head.parameters() if p.requires_grad)]


RULES = {"plain": LogitsRule(), "scaled": LogitsRule(0.3), "capped": LogitsRule(2.0, 1.5)}


@pytest.mark.parametrize("kind", [torch.nn.Linear, OwnHead])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_chunks_give_the_scores_and_gradients_of_whole_logits(kind, chunked, bias, rule, request):
    if chunked:
        request.getfixturevalue("small_chunks")
    torch.manual_seed(1)
    head, hidden = kind(WIDTH, VOCABULARY, bias=bias), torch.randn(40, WIDTH)
    targets, weights = torch.randint(VOCABULARY, (40,)), torch.randn(40)
    seen = results(head_logprobs, head, hidden, targets, rule, weights)
    for one, expected in zip(seen, results(whole_logprobs, head, hidden, targets, rule, weights), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=2e-6 * max(1.0, float(expected.abs().max())))


def test_a_frozen_head_gets_no_gradient_and_its_input_does(small_chunks):
    head, hidden = torch.nn.Linear(WIDTH, VOCABULARY).requires_grad_(False), torch.randn(9, WIDTH)
    targets = torch.randint(VOCABULARY, (9,))
    seen = results(head_logprobs, head, hidden, targets, LogitsRule(), torch.ones(9))
    expected = results(whole_logprobs, head, hidden, targets, LogitsRule(), torch.ones(9))
    assert len(seen) == 2
    torch.testing.assert_close(seen, expected)


def test_gradients_in_bfloat16_are_as_near_to_float32_as_those_of_whole_logits(small_chunks):
    """The softmax is in float32, and what is added up over chunks is not rounded chunk by chunk."""
    torch.manual_seed(2)
    head, hidden = torch.nn.Linear(WIDTH, VOCABULARY), torch.randn(400, WIDTH)
    targets, weights = torch.randint(VOCABULARY, (400,)), torch.randn(400)
    exact = results(whole_logprobs, head, hidden, targets, LogitsRule(), weights)
    head, hidden = head.bfloat16(), hidden.bfloat16()
    whole = results(whole_logprobs, head, hidden, targets, LogitsRule(), weights)
    chunked = results(head_logprobs, head, hidden, targets, LogitsRule(), weights)
    assert chunked[0].dtype == torch.float32
    for one, other, expected in zip(chunked, whole, exact, strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - expected).norm() <= 1.5 * (other.float() - expected).norm()


def test_a_head_with_an_adapter_is_computed_in_chunks(small_chunks):
    model = llama()
    add_adapters(model, LoraConfig(rank=4, targets=["q_proj", "lm_head"]), "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    own = copy.deepcopy(model)
    with_scoring(model)
    prompt, response = tokens(5), tokens(11, seed=1)
    sums = response_logprobs(model, pack([prompt], [[response]]))
    logits = own(input_ids=torch.tensor([prompt + response])).logits[0, 4:-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
    assert sums.item() == pytest.approx(expected.item(), abs=1e-5)
    sums.sum().backward()
    expected.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in trained)
    for name, parameter in own.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[name], parameter.grad, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 8), min_size=1, max_size=5)), min_size=1, max_size=4),
    st.integers(0, 1000),
)
def test_what_else_is_in_a_row_changes_no_score(shape, seed):
    model = with_scoring(llama(seed=3))
    source = iter(range(seed, seed + 1000))
    prompts = [tokens(count, next(source)) for count, _ in shape]
    responses = [[tokens(count, next(source)) for count in counts] for _, counts in shape]
    with torch.no_grad():
        together = response_logprobs(model, pack(prompts, responses))
        alone = [
            response_logprobs(model, pack([prompt], [[response]])).item()
            for prompt, of_prompt in zip(prompts, responses, strict=True)
            for response in of_prompt
        ]
    assert together.tolist() == pytest.approx(alone, abs=2e-5)


def test_a_row_without_responses_calls_the_same_modules_and_has_gradients_of_zero():
    model = with_scoring(llama())
    called = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    full = response_logprobs(model, pack([tokens(3)], [[tokens(4), tokens(2)]]))
    modules = called.copy()
    called.clear()
    empty = response_logprobs(model, empty_row(0))
    assert called == modules
    assert full.shape == (2,)
    assert empty.shape == (0,)
    empty.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_model_keeps_its_modules_its_weights_and_its_own_forward_pass():
    model = llama()
    plain = copy.deepcopy(model)
    with_scoring(model)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    ids = torch.tensor([tokens(6)])
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


# ---- Memory ----


def allocations(model, row):
    """The largest tensor that a forward and a backward pass allocate, and the most that they hold, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        response_logprobs(model, row).sum().backward()
    sizes = [e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(sizes), max(accumulate(sizes))


def test_no_logits_are_larger_than_a_chunk_and_more_responses_hold_only_their_hidden_states():
    vocabulary, width, length = 150_000, 8, 64
    model = with_scoring(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary, hidden_size=width, intermediate_size=8, num_hidden_layers=1,
                num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True,
            )
        )
    )  # fmt: skip
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)  # gradients that are as large as the vocabulary would hide what is measured
    chunk = 4 * chunk_tokens(vocabulary, "cpu") * vocabulary
    few, many = (allocations(model, pack([tokens(10)], [[tokens(length, seed) for seed in range(k)]])) for k in (8, 32))
    for largest, held in (few, many):
        assert largest <= chunk
        assert held <= 3 * chunk
    # 20 float32 tensors of the width of the hidden states, for each further target.
    assert many[1] - few[1] <= 20 * 4 * width * length * 24


def test_nothing_is_kept_of_scores_without_gradients():
    """Few enough logits are kept for the backward pass, and a pass without gradients has none."""
    head, hidden, targets = torch.nn.Linear(8, 20_000), torch.randn(400, 8), torch.zeros(400, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, torch.no_grad():
        head_logprobs(head, hidden, targets, LogitsRule())
    sizes = [e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(sizes) <= 4 * 128 * 20_000


# ---- The check before training ----


def own_logprob(model, prompt, response):
    logits = type(model).forward(model, input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum().item()


def test_a_model_that_does_not_pass_the_layout_on_is_seen_and_computes_plain_rows(capsys):
    """As one with code of its own may do: its packed rows are ordinary causal rows."""
    model = with_scoring(llama())
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, options: (args, {**options, "packed_layout": None}), with_kwargs=True
        )
    assert shares_prompts(model)
    check_scoring(model, CPU)
    assert not shares_prompts(model)
    assert capsys.readouterr().err == (
        "LlamaForCausalLM computes a prompt again for each of its responses, because packed rows give other scores "
        "than plain ones\n"
    )
    prompt, responses = tokens(4), [tokens(5, seed=1), tokens(2, seed=2)]
    with torch.no_grad():
        sums = response_logprobs(model, pack([prompt], [responses]))
        assert sums.tolist() == pytest.approx([own_logprob(model, prompt, one) for one in responses], abs=1e-5)


class TwiceAsSure(LlamaForCausalLM):
    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = output.logits * 2
        return output


def test_a_model_that_changes_its_logits_in_an_unknown_way_computes_them_itself(capsys):
    model = with_scoring(TwiceAsSure(llama().config))
    check_scoring(model, CPU)
    assert "TwiceAsSure computes all logits of a pass at once" in capsys.readouterr().err
    prompt, responses = tokens(4), [tokens(5, seed=1), tokens(2, seed=2)]
    with torch.no_grad():
        sums = response_logprobs(model, pack([prompt], [responses]))
        assert sums.tolist() == pytest.approx([own_logprob(model, prompt, one) for one in responses], abs=1e-5)


def test_a_model_whose_layers_are_not_causal_is_refused():
    config = AutoConfig.for_model(
        "bert", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = with_scoring(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ScoringError, match="BertLMHeadModel scores a response differently with padding behind it"):
        check_scoring(model, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_leaves_no_trace(dtype, capsys):
    model = with_scoring(llama(attention_dropout=0.1).to(dtype))
    state = torch.get_rng_state()
    check_scoring(model, CPU)
    assert shares_prompts(model)
    assert capsys.readouterr().err == ""
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_weights_that_are_not_numbers_are_left_to_the_loss():
    model = with_scoring(llama())
    model.lm_head.weight.data[7] = float("nan")
    check_scoring(model, CPU)
    assert shares_prompts(model)


# ---- DeepSpeed ----


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_of_zero_3_with_different_numbers_of_chunks_add_up_their_gradients(tmp_path):
    """Each rank gathers the head once for all its chunks, or the ranks would wait for each other for ever."""
    write_tiny_llama(tmp_path / "model")
    model = load_model(tmp_path / "model", "float32")
    add_adapters(model, LORA, str(tmp_path / "model"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    write_adapter(model, tmp_path / "adapter", 0)
    command = [sys.executable, str(SUPPORT / "chunks_main.py")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT)])}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "3", str(tmp_path / "store"), str(tmp_path)],
            env=environment | {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in ranks:
            process.kill()
    results = torch.load(tmp_path / "chunks.pt")
    assert any("lm_head.lora_A" in name for name in results["adapters"])
    for kind in ("weights", "adapters"):
        norm = torch.stack([alone.norm() for _, alone in results[kind].values()]).norm()
        for name, (summed, alone) in results[kind].items():
            assert (summed - alone).abs().max() <= 2e-6 * norm, (kind, name)
