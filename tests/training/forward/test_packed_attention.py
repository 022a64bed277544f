"""Attention over packed rows against a dense mask: outputs, gradients, windows, caps, dropout, and what it costs."""

import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import write_tiny_llama
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
)
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from aft_ray.config.run import ConfigError
from aft_ray.training.forward.packed_attention import (
    PACKED,
    PackedAttentionError,
    cannot_share_prompts,
    packed_attention,
    packed_inputs,
    register,
    use_packed_attention,
)
from aft_ray.training.forward.packed_flex import BLOCK, block_mask, flex, mask_mod
from aft_ray.training.forward.packing import PackedPrompt, pack
from aft_ray.training.model.loading import LoadingError, load_model

register()

layouts = st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(0, 30), max_size=5)), min_size=1, max_size=4).map(
    lambda groups: layout_of(*groups)
)
# The kind of mask: causal, or a window or a chunk of some tokens.
kinds = st.sampled_from(["causal", "window", "chunk"])


def layout_of(*groups):
    layout, start = [], 0
    for tokens, responses in groups:
        layout.append(PackedPrompt(start, tokens, tuple(responses)))
        start = layout[-1].stop
    return tuple(layout)


def what_transformers_says(layout, kind="causal", size=8):
    """The mask that a model of this kind would pass to its layers."""
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, attn_implementation=PACKED)
    config.sliding_window = config.attention_chunk_size = size
    columns = layout[-1].stop
    create = {
        "causal": create_causal_mask,
        "window": create_sliding_window_causal_mask,
        "chunk": create_chunked_causal_mask,
    }[kind]
    return create(
        config=config,
        inputs_embeds=torch.zeros(1, columns, 32),
        attention_mask=torch.ones(1, columns, dtype=torch.int64),
        past_key_values=None,
    )


def dense_mask(layout, kind="causal", size=8):
    """[columns, columns] bool, token by token: the reference."""
    tokens = []
    for group, one in enumerate(layout):
        tokens += [(group, None, position) for position in range(one.tokens)]
        for number, columns in enumerate(one.responses):
            tokens += [(group, number, one.tokens + offset) for offset in range(columns)]

    def sees(query, key):
        group, response, position = query
        other, of_key, past = key
        if group != other or of_key not in (None, response) or past > position:
            return False
        if kind == "window":
            return past > position - size
        return kind == "causal" or past // size == position // size

    return torch.tensor([[sees(query, key) for key in tokens] for query in tokens])


def tensors(layout, heads, shared, dtype=torch.float64, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = layout[-1].stop

    def one(heads):
        values = torch.randn(1, columns, heads, width, generator=generator, dtype=torch.float64)
        return values.to(dtype).transpose(1, 2).requires_grad_()

    return one(heads), one(heads // shared), one(heads // shared)


def attend(query, key, value, layout, mask, **options):
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1])
    out, weights = packed_attention(module, query, key, value, mask, packed_layout=layout, **options)
    assert weights is None
    return out


