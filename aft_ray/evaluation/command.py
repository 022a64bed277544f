"""The work of `aft-ray evaluate` after its arguments are parsed: collect answers, compute metrics, write files.

Invariant: if only files of answers are measured, no engine is started or imported.
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
    """Measures all targets.

    Args:
        baseline: the target that the others are compared with; None: the first.
        output: the JSON file to write; None: a name is derived from the targets.
        log: the file that receives the output of other libraries.

    Returns:
        The metrics, a title for their table, and the files that were written, the JSON file first.
    """
    baseline_label = _baseline(plan.targets, baseline)
    evaluation = plan.config.evaluation if plan.config else EvaluationConfig()
    with library_output_to(log) as console, Reporter(None, console) as reporter:
        # Files are read first, so that an invalid line is reported before engines have worked for an hour.
        by_label = {
            target.label: _read(target, plan.config, reporter) for target in plan.targets if target.kind == "file"
        }
        models = [target for target in plan.targets if target.kind == "model"]
        if models:
            from aft_ray.evaluation.standalone import evaluate_models

            assert plan.config is not None, "a plan with models has a config"
            log_dir = next((target.run_dir for target in models if target.run_dir is not None), None)
            by_label |= {model.label: model for model in evaluate_models(plan.config, models, reporter, log_dir)}
        evaluated = [by_label[target.label] for target in plan.targets]
        if len(evaluated) > 1 or plots:
            reporter.say("computing the metrics")
        summary = summarize(evaluated, baseline_label, evaluation.resamples, evaluation.seed)
        with _output(plan, output) as (path, store):
            files = store(write_summary(summary, path, _settings(plan, bool(models)), plots))
    title = f"{', '.join(plan.config.task_configs)}, {evaluation.split}" if plan.config and models else None
    return summary, title, files


def _read(target: Target, config: RunConfig | None, reporter: Reporter) -> EvaluatedModel:
    task = f"verifying {target.label}"
    answered = read_generations(Path(target.source), config, lambda done, total: reporter.progress(task, done, total))
    return EvaluatedModel(target.label, target.source, answered, on_file=config is None)


def _baseline(targets: Sequence[Target], given: str | None) -> str:
    """The label of the baseline, which may be given as the label, the source or the argument of a target."""
    if given is None:
        return targets[0].label
    for target in targets:
        location = target.run_dir.uri() if target.run_dir is not None else target.source
        if given in (target.label, target.source, target.argument) or given.rstrip("/") == location.rstrip("/"):
            return target.label
    raise ConfigError(f"--baseline {given} is not one of the targets; they are {', '.join(t.label for t in targets)}")


@contextmanager
def _output(plan: EvaluationPlan, given: Path | None) -> Iterator[tuple[Path, Callable[[list[Path]], list[str]]]]:
    """Yields the path of the JSON file, and a function that stores the written files and returns their names.

    The evaluation of one model of a run is stored in the run directory, which may be on an object store. Everything
    else is stored in the current directory.
    """
    split = plan.config.evaluation.split if plan.config else "answers"
    target, others = plan.targets[0], plan.targets[1:]
    if given is not None or others or target.run_dir is None:
        # X.json may be the evaluation that wrote generations-X.jsonl, so the evaluation of that file has another name.
        name = f"{target.name}-{'answers' if target.kind == 'file' else split}.json"
        yield given or Path(f"comparison-{split}.json" if others else name), lambda files: list(map(str, files))
        return
    run_dir, path = target.run_dir, target.run_dir.evaluation(f"{split}-{target.name}")
    if run_dir.is_local:
        yield run_dir.local_path(path), lambda files: list(map(str, files))
        return
    with tempfile.TemporaryDirectory(prefix="aft-ray-evaluation-") as scratch:

        def upload(files: list[Path]) -> list[str]:
            for file in reversed(files):  # the JSON file, which names the others, is uploaded last
                run_dir.write_bytes(f"{EVALUATIONS}/{file.name}", file.read_bytes())
            return [run_dir.uri(f"{EVALUATIONS}/{file.name}") for file in files]

        yield Path(scratch) / Path(path).name, upload


def _settings(plan: EvaluationPlan, sampled: bool) -> dict[str, Any]:
    """The settings of the evaluation, so that it can be repeated."""
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
