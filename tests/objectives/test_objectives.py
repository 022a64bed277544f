"""Every objective against slow loops in float64 that were written from the formulas alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aft_ray.objectives import OBJECTIVES, build_objective, l_vft

RANKING = ["align", "aft_detached", "aft_boundary"]


def boundary_targets(s, r, beta):
    """T_ij of every pair, as numbers: what the stopped gradient holds fixed."""
    k = range(len(s))
    lowest = {j: min(s[i] for i in k if r[i] > r[j]) for j in k if any(r[i] > r[j] for i in k)}
    return {(i, j): 2 * lowest[j] - 2 * beta - s[i] for i in k for j in k if r[i] > r[j]}


def slow_group(name, s, r, beta=0.15, fixed=None):
    """The loss of one group, unmasked. fixed: the scores at which the detached terms are frozen; none: s itself."""
    fixed = s if fixed is None else fixed
    targets = boundary_targets(fixed, r, beta)
    z = 1.0
    for i in range(len(s)):
        for j in range(len(s)):
            if r[i] > r[j]:
                if name == "aft_detached":
                    z += math.exp(fixed[j] - s[i])
                else:
                    z += math.exp(s[j] - s[i])
                if name == "aft_boundary":
                    z += math.exp(targets[i, j] - s[j])
    return math.log(z)


def finite_difference(name, s, r, beta, step=1e-5):
    gradient = []
    for position in range(len(s)):
        up, down = list(s), list(s)
        up[position] += step
        down[position] -= step
        difference = slow_group(name, up, r, beta, fixed=s) - slow_group(name, down, r, beta, fixed=s)
        gradient.append(difference / (2 * step))
    return gradient


@st.composite
def batches(draw, low=-8.0):
    groups, k = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    graded = draw(st.booleans())
    reward = st.sampled_from([-1.0, 0.0, 0.5, 3.0, 7.0]) if graded else st.sampled_from([0.0, 1.0])
    score = st.one_of(st.floats(low, 0, width=32), st.sampled_from([-1.0, -2.0, 0.0]))

    def table(entry):
        return [[draw(entry) for _ in range(k)] for _ in range(groups)]

    return table(score), table(reward), table(st.booleans())


def unmasked(row, mask):
    return [x for x, keep in zip(row, mask, strict=True) if keep]


@pytest.mark.parametrize("name", RANKING)
@settings(max_examples=150, deadline=None)
@given(
    batch=batches(), beta=st.sampled_from([0.0, 0.15, 1.0]), garbage=st.sampled_from([math.nan, math.inf, -math.inf])
)
def test_value_and_gradient_match_the_slow_reference(name, batch, beta, garbage):
    scores, rewards, mask = batch
    objective = build_objective(name, **({"beta": beta} if name == "aft_boundary" else {}))
    m = torch.tensor(mask)
    s = torch.where(m, torch.tensor(scores), garbage).requires_grad_()
    loss = objective(s, torch.where(m, torch.tensor(rewards), garbage), m)
    expected = [
        slow_group(name, unmasked(s_row, m_row), unmasked(r_row, m_row), beta)
        for s_row, r_row, m_row in zip(scores, rewards, mask, strict=True)
    ]
    assert loss.dtype is torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, s)
    assert not gradient[~m].any()
    for row, (s_row, r_row, m_row) in enumerate(zip(scores, rewards, mask, strict=True)):
        slow = finite_difference(name, unmasked(s_row, m_row), unmasked(r_row, m_row), beta)
        assert gradient[row][m[row]].tolist() == pytest.approx([g / len(scores) for g in slow], abs=2e-4)


@pytest.mark.parametrize("name", RANKING)
@settings(max_examples=100, deadline=None)
@given(batch=batches(low=-50.0), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_finite_over_the_whole_range_of_scores_and_in_bfloat16(name, batch, dtype):
    scores, rewards, mask = (torch.tensor(part) for part in batch)
    s = scores.to(dtype).requires_grad_()
    loss = build_objective(name)(s, rewards.to(dtype), mask)
    loss.backward()
    assert loss.dtype is torch.float32
    assert loss.isfinite()
    assert s.grad.isfinite().all()
    exact = build_objective(name)(s.detach().float(), rewards, mask)
    assert loss.item() == exact.item()  # computed in float32: only the inputs are rounded


@pytest.mark.parametrize("name", ["vft", *RANKING])
def test_a_group_without_a_pair_is_exactly_zero(name):
    s = torch.full((4, 3), -2.0, requires_grad=True)
    rewards = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 0, 1]])
    mask = torch.tensor([[True, True, True], [True, True, True], [False, True, True], [False, False, False]])
    loss = build_objective(name)(s, rewards, mask)
    loss.backward()
    assert loss.item() == 0
    assert not s.grad.any()


@pytest.mark.parametrize("name", ["vft", *RANKING])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_no_group_or_no_candidate_is_zero(name, shape):
    s = torch.zeros(shape, requires_grad=True)
    loss = build_objective(name)(s, torch.zeros(shape), torch.zeros(shape, dtype=torch.bool))
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
    arguments = [torch.tensor(part) for part in batch]
    align = build_objective("align")(*arguments)
    for beta in (60.0, math.inf):
        assert build_objective("aft_boundary", beta=beta)(*arguments).item() == pytest.approx(align.item(), rel=1e-6)


@settings(deadline=None)
@given(batches())
def test_rft_is_the_token_mean_over_references_and_right_candidates(batch):
    scores, rewards, mask = batch
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
    with pytest.raises(ValueError, match="known: vft, rft, align, aft_detached, aft_boundary"):
        build_objective("aft")
    with pytest.raises(ValueError, match="no option 'beta'; it takes none"):
        build_objective("align", beta=0.1)
    with pytest.raises(ValueError, match="it takes beta"):
        build_objective("aft_boundary", betta=0.1)
    for beta in (-0.1, math.nan):
        with pytest.raises(ValueError, match="beta >= 0"):
            build_objective("aft_boundary", beta=beta)


def test_attributes_agree_with_the_names():
    assert {name for name, kind in OBJECTIVES.items() if not kind.uses_candidates} == {"vft"}
    assert {name for name, kind in OBJECTIVES.items() if kind.replaces_reference_loss} == {"rft"}
    assert all(build_objective(name).name == name for name in OBJECTIVES)
