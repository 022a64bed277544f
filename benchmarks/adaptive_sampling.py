"""Claim: with `sampling.adaptive`, candidates are spent where they teach a ranking loss.

For each seed, every arm starts from the same VFT model and trains it in rounds: each round samples the same questions
with the model of the round before, labels the candidates, takes optimiser steps on the groups with signal and
references of the others, and is measured by greedy answers to the same unseen questions. The arms differ in how many
candidates they ask for:

- uniform k: k candidates of each question, the setting without `sampling.adaptive`;
- a smaller uniform k, which samples about as few tokens as the adaptive arm;
- adaptive: few candidates first, more up to the same k for questions whose verdicts are all the same; questions that
  were always right are left out of some rounds.

Engine, optimiser, verifier and decisions are those of runs. The script prints greedy accuracy against sampled tokens
for each arm, and greedy accuracy per million sampled tokens as a ratio, adaptive / uniform, with a 95 % bootstrap
interval over seeds and questions. The last line is one JSON object. An interrupted comparison is resumed.

    python benchmarks/adaptive_sampling.py                  # 3 seeds; about 10 minutes on two quiet cores
    python benchmarks/adaptive_sampling.py --quick          # a first look: one seed, fewer questions
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from laboratory import Curve, Laboratory, Settings

from aft_ray.config.run import AdaptiveConfig
from aft_ray.storage.files import write_atomically
from aft_ray.storage.records import Group, Verdict

OBJECTIVE, OPTIONS = "aft_boundary", {"beta": 0.3}
ROUNDS = 3
# `groups`: the questions of every round, so that a question is asked again in each.
FULL = Settings(groups=480, greedy_questions=600, sampled_questions=0)
QUICK = replace(FULL, vft_epochs=3, groups=160, greedy_questions=300)


@dataclass(frozen=True)
class Arm:
    """How an arm asks for candidates: `k` of every question, or at most `k` with `adaptive`."""

    name: str
    k: int
    adaptive: AdaptiveConfig | None = None


ARMS = (
    Arm("uniform 6", 6),
    Arm("uniform 3", 3),
    Arm("adaptive 2 to 6", 6, AdaptiveConfig(initial_k=2, step=2, skip_after=1)),
)


class AdaptiveLaboratory(Laboratory):
    """Trains and measures the arms of a seed, round by round."""

    def vft_model(self, seed: int) -> Path:
        """The model that all arms of a seed start from. It is trained if it does not exist yet."""
        from aft_ray.tasks.dataset import load_tokenizer, tokenize_split
        from jobs.tiny_model import build_tiny_model

        model = self._vft_model(seed)
        if not model.exists():
            with tempfile.TemporaryDirectory() as scratch:
                untrained = build_tiny_model(Path(scratch) / "untrained", seed, layers=2)
                config = self._config(seed, untrained)
                references = tokenize_split(config, "train", load_tokenizer(config)).groups
                self._train(untrained, references, "vft", {}, seed, model)
        return model

    def run_arm(self, seed: int, arm: Arm) -> dict[str, Any]:
        """The record of an arm. It is read from its file if the arm was run before."""
        path = self.directory / f"seed{seed}" / f"{arm.name.replace(' ', '-')}.json"
        if path.exists():
            record: dict[str, Any] = json.loads(path.read_text())
            return record
        from aft_ray.objectives import build_objective
        from aft_ray.training.batching import count_steps

        started = time.monotonic()
        model, size = self.vft_model(seed), self.settings.groups_per_step
        wanted, objective = self._wanted(seed, model), build_objective(OBJECTIVE, **OPTIONS)
        # As in a run, the rounds share one optimizer and one curve, in which each has an equal part.
        trainer, steps = self._trainer(model, size), count_steps(len(wanted), size, 1)
        self._load(model)
        rounds = [{"tokens": 0, "greedy_right": self._greedy()}]
        results: list[list[tuple[str, bool]]] = []
        with tempfile.TemporaryDirectory() as scratch:
            for number in range(1, ROUNDS + 1):
                groups = self._sample(seed, arm, number, wanted, results)
                curve = Curve(self.settings.learning_rate, (number - 1) * steps, ROUNDS * steps)
                history = self._take_steps(trainer, groups, objective, size, (seed, number, 0), curve)
                self._write_model(trainer, Path(scratch) / f"round{number}")
                self._load(Path(scratch) / f"round{number}")
                rounds.append(
                    {
                        "tokens": sum(len(one.token_ids) for group in groups for one in group.candidates),
                        "greedy_right": self._greedy(),
                        "skipped": len(wanted) - len(groups),
                        "candidates": statistics.mean(len(group.candidates) for group in groups),
                        "signal": statistics.mean(group.has_signal for group in groups),
                        "trained_tokens": sum(one.tokens for one in history),
                        "steps": len(history),
                    }
                )
        record = {"seed": seed, "arm": arm.name, "rounds": rounds, "seconds": time.monotonic() - started}
        write_atomically(path, json.dumps(record, indent=1).encode())
        return record

    def _wanted(self, seed: int, model: Path) -> list[Group]:
        from aft_ray.tasks.dataset import load_tokenizer, questions_of_round, tokenize_split

        config = self._config(seed, model)
        rounds = config.rounds.model_copy(update={"questions_per_round": self.settings.groups})
        config = config.model_copy(update={"rounds": rounds})
        return questions_of_round(config, tokenize_split(config, "train", load_tokenizer(config)).groups, 1)

    def _sample(
        self, seed: int, arm: Arm, number: int, wanted: Sequence[Group], results: list[list[tuple[str, bool]]]
    ) -> list[Group]:
        """The labelled groups of a round. Adds what they show of each question to `results`, one entry a round."""
        from aft_ray.sampling import adaptive

        purpose, rules = f"{seed}/round {number}", arm.adaptive
        if rules is None:
            return self._answer(wanted, arm.k, 1.0, purpose)
        ids = [group.question.id for group in wanted]
        lengths = adaptive.streaks(reversed(results), ids, adaptive.longest_streak(rules))
        skipped = set(adaptive.questions_to_skip(ids, lengths, rules, seed, number, self.settings.groups_per_step))
        asked = [group for group in wanted if group.question.id not in skipped]
        groups = {group.question.id: group for group in self._answer(asked, rules.initial_k, 1.0, purpose)}
        count = rules.initial_k
        while more := adaptive.next_candidates(count, arm.k, rules.step):
            short = [
                group
                for group in groups.values()
                if len(group.candidates) == count and adaptive.needs_more(group.candidates)
            ]
            for added in self._answer(short, more, 1.0, purpose):
                before = groups[added.question.id]
                groups[added.question.id] = replace(before, candidates=[*before.candidates, *added.candidates])
            count += more
        results.append([(id, _all_right(group)) for id, group in groups.items()])
        return list(groups.values())

    def _greedy(self) -> str:
        """For each test question 1 if its greedy answer is right, else 0."""
        answered = self._answer(self._test_questions, 1, 0.0, "greedy")
        return "".join("1" if group.candidates[0].verdict is Verdict.RIGHT else "0" for group in answered)


def main(
    seeds: Annotated[int, typer.Option(help="VFT models")] = 3,
    jobs: Annotated[int, typer.Option(help="processes, one core and about 3 GB each")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="one seed, fewer questions, a weaker model")] = False,
    prepare: Annotated[bool, typer.Option("--prepare", help="only train the VFT models")] = False,
    directory: Annotated[Path, typer.Option(help="directory of models and records")] = Path("runs/adaptive"),
) -> None:
    """Compare adaptive sampling with uniform k by greedy accuracy and sampled tokens."""
    settings, seeds = (QUICK, 1) if quick else (FULL, seeds)
    started = time.monotonic()
    place = directory / settings.name
    place.mkdir(parents=True, exist_ok=True)
    # Each worker is a new process, because vLLM and DeepSpeed change global state of their process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_open, initargs=(directory, settings)) as pool:
        for done in as_completed([pool.submit(_prepare, seed) for seed in range(seeds)]):
            print(f"VFT model of seed {done.result()}: {time.monotonic() - started:.0f} s", flush=True)
        if prepare:
            return
        records = []
        for done in as_completed([pool.submit(_run, seed, arm) for seed in range(seeds) for arm in ARMS]):
            record = done.result()
            records.append(record)
            print(f"seed {record['seed']}, {record['arm']}: {record['seconds']:.0f} s", flush=True)
    report(records, seeds, settings)


def report(records: Sequence[Mapping[str, Any]], seeds: int, settings: Settings) -> None:
    """Prints the curves, the ratio with its interval, and the JSON object."""
    by_arm = {arm.name: [r for seed in range(seeds) for r in records if (r["seed"], r["arm"]) == (seed, arm.name)]
              for arm in ARMS}  # fmt: skip
    print(f"\n{seeds} seeds, {ROUNDS} rounds of {settings.groups} questions, means over the seeds\n")
    print(
        "| arm | round | sampled tokens, thousands, so far | candidates | with signal | left out | steps | greedy, % |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, of_seeds in by_arm.items():
        for number in range(ROUNDS + 1):
            rounds = [record["rounds"][number] for record in of_seeds]
            tokens = statistics.mean(sampled(record, number) for record in of_seeds) / 1000
            cells = ["", "", "", ""]
            if number:
                cells = [
                    f"{statistics.mean(one['candidates'] for one in rounds):.2f}",
                    f"{statistics.mean(one['signal'] for one in rounds):.0%}",
                    f"{statistics.mean(one['skipped'] for one in rounds):.0f}",
                    f"{statistics.mean(one['steps'] for one in rounds):.0f}",
                ]
            greedy = ", ".join(f"{100 * accuracy(record, number):.1f}" for record in of_seeds)
            mean = 100 * statistics.mean(accuracy(record, number) for record in of_seeds)
            print(f"| {name} | {number} | {tokens:.0f} | {' | '.join(cells)} | {mean:.1f} ({greedy}) |")
    adaptive, uniform, small = (by_arm[arm.name] for arm in (ARMS[2], ARMS[0], ARMS[1]))
    compared = {ARMS[0].name: compare(adaptive, uniform), ARMS[1].name: compare(adaptive, small)}
    for name, found in compared.items():
        print(
            f"\n{ARMS[2].name} against {name}: {found['tokens_ratio']:.2f} of the sampled tokens, greedy accuracy "
            f"{found['points']:+.1f} points [{found['points_low']:+.1f}, {found['points_high']:+.1f}], greedy accuracy "
            f"per million sampled tokens x {found['ratio']:.2f} [{found['ratio_low']:.2f}, {found['ratio_high']:.2f}]"
        )
    figures = {key: round(value, 3) for key, value in compared[ARMS[0].name].items()}
    against_small = {key: round(value, 3) for key, value in compared[ARMS[1].name].items()}
    print(json.dumps({"benchmark": "adaptive_sampling", "seeds": seeds, **figures, "against_small_k": against_small}))


def sampled(record: Mapping[str, Any], number: int) -> int:
    """The tokens sampled up to and with a round."""
    return sum(one["tokens"] for one in record["rounds"][: number + 1])


def accuracy(record: Mapping[str, Any], number: int) -> float:
    marks = record["rounds"][number]["greedy_right"]
    return marks.count("1") / len(marks)


def compare(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How `one` compares with `other` after the last round, with 95 % intervals over seeds and questions.

    tokens_ratio: of the sampled tokens. points: difference of the greedy accuracies, in points. ratio: of the greedy
    accuracies per sampled token.
    """
    import numpy as np

    def right(records: Sequence[Mapping[str, Any]]) -> Any:
        """[seed, question]: 1.0 where the greedy answer is right after the last round."""
        return np.array([[float(mark) for mark in record["rounds"][-1]["greedy_right"]] for record in records])

    first, second = right(one), right(other)
    tokens = np.array([[sampled(record, ROUNDS) for record in records] for records in (one, other)], dtype=float)

    def figures(seeds: Any, questions: Any) -> tuple[float, float]:
        """The points and the ratio for some seeds, and for some questions of each: [seed, question]."""
        a, b = (marks[seeds[:, None], questions].mean() for marks in (first, second))
        spent = tokens[:, seeds].sum(axis=1)
        return 100 * float(a - b), float((a / spent[0]) / (b / spent[1]))

    rng = np.random.default_rng(0)
    seeds, size = first.shape
    points, ratio = figures(np.arange(seeds), np.tile(np.arange(size), (seeds, 1)))
    draws = [figures(rng.integers(seeds, size=seeds), rng.integers(size, size=(seeds, size))) for _ in range(2000)]
    (points_low, ratio_low), (points_high, ratio_high) = np.percentile(draws, [2.5, 97.5], axis=0).tolist()
    return {
        "tokens_ratio": float(tokens[0].sum() / tokens[1].sum()),
        "points": points, "points_low": points_low, "points_high": points_high,
        "ratio": ratio, "ratio_low": ratio_low, "ratio_high": ratio_high,
    }  # fmt: skip


def _all_right(group: Group) -> bool:
    from aft_ray.sampling.adaptive import all_right

    verdicts = [one.verdict for one in group.candidates]
    return all_right(verdicts.count(Verdict.RIGHT), len(verdicts) - verdicts.count(Verdict.UNDECIDED))


_laboratory: AdaptiveLaboratory | None = None


def _open(directory: Path, settings: Settings) -> None:
    global _laboratory
    from aft_ray.cli import quiet
    from aft_ray.observe.logs import redirect_output

    quiet()
    redirect_output(str(directory / settings.name / "logs" / f"{os.getpid()}.log"))
    _laboratory = AdaptiveLaboratory(directory, settings)


def _prepare(seed: int) -> int:
    assert _laboratory is not None
    _laboratory.vft_model(seed)
    return seed


def _run(seed: int, arm: Arm) -> dict[str, Any]:
    assert _laboratory is not None
    return _laboratory.run_arm(seed, arm)


if __name__ == "__main__":
    typer.run(main)
