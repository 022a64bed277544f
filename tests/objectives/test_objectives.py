"""Every objective against slow loops in float64 that were written from the formulas alone."""

import math
import time
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aft_ray.config.objectives import OBJECTIVES, ObjectiveSpec
from aft_ray.objectives import Objective, ScoredGroups, build_objective, l_vft, objective_class
from aft_ray.objectives.beta import BETA_RULES

RANKING = [
    "align", "aft_detached", "aft_detached_lowest", "aft_boundary", "rrhf", "rrhf_detached", "pro", "pro_detached",
    "dpo", "irpo", "dpop", "grpo",
]  # fmt: skip
BETA, ALPHA, PENALTY, CLIP, KL = 0.15, 0.7, 5.0, 0.2, 0.04
OPTIONS = {
    "aft_boundary": {"beta": BETA},
    "dpo": {"beta": BETA},
    "irpo": {"beta": BETA, "alpha": ALPHA},
    "dpop": {"beta": BETA, "penalty": PENALTY},
    "grpo": {"clip": CLIP, "kl": KL},
}


def build(name):
    return build_objective(name, **OPTIONS.get(name, {}))


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def boundary_targets(s, r):
    """T_ij of every pair, as numbers: what the stopped gradient holds fixed."""
    k = range(len(s))
    lowest = {j: min(s[i] for i in k if r[i] > r[j]) for j in k if any(r[i] > r[j] for i in k)}
    return {(i, j): 2 * lowest[j] - 2 * BETA - s[i] for i in k for j in k if r[i] > r[j]}


def slow_group(name, s, r, ref, n, fixed=None):
    """The loss of one unmasked group in float64: loops over pairs, written from METHOD's formula.

    ref: scores under the sampler. n: response lengths. fixed: the scores at which the detached terms are frozen; none:
    s itself.
    """
    fixed = s if fixed is None else fixed
    k = range(len(s))
    pairs = [(i, j) for i in k for j in k if r[i] > r[j]]
    if not pairs:
        return 0.0
    if name in ("align", "aft_detached", "aft_detached_lowest", "aft_boundary"):
        z = 1.0
        for i, j in pairs:
            held = name == "aft_detached" or (name == "aft_detached_lowest" and r[j] == min(r))
            z += math.exp((fixed[j] if held else s[j]) - s[i])
            if name == "aft_boundary":
                z += math.exp(boundary_targets(fixed, r)[i, j] - s[j])
        return math.log(z)
    if name.startswith("rrhf"):
        worse = fixed if name.endswith("detached") else s
        return sum(max(0.0, worse[j] - s[i]) for i, j in pairs)
    if name.startswith("pro"):
        worse = fixed if name.endswith("detached") else s
        total = 0.0
        for i in k:
            below = [j for a, j in pairs if a == i]
            if below:
                tau_i = max(r[i] - r[j] for j in below)
                total += math.log(1 + sum(math.exp((r[i] - r[j]) * worse[j] - tau_i * s[i]) for j in below))
        return total
    if name == "dpo":
        total = 0.0
        for i in k:
            below = [j for a, j in pairs if a == i]
            total += math.log(1 + sum(math.exp(BETA * (s[j] - ref[j]) - BETA * (s[i] - ref[i])) for j in below))
        return total
    delta = [(s[i] - ref[i]) * n[i] for i in k]
    if name == "irpo":
        return sum(softplus(-BETA * (delta[w] - delta[b])) - ALPHA * s[w] for w, b in pairs) / len(pairs)
    if name == "dpop":
        arguments = [BETA * (delta[w] - delta[b] - PENALTY * max(0.0, -delta[w])) for w, b in pairs]
        return sum(softplus(-x) for x in arguments) / len(pairs)
    assert name == "grpo"
    mean = sum(r) / len(r)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in r) / len(r))
    total = 0.0
    for i in k:
        advantage, ratio = (r[i] - mean) / deviation, math.exp(s[i] - ref[i])
        clipped = min(max(ratio, 1 - CLIP), 1 + CLIP)
        k3 = math.exp(ref[i] - s[i]) - (ref[i] - s[i]) - 1
        total += KL * k3 - min(ratio * advantage, clipped * advantage)
    return total / len(s)


