"""Acceptance checks that are whole runs: `aft-ray train` with a tiny model, one for each way to publish weights.

Every publication of a run proves by itself that the engines hold the trainer's weights (`docs/publication.md`), so a
run that ends well has shown it. The checks read from the run's events that both versions were published, and how.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aft_ray.config.loader import dump_config
from aft_ray.config.run import parse_config
from aft_ray.operations.acceptance.machine import gpu_count
from aft_ray.operations.acceptance.models import write_character_tokenizer, write_random_model
from aft_ray.operations.acceptance.outcome import Figure, NotAccepted, Skipped
from aft_ray.planning.plan.architecture import Architecture

# The vocabulary is that of `models.write_character_tokenizer`.
_MODEL = Architecture("random", "llama", layers=2, hidden=128, intermediate=256, heads=2, kv_heads=2, vocabulary=99,
                      context=768, head_size=64)  # fmt: skip
_QUESTIONS = 16
_TIMEOUT_S = 1500.0


def run_on_one_gpu(transport: str) -> list[Figure]:
    """A run whose engine and train worker take turns on one GPU (colocation)."""
    return _run(transport, _turns(1))


def run_broadcast() -> list[Figure]:
    """A run whose trainer streams the weights from its own GPU to the engine's."""
    return _run("nccl", {"rounds": {"max_staleness": 1}})


def run_tensor_parallel() -> list[Figure]:
    """A run whose engine of two processes takes turns with two train workers on two GPUs."""
    return _run("object_store", _turns(2))


def run_two_nodes(small: bool, storage: str | None) -> list[Figure]:
    """A run over all GPUs of a Ray cluster of at least two nodes: one streams to another, and ZeRO-3 spans them.

    Args:
        small: whether nodes without GPUs will do, with one process each.
        storage: a directory that all nodes share.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address or storage is None:
        raise Skipped("needs 2 nodes: start Ray on them, set RAY_ADDRESS to its head, and give --storage DIR")
    nodes = _gpus_of_cluster(address)
    gpus = [number for number in nodes if number]
    if len(gpus) < 2 and not (small and not gpus and len(nodes) > 1):
        raise Skipped(f"needs 2 nodes with GPUs, and the cluster at {address} has {len(gpus)}")
    workers = sum(gpus or [1] * len(nodes)) - 1
    sections = {
        "rounds": {"max_staleness": 1},
        "training": {"workers": workers, "zero_stage": 3, "groups_per_step": max(8, workers)},
        "cluster": {"address": address},
    }
    return [Figure("nodes", len(gpus or nodes)), *_run("nccl", sections, bool(gpus), Path(storage))]


def _turns(gpus: int) -> dict[str, Any]:
    """The sections of a config in which one engine of `gpus` processes takes turns with `gpus` train workers."""
    return {
        "sampling": {"colocate": True, "tensor_parallel_size": gpus, "gpus_per_sampler": gpus},
        "training": {"workers": gpus, "zero_stage": 2},
    }


def _run(
    transport: str, sections: dict[str, Any], gpu: bool | None = None, storage: Path | None = None
) -> list[Figure]:
    """Runs `aft-ray train` and checks what it has published.

    Args:
        gpu: whether engines and train workers have GPUs; None: if this machine has some.
        storage: where the run directory is made; None: in the temporary directory.
    """
    gpu = gpu_count() > 0 if gpu is None else gpu
    with TemporaryDirectory(prefix="aft_ray-acceptance-", dir=storage) as place:
        model = write_random_model(Path(place) / "model", _MODEL, "cpu", 0.1)
        write_character_tokenizer(model)
        run_dir = Path(place) / "run"
        tree = _tree(run_dir, model, transport, sections, gpu)
        config = Path(place) / "run.yaml"
        config.write_text(dump_config(parse_config(tree)))
        command = [sys.executable, "-m", "aft_ray.cli", "train", str(config)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise NotAccepted(f"the run did not end within {_TIMEOUT_S:.0f} s") from None
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise NotAccepted(f"aft-ray train ended with status {done.returncode} and said: {said}")
        events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return _figures(transport, events)


def _tree(run_dir: Path, model: Path, transport: str, sections: dict[str, Any], gpu: bool) -> dict[str, Any]:
    """The config of a run of rounds 0 and 1 on a few generated questions."""
    sizes = {"train_size": _QUESTIONS, "validation_size": 8, "test_size": 8, "max_steps": 2}
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {"name": str(model), "dtype": "bfloat16" if gpu else "float32", "max_length": _MODEL.context},
        "data": {"task": "arithmetic", "arithmetic": sizes},
        "vft": {"epochs": 1, "questions_per_step": 8},
        "rounds": {"count": 1, "max_staleness": 0, "evaluate_every": 0},
        "sampling": {"k": 2, "max_tokens": 32, "max_num_seqs": 16, "kv_cache_gib": 0.25, "gpus_per_sampler": 1,
                     "gpu_memory_utilization": 0.5, "timeout_s": 300},
        "training": {"groups_per_step": 8, "gpus_per_worker": 1, "zero_stage": 1, "timeout_s": 900},
        "weights": {"transport": transport, "timeout_s": 300},
    }  # fmt: skip
    if transport == "lora":
        tree["lora"] = {"rank": 8}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    if not gpu:
        tree["sampling"]["gpus_per_sampler"] = tree["training"]["gpus_per_worker"] = 0
    return tree


def _figures(transport: str, events: list[dict[str, Any]]) -> list[Figure]:
    """Raises NotAccepted when not both versions were published, or not in the way that was asked for."""
    published = [event for event in events if event["event"] == "published"]
    versions = sorted({event["version"] for event in published})
    if versions != [0, 1]:
        raise NotAccepted(f"versions 0 and 1 should have been published, and {versions} were")
    last = max(published, key=lambda event: event["version"])
    figures = [
        Figure("published by", transport),
        Figure("largest difference of a probe", max(one["probe_difference"] for one in published), "nats per token"),
        Figure("publication", last["seconds"], "s"),
    ]
    if transport == "nccl":
        streamed = int(last["rendezvous_s"] > 0)
        figures.append(Figure("engines that read the weights from disk instead", 1 - streamed, limit=0))
    return figures


def _gpus_of_cluster(address: str) -> list[int]:
    """The number of GPUs of each node of a cluster."""
    import ray

    ray.init(address=address, log_to_driver=False)
    try:
        return [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()
