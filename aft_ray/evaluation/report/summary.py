"""The summary of an evaluation: metrics, comparisons and curves of one or several models, and the files with them.

Invariant: all models are measured with the same number of samples per question, the largest that all of them have, so a
row of the table is one metric. Nothing here needs an engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aft_ray.config.run import ConfigError
from aft_ray.evaluation.answers import AnsweredQuestion
from aft_ray.evaluation.generations import generations_text
from aft_ray.evaluation.statistics.comparison import Comparison, compare
from aft_ray.evaluation.statistics.curves import Curves, accuracy_curves
from aft_ray.evaluation.statistics.histograms import Histogram, score_histograms
from aft_ray.evaluation.statistics.metrics import EvaluationMetrics, measure, smallest_k
from aft_ray.storage.files import write_atomically

RULE_TITLES = {
    "maj@n": "self-consistency (maj@n)",
    "best-of-n": "best of n by score",
    "vote@n": "vote weighted by score",
    "pass@n": "any of n right (pass@n)",
}


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """The answers of one model.

    Attributes:
        model: the model directory, hub name or file that the answers come from.
        facts: further fields of its JSON record, such as the number of tokens.
        on_file: whether `model` is a file with exactly these answers, so they need not be written again.
    """

    label: str
    model: str
    answered: Sequence[AnsweredQuestion]
    facts: Mapping[str, Any] = field(default_factory=dict)
    on_file: bool = False


@dataclass(frozen=True, slots=True)
class EvaluationSummary:
    """All results by the label of the model. Every model except the baseline has a comparison with the baseline."""

    evaluated: list[EvaluatedModel]
    baseline: str
    results: dict[str, EvaluationMetrics]
    comparisons: dict[str, Comparison]
    curves: dict[str, Curves]
    histograms: dict[str, Histogram]


def summarize(
    evaluated: Sequence[EvaluatedModel], baseline: str | None, resamples: int, seed: int
) -> EvaluationSummary:
    """Computes all results.

    Args:
        baseline: the label of the model that the others are compared with; None: the first.

    Raises:
        ConfigError: two models have no question in common.
    """
    baseline = evaluated[0].label if baseline is None else baseline
    # A model without samples has only greedy accuracy. It does not reduce the number of samples of the others.
    k = min(filter(None, (smallest_k(model.answered) for model in evaluated)), default=0)
    answers = {model.label: model.answered for model in evaluated}
    options: dict[str, Any] = {"k": k, "resamples": resamples, "seed": seed}
    curves = {label: accuracy_curves(answered, **options) for label, answered in answers.items()}
    return EvaluationSummary(
        list(evaluated),
        baseline,
        {label: measure(answered, **options) for label, answered in answers.items()},
        {
            label: compare(answers[baseline], answered, **options)
            for label, answered in answers.items()
            if label != baseline
        },
        {label: curve for label, curve in curves.items() if curve is not None},
        score_histograms(answers),
    )


def write_summary(summary: EvaluationSummary, path: Path, facts: Mapping[str, Any], plots: bool) -> list[Path]:
    """Writes the JSON file `path`, and beside it the answers of each model and the plots.

    The record of a single model is the file itself. Records of several models are in its field "models".

    Args:
        facts: fields of the whole evaluation, such as its task, split and seed.

    Returns:
        All files that were written, `path` first.

    Raises:
        ConfigError: a measured file would be overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    single = len(summary.evaluated) == 1
    files, models = [path], {}
    for model in summary.evaluated:
        record: dict[str, Any] = {"model": model.model, **summary.results[model.label].to_json(), **model.facts}
        if not model.on_file:
            stem = path.stem if single else f"{path.stem}-{_file_name_part(model.label)}"
            generations = path.with_name(f"generations-{stem}.jsonl")
            if Path(model.model).resolve() == generations.resolve():
                raise ConfigError(
                    f"{path} would replace {model.model}, which is one of the targets; give another --output"
                )
            write_atomically(generations, generations_text(model.answered).encode())
            files.append(generations)
            record["generations"] = generations.name
        if model.label in summary.curves:
            record["curves"] = summary.curves[model.label].to_json()
        if model.label in summary.histograms:
            record["histogram"] = summary.histograms[model.label].to_json()
        models[model.label] = record
    if single:
        content = {**facts, **next(iter(models.values()))}
    else:
        comparisons = {label: comparison.to_json() for label, comparison in summary.comparisons.items()}
        content = {**facts, "models": models, "baseline": summary.baseline, "comparisons": comparisons}
    if plots:
        files += draw_plots(summary, path.with_suffix(""))
    # The JSON file is written last, so the files that it names exist.
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode())
    return files


def draw_plots(summary: EvaluationSummary, stem: Path) -> list[Path]:
    """Draws accuracy as a function of the number of samples, and scores of right and wrong samples, if known."""
    from aft_ray.evaluation.report.plots import plot_curves, plot_histograms

    files = []
    if summary.curves:
        rules = dict.fromkeys(rule for curve in summary.curves.values() for rule in curve.rules)
        panels = {
            RULE_TITLES[rule]: {label: c.rules[rule] for label, c in summary.curves.items() if rule in c.rules}
            for rule in rules
        }
        n = next(iter(summary.curves.values())).n
        files += plot_curves(stem.with_name(f"{stem.name}-paths"), n, panels, "samples n", "questions right, %")
    if summary.histograms:
        known = {label: result.estimates.get("assessment") for label, result in summary.results.items()}
        files += plot_histograms(stem.with_name(f"{stem.name}-scores"), summary.histograms, known)
    return files


def _file_name_part(label: str) -> str:
    return re.sub(r"[^\w@.+-]+", "_", label).strip("_")
