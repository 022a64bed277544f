"""A tiny random Llama and groups for it. They are the same in every process."""

import random

from aft_ray.storage.records import Candidate, Group, Question, Verdict
from aft_ray.training.batching import group_size, plan_step, training_order

VOCABULARY, PAD = 64, 0
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
POISON = 63  # Only `poisoned_group` has this token.


def write_tiny_llama(directory, *, tied=False, poisoned=False):
    """Writes a random model with head size 32. With `poisoned`, the embedding of POISON is NaN."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied, pad_token_id=PAD)
    model = LlamaForCausalLM(config)
    if poisoned:
        model.get_input_embeddings().weight.data[POISON] = float("nan")
    model.save_pretrained(directory)
    return directory


def make_group(name, prompt, reference, candidates):
    """A group for a prompt and a reference in token ids; `candidates` are (token ids, verdict) each."""
    question = Question(name, "text", "reference", "gold", "test")
    labelled = [
        Candidate(ids, -4.0 - len(ids), "stop", "text", None, v, float(v is Verdict.RIGHT)) for ids, v in candidates
    ]
    return Group(1, 0, question, prompt, reference, labelled)


def random_groups(count, *, k=4, seed=0):
    """Groups of different lengths. Some are all right, all wrong or partly undecided, or have repeated candidates."""
    source = random.Random(seed)

    def ids(low, high):
        return [source.randrange(1, POISON) for _ in range(source.randint(low, high))]

    groups = []
    for number in range(count):
        candidates = [(ids(1, 9), source.choice(list(Verdict))) for _ in range(k)]
        if number % 3 == 0:
            candidates[0], candidates[1] = (ids(2, 5), Verdict.RIGHT), (ids(2, 5), Verdict.WRONG)
        if number % 4 == 0:
            candidates[-1] = candidates[0]
        groups.append(make_group(f"q{number}", ids(1, 12), ids(2, 8), candidates))
    return groups


def poisoned_group():
    return make_group("poisoned", [5, POISON], [7, 8], [([1, 2], Verdict.RIGHT), ([3], Verdict.WRONG)])


def plan(groups, objective, *, ranks, groups_per_step=8, budget=100, epochs=1, seed=3):
    """The steps of all epochs as the worker plans them: for each the indexes of its groups, and its plan."""
    planned = []
    for epoch in range(epochs):
        order = training_order([group.question.id for group in groups], seed, 1, epoch).tolist()
        for first in range(0, len(order), groups_per_step):
            chosen = order[first : first + groups_per_step]
            sizes = [group_size(groups[index], objective) for index in chosen]
            planned.append((chosen, plan_step(sizes, ranks=ranks, budget=budget)))
    return planned


def batches_of(groups, chosen, planned, rank, objective):
    """The batches of a rank in a step that `plan` has planned."""
    from aft_ray.training.batch import make_batch

    return [
        make_batch([groups[chosen[index]] for index in batch.groups], batch, objective)
        for batch in planned.shares[rank]
    ]


class PlainEngine:
    """What `train_step` asks of a DeepSpeed engine, in plain torch; its step leaves weights and gradients as they are.

    Attributes:
        outputs: what the forward passes returned.
        boundaries: for each backward pass, whether it was the last of a step.
    """

    def __init__(self, module):
        import torch

        self.module, self.device = module, torch.device("cpu")
        self.optimizer = torch.optim.SGD(module.parameters())
        self.outputs, self.boundaries = [], []

    def __call__(self, *arguments, **options):
        output = self.module(*arguments, **options)
        self.outputs.append(output)
        return output

    def set_gradient_accumulation_boundary(self, is_boundary):
        self.boundaries.append(is_boundary)

    def backward(self, loss):
        loss.backward()

    def zero_optimization_stage(self):
        return 0

    def step(self):
        pass

    def was_step_applied(self):
        return True
