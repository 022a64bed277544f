"""Experiments of `compare_objectives.py` and `compare_beta.py`: train a model with one objective and measure it.

All experiments of a seed start from the same VFT model and train on the same groups for the same number of optimiser
steps, with the code that runs use for training and sampling.

Invariant: a record is written completely or not at all and depends only on the settings and the experiment, so an
interrupted comparison can be resumed and its experiments can run in any order.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from aft_ray.config.run import (
    ArithmeticConfig,
    DataConfig,
    FeedbackConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    parse_config,
)
from aft_ray.storage.files import write_atomically
from aft_ray.storage.records import Group, Verdict

# Length of the model's context, and of the longest response, in tokens.
CONTEXT, MAX_TOKENS = 160, 56


@dataclass(frozen=True)
class Settings:
    """Settings that all experiments of a comparison share. Records of other settings are in other directories.

    The number of optimiser steps is groups / groups_per_step.

    Attributes:
        greedy_questions: number of test questions, which are answered greedily.
        sampled_questions: how many of them are also answered evaluation_k times at temperature 1.
    """

    train_size: int = 5000
    vft_epochs: int = 5
    groups: int = 1600
    groups_per_step: int = 16
    k: int = 6
    weight: float = 10.0
    learning_rate: float = 5e-4
    greedy_questions: int = 1000
    sampled_questions: int = 300
    evaluation_k: int = 8

    @property
    def name(self) -> str:
        """The name of the directory of these settings: a digest of all of them."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]


QUICK = Settings(vft_epochs=3, groups=320, greedy_questions=300, sampled_questions=100)


@dataclass(frozen=True)
class Experiment:
    """One training run and its measurement.

    Attributes:
        feedback: the kind of feedback that sets the rewards.
        objective: the objective to train with; None: measure the VFT model that the others start from.
        options: the options of the objective.
    """

    seed: int
    feedback: str
    objective: str | None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        options = "".join(f" {key}={value}" for key, value in self.options)
        return f"{self.objective or 'start'}{options}"

    @property
    def file_name(self) -> str:
        return f"seed{self.seed}/{self.feedback}/{self.label.replace(' ', '_')}.json"


@dataclass(frozen=True)
class Curve:
    """A part of a learning rate's curve: it begins at step `first` of `steps`."""

    peak: float
    first: int
    steps: int


