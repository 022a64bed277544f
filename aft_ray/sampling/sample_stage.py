"""The stage of the pipeline that samples: it forwards small batches to the long-lived samplers.

With `sampling.adaptive` it labels the candidates of a batch and samples more for the questions that need more, until
none does or may have more.

Invariants: every question that enters the stage leaves it once, with candidates of the policy version that was asked
for, or with the reason why it failed. The first candidates of a question are the same, however many it gets.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
from ray.exceptions import RayError

from aft_ray.cluster.remote_errors import traceback_message
from aft_ray.config.run import SamplingConfig
from aft_ray.inference.request_parameters import Prompt, SamplingSpec
from aft_ray.inference.versioned_engine import WrongVersion
from aft_ray.sampling.adaptive import needs_more, next_candidates
from aft_ray.sampling.sampler import RefusedQuestion
from aft_ray.sampling.sampler_handles import SamplerHandles
from aft_ray.sampling.sampler_health import SamplerHealth, reason_of
from aft_ray.storage.records import GROUP_SCHEMA, Candidate, Group, groups_to_table, table_to_groups
from aft_ray.verify.label import label_groups
from aft_ray.verify.process_pool import AnswerReader, shared_verifier
from aft_ray.weights.version_manifest import VersionManifest, WeightUpdateFailed

# The columns that the stage adds: why a question failed (null: it did not), and how often it was tried.
FAILURE, ATTEMPTS = "failure", "attempts"


@dataclass(frozen=True, slots=True)
class Growth:
    """How groups get more candidates than `SampleJob.spec.k` while all verdicts on them are the same.

    Args:
        step: candidates that a group gets at a time.
        most: candidates that a group has at most.
        tasks: the tasks of the run by the names in `Question.task`, which read the answers.
    """

    step: int
    most: int
    tasks: Mapping[str, AnswerReader]


@dataclass(frozen=True, slots=True)
class SampleJob:
    """What a stage does with every question: which samplers it asks, how, and for which version.

    Args:
        manifest: the version that must answer, which a sampler that was restarted loads first; None: whatever the
            samplers were started with.
        purpose: together with the run's seed and the question it fixes the candidates.
        growth: None: every question gets `spec.k` candidates.
    """

    samplers: SamplerHandles
    manifest: VersionManifest | None
    spec: SamplingSpec
    sampling: SamplingConfig
    seed: int
    purpose: str
    growth: Growth | None = None

    @property
    def version(self) -> int | None:
        return self.manifest.version if self.manifest else None


def question_seed(seed: int, purpose: str, question_id: str) -> int:
    """A seed that depends on the question alone, and not on which sampler answers it or in which order."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{question_id}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def split_failed(batch: pa.Table) -> tuple[list[Group], list[str | None], list[int]]:
    """The groups that leave the stage, why each failed (None: it did not), and how often each was tried."""
    groups = table_to_groups(batch.select(GROUP_SCHEMA.names))
    return groups, batch.column(FAILURE).to_pylist(), batch.column(ATTEMPTS).to_pylist()


@dataclass(frozen=True, slots=True)
class _Failed:
    """Why an attempt failed. `final`: another attempt would fail too."""

    reason: str
    attempts: int = 1
    final: bool = False


