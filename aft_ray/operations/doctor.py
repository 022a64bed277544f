"""The work of `aft-ray doctor`: it collects facts with a probe actor on every node of a running cluster.

Invariants: every wait has a deadline, and a node that misses it is reported. Nothing remains on the cluster: actors are
ended, and the files that they wrote are deleted.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from aft_ray.cluster.compat import free_resources_by_node, session_parent
from aft_ray.config.messages import first_line
from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.operations import probe as probe_module
from aft_ray.operations.checks import check_all
from aft_ray.operations.findings import (
    AllReduceFacts,
    BandwidthNeed,
    ClusterFacts,
    Finding,
    Gpu,
    NodeFacts,
    StorageFacts,
)
from aft_ray.operations.network import bandwidth_needed, zero_settings
from aft_ray.operations.upload import measure_upload, upload_limit

# Deadlines in seconds: for the first reply of a node, whose process must start; for later replies; for an all-reduce.
START_S, REPLY_S, ALL_REDUCE_S = 120.0, 60.0, 60.0
# How long an operator of DeepSpeed may compile.
COMPILE_S = 330.0
# By backend: MiB of the tensor, large enough that latency does not count, and how often it is reduced.
ALL_REDUCE = {"gloo": (64, 3), "nccl": (1024, 20)}
_CONNECT_S = 5.0
# A clock is read this many times, and the reading with the shortest round trip counts.
_CLOCK_READINGS = 5
Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a run needs from the cluster.

    Attributes:
        storage: the directory or URI that all nodes must share; None: it is not checked.
        models: model directories that every node must have.
        directory: the working directory that would be uploaded; None: it is not checked.
        storage_needed: bytes that the run will write; None: unknown.
        bandwidth: what the training needs between nodes; None: nothing, or it is not known.
        operators: the operators of DeepSpeed that the training compiles.
    """

    storage: str | None
    models: tuple[str, ...]
    directory: Path | None
    storage_needed: int | None = None
    bandwidth: BandwidthNeed | None = None
    operators: tuple[str, ...] = ()


def check_cluster(
    address: str | None, required: Requirements, say: Callable[[str], None]
) -> tuple[ClusterFacts, list[Finding]]:
    """Collects facts on the cluster and checks them.

    Raises:
        ConfigError: no cluster answers at the address.
    """
    with _connected(address):
        facts = _collect_facts(required, say)
    return facts, check_all(facts)


def requirements_of(config: RunConfig | None, storage: str | None, directory: Path | None) -> Requirements:
    """The requirements of a run with this config. A given `storage` replaces its run_dir."""
    if config is None:
        return Requirements(storage, (), directory)
    name = config.model.name
    models = (str(Path(name).expanduser()),) if name.startswith(("/", "~")) else ()
    return Requirements(
        storage or config.run_dir,
        models,
        directory,
        _storage_needed(config, probe_module.model_bytes(name)),
        bandwidth_needed(config),
        _operators(config),
    )


def _operators(config: RunConfig) -> tuple[str, ...]:
    """The builders of the operators that DeepSpeed compiles for a config."""
    quantizes = bool(zero_settings(config).get("zero_quantized_weights"))
    return ("CPUAdamBuilder",) * config.training.offload_optimizer + ("QuantizerBuilder",) * quantizes


def _storage_needed(config: RunConfig, model_bytes: int | None) -> int | None:
    """Bytes of a run: a model per round, and training states with float32 weights and two Adam moments.

    One more state than is kept is there while it is saved.
    """
    if model_bytes is None:
        return None
    parameters = model_bytes / (4 if config.model.dtype == "float32" else 2)
    rounds = config.rounds.count + 1
    states = config.training.keep_checkpoints + 1
    if not config.training.checkpoint_every_s:
        states = min(rounds, states)
    return math.ceil(rounds * model_bytes + states * 12 * parameters)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"{address} accepts jobs, but the doctor must run inside the cluster: `ray job submit --address {address} "
            "--working-dir . -- python -m aft_ray.cli doctor CONFIG`"
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


def _collect_facts(required: Requirements, say: Callable[[str], None]) -> ClusterFacts:
    import ray

    # The module is sent by value, so the probe also runs on nodes without aft_ray.
    ray.cloudpickle.register_pickle_by_value(probe_module)
    nodes = {_node_name(node): node for node in ray.nodes() if node["Alive"]}
    say(f"checking {len(nodes)} nodes")
    remote = ray.remote(probe_module.NodeProbe)
    probes = {name: remote.options(**_pinned_to(node)).remote() for name, node in nodes.items()}
    try:
        return _query_nodes(required, nodes, probes, say)
    finally:
        for probe in probes.values():
            ray.kill(probe)
        ray.cloudpickle.unregister_pickle_by_value(probe_module)


