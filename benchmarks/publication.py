"""Claim: new weights reach running engines many times faster than an engine can be started from a checkpoint.

One trainer holds the live weights of a random Llama; one engine runs. In every repetition the weights change, and one
transport after the other brings the same version to the engine, which verifies it by four probes, and writes the model
directory as each round writes it. The same repetition measures two references: a plain copy of the same bytes in
memory, and the start of an engine from the directory in a new process.

An update's seconds are what the engine waits for: from the offer until the probes are verified. What training waits for
is measured too: from its last step until it may go on, the engine's part of a broadcast included. It is compared with
the time at which the model directory is durable, for which training waited when it was written first. The broadcast
uses gloo without GPUs (`--gpu`: NCCL, with a GPU for the trainer and one for the engine).

    python benchmarks/publication.py --parameters 50 --repeats 3 --output publication.json
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from aft_ray.inference.engine_spec import EngineSpec

LENGTH, LAYERS, HEAD = 256, 8, 64
PROMPT, RESPONSES = [7, 8, 9, 10, 11], ([12, 13, 1], [9, 9, 1], [20, 21, 22, 1], [5, 1])
TRANSPORTS = ("checkpoint", "object_store", "nccl")
TITLES = {
    "copy": "the same bytes copied in memory",
    "checkpoint": "checkpoint",
    "object_store": "object_store",
    "nccl": "nccl",
    "start": "an engine started from the directory",
}


@dataclass(frozen=True, slots=True)
class Update:
    """One weight update, in seconds.

    Attributes:
        seconds: from the offer until the probes are verified, and then those of each phase. `prove_s` is the phase
            verify; it keeps its name in the output file.
        training_s: from the last step until training may go on.
        durable_s: from the last step until the model directory is durable.
    """

    seconds: float
    rendezvous_s: float = 0.0
    fetch_s: float = 0.0
    load_s: float = 0.0
    prove_s: float = 0.0
    training_s: float = 0.0
    durable_s: float = 0.0


class Trainer:
    """Train worker 0 with the whole model, as in `training/publication/weight_publisher.py`, without DeepSpeed."""

    def __init__(self, model: str, dtype: str, bucket_mib: int, gpu: bool, directory: str, coordinator: Any) -> None:
        import torch
        import torch.distributed as dist
        from transformers import AutoModelForCausalLM

        from aft_ray.storage.run_dir import RunDir
        from aft_ray.training.publication.model_writer import ModelWriter
        from aft_ray.training.publication.weight_publisher import CoordinatorControl
        from aft_ray.weights.broadcast.sender import Broadcast
        from aft_ray.weights.publish import ObjectStore, SharedStorage

        dist.init_process_group("gloo", init_method=f"file://{directory}/ranks", rank=0, world_size=1)
        self._dtype = getattr(torch, dtype)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=self._dtype).to("cuda" if gpu else "cpu")
        self._coordinator, self._run_dir = coordinator, RunDir(directory)
        self._writer = ModelWriter(self._run_dir, 0, 600, coordinator)
        control = CoordinatorControl(coordinator, 600, 0, 1, 600)
        self._transports = {
            "checkpoint": SharedStorage(),
            "object_store": ObjectStore(control),
            "nccl": Broadcast(control, bucket_mib << 20, 600, gpu),
        }

    def train(self, factor: float) -> None:
        """Changes every weight."""
        import torch

        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.mul_(factor)

    def publish(self, version: int, transport: str) -> tuple[float, float]:
        """Publishes a version. Returns `training_s` and `durable_s`."""
        import ray

        from aft_ray.weights.export import LayerPass, describe_model
        from aft_ray.weights.publish import Publication
        from aft_ray.weights.version_manifest import VersionManifest

        probes, path = self._probes(), f"version-{version}"
        started = time.monotonic()
        layers = LayerPass(self._model, self._dtype, 1 << 30)
        manifest = VersionManifest(
            version, self._run_dir.uri(path), layers.plan.names, probes, bytes=layers.plan.bytes, durable=False
        )
        durable: list[float] = []

        def offer(offered: VersionManifest) -> None:
            ray.get(self._coordinator.publish.remote(offered))

        def store() -> Any:
            def describe(directory: Path) -> None:
                describe_model(self._model, directory, layers.plan)

            def on_durable() -> None:
                durable.append(time.monotonic() - started)

            return self._writer.start(version, path, layers.files, describe, on_durable)

        used = self._transports[transport]
        used.deliver(Publication(manifest, layers, offer, store))
        used.finish()
        training_s = time.monotonic() - started
        self._writer.wait()
        return training_s, durable[0]

    def copy(self) -> float:
        """Seconds for a copy of all weights into memory that is allocated already."""
        import torch

        parameters = [parameter.detach() for parameter in self._model.parameters()]
        copies = [torch.empty_like(parameter).zero_() for parameter in parameters]
        started = time.monotonic()
        for copy, parameter in zip(copies, parameters, strict=True):
            copy.copy_(parameter)
        if parameters[0].is_cuda:
            torch.cuda.synchronize()
        return time.monotonic() - started

    def _probes(self) -> tuple[Any, ...]:
        import torch

        from aft_ray.weights.version_manifest import Probe

        probes = []
        for response in RESPONSES:
            ids = torch.tensor([PROMPT + response], device=self._model.device)
            with torch.no_grad():
                logprobs = self._model(ids).logits[0].float().log_softmax(-1)
            at = range(len(PROMPT) - 1, ids.shape[1] - 1)
            probes.append(Probe(PROMPT, response, sum(logprobs[i, ids[0, i + 1]].item() for i in at) / len(response)))
        return tuple(probes)


def main(
    parameters: Annotated[int, typer.Option(help="parameters of the model, millions")] = 50,
    dtype: Annotated[str, typer.Option(help="dtype of the weights: float32 or bfloat16")] = "float32",
    repeats: Annotated[int, typer.Option(help="repetitions, after one that is not counted")] = 3,
    bucket_mib: Annotated[int, typer.Option(help="size of the broadcast's buckets")] = 64,
    starts: Annotated[int, typer.Option(help="repetitions in which an engine is started too")] = 2,
    gpu: Annotated[bool, typer.Option(help="a GPU for the trainer and one for the engine")] = False,
    output: Annotated[Path | None, typer.Option(help="write the results to this file")] = None,
) -> None:
    """Seconds and GB/s of every transport, beside a copy in memory and a start from a checkpoint."""
    from jobs.tiny_model import build_tiny_model

    hidden = _hidden_size(parameters * 1_000_000)
    with tempfile.TemporaryDirectory(prefix="aft-ray-benchmark-") as scratch:
        model = str(build_tiny_model(f"{scratch}/model", 0, hidden, LAYERS, hidden // HEAD, True, LENGTH))
        spec = EngineSpec(model, (1,), dtype, LENGTH, 8, gpu, kv_cache_gib=0.25, receives_broadcasts=True)
        results = _measure(spec, Path(scratch), repeats, starts, bucket_mib)
    results |= {"benchmark": "publication", "dtype": dtype, "bucket_mib": bucket_mib, "gpu": gpu}
    _show(results)
    if output:
        output.write_text(json.dumps(results, indent=1))


def _hidden_size(parameters: int) -> int:
    """The width of a Llama with about so many parameters: a layer has 4 h² and 8 h² of them."""
    return max(HEAD, round((parameters / (12 * LAYERS)) ** 0.5 / HEAD) * HEAD)


def _measure(spec: EngineSpec, scratch: Path, repeats: int, starts: int, bucket_mib: int) -> dict[str, Any]:
    import ray

    from aft_ray.cluster.connect import start_ray
    from aft_ray.coordination.coordinator import start_coordinator
    from aft_ray.sampling.sampler import Sampler
    from aft_ray.sampling.sampler_handles import SamplerHandles
    from aft_ray.sampling.sampler_pool import SamplerPool

    start_ray(num_cpus=4, log_to_driver=False, object_store_memory=4 << 30)
    coordinator = start_coordinator()
    gpus = 1 if spec.gpu else 0
    trainer = (
        ray.remote(Trainer)
        .options(num_gpus=gpus)
        .remote(spec.model, spec.dtype, bucket_mib, spec.gpu, str(scratch), coordinator)
    )
    engine = ray.remote(Sampler).options(num_gpus=gpus)
    tolerance = 1e-3 if spec.dtype == "float32" else 0.1
    handles = SamplerHandles((engine.remote(0, spec, None, 900, None),), (), (None,), 1, 900, 600, tolerance)
    pool = SamplerPool(handles)
    pool.wait_ready()
    repetitions: dict[str, list[Any]] = {"copy": [], "start": [], **{name: [] for name in TRANSPORTS}}
    version, size = 0, 0
    for number in range(repeats + 1):
        ray.get(trainer.train.remote(1.01 if number % 2 else 0.99))
        repetitions["copy"].append(ray.get(trainer.copy.remote()))
        for name in TRANSPORTS:
            version += 1
            update, size = _update(coordinator, pool, trainer, version, name)
            repetitions[name].append(update)
            typer.echo(f"repetition {number} {name:12} {update.seconds:.3f} s{'' if number else ' (warm-up)'}")
        if 0 < number <= starts:
            directory = _with_tokenizer(scratch / f"version-{version}", spec.model)
            repetitions["start"].append(_start(engine, replace(spec, model=str(directory))))
            typer.echo(f"repetition {number} an engine starts {repetitions['start'][-1]:.1f} s")
        for old in scratch.glob("version-*"):
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
    pool.close()
    ray.shutdown()
    return _results(repetitions, size)


def _update(coordinator: Any, pool: Any, trainer: Any, version: int, name: str) -> tuple[Update, int]:
    """Publishes a version and loads it into the engine. Returns how long it took and the bytes of the weights."""
    import ray

    from aft_ray.sampling.broadcast import broadcast_version

    waiting = coordinator.wait_version.remote(version, 600)
    ray.get(coordinator.check.remote())  # the driver waits before the version is published, as the engines are idle
    published = trainer.publish.remote(version, name)
    manifest, _ = ray.get(waiting)
    started = time.monotonic()
    if manifest.broadcast is not None:
        result = broadcast_version(coordinator, pool, manifest, 1)
        if result.missed or not result.loaded:
            raise RuntimeError(f"the broadcast failed: {result.missed}")
        (report,) = result.loaded
    else:
        (report,) = pool.load(manifest)
    seconds = time.monotonic() - started
    phases = report.rendezvous_s, report.fetch_s, report.load_s, report.verify_s
    return Update(seconds, *phases, *ray.get(published)), manifest.bytes


def _with_tokenizer(directory: Path, model: str) -> Path:
    """Adds the tokenizer to a model directory, as the directory of a round has it."""
    for file in Path(model).glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def _start(engine: Any, spec: EngineSpec) -> float:
    import ray

    started = time.monotonic()
    started_engine = engine.remote(1, spec, None, 900, 0)
    ray.get(started_engine.status.remote())
    seconds = time.monotonic() - started
    ray.kill(started_engine)
    return seconds


def _results(repetitions: dict[str, list[Any]], size: int) -> dict[str, Any]:
    counted = {
        name: measured[1:] if name in (*TRANSPORTS, "copy") else measured for name, measured in repetitions.items()
    }
    seconds = {
        name: statistics.median(one.seconds if isinstance(one, Update) else one for one in measured)
        for name, measured in counted.items()
        if measured
    }
    return {
        "bytes": size,
        "seconds": seconds,
        "gb_per_s": {name: size / 1e9 / took for name, took in seconds.items()},
        "times_a_copy": {name: took / seconds["copy"] for name, took in seconds.items()},
        **{
            key: {name: statistics.median(getattr(one, key) for one in counted[name]) for name in TRANSPORTS}
            for key in ("training_s", "durable_s")
        },
        "turns": {
            name: [asdict(one) if isinstance(one, Update) else one for one in measured]
            for name, measured in counted.items()
        },
    }


def _show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    seconds = results["seconds"]
    columns = ("", "s (median)", "GB/s", "x a copy", "start / this", "rendezvous, fetch, load, verify")
    table = Table(*columns, "training waits", "durable after", title=f"{results['bytes'] / 1e6:,.0f} MB")
    for name, title in TITLES.items():
        if name not in seconds:
            continue
        speed, copies = results["gb_per_s"][name], results["times_a_copy"][name]
        row = [title, f"{seconds[name]:.3f}", f"{speed:.2f}", f"{copies:.1f}"]
        if name in TRANSPORTS:
            parts = [
                statistics.median(update[key] for update in results["turns"][name])
                for key in ("rendezvous_s", "fetch_s", "load_s", "prove_s")
            ]
            row.append(f"{seconds['start'] / seconds[name]:.0f}" if "start" in seconds else "")
            row.append(", ".join(f"{part:.3f}" for part in parts))
            row += [f"{results[key][name]:.3f}" for key in ("training_s", "durable_s")]
        table.add_row(*row)
    Console(width=150).print(table)


if __name__ == "__main__":
    typer.run(main)