class SampleStage:
    """A callable for `map_batches`: groups without candidates in, groups with candidates and two columns more out.

    Each batch goes to the sampler with the fewest questions. A question that fails is tried again alone, at most
    `sampling.attempts` times in all.
    """

    def __init__(self) -> None:
        self._load: Counter[int] = Counter()  # questions that each sampler has now
        self._health: SamplerHealth | None = None

    async def __call__(self, batch: pa.Table, job: SampleJob) -> pa.Table:
        """
        Raises:
            SamplersFailed: too few samplers are left.
            WeightUpdateFailed: a sampler that was restarted does not take the weights.
        """
        if self._health is None:
            self._health = job.samplers.health()
            self._health.watch()
        groups = table_to_groups(batch)
        answers = await self._sample(job, self._health, groups)
        if job.growth is not None:
            answers = await self._grow(job, job.growth, self._health, answers)
        failed = [answer if isinstance(answer, _Failed) else None for answer in answers]
        table = groups_to_table(
            group if isinstance(answer, _Failed) else answer for group, answer in zip(groups, answers, strict=True)
        )
        table = table.append_column(FAILURE, pa.array([one.reason if one else None for one in failed], pa.string()))
        return table.append_column(ATTEMPTS, pa.array([one.attempts if one else 1 for one in failed], pa.int32()))

    async def close(self) -> None:
        """Ends the watch over the samplers. In a run, the process of the stage ends with the pipeline."""
        if self._health is not None:
            await self._health.close()

    async def _grow(
        self, job: SampleJob, growth: Growth, health: SamplerHealth, answers: list[Group | _Failed]
    ) -> list[Group | _Failed]:
        """The answers with more candidates where the first ones are not enough.

        The last candidates of a group that may have no more decide nothing, so they stay without a label here.
        """
        result, count = dict(enumerate(answers)), job.spec.k
        # The groups that may grow, by their index in the batch. Each of them has `count` candidates.
        growing = {index: answer for index, answer in result.items() if not isinstance(answer, _Failed)}
        while growing and (more := next_candidates(count, growth.most, growth.step)):
            # In a thread, because it waits for the processes of the verifier, and other batches must go on.
            labelled = await asyncio.to_thread(label_groups, list(growing.values()), growth.tasks, shared_verifier())
            growing = dict(zip(growing, labelled, strict=True))
            result |= growing
            growing = {index: group for index, group in growing.items() if needs_more(group.candidates)}
            if growing:
                job, count = replace(job, spec=replace(job.spec, k=more)), count + more
                added = await self._sample(job, health, list(growing.values()))
                result |= zip(growing, added, strict=True)
                growing = {index: group for index in growing if not isinstance(group := result[index], _Failed)}
        return list(result.values())

    async def _sample(self, job: SampleJob, health: SamplerHealth, groups: Sequence[Group]) -> list[Group | _Failed]:
        """The groups with `job.spec.k` more candidates each; for some, why their question failed."""
        answers = await self._attempt(job, health, groups)
        answers = await asyncio.gather(
            *(self._retry(job, health, group, answer) for group, answer in zip(groups, answers, strict=True))
        )
        return [
            answer if isinstance(answer, _Failed) else replace(group, candidates=[*group.candidates, *answer])
            for group, answer in zip(groups, answers, strict=True)
        ]

    async def _retry(
        self, job: SampleJob, health: SamplerHealth, group: Group, answer: list[Candidate] | _Failed
    ) -> list[Candidate] | _Failed:
        while isinstance(answer, _Failed) and not answer.final and answer.attempts < job.sampling.attempts:
            attempts = answer.attempts + 1
            (answer,) = await self._attempt(job, health, [group])
            if isinstance(answer, _Failed):
                answer = replace(answer, attempts=attempts)
        return answer

    async def _attempt(
        self, job: SampleJob, health: SamplerHealth, groups: Sequence[Group]
    ) -> list[list[Candidate] | _Failed]:
        prompts = [
            Prompt(
                group.prompt_token_ids,
                question_seed(job.seed, job.purpose, group.question.id) + len(group.candidates),
            )
            for group in groups
        ]
        index = min(sorted(await health.wait_for_minimum()), key=lambda i: self._load[i])
        self._load[index] += len(prompts)
        try:
            answers = await asyncio.wait_for(self._call(job, index, prompts), job.sampling.timeout_s)
        except WeightUpdateFailed as error:
            # The sampler is alive and did not take the weights, so that another attempt would fail too.
            raise WeightUpdateFailed(traceback_message(str(error))) from None
        except (RayError, WrongVersion) as error:
            # The sampler is asked again when it answers. Until then its load of 0 must not make it the first choice.
            health.mark_lost(index, reason_of(error))
            return [_Failed(f"sampler {index} failed: {reason_of(error)}")] * len(groups)
        except TimeoutError:
            reason = f"it did not answer in {job.sampling.timeout_s:.0f} s"
            health.mark_lost(index, reason)
            return [_Failed(f"sampler {index} failed: {reason}")] * len(groups)
        finally:
            self._load[index] -= len(prompts)
        return [_Failed(one.reason, final=True) if isinstance(one, RefusedQuestion) else one for one in answers]

    async def _call(self, job: SampleJob, index: int, prompts: list[Prompt]) -> list[list[Candidate] | RefusedQuestion]:
        sampler = job.samplers.actors[index]
        answers: list[list[Candidate] | RefusedQuestion]
        try:
            answers = await sampler.sample.remote(prompts, job.spec, job.version)
        except WrongVersion:
            if job.manifest is None:
                raise
            # The sampler was restarted: it loads the version of this round before it answers.
            await sampler.load.remote(job.manifest, job.samplers.tolerance, job.samplers.load_timeout_s)
            answers = await sampler.sample.remote(prompts, job.spec, job.version)
        return answers
