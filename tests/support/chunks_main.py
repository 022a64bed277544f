"""One rank of ZeRO-3 with a number of chunks of its own: `chunks_main.py RANK RANKS STORE WORK_DIR`.

Rank 0 writes chunks.pt: by kind of training, the gradients that all ranks added up, and those of one process alone.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rank_main import LORA, build, keep_nothing_gathered

from aft_ray.training import deepspeed
from aft_ray.training.forward import scoring
from aft_ray.training.forward.packing import empty_row, pack
from aft_ray.training.forward.scoring import install_scoring, response_logprobs
from aft_ray.training.model.loading import load_model
from aft_ray.training.model.lora import add_adapters, load_adapter

# Tokens of the responses on each rank: several chunks, one chunk, nothing.
ROWS = [pack([[5, 6, 7]], [[[9] * 8, [8, 3, 2, 11, 12], [4]]]), pack([[20, 21]], [[[22, 23]]]), empty_row(0)]


def gradients(work, lora):
    from deepspeed.utils import safe_get_full_grad

    rank, ranks = dist.get_rank(), dist.get_world_size()
    engine = build(work / "model", 3, lora=lora, adapter=work / "adapter" if lora else None)
    engine.backward(response_logprobs(engine, ROWS[rank]).sum() * ranks)
    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    summed = {name: safe_get_full_grad(parameter) for name, parameter in trained}
    engine.destroy()
    alone = load_model(work / "model", "float32")
    if lora is not None:
        add_adapters(alone, lora, "model")
        load_adapter(alone, work / "adapter")
    install_scoring(alone)
    torch.cat([response_logprobs(alone, row) for row in ROWS[:ranks]]).sum().backward()
    return {name: (summed[name], p.grad) for name, p in alone.named_parameters() if p.requires_grad}


def main(rank, ranks, store, work):
    torch.set_num_threads(1)
    deepspeed.ds_config = keep_nothing_gathered
    scoring._SMALLEST_CHUNK, scoring._CHUNK_ELEMENTS, scoring._KEPT_ELEMENTS = 4, {"cpu": 1}, 0
    dist.init_process_group(
        "gloo", rank=rank, world_size=ranks, init_method=f"file://{store}", timeout=timedelta(seconds=300)
    )
    results = {"weights": gradients(work, None), "adapters": gradients(work, LORA)}
    if rank == 0:
        torch.save(results, work / "chunks.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