def dense_attention(query, key, value, mask, softcap=None):
    """[1, columns, heads, width]."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    return (scores.masked_fill(~mask, -math.inf).softmax(-1) @ value).transpose(1, 2)


def gradients(out, inputs, seed=1):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad((out * weights.to(out.dtype)).sum(), inputs)


@settings(max_examples=60, deadline=None)
@given(layout=layouts, kind=kinds, shared=st.sampled_from([1, 2, 4]), softcap=st.sampled_from([None, 2.0]))
def test_outputs_and_gradients_are_those_of_a_dense_mask(layout, kind, shared, softcap):
    inputs = tensors(layout, 4, shared)
    out = attend(*inputs, layout, what_transformers_says(layout, kind), softcap=softcap)
    expected = dense_attention(*inputs, dense_mask(layout, kind), softcap)
    assert torch.allclose(out, expected, atol=1e-12, rtol=0)
    for own, reference in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        assert torch.allclose(own, reference, atol=1e-11, rtol=0)


@pytest.mark.parametrize("kind", ["causal", "window"])
def test_float32_is_exact_to_its_rounding(kind):
    layout = layout_of((40, [30, 0, 25, 30]), (1, [3]), (17, []), (33, [1, 64]))
    mask = dense_mask(layout, kind)
    inputs = tensors(layout, 4, 2, torch.float32)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out = attend(*inputs, layout, what_transformers_says(layout, kind))
    expected = dense_attention(*exact, mask)
    assert (out - expected).abs().max() < 1e-6
    for own, reference in zip(gradients(out, inputs), gradients(expected, exact), strict=True):
        assert (own - reference).abs().max() < 1e-6 * reference.abs().max()


def test_large_scores_stay_finite():
    layout = layout_of((5, [4, 4, 4]))
    inputs = [(tensor.detach() * 60).requires_grad_() for tensor in tensors(layout, 4, 1, torch.float32)]
    out = attend(*inputs, layout, what_transformers_says(layout))
    expected = dense_attention(*(tensor.double() for tensor in inputs), dense_mask(layout))
    assert torch.allclose(out.double(), expected, atol=1e-3)
    assert all(gradient.isfinite().all() for gradient in gradients(out, inputs))


def test_bfloat16_is_exact_to_its_rounding():
    layout = layout_of((40, [30, 25, 30]), (33, [1, 64]))
    inputs = tensors(layout, 4, 2, torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out = attend(*inputs, layout, what_transformers_says(layout))
    expected = dense_attention(*exact, dense_mask(layout))
    assert (out - expected).abs().max() < 2**-7 * expected.abs().max()
    for own, reference in zip(gradients(out, inputs), gradients(expected, exact), strict=True):
        assert (own - reference).abs().max() < 2**-6 * reference.abs().max()


def test_values_of_another_width_than_keys():
    layout = layout_of((7, [5, 6]))
    query, key, _ = tensors(layout, 4, 1)
    value = tensors(layout, 4, 1, width=8, seed=3)[2]
    out = attend(query, key, value, layout, what_transformers_says(layout))
    assert torch.allclose(out, dense_attention(query, key, value, dense_mask(layout)), atol=1e-12)


def test_attention_dropout_keeps_the_mean_and_repeats_with_the_random_state():
    layout = layout_of((6, [4, 5, 3]))
    inputs = [tensor.detach() for tensor in tensors(layout, 4, 2, torch.float32)]
    mask = what_transformers_says(layout)
    without = attend(*inputs, layout, mask)
    torch.manual_seed(0)
    draws = torch.stack([attend(*inputs, layout, mask, dropout=0.2) for _ in range(3000)])
    torch.manual_seed(0)
    assert torch.equal(attend(*inputs, layout, mask, dropout=0.2), draws[0])
    error = (draws.mean(0) - without).abs()
    assert (draws[0] - without).abs().max() > 0.1
    assert (error < 6 * draws.std(0) / math.sqrt(len(draws)) + 1e-6).all()


def test_a_response_does_not_feel_its_neighbours_under_dropout():
    layout = layout_of((6, [4, 5, 3]))
    query, key, value = tensors(layout, 4, 1, torch.float32)
    out = attend(query, key, value, layout, what_transformers_says(layout), dropout=0.3)
    (gradient,) = torch.autograd.grad(out[:, 10:15].sum(), value)
    assert gradient[:, :, :6].abs().sum() > 0
    assert gradient[:, :, 6:10].abs().sum() == 0
    assert gradient[:, :, 15:].abs().sum() == 0


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(("kind", "options"), [("causal", {}), ("window", {}), ("causal", {"dropout": 0.1})])
def test_nothing_is_quadratic_in_the_row(kind, options):
    # 40 groups of 4 responses: 7,200 columns, and a sequence has 60.
    layout = layout_of(*[(20, [40, 40, 40, 40])] * 40)
    inputs = tensors(layout, 2, 1, torch.float32, width=16)
    with LargestTensor() as largest:
        mask = what_transformers_says(layout, kind)
        gradients(attend(*inputs, layout, mask, **options), inputs)
    assert largest.elements <= 7200 * 2 * 16


def test_full_causal_attention_needs_no_mask_at_all():
    layout = layout_of((64, [512, 512]))
    inputs = tensors(layout, 1, 1, torch.float32, width=8)
    with LargestTensor() as largest:
        gradients(attend(*inputs, layout, what_transformers_says(layout)), inputs)
        # A window that is longer than every sequence masks nothing.
        gradients(attend(*inputs, layout, what_transformers_says(layout, "window", 576)), inputs)
    assert largest.elements <= 1088 * 32


# ---- FlexAttention: its functions on the CPU ----


@settings(max_examples=40, deadline=None)
@given(layout=layouts, kind=kinds)
def test_the_mask_function_of_flex_attention_is_the_dense_mask(layout, kind):
    says = what_transformers_says(layout, kind)
    sees = mask_mod(layout, says.function(layout), torch.device("cpu"))
    columns = torch.arange(layout[-1].stop)
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(sees(zero, zero, columns[:, None], columns[None, :]), dense_mask(layout, kind))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", ["causal", "window", "chunk"])
def test_flex_attention_uncompiled_gives_the_same_output(kind, softcap):
    layout = layout_of((30, [60, 0, 50]), (1, [4]), (100, [90, 70]))
    says = what_transformers_says(layout, kind)
    inputs = [tensor.detach() for tensor in tensors(layout, 4, 2, torch.float32)]
    blocks = block_mask(layout, says.function(layout), torch.device("cpu"))
    with torch.no_grad():
        out = flex(*inputs, blocks, 0.25, softcap).transpose(1, 2)
    expected = attend(*inputs, layout, says, softcap=softcap, scaling=0.25)
    assert torch.allclose(out, expected, atol=2e-6)


@settings(max_examples=20, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(1, 300), st.lists(st.integers(0, 300), max_size=4)), min_size=1, max_size=3),
    kind=kinds,
    strip=st.sampled_from([1, 1 << 17, 1 << 24]),
)
def test_the_block_mask_has_the_blocks_of_the_dense_mask(groups, kind, strip):
    layout = layout_of(*groups)
    function = what_transformers_says(layout, kind, 200).function(layout)
    sees = mask_mod(layout, function, torch.device("cpu"))
    columns = torch.arange(layout[-1].stop)
    zero = torch.zeros((), dtype=torch.int64)
    dense = sees(zero, zero, columns[:, None], columns[None, :])
    blocks = -(-len(columns) // BLOCK)
    margin = blocks * BLOCK - len(columns)
    counts = torch.nn.functional.pad(dense, (0, margin, 0, margin)).view(blocks, BLOCK, blocks, BLOCK).sum((1, 3))
    made = block_mask(layout, function, torch.device("cpu"), strip)
    for number, indexes, expected in (
        (made.kv_num_blocks, made.kv_indices, (counts > 0) & (counts < BLOCK**2)),
        (made.full_kv_num_blocks, made.full_kv_indices, counts == BLOCK**2),
    ):
        listed = [row[:n].tolist() for n, row in zip(number[0, 0].tolist(), indexes[0, 0], strict=True)]
        assert listed == [row.nonzero()[:, 0].tolist() for row in expected]


# ---- In a model ----


def a_row():
    generator = torch.Generator().manual_seed(0)

    def some(tokens):
        return torch.randint(0, 64, (tokens,), generator=generator).tolist()

    return pack(
        [some(7), some(1), some(20)], [[some(5), some(1), some(9)], [some(3)], [some(12), some(4), some(4), some(30)]]
    )


def packed_scores(model, row):
    logits = model(**packed_inputs(row)).logits[0, row.predicting]
    return logits.log_softmax(-1).gather(1, row.targets[:, None])[:, 0]


def plain_scores(model, row):
    """The same targets, each response in a forward pass of its own."""
    scores, first = [], 0
    targets = row.targets.split(row.lengths.tolist())
    for one in row.layout:
        prompt = row.input_ids[0, one.start : one.start + one.tokens]
        for _ in one.responses:
            ids = torch.cat([prompt, targets[first]])[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, one.tokens - 1 : -1]
            scores.append(logits.log_softmax(-1).gather(1, targets[first][:, None])[:, 0])
            first += 1
    return torch.cat(scores)


def tiny(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(config)).train()
    use_packed_attention(model)
    return model


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = LlamaConfig(**SIZES)
# One layer with a window that the longest sequence exceeds, one without, and soft-capped scores in both.
GEMMA = Gemma2Config(**SIZES, head_dim=8, sliding_window=16, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma2"])
def test_a_model_scores_a_packed_row_as_plain_rows(config, checkpointing):
    model, row = tiny(config), a_row()
    assert cannot_share_prompts(model) is None
    # Gemma's plain rows need soft-capping, too, which transformers has in its own implementation.
    reference = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="eager").train()
    reference.load_state_dict(model.state_dict())
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    scores, expected = packed_scores(model, row), plain_scores(reference, row)
    assert torch.allclose(scores, expected, atol=2e-6, rtol=0)
    weights = torch.linspace(-1, 1, len(scores))
    (scores * weights).sum().backward()
    (expected * weights).sum().backward()
    for own, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert (own.grad - other.grad).abs().max() < 1e-6 * max(1, other.grad.abs().max())


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma2"])
def test_padded_rows_are_computed_as_before(config):
    model = tiny(config).eval()
    reference = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="eager").eval()
    reference.load_state_dict(model.state_dict())
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    for attention_mask in (mask, None):
        with torch.no_grad():
            own, other = (one(input_ids=ids, attention_mask=attention_mask).logits for one in (model, reference))
        real = mask.bool() if attention_mask is not None else torch.ones_like(mask).bool()
        assert torch.allclose(own[real], other[real], atol=2e-6)
    generated = [one.generate(ids[:1], max_new_tokens=8, do_sample=False) for one in (model, reference)]
    assert torch.equal(*generated)


def test_a_row_without_the_attention_mask_is_refused():
    row = a_row()
    with pytest.raises(PackedAttentionError, match="packed_inputs"):
        tiny(LLAMA)(**packed_inputs(row) | {"attention_mask": None})


def test_arguments_that_would_change_the_output_are_refused():
    layout = layout_of((3, [2]))
    inputs, mask = tensors(layout, 4, 1), what_transformers_says(layout)
    with pytest.raises(PackedAttentionError, match="passes s_aux"):
        attend(*inputs, layout, mask, s_aux=torch.zeros(4))
    with pytest.raises(PackedAttentionError, match="is not causal"):
        attend(*inputs, layout, mask, is_causal=False)
    with pytest.raises(PackedAttentionError, match="attention sinks"):
        attend(*inputs, None, None, s_aux=torch.zeros(4))
    assert attend(*inputs, layout, mask, sliding_window=None, position_ids=None, s_aux=None).shape == (1, 5, 4, 16)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, head_dim=8), "attention sinks"),
        (JambaConfig(**SIZES, num_experts=2, attn_layer_period=2, attn_layer_offset=1), "Jamba"),
        (Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]), "layers of the kind conv"),
        (BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4), "attention functions of others"),
        (
            FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True),
            "attention functions of others",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)  # fmt: skip
def test_models_that_cannot_share_prompts(config, reason):
    model = tiny(config)
    assert reason in cannot_share_prompts(model)
    assert model.config._attn_implementation != PACKED
    assert torch.isfinite(model(input_ids=torch.arange(6)[None], use_cache=False).logits).all()


# ---- training.attn_implementation ----


def test_the_attention_of_a_loaded_model(tmp_path):
    directory = write_tiny_llama(tmp_path)
    assert cannot_share_prompts(load_model(directory, "float32")) is None
    model = load_model(directory, "float32", attn_implementation="eager")
    assert cannot_share_prompts(model) == "its attention implementation is eager"
    with pytest.raises(ConfigError, match="attn_implementation=spda is not known to transformers; use one of packed"):
        load_model(directory, "float32", attn_implementation="spda")
    with pytest.raises(LoadingError, match="attn_implementation=flash_attention_2: "):
        load_model(directory, "float32", attn_implementation="flash_attention_2")


def test_a_row_of_one_token():
    layout = layout_of((1, [0]))
    inputs = tensors(layout, 4, 1)
    out = attend(*inputs, layout, what_transformers_says(layout))
    assert torch.equal(out, inputs[2].transpose(1, 2))
