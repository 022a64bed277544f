"""The sizes of a decoder model of Llama's architecture, and the numbers of parameters that follow from them.

Invariant: `parameters` is exact; a test compares every preset with the model that transformers builds on the meta
device. A model of another architecture is refused, never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aft_ray.config.run import ConfigError, RunConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder: an embedding, layers of grouped-query attention and a gated MLP with an RMSNorm before each, a last
    norm and a head.

    Attributes:
        name: The model's name or directory.
        family: transformers' model_type.
        layers: Number of layers.
        hidden: Hidden size.
        intermediate: Width of the MLP.
        heads: Query heads.
        kv_heads: Key and value heads.
        vocabulary: Entries of the embedding.
        context: Longest sequence, tokens.
        head_size: Size of a head.
        tied: Whether the head shares the embedding's weight.
        attention_bias: Whether the query, key and value maps have biases.
        output_bias: Whether the output map of attention has a bias.
        mlp_bias: Whether the maps of the MLP have biases.
        head_norms: Whether every query and key head has an RMSNorm, as in Qwen3.
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
        """Parameters of the token embedding. The head has as many, or none of its own when the two are tied."""
        return self.vocabulary * self.hidden

    @property
    def body_parameters(self) -> int:
        """Parameters of all but the embedding and the head."""
        return self.layers * self.layer_parameters + self.hidden

    @property
    def parameters(self) -> int:
        return self.body_parameters + self.embedding_parameters * (1 if self.tied else 2)

    def parameters_formula(self) -> str:
        """How `parameters` is computed, with the numbers."""
        ends = "1 x" if self.tied else "2 x"
        return (
            f"{self.layers} layers x {self.layer_parameters:,} + {self.hidden:,} (last norm) + {ends} "
            f"{self.vocabulary:,} x {self.hidden:,} ({'tied embedding' if self.tied else 'embedding and head'})"
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a decoder layer: transformers' name -> (inputs, outputs)."""
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
        """Parameters of LoRA adapters (arXiv 2106.09685): inputs x rank and rank x outputs for every target.

        Raises:
            ConfigError: A target is no linear layer of the model.
        """
        linears = self.linears()
        if unknown := set(targets) - linears.keys():
            raise ConfigError(
                f"lora.targets has {', '.join(sorted(unknown))}, which is no linear layer of {self.name}; "
                f"it has {', '.join(linears)}"
            )
        return self.layers * sum(rank * sum(linears[target]) for target in set(targets))


def _llama(name: str, layers: int, hidden: int, intermediate: int, heads: int, **others: Any) -> Architecture:
    sizes = {"family": "llama", "kv_heads": heads, "vocabulary": 32_000, "context": 4096, **others}
    return Architecture(name=name, layers=layers, hidden=hidden, intermediate=intermediate, heads=heads, **sizes)


def _qwen2(
    name: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **others: Any
) -> Architecture:
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
            **others,
        },
    )


def _qwen3(name: str, layers: int, hidden: int, intermediate: int, heads: int, **others: Any) -> Architecture:
    sizes = {"family": "qwen3", "kv_heads": 8, "context": 40_960, "head_norms": True, "vocabulary": 151_936}
    return _llama(name, layers, hidden, intermediate, heads, **{**sizes, **others})


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


def _base_name(name: str) -> str:
    """A hub name in lower case, without the suffix of a tuned variant, whose sizes are those of its base model."""
    return name.lower().replace("-instruct", "").replace("-chat", "")


PRESETS = {_base_name(preset.name): preset for preset in _PRESETS}


def architecture_of(config: RunConfig) -> Architecture:
    """The sizes of a run's model: those of its directory's config.json, of a preset, or of the hub.

    Raises:
        ConfigError: The model is not found, or it is of another architecture.
    """
    name = config.model.name
    preset = PRESETS.get(_base_name(name))
    if preset is not None and not Path(name).is_dir():
        return replace(preset, name=name)
    from aft_ray.storage.model_files import load_model_config

    return from_transformers(name, load_model_config(config))


def from_transformers(name: str, config: Any) -> Architecture:
    """The sizes in a Hugging Face config.

    Raises:
        ConfigError: The model is of another architecture.
    """
    family = config.model_type
    if family not in FAMILIES:
        raise ConfigError(
            f"aft-ray plan cannot size {name}: its model_type is {family}, and the formulas are those of "
            f"{', '.join(FAMILIES)}"
        )
    biased = family == "qwen2" or getattr(config, "attention_bias", False)
    return Architecture(
        name=name,
        family=family,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        tied=config.tie_word_embeddings,
        attention_bias=biased,
        output_bias=biased and family != "qwen2",
        mlp_bias=getattr(config, "mlp_bias", False),
        head_norms=family == "qwen3",
    )
