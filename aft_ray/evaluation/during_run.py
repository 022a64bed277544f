"""Evaluation of a run's versions on the validation split, by the samplers of the run.

Invariant: a version whose evaluation was completed is not evaluated again, even if the run is interrupted and resumed.
The file with its metrics is written last, and its existence shows that the evaluation was completed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from aft_ray.config.run import RunConfig
from aft_ray.storage.run_dir import EVALUATIONS, RunDir

if TYPE_CHECKING:
    from aft_ray.observe.reporter import Reporter
    from aft_ray.sampling.sampler_pool import SamplerPool
    from aft_ray.storage.records import Group
    from aft_ray.weights.version_manifest import VersionManifest


def evaluation_due(config: RunConfig, run_dir: RunDir, version: int) -> bool:
    """Whether a version must be evaluated on the validation split and was not yet. The last version always must."""
    every, last = config.rounds.evaluate_every, config.rounds.count
    if not every or (version % every and version != last):
        return False
    return not run_dir.exists(run_dir.evaluation(evaluation_name(version)))


def evaluation_name(version: int) -> str:
    """The name under which the evaluation of a version is stored."""
    return f"validation-{version:04d}"


@dataclass(frozen=True, slots=True)
class EvaluationDuringRun:
    """Evaluates versions when they are due.

    Args:
        evaluate: evaluates a version that the samplers hold and writes its file; None: the run evaluates nothing.
    """

    config: RunConfig
    run_dir: RunDir
    evaluate: Callable[[VersionManifest], None] | None

    def evaluate_if_due(self, manifest: VersionManifest) -> None:
        """Evaluates a version that has just been loaded into the samplers, if that is due."""
        if self.evaluate is not None and evaluation_due(self.config, self.run_dir, manifest.version):
            self.evaluate(manifest)


def evaluate_version(
    config: RunConfig,
    run_dir: RunDir,
    reporter: Reporter,
    pool: SamplerPool,
    questions: Sequence[Group],
    manifest: VersionManifest,
) -> None:
    """Answers the validation split with a version that the samplers hold; writes the generations and the metrics."""
    from aft_ray.evaluation.evaluator import answer_questions, unanswered_groups
    from aft_ray.evaluation.generations import generations_text
    from aft_ray.evaluation.statistics.metrics import measure

    version, evaluation = manifest.version, config.evaluation
    answered, generation = answer_questions(
        config,
        pool,
        manifest,
        unanswered_groups(questions, version),
        evaluation.during_training_k,
        1,
        lambda done, total: reporter.progress(f"evaluating version {version}", done, total),
    )
    result, facts = measure(answered, resamples=evaluation.resamples, seed=evaluation.seed), asdict(generation)
    name = evaluation_name(version)
    run_dir.write_bytes(f"{EVALUATIONS}/generations-{name}.jsonl", generations_text(answered).encode())
    run_dir.write_json(
        run_dir.evaluation(name), {"version": version, "split": "validation", **result.to_json(), **facts}
    )
    reporter.event("evaluated", split="validation", version=version, **facts, **result.flat_values())
    greedy = result.estimates["greedy"]
    by_task = "".join(f", {task} {part.estimates['greedy'].value:.1%}" for task, part in result.tasks.items())
    reporter.say(
        f"version {version}: {greedy.value:.1%} [{greedy.low:.1%}, {greedy.high:.1%}] of {result.questions} "
        f"validation questions right, greedy{by_task}"
    )