class Laboratory:
    """Runs experiments in this process with one thread and one vLLM engine, which loads each trained model."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        self.directory, self.settings = directory / settings.name, settings
        if not dist.is_initialized():  # DeepSpeed needs a process group even for one process
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            store = dist.HashStore()
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)

    def prepare(self, seed: int) -> None:
        """Creates the VFT model of a seed and its labelled groups, if they do not exist yet."""
        model, groups = self._vft_model(seed), self._groups_file(seed)
        if not model.exists():
            from jobs.tiny_model import build_tiny_model

            with tempfile.TemporaryDirectory() as scratch:
                untrained = build_tiny_model(Path(scratch) / "untrained", seed, layers=2)
                config = self._config(seed, untrained)
                from aft_ray.tasks.dataset import load_tokenizer, tokenize_split

                references = tokenize_split(config, "train", load_tokenizer(config)).groups
                self._train(untrained, references, "vft", {}, seed, model)
        if not groups.exists():
            import pyarrow.parquet as pq

            from aft_ray.storage.records import groups_to_table

            buffer = io.BytesIO()
            pq.write_table(groups_to_table(self._sample_groups(seed)), buffer)
            write_atomically(groups, buffer.getvalue())

    def run(self, experiment: Experiment) -> dict[str, Any]:
        """The record of an experiment. It is read from its file if the experiment was run before."""
        path = self.directory / experiment.file_name
        if path.exists():
            record: dict[str, Any] = json.loads(path.read_text())
            return record
        from aft_ray.tasks import build_tasks
        from aft_ray.verify.feedback import reward_groups

        started = time.monotonic()
        trained: dict[str, Any] = {}
        start = self._vft_model(experiment.seed)
        with tempfile.TemporaryDirectory() as scratch:
            model = start
            if experiment.objective is not None:
                model = Path(scratch) / "model"
                feedback = FeedbackConfig.model_validate({"kind": experiment.feedback})
                tasks = build_tasks(self._config(experiment.seed, start))
                groups = reward_groups(self._read_groups(experiment.seed), tasks, feedback, None)
                trained = self._train(
                    start, groups, experiment.objective, dict(experiment.options), experiment.seed, model
                )
            train_s = time.monotonic() - started
            self._load(model)
            measured = self._measure()
        record = {
            **asdict(experiment),
            **measured,
            "training": trained,
            "train_s": train_s,
            "seconds": time.monotonic() - started,
        }
        write_atomically(path, json.dumps(record, indent=1).encode())
        return record

    def _vft_model(self, seed: int) -> Path:
        return self.directory / f"seed{seed}" / "vft-model"

    def _groups_file(self, seed: int) -> Path:
        return self.directory / f"seed{seed}" / "groups.parquet"

    def _read_groups(self, seed: int) -> list[Group]:
        import pyarrow.parquet as pq

        from aft_ray.storage.records import table_to_groups

        return table_to_groups(pq.read_table(self._groups_file(seed)))

    def _config(self, seed: int, model: Path) -> RunConfig:
        """The config of the task of `make demo`, in which half of the references compute two steps at once."""
        task = ArithmeticConfig(
            max_operand=10, max_value=20, operations="+-", distractors=0.2, terse=0.5,
            train_size=self.settings.train_size, test_size=self.settings.greedy_questions,
        )  # fmt: skip
        return parse_config(
            {
                "run_dir": str(self.directory),
                "seed": seed,
                "model": {"name": str(model), "dtype": "float32", "max_length": CONTEXT},
                "data": DataConfig(arithmetic=task).model_dump(),
                "sampling": {"max_tokens": MAX_TOKENS},
            }
        )

    def _train(
        self, start: Path, groups: Sequence[Group], name: str, options: dict[str, Any], seed: int, output: Path
    ) -> dict[str, Any]:
        """Trains with one worker in the same way as a run, and writes the model to `output` atomically."""
        from aft_ray.objectives import build_objective
        from aft_ray.training import batching

        references_only = not any(group.candidates for group in groups)
        epochs = self.settings.vft_epochs if references_only else 1
        size = 32 if references_only else self.settings.groups_per_step
        steps = batching.count_steps(len(groups), size, epochs)
        peak = 2e-3 if references_only else self.settings.learning_rate
        engine = self._trainer(start, size)
        history = []
        for epoch in range(epochs):
            order = (seed, 0 if references_only else 1, epoch)
            curve = Curve(peak, len(history), steps)
            history += self._take_steps(engine, groups, build_objective(name, **options), size, order, curve)
        self._write_model(engine, output)
        tail = history[-max(1, len(history) // 10) :]
        return {
            "steps": len(history),
            "tokens": sum(one.tokens for one in history),
            **{
                f"last_{key}": _mean([getattr(one, key) for one in tail])
                for key in ("loss", "right_score", "wrong_score")
            },
        }

    def _trainer(self, start: Path, groups_per_step: int) -> Any:
        """A DeepSpeed engine with a new optimizer, which trains a model."""
        from aft_ray.training import deepspeed

        training = TrainingConfig(groups_per_step=groups_per_step)
        return deepspeed.build_engine(start, ModelConfig(name=str(start), dtype="float32"), training)

    def _take_steps(
        self,
        engine: Any,
        groups: Sequence[Group],
        objective: Any,
        groups_per_step: int,
        order: tuple[int, int, int],
        curve: Curve,
    ) -> list[Any]:
        """The optimiser steps of one pass over the groups; returns what was measured in each.

        Args:
            order: seed, round and epoch, which fix the order of the groups.
            curve: where the steps lie on the learning rate's curve.
        """
        from aft_ray.training import batching, schedule, step
        from aft_ray.training.batch import make_batch

        training = TrainingConfig()
        sizes = [batching.group_size(group, objective) for group in groups]
        ids = batching.training_order([group.question.id for group in groups], *order).tolist()
        history = []
        for number, first in enumerate(range(0, len(ids), groups_per_step)):
            chosen = ids[first : first + groups_per_step]
            plan = batching.plan_step(
                [sizes[index] for index in chosen], ranks=1, budget=training.tokens_per_microbatch
            )
            batches = [
                make_batch([groups[chosen[index]] for index in planned.groups], planned, objective)
                for planned in plan.shares[0]
            ]
            rate = schedule.learning_rate(curve.first + number, curve.steps, curve.peak, training.warmup)
            history.append(step.train_step(engine, batches, plan, objective, self.settings.weight, rate))
        return history

    def _write_model(self, engine: Any, output: Path) -> None:
        import torch

        from aft_ray.weights.export import LayerPass, write_model

        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
            written = Path(scratch) / "model"
            write_model(LayerPass(engine.module, torch.float32, 1 << 30), written)
            _tokenizer().save_pretrained(written)
            os.replace(written, output)

    @cached_property
    def _engine(self) -> Any:
        from aft_ray.inference.engine import Engine
        from aft_ray.inference.engine_spec import EngineSpec

        return Engine(
            EngineSpec(
                str(self._some_model()), (_tokenizer().eos_token_id,), "float32", 160, 128, gpu=False, kv_cache_gib=0.5
            )
        )

    def _sample_groups(self, seed: int) -> list[Group]:
        from aft_ray.tasks.dataset import questions_of_round, tokenize_split

        config = self._config(seed, self._vft_model(seed))
        config = config.model_copy(
            update={"rounds": config.rounds.model_copy(update={"questions_per_round": self.settings.groups})}
        )
        wanted = questions_of_round(config, tokenize_split(config, "train", _tokenizer()).groups, 1)
        self._load(self._vft_model(seed))
        return self._answer(wanted, self.settings.k, 1.0, f"{seed}/round 1")

    def _load(self, model: Path) -> None:
        from aft_ray.weights.version_manifest import read_version_manifest

        calls = read_version_manifest(0, model).calls(60)
        self._engine.update_weights(calls, lambda phase: None).result()

    def _answer(self, questions: Sequence[Group], k: int, temperature: float, purpose: str) -> list[Group]:
        """The questions with their next k candidates, after those that they have, labelled."""
        from aft_ray.inference.request_parameters import Prompt, SamplingSpec
        from aft_ray.sampling.sample_stage import question_seed
        from aft_ray.tasks import build_tasks
        from aft_ray.verify.label import label_groups
        from aft_ray.verify.process_pool import shared_verifier

        spec = SamplingSpec(k, temperature, 1.0, MAX_TOKENS)
        futures = [
            self._engine.sample(
                Prompt(g.prompt_token_ids, question_seed(0, purpose, g.question.id) + len(g.candidates)), spec
            )
            for g in questions
        ]
        tokenizer = _tokenizer()
        answered = []
        for group, future in zip(questions, futures, strict=True):
            texts = [(one, tokenizer.decode(one.token_ids, skip_special_tokens=True)) for one in future.result()]
            answered.append(replace(group, candidates=[replace(one, text=text) for one, text in texts]))
        return label_groups(answered, build_tasks(self._config(0, Path())), shared_verifier())

    @cached_property
    def _test_questions(self) -> list[Group]:
        """The test questions. They depend only on the settings, and every model has the same tokenizer."""
        from aft_ray.tasks.dataset import tokenize_split

        return tokenize_split(self._config(0, self._some_model()), "test", _tokenizer()).groups

    def _some_model(self) -> Path:
        """The VFT model of any seed that is prepared."""
        return next(self.directory.glob("seed*/vft-model"))

    def _measure(self) -> dict[str, Any]:
        """Metrics on the test questions, and for each question whether its answers were right."""
        from aft_ray.evaluation.answers import AnsweredQuestion, response_from_candidate
        from aft_ray.evaluation.statistics.metrics import measure

        questions = self._test_questions
        greedy = self._answer(questions, 1, 0.0, "greedy")
        some = questions[: self.settings.sampled_questions]
        samples = {
            group.question.id: [response_from_candidate(candidate) for candidate in group.candidates]
            for group in self._answer(some, self.settings.evaluation_k, 1.0, "samples")
        }
        answered = [
            AnsweredQuestion(g.question.id, response_from_candidate(g.candidates[0]), samples.get(g.question.id, ()))
            for g in greedy
        ]
        return {
            "result": measure(answered, seed=0).to_json(),
            "greedy_right": "".join("1" if g.candidates[0].verdict is Verdict.RIGHT else "0" for g in greedy),
            "samples": [
                [[one.verdict is Verdict.RIGHT, one.answer, round(one.score, 5)] for one in question.samples]
                for question in answered
                if question.samples
            ],
        }


def run_all(experiments: Sequence[Experiment], directory: Path, settings: Settings, jobs: int) -> list[dict[str, Any]]:
    """Runs all experiments in `jobs` processes and prints the progress. Returns the records in the same order."""
    records_dir = directory / settings.name
    records_dir.mkdir(parents=True, exist_ok=True)
    (records_dir / "settings.json").write_text(json.dumps(asdict(settings), indent=1) + "\n")
    seeds = sorted({experiment.seed for experiment in experiments})
    started = time.monotonic()
    # Each worker is a new process, because vLLM and DeepSpeed change global state of their process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_open, initargs=(directory, settings)) as pool:
        prepared = {pool.submit(_prepare, seed): seed for seed in seeds}
        for done in as_completed(prepared):
            done.result()
            print(f"seed {prepared[done]}: VFT model and groups, {time.monotonic() - started:.0f} s", flush=True)
        running = {pool.submit(_run, experiment): experiment for experiment in experiments}
        records: dict[Experiment, dict[str, Any]] = {}
        for done in as_completed(running):
            experiment, record = running[done], done.result()
            records[experiment] = record
            accuracy = record["result"]["estimates"]["greedy"]["value"]
            elapsed = time.monotonic() - started
            print(
                f"{len(records)}/{len(experiments)} seed {experiment.seed} {experiment.feedback} {experiment.label}: "
                f"{accuracy:.1%} right, greedy; {record['seconds']:.0f} s; {elapsed / 60:.0f} min so far",
                flush=True,
            )
    return [records[experiment] for experiment in experiments]


_laboratory: Laboratory | None = None


def _open(directory: Path, settings: Settings) -> None:
    global _laboratory
    from aft_ray.cli import quiet
    from aft_ray.observe.logs import redirect_output

    quiet()
    redirect_output(str(directory / settings.name / "logs" / f"{os.getpid()}.log"))
    _laboratory = Laboratory(directory, settings)


def _prepare(seed: int) -> None:
    assert _laboratory is not None
    _laboratory.prepare(seed)


def _run(experiment: Experiment) -> dict[str, Any]:
    assert _laboratory is not None
    return _laboratory.run(experiment)


def _tokenizer() -> Any:
    from jobs.tiny_model import build_tokenizer

    return build_tokenizer()


def _mean(values: list[float]) -> float | None:
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else None
