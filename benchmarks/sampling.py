"""Claim: the sampling stage gives at least 0.9 of the tokens/s of vLLM alone.

The stage is what a round runs: Ray Data start-up, questions to the sampler actor, k candidates each, decoding to text,
verdicts, Parquet files, commits to the ledger; timed from the first question to the last commit. The peer is one
`vllm.LLM.generate` call with all questions at once, in a process of its own and with nothing decoded or written. Both
have one thread and the same engine arguments, token ids, seeds, k and max_tokens. They take turns, each idle while the
other works; every turn has new seeds, and so may differ from the next in its number of tokens, but not between the two.
The ratio is that of the medians.

    python benchmarks/sampling.py --json sampling.json
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from aft_ray.config.loader import apply_override
from aft_ray.config.run import RunConfig, parse_config
from aft_ray.inference.engine_spec import EngineSpec, engine_arguments, prepare_environment
from aft_ray.inference.request_parameters import SamplingSpec, request_parameters

TARGET = 0.9
WARM_UP_QUESTIONS = 64


class Turn(NamedTuple):
    """engine_s: the seconds, out of all, in which the engine had a request; the rest is before and after it."""

    tokens: int
    seconds: float
    engine_s: float

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


class Raw:
    """`vllm.LLM` in an actor of its own. `spec` is the engine that the samplers have."""

    def __init__(self, spec: EngineSpec) -> None:
        prepare_environment(spec)
        from vllm import LLM

        self._spec = spec
        self._llm = LLM(**engine_arguments(spec))

    def generate(self, prompts: list[Any], how: SamplingSpec) -> Turn:
        inputs = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
        limits = [min(how.max_tokens, self._spec.max_length - len(prompt.token_ids)) for prompt in prompts]
        parameters = [
            request_parameters(prompt, how, limit, self._spec.eos_token_id)
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        started = time.monotonic()
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        seconds = time.monotonic() - started
        return Turn(sum(len(one.token_ids) for output in outputs for one in output.outputs), seconds, seconds)


def main(
    questions: Annotated[int, typer.Option(help="questions in a turn")] = 800,
    k: Annotated[int, typer.Option(help="candidates per question")] = 6,
    max_tokens: Annotated[int, typer.Option(help="longest response")] = 64,
    repeats: Annotated[int, typer.Option(help="turns of each, after a warm-up")] = 3,
    hidden_size: Annotated[int, typer.Option(help="width of the untrained model")] = 128,
    layers: Annotated[int, typer.Option(help="layers of the untrained model")] = 4,
    model: Annotated[str | None, typer.Option(help="a model directory instead; float32")] = None,
    setting: Annotated[list[str] | None, typer.Option(help="key.sub=value of the run's config; repeatable")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Tokens/s of the sampling stage beside vLLM alone."""
    with tempfile.TemporaryDirectory(prefix="aft-ray-benchmark-") as scratch:
        if model is None:
            from jobs.tiny_model import build_tiny_model

            heads = max(1, hidden_size // 32)
            model = str(build_tiny_model(f"{scratch}/model", 0, hidden_size, layers, heads))
        config = _config(f"{scratch}/run", model, questions, k, max_tokens, setting or [])
        turns = _measure(config, repeats)
    figures = _figures(config, turns)
    _show(figures)
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1))


def _config(run_dir: str, model: str, questions: int, k: int, max_tokens: int, settings: list[str]) -> RunConfig:
    tree: dict[str, Any] = {
        "run_dir": run_dir,
        "model": {"name": model, "dtype": "float32", "max_length": 256},
        "data": {"task": "arithmetic", "arithmetic": {"train_size": max(questions, WARM_UP_QUESTIONS)}},
        "sampling": {"k": k, "max_tokens": max_tokens},
        "cluster": {"logical_cpus": 4},
    }
    for one in settings:
        apply_override(tree, one)
    return parse_config(tree)


