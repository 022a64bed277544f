"""Log-probabilities of a row's targets under a causal language model, without logits that are larger than a chunk.

`install_scoring` gives a model a forward pass that takes a `PackedRow`: the layers compute all columns, the hidden
states of the columns that predict a target are picked, and the output layer (here: the head) turns them into
log-probabilities chunk by chunk. All chunks are computed in one call of the head's module, so DeepSpeed gathers its
weight once per pass whatever the number of chunks. A row without responses goes the same way, with no targets.

A model that cannot compute packed rows takes each response in a row of its own, padded on the right. Causal layers
never see that padding, so no mask is needed. Parameter names and the tree of modules stay as they were.

Invariant: a target's log-probability is the one that the model's own forward pass gives for its sequence alone, which
`training.forward.scoring_check` compares before training starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from aft_ray.training.forward.packed_attention import cannot_share_prompts, packed_inputs
from aft_ray.training.forward.packing import PackedRow
from aft_ray.training.forward.sequence_parallel import SequenceParallel, collect, share_of_row, shared_inputs

# Elements of a chunk of logits. On the CPU a chunk stays in the cache, on a GPU it keeps the device busy.
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
# Fewer tokens than this in a chunk would read and write the head's weight and its gradient too often.
_SMALLEST_CHUNK = 128
# Logits of all targets are kept for the backward pass if they have no more elements than this, else computed again.
_KEPT_ELEMENTS = 1 << 24


def chunk_tokens(vocabulary: int, device_type: str) -> int:
    """The number of targets whose logits exist at once.

    Args:
        device_type: "cpu" or "cuda".
    """
    return max(_SMALLEST_CHUNK, _CHUNK_ELEMENTS[device_type] // vocabulary)


@dataclass(frozen=True, slots=True)
class LogitsRule:
    """What a model does to the output of its head.

    Attributes:
        scale: the factor that the logits are multiplied with.
        softcap: logits x become softcap * tanh(x / softcap); None: they stay.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """The logits as the model gives them. The argument may be overwritten."""
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_() * self.softcap  # autograd needs the output of tanh
        return logits


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a model computes scores.

    Attributes:
        shares_prompts: it computes packed rows; if not, each response has a row of its own.
        own_head: the logits are computed by the model's own forward pass, all at once.
        parallel: who computes packed rows together; None: each rank has its own.
    """

    shares_prompts: bool
    own_head: bool
    rule: LogitsRule
    parallel: SequenceParallel | None = None


def install_scoring(model: Any, parallel: SequenceParallel | None = None) -> None:
    """Makes `model(row=row)` the log-probabilities of the row's targets, [targets] float32, differentiable.

    Called with anything else, the model computes what it did before. Must be called after adapters were added and
    before DeepSpeed takes the model.
    """
    head = model.get_output_embeddings()
    if next(head.children(), None) is not None:
        # DeepSpeed then gathers what the head consists of, such as adapters, in one piece when the head is called.
        head._z3_leaf = True
    head.forward = MethodType(_head_forward, head)
    rule = _logits_rule(model.config.get_text_config())
    model.scoring = Scoring(cannot_share_prompts(model) is None, False, rule, parallel)
    model.forward = MethodType(_forward, model)


def shares_prompts(model: Any) -> bool:
    """Whether a model with scoring computes each prompt once for all its responses."""
    shared: bool = model.scoring.shares_prompts
    return shared


def response_logprobs(model: Any, row: PackedRow) -> Tensor:
    """The log-probability of each response of a row in nats: [responses] float32, differentiable.

    Args:
        model: a model with scoring, or a DeepSpeed engine on one.
    """
    logprobs: Tensor = model(row=row)
    return logprobs.new_zeros(row.responses).index_add(0, row.response_of_target, logprobs)


def _logits_rule(config: Any) -> LogitsRule:
    """What transformers' models with this config do to their logits."""
    known = config.to_dict()
    scale = 1.0
    if known.get("logit_scale") is not None:  # Cohere
        scale = float(config.logit_scale)
    elif known.get("logits_scaling") is not None:
        multiplies = config.model_type == "hyperclovax"
        scale = float(config.logits_scaling if multiplies else 1 / config.logits_scaling)  # Granite divides
    softcap = known.get("final_logit_softcapping", known.get("logits_soft_cap"))
    return LogitsRule(scale, None if softcap is None else float(softcap))


