"""The receiving side of a weight broadcast: vLLM's weight transfer engines, in every worker process of an engine.

On GPUs it is vLLM's NCCL engine. Without GPUs the same engine has a gloo group in place of the NCCL communicator, and
receives buckets of the same format without CUDA streams. `weight_loader.py`, which vLLM imports in every worker
process, registers both. Invariants: each broadcast has a process group of its own; what arrived is compared, tensor by
tensor, with the digests at the end of the stream.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from aft_ray.cluster.compat import nccl_weight_transfer
from aft_ray.inference.vllm_worker.reload import begin_reload, finish_reload
from aft_ray.weights.arrivals import Arrivals
from aft_ray.weights.broadcast.buckets import Layout, receive
from aft_ray.weights.broadcast.gloo_group import GlooGroup
from aft_ray.weights.broadcast.nccl_group import NcclGroup
from aft_ray.weights.broadcast.rendezvous import connect_store

T = TypeVar("T")
_NcclEngine: Any
_NcclInitInfo: Any
_NcclEngine, _NcclInitInfo = nccl_weight_transfer()


@dataclass(kw_only=True)
class BroadcastInitInfo(_NcclInitInfo):  # type: ignore[misc]
    """vLLM's message for joining a group. timeout_s: the deadline of the rendezvous, and that of receiving."""

    timeout_s: float


class _VerifiedReload:
    """What both transfer engines do beyond vLLM's: they prove what they received, and complete the reload.

    Attributes:
        problem: what is wrong with the weights of the last broadcast, as a sentence; empty when nothing is.
    """

    model: Any
    model_config: Any
    problem = "no broadcast has ended"

    def start_weight_update(self) -> None:
        """Prepares the layers. The state of an earlier update that did not end is cleared."""
        self.problem = "the broadcast has not ended"
        self.arrivals = Arrivals()
        begin_reload(self.model, self.model_config)

    def finish_weight_update(self) -> None:
        """Completes the layers and compares the weights with what the trainer sent."""
        incomplete = finish_reload(self.model, self.model_config)
        self.problem = self.arrivals.problem() or incomplete


class _WatchedModel:
    """Stands in for the model while tensors are received: notes them, and loads them into the model."""

    def __init__(self, model: Any, arrivals: Arrivals) -> None:
        self._model, self._arrivals = model, arrivals

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._model.load_weights(self._arrivals.watch(tensors))


class NcclBroadcastEngine(_VerifiedReload, _NcclEngine):  # type: ignore[misc]
    """vLLM's NCCL engine, which joins a new group for each broadcast, and receives within a deadline."""

    init_info_cls = BroadcastInitInfo

    def init_transfer_engine(self, init_info: BroadcastInitInfo) -> None:
        """Leaves the group of the broadcast before, if it is still there, and joins the new one."""
        self.shutdown()
        self.packed, self.packed_num_buffers = init_info.packed, init_info.packed_num_buffers
        self.packed_buffer_size_bytes, self.timeout_s = init_info.packed_buffer_size_bytes, init_info.timeout_s
        self.model_update_group = _join(NcclGroup, init_info, self.parallel_config.rank).communicator

    def receive_weights(self, update_info: Any) -> None:
        """Receives the tensors that vLLM's `NCCLWeightTransferUpdateInfo` lists, and loads them into the model.

        Raises:
            TimeoutError: not all tensors arrived in time. NCCL alone would wait for ever for a trainer that is gone.
        """
        late = threading.Event()

        def leave() -> None:
            late.set()
            self.shutdown()  # ends the operations on the GPU that wait for the trainer

        deadline = threading.Timer(self.timeout_s, leave)
        deadline.daemon = True
        deadline.start()
        model = self.model
        self.arrivals.announce_order(update_info.names)
        self.model = _WatchedModel(model, self.arrivals)  # of which vLLM's consumer calls `load_weights`
        try:
            super().receive_weights(update_info)
        except BaseException as error:
            if not late.is_set():
                self.shutdown()  # otherwise the other ranks would wait for this one until their deadline
                raise
            raise TimeoutError(self._late()) from error
        finally:
            self.model = model
            deadline.cancel()
        if late.is_set():
            raise TimeoutError(self._late())

    def _late(self) -> str:
        return f"not all weights arrived within {self.timeout_s:.0f} s"


class GlooBroadcastEngine(_VerifiedReload, _NcclEngine):  # type: ignore[misc]
    """The same over gloo, for engines without GPUs."""

    init_info_cls = BroadcastInitInfo

    def init_transfer_engine(self, init_info: BroadcastInitInfo) -> None:
        """Leaves the group of the broadcast before, if it is still there, and joins the new one."""
        self.shutdown()
        self.packed_buffer_size_bytes, self.timeout_s = init_info.packed_buffer_size_bytes, init_info.timeout_s
        self.model_update_group = _join(GlooGroup, init_info, self.parallel_config.rank)

    def update_weights(self, update_info: dict[str, object]) -> None:
        """Receives and loads all tensors. The base class would synchronize an accelerator, of which there is none."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Any) -> None:
        """Receives the tensors that vLLM's `NCCLWeightTransferUpdateInfo` lists, and loads them into the model."""
        group: GlooGroup = self.model_update_group
        group.restart_clock(self.timeout_s)
        self.arrivals.announce_order(update_info.names)
        tensors = zip(update_info.names, map(tuple, update_info.shapes), update_info.dtype_names, strict=True)
        layout = Layout.of_stream(list(tensors), self.packed_buffer_size_bytes)
        try:
            receive(layout, group, _WatchedModel(self.model, self.arrivals).load_weights, torch.device("cpu"))
        except BaseException:
            self.shutdown()  # otherwise the other ranks would wait for this one until their deadline
            raise


def _join(join: Callable[[Any, int, int, float], T], init_info: BroadcastInitInfo, rank: int) -> T:
    """Joins the group of a broadcast, as the engine's process number `rank`; connecting and joining share a deadline.

    Raises:
        RuntimeError, TimeoutError: the trainer's store could not be reached, or a rank did not join in time.
    """
    assert init_info.master_address is not None
    assert init_info.master_port is not None
    deadline = time.monotonic() + init_info.timeout_s
    store = connect_store(init_info.master_address, init_info.master_port, init_info.timeout_s)
    left_s = max(0.001, deadline - time.monotonic())
    return join(store, init_info.rank_offset + rank, init_info.world_size, left_s)