def finite_difference(name, s, *rest, step=1e-6):
    gradient = []
    for position in range(len(s)):
        up, down = list(s), list(s)
        up[position] += step
        down[position] -= step
        gradient.append((slow_group(name, up, *rest, fixed=s) - slow_group(name, down, *rest, fixed=s)) / (2 * step))
    return gradient


def has_a_kink(name, s, r, ref, near=1e-3):
    """Whether the loss has no derivative close to s, so that finite differences mean nothing there."""
    k = range(len(s))
    if name.startswith("rrhf"):
        return any(r[i] > r[j] and abs(s[i] - s[j]) < near for i in k for j in k)
    if name == "dpop":
        return any(abs(s[i] - ref[i]) < near for i in k)
    if name == "grpo":
        return any(min(abs(math.exp(s[i] - ref[i]) - edge) for edge in (1 - CLIP, 1 + CLIP)) < near for i in k)
    return False


@st.composite
def batches(draw, low=-8.0):
    """Scores, rewards, mask, sampler scores, lengths, each [groups][k]: ties, single candidates, empty sides occur."""
    groups, k = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    graded = draw(st.booleans())
    reward = st.sampled_from([-1.0, 0.0, 0.5, 3.0, 7.0]) if graded else st.sampled_from([0.0, 1.0])
    score = st.one_of(st.floats(low, 0, width=32), st.sampled_from([-1.0, -2.0, 0.0]))

    def table(entry):
        return [[draw(entry) for _ in range(k)] for _ in range(groups)]

    return table(score), table(reward), table(st.booleans()), table(score), table(st.integers(1, 40))


def rows(batch):
    """Each group without its masked candidates: scores, rewards, sampler scores, lengths."""
    for s, r, mask, ref, n in zip(*batch, strict=True):
        yield tuple([x for x, keep in zip(part, mask, strict=True) if keep] for part in (s, r, ref, n))


@pytest.mark.parametrize("name", RANKING)
@settings(max_examples=150, deadline=None)
@given(batch=batches(), garbage=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_value_and_gradient_match_the_slow_reference(name, batch, garbage):
    m = torch.tensor(batch[2])
    s, rewards, ref, n = (
        torch.where(m, torch.tensor(batch[part], dtype=torch.float), garbage) for part in (0, 1, 3, 4)
    )
    s.requires_grad_()
    loss = build(name)(s, rewards, m, sampler_scores=ref, tokens=n)
    expected = [slow_group(name, *row) for row in rows(batch)]
    assert loss.dtype is torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5, abs=1e-5)
    (gradient,) = torch.autograd.grad(loss, s)
    assert not gradient[~m].any()
    for row, values in enumerate(rows(batch)):
        if not has_a_kink(name, *values[:3]):
            slow = [g / len(expected) for g in finite_difference(name, *values)]
            assert gradient[row][m[row]].tolist() == pytest.approx(slow, rel=1e-3, abs=2e-4)


@pytest.mark.parametrize("name", RANKING)
@settings(max_examples=100, deadline=None)
@given(batch=batches(low=-50.0), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_finite_over_the_whole_range_of_scores_and_in_bfloat16(name, batch, dtype):
    scores, rewards, mask, ref, n = (torch.tensor(part) for part in batch)
    s = scores.to(dtype).requires_grad_()
    loss = build(name)(s, rewards.to(dtype), mask, sampler_scores=ref.to(dtype), tokens=n)
    loss.backward()
    assert loss.dtype is torch.float32
    assert loss.isfinite()
    assert s.grad.isfinite().all()
    exact = build(name)(s.detach().float(), rewards, mask, sampler_scores=ref.to(dtype).float(), tokens=n)
    assert loss.item() == exact.item()  # computed in float32: only the inputs are rounded


def test_every_objective_is_fast_on_many_large_groups():
    """256 groups of 64 candidates: a loop over their million pairs would take minutes."""
    torch.manual_seed(0)
    scores, ref = -torch.rand(256, 64), -torch.rand(256, 64)
    rewards, mask, tokens = (
        torch.randint(5, (256, 64)).float(),
        torch.rand(256, 64) < 0.9,
        torch.randint(1, 99, (256, 64)),
    )
    for name in RANKING:
        s = scores.clone().requires_grad_()
        started = time.process_time()
        build(name)(s, rewards, mask, sampler_scores=ref, tokens=tokens).backward()
        assert time.process_time() - started < 5, name


@pytest.mark.parametrize("name", ["vft", *RANKING])
def test_a_group_without_a_pair_is_exactly_zero(name):
    s = torch.full((4, 3), -2.0, requires_grad=True)
    rewards = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 0, 1]])
    mask = torch.tensor([[True, True, True], [True, True, True], [False, True, True], [False, False, False]])
    loss = build_objective(name)(s, rewards, mask, sampler_scores=torch.full((4, 3), -1.0), tokens=torch.ones(4, 3))
    loss.backward()
    assert loss.item() == 0
    assert not s.grad.any()


