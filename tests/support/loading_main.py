"""One of two ranks that load models into ZeRO-3 partitions: `loading_main.py RANK PORT WORK_DIR`.

Loads every model of WORK_DIR and writes what it observed of each to RANK.json.
"""

import json
import os
import re
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from aft_ray.config.run import TrainingConfig
from aft_ray.training import deepspeed as engines
from aft_ray.training.deepspeed_import import import_deepspeed
from aft_ray.training.model.loading import LoadingError, load_model


def resident() -> int:
    """The resident memory of this process in bytes, including mapped files."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


class Peak:
    """A context that measures the largest growth of this process's resident memory, in bytes."""

    def __enter__(self):
        self.before = self.highest = resident()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.ended.is_set():
            self.highest = max(self.highest, resident())
            time.sleep(0.002)

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.thread.join()
        self.bytes = self.highest - self.before


def same_as_files(model, directory: Path) -> bool:
    """Whether every gathered parameter equals the tensor in the files, which hold tied weights once."""
    from deepspeed import zero

    stored = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as source:
            stored |= {name: (file, source.get_slice(name).get_shape()) for name in source.keys()}  # noqa: SIM118
    for name, parameter in model.named_parameters():
        with zero.GatheredParameters([parameter]), safe_open(stored.pop(name)[0], framework="pt") as source:
            if not torch.equal(parameter, source.get_tensor(name).to(parameter.dtype)):
                return False
    return stored.keys() <= {"lm_head.weight"}


def main(rank: int, port: str, work: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    import_deepspeed()
    outcomes = {}
    # The first model is small, so that imports are complete before a large one is measured.
    for directory in sorted(work.iterdir()):
        if not directory.is_dir():
            continue
        dtype = "bfloat16" if directory.name.endswith("bfloat16") else "float32"
        config = engines.ds_config(TrainingConfig(zero_stage=3), dtype)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        try:
            with Peak() as peak:
                model = load_model(directory, dtype, config=config)
        except LoadingError as error:
            outcomes[directory.name] = {"error": str(error)}
            continue
        outcomes[directory.name] = {
            "peak": peak.bytes,
            "same": same_as_files(model, directory),
            "partitioned": all(parameter.numel() == 0 for parameter in model.parameters()),
            "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
            "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            "eos": model.generation_config.eos_token_id,
        }
    (work / f"{rank}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
