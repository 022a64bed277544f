"""vLLM's asynchronous client inside a policy server: sampling requests, scores and weight updates.

Invariant: what the engine refuses of a request is raised as `BadRequest`, with one sentence, and leaves the engine
unaffected.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from aft_ray.inference.request_parameters import PromptTooLong, score_of, scoring_parameters
from aft_ray.inference.versioned_engine import receive_weights
from aft_ray.weights.receive_plan import EngineCall, Phase

T = TypeVar("T")


class BadRequest(ValueError):
    """The engine refuses a request because of what it asks for."""


class EngineClient:
    """A wrapper of vLLM's AsyncLLM. It is the `UpdatableEngine` of a policy server's VersionedEngine."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def generate(self, token_ids: Sequence[int], parameters: Any) -> AsyncIterator[Any]:
        """vLLM's RequestOutputs of one request, as vLLM yields them. Closing the iterator ends the request.

        Raises:
            BadRequest: vLLM refuses the request.
        """
        with bad_request_errors():
            async for output in self._client.generate(
                {"prompt_token_ids": list(token_ids)}, parameters, uuid.uuid4().hex
            ):
                yield output

    def score(self, prompt_token_ids: Sequence[int], response_token_ids: Sequence[int]) -> asyncio.Future[float]:
        """Mean token log-probability of a response under the engine's present weights, nats per token."""

        async def score() -> float:
            async for output in self.generate([*prompt_token_ids, *response_token_ids], scoring_parameters()):
                last = output
            return score_of(last, len(prompt_token_ids))

        return asyncio.ensure_future(score())

    def update_weights(
        self, calls: Iterator[EngineCall], enter_phase: Callable[[Phase], None], adapter: int
    ) -> asyncio.Future[None]:
        """Receives new weights, outside the event loop's thread. The caller must ensure that no request runs."""
        if adapter:
            raise ValueError("the service loads whole weights and takes no adapters")
        blocking = _BlockingClient(self._client, asyncio.get_running_loop())
        return asyncio.ensure_future(asyncio.to_thread(receive_weights, blocking, calls, enter_phase))


class _BlockingClient:
    """vLLM's AsyncLLM for another thread than that of its event loop: calls block until they have returned."""

    def __init__(self, client: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._client, self._loop = client, loop

    def collective_rpc(self, method: str, *, args: tuple[Any, ...]) -> Any:
        return self._wait_for(self._client.collective_rpc(method, args=args))

    def reset_prefix_cache(self) -> bool:
        return bool(self._wait_for(self._client.reset_prefix_cache()))

    def _wait_for(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()


@contextlib.contextmanager
def bad_request_errors() -> Iterator[None]:
    """Raises as BadRequest what vLLM and `response_room` raise about a request."""
    from vllm.exceptions import VLLMClientError, VLLMValidationError

    try:
        yield
    except (PromptTooLong, VLLMValidationError, VLLMClientError) as error:
        raise BadRequest(str(error)) from error