def _query_nodes(
    required: Requirements, nodes: dict[str, Any], probes: dict[str, Any], say: Callable[[str], None]
) -> ClusterFacts:
    started = collect_replies({name: probe.now.remote() for name, probe in probes.items()}, START_S)
    silent = {name: str(answer) for name, answer in started.items() if isinstance(answer, NoReply)}
    probes = {name: probe for name, probe in probes.items() if name not in silent}
    session = str(session_parent())
    paths = [required.storage] if required.storage and "://" not in required.storage else []
    say("reading versions, GPUs, disks and clocks")
    compiled = list(required.operators)
    found = collect_replies(
        {name: probe.facts.remote(session, paths, list(required.models), compiled) for name, probe in probes.items()},
        START_S + COMPILE_S * len(compiled),
    )
    silent |= {name: str(answer) for name, answer in found.items() if isinstance(answer, NoReply)}
    probes = {name: probe for name, probe in probes.items() if name not in silent}
    seen = [_node_facts(name, nodes[name], found[name], _clock_offset(probe)) for name, probe in probes.items()]
    stored = None
    if required.storage is not None:
        say(f"writing files to {required.storage} on every node and reading them on all others")
        stored = _shared_storage(required.storage, probes)
    say("opening a connection from every node to every other")
    blocked = _blocked_connections(probes, {name: nodes[name]["NodeManagerAddress"] for name in probes})
    say("running an all-reduce over all nodes")
    pings = [measure_all_reduce("gloo", {name: nodes[name] for name in probes}, 1, timeout_s=ALL_REDUCE_S)]
    with_gpus = [node for node in seen if node.gpus_announced]
    if len(with_gpus) > 1:
        pings.append(_measure_nccl(with_gpus, nodes))
    return ClusterFacts(
        nodes=seen,
        silent=silent,
        here=probe_module.versions(),
        storage=stored,
        blocked=blocked,
        pings=pings,
        upload=measure_upload(required.directory) if required.directory is not None else None,
        upload_limit=upload_limit(),
        storage_needed=required.storage_needed,
        bandwidth_needed=required.bandwidth,
    )


def _measure_nccl(with_gpus: Sequence[NodeFacts], nodes: Mapping[str, Any]) -> AllReduceFacts:
    """An all-reduce over all GPUs of the nodes, which takes all their adapters; over one of each if some are in use."""
    if any(node.gpus_free < 1 for node in with_gpus):
        return AllReduceFacts("nccl", ALL_REDUCE["nccl"][0] << 20)
    # Every node has as many ranks, so that none is slower only because it has more of them.
    each = int(min(node.gpus_free for node in with_gpus))
    return measure_all_reduce("nccl", {node.name: nodes[node.name] for node in with_gpus}, each, timeout_s=ALL_REDUCE_S)


@dataclass(frozen=True, slots=True)
class NoReply:
    """The failure of a call to a node.

    Attributes:
        gone: whether the node or its process died or did not answer in time.
    """

    reason: str
    gone: bool

    def __str__(self) -> str:
        return self.reason


