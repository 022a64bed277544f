"""Every private or internal name of Ray and vLLM that `aft_ray` uses, with the reason.

These names may change with any release. Each function says what the name is needed for and which public way is missing.
All of them were checked against Ray 2.60.0 and against vLLM 0.32.0 (the CPU build) and 0.33.0 (the GPU build).
`make check-gpu` compares the two builds again. After an upgrade this module has to be compared with the new sources,
together with the two modules that derive from internal classes:

- `serving.engine.server`: see `ray_vllm_engine`.
- `inference.vllm_worker`: see `nccl_weight_transfer`. Its `WeightLoader` is a worker extension (`worker_extension_cls`,
  which is public), and also uses the worker's `model_runner.get_model()`, `model_runner.device`,
  `model_runner.reset_lora_state()` and `vllm_config`, because an extension gets nothing but the worker itself.

Invariant: importing this module imports neither Ray nor vLLM; each function imports what it needs when it is called.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import InvalidStateError
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ray.data

# --- Ray Core


def kill_failed_start(error: BaseException) -> None:
    """Ends the processes that a failed `ray.init` has left running.

    When a process of the cluster starts too late, `ray.init` raises and leaves the others running, among them the
    GCS server; `ray.shutdown` does not know them, because no connection was made. The started `Node` object is
    reachable only through the frames of the traceback.

    Args:
        error: What `ray.init` raised.
    """
    from ray._private.node import Node

    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(node := frame.f_locals.get("self"), Node):
            node.kill_all_processes(check_alive=False, allow_graceful=False)


def autoscaler_config() -> Any:
    """The autoscaler's `ClusterConfig` message, or None when no autoscaler has reported one.

    Its `node_group_configs` say which nodes may still be started. Ray publishes the nodes that run (`ray.nodes`), but
    not those that its autoscaler may add.
    """
    from ray._private.state import state

    return state.get_cluster_config()


def free_resources_by_node() -> dict[str, dict[str, float]]:
    """What each live node has free: node id -> resource -> amount.

    `ray.available_resources` is public, but gives only the sum over all nodes.
    """
    from ray._private.state import available_resources_per_node

    free: dict[str, dict[str, float]] = available_resources_per_node()
    return free


def session_parent() -> Path:
    """The directory below which Ray keeps the logs and spilled objects of its sessions on this machine.

    Ray has no public call for it, and `--temp-dir` may have moved it. The process must be connected to a cluster.
    """
    from ray._private.worker import global_worker

    return Path(global_worker.node.get_session_dir_path()).parent


# --- Ray Data


def dataset_from_blocks(blocks: Sequence[Any]) -> ray.data.Dataset:
    """A Ray Data set whose blocks are given as Arrow tables.

    `ray.data.from_arrow` runs a task of one whole CPU for each table, only to count its rows. `from_blocks` counts them
    in this process, but `ray.data` does not export it.
    """
    from ray.data.read_api import from_blocks

    return from_blocks(list(blocks))


# --- Ray Train


def reported_checkpoints_file() -> str:
    """The name of the file in which Ray Train lists the checkpoints that were reported to it.

    Ray Train reads it when a run is started again, and raises an error when a listed directory is gone. It has no call
    that takes a checkpoint off the list.
    """
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    return str(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)


# --- Ray Jobs: the upload of a working directory


def upload_filter(directory: Path, patterns: Sequence[str]) -> Callable[[Path], bool]:
    """Returns a function that says whether Ray leaves a path out of the upload of a job's working directory.

    Only Ray itself knows how it reads its patterns of excluded files; it has no call that lists what it would send.
    """
    from ray._private.runtime_env import packaging

    excludes: Callable[[Path], bool] = packaging._get_excludes(directory, list(patterns))
    return excludes


def visit_upload(directory: Path, patterns: Sequence[str], visit: Callable[[Path], None]) -> None:
    """Calls `visit` with every path that Ray would upload of a working directory.

    This also applies `.gitignore` and `.rayignore`, in the way that Ray does; see `upload_filter`.
    """
    from ray._private.runtime_env import packaging

    packaging._dir_travel(
        directory,
        [upload_filter(directory, patterns)],
        visit,
        include_gitignore=True,
        logger=logging.getLogger(__name__),
    )


def upload_size_limits() -> tuple[int, int]:
    """Bytes of a working directory that the dashboard takes in one request, and that the GCS stores.

    Ray checks both only during the upload, and does not publish the numbers.
    """
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    return int(ray_constants.DASHBOARD_CLIENT_MAX_SIZE), int(packaging.GCS_STORAGE_MAX_SIZE)


# --- Ray Serve


def start_serve_application(application: Any, name: str) -> None:
    """Deploys an application at the path `/` and returns at once.

    `serve.run` waits until the application is healthy, without a deadline and without a way to stop waiting on a
    signal. `serve._run` with `_blocking=False` does not wait, so that the caller can.
    """
    from ray import serve

    serve._run(application, name=name, route_prefix="/", _blocking=False)


# Modules that Ray imports under a name which the newest supported vLLM no longer has: old name -> present name.
MOVED_VLLM_MODULES = {
    # Ray 2.60's engine imports `FrontendArgs` from here. vLLM 0.33 moved the module; 0.32 has the old name.
    "vllm.entrypoints.launchers.cli_args": "vllm.entrypoints.common.cli_args",
}

# Names the setup hook of the job in an engine's processes, where Ray's own variable names ours.
_JOB_SETUP_HOOK = "AFT_RAY_JOB_SETUP_HOOK"


class _MovedModules(MetaPathFinder, Loader):
    """Finds a moved module of vLLM under its old name, where nothing else finds one."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED_VLLM_MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        # The import system returns what stands in sys.modules after this call, so both names are one module.
        sys.modules[module.__name__] = importlib.import_module(MOVED_VLLM_MODULES[module.__name__])


