"""Calls of receive plans reach an engine core in another process as they were made, and other calls are refused."""

import numpy as np
import pytest
import torch

from aft_ray.inference.request_parameters import Prompt, SamplingSpec, adapter_request, request_parameters
from aft_ray.weights.adapter import ADAPTER_FILES
from aft_ray.weights.broadcast.buckets import Layout
from aft_ray.weights.receive_plan import (
    BroadcastOffer,
    EngineCall,
    FromAdapter,
    FromBroadcast,
    FromDirectory,
    FromObjects,
)

LAYOUT = Layout(("embed.weight", "norm.weight"), ((40, 64), (64,)), "bfloat16", 1 << 20)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def in_the_engine_core(value):
    """What vLLM's decoder makes of a value that its encoder has sent to the engine core as part of a utility call."""
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    return MsgpackDecoder().decode(MsgpackEncoder().encode(value))


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """Replaces Ray's object store, which is not under test, by the objects themselves."""
    import ray

    monkeypatch.setattr(ray, "get", lambda objects, timeout: list(objects))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tuple(np.zeros(8, dtype=np.uint8) for _ in SHARDS)


@pytest.mark.parametrize("kind", ["directory", "objects", "broadcast", "adapter", "adapter objects"])
def test_the_calls_of_every_plan_arrive_unchanged(kind, stored, tmp_path):
    directory = FromDirectory(str(tmp_path), SHARDS)
    assert len(stored) == len(ADAPTER_FILES)
    plan = {
        "directory": directory,
        "objects": FromObjects(stored, directory),
        "broadcast": FromBroadcast(BroadcastOffer("10.0.0.1", 4242, LAYOUT), 1, 9),
        "adapter": FromAdapter(str(tmp_path), 3),
        "adapter objects": FromAdapter(str(tmp_path), 3, stored),
    }[kind]
    calls = list(plan.calls(60.0))
    assert calls
    for call in calls:
        arrived = in_the_engine_core((0, 1, "collective_rpc", (call.method, None, call.args, None)))
        method, _, args, _ = arrived[3]
        assert method == call.method
        # The tuple of all arguments may be a list: vLLM passes its entries one by one.
        assert args == list(call.args)
        assert [type(argument) for argument in args] == [type(argument) for argument in call.args]


@pytest.mark.parametrize(
    "argument",
    [
        (1, 2),
        {"shape": (1, 2)},
        [[{"dtype": torch.float32}]],
        {1: "a"},
        {("a", "b"): 1},
        np.float32(1.0),
        np.zeros(2),
        b"bytes",
        adapter_request(1, "/adapter"),
    ],
    ids=lambda argument: type(argument).__name__,
)
def test_an_argument_that_would_arrive_as_something_else_is_refused(argument):
    with pytest.raises(TypeError, match="argument 1 of load_weights_file contains a "):
        EngineCall("load", "load_weights_file", ("/model", argument))


def test_plain_arguments_are_taken():
    nested = {"names": ["a", "b"], "sizes": [[1], [2, 3]], "packed": True, "timeout_s": 1.5, "none": None}
    assert EngineCall("load", "method", (nested, "text", 1)).args[0] == nested


def test_a_request_arrives_with_its_adapter_and_its_parameters():
    """An adapter is a field of the request's own type there, which the decoder knows."""
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    parameters = request_parameters(Prompt([1, 2], 3), SamplingSpec(2, 1.0, 0.9, 10), 10, (7, 9))
    request = EngineCoreRequest("0", [1, 2], None, parameters, None, 0.0, adapter_request(4), None, None)
    arrived = MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(request))
    assert arrived.lora_request == adapter_request(4)
    assert arrived.prompt_token_ids == [1, 2]
    assert (arrived.sampling_params.n, arrived.sampling_params.seed) == (2, 3)
    assert set(arrived.sampling_params.stop_token_ids) == {7, 9}
