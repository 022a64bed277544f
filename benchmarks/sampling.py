"""Claim: the sampling stage reaches at least 0.9 of the tokens/s of vLLM alone.

The stage is everything that a round does to sample: it starts Ray Data, sends questions to the sampler actor, samples k
candidates of each, decodes and verifies them, writes Parquet files and commits them to the ledger. The time is measured
from the first question to the last commit. The peer is one `vllm.LLM.generate` call with all questions in its own
process; it decodes and writes nothing. Both use one thread and the same engine arguments, token ids, seeds, k and
max_tokens. They run alternately, and each is idle while the other works. Every repetition has new seeds, so numbers of
tokens may differ between repetitions, but not between the two sides. The ratio is that of the medians.

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


class Measurement(NamedTuple):
    """One timed repetition. engine_s: the part of `seconds` in which the engine had a request."""

    tokens: int
    seconds: float
    engine_s: float

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


class PlainVllm:
    """An actor with `vllm.LLM`. `spec` describes the same engine as that of the samplers."""

    def __init__(self, spec: EngineSpec) -> None:
        prepare_environment(spec)
        from vllm import LLM

        self._spec = spec
        self._llm = LLM(**engine_arguments(spec))

    def generate(self, prompts: list[Any], sampling: SamplingSpec) -> Measurement:
        inputs = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
        limits = [min(sampling.max_tokens, self._spec.max_length - len(prompt.token_ids)) for prompt in prompts]
        parameters = [
            request_parameters(prompt, sampling, limit, self._spec.eos_token_ids)
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        started = time.monotonic()
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        seconds = time.monotonic() - started
        return Measurement(sum(len(one.token_ids) for output in outputs for one in output.outputs), seconds, seconds)


def main(
    questions: Annotated[int, typer.Option(help="questions per repetition")] = 800,
    k: Annotated[int, typer.Option(help="candidates per question")] = 6,
    max_tokens: Annotated[int, typer.Option(help="longest response")] = 64,
    repeats: Annotated[int, typer.Option(help="repetitions of each side, after a warm-up")] = 3,
    hidden_size: Annotated[int, typer.Option(help="width of the untrained model")] = 128,
    layers: Annotated[int, typer.Option(help="layers of the untrained model")] = 4,
    model: Annotated[str | None, typer.Option(help="use this model directory, in float32")] = None,
    setting: Annotated[
        list[str] | None, typer.Option(help="key.sub=value of the run's config; may be repeated")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all numbers to this file")] = None,
) -> None:
    """Compare the tokens/s of the sampling stage with those of vLLM alone."""
    with tempfile.TemporaryDirectory(prefix="aft-ray-benchmark-") as scratch:
        if model is None:
            from jobs.tiny_model import build_tiny_model

            heads = max(1, hidden_size // 32)
            model = str(build_tiny_model(f"{scratch}/model", 0, hidden_size, layers, heads))
        config = _config(f"{scratch}/run", model, questions, k, max_tokens, setting or [])
        turns = _measure(config, repeats)
    results = _results(config, turns)
    _show(results)
    if json_file:
        json_file.write_text(json.dumps(results, indent=1))


def _config(run_dir: str, model: str, questions: int, k: int, max_tokens: int, settings: list[str]) -> RunConfig:
    tree: dict[str, Any] = {
        "run_dir": run_dir,
        "model": {"name": model, "dtype": "float32", "max_length": 256},
        "data": {"task": "arithmetic", "arithmetic": {"train_size": max(questions, WARM_UP_QUESTIONS)}},
        "sampling": {"k": k, "max_tokens": max_tokens, "max_num_seqs": 128},
        "cluster": {"logical_cpus": 4},
    }
    for override in settings:
        apply_override(tree, override)
    return parse_config(tree)


def _measure(config: RunConfig, repeats: int) -> dict[str, list[Measurement]]:
    """The measurements of both sides. A warm-up of each side is not counted."""
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
    turns: dict[str, list[Measurement]] = {"vllm": [], "stage": []}
    with connected(config.cluster, evaluation_reservations(config)):
        pool = SamplerPool.start(config, config.model.name, (tokenizer.eos_token_id,), None, None)
        spec = sampler_engine_spec(config, config.model.name, (tokenizer.eos_token_id,))
        plain = ray.remote(PlainVllm).options(num_cpus=1).remote(spec)

        def vllm_alone(number: int) -> Measurement:
            purpose = f"round {number}"
            prompts = [
                Prompt(group.prompt_token_ids, question_seed(config.seed, purpose, group.question.id))
                for group in chosen
            ]
            done: Measurement = ray.get(plain.generate.remote(prompts, sampling_spec(config.sampling)))
            return done

        def stage(number: int) -> Measurement:
            ledger.open_round(number)
            before = pool.statuses()[0].busy_s
            started, total = time.monotonic(), SampleCounts()
            for written in sample_round(config, pool, None, [replace(g, round=number) for g in chosen], run_dir):
                if written.file is None or written.failed:
                    raise RuntimeError(f"questions failed: {written.failed}")
                ledger.commit(written.file)
                total += written.counts
            seconds = time.monotonic() - started
            return Measurement(total.tokens, seconds, pool.statuses()[0].busy_s - before)

        pool.wait_ready(config.sampling.samplers)
        for number in range(repeats + 1):
            chosen = groups if number else groups[:WARM_UP_QUESTIONS]
            for name, turn in (("vllm", vllm_alone), ("stage", stage)):
                done = turn(number)
                typer.echo(
                    f"repetition {number} {name:5}  {done.tokens} tokens in {done.seconds:.1f} s, engine busy for "
                    f"{done.engine_s:.1f} s: {done.speed:,.0f} tokens/s{'' if number else ' (warm-up)'}"
                )
                if number:
                    turns[name].append(done)
        pool.close()
    return turns


def _results(config: RunConfig, turns: dict[str, list[Measurement]]) -> dict[str, Any]:
    speeds = {name: [one.speed for one in measured] for name, measured in turns.items()}
    medians = {name: statistics.median(measured) for name, measured in speeds.items()}
    return {
        "benchmark": "sampling",
        "sampling": config.sampling.model_dump(mode="json"),
        "questions": config.data.arithmetic.train_size,
        "turns": {name: [one._asdict() for one in measured] for name, measured in turns.items()},
        "tokens_per_s": medians,
        "ratio": medians["stage"] / medians["vllm"],
        "ratio_of_each_pair": [a / b for a, b in zip(speeds["stage"], speeds["vllm"], strict=True)],
        "target": TARGET,
    }


def _show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "tokens/s (median)", "repetitions")
    for name, title in (("vllm", "vllm.LLM.generate alone"), ("stage", "sampling stage")):
        turns = ", ".join(f"{turn['tokens'] / turn['seconds']:,.0f}" for turn in results["turns"][name])
        table.add_row(title, f"{results['tokens_per_s'][name]:,.0f}", turns)
    pairs = ", ".join(f"{ratio:.3f}" for ratio in results["ratio_of_each_pair"])
    table.add_row("ratio", f"{results['ratio']:.3f} (target {TARGET:g})", pairs)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
