"""The run's judge: one actor, so that the bound on requests in flight and the cache file hold for the whole cluster."""

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
    """Rates for every task that labels, one batch after the other."""

    def __init__(self, config: JudgeConfig, cache: Path) -> None:
        from aft_ray.verify.judge.judge import Judge

        self._judge = Judge(config, cache)

    def rate(self, items: Sequence[RatingRequest]) -> list[Rating]:
        return self._judge.rate(items)

    def counts(self) -> JudgeCounts:
        return self._judge.counts


@dataclass(frozen=True, slots=True)
class RemoteJudge:
    """Rates through the actor, from whichever process it is sent to."""

    actor: Any

    def rate(self, items: Sequence[RatingRequest]) -> list[Rating]:
        ratings: list[Rating] = ray.get(self.actor.rate.remote(list(items)))
        return ratings

    def counts(self) -> JudgeCounts:
        """What rating took since the actor was started."""
        counts: JudgeCounts = ray.get(self.actor.counts.remote())
        return counts


def start_judge(feedback: FeedbackConfig, run_dir: RunDir) -> RemoteJudge | None:
    """The judge of a run, on this node, where its cache file lies; None when the feedback needs none."""
    if feedback.kind != "judge":
        return None
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(JudgeActor).options(num_cpus=0, scheduling_strategy=here)
    return RemoteJudge(remote.remote(feedback.judge, judge_cache_path(feedback.judge, run_dir)))


def check_judge(feedback: FeedbackConfig, run_dir: RunDir) -> None:
    """Raises ConfigError or JudgeFailed when the judge cannot be asked, before anything is sampled for it."""
    if feedback.kind == "judge":
        from aft_ray.verify.judge.judge import Judge

        Judge(feedback.judge, judge_cache_path(feedback.judge, run_dir)).check()


def judge_cache_path(judge: JudgeConfig, run_dir: RunDir) -> Path:
    """Where the replies are kept: as configured, else in the run directory. Raises ConfigError when that is remote."""
    if judge.cache is not None:
        return Path(judge.cache).expanduser()
    if not run_dir.is_local:
        raise ConfigError(
            f"the judge's replies cannot be kept in {run_dir.uri()}, which is no mounted filesystem; set "
            f"feedback.judge.cache to a file on the machine that drives the run"
        )
    return run_dir.local_path("judge.sqlite")
