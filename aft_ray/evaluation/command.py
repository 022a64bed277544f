"""What `aft-ray evaluate` does once its arguments are understood: answers, figures, files.

Invariant: files of answers alone are measured without an engine, and without importing one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aft_ray.config.run import ConfigError, EvaluationConfig, RunConfig
from aft_ray.evaluation.generations import read_generations
from aft_ray.evaluation.report.summary import EvaluatedModel, EvaluationSummary, summarize, write_summary
from aft_ray.evaluation.targets import EvaluationPlan, Target
from aft_ray.observe.logs import library_output_to
from aft_ray.observe.reporter import Reporter
from aft_ray.storage.run_dir import EVALUATIONS


def evaluate_targets(
    plan: EvaluationPlan, baseline: str | None, output: Path | None, plots: bool, log: Path
) -> tuple[EvaluationSummary, str | None, list[str]]:
    """Measures all targets; returns the figures, a title for their table, and the files written, the JSON first."""
    chosen = _baseline(plan.targets, baseline)
    evaluation = plan.config.evaluation if plan.config else EvaluationConfig()
    with library_output_to(log) as console, Reporter(None, console) as reporter:
        # Files first: a malformed line is found before an engine has worked for an hour.
        read = {target.label: _read(target, plan.config, reporter) for target in plan.targets if target.kind == "file"}
        models = [target for target in plan.targets if target.kind == "model"]
        if models:
            from aft_ray.evaluation.standalone import evaluate_models

            assert plan.config is not None, "models are planned with a config"
            log_dir = next((target.run_dir for target in models if target.run_dir is not None), None)
            read |= {one.label: one for one in evaluate_models(plan.config, models, reporter, log_dir)}
        evaluated = [read[target.label] for target in plan.targets]
        if len(evaluated) > 1 or plots:
            reporter.say("working out the figures")
        outcome = summarize(evaluated, chosen, evaluation.resamples, evaluation.seed)
        with _output(plan, output) as (path, keep):
            files = keep(write_summary(outcome, path, _facts(plan, bool(models)), plots))
    title = f"{', '.join(plan.config.task_configs)}, {evaluation.split}" if plan.config and models else None
    return outcome, title, files


def _read(target: Target, config: RunConfig | None, reporter: Reporter) -> EvaluatedModel:
    what = f"verifying {target.label}"
    answered = read_generations(Path(target.source), config, lambda done, total: reporter.progress(what, done, total))
    return EvaluatedModel(target.label, target.source, answered, on_file=config is None)


def _baseline(targets: Sequence[Target], given: str | None) -> str:
    """The label of the baseline, which may be given as a label or as the target was."""
    if given is None:
        return targets[0].label
    for target in targets:
        place = target.run_dir.uri() if target.run_dir is not None else target.source
        if given in (target.label, target.source, target.argument) or given.rstrip("/") == place.rstrip("/"):
            return target.label
    raise ConfigError(f"--baseline {given} is none of the targets; they are {', '.join(t.label for t in targets)}")


@contextmanager
def _output(plan: EvaluationPlan, given: Path | None) -> Iterator[tuple[Path, Callable[[list[Path]], list[str]]]]:
    """Where the JSON is written, and what names the files written; a run on an object store gets them uploaded.

    A run's own evaluation lies in the run; everything else where the command is given.
    """
    split = plan.config.evaluation.split if plan.config else "answers"
    target, others = plan.targets[0], plan.targets[1:]
    if given is not None or others or target.run_dir is None:
        # "answers" for a file: beside generations-X.jsonl an evaluation of it must not take the place of X.json.
        name = f"{target.name}-{'answers' if target.kind == 'file' else split}.json"
        yield given or Path(f"comparison-{split}.json" if others else name), lambda files: list(map(str, files))
        return
    run_dir, path = target.run_dir, target.run_dir.evaluation(f"{split}-{target.name}")
    if run_dir.is_local:
        yield run_dir.local_path(path), lambda files: list(map(str, files))
        return
    with tempfile.TemporaryDirectory(prefix="aft-ray-evaluation-") as scratch:

        def upload(files: list[Path]) -> list[str]:
            for file in reversed(files):  # the JSON, which names the others, last
                run_dir.write_bytes(f"{EVALUATIONS}/{file.name}", file.read_bytes())
            return [run_dir.uri(f"{EVALUATIONS}/{file.name}") for file in files]

        yield Path(scratch) / Path(path).name, upload


def _facts(plan: EvaluationPlan, sampled: bool) -> dict[str, Any]:
    """What is needed to make the evaluation again."""
    if plan.config is None:
        return {}
    evaluation = plan.config.evaluation
    task = ", ".join(plan.config.task_configs)
    if not sampled:
        return {"task": task}
    return {
        "task": task,
        "split": evaluation.split,
        "temperature": evaluation.temperature,
        "seed": evaluation.seed,
    }
