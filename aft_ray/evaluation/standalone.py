"""Evaluation of models outside of a run: engines are started for each model, one model after the other.

Invariant: all models answer the same questions with the same sampling seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import date

from aft_ray.cluster.connect import connected
from aft_ray.cluster.reservations import evaluation_reservations
from aft_ray.config.run import RunConfig
from aft_ray.evaluation.evaluator import answer_questions, unanswered_groups
from aft_ray.evaluation.report.summary import EvaluatedModel
from aft_ray.evaluation.targets import Target
from aft_ray.observe.reporter import Reporter
from aft_ray.storage.model_files import check_model
from aft_ray.storage.run_dir import LOGS, RunDir
from aft_ray.tasks.dataset import load_tokenizer, tokenize_split
from aft_ray.tasks.response_end import response_ends


def evaluate_models(
    config: RunConfig, targets: Sequence[Target], reporter: Reporter, log_dir: RunDir | None
) -> list[EvaluatedModel]:
    """Samples the answers of each target to the questions of `evaluation.split`.

    Args:
        log_dir: the run whose logs/ receives the output of the engines. None, or a run on an object store: no logs.
    """
    from aft_ray.sampling.sampler_pool import SamplerPool

    split = config.evaluation.split
    today = date.today()  # one day for all models, even if midnight passes between two of them
    configs = [_config_for(config, target, today) for target in targets]
    for target_config in configs:
        check_model(target_config)
    evaluated = []
    with connected(config.cluster, evaluation_reservations(config)):
        for target, target_config in zip(targets, configs, strict=True):
            tokenizer = load_tokenizer(target_config)
            questions = tokenize_split(target_config, split, tokenizer).groups
            logs = str(log_dir.local_path(LOGS)) if log_dir is not None and log_dir.is_local else None
            ends = response_ends(target_config, tokenizer).ids
            pool = SamplerPool.start(target_config, target.source, ends, logs, None)
            task = f"evaluating {target.label} on {len(questions)} {split} questions"
            try:
                reporter.say(task)
                pool.wait_ready()
                answered, stats = answer_questions(
                    target_config,
                    pool,
                    None,
                    unanswered_groups(questions, 0),
                    config.evaluation.k,
                    config.evaluation.seeds,
                    lambda done, total, task=task: reporter.progress(task, done, total),  # type: ignore[misc]
                )
            finally:
                pool.close()
            evaluated.append(EvaluatedModel(target.label, target.source, answered, asdict(stats)))
    return evaluated


def _config_for(config: RunConfig, target: Target, today: date) -> RunConfig:
    """The common config with the model of the target, which a run may load and prompt in its own way.

    It has no adapter, because an evaluated model directory holds the merged weights. Its template date is `today` if
    its config has none.
    """
    model = (target.model or config.model).model_copy(update={"name": target.source}).dated(today)
    return config.model_copy(update={"model": model, "lora": None})