# ---- The model ----


def _forward(model: Any, *arguments: Any, row: PackedRow | None = None, **options: Any) -> Any:
    """The log-probabilities of a row's targets; without a row, the model's own forward pass."""
    if row is None:
        return type(model).forward(model, *arguments, **options)
    scoring: Scoring = model.scoring
    if not scoring.shares_prompts:
        input_ids, predicting = plain_rows(row)
        return _target_logprobs(model, {"input_ids": input_ids, "use_cache": False}, predicting, row.targets)
    if scoring.parallel is None:
        return _target_logprobs(model, packed_inputs(row), row.predicting, row.targets)
    share = share_of_row(row, scoring.parallel)
    inputs = shared_inputs(share, scoring.parallel)
    own = _target_logprobs(model, inputs, share.predicting, row.targets[share.own_targets])
    return collect(scoring.parallel, own, share.own_targets, len(row.targets))


def _target_logprobs(model: Any, inputs: dict[str, Any], predicting: Tensor, targets: Tensor) -> Tensor:
    """The log-probabilities of targets, [targets] float32.

    Args:
        inputs: the keyword arguments of the model's own forward pass.
        predicting: [targets] int64, the index among all columns, row after row, of the one that predicts a target.
    """
    if model.scoring.own_head:
        logits = type(model).forward(model, **inputs).logits.flatten(0, 1)[predicting]
        return _pick(logits.float().log_softmax(-1), targets)
    hidden = model.base_model(**inputs)[0].flatten(0, 1)[predicting]
    logprobs: Tensor = model.get_output_embeddings()(hidden, targets=targets, rule=model.scoring.rule)
    return logprobs


def plain_rows(row: PackedRow) -> tuple[Tensor, Tensor]:
    """The responses of a packed row in rows of their own, each behind its prompt and padded on the right.

    Returns:
        [responses, longest] int64, the token ids; and [targets] int64, the index among all columns, row after row, of
        the one that predicts a target. A row without responses stays as it is.
    """
    if not row.responses:
        return row.input_ids, row.predicting
    parts = [
        (prompt.start, prompt.tokens, first, columns)
        for prompt in row.layout
        for first, columns in zip(prompt.response_starts(), prompt.responses, strict=True)
    ]
    longest = max(tokens + columns for _, tokens, _, columns in parts)
    source = torch.zeros(len(parts), longest, dtype=torch.int64)
    predicting = []
    for index, (start, tokens, first, columns) in enumerate(parts):
        source[index, :tokens] = torch.arange(start, start + tokens)
        source[index, tokens : tokens + columns] = torch.arange(first, first + columns)
        predicting.append(torch.arange(tokens - 1, tokens + columns) + index * longest)
    device = row.input_ids.device
    return row.input_ids[0][source.to(device, non_blocking=True)], torch.cat(predicting).to(device, non_blocking=True)


# ---- The head ----