@pytest.mark.parametrize("name", ["vft", *RANKING])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_no_group_or_no_candidate_is_zero(name, shape):
    s = torch.zeros(shape, requires_grad=True)
    more = {"sampler_scores": torch.zeros(shape), "tokens": torch.ones(shape)}
    loss = build_objective(name)(s, torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), **more)
    loss.backward()
    assert loss.item() == 0


@settings(deadline=None)
@given(st.floats(-4, 0), st.floats(-4, 0), st.floats(0, 1))
def test_boundary_closed_form_of_one_pair(s_i, s_j, beta):
    s = torch.tensor([[s_i, s_j]], requires_grad=True)
    loss = build_objective("aft_boundary", beta=beta)(s, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    b = s_i - beta
    z = 1 + math.exp(s_j - s_i) + math.exp(2 * s_i - 2 * beta - s_i - s_j)
    # The method states the coefficient with which the negative is pulled up, the opposite of dL/ds_j.
    closed = 2 * math.exp(b - s_i) * math.sinh(b - s_j) / z
    assert -s.grad[0, 1].item() == pytest.approx(closed, abs=1e-5)


def test_boundary_pulls_up_below_and_pushes_down_above():
    for s_j, sign in [(-3.0, -1), (-1.15, 0), (-0.5, 1)]:
        s = torch.tensor([[-1.0, s_j]], requires_grad=True)
        build_objective("aft_boundary")(s, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)).backward()
        assert s.grad[0, 0] < 0  # the right one is always pushed up
        assert s.grad[0, 1].item() == pytest.approx(0, abs=1e-6) if sign == 0 else s.grad[0, 1] * sign > 0


@settings(deadline=None)
@given(batches())
def test_boundary_without_limit_is_align(batch):
    arguments = [torch.tensor(part) for part in batch[:3]]
    align = build_objective("align")(*arguments)
    for beta in (60.0, math.inf):
        unbounded = build_objective("aft_boundary", beta=beta)(*arguments)
        assert unbounded.item() == pytest.approx(align.item(), rel=1e-5, abs=1e-6)


@settings(deadline=None)
@given(batches())
def test_with_binary_rewards_there_is_one_lowest_class(batch):
    scores, rewards, mask = (torch.tensor(part) for part in batch[:3])
    results = []
    for name in ("aft_detached", "aft_detached_lowest"):
        s = scores.clone().requires_grad_()
        loss = build_objective(name)(s, (rewards > 0.2).float(), mask)
        results.append((loss.item(), *torch.autograd.grad(loss, s)[0].flatten().tolist()))
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_the_middle_class_is_lowered_only_if_the_lowest_class_alone_is_detached():
    """Three classes: above the middle one stands a better response, below it a much worse one."""
    s, rewards, mask = torch.tensor([[-1.0, -0.5, -9.0]]), torch.tensor([[2.0, 1.0, 0.0]]), torch.ones(1, 3).bool()
    pushed = {}
    for name in ("align", "aft_detached", "aft_detached_lowest"):
        scores = s.clone().requires_grad_()
        build_objective(name)(scores, rewards, mask).backward()
        pushed[name] = scores.grad[0].tolist()
    assert pushed["align"][1] > 0
    assert pushed["align"][2] > 0
    assert pushed["aft_detached"][1] < 0
    assert pushed["aft_detached"][2] == 0
    assert pushed["aft_detached_lowest"][1] > 0
    assert pushed["aft_detached_lowest"][2] == 0


