"""The memory of a training step's activations at real sizes, measured with tensors that have sizes and no content.

What runs is the real model of transformers, with the forward pass and the loss that a run gives it. The kernels are
those of the CPU, which keep of attention what fused kernels keep on a GPU: queries, keys, values, the output and its
log-sum-exp.
"""

from dataclasses import fields, replace

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_helpers import make_group
from transformers import AutoModelForCausalLM

from aft_ray.objectives import build_objective
from aft_ray.storage.records import Verdict
from aft_ray.training.batch import make_batch
from aft_ray.training.batching import PlannedBatch, StepTotals
from aft_ray.training.forward.packed_attention import use_packed_attention
from aft_ray.training.forward.scoring import install_scoring, response_logprobs
from aft_ray.training.model.decoder_layers import recompute_activations
from aft_ray.training.step import batch_loss


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
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in self.given:
                    continue
                if storage._cdata not in self.live or self.live[storage._cdata][0].expired():
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: one for key, one in self.live.items() if not one[0].expired()}
        self.now = sum(size for _, size in self.live.values())
        self.peak = max(self.peak, self.now)
        return made


def activation_peak(config, dtype, tokens, prompt, response, k, checkpointing) -> int:
    """The most bytes that forward and backward pass of a row hold beside the weights.

    The gradient of a weight is counted until it is complete, when DeepSpeed takes it into its buckets.

    Args:
        tokens: of the row; it consists of whole groups and of one whose prompt is longer.
        prompt, response: tokens of a prompt and of each response.
    """
    objective = build_objective("aft_boundary", beta=0.1)
    groups = []
    while tokens > 0:
        size = prompt + (1 + k) * (response - 1)
        longer = tokens - size if tokens < 2 * size else 0
        ids = [[1 + number] * response for number in range(1 + k)]
        labelled = [(one, Verdict.RIGHT if number else Verdict.WRONG) for number, one in enumerate(ids[1:])]
        groups.append(make_group(f"q{len(groups)}", [1] * (prompt + longer), ids[0], labelled))
        tokens -= size + longer
    batch = make_batch(groups, PlannedBatch(tuple(range(len(groups)))), objective)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        use_packed_attention(model)
        install_scoring(model)
        recompute_activations(model, checkpointing)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
        batch = without_content(replace(batch, row=without_content(batch.row, mode)), mode)
        with Memory([*model.parameters(), *model.buffers()]) as memory:
            loss, _ = batch_loss(response_logprobs(model, batch.row), batch, objective, 1.0, StepTotals(1, 1, 1))
            loss.backward()
    return memory.peak


def without_content(record, mode):
    """The same record with fake tensors."""
    tensors = {f.name: one for f in fields(record) if isinstance(one := getattr(record, f.name), Tensor)}
    return replace(record, **{name: mode.from_tensor(tensor) for name, tensor in tensors.items()})
