"""`aft-ray doctor`: a probe on every node of a live cluster, and what its answers amount to.

Invariants: every wait has a deadline, and a node that misses it is a finding. Nothing is left behind: the actors end,
the files they wrote are deleted.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.operations import probe as probe_module
from aft_ray.operations.checks import judge
from aft_ray.operations.findings import (
    ClusterFacts,
    Finding,
    Gpu,
    NodeFacts,
    PingFacts,
    StorageFacts,
)
from aft_ray.operations.upload import measure_upload, upload_limit

# Seconds: for a process to start on a node and answer; for any later question; for a sum over all nodes.
START_S, ANSWER_S, PING_S = 120.0, 60.0, 60.0
PING_MIB, PING_TIMES = 32, 3
_CONNECT_S = 5.0
# Round trips of which the quickest measures a clock.
_TRIPS = 5


@dataclass(frozen=True, slots=True)
class Examination:
    """What the doctor is to look at beside the cluster itself: none where there is none."""

    storage: str | None
    models: tuple[str, ...]
    directory: Path | None
    storage_needed: int | None = None


def examine(address: str | None, ask: Examination, say: Callable[[str], None]) -> tuple[ClusterFacts, list[Finding]]:
    """Looks at the cluster and judges it. Raises ConfigError when there is none."""
    with _connected(address):
        facts = _look(ask, say)
    return facts, judge(facts)


def what_to_ask(config: RunConfig | None, storage: str | None, directory: Path | None) -> Examination:
    """What a run of this config would need the cluster to have."""
    if config is None:
        return Examination(storage, (), directory)
    name = config.model.name
    models = (str(Path(name).expanduser()),) if name.startswith(("/", "~")) else ()
    return Examination(
        storage or config.run_dir, models, directory, _storage_needed(config, probe_module.model_bytes(name))
    )


def _storage_needed(config: RunConfig, model_bytes: int | None) -> int | None:
    """Bytes of a finished run: a model a round, and checkpoints with float32 weights and two moments each."""
    if model_bytes is None:
        return None
    parameters = model_bytes / (4 if config.model.dtype == "float32" else 2)
    rounds = config.rounds.count + 1
    return math.ceil(rounds * model_bytes + min(rounds, config.training.keep_checkpoints) * 12 * parameters)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"{address} takes jobs, and the doctor must itself run in the cluster: `ray job submit --address {address} "
            "--working-dir . -- python -m aft_ray.cli doctor`, with the config's path behind it"
        )
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}; name its head with --address HOST:6379, or start one with "
            "`ray start --head`"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _look(ask: Examination, say: Callable[[str], None]) -> ClusterFacts:
    import ray

    # Nodes that lack aft_ray are looked at too.
    ray.cloudpickle.register_pickle_by_value(probe_module)
    nodes = {_name(node): node for node in ray.nodes() if node["Alive"]}
    say(f"looking at {len(nodes)} nodes")
    remote = ray.remote(probe_module.Probe)
    probes = {name: remote.options(**_on(node)).remote() for name, node in nodes.items()}
    try:
        return _ask_all(ask, nodes, probes, say)
    finally:
        for one in probes.values():
            ray.kill(one)
        ray.cloudpickle.unregister_pickle_by_value(probe_module)


def _ask_all(
    ask: Examination, nodes: dict[str, Any], probes: dict[str, Any], say: Callable[[str], None]
) -> ClusterFacts:
    started = answers({name: one.now.remote() for name, one in probes.items()}, START_S)
    silent = {name: str(answer) for name, answer in started.items() if isinstance(answer, Unanswered)}
    probes = {name: one for name, one in probes.items() if name not in silent}
    session = _session_dir()
    paths = [ask.storage] if ask.storage and "://" not in ask.storage else []
    say("asking for versions, GPUs, disks and clocks")
    found = answers({name: one.facts.remote(session, paths, list(ask.models)) for name, one in probes.items()}, START_S)
    silent |= {name: str(answer) for name, answer in found.items() if isinstance(answer, Unanswered)}
    probes = {name: one for name, one in probes.items() if name not in silent}
    seen = [_node_facts(name, nodes[name], found[name], _clock(one)) for name, one in probes.items()]
    stored = None
    if ask.storage is not None:
        say(f"writing to {ask.storage} from every node, and reading it back")
        stored = _storage(ask.storage, probes)
    say("connecting every node to every other")
    blocked = _ports(probes, {name: nodes[name]["NodeManagerAddress"] for name in probes})
    say("summing a tensor over all nodes")
    reached = {name: nodes[name] for name in probes}
    pings = [ping("gloo", reached, PING_TIMES, PING_S)]
    if sum(node.gpus_announced > 0 for node in seen) > 1:
        with_gpus = {node.name: nodes[node.name] for node in seen if node.gpus_announced}
        free = all(node.gpus_free >= 1 for node in seen if node.gpus_announced)
        pings.append(ping("nccl", with_gpus, PING_TIMES, PING_S) if free else PingFacts("nccl", PING_MIB << 20))
    return ClusterFacts(
        nodes=seen,
        silent=silent,
        here=probe_module.versions(),
        storage=stored,
        blocked=blocked,
        pings=pings,
        upload=measure_upload(ask.directory) if ask.directory is not None else None,
        upload_limit=upload_limit(),
        storage_needed=ask.storage_needed,
    )


@dataclass(frozen=True, slots=True)
class Unanswered:
    """What came instead of an answer. gone: the node or the process died, or did not answer in time."""

    reason: str
    gone: bool

    def __str__(self) -> str:
        return self.reason


def answers(references: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """Every node's answer, or Unanswered with the reason."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    ready, _ = ray.wait(list(references.values()), num_returns=max(1, len(references)), timeout=timeout_s)
    found: dict[str, Any] = {}
    for name, reference in references.items():
        if reference not in ready:
            found[name] = Unanswered(f"did not answer within {timeout_s:.0f} s", True)
            continue
        try:
            found[name] = ray.get(reference)
        except RayTaskError as error:
            found[name] = Unanswered((str(error.cause).splitlines() or [type(error.cause).__name__])[0], False)
        except RayError as error:
            found[name] = Unanswered((str(error).splitlines() or [type(error).__name__])[0], True)
    return found