def collect_replies(references: Mapping[Key, Any], timeout_s: float) -> dict[Key, Any]:
    """The reply of every node or process, or NoReply with the reason."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    ready, _ = ray.wait(list(references.values()), num_returns=max(1, len(references)), timeout=timeout_s)
    found: dict[Key, Any] = {}
    for name, reference in references.items():
        if reference not in ready:
            found[name] = NoReply(f"did not answer within {timeout_s:.0f} s", True)
            continue
        try:
            found[name] = ray.get(reference)
        except RayTaskError as error:
            found[name] = NoReply(first_line(error.cause), False)
        except RayError as error:
            found[name] = NoReply(first_line(error), True)
    return found


def _node_name(node: Mapping[str, Any]) -> str:
    """The name of a node in the report. Part of its id distinguishes nodes of one machine, which share an address."""
    return f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}"


def _pinned_to(node: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an actor that must run on the node and takes no CPU."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}


def _node_facts(
    name: str, node: Mapping[str, Any], found: dict[str, Any], clock: tuple[float | None, float]
) -> NodeFacts:
    resources = node["Resources"]
    free = free_resources_by_node().get(node["NodeID"], {})
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


def _clock_offset(probe: Any) -> tuple[float | None, float]:
    """Seconds that the clock of a node is ahead of this one, and the error: half of the shortest round trip."""
    measured = []
    for _ in range(_CLOCK_READINGS):
        before = time.time()
        clock = collect_replies({"": probe.now.remote()}, REPLY_S)[""]
        after = time.time()
        if isinstance(clock, NoReply):
            return None, 0.0
        measured.append(((after - before) / 2, clock - (before + after) / 2))
    error, ahead = min(measured)
    return ahead, error


def _shared_storage(storage: str, probes: Mapping[str, Any]) -> StorageFacts:
    """Lets every node write a file and read the files of all others; deletes them."""
    mark = uuid.uuid4().hex[:12]
    files = {name: f".aft-ray-doctor-{mark}-{index}" for index, name in enumerate(probes)}
    wrote = collect_replies(
        {name: probe.write_token.remote(storage, files[name], name) for name, probe in probes.items()}, REPLY_S
    )
    written = {name: str(answer) if isinstance(answer, NoReply) else None for name, answer in wrote.items()}
    writers = [name for name in probes if written[name] is None]
    try:
        read = collect_replies(
            {
                name: probe.read_tokens.remote(storage, [files[other] for other in writers])
                for name, probe in probes.items()
            },
            REPLY_S,
        )
    finally:
        collect_replies(
            {name: probe.delete_token.remote(storage, files[name]) for name, probe in probes.items()}, REPLY_S
        )
    unseen = {}
    for name, answer in read.items():
        tokens = {} if isinstance(answer, NoReply) else answer
        unseen[name] = [other for other in writers if tokens.get(files[other]) != other]
    return StorageFacts(storage, written, unseen)


def _blocked_connections(probes: Mapping[str, Any], addresses: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """The reasons why nodes cannot connect, by pairs (from, to) of nodes."""
    listening = collect_replies({name: probe.listen.remote() for name, probe in probes.items()}, REPLY_S)
    ports = {name: answer for name, answer in listening.items() if not isinstance(answer, NoReply)}
    try:
        outcome = collect_replies(
            {
                name: probe.connect.remote(
                    {other: (addresses[other], port) for other, port in ports.items() if other != name}, _CONNECT_S
                )
                for name, probe in probes.items()
            },
            REPLY_S + _CONNECT_S * len(probes),
        )
    finally:
        collect_replies({name: probe.stop_listening.remote() for name, probe in probes.items()}, REPLY_S)
    blocked = {}
    for name, answer in outcome.items():
        if isinstance(answer, NoReply):
            blocked[name, "any"] = str(answer)
        else:
            blocked |= {(name, other): why for other, why in answer.items() if why is not None}
    return blocked


def measure_all_reduce(
    backend: str, nodes: Mapping[str, Any], ranks_per_node: int, *, timeout_s: float, times: int | None = None
) -> AllReduceFacts:
    """Runs an all-reduce over processes on every node. A node that dies or hangs is named in the result.

    Args:
        ranks_per_node: processes of each node, with a GPU each if the backend is nccl.
        times: how often the tensor is reduced; None: as the backend needs for a sure measurement.
    """
    import ray

    mib, usual = ALL_REDUCE[backend]
    gpu = {"num_gpus": 1} if backend == "nccl" else {}
    remote = ray.remote(probe_module.AllReduceRank)
    places = [(name, index) for name in nodes for index in range(ranks_per_node)]
    ranks = {place: remote.options(**_pinned_to(nodes[place[0]]), **gpu).remote() for place in places}
    facts = AllReduceFacts(backend, mib << 20, len(ranks))
    try:
        started = collect_replies({place: rank.free_port.remote() for place, rank in ranks.items()}, START_S)
        if absent := {name: None for (name, _), answer in started.items() if isinstance(answer, NoReply)}:
            return replace(facts, absent=list(absent))
        address = f"{nodes[places[0][0]]['NodeManagerAddress']}:{started[places[0]]}"
        results = collect_replies(
            {
                place: rank.all_reduce.remote(backend, address, index, len(ranks), mib, times or usual, timeout_s)
                for index, (place, rank) in enumerate(ranks.items())
            },
            2 * timeout_s + START_S,
        )
    finally:
        for rank in ranks.values():
            ray.kill(rank)
    failed = {place: answer for place, answer in results.items() if isinstance(answer, NoReply)}
    if failed:
        gone = {name: None for (name, _), answer in failed.items() if answer.gone}
        return replace(facts, errors={name: str(answer) for (name, _), answer in failed.items()}, absent=list(gone))
    times_s: Sequence[tuple[float, float]] = list(results.values())
    return replace(facts, met_s=max(met for met, _ in times_s), seconds=max(one for _, one in times_s))
