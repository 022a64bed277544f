"""What an engine asks of vLLM, and does with its answers, where the CPU cannot show it: vLLM is a fake here."""

import threading
from types import SimpleNamespace

import pytest

from aft_ray.config.run import LoraConfig
from aft_ray.inference import engine as module
from aft_ray.inference.engine import Engine
from aft_ray.inference.engine_spec import EngineSpec
from aft_ray.inference.request_parameters import Prompt, RequestFailed, SamplingSpec

DEADLINE = 20


class FakeLlm:
    """An engine that ends every request with the finish reason that is next in `reasons`."""

    def __init__(self, reasons=()):
        self.reasons, self.requests, self.slept, self.closed = list(reasons), [], [], threading.Event()
        self.engine_core = SimpleNamespace(shutdown=self.closed.set)

    def has_unfinished_requests(self):
        return bool(self.requests)

    def add_request(self, request_id, prompt, parameters, lora_request):
        self.requests.append((request_id, prompt["prompt_token_ids"]))

    def step(self):
        request_id, tokens = self.requests.pop(0)
        completion = SimpleNamespace(index=0, token_ids=[5], cumulative_logprob=-1.0, finish_reason=self.reasons.pop(0))
        return [SimpleNamespace(request_id=request_id, finished=True, prompt_token_ids=tokens, outputs=[completion])]

    def sleep(self, level):
        self.slept.append(level)


def started(monkeypatch, llm, **options) -> Engine:
    monkeypatch.setattr(module, "_build_llm_engine", lambda spec: llm)
    return Engine(EngineSpec("model", (1,), "float32", 100, None, gpu=False, **options))


@pytest.mark.parametrize(
    ("lora", "level"),
    [(None, 2), (LoraConfig(), 1)],  # 2: nothing is kept; 1: the weights stay in host memory
)
def test_a_sleeping_engine_keeps_the_weights_that_no_update_brings_again(monkeypatch, lora, level):
    llm = FakeLlm()
    engine = started(monkeypatch, llm, lora=lora)
    engine.sleep().result(DEADLINE)
    engine.close()
    assert llm.slept == [level]
    assert llm.closed.is_set()


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_a_request_that_vllm_ends_without_an_answer_fails_alone(monkeypatch, reason):
    engine = started(monkeypatch, FakeLlm(["stop", reason, "length"]))
    how = SamplingSpec(1, 1.0, 1.0, 10)
    first, failed, last = [engine.sample(Prompt([7, 8], seed), how) for seed in range(3)]
    assert [answer.result(DEADLINE)[0].finish_reason for answer in (first, last)] == ["stop", "length"]
    with pytest.raises(RequestFailed, match=f"vLLM ended a request of 2 tokens with '{reason}'"):
        failed.result(DEADLINE)
    assert engine.alive()
    engine.close()
