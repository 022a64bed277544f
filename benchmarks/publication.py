"""Claim: new weights reach running engines many times faster than an engine can be started from a checkpoint.

One trainer holds the live weights of a random Llama; one engine runs. In every repetition the weights change, the model
directory is written as each round writes it, and one transport after the other brings the same version to the engine,
which verifies it by four probes. The same repetition measures two references: a plain copy of the same bytes in
memory, and the start of an engine from the directory in a new process. An update's seconds are what the engine waits
for: from the call until the probes are verified. Writing the directory comes before that, and is the same for all
transports, except that `object_store` also copies the shards into the object store. The broadcast uses gloo without
GPUs (`--gpu`: NCCL, with a GPU for the trainer and one for the engine).

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
    """One weight update: seconds from the call until the probes are verified, and those of each phase.

    `prove_s` is the phase verify; it keeps its name in the output file.
    """

    seconds: float
    rendezvous_s: float = 0.0
    fetch_s: float = 0.0
    load_s: float = 0.0
    prove_s: float = 0.0


class Trainer:
    """Train worker 0 with the whole model, as in `training/weight_publisher.py`, without DeepSpeed."""

    def __init__(self, model: str, dtype: str, bucket_mib: int, gpu: bool, coordinator: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from aft_ray.training.weight_publisher import CoordinatorControl
        from aft_ray.weights.broadcast.sender import Broadcast
        from aft_ray.weights.publish import ObjectStore, SharedStorage

        self._dtype = getattr(torch, dtype)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=self._dtype).to("cuda" if gpu else "cpu")
        control = CoordinatorControl(coordinator, 600, 0, 1)
        self._transports = {
            "checkpoint": SharedStorage(),
            "object_store": ObjectStore(),
            "nccl": Broadcast(control, 0, self._dtype, bucket_mib << 20, 600, gpu),
        }

    def train(self, factor: float) -> None:
        """Changes every weight."""
        import torch

        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.mul_(factor)

    def publish(self, version: int, directory: str, transport: str) -> tuple[Any, float]:
        """Writes a version; returns its manifest and the seconds that writing took."""
        from aft_ray.weights.export import write_model
        from aft_ray.weights.version_manifest import VersionManifest

        used = self._transports[transport]
        started = time.monotonic()
        written = write_model(self._model, Path(directory), 1 << 30, used.put_shard, 0, self._dtype)
        seconds = time.monotonic() - started
        manifest = VersionManifest(version, directory, tuple(written.shards), self._probes(), bytes=written.bytes)
        return used.add_to_manifest(manifest, written.handles, self._model), seconds

    def transfer(self, version: int, transport: str) -> None:
        self._transports[transport].transfer(self._model, version)

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
        ray.remote(Trainer).options(num_gpus=gpus).remote(spec.model, spec.dtype, bucket_mib, spec.gpu, coordinator)
    )
    engine = ray.remote(Sampler).options(num_gpus=gpus)
    tolerance = 1e-3 if spec.dtype == "float32" else 0.1
    handles = SamplerHandles((engine.remote(0, spec, None, 900, None),), (), (None,), 1, 900, 600, tolerance)
    pool = SamplerPool(handles)
    pool.wait_ready()
    repetitions: dict[str, list[Any]] = {"copy": [], "write": [], "start": [], **{name: [] for name in TRANSPORTS}}
    version, size = 0, 0
    for number in range(repeats + 1):
        ray.get(trainer.train.remote(1.01 if number % 2 else 0.99))
        repetitions["copy"].append(ray.get(trainer.copy.remote()))
        for name in TRANSPORTS:
            version += 1
            directory = scratch / f"version-{version}"
            manifest, seconds = ray.get(trainer.publish.remote(version, str(directory), name))
            size = manifest.bytes
            repetitions["write"].append(seconds)
            ray.get(coordinator.publish.remote(manifest))
            repetitions[name].append(_update(coordinator, pool, trainer, manifest, name))
            typer.echo(
                f"repetition {number} {name:12} {repetitions[name][-1].seconds:.3f} s{'' if number else ' (warm-up)'}"
            )
        if 0 < number <= starts:
            repetitions["start"].append(
                _start(engine, replace(spec, model=str(_with_tokenizer(directory, spec.model))))
            )
            typer.echo(f"repetition {number} an engine starts {repetitions['start'][-1]:.1f} s")
        for old in scratch.glob("version-*"):
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
    pool.close()
    ray.shutdown()
    return _results(repetitions, size)


def _update(coordinator: Any, pool: Any, trainer: Any, manifest: Any, name: str) -> Update:
    import ray

    from aft_ray.sampling.broadcast import broadcast_version

    transferred = trainer.transfer.remote(manifest.version, name)
    started = time.monotonic()
    if manifest.broadcast is not None:
        result = broadcast_version(coordinator, pool, manifest, 1)
        if result.missed or not result.loaded:
            raise RuntimeError(f"the broadcast failed: {result.missed}")
        (report,) = result.loaded
    else:
        (report,) = pool.load(manifest)
    seconds = time.monotonic() - started
    ray.get(transferred)
    return Update(seconds, report.rendezvous_s, report.fetch_s, report.load_s, report.verify_s)


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
    counted["write"] = repetitions["write"][len(TRANSPORTS) :]
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
        "turns": {
            name: [asdict(one) if isinstance(one, Update) else one for one in measured]
            for name, measured in counted.items()
        },
    }


def _show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    seconds = results["seconds"]
    restart = seconds["write"] + seconds["start"] if "start" in seconds else None
    columns = ("", "s (median)", "GB/s", "x a copy", "write + start / this", "rendezvous, fetch, load, verify")
    table = Table(*columns, title=f"{results['bytes'] / 1e6:,.0f} MB")
    for name, title in TITLES.items():
        if name not in seconds:
            continue
        parts = ""
        if name in TRANSPORTS:
            updates = results["turns"][name]
            parts = ", ".join(
                f"{statistics.median(update[key] for update in updates):.3f}"
                for key in ("rendezvous_s", "fetch_s", "load_s", "prove_s")
            )
        ratio = f"{restart / seconds[name]:.0f}" if restart and name in TRANSPORTS else ""
        speed, copies = results["gb_per_s"][name], results["times_a_copy"][name]
        table.add_row(title, f"{seconds[name]:.3f}", f"{speed:.2f}", f"{copies:.1f}", ratio, parts)
    table.add_row("writing the directory", f"{seconds['write']:.3f}", f"{results['gb_per_s']['write']:.2f}", "", "", "")
    Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