def _name(node: Mapping[str, Any]) -> str:
    """What people call a node. Its id keeps apart those that share an address, as in a cluster on one machine."""
    return f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}"


def _on(node: Mapping[str, Any]) -> dict[str, Any]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}


def _session_dir() -> str:
    import ray

    return str(Path(ray._private.worker.global_worker.node.get_session_dir_path()).parent)


def _node_facts(
    name: str, node: Mapping[str, Any], found: dict[str, Any], clock: tuple[float | None, float]
) -> NodeFacts:
    import ray

    resources = node["Resources"]
    free = ray._private.state.available_resources_per_node().get(node["NodeID"], {})
    gpus = [
        Gpu(
            row["name"],
            row["driver"],
            int(row["total_mib"]),
            int(row["used_mib"]),
            int(row["ecc"]) if row["ecc"].isdigit() else None,
        )
        for row in found["gpus"]
    ]
    return NodeFacts(
        name=name,
        head="node:__internal_head__" in resources,
        gpus_announced=resources.get("GPU", 0.0),
        gpus_free=free.get("GPU", 0.0),
        object_store_bytes=int(resources.get("object_store_memory", 0)),
        clock_s=clock[0],
        clock_error_s=clock[1],
        **{**found, "gpus": gpus},
    )


def _clock(one: Any) -> tuple[float | None, float]:
    """How far a node's clock is ahead of ours, and how sure that is: half of the quickest round trip, in seconds."""
    measured = []
    for _ in range(_TRIPS):
        before = time.time()
        there = answers({"": one.now.remote()}, ANSWER_S)[""]
        after = time.time()
        if isinstance(there, Unanswered):
            return None, 0.0
        measured.append(((after - before) / 2, there - (before + after) / 2))
    error, ahead = min(measured)
    return ahead, error


