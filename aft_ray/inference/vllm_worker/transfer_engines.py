"""The receiving side of a weight broadcast: vLLM's weight transfer engines, in every worker process of an engine.

On GPUs it is vLLM's NCCL engine. Without GPUs the same engine has a gloo group in place of the NCCL communicator, and
receives buckets of the same format without CUDA streams. `weight_loader.py`, which vLLM imports in every worker
process, registers both. Invariant: each broadcast has a process group of its own.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any

import torch

from aft_ray.cluster.compat import nccl_weight_transfer
from aft_ray.inference.vllm_worker.weight_loader import repack_tied_heads
from aft_ray.weights.broadcast.buckets import Layout, receive
from aft_ray.weights.broadcast.gloo_group import GlooGroup, connect_store

_NcclEngine: Any
_NcclInitInfo: Any
_NcclEngine, _NcclInitInfo = nccl_weight_transfer()


@dataclass(kw_only=True)
class BroadcastInitInfo(_NcclInitInfo):  # type: ignore[misc]
    """vLLM's message for joining a group. timeout_s: the deadline of the rendezvous, and that of receiving."""

    timeout_s: float


class NcclBroadcastEngine(_NcclEngine):  # type: ignore[misc]
    """vLLM's NCCL engine, which joins a new group for each broadcast."""

    init_info_cls = BroadcastInitInfo

    def init_transfer_engine(self, init_info: BroadcastInitInfo) -> None:
        """Leaves the group of the broadcast before, if it is still there, and joins the new one."""
        self.shutdown()
        wait_until_listening(init_info.master_address, init_info.master_port, init_info.timeout_s)
        super().init_transfer_engine(init_info)


class GlooBroadcastEngine(_NcclEngine):  # type: ignore[misc]
    """The same over gloo, for engines without GPUs."""

    init_info_cls = BroadcastInitInfo

    def init_transfer_engine(self, init_info: BroadcastInitInfo) -> None:
        """Leaves the group of the broadcast before, if it is still there, and joins the new one."""
        self.shutdown()
        assert init_info.master_address is not None
        assert init_info.master_port is not None
        store = connect_store(init_info.master_address, init_info.master_port, init_info.timeout_s)
        rank = init_info.rank_offset + self.parallel_config.rank
        self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
        self.timeout_s = init_info.timeout_s
        self.model_update_group = GlooGroup(store, rank, init_info.world_size, init_info.timeout_s)

    def update_weights(self, update_info: dict[str, object]) -> None:
        """Receives and loads all tensors. The base class would synchronize an accelerator, of which there is none."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Any) -> None:
        """Receives the tensors that vLLM's `NCCLWeightTransferUpdateInfo` lists, and loads them into the model."""
        group: GlooGroup = self.model_update_group
        group.restart_clock(self.timeout_s)
        layout = Layout(
            names=tuple(update_info.names),
            shapes=tuple(tuple(shape) for shape in update_info.shapes),
            dtype=update_info.dtype_names[0],
            threshold=self.packed_buffer_size_bytes,
        )
        try:
            receive(layout, group, self.model.load_weights, torch.device("cpu"))
        except BaseException:
            self.shutdown()  # otherwise the other ranks would wait for this one until their deadline
            raise

    def finish_weight_update(self) -> None:
        """Completes the layers."""
        super().finish_weight_update()
        repack_tied_heads(self.model)


def wait_until_listening(address: str, port: int, timeout_s: float) -> None:
    """Waits until train worker 0 has opened the store of a NCCL group.

    vLLM waits for it with a deadline of its own, which may be later than the one of the phase.

    Raises:
        TimeoutError: the store was not opened in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        left_s = deadline - time.monotonic()
        try:
            socket.create_connection((address, port), timeout=max(0.1, left_s)).close()
        except OSError as error:
            if left_s <= 0:
                raise TimeoutError(
                    f"train worker 0 did not open its store at {address}:{port} within {timeout_s:.0f} s"
                ) from error
            time.sleep(min(0.2, left_s))
        else:
            return