def alias_moved_modules() -> None:
    """Lets Ray's serve code import moved modules of vLLM by their old names, in this process, from now on.

    It changes nothing where the old names exist, and imports nothing itself: vLLM must not be imported before Ray has
    set the visible devices and the environment variables of an engine.
    """
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())


def engine_runtime_env(variables: dict[str, str]) -> dict[str, Any]:
    """The runtime environment of an engine, in which every process of Ray first aliases the moved modules.

    Beside the replica, Ray starts tasks for an engine that import its own modules and none of ours: the download of
    the model and, for GPUs, the engine's configuration. The hook is the only code of ours that runs there before them.
    Ray takes the key `worker_process_setup_hook` only from a whole job, and ignores it in the options of an actor or a
    task; the variable that brings it to the processes works in both. Both must name the same hook, because vLLM passes
    this environment to `ray.init` in the process of its core, which refuses two. A hook of the job runs after ours.

    Args:
        variables: environment variables of the engine.
    """
    import ray
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

    hook = f"{__name__}.{set_up_engine_process.__name__}"
    job = ray.get_runtime_context().runtime_env.get("env_vars", {}) if ray.is_initialized() else {}
    own = job.get(WORKER_PROCESS_SETUP_HOOK_ENV_VAR)
    variables = variables | {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: hook} | ({_JOB_SETUP_HOOK: own} if own else {})
    return {"env_vars": variables, "worker_process_setup_hook": hook}


def set_up_engine_process() -> None:
    """What each Ray worker process of an engine runs first; see `engine_runtime_env`."""
    alias_moved_modules()
    if hook := os.environ.get(_JOB_SETUP_HOOK):
        from ray._private.runtime_env.setup_hook import load_and_execute_setup_hook

        if error := load_and_execute_setup_hook(hook):
            raise RuntimeError(error)


def ray_vllm_engine() -> Any:
    """`VLLMEngine`, the engine class of Ray's `LLMServer`, as the base class of `serving.engine.server.PolicyEngine`.

    `LLMServer` takes an engine class (`engine_cls`), but Ray publishes none to derive from. The subclass overrides
    `_start_async_llm_engine`, the only place where vLLM's configuration can be changed before the engine starts, and
    reads `_engine_client`, the `AsyncLLM` that takes new weights; `LLMServer` has no method for either.
    """
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

    return VLLMEngine


# --- vLLM