def _storage(storage: str, probes: Mapping[str, Any]) -> StorageFacts:
    mark = uuid.uuid4().hex[:12]
    files = {name: f".aft-ray-doctor-{mark}-{index}" for index, name in enumerate(probes)}
    wrote = answers(
        {name: one.write_token.remote(storage, files[name], name) for name, one in probes.items()}, ANSWER_S
    )
    written = {name: str(answer) if isinstance(answer, Unanswered) else None for name, answer in wrote.items()}
    there = [name for name in probes if written[name] is None]
    try:
        read = answers(
            {name: one.read_tokens.remote(storage, [files[other] for other in there]) for name, one in probes.items()},
            ANSWER_S,
        )
    finally:
        answers({name: one.delete_token.remote(storage, files[name]) for name, one in probes.items()}, ANSWER_S)
    unseen = {}
    for name, answer in read.items():
        tokens = {} if isinstance(answer, Unanswered) else answer
        unseen[name] = [other for other in there if tokens.get(files[other]) != other]
    return StorageFacts(storage, written, unseen)


def _ports(probes: Mapping[str, Any], addresses: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """The pairs of nodes of which the first cannot connect to the second, and why."""
    listening = answers({name: one.listen.remote() for name, one in probes.items()}, ANSWER_S)
    ports = {name: answer for name, answer in listening.items() if not isinstance(answer, Unanswered)}
    try:
        outcome = answers(
            {
                name: one.connect.remote(
                    {other: (addresses[other], port) for other, port in ports.items() if other != name}, _CONNECT_S
                )
                for name, one in probes.items()
            },
            ANSWER_S + _CONNECT_S * len(probes),
        )
    finally:
        answers({name: one.stop_listening.remote() for name, one in probes.items()}, ANSWER_S)
    blocked = {}
    for name, answer in outcome.items():
        if isinstance(answer, Unanswered):
            blocked[name, "any"] = str(answer)
        else:
            blocked |= {(name, other): why for other, why in answer.items() if why is not None}
    return blocked


def ping(backend: str, nodes: Mapping[str, Any], times: int, timeout_s: float) -> PingFacts:
    """A sum over a process on every node, `times` times; a node that dies or hangs is named."""
    import ray

    gpu = {"num_gpus": 1} if backend == "nccl" else {}
    remote = ray.remote(probe_module.Pinger)
    ranks = {name: remote.options(**_on(node), **gpu).remote() for name, node in nodes.items()}
    try:
        started = answers({name: rank.free_port.remote() for name, rank in ranks.items()}, START_S)
        if absent := [name for name, answer in started.items() if isinstance(answer, Unanswered)]:
            return PingFacts(backend, PING_MIB << 20, absent=absent)
        first = next(iter(nodes))
        address = f"{nodes[first]['NodeManagerAddress']}:{started[first]}"
        results = answers(
            {
                name: rank.ping.remote(backend, address, index, len(ranks), PING_MIB, times, timeout_s)
                for index, (name, rank) in enumerate(ranks.items())
            },
            2 * timeout_s + START_S,
        )
    finally:
        for rank in ranks.values():
            ray.kill(rank)
    failed = {name: answer for name, answer in results.items() if isinstance(answer, Unanswered)}
    if failed:
        absent = [name for name, answer in failed.items() if answer.gone]
        return PingFacts(backend, PING_MIB << 20, {name: str(answer) for name, answer in failed.items()}, absent)
    times_s: Sequence[tuple[float, float]] = list(results.values())
    return PingFacts(
        backend, PING_MIB << 20, met_s=max(met for met, _ in times_s), seconds=max(one for _, one in times_s)
    )
