"""The simulated train workers: the real plan of a training pass, whose forward and backward passes take virtual time.

Invariant: rounds are trained in order, each when it is ready; a version is published when its round is trained
completely; a failure of any worker starts the round again, as a restart from the last checkpoint does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from aft_ray.config.run import RunConfig
from aft_ray.coordination.coordinator import Coordinator
from aft_ray.planning.plan.step_shape import tokens_of_passes
from aft_ray.planning.simulation.assumptions import SimulationAssumptions, Work
from aft_ray.training.batching import GroupSize, plan_step, training_order
from aft_ray.weights.version_manifest import VersionManifest


@dataclass(frozen=True, slots=True)
class RoundTrainingTimes:
    """When a round was trained, in seconds from the start of the run.

    Attributes:
        waited_s: seconds that the workers waited for the round's groups.
        busy: share of the workers' time in which they computed.
    """

    round: int
    waited_s: float
    started: float
    trained: float
    published: float
    steps: int
    tokens: int
    busy: float
    failures: int

    @property
    def train_s(self) -> float:
        """Seconds from the start to the last optimiser step, restarts included."""
        return self.trained - self.started


@dataclass(frozen=True, slots=True)
class PassCost:
    """The duration and the amount of work of an uninterrupted training pass.

    Attributes:
        seconds: duration of the pass.
        compute_s: seconds for which one worker computes on average, without its waiting for others.
        tokens: tokens over all workers, each prompt once.
    """

    seconds: float
    compute_s: float
    steps: int
    tokens: int


def group_sizes(config: RunConfig, work: Work, answered: list[tuple[str, int]]) -> list[GroupSize]:
    """Sizes of the groups of the answered questions, which are given as (id, number in `work`).

    The trained candidates are those of `batching.trained_candidates`, except that simulated responses are never equal.
    """
    sizes, objective = [], config.objective.spec
    for question_id, number in answered:
        lengths, right = work.lengths[number], work.right[number]
        if objective.right_candidates_only:
            lengths = lengths[right]
        elif not objective.uses_candidates or (objective.ranks_candidates and (right.all() or not right.any())):
            lengths = lengths[:0]
        responses = (int(work.references[number]), *map(int, lengths))
        sizes.append(GroupSize(question_id, int(work.prompts[number]), responses))
    return sizes


def pass_cost(config: RunConfig, assumed: SimulationAssumptions, sizes: list[GroupSize], round_number: int) -> PassCost:
    """The cost of a planned pass.

    In each forward and backward pass the workers wait for the slowest of them, because sharded weights and gradients
    are gathered by all.
    """
    training = config.training
    steps = slowest = tokens = passes = 0
    for epoch in range(training.epochs):
        order = training_order([size.question_id for size in sizes], config.seed, round_number, epoch)
        for first in range(0, len(order), training.groups_per_step):
            of_step = [sizes[index] for index in order[first : first + training.groups_per_step]]
            plan = plan_step(of_step, ranks=training.workers, budget=training.tokens_per_microbatch)
            of_pass = tokens_of_passes(plan, of_step)
            slowest += sum(max(ranks) for ranks in of_pass)
            tokens += sum(sum(ranks) for ranks in of_pass)
            passes += len(of_pass)
            steps += 1
    seconds = slowest / assumed.train_tokens_per_s + passes * assumed.pass_s + steps * assumed.optimizer_s
    return PassCost(seconds, tokens / assumed.train_tokens_per_s / training.workers, steps, tokens)


class SimulatedTrainer:
    """All train workers together: when one of them ends, all restart."""

    def __init__(
        self,
        config: RunConfig,
        assumed: SimulationAssumptions,
        coordinator: Coordinator,
        sizes: Callable[[int], list[GroupSize]],
    ) -> None:
        self._config, self._assumed, self._coordinator, self._sizes = config, assumed, coordinator, sizes
        self._loop = asyncio.get_running_loop()
        self._failed = asyncio.Event()
        self._back_at = 0.0
        self.failures = 0
        self.rounds: list[RoundTrainingTimes] = []

    def fail(self, noticed_s: float, back_s: float) -> None:
        """A worker ends; all workers have loaded the last checkpoint again after `back_s`.

        A failure while they restart delays them and is not counted as another failure.
        """
        self.failures += not self._failed.is_set()
        self._back_at = max(self._back_at, self._loop.time() + max(noticed_s, back_s))
        self._failed.set()

    async def run(self, first: int, last: int) -> None:
        """Does what every worker does (`training.worker`): waits for a round, trains it, publishes the version.

        Raises:
            PeerFailed: the run has failed.
        """
        for number in range(first, last + 1):
            waited = await self._coordinator.wait_ready(number, self._config.rounds.timeout_s)
            cost = pass_cost(self._config, self._assumed, self._sizes(number), number)
            started, failures = self._loop.time(), self.failures
            # Publication is part of the round: a failure during it also goes back to the last checkpoint.
            while not (await self._undisturbed(cost.seconds) and await self._undisturbed(self._assumed.publish_s)):
                await self._restarted()
            published = self._loop.time()
            trained = published - self._assumed.publish_s
            busy = cost.compute_s / (trained - started) if trained > started else 0.0
            self.rounds.append(
                RoundTrainingTimes(
                    number, waited, started, trained, published, cost.steps, cost.tokens, busy, self.failures - failures
                )
            )
            await self._coordinator.publish(VersionManifest(number, "", (), ()))

    async def _undisturbed(self, seconds: float) -> bool:
        """Whether the workers worked for `seconds` without a failure. Returns at once when one of them fails."""
        if self._failed.is_set():
            return False
        try:
            await asyncio.wait_for(self._failed.wait(), seconds)
        except TimeoutError:
            return True
        return False

    async def _restarted(self) -> None:
        if self.failures > self._config.training.max_failures:
            await self._coordinator.fail(
                f"training failed: its workers ended {self.failures} times, more than training.max_failures="
                f"{self._config.training.max_failures}"
            )
            await self._coordinator.check()
        while self._loop.time() < self._back_at:
            await asyncio.sleep(self._back_at - self._loop.time())
        self._failed.clear()
