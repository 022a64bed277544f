"""The sampling of one round: each of its questions is answered, labelled and recorded in the ledger exactly once.

Invariants: a question that is in the ledger already is not asked again; a round is closed only when each of its
questions has a group, or is recorded as failed or as skipped, and not too many have failed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from ray.exceptions import RayError

from aft_ray.cluster.remote_errors import traceback_message
from aft_ray.config.run import RunConfig
from aft_ray.sampling.adaptive import all_right, longest_streak, questions_to_skip, streaks
from aft_ray.sampling.counts import SampleCounts, count_groups
from aft_ray.sampling.judge_actor import RemoteJudge
from aft_ray.sampling.stream import WrittenGroups
from aft_ray.storage.groups.group_files import write_group_file
from aft_ray.storage.groups.group_table import GroupTable
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.records import Group
from aft_ray.tasks.dataset import questions_of_round
from aft_ray.training.batching import training_order
from aft_ray.weights.version_manifest import VersionManifest

# Groups without candidates are small, so this many times more of them go into one file.
_REFERENCES_PER_GROUP = 64


class RunFailed(RuntimeError):
    """A run that ended before its last round. The message says what is missing and how to go on."""


class RoundReporter(Protocol):
    """The part of `observe.reporter.Reporter` that the sampling of a round uses."""

    def say(self, text: str) -> None: ...

    def event(self, name: str, **fields: Any) -> None: ...

    def progress(self, what: str, done: int, total: int, note: str = "") -> None: ...


@dataclass(frozen=True, slots=True)
class RoundSampling:
    """Samples the rounds of a run, one after the other.

    Args:
        questions: the training questions of the run, as groups without candidates.
        stream: answers questions with the samplers, which hold the version of the manifest, labels the answers and
            writes them; yields each file of groups as soon as it is durable (`sampling.stream.sample_round`).
        check: raises when training has failed meanwhile.
        judge: rates candidates, when the run's feedback asks for that.
        clock: returns the time in seconds.
    """

    config: RunConfig
    ledger: Ledger
    reporter: RoundReporter
    questions: Sequence[Group]
    stream: Callable[[VersionManifest, GroupTable], Iterator[WrittenGroups]]
    check: Callable[[], None]
    judge: RemoteJudge | None = None
    clock: Callable[[], float] = field(default=time.monotonic)

    def sample(self, round_number: int, manifest: VersionManifest, waited_s: float) -> None:
        """Samples what the ledger does not have yet of a round, and closes the round.

        Args:
            waited_s: seconds that the samplers waited for the version; they are reported with the round.

        Raises:
            RunFailed: sampling failed, or more questions failed than `sampling.max_failed` allows.
        """
        wanted = questions_of_round(self.config, self.questions, round_number)
        self._open(round_number)
        asked = self._without_skipped(round_number, wanted)
        groups = self._pending(round_number, asked, manifest.version)
        started = self.clock()
        counts = self._record(round_number, manifest, groups, len(asked))
        seconds = self.clock() - started
        self._check_complete(round_number, asked)
        if self.ledger.sampled(round_number):
            return  # the round was sampled completely before the run was resumed
        tokens_per_s = counts.tokens / max(seconds, 1e-9)
        if len(groups) < len(asked):  # the ledger had some of them before the run was resumed
            counts = sum(map(count_groups, self.ledger.iter_groups(round_number)), SampleCounts())
        skipped = len(wanted) - len(asked)
        self._close(round_number, manifest.version, _statistics(counts, skipped, seconds, waited_s, tokens_per_s))

    def write_references(self, round_number: int) -> None:
        """Records a round that trains on reference responses alone: its groups have no candidates.

        Raises:
            RunFailed: a question has no group in the end.
        """
        wanted = questions_of_round(self.config, self.questions, round_number)
        self._open(round_number)
        version = max(0, round_number - 1)
        groups = self._pending(round_number, wanted, version)
        size = _REFERENCES_PER_GROUP * self.config.sampling.groups_per_file
        for start in range(0, len(groups), size):
            self.ledger.commit(write_group_file(self.ledger.run_dir, groups[start : start + size]))
        self._check_complete(round_number, wanted)
        if not self.ledger.sampled(round_number):
            self.ledger.complete_sampling(round_number, version, {"groups": len(wanted)})

    def _open(self, round_number: int) -> None:
        """Opens the round in the ledger, reports what the ledger repaired, and lets failed questions be tried again."""
        audit = self.ledger.open_round(round_number)
        self.ledger.retry_failed(round_number)
        for sentence in (*audit.voided, *audit.adopted, *audit.deleted):
            self.reporter.say(f"round {round_number}: {sentence}")

    def _without_skipped(self, round_number: int, wanted: GroupTable) -> GroupTable:
        """The questions of a round without those that `sampling.adaptive` leaves out of it.

        The decision is recorded in the ledger, so that a resumed run takes the same one.
        """
        adaptive = self.config.sampling.adaptive
        if adaptive is None or not adaptive.skip_after:
            return wanted
        if (skipped := self.ledger.skipped(round_number)) is None:
            earlier = (
                ((id, all_right(one.right, one.decided)) for id, one in self.ledger.outlines(number))
                for number in range(round_number - 1, 0, -1)
            )
            lengths = streaks(earlier, wanted.ids, longest_streak(adaptive))
            least = self.config.training.groups_per_step
            skipped = frozenset(questions_to_skip(wanted.ids, lengths, adaptive, self.config.seed, round_number, least))
            self.ledger.record_skipped(round_number, skipped)
        return wanted.select(np.flatnonzero([id not in skipped for id in wanted.ids]))

    def _pending(self, round_number: int, wanted: GroupTable, version: int) -> GroupTable:
        """The questions of the round that the ledger does not have yet, for a version to sample.

        They are in the order in which they are trained on first. So the groups of an optimiser step are in few files,
        and a train worker reads little beside its share.
        """
        pending = wanted.select(self.ledger.pending_indexes(round_number, wanted.ids))
        order = training_order(pending.ids, self.config.seed, round_number, epoch=0)
        return pending.select(order).of_round(round_number, version)

    def _record(self, round_number: int, manifest: VersionManifest, groups: GroupTable, questions: int) -> SampleCounts:
        """Samples groups and records each file in the ledger as it becomes durable; returns what was counted."""
        counts, done, started = SampleCounts(), questions - len(groups), self.clock()
        what = f"round {round_number} sampling with version {manifest.version}"
        try:
            for written in self.stream(manifest, groups) if groups else ():
                if written.file is not None:
                    self.ledger.commit(written.file)
                for failed in written.failed:
                    self.ledger.record_failed(failed)
                self.check()
                counts, done = counts + written.counts, done + written.counts.groups + len(written.failed)
                speed = counts.tokens / max(self.clock() - started, 1e-9)
                note = f"{speed:,.0f} tokens/s, {counts.pass_rate:.0%} right"
                self.reporter.progress(what, done, questions, note)
        except RayError as error:
            raise RunFailed(
                f"sampling of round {round_number} failed: {traceback_message(str(error))}; what is sampled is "
                f"kept, start the same command again to go on"
            ) from error
        return counts

    def _check_complete(self, round_number: int, wanted: GroupTable) -> None:
        """Raises RunFailed when questions are missing, or more have failed than `sampling.max_failed` allows."""
        if missing := self.ledger.pending(round_number, wanted.ids):
            raise RunFailed(
                f"round {round_number} ended with {len(missing)} questions that neither have a group nor are recorded "
                f"as failed, among them {missing[0]}; start the same command again to sample them"
            )
        failed = self.ledger.failed_questions(round_number)
        if len(failed) > self.config.sampling.max_failed * len(wanted):
            reason, count = Counter(one.reason for one in failed).most_common(1)[0]
            raise RunFailed(
                f"round {round_number}: {len(failed)} of {len(wanted)} questions could not be sampled, more than "
                f"sampling.max_failed={self.config.sampling.max_failed:g}; {count} times: {reason}. "
                f"Start the same command again to try them again"
            )

    def _close(self, round_number: int, version: int, statistics: dict[str, Any]) -> None:
        """Records in the ledger that the round is sampled, and reports its statistics."""
        if self.judge is not None:
            rated = self.judge.counts()
            self.reporter.event("judged", round=round_number, **asdict(rated))
            self.reporter.say(f"round {round_number}: {rated.line()}")
        closed = self.ledger.complete_sampling(round_number, version, statistics)
        self.reporter.event(
            "sampled",
            round=round_number,
            version=version,
            staleness=round_number - 1 - version,
            parked=closed.failed,
            **statistics,
        )
        self.reporter.say(
            f"round {round_number}: sampled {closed.groups} groups with version {version} in "
            f"{statistics['seconds']:.0f} s ({statistics['tokens_per_s']:,.0f} tokens/s, waited "
            f"{statistics['waited_s']:.0f} s), {statistics['pass_rate']:.1%} right, {statistics['signal']:.0%} of "
            "groups with a signal"
            + (f", {statistics['candidates']:.1f} candidates a question" if self.config.sampling.adaptive else "")
            + (f", {statistics['skipped']} questions skipped" if statistics["skipped"] else "")
            + (f", {closed.failed} questions failed" if closed.failed else "")
        )


def _statistics(
    counts: SampleCounts, skipped: int, seconds: float, waited_s: float, tokens_per_s: float
) -> dict[str, Any]:
    """The fields of a `sampled` event. Scores are nats per token, means over candidates.

    `skipped` are questions that the round left out; `candidates` is the mean number of a question that it asked.
    """
    return {
        "groups": counts.groups,
        "skipped": skipped,
        "candidates": counts.candidates / max(1, counts.groups),
        "seconds": seconds,
        "waited_s": waited_s,
        "tokens": counts.tokens,
        "tokens_per_s": tokens_per_s,
        "pass_rate": counts.pass_rate,
        "signal": counts.with_signal / max(1, counts.groups),
        "right_score": counts.right_score / counts.right if counts.right else None,
        "wrong_score": counts.wrong_score / counts.wrong if counts.wrong else None,
        "undecided": counts.undecided,
        "truncated": counts.truncated,
    }
