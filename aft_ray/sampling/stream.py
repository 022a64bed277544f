"""The Ray Data pipeline of a round: its input is groups without candidates, its output files of labelled groups.

    read → sample (`sample_stage.py`, asynchronous, through the long-lived samplers) → label and reward → write

With `sampling.adaptive` the sampling stage labels candidates too, to see which questions need more of them; what it has
labelled is not verified again.

Invariant: every group leaves the pipeline once, with candidates or with the reason why its question failed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aft_ray.cluster.compat import dataset_from_blocks
from aft_ray.cluster.remote_errors import traceback_message
from aft_ray.config.run import RunConfig, SamplingConfig
from aft_ray.inference.request_parameters import SamplingSpec
from aft_ray.sampling.counts import SampleCounts, count_groups
from aft_ray.sampling.judge_actor import RemoteJudge
from aft_ray.sampling.sample_stage import Growth, SampleJob, SampleStage, split_failed
from aft_ray.sampling.sampler_health import SamplersFailed
from aft_ray.sampling.sampler_pool import SamplerPool
from aft_ray.storage.groups.group_files import GroupFile, group_file_from_json, write_group_file
from aft_ray.storage.groups.group_table import GroupTable
from aft_ray.storage.ledger import FailedQuestion
from aft_ray.storage.records import Group
from aft_ray.storage.run_dir import RunDir
from aft_ray.tasks import build_tasks
from aft_ray.verify.feedback import reward_groups
from aft_ray.verify.label import label_groups
from aft_ray.verify.process_pool import shared_verifier
from aft_ray.weights.version_manifest import VersionManifest

# Questions that one pipeline takes. Ray Data keeps its input blocks, and what it knows of each, until a pipeline ends;
# the samplers are idle only while the last few questions of a pipeline are answered.
_PIPELINE_QUESTIONS = 1 << 16


@dataclass(frozen=True, slots=True)
class WrittenGroups:
    """The result of a batch of questions.

    Attributes:
        file: the durable file of the labelled groups; None: all questions of the batch failed.
        failed: the failed questions of the batch.
        counts: counts over the groups of the file.
    """

    file: GroupFile | None
    failed: tuple[FailedQuestion, ...]
    counts: SampleCounts


def sampling_spec(sampling: SamplingConfig) -> SamplingSpec:
    """How the candidates of a round are sampled; with `sampling.adaptive`, all that a question may get."""
    return SamplingSpec(sampling.k, sampling.temperature, sampling.top_p, sampling.max_tokens)


def sample_round(
    config: RunConfig,
    pool: SamplerPool,
    manifest: VersionManifest | None,
    groups: Sequence[Group],
    run_dir: RunDir,
    judge: RemoteJudge | None = None,
) -> Iterator[WrittenGroups]:
    """Samples, labels and writes groups; yields each file as soon as it is durable, for the ledger to record.

    Args:
        manifest: the version that must answer; None: the weights that the samplers were started with.
        groups: groups of one round without candidates, at least one.
    """
    for start in range(0, len(groups), _PIPELINE_QUESTIONS):
        yield from _sample_part(config, pool, manifest, groups[start : start + _PIPELINE_QUESTIONS], run_dir, judge)


def _sample_part(
    config: RunConfig,
    pool: SamplerPool,
    manifest: VersionManifest | None,
    groups: Sequence[Group],
    run_dir: RunDir,
    judge: RemoteJudge | None,
) -> Iterator[WrittenGroups]:
    """Samples some questions of a round in one pipeline."""
    round_number = groups[0].round
    spec, growth, purpose = sampling_spec(config.sampling), None, f"round {round_number}"
    if (adaptive := config.sampling.adaptive) is not None:
        growth = Growth(adaptive.step, spec.k, build_tasks(config))
        spec = replace(spec, k=adaptive.initial_k)
    sampled = _sampled_groups(config, pool, manifest, groups, spec, purpose, growth)
    written = sampled.map_batches(
        _label_and_write,
        batch_size=config.sampling.groups_per_file,
        batch_format="pyarrow",
        fn_kwargs={"config": config, "run_dir": run_dir, "round_number": round_number, "judge": judge},
        num_cpus=0.5,
    )
    for row in written.iter_rows():
        yield _from_row(row)


def sample_all(
    config: RunConfig,
    pool: SamplerPool,
    manifest: VersionManifest | None,
    groups: Sequence[Group],
    spec: SamplingSpec,
    purpose: str,
) -> Iterator[tuple[Group, str | None]]:
    """The same pipeline without files, for evaluation.

    Yields each group, labelled, and None; or a group without candidates and why its question failed.

    Raises:
        SamplersFailed: the pipeline failed.
    """
    sampled = _sampled_groups(config, pool, manifest, groups, spec, purpose)
    tasks = build_tasks(config)
    try:
        for batch in sampled.iter_batches(batch_size=None, batch_format="pyarrow"):
            answered, reasons, _ = split_failed(batch)
            yield from zip(label_groups(answered, tasks, shared_verifier()), reasons, strict=True)
    except RayError as error:
        raise SamplersFailed(f"{purpose} failed: {traceback_message(str(error))}") from error


def data_flow(sampling: SamplingConfig, samplers: int) -> tuple[int, int]:
    """How questions stream to the samplers: questions in a batch, and batches in flight at the same time."""
    return sampling.batch_size, sampling.in_flight * samplers


def _sampled_groups(
    config: RunConfig,
    pool: SamplerPool,
    manifest: VersionManifest | None,
    groups: Sequence[Group],
    spec: SamplingSpec,
    purpose: str,
    growth: Growth | None = None,
) -> ray.data.Dataset:
    """The groups after the sampling stage: with candidates, or with the reason why their question failed."""
    _silence_ray_data()
    size, in_flight = data_flow(config.sampling, len(pool.actors))
    job = SampleJob(pool.handles(), manifest, spec, config.sampling, config.seed, purpose, growth)
    table = GroupTable.of(groups)
    batches = [table.block(start, size) for start in range(0, len(table), size)]
    return dataset_from_blocks(batches).map_batches(
        SampleStage,
        fn_kwargs={"job": job},
        # One block is one batch; many of them are in flight through the one actor of this stage.
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=1, max_tasks_in_flight_per_actor=in_flight, max_concurrent_calls_per_actor=in_flight
        ),
        num_cpus=0.1,
        # The stage runs beside the driver, so that it is not lost with a sampler's node.
        scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
    )


def _label_and_write(
    batch: pa.Table, config: RunConfig, run_dir: RunDir, round_number: int, judge: RemoteJudge | None
) -> pa.Table:
    """Labels, rewards and writes a batch of sampled groups; returns one row, a WrittenGroups as JSON."""
    answered, failed = [], []
    for group, reason, attempts in zip(*split_failed(batch), strict=True):
        if reason is None:
            answered.append(group)
        else:
            failed.append(FailedQuestion(round_number, group.question.id, reason, attempts))
    tasks = build_tasks(config)
    labelled = label_groups(answered, tasks, shared_verifier())
    labelled = reward_groups(labelled, tasks, config.feedback, judge)
    file = write_group_file(run_dir, labelled) if labelled else None
    written = {
        "file": file.to_json() if file else None,
        "failed": [asdict(one) for one in failed],
        "counts": asdict(count_groups(labelled)),
    }
    return pa.table({"written": pa.array([json.dumps(written)])})


def _from_row(row: dict[str, Any]) -> WrittenGroups:
    """The WrittenGroups of a row that `_label_and_write` returned."""
    fields = json.loads(row["written"])
    return WrittenGroups(
        file=group_file_from_json(fields["file"]) if fields["file"] else None,
        failed=tuple(FailedQuestion(**failed) for failed in fields["failed"]),
        counts=SampleCounts(**fields["counts"]),
    )


def _silence_ray_data() -> None:
    """Switches Ray Data's progress bars and messages off, since the run shows its own progress.

    Ray keeps the log in its session directory.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.print_on_execution_start = False
