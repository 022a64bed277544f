"""The forward passes of an optimiser step: the plan that a run makes (`training.batching.plan_step`), on drawn lengths.

Lengths are log-normal with the mean and the spread that were measured for the task, and cut where a run cuts them. A
question's responses have half of the variance of log lengths in common, because long questions have long answers.
Invariant: the drawn groups depend on the work and the assumptions alone, so numbers of workers are compared on the same
groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aft_ray.config.run import RunConfig
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.workload import Workload
from aft_ray.training.balance import load_of
from aft_ray.training.batching import GroupSize, PlannedBatch, StepPlan, plan_step

# Steps whose mean is taken, and the most groups that are drawn for them unless a single step has more.
_STEPS, _GROUPS = 4, 256
_SHARED_VARIANCE = 0.5


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the ranks compute in one optimiser step; means over some steps.

    In every pass the ranks wait for the one that computes most tokens.

    Attributes:
        train_passes: forward and backward passes.
        train_tokens: tokens in them, of the slowest rank of each pass.
        score_passes: forward passes without gradients, for groups that are split.
        score_tokens: tokens in those, of the slowest rank of each pass.
        group_tokens: tokens of a group, its prompt once.
        balance: mean tokens of a rank over those of the slowest rank in each pass; 1 if no rank ever waits.
    """

    train_passes: float
    train_tokens: float
    score_passes: float
    score_tokens: float
    group_tokens: float
    balance: float


class StepShapes:
    """The shapes of a run's steps by the number of train workers. Each is computed once.

    Args:
        vft: steps of round 0, which trains on the references alone, instead of those of the rounds after it.
    """

    def __init__(self, config: RunConfig, work: Workload, assumptions: PlanAssumptions, *, vft: bool = False) -> None:
        questions, per_step = work.questions, config.training.groups_per_step
        if vft:
            questions, per_step = work.vft_questions, config.vft.questions_per_step
        per_step = min(per_step, questions)
        steps = max(1, min(_STEPS, questions // per_step, _GROUPS // per_step))
        groups = drawn_groups(config, work, assumptions, steps * per_step, vft=vft)
        self._together = config.training.sequence_parallel_size  # workers that compute a row together
        self._budget = config.training.tokens_per_microbatch * self._together
        self._steps = [groups[first : first + per_step] for first in range(0, len(groups), per_step)]
        self._shapes: dict[int, StepShape] = {}

    def of(self, workers: int) -> StepShape:
        """The shape of a step with so many train workers."""
        if workers not in self._shapes:
            self._shapes[workers] = self._planned(workers)
        return self._shapes[workers]

    def _planned(self, workers: int) -> StepShape:
        ranks = max(1, workers // self._together)
        plans = [(plan_step(sizes, ranks=ranks, budget=self._budget), sizes) for sizes in self._steps]
        trained = [tokens for plan, sizes in plans for tokens in tokens_of_passes(plan, sizes)]
        scored = [tokens for plan, sizes in plans for tokens in tokens_of_passes(plan, sizes)[: plan.score_passes]]
        groups = [load_of(size.prompt, size.responses).tokens for sizes in self._steps for size in sizes]
        slowest, steps = sum(map(max, trained)), len(plans)
        return StepShape(
            train_passes=len(trained) / steps,
            train_tokens=slowest / steps / self._together,
            score_passes=len(scored) / steps,
            score_tokens=sum(map(max, scored)) / steps / self._together,
            group_tokens=sum(groups) / len(groups),
            balance=sum(map(sum, trained)) / ranks / slowest,
        )


def tokens_of_passes(plan: StepPlan, sizes: list[GroupSize]) -> list[list[int]]:
    """The tokens of a step's forward and backward passes, [passes][ranks]. Its first `score_passes` are run twice.

    Args:
        sizes: those of the step's groups.
    """

    def tokens(batch: PlannedBatch) -> int:
        if batch.piece is None:
            return sum(load_of(sizes[index].prompt, sizes[index].responses).tokens for index in batch.groups)
        size = sizes[batch.groups[0]]
        return load_of(size.prompt, [size.responses[one] for one in batch.piece.responses]).tokens

    return [
        [tokens(share[number]) if number < len(share) else 0 for share in plan.shares]
        for number in range(plan.train_passes)
    ]


def drawn_groups(
    config: RunConfig, work: Workload, assumptions: PlanAssumptions, count: int, *, vft: bool
) -> list[GroupSize]:
    """Groups of a round with their trained responses, the reference first.

    The candidates of a group do not change when k grows: there are more of them.
    """
    rng = np.random.default_rng(0)
    prompts = log_normal(work.prompt, work.prompt_spread, rng.standard_normal(count))
    prompts = np.minimum(prompts, config.model.max_length - 1)
    signal = (rng.permutation(count) + 0.5) / count  # evenly spread, so that few groups have the assumed share
    shared = rng.standard_normal((count, 1))
    objective = config.objective.spec
    k = 0 if vft or not objective.uses_candidates else work.k
    # One block of draws for each response, so that those of a small k are among those of a larger one.
    own = rng.standard_normal((1 + k, count)).T
    normal = _SHARED_VARIANCE**0.5 * shared + (1 - _SHARED_VARIANCE) ** 0.5 * own
    most = np.minimum(config.sampling.max_tokens, config.model.max_length - prompts)[:, None]
    lengths = np.minimum(log_normal(work.response, work.response_spread, normal), most)
    distinct = np.random.default_rng(1).random((k, count)).T
    kept = distinct < assumptions.distinct
    if objective.right_candidates_only:
        kept &= distinct < 0.5 * assumptions.distinct
    else:
        kept &= (signal < assumptions.signal)[:, None]
    return [
        GroupSize(str(index), int(prompts[index]), (int(of_one[0]), *map(int, of_one[1:][kept[index]])))
        for index, of_one in enumerate(lengths)
    ]


def log_normal(mean: float, spread: float, normal: NDArray[np.float64]) -> NDArray[np.int64]:
    """Log-normal lengths in tokens: with log-mean mu and log-variance s² the mean is exp(mu + s²/2)."""
    tokens: NDArray[np.int64] = np.maximum(1, np.rint(mean * np.exp(spread * normal - spread**2 / 2))).astype(np.int64)
    return tokens