def test_pro_reads_the_size_of_rewards_and_the_others_their_order():
    batch = ([[-1.0, -2.0, -1.5]], [[1.0, 0.0, 0.5]], [[True] * 3], [[-1.0] * 3], [[9] * 3])
    scores, rewards, mask, ref, n = (torch.tensor(part) for part in batch)
    for name in RANKING:
        small, large = (
            build(name)(scores, rewards * scale, mask, sampler_scores=ref, tokens=n).item() for scale in (1, 8)
        )
        assert (small == pytest.approx(large)) == (not name.startswith("pro")), name


@settings(deadline=None)
@given(batches())
def test_rules_for_beta_are_finite_and_never_negative(batch):
    scores, rewards, mask, ref, _ = (torch.tensor(part) for part in batch)
    groups = ScoredGroups(scores, rewards, mask, sampler_scores=ref)
    for name, rule in BETA_RULES.items():
        beta = rule(groups).expand_as(scores)
        assert (beta >= 0).all(), name
        assert beta.isfinite().all(), name
        s = scores.clone().requires_grad_()
        loss = build_objective("aft_boundary", beta=name)(s, rewards, mask, sampler_scores=ref)
        loss.backward()
        assert loss.isfinite()
        assert s.grad.isfinite().all()


def test_rules_for_beta_on_numbers():
    """Right: -0.2 and -0.6. Wrong: -0.9 and -0.5; the sampler had the right at -0.3, -0.5, the wrong at -1.0, -0.4."""
    groups = ScoredGroups(
        torch.tensor([[-0.2, -0.6, -0.9, -0.5]]),
        torch.tensor([[1.0, 1.0, 0.0, 0.0]]),
        torch.ones(1, 4).bool(),
        sampler_scores=torch.tensor([[-0.3, -0.5, -1.0, -0.4]]),
    )
    beta = {name: rule(groups).expand(1, 4)[0, 2:].tolist() for name, rule in BETA_RULES.items()}
    assert beta["spread"] == pytest.approx([0.2, 0.2])
    assert beta["gap"] == pytest.approx([0.3, 0.3])
    assert beta["hold"] == pytest.approx([0.5, 0.0], abs=1e-7)
    assert beta["extent"] == beta["auto"] == pytest.approx([0.7, 0.7])
    right, wrong = (-0.2, -0.6), (-0.9, -0.5)
    down = sum(math.exp(j - i) for i in right for j in wrong)
    up = sum(math.exp(2 * -0.6 - i - j) for i in right for j in wrong)
    assert beta["balance"] == pytest.approx([math.log(up / down) / 2] * 2, rel=1e-5)


def test_a_balanced_boundary_moves_no_sum_of_wrong_scores():
    scores = torch.tensor([[-0.2, -0.6, -0.9, -1.5, -0.7]], requires_grad=True)
    rewards, mask = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0]]), torch.ones(1, 5).bool()
    build_objective("aft_boundary", beta="balance")(scores, rewards, mask).backward()
    assert scores.grad[0, 2:].sum().item() == pytest.approx(0, abs=1e-6)
    assert scores.grad[0, 2:].abs().sum() > 0.01


@settings(deadline=None)
@given(batches())
def test_rft_is_the_token_mean_over_references_and_right_candidates(batch):
    scores, rewards, mask, *_ = batch
    groups, k = len(scores), len(scores[0])
    tokens = [[3 + (g + i) % 5 for i in range(k)] for g in range(groups)]
    reference = [(-0.5 * (g + 1), 4 + g) for g in range(groups)]
    nll = sum(-s * n for s, n in reference)
    count = sum(n for _, n in reference)
    for g in range(groups):
        for i in range(k):
            if mask[g][i] and rewards[g][i] > 0:
                nll -= scores[g][i] * tokens[g][i]
                count += tokens[g][i]
    reference_scores = torch.tensor([s for s, _ in reference])
    reference_tokens = torch.tensor([n for _, n in reference])
    loss = build_objective("rft")(
        torch.tensor(scores),
        torch.tensor(rewards),
        torch.tensor(mask),
        tokens=torch.tensor(tokens),
        reference_scores=reference_scores,
        reference_tokens=reference_tokens,
    )
    assert loss.item() == pytest.approx(nll / count, rel=1e-5, abs=1e-6)
    expected = sum(-s * n for s, n in reference) / sum(n for _, n in reference)
    assert l_vft(reference_scores, reference_tokens).item() == pytest.approx(expected, rel=1e-5)