def _measure(config: RunConfig, repeats: int) -> dict[str, list[Turn]]:
    """The turns of both, after one of each that is not counted."""
    import ray

    from aft_ray.cluster.connect import connected
    from aft_ray.cluster.reservations import evaluation_reservations
    from aft_ray.inference.request_parameters import Prompt
    from aft_ray.sampling.counts import SampleCounts
    from aft_ray.sampling.sample_stage import question_seed
    from aft_ray.sampling.sampler_pool import SamplerPool, sampler_engine_spec
    from aft_ray.sampling.stream import sample_round, sampling_spec
    from aft_ray.storage.ledger import Ledger
    from aft_ray.storage.run_dir import RunDir
    from aft_ray.tasks.dataset import load_tokenizer, tokenize_split

    tokenizer = load_tokenizer(config)
    groups = tokenize_split(config, "train", tokenizer).groups
    run_dir = RunDir(config.run_dir)
    ledger = Ledger(run_dir)
    turns: dict[str, list[Turn]] = {"vllm": [], "stage": []}
    with connected(config.cluster, evaluation_reservations(config)):
        pool = SamplerPool.start(config, config.model.name, tokenizer.eos_token_id, None, None)
        spec = sampler_engine_spec(config, config.model.name, tokenizer.eos_token_id)
        raw = ray.remote(Raw).options(num_cpus=1).remote(spec)

        def alone(number: int) -> Turn:
            purpose = f"round {number}"
            prompts = [
                Prompt(group.prompt_token_ids, question_seed(config.seed, purpose, group.question.id))
                for group in chosen
            ]
            done: Turn = ray.get(raw.generate.remote(prompts, sampling_spec(config.sampling)))
            return done

        def stage(number: int) -> Turn:
            ledger.open_round(number)
            before = pool.statuses()[0].busy_s
            started, total = time.monotonic(), SampleCounts()
            for written in sample_round(config, pool, None, [replace(g, round=number) for g in chosen], run_dir):
                if written.file is None or written.failed:
                    raise RuntimeError(f"questions failed: {written.failed}")
                ledger.commit(written.file)
                total += written.counts
            seconds = time.monotonic() - started
            return Turn(total.tokens, seconds, pool.statuses()[0].busy_s - before)

        pool.wait_ready(config.sampling.samplers)
        for number in range(repeats + 1):
            chosen = groups if number else groups[:WARM_UP_QUESTIONS]
            for name, turn in (("vllm", alone), ("stage", stage)):
                done = turn(number)
                typer.echo(
                    f"turn {number} {name:5}  {done.tokens} tokens in {done.seconds:.1f} s, the engine at work for "
                    f"{done.engine_s:.1f} s: {done.speed:,.0f} tokens/s{'' if number else ' (warm-up)'}"
                )
                if number:
                    turns[name].append(done)
        pool.close()
    return turns


def _figures(config: RunConfig, turns: dict[str, list[Turn]]) -> dict[str, Any]:
    speeds = {name: [turn.speed for turn in of] for name, of in turns.items()}
    medians = {name: statistics.median(of) for name, of in speeds.items()}
    return {
        "benchmark": "sampling",
        "sampling": config.sampling.model_dump(mode="json"),
        "questions": config.data.arithmetic.train_size,
        "turns": {name: [turn._asdict() for turn in of] for name, of in turns.items()},
        "tokens_per_s": medians,
        "ratio": medians["stage"] / medians["vllm"],
        "ratio_of_each_pair": [a / b for a, b in zip(speeds["stage"], speeds["vllm"], strict=True)],
        "target": TARGET,
    }


def _show(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "tokens/s (median)", "turns")
    for name, title in (("vllm", "vllm.LLM.generate alone"), ("stage", "sampling stage")):
        turns = ", ".join(f"{turn['tokens'] / turn['seconds']:,.0f}" for turn in figures["turns"][name])
        table.add_row(title, f"{figures['tokens_per_s'][name]:,.0f}", turns)
    pairs = ", ".join(f"{ratio:.3f}" for ratio in figures["ratio_of_each_pair"])
    table.add_row("ratio", f"{figures['ratio']:.3f} (target {TARGET:g})", pairs)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
