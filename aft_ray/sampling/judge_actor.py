"""The judge of a run: one actor on the driver's node.

Invariant: there is one judge in the cluster, so the limit of requests in flight and the cache file hold for all
processes that label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aft_ray.config.run import ConfigError, FeedbackConfig, JudgeConfig
from aft_ray.storage.run_dir import RunDir

if TYPE_CHECKING:
    from aft_ray.verify.judge.judge import JudgeCounts, Rating, RatingRequest


class JudgeActor:
    """The judge in a Ray actor. It rates the batches of all labelling tasks one after another."""

    def __init__(self, config: JudgeConfig, cache: Path) -> None:
        from aft_ray.verify.judge.judge import Judge

        self._judge = Judge(config, cache)

    def rate(self, requests: Sequence[RatingRequest]) -> list[Rating]:
        return self._judge.rate(requests)

    def counts(self) -> JudgeCounts:
        return self._judge.counts


@dataclass(frozen=True, slots=True)
class RemoteJudge:
    """A handle of the judge's actor, which any process of the cluster can use."""

    actor: Any

    def rate(self, requests: Sequence[RatingRequest]) -> list[Rating]:
        ratings: list[Rating] = ray.get(self.actor.rate.remote(list(requests)))
        return ratings

    def counts(self) -> JudgeCounts:
        """The counts of requests and replies since the actor started."""
        counts: JudgeCounts = ray.get(self.actor.counts.remote())
        return counts


def start_judge(feedback: FeedbackConfig, run_dir: RunDir) -> RemoteJudge | None:
    """Starts the judge of a run on this node, which has its cache file; None when the feedback needs no judge."""
    if feedback.kind != "judge":
        return None
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(JudgeActor).options(num_cpus=0, scheduling_strategy=here)
    return RemoteJudge(remote.remote(feedback.judge, judge_cache_path(feedback.judge, run_dir)))


def check_judge(feedback: FeedbackConfig, run_dir: RunDir) -> None:
    """Raises ConfigError or JudgeFailed when the judge cannot be used. A run calls this before it samples anything."""
    if feedback.kind == "judge":
        from aft_ray.verify.judge.judge import Judge

        Judge(feedback.judge, judge_cache_path(feedback.judge, run_dir)).check()


def judge_cache_path(judge: JudgeConfig, run_dir: RunDir) -> Path:
    """The file `feedback.judge.cache`, or one in the run directory. Raises ConfigError when that is remote."""
    if judge.cache is not None:
        return Path(judge.cache).expanduser()
    if not run_dir.is_local:
        raise ConfigError(
            f"the judge's replies cannot be kept in {run_dir.uri()}, which is not a mounted filesystem; set "
            f"feedback.judge.cache to a file on the machine that drives the run"
        )
    return run_dir.local_path("judge.sqlite")
