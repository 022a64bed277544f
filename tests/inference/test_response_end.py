"""A real engine ends a response at every end token, the turn end of a chat template included, and scores it."""

import json
from collections import Counter

import pytest
from instruct import FAMILIES, instruct_model
from tiny import LENGTH, tiny_config
from transformers import AutoTokenizer

from aft_ray.inference.engine import Engine
from aft_ray.inference.engine_spec import EngineSpec
from aft_ray.inference.request_parameters import Prompt, SamplingSpec
from aft_ray.tasks.rendering import Renderer

DEADLINE = 120
FREE = SamplingSpec(k=64, temperature=1.0, top_p=1.0, max_tokens=60)
# An end that the generation config alone names, as Llama 3 has <|eom_id|>.
OTHER_END = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of the Phi family, whose turn end is no special token."""
    directory = instruct_model(tmp_path_factory.mktemp("models") / "phi", "phi")
    path = directory / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, OTHER_END]}))
    return directory


def test_a_response_ends_at_each_of_the_ends(model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    renderer = Renderer(tiny_config(tmp_path, model), tokenizer)
    turn_end = tokenizer.convert_tokens_to_ids(FAMILIES["phi"].end)
    assert set(renderer.ends.ids) == {1, OTHER_END, turn_end}
    # vLLM adds those of the generation config by itself, so they must be ends for us as well.
    engine = Engine(EngineSpec(str(model), (1, turn_end), "float32", LENGTH, 64, gpu=False, kv_cache_gib=0.25))
    try:
        prompt = renderer.prompt("Ana has 16 apples.")
        candidates = engine.sample(Prompt(prompt, 1), FREE).result(DEADLINE)
        ended = [one for one in candidates if one.finish_reason == "stop"]
        assert Counter(one.token_ids[-1] for one in ended).keys() == set(renderer.ends.ids)
        for one in candidates:
            assert (one.token_ids[-1] in renderer.ends.ids) is (one.finish_reason == "stop")
            assert not set(one.token_ids[:-1]) & set(renderer.ends.ids)
            assert renderer.text(one.token_ids) == renderer.text([id for id in one.token_ids if id != turn_end])
        # The end belongs to the response that is scored, whichever it is.
        for one in ended[:3]:
            assert engine.score(prompt, one.token_ids).result(DEADLINE) == pytest.approx(one.score, abs=1e-4)
    finally:
        engine.close()
