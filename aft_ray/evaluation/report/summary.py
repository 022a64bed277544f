"""An evaluation as a whole: the answers of one or several models become figures, comparisons, curves and files.

Invariant: models are measured with the same number of samples a question, the most that all of them have, so that
every row of the table is one figure. Nothing here needs an engine.
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
    """One model's answers.

    model: where they come from. on_file: it is a file that holds these very answers, so that none needs writing.
    facts: what else its JSON record says, such as tokens.
    """

    label: str
    model: str
    answered: Sequence[AnsweredQuestion]
    facts: Mapping[str, Any] = field(default_factory=dict)
    on_file: bool = False


@dataclass(frozen=True, slots=True)
class EvaluationSummary:
    """Everything that is said of the models, by label. comparisons: of every model but the baseline with it."""

    evaluated: list[EvaluatedModel]
    baseline: str
    results: dict[str, EvaluationMetrics]
    comparisons: dict[str, Comparison]
    curves: dict[str, Curves]
    histograms: dict[str, Histogram]


def summarize(
    evaluated: Sequence[EvaluatedModel], baseline: str | None, resamples: int, seed: int
) -> EvaluationSummary:
    """All figures. baseline: a label; None: the first model's. Raises ConfigError when models have no question in
    common."""
    baseline = evaluated[0].label if baseline is None else baseline
    # A model without samples has greedy figures alone; it does not take the others' samples away.
    k = min(filter(None, (smallest_k(model.answered) for model in evaluated)), default=0)
    answers = {model.label: model.answered for model in evaluated}
    options: dict[str, Any] = {"k": k, "resamples": resamples, "seed": seed}
    grown = {label: accuracy_curves(answered, **options) for label, answered in answers.items()}
    return EvaluationSummary(
        list(evaluated),
        baseline,
        {label: measure(answered, **options) for label, answered in answers.items()},
        {
            label: compare(answers[baseline], answered, **options)
            for label, answered in answers.items()
            if label != baseline
        },
        {label: curve for label, curve in grown.items() if curve is not None},
        score_histograms(answers),
    )


def write_summary(outcome: EvaluationSummary, path: Path, facts: Mapping[str, Any], plots: bool) -> list[Path]:
    """The JSON file `path`, and beside it the answers of each model and the pictures; returns all files, `path` first.

    facts: of the whole evaluation, such as its task, split and seed. One model's record is the file itself; those of
    several are below "models". Raises ConfigError when it would replace a file that is measured.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    alone = len(outcome.evaluated) == 1
    files, models = [path], {}
    for model in outcome.evaluated:
        record: dict[str, Any] = {"model": model.model, **outcome.results[model.label].to_json(), **model.facts}
        if not model.on_file:
            stem = path.stem if alone else f"{path.stem}-{_plain(model.label)}"
            generations = path.with_name(f"generations-{stem}.jsonl")
            if Path(model.model).resolve() == generations.resolve():
                raise ConfigError(f"{path} would replace {model.model}, which is measured; give another --output")
            write_atomically(generations, generations_text(model.answered).encode())
            files.append(generations)
            record["generations"] = generations.name
        if model.label in outcome.curves:
            record["curves"] = outcome.curves[model.label].to_json()
        if model.label in outcome.histograms:
            record["histogram"] = outcome.histograms[model.label].to_json()
        models[model.label] = record
    if alone:
        everything = {**facts, **next(iter(models.values()))}
    else:
        comparisons = {label: comparison.to_json() for label, comparison in outcome.comparisons.items()}
        everything = {**facts, "models": models, "baseline": outcome.baseline, "comparisons": comparisons}
    if plots:
        files += draw_plots(outcome, path.with_suffix(""))
    # Last, so that what it names is there.
    text = json.dumps(everything, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode())
    return files


def draw_plots(outcome: EvaluationSummary, stem: Path) -> list[Path]:
    """Accuracy over the number of samples, and scores of right and wrong ones, where there are any to show."""
    from aft_ray.evaluation.report.plots import plot_curves, plot_histograms

    files = []
    if outcome.curves:
        rules = dict.fromkeys(rule for curve in outcome.curves.values() for rule in curve.rules)
        panels = {
            RULE_TITLES[rule]: {label: c.rules[rule] for label, c in outcome.curves.items() if rule in c.rules}
            for rule in rules
        }
        n = next(iter(outcome.curves.values())).n
        files += plot_curves(stem.with_name(f"{stem.name}-paths"), n, panels, "samples n", "questions right, %")
    if outcome.histograms:
        known = {label: result.estimates.get("assessment") for label, result in outcome.results.items()}
        files += plot_histograms(stem.with_name(f"{stem.name}-scores"), outcome.histograms, known)
    return files


def _plain(label: str) -> str:
    return re.sub(r"[^\w@.+-]+", "_", label).strip("_")