def _head_forward(head: Any, hidden: Tensor, targets: Tensor | None = None, rule: LogitsRule = LogitsRule()) -> Tensor:
    """The head's own output; with targets, their log-probabilities in float32.

    Args:
        hidden: [targets, width].
    """
    if targets is None:
        own: Tensor = type(head).forward(head, hidden)
        return own
    if type(head) is torch.nn.Linear:
        linear: Any = _LinearLogprobs.apply  # type: ignore[no-untyped-call]
        # State-space models have their hidden states in float32.
        hidden = hidden.to(head.weight.dtype)
        logprobs: Tensor = linear(hidden, head.weight, head.bias, targets, rule, torch.is_grad_enabled())
        return logprobs
    size = chunk_tokens(head.out_features, hidden.device.type)

    def score(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = rule.apply_(type(head).forward(head, hidden).float())
        return _pick(logits.log_softmax(-1), targets)

    parts = list(zip(torch.split(hidden, size), torch.split(targets, size), strict=True))
    if len(parts) == 1:
        return score(*parts[0])
    return torch.cat([checkpoint(score, *part, use_reentrant=False) for part in parts])


def _pick(rows: Tensor, targets: Tensor) -> Tensor:
    picked: Tensor = rows.gather(1, targets[:, None])[:, 0]
    return picked


class _LinearLogprobs(torch.autograd.Function):
    """Log-probabilities of targets under a linear head.

    For a target with the logits z and the probabilities p, the gradient with respect to z is 1 at the target minus p.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rule: LogitsRule,
        has_backward: bool,
    ) -> Tensor:
        size = chunk_tokens(len(weight), hidden.device.type)
        kept = None
        if has_backward and len(targets) * len(weight) <= _KEPT_ELEMENTS:
            kept = torch.empty(len(targets), len(weight), dtype=torch.float32, device=hidden.device)
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        logsumexp = torch.empty_like(logprobs)
        for first in range(0, len(targets), size):
            part = slice(first, first + size)
            logits = _logits(hidden[part], weight, bias, rule)
            logsumexp[part] = logits.logsumexp(1)
            logprobs[part] = _pick(logits, targets[part]) - logsumexp[part]
            if kept is not None:
                kept[part] = logits
            del logits  # before the next chunk is made
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp)
        ctx.rule, ctx.kept = rule, kept
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, logsumexp = ctx.saved_tensors
        rule: LogitsRule = ctx.rule
        trains_weight, trains_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight) if trains_weight else None
        grad_bias = torch.empty_like(bias) if trains_bias else None
        row_weights = grads[0] * -rule.scale
        # The weights of the rows go to the narrower factors, which saves a pass over each block.
        weighted = (hidden * row_weights[:, None]).to(weight.dtype)
        for rows in _vocabulary_blocks(len(weight), len(targets), hidden.device.type):
            if ctx.kept is None:
                logits = _logits(hidden, weight[rows], None if bias is None else bias[rows], rule)
            else:
                logits = ctx.kept[:, rows]
            slope = None if rule.softcap is None else 1 - (logits / rule.softcap).square_()
            change = logits.sub_(logsumexp[:, None]).exp_()
            columns = targets - rows.start
            inside = (columns >= 0) & (columns < change.shape[1])
            columns = torch.where(inside, columns, 0)[:, None]
            change.scatter_add_(1, columns, -inside[:, None].float())
            if slope is not None:
                change.mul_(slope)
            narrow = change.to(weight.dtype)
            _add_product_(grad_hidden, narrow, weight[rows])
            if grad_weight is not None:
                torch.mm(narrow.T, weighted, out=grad_weight[rows])
            if grad_bias is not None:
                grad_bias[rows] = (change.T @ row_weights).to(bias.dtype)
            del logits, slope, change, narrow  # before the next block is made
        ctx.kept = None
        grad_hidden = grad_hidden.mul_(row_weights[:, None]).to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _vocabulary_blocks(vocabulary: int, targets: int, device_type: str) -> Iterator[slice]:
    """Cuts the rows of a head's weight into blocks whose logits for all targets have the size of a chunk.

    The gradient of a block is complete at once, so nothing as large as the weight has to be added up in float32.
    """
    rows = max(_SMALLEST_CHUNK, _CHUNK_ELEMENTS[device_type] // max(targets, 1))
    return (slice(first, min(first + rows, vocabulary)) for first in range(0, vocabulary, rows))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, rule: LogitsRule) -> Tensor:
    """The logits of a chunk in float32."""
    return rule.apply_(F.linear(hidden, weight, bias).float())


def _add_product_(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Adds `one @ other` to a float32 matrix, rounding nothing to the dtype of the factors where the device can."""
    if one.dtype == total.dtype:
        total.addmm_(one, other)
    elif total.is_cuda:
        total += torch.mm(one, other, out_dtype=total.dtype)
    else:
        total += one @ other
