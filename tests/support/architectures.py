"""Model configs for tests of `aft-ray plan`."""

from transformers import AutoConfig

from aft_ray.config.run import parse_config


def hugging_face_config(preset, **others):
    return AutoConfig.for_model(
        preset.family,
        **{
            "vocab_size": preset.vocabulary,
            "hidden_size": preset.hidden,
            "intermediate_size": preset.intermediate,
            "num_hidden_layers": preset.layers,
            "num_attention_heads": preset.heads,
            "num_key_value_heads": preset.kv_heads,
            "head_dim": preset.head_size,
            "max_position_embeddings": preset.context,
            "tie_word_embeddings": preset.tied,
            **others,
        },
    )


def config_of(name, **sections):
    return parse_config({"run_dir": "runs/x", "model": {"name": str(name)}, **sections})
