"""The Ray Data pipeline: unanswered groups in, labelled groups out, streamed through the long-lived samplers.

read -> SampleStage (asynchronous, forwards small batches to the samplers) -> label -> write. Invariant: every group that goes
in comes out once, answered or parked with a reason; nothing is dropped and nothing is answered by two versions.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aft_ray.config.run import RunConfig, SamplingConfig
from aft_ray.inference.engine import Prompt, SamplingSpec
from aft_ray.sampling.judge_actor import RemoteJudge
from aft_ray.sampling.sampler import RefusedQuestion, WrongVersion
from aft_ray.sampling.sampler_health import SamplerHealth, SamplersFailed, last_line, reason_of
from aft_ray.sampling.sampler_pool import SamplerPool, Samplers
from aft_ray.storage.ledger import FailedQuestion, GroupFile, write_group_file
from aft_ray.storage.records import GROUP_SCHEMA, Candidate, Group, Verdict, groups_to_table, table_to_groups
from aft_ray.storage.run_dir import RunDir
from aft_ray.tasks import build_tasks
from aft_ray.verify.feedback import reward_groups
from aft_ray.verify.label import label_groups
from aft_ray.verify.process_pool import shared_verifier
from aft_ray.weights.version_manifest import VersionManifest, WeightUpdateFailed


@dataclass(frozen=True, slots=True)
class WrittenGroups:
    """One durable file of labelled groups, the questions parked beside it, and what they amounted to."""

    file: GroupFile | None
    parked: tuple[FailedQuestion, ...]
    count_groups: SampleCounts


@dataclass(frozen=True, slots=True)
class SampleCounts:
    """Counts over labelled groups; `right_score` and `wrong_score` are sums over candidates, nats per token."""

    groups: int = 0
    with_signal: int = 0
    right: int = 0
    wrong: int = 0
    undecided: int = 0
    truncated: int = 0
    tokens: int = 0
    right_score: float = 0.0
    wrong_score: float = 0.0

    def __add__(self, other: SampleCounts) -> SampleCounts:
        return SampleCounts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def pass_rate(self) -> float:
        """Share of right candidates among those the verifier could tell."""
        return self.right / max(1, self.right + self.wrong)


def count_groups(groups: Sequence[Group]) -> SampleCounts:
    candidates = [candidate for group in groups for candidate in group.candidates]
    right = [candidate for candidate in candidates if candidate.verdict is Verdict.RIGHT]
    wrong = [candidate for candidate in candidates if candidate.verdict is Verdict.WRONG]
    return SampleCounts(
        groups=len(groups),
        with_signal=sum(group.has_signal for group in groups),
        right=len(right),
        wrong=len(wrong),
        undecided=len(candidates) - len(right) - len(wrong),
        truncated=sum(candidate.finish_reason == "length" for candidate in candidates),
        tokens=sum(len(candidate.token_ids) for candidate in candidates),
        right_score=sum(candidate.score for candidate in right),
        wrong_score=sum(candidate.score for candidate in wrong),
    )


def sampling_spec(sampling: SamplingConfig) -> SamplingSpec:
    return SamplingSpec(sampling.k, sampling.temperature, sampling.top_p, sampling.max_tokens)


def question_seed(seed: int, purpose: str, question_id: str) -> int:
    """A seed that depends on the question alone, not on which sampler answers it or in which order."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{question_id}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def sample_round(
    config: RunConfig,
    pool: SamplerPool,
    manifest: VersionManifest | None,
    unanswered: Sequence[Group],
    run_dir: RunDir,
    judge: RemoteJudge | None = None,
) -> Iterator[WrittenGroups]:
    """Samples, labels and writes groups; yields each file as it becomes durable, for the ledger to commit."""
    round_number = unanswered[0].round
    answered = _answered(config, pool, manifest, unanswered, sampling_spec(config.sampling), f"round {round_number}")
    written = answered.map_batches(
        _label_and_write,
        batch_size=config.sampling.groups_per_file,
        batch_format="pyarrow",
        fn_kwargs={"config": config, "run_dir": run_dir, "round_number": round_number, "judge": judge},
        num_cpus=0.5,
    )
    for row in written.iter_rows():
        yield _written(row)


