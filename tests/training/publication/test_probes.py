"""Probes are bounded, tell as much as they can, and have the score of the trainer."""

import pytest
import torch
from tiny_families import build, score, trainer_of

from aft_ray.storage.records import Candidate, Group, Question, Verdict
from aft_ray.training.publication.probes import MAX_PROBE_TOKENS, MAX_RESPONSE_TOKENS, choose_probes, score_probes


def group(prompt: int, reference: int, *candidates: int) -> Group:
    sampled = [Candidate([3] * n, -1.0, "stop", "", None, Verdict.RIGHT, 1.0) for n in candidates]
    question = Question(f"q{prompt}-{reference}", "", "", "", "")
    return Group(1, 0, question, list(range(2, 2 + prompt)), [4] * reference, sampled)


def lengths(groups, count=16, max_length=4096):
    return [
        (len(one.prompt_token_ids), len(one.reference_token_ids)) for one in choose_probes(groups, count, max_length)
    ]


def test_the_longest_response_of_each_question_is_taken_and_the_longest_come_first():
    groups = [group(10, 3, 5, 9), group(10, 4, 2), group(10, 20)]
    assert lengths(groups) == [(10, 20), (10, 9), (10, 4)]
    assert lengths(groups, count=2) == [(10, 20), (10, 9)]
    assert all(not one.candidates for one in choose_probes(groups, 16, 4096))


def test_no_probe_is_longer_than_the_limit_or_the_engines_context():
    assert lengths([group(2000, 900)]) == [(MAX_PROBE_TOKENS - MAX_RESPONSE_TOKENS, MAX_RESPONSE_TOKENS)]
    # The engine needs room for one more token.
    assert lengths([group(60, 50)], max_length=100) == [(49, 50)]
    assert lengths([group(5, 500)], max_length=100) == [(1, 98)]


def test_a_cut_probe_keeps_the_end_of_the_prompt_and_the_beginning_of_the_response():
    (cut,) = choose_probes([group(200, 3)], 1, 101)
    assert cut.prompt_token_ids == list(range(2, 202))[-97:]
    assert cut.reference_token_ids == [4] * 3


def test_probes_have_the_scores_of_the_model():
    model = build("qwen2", 1)
    trained = trainer_of(model)
    groups = choose_probes([group(3 + n, 1 + n, 7) for n in range(11)], 16, 100)
    probes = score_probes(trained, groups)
    assert len(probes) == 11  # in several passes
    for probe in probes:
        assert probe.score == pytest.approx(score(model, probe.prompt_token_ids, probe.response_token_ids), abs=1e-5)
    assert trained.training
    assert score_probes(trained, []) == []
    assert torch.is_grad_enabled()
