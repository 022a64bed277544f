"""`aft-ray evaluate`: a model directory or a run, measured with engines started for the purpose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aft_ray.cluster import connected, evaluation_placement
from aft_ray.config import ConfigError, RunConfig
from aft_ray.evaluation.evaluator import evaluate, unanswered
from aft_ray.evaluation.metrics import Result
from aft_ray.ledger import Ledger
from aft_ray.observe.reporter import Reporter
from aft_ray.preflight import check_model
from aft_ray.questions import load_tokenizer, prepare
from aft_ray.run_dir import LOGS, RunDir


@dataclass(frozen=True, slots=True)
class Target:
    """What is evaluated: a model directory or hub name, under the name of its row and of its JSON file."""

    model: str
    label: str


def run_target(config: RunConfig, run_dir: RunDir, version: int | None) -> Target:
    """The model that a run published as `version`; None: the last."""
    trained = Ledger(run_dir).trained_rounds()
    if version is None:
        if not trained:
            raise ConfigError(f"{run_dir.uri()} has no trained round yet; wait for one, or evaluate a model directory")
        version = trained[-1]
    if version == 0 and not config.vft.epochs:
        return Target(config.model.name, "version 0")
    if version not in trained:
        known = ", ".join(map(str, trained)) or "none"
        raise ConfigError(f"{run_dir.uri()} has no version {version}; it has published: {known}")
    return Target(str(run_dir.fetch_directory(run_dir.model(version))), f"version {version}")


def evaluate_targets(
    config: RunConfig, targets: list[Target], reporter: Reporter, log_dir: RunDir | None
) -> dict[str, tuple[Result, dict[str, Any]]]:
    """Metrics of each target on `evaluation.split`, on the same questions and draws; one engine start a target."""
    from aft_ray.sampling.pool import SamplerPool

    split = config.evaluation.split
    results = {}
    with connected(config, evaluation_placement(config)):
        for target in targets:
            of_target = config.model_copy(update={"model": config.model.model_copy(update={"name": target.model})})
            check_model(of_target)
            tokenizer = load_tokenizer(of_target)
            questions = prepare(of_target, split, tokenizer).groups
            logs = str(log_dir.local_path(LOGS)) if log_dir is not None and log_dir.is_local else None
            pool = SamplerPool.start(of_target, target.model, tokenizer.eos_token_id, logs, None)
            what = f"evaluating {target.label} on {len(questions)} {split} questions"
            try:
                reporter.say(what)
                pool.wait_ready()
                results[target.label] = evaluate(
                    of_target,
                    pool,
                    None,
                    unanswered(questions, 0),
                    config.evaluation.k,
                    lambda done, total, what=what: reporter.progress(what, done, total),  # type: ignore[misc]
                )
            finally:
                pool.close()
    return results


def write_result(path: Path, target: Target, config: RunConfig, result: Result, facts: dict[str, Any]) -> None:
    """One evaluation as JSON, with what is needed to make it again."""
    import json

    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "model": target.model,
        "task": ", ".join(config.task_configs),
        "split": config.evaluation.split,
        "temperature": config.evaluation.temperature,
        "seed": config.evaluation.seed,
        **result.to_json(),
        **facts,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
