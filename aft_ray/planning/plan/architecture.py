"""What the arithmetic needs to know of a model: the sizes of a decoder of Llama's shape, and the counts they give.

Invariant: `parameters` is exact; a test compares every preset with the model that transformers builds on the meta
device. A model of another shape is refused, never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aft_ray.config.run import ConfigError, RunConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder: `layers` times grouped-query attention and a gated MLP, RMSNorm before each, an embedding and a head.

    attention_bias: bias vectors of the layer's linear maps, counted in outputs (0 without). head_norms: RMSNorm on
    every query and key head, as Qwen3 has.
    """

    name: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    head_size: int = 128
    tied: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False

    @property
    def query_width(self) -> int:
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def layer_parameters(self) -> int:
        h, f, q, kv = self.hidden, self.intermediate, self.query_width, self.kv_width
        attention = h * q + 2 * h * kv + q * h
        biases = (
            (q + 2 * kv if self.attention_bias else 0)
            + (h if self.output_bias else 0)
            + (2 * f + h if self.mlp_bias else 0)
        )
        return attention + 3 * h * f + 2 * h + biases + (2 * self.head_size if self.head_norms else 0)

    @property
    def embedding_parameters(self) -> int:
        """Of the token embedding; the head has as many, or none of its own when they are tied."""
        return self.vocabulary * self.hidden

    @property
    def body_parameters(self) -> int:
        """All but embedding and head: what every token is multiplied with."""
        return self.layers * self.layer_parameters + self.hidden

    @property
    def parameters(self) -> int:
        return self.body_parameters + self.embedding_parameters * (1 if self.tied else 2)

    def parameters_how(self) -> str:
        ends = "1 x" if self.tied else "2 x"
        return (
            f"{self.layers} layers x {self.layer_parameters:,} + {self.hidden:,} (last norm) + {ends} "
            f"{self.vocabulary:,} x {self.hidden:,} ({'tied embedding' if self.tied else 'embedding and head'})"
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear maps of a layer by the names transformers gives them: (inputs, outputs)."""
        h, f, q, kv = self.hidden, self.intermediate, self.query_width, self.kv_width
        return {
            "q_proj": (h, q),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (q, h),
            "gate_proj": (h, f),
            "up_proj": (h, f),
            "down_proj": (f, h),
        }

    def lora_parameters(self, rank: int, targets: list[str]) -> int:
        """Of the adapters: two matrices, inputs x rank and rank x outputs, for every target (arXiv 2106.09685)."""
        linears = self.linears()
        if unknown := set(targets) - linears.keys():
            raise ConfigError(
                f"lora.targets has {', '.join(sorted(unknown))}, which is no linear layer of {self.name}; "
                f"it has {', '.join(linears)}"
            )
        return self.layers * sum(rank * sum(linears[target]) for target in set(targets))

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """A key and a value of every layer and KV head."""
        return 2 * self.layers * self.kv_width * element_bytes


def _llama(name: str, layers: int, hidden: int, intermediate: int, heads: int, **others: Any) -> Architecture:
    facts = {"family": "llama", "kv_heads": heads, "vocabulary": 32_000, "context": 4096, **others}
    return Architecture(name=name, layers=layers, hidden=hidden, intermediate=intermediate, heads=heads, **facts)


def _qwen2(name: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **o: Any) -> Architecture:
    return _llama(
        name,
        layers,
        hidden,
        intermediate,
        heads,
        **{
            "family": "qwen2",
            "kv_heads": kv_heads,
            "context": 32_768,
            "attention_bias": True,
            "vocabulary": 152_064,
            **o,
        },
    )


def _qwen3(name: str, layers: int, hidden: int, intermediate: int, heads: int, **others: Any) -> Architecture:
    facts = {"family": "qwen3", "kv_heads": 8, "context": 40_960, "head_norms": True, "vocabulary": 151_936}
    return _llama(name, layers, hidden, intermediate, heads, **{**facts, **others})


_LLAMA3 = {"kv_heads": 8, "vocabulary": 128_256, "context": 8192}
_LLAMA31 = {**_LLAMA3, "context": 131_072}
_SMALL_QWEN = {"tied": True, "vocabulary": 151_936}
_PRESETS = (
    _llama("huggyllama/llama-7b", 32, 4096, 11_008, 32, context=2048),
    _llama("huggyllama/llama-13b", 40, 5120, 13_824, 40, context=2048),
    _llama("huggyllama/llama-30b", 60, 6656, 17_920, 52, context=2048),
    _llama("huggyllama/llama-65b", 80, 8192, 22_016, 64, context=2048),
    _llama("meta-llama/Llama-2-7b-hf", 32, 4096, 11_008, 32),
    _llama("meta-llama/Llama-2-13b-hf", 40, 5120, 13_824, 40),
    _llama("meta-llama/Llama-2-70b-hf", 80, 8192, 28_672, 64, kv_heads=8),
    _llama("meta-llama/Meta-Llama-3-8B", 32, 4096, 14_336, 32, **_LLAMA3),
    _llama("meta-llama/Meta-Llama-3-70B", 80, 8192, 28_672, 64, **_LLAMA3),
    _llama("meta-llama/Llama-3.1-8B", 32, 4096, 14_336, 32, **_LLAMA31),
    _llama("meta-llama/Llama-3.1-70B", 80, 8192, 28_672, 64, **_LLAMA31),
    _llama("meta-llama/Llama-3.2-1B", 16, 2048, 8192, 32, **_LLAMA31, head_size=64, tied=True),
    _llama("meta-llama/Llama-3.2-3B", 28, 3072, 8192, 24, **_LLAMA31, tied=True),
    _llama("meta-llama/Llama-3.3-70B-Instruct", 80, 8192, 28_672, 64, **_LLAMA31),
    _llama("mistralai/Mistral-7B-v0.1", 32, 4096, 14_336, 32, family="mistral", kv_heads=8, context=32_768),
    _llama(
        "mistralai/Mistral-7B-v0.3", 32, 4096, 14_336, 32,
        family="mistral", kv_heads=8, vocabulary=32_768, context=32_768,
    ),
    _llama("HuggingFaceTB/SmolLM2-135M", 30, 576, 1536, 9, kv_heads=3, vocabulary=49_152, head_size=64, tied=True,
           context=8192),
    _qwen2("Qwen/Qwen2.5-0.5B", 24, 896, 4864, 14, 2, **_SMALL_QWEN, head_size=64),
    _qwen2("Qwen/Qwen2.5-1.5B", 28, 1536, 8960, 12, 2, **_SMALL_QWEN),
    _qwen2("Qwen/Qwen2.5-3B", 36, 2048, 11_008, 16, 2, **_SMALL_QWEN),
    _qwen2("Qwen/Qwen2.5-7B", 28, 3584, 18_944, 28, 4),
    _qwen2("Qwen/Qwen2.5-14B", 48, 5120, 13_824, 40, 8),
    _qwen2("Qwen/Qwen2.5-32B", 64, 5120, 27_648, 40, 8),
    _qwen2("Qwen/Qwen2.5-72B", 80, 8192, 29_568, 64, 8),
    _qwen3("Qwen/Qwen3-8B", 36, 4096, 12_288, 32),
    _qwen3("Qwen/Qwen3-14B", 40, 5120, 17_408, 40),
    _qwen3("Qwen/Qwen3-32B", 64, 5120, 25_600, 64),
)  # fmt: skip


def _plain(name: str) -> str:
    """A hub name without what tells a model's tuned variant from its base, whose sizes are the same."""
    return name.lower().replace("-instruct", "").replace("-chat", "")


PRESETS = {_plain(preset.name): preset for preset in _PRESETS}


def architecture_of(config: RunConfig) -> Architecture:
    """The model's sizes: of its directory's config.json, of a preset, or of the hub. Raises ConfigError."""
    name = config.model.name
    preset = PRESETS.get(_plain(name))
    if preset is not None and not Path(name).is_dir():
        return replace(preset, name=name)
    from aft_ray.run.preflight import load_model_config

    return from_transformers(name, load_model_config(config))


def from_transformers(name: str, given: Any) -> Architecture:
    """The sizes of a Hugging Face config. Raises ConfigError for a model of another shape."""
    family = given.model_type
    if family not in FAMILIES:
        raise ConfigError(
            f"aft-ray plan cannot size {name}: its model_type is {family}, and the formulas are those of "
            f"{', '.join(FAMILIES)}"
        )
    biased = family == "qwen2" or getattr(given, "attention_bias", False)
    return Architecture(
        name=name,
        family=family,
        layers=given.num_hidden_layers,
        hidden=given.hidden_size,
        intermediate=given.intermediate_size,
        heads=given.num_attention_heads,
        kv_heads=given.num_key_value_heads,
        vocabulary=given.vocab_size,
        context=given.max_position_embeddings,
        head_size=getattr(given, "head_dim", None) or given.hidden_size // given.num_attention_heads,
        tied=given.tie_word_embeddings,
        attention_bias=biased,
        output_bias=biased and family != "qwen2",
        mlp_bias=getattr(given, "mlp_bias", False),
        head_norms=family == "qwen3",
    )