def test_rft_says_what_it_needs():
    with pytest.raises(ValueError, match="rft needs tokens"):
        build_objective("rft")(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))


def test_unknown_names_and_options_are_errors():
    with pytest.raises(ValueError, match=r"known: vft, rft, align, .*, grpo"):
        build_objective("aft")
    with pytest.raises(ValueError, match="no option 'beta'; it takes none"):
        build_objective("align", beta=0.1)
    with pytest.raises(ValueError, match="it takes beta"):
        build_objective("aft_boundary", betta=0.1)
    for beta in (-0.1, math.nan):
        for name in ("aft_boundary", "dpo", "irpo", "dpop"):
            with pytest.raises(ValueError, match=f"{name} needs beta >= 0"):
                build_objective(name, beta=beta)
    with pytest.raises(ValueError, match="no rule 'median' for beta; it has spread, gap, hold, balance, extent, auto"):
        build_objective("aft_boundary", beta="median")


@pytest.mark.parametrize("name", ["dpo", "irpo", "dpop", "grpo"])
def test_a_loss_against_the_sampler_says_what_it_needs(name):
    arguments = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2).bool()
    with pytest.raises(ValueError, match="needs sampler_scores"):
        build_objective(name)(*arguments, tokens=torch.ones(1, 2))


def test_with_the_samplers_own_scores_no_candidate_is_preferred():
    """Δ = 0: every DPO pair costs log 2, and GRPO's ratio is one, so its value is zero and its gradient is not."""
    s = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    arguments = s, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2).bool()
    more = {"sampler_scores": s.detach(), "tokens": torch.full((1, 2), 7)}
    assert build_objective("dpo")(*arguments, **more).item() == pytest.approx(math.log(2))
    assert build_objective("dpop")(*arguments, **more).item() == pytest.approx(math.log(2))
    assert build_objective("irpo", alpha=0)(*arguments, **more).item() == pytest.approx(math.log(2))
    loss = build_objective("grpo")(*arguments, **more)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert s.grad[0].tolist() == pytest.approx([-0.5, 0.5])


def test_attributes_agree_with_the_names():
    kinds = {name: objective_class(name) for name in OBJECTIVES}
    assert {name for name, kind in kinds.items() if not kind.uses_candidates} == {"vft"}
    assert {name for name, kind in kinds.items() if kind.replaces_reference_loss} == {"rft"}
    assert all(build_objective(name).name == name for name in OBJECTIVES)


def test_the_config_knows_the_objectives_and_their_options():
    assert set(OBJECTIVES) == {"vft", "rft", *RANKING}
    for name, spec in OBJECTIVES.items():
        kind = objective_class(name)
        assert spec == ObjectiveSpec(
            path=f"{kind.__module__}:{kind.__name__}",
            options=tuple(field.name for field in fields(kind)),
            uses_candidates=kind.uses_candidates,
            ranks_candidates=kind.ranks_candidates,
            right_candidates_only=kind.right_candidates_only,
        )
    for name in RANKING:
        assert OBJECTIVES[name].ranks_candidates


class OwnObjective(Objective):
    name = "own"

    def __init__(self, scale=1.0):
        self.scale = scale

    def group_sums(self, groups):
        return self.scale * groups.masked_scores().sum(dim=1)


class UnfinishedObjective(Objective):
    name = "unfinished"


def test_an_own_objective_is_given_by_its_import_path():
    objective = build_objective(f"{__name__}:OwnObjective", scale=2.0)
    assert objective(torch.full((2, 3), -1.0), torch.zeros(2, 3), torch.ones(2, 3).bool()).item() == -6
    with pytest.raises(ValueError, match="OwnObjective' has no option 'beta'; it takes scale"):
        build_objective(f"{__name__}:OwnObjective", beta=0.1)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("no_such_module:Loss", "module of objective 'no_such_module:Loss' cannot be imported: No module named"),
        ("math:Loss", "the module math has no 'Loss'"),
        ("math:sqrt", "'math:sqrt' is no objective: it must be a class that derives from"),
        (f"{__name__}:UnfinishedObjective", "does not implement group_sums"),
    ],
)
def test_an_import_path_that_leads_to_no_objective_says_what_is_missing(path, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_objective(path)
