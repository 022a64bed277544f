"""The memory of a training step's activations at real sizes, measured with tensors that have sizes and no content.

What runs is the real model of transformers and the real loss of `training.step`. Without content no value can be read:
each mask is taken to be True everywhere, as in a micro-batch that its tokens fill.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from aft_ray.objectives import build_objective
from aft_ray.training.batching import StepTotals
from aft_ray.training.collate import Batch
from aft_ray.training.step import micro_loss

aten = torch.ops.aten


class Memory(TorchDispatchMode):
    """The bytes of all tensors that were made inside it and are still held, and the most that they ever were.

    Args:
        given: tensors that were there before.
    """

    def __init__(self, given) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is aten._local_scalar_dense.default:
            return args[0].dtype is torch.bool or 1  # every flag is set
        if function is aten.nonzero.default:
            made = torch.empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        else:
            if function in (aten.index.Tensor, aten.index_put.default, aten._index_put_impl_.default):
                args = (args[0], [one for index in args[1] for one in as_numbers(index)], *args[2:])
            made = function(*args, **kwargs)
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in self.given:
                    continue
                if storage._cdata not in self.live or self.live[storage._cdata][0].expired():
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: one for key, one in self.live.items() if not one[0].expired()}
        self.now = sum(size for _, size in self.live.values())
        self.peak = max(self.peak, self.now)
        return made


def as_numbers(index):
    """What an index by a mask that is True everywhere is as an index by numbers."""
    if index is None or index.dtype is not torch.bool:
        return [index]
    return [torch.empty(index.numel(), dtype=torch.int64) for _ in range(index.ndim)]


def batch_of(rows, length, columns, k) -> Batch:
    """A micro-batch of `rows` rows of `length` tokens, whose responses fill `columns` of them.

    Every row has a group of its own, because each of them counts as a reference and as a candidate here.
    """
    groups = rows
    ids = torch.zeros((rows, length), dtype=torch.int64)
    return Batch(
        question_ids=("q",) * groups,
        input_ids=ids,
        attention_mask=ids + 1,
        position_ids=ids,
        response_mask=torch.ones((rows, columns), dtype=torch.bool),
        group_of_row=torch.arange(rows),
        slot_of_row=torch.zeros(rows, dtype=torch.int64),
        rewards=torch.zeros(groups, k),
        correct=torch.zeros(groups, k, dtype=torch.bool),
        sampler_scores=torch.zeros(groups, k),
        mask=torch.ones(groups, k, dtype=torch.bool),
    )


def activation_peak(config, dtype, rows, length, columns, k, checkpointing) -> int:
    """The most bytes that forward and backward pass of a micro-batch hold beside the weights.

    The gradient of a weight is counted until it is complete, when DeepSpeed takes it into its buckets.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
        batch = batch_of(rows, length, columns, k)
        objective = build_objective("aft_boundary", beta=0.1)
        with Memory([*model.parameters(), *model.buffers()]) as memory:
            loss, _ = micro_loss(model, batch, objective, 1.0, StepTotals(1, 1, 1))
            loss.backward()
    return memory.peak
