"""What is sent to a vLLM engine with a request, and how its output is read.

Samplers and the service build their requests here. Invariant: the score of a response is the same number wherever it
is computed: log-probabilities at temperature 1, end-of-sequence token included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aft_ray.storage.records import Candidate


class PromptTooLong(ValueError):
    """The prompt fills the model's context, so that no token is left for a response."""


class RequestFailed(RuntimeError):
    """vLLM ended a request without an answer. The engine itself is not affected."""


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How the k candidates of a question are sampled. Temperature 0 is greedy decoding."""

    k: int
    temperature: float
    top_p: float
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """The token ids of a question's prompt, and the seed that fixes its candidates."""

    token_ids: list[int]
    seed: int


def response_room(prompt_tokens: int, max_length: int) -> int:
    """The number of tokens that a prompt leaves for its response in a context of `max_length` tokens.

    Raises:
        PromptTooLong: it leaves none.
    """
    if prompt_tokens >= max_length:
        raise PromptTooLong(
            f"the question has {prompt_tokens} tokens as a prompt, which leaves no room for a response in the model's "
            f"context of {max_length}"
        )
    return max_length - prompt_tokens


def request_parameters(prompt: Prompt, sampling: SamplingSpec, max_tokens: int, eos_token_ids: Sequence[int]) -> Any:
    """vLLM's SamplingParams for the k candidates of a question, each of at most `max_tokens` tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=sampling.k,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=max_tokens,
        logprobs=0,
        seed=prompt.seed if sampling.temperature > 0 else None,
        stop_token_ids=list(eos_token_ids),
        detokenize=False,
        # With the default, the output of a request with n > 1 holds only the candidate that finished last.
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def adapter_request(number: int, directory: str | None = None) -> Any:
    """vLLM's LoRARequest for adapter `number`: with its directory to load it, and without to name the loaded one."""
    from vllm.lora.request import LoRARequest

    # Without `load_inplace`, a worker that holds an adapter of this number would keep its old weights.
    return LoRARequest(f"adapter {number}", number, directory or "loaded already", load_inplace=directory is not None)


def candidates_of(output: Any) -> list[Candidate]:
    """The candidates of a finished vLLM request (a RequestOutput), in the order of their indices, without texts.

    Raises:
        RequestFailed: vLLM has ended the request before all its candidates were finished.
    """
    _check_finished(output)
    return [
        Candidate(
            token_ids=list(completion.token_ids),
            logprob_sum=completion.cumulative_logprob,
            finish_reason=completion.finish_reason,
            text="",
        )
        for completion in sorted(output.outputs, key=lambda completion: completion.index)
    ]


def scoring_parameters() -> Any:
    """vLLM's SamplingParams for a request that computes the log-probabilities of the tokens it is given."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)


def score_of(output: Any, prompt_length: int) -> float:
    """Mean log-probability, nats per token, of the tokens after the first `prompt_length`.

    Args:
        output: the RequestOutput of a request with `scoring_parameters`, whose tokens are a prompt and its response.

    Raises:
        RequestFailed: vLLM has ended the request before it was answered.
    """
    _check_finished(output)
    response = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[prompt_length:]
    return float(sum(logprobs[token].logprob for token, logprobs in response) / len(response))


def _check_finished(output: Any) -> None:
    for completion in output.outputs:
        if completion.finish_reason not in ("stop", "length"):
            raise RequestFailed(
                f"vLLM ended a request of {len(output.prompt_token_ids)} tokens with {completion.finish_reason!r}"
            )