def answer_all(
    config: RunConfig,
    pool: SamplerPool,
    manifest: VersionManifest | None,
    unanswered: Sequence[Group],
    how: SamplingSpec,
    purpose: str,
) -> Iterator[tuple[Group, str | None]]:
    """The same pipeline without files, for evaluation: each labelled group, or the group and why it was parked."""
    answered = _answered(config, pool, manifest, unanswered, how, purpose)
    tasks = build_tasks(config)
    try:
        for batch in answered.iter_batches(batch_size=None, batch_format="pyarrow"):
            groups, reasons = _split(batch)
            yield from zip(label_groups(groups, tasks, shared_verifier()), reasons, strict=True)
    except RayError as error:
        raise SamplersFailed(f"{purpose} failed: {last_line(str(error))}") from error


def _answered(
    config: RunConfig,
    pool: SamplerPool,
    manifest: VersionManifest | None,
    unanswered: Sequence[Group],
    how: SamplingSpec,
    purpose: str,
) -> ray.data.Dataset:
    from ray.data.read_api import from_blocks

    quiet_ray_data()
    size, in_flight = data_flow(config.sampling, len(pool.actors))
    batches = [groups_to_table(unanswered[start : start + size]) for start in range(0, len(unanswered), size)]
    # `ray.data.from_arrow` would run a task of one whole CPU for each batch, only to count its rows.
    return from_blocks(batches).map_batches(
        SampleStage,
        fn_kwargs={"job": SampleJob(pool.handles(), manifest, how, config.sampling, config.seed, purpose)},
        # One block is one batch; many of them are in flight through one forwarding actor.
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=1, max_tasks_in_flight_per_actor=in_flight, max_concurrent_calls_per_actor=in_flight
        ),
        num_cpus=0.1,
        # Beside the driver: it should not be lost with a sampler's node.
        scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
    )


def data_flow(sampling: SamplingConfig, samplers: int) -> tuple[int, int]:
    """How questions stream to the samplers: how many go in one batch, and how many batches are in flight at once."""
    return sampling.batch_size, sampling.in_flight * samplers


@dataclass(frozen=True, slots=True)
class SampleJob:
    """What `SampleStage` is to do with every question: whom to ask, how, and with which weights."""

    pool: Samplers
    manifest: VersionManifest | None
    how: SamplingSpec
    sampling: SamplingConfig
    seed: int
    purpose: str

    @property
    def version(self) -> int | None:
        return self.manifest.version if self.manifest else None


