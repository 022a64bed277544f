"""The acceptance suite on the GPUs of this machine, one test for each check: `make test-gpu`."""

import pytest
import torch

from aft_ray.operations.acceptance.machine import describe_machine
from aft_ray.operations.acceptance.suite import CHECKS, Setting, run_checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
]


@pytest.mark.parametrize(
    "check", [pytest.param(one, id=one.name, marks=pytest.mark.timeout(2 * one.timeout_s)) for one in CHECKS]
)
def test_accepted(check):
    (outcome,) = run_checks([check], Setting())
    line = outcome.line(describe_machine())
    print(line)
    if outcome.result == "skipped":
        pytest.skip(outcome.reason)
    assert outcome.result == "passed", line