def layerwise_reload() -> Any:
    """The module by which vLLM reloads weights in place: `initialize_layerwise_reload`, `finalize_layerwise_reload`
    and `get_layerwise_info`.

    A worker's `reload_weights` takes all weights in one call. Files that arrive one after the other from an object
    store need the three steps apart, and an update that was interrupted must be found and dropped. The record of a
    layer (`load_numel`, `load_numel_total`, `kernel_tensors`, `can_load()`) says which weights it still lacks, for
    which vLLM only prints a warning. The method of a mixture of experts (`quant_method.moe_kernel`) keeps packed
    experts on the CPU, which `inference.vllm_worker.reload` drops.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    return layerwise


def is_attention_layer(layer: Any) -> bool:
    """Whether the layerwise reload completes a layer only at its end, whatever weights it has got."""
    from vllm.model_executor.layers.attention import is_deferred_attention_layer

    return bool(is_deferred_attention_layer(layer))


def embedding_classes() -> tuple[Any, Any]:
    """`VocabParallelEmbedding` and `ParallelLMHead`, the layers at the two ends of a model.

    On the CPU a head that shares the embedding's weight multiplies by a packed copy of it. No reload of vLLM refreshes
    this copy, so `inference.vllm_worker.reload` finds these layers and calls
    `quant_method.process_weights_after_loading` of the head. Their weights have padding, which no checkpoint fills:
    `shard_indices.num_org_elements` are the rows that it does fill.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    return VocabParallelEmbedding, ParallelLMHead


def engine_core_ended(llm: Any) -> bool:
    """Whether the process of the engine core of a vLLM `LLMEngine` has ended; False when it is the calling process.

    vLLM watches the process, but tells only the next call of the engine. See `fail_waiting_calls`.
    """
    resources = getattr(llm.engine_core, "resources", None)
    return resources is not None and bool(resources.engine_dead)


def fail_waiting_calls(llm: Any) -> None:
    """Ends the calls of an `LLMEngine` whose engine core has ended; each raises `EngineDeadError`.

    Without this a thread that waits inside such a call waits for ever: a killed core sends no output to `step`, and the
    results of other calls are not set either. `outputs_queue` and `utility_results` are what these threads wait at.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    client = llm.engine_core
    client.outputs_queue.put_nowait(EngineDeadError())
    for result in list(client.utility_results.values()):
        with contextlib.suppress(InvalidStateError):  # it was set meanwhile
            result.set_exception(EngineDeadError())


def shut_down_engine(llm: Any) -> None:
    """Ends the processes of a vLLM `LLMEngine`, which has no method for it, and frees its memory."""
    llm.engine_core.shutdown()


def lora_ranks() -> Any:
    """The type `Literal[1, 8, ...]` of the adapter ranks that vLLM has kernels for; only its annotation lists them."""
    from vllm.config.lora import MaxLoRARanks

    return MaxLoRARanks


def nccl_weight_transfer() -> tuple[Any, Any]:
    """`NCCLWeightTransferEngine`, and the class of the message by which it joins a group.

    They are the base classes of `inference.vllm_worker.transfer_engines`. vLLM's registry of transfer engines is
    public, but its NCCL engine takes neither a deadline nor a group other than NCCL. The subclasses override
    `init_transfer_engine`, `update_weights`, `receive_weights` and `finish_weight_update`, and set
    `model_update_group`, `packed`, `packed_buffer_size_bytes` and `packed_num_buffers`.
    """
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    return NCCLWeightTransferEngine, NCCLWeightTransferInitInfo


def store_group(store: Any, rank: int, world_size: int) -> Any:
    """`StatelessProcessGroup`, through whose `store` the ranks of `nccl_communicator` find each other.

    Its own `create` opens a store with a deadline of 300 s, which callers in vLLM's weight transfer cannot change.
    """
    from vllm.distributed.utils import StatelessProcessGroup

    return StatelessProcessGroup(rank, world_size, store)


def nccl_communicator(members: Any, device: int) -> Any:
    """Joins a NCCL group that is independent of torch's default process group, as vLLM's engines join theirs.

    Both ends of a weight broadcast form the group in the way of vLLM's weight transfer engine, whose function for that
    takes no deadline of the store, and does not return the group on the trainer's end.

    Args:
        members: a `store_group`.
        device: the number of the GPU.

    Raises:
        RuntimeError: there is no NCCL library. vLLM would send and receive nothing, without an error.
    """
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.utils.nccl import unpinned_nccl_env

    with unpinned_nccl_env():
        communicator = PyNcclCommunicator(members, device)
    if communicator.disabled:
        raise RuntimeError("vLLM could not load NCCL (libnccl.so.2), or VLLM_DISABLE_PYNCCL is set")
    return communicator