class SampleStage:
    """Forwards questions to the least loaded sampler; a question that fails is tried again alone, then parked.

    Raises SamplersFailed when too few samplers are left, WeightUpdateFailed when one that came back refuses the weights.
    """

    def __init__(self) -> None:
        self._load: Counter[int] = Counter()
        self._health: SamplerHealth | None = None

    async def __call__(self, batch: pa.Table, job: SampleJob) -> pa.Table:
        if self._health is None:
            self._health = job.pool.health()
            self._health.watch()
        groups = table_to_groups(batch)
        answers = await self._attempt(job, self._health, groups)
        answers = await asyncio.gather(
            *(self._insist(job, self._health, g, a) for g, a in zip(groups, answers, strict=True))
        )
        failed = [answer if isinstance(answer, _Failed) else None for answer in answers]
        table = groups_to_table(
            replace(group, candidates=[] if isinstance(answer, _Failed) else answer)
            for group, answer in zip(groups, answers, strict=True)
        )
        table = table.append_column("parked", pa.array([f.reason if f else None for f in failed], pa.string()))
        return table.append_column("attempts", pa.array([f.attempts if f else 1 for f in failed], pa.int32()))

    async def close(self) -> None:
        """Ends the watch over the samplers. In a run, the process that asks ends with the pipeline."""
        if self._health is not None:
            await self._health.close()

    async def _insist(
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
            Prompt(group.prompt_token_ids, question_seed(job.seed, job.purpose, group.question.id)) for group in groups
        ]
        index = min(sorted(await health.enough()), key=lambda i: self._load[i])
        weight = len(prompts)
        self._load[index] += weight
        try:
            answers = await asyncio.wait_for(self._call(job, index, prompts), job.sampling.timeout_s)
        except WeightUpdateFailed as error:
            raise WeightUpdateFailed(last_line(str(error))) from None  # it lives and refuses the weights
        except (RayError, WrongVersion) as error:
            # It is asked again once it answers; being empty must not make it preferred meanwhile.
            health.lost(index, reason_of(error))
            return [_Failed(f"sampler {index} failed: {reason_of(error)}")] * len(groups)
        except TimeoutError:
            reason = f"it did not answer in {job.sampling.timeout_s:.0f} s"
            health.lost(index, reason)
            return [_Failed(f"sampler {index} failed: {reason}")] * len(groups)
        finally:
            self._load[index] -= weight
        return [_Failed(a.reason, final=True) if isinstance(a, RefusedQuestion) else a for a in answers]

    async def _call(self, job: SampleJob, index: int, prompts: list[Prompt]) -> list[list[Candidate] | RefusedQuestion]:
        actor = job.pool.actors[index]
        answers: list[list[Candidate] | RefusedQuestion]
        try:
            answers = await actor.answer.remote(prompts, job.how, job.version)
        except WrongVersion:
            if job.manifest is None:
                raise
            # It was restarted: bring it to the version of this round before it serves.
            await actor.load.remote(job.manifest, job.pool.tolerance, job.pool.load_timeout_s)
            answers = await actor.answer.remote(prompts, job.how, job.version)
        return answers


@dataclass(frozen=True, slots=True)
class _Failed:
    """Why an attempt failed; `final`: no other attempt could succeed."""

    reason: str
    attempts: int = 1
    final: bool = False


def _split(batch: pa.Table) -> tuple[list[Group], list[str | None]]:
    groups = table_to_groups(batch.select(GROUP_SCHEMA.names))
    return groups, batch.column("parked").to_pylist()


def _label_and_write(
    batch: pa.Table, config: RunConfig, run_dir: RunDir, round_number: int, judge: RemoteJudge | None
) -> pa.Table:
    groups, reasons = _split(batch)
    answered, parked = [], []
    for group, reason, attempts in zip(groups, reasons, batch.column("attempts").to_pylist(), strict=True):
        if reason is None:
            answered.append(group)
        else:
            parked.append(FailedQuestion(round_number, group.question.id, reason, attempts))
    labelled = label_groups(answered, build_tasks(config), shared_verifier())
    labelled = reward_groups(labelled, config.feedback, judge)
    file = write_group_file(run_dir, labelled) if labelled else None
    return pa.table({"written": pa.array([_to_row(WrittenGroups(file, tuple(parked), count_groups(labelled)))])})


def _to_row(written: WrittenGroups) -> str:
    return json.dumps(asdict(written))


def _written(row: dict[str, Any]) -> WrittenGroups:
    fields = json.loads(row["written"])
    file = fields["file"]
    return WrittenGroups(
        file=GroupFile(**{**file, "question_ids": tuple(file["question_ids"])}) if file else None,
        parked=tuple(FailedQuestion(**parked) for parked in fields["parked"]),
        count_groups=SampleCounts(**fields["count_groups"]),
    )


def quiet_ray_data() -> None:
    """Our own progress is shown instead; Ray Data's log goes to Ray's session directory."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.print_on_execution_start = False
