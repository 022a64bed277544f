"""vLLM's weight transfer engines at a meeting: the receiving end, in every worker process of an engine.

On GPUs it is vLLM's NCCL engine. Without them the same engine has a gloo group in the communicator's place, and empties
buckets of the same format without CUDA streams. `receiver.py` registers both, since vLLM imports it in every process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo

from aft_ray.inference.vllm_worker.weight_loader import repack_tied_heads
from aft_ray.weights.broadcast.buckets import receive
from aft_ray.weights.broadcast.gloo_group import GlooGroup, reach_store
from aft_ray.weights.broadcast.layout import Layout


@dataclass(kw_only=True)
class BroadcastInitInfo(NCCLWeightTransferInitInfo):  # type: ignore[misc]
    """timeout_s: deadline of the rendezvous, and of the stream."""

    timeout_s: float


class NcclBroadcastEngine(NCCLWeightTransferEngine):  # type: ignore[misc]
    """vLLM's own, for one meeting after the other: each has a new group."""

    init_info_cls = BroadcastInitInfo

    def init_transfer_engine(self, init_info: BroadcastInitInfo) -> None:
        self.shutdown()
        super().init_transfer_engine(init_info)


class GlooBroadcastEngine(NCCLWeightTransferEngine):  # type: ignore[misc]
    """The same over gloo, for engines without GPUs."""

    init_info_cls = BroadcastInitInfo

    def init_transfer_engine(self, init_info: BroadcastInitInfo) -> None:
        self.shutdown()
        assert init_info.master_address is not None
        assert init_info.master_port is not None
        store = reach_store(init_info.master_address, init_info.master_port, init_info.timeout_s)
        rank = init_info.rank_offset + self.parallel_config.rank
        self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
        self.timeout_s = init_info.timeout_s
        self.model_update_group = GlooGroup(store, rank, init_info.world_size, init_info.timeout_s)

    def update_weights(self, update_info: dict[str, object]) -> None:
        # The base class synchronizes an accelerator afterwards, of which there is none.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
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
            self.shutdown()  # so that the others need not wait for this end
            raise

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        repack_tied_heads(self.model)
