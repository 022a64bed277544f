"""The tolerance of probes: rounding passes at every length, and what is more than rounding does not."""

import math
import random

import pytest

from aft_ray.weights.version_manifest import Probe, VersionManifest, WeightUpdateFailed

BFLOAT16 = 0.05
MULTIPLE_CHOICE = [1, 2, 3, 4, 5] * 4
MIXED = [1, 2, 4, 8, 16, 32, 64, 128, 256] * 2
LONG = [128, 256] * 8


def refused(lengths, differences, tolerance=BFLOAT16):
    """Why an engine whose scores differ from the trainer's by `differences` is refused; nothing when it is not."""
    probes = tuple(Probe([1], [2] * length, -0.5) for length in lengths)
    try:
        VersionManifest(3, "", (), probes).verify_probes([-0.5 + one for one in differences], tolerance, "sampler 7")
    except WeightUpdateFailed as error:
        return str(error)
    return ""


@pytest.mark.parametrize("lengths", [MULTIPLE_CHOICE, MIXED, LONG, [1], [200]])
def test_a_thousand_right_versions_pass(lengths):
    """Each token's log-probability is wrong by rounding; of one token in fifty by four times as much."""
    noise = random.Random(0)

    def rounding() -> float:
        return noise.gauss(0, 0.03) * (4 if noise.random() < 0.02 else 1)

    for _ in range(1000):
        assert refused(lengths, [sum(rounding() for _ in range(n)) / n for n in lengths]) == ""


def test_stale_norms_and_attention_are_found_over_long_responses():
    """Measured on a small model: 0.017 to 0.020 nats per token, with either sign."""
    for lengths in (LONG, MIXED):
        assert refused(lengths, [0.017 * (-1) ** place for place in range(len(lengths))])


def test_a_short_answer_may_differ_by_more_than_a_long_one():
    assert refused([1], [0.4]) == refused([100], [0.04]) == ""
    assert refused([1], [0.6]) != ""
    assert refused([100], [0.06]) != ""


def test_many_probes_that_are_all_off_are_worse_than_one():
    assert refused([4] * 16, [0.2] + [0.0] * 15) == ""
    assert refused([4] * 16, [0.06] * 16) != ""


def test_the_error_has_the_worst_probe_and_what_is_allowed():
    assert refused([1, 100, 4], [0.01, 0.5, 0.1]) == (
        "sampler 7 scores the probes of version 3 up to 0.5 nats per token away from the trainer over 100 tokens, "
        "which counts 1e+02 times weights.tolerance (0.05; 10 are allowed; 3.7 over all probes, and 3.3 are allowed): "
        "its weights are wrong, and it answers nothing"
    )


def test_a_score_that_is_no_number_is_refused_and_no_probes_prove_nothing():
    assert "nan" in refused([5, 5], [0.0, math.nan])
    assert refused([5], [-math.inf])
    assert refused([], []) == ""
