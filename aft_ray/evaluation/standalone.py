"""Models measured with engines started for the purpose, one model after the other.

Invariant: all of them answer the same questions with the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from aft_ray.cluster.connect import connected
from aft_ray.cluster.reservations import evaluation_reservations
from aft_ray.config.run import RunConfig
from aft_ray.evaluation.evaluator import answer_questions, unanswered_groups
from aft_ray.evaluation.report.summary import EvaluatedModel
from aft_ray.evaluation.targets import Target
from aft_ray.observe.reporter import Reporter
from aft_ray.run.preflight import check_model
from aft_ray.storage.run_dir import LOGS, RunDir
from aft_ray.tasks.dataset import load_tokenizer, tokenize_split


def evaluate_models(
    config: RunConfig, targets: Sequence[Target], reporter: Reporter, log_dir: RunDir | None
) -> list[EvaluatedModel]:
    """The answers of each target to `evaluation.split`; one engine start a target."""
    from aft_ray.sampling.sampler_pool import SamplerPool

    split = config.evaluation.split
    configs = [_config_for(config, target) for target in targets]
    for of_target in configs:
        check_model(of_target)
    evaluated = []
    with connected(config.cluster, evaluation_reservations(config)):
        for target, of_target in zip(targets, configs, strict=True):
            tokenizer = load_tokenizer(of_target)
            questions = tokenize_split(of_target, split, tokenizer).groups
            logs = str(log_dir.local_path(LOGS)) if log_dir is not None and log_dir.is_local else None
            pool = SamplerPool.start(of_target, target.source, tokenizer.eos_token_id, logs, None)
            what = f"evaluating {target.label} on {len(questions)} {split} questions"
            try:
                reporter.say(what)
                pool.wait_ready()
                answered, cost = answer_questions(
                    of_target,
                    pool,
                    None,
                    unanswered_groups(questions, 0),
                    config.evaluation.k,
                    config.evaluation.seeds,
                    lambda done, total, what=what: reporter.progress(what, done, total),  # type: ignore[misc]
                )
            finally:
                pool.close()
            evaluated.append(EvaluatedModel(target.label, target.source, answered, asdict(cost)))
    return evaluated


def _config_for(config: RunConfig, target: Target) -> RunConfig:
    """The common config with the target's model: a run says itself how its model is loaded and asked.

    Without adapters: a model that is evaluated is whole.
    """
    model = (target.model or config.model).model_copy(update={"name": target.source})
    return config.model_copy(update={"model": model, "lora": None})
