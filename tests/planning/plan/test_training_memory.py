"""The memory formulas are compared with real tensors: those that autograd saves and those that DeepSpeed keeps."""

import gc
import os

import pytest
import torch
import torch.distributed as dist
from architectures import config_of, hugging_face_config

from aft_ray.planning.plan.architecture import Architecture, from_transformers
from aft_ray.planning.plan.training_memory import BUCKET, activation_bytes, model_states
from aft_ray.training.forward.packed_attention import packed_inputs, use_packed_attention
from aft_ray.training.forward.packing import pack

SIZES = {
    "hidden": 96,
    "intermediate": 160,
    "heads": 6,
    "kv_heads": 2,
    "head_size": 32,
    "vocabulary": 64,
    "context": 128,
}


def small(family="llama", **others):
    biased = family == "qwen2"
    return Architecture(
        name="x", family=family, layers=2, **SIZES, attention_bias=biased, head_norms=family == "qwen3", **others
    )


def kept_bytes(sizes, dtype, row):
    """Bytes of the storages that autograd keeps of a forward pass without the head, parameters not counted."""
    from transformers import AutoModelForCausalLM

    config = hugging_face_config(sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    use_packed_attention(model)
    parameters = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # The tensor is kept too: otherwise its address could be used again.
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(**packed_inputs(row))
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_activations_are_what_autograd_saves(family, dtype):
    two = small(family)
    three = Architecture(**{field: getattr(two, field) for field in two.__slots__} | {"layers": 3})
    row = pack([[1, 2, 3], [4] * 9], [[[5] * 7, [6] * 4], [[7] * 12]])
    measured = kept_bytes(three, dtype, row) - kept_bytes(two, dtype, row)
    assert measured == activation_bytes(two, dtype == torch.bfloat16) * row.columns


def live_storages():
    """The storages of all CPU tensors of this process, by address. While they are kept, no address is used again.

    Tensors that a compiler traced in this process have no storage. They have classes of their own, and are left out.
    """
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    tensors = [one for one in tensors if one.device.type == "cpu"]
    tensors += [one.grad for one in tensors if one.is_leaf and one.grad is not None]
    return {storage.data_ptr(): storage for storage in (one.untyped_storage() for one in tensors)}


@pytest.fixture(scope="module")
def single_process_group():
    """A process group with this process as its only member."""
    os.environ |= {"LOCAL_RANK": "0"}
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_states_are_what_a_deepspeed_engine_keeps(stage, dtype, single_process_group, tmp_path):
    from transformers import AutoModelForCausalLM

    from aft_ray.training import deepspeed

    hugging_face = hugging_face_config(small())
    sizes = from_transformers("x", hugging_face)
    AutoModelForCausalLM.from_config(hugging_face).save_pretrained(tmp_path)
    config = config_of(tmp_path, training={"zero_stage": stage})
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    before = live_storages()
    engine = deepspeed.build_engine(tmp_path, config.model, config.training)
    for last in (True, False):
        engine.set_gradient_accumulation_boundary(last)
        ids = torch.randint(0, sizes.vocabulary, (2, 8))
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        if last:
            engine.step()
    sizes_kept = [storage.nbytes() for address, storage in live_storages().items() if address not in before]
    kept = sum(size for size in sizes_kept if size % BUCKET)  # without DeepSpeed's communication buckets
    expected = sum(one.bytes * one.count for one in model_states(config, sizes))
    engine.destroy()
    assert kept == pytest.approx(expected, rel=0.002)
