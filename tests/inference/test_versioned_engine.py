"""Which version an engine holds before, during and after an update."""

import asyncio
import time
from concurrent.futures import Future

import pytest

from aft_ray.inference import update_phases
from aft_ray.inference.update_phases import PhaseTimeout
from aft_ray.inference.versioned_engine import (
    UpdateReport,
    VersionedEngine,
    WeightTransferFailed,
    WrongVersion,
    receive_weights,
)
from aft_ray.weights.receive_plan import EngineCall
from aft_ray.weights.version_manifest import Probe, VersionManifest, WeightUpdateFailed

SCORE, TOLERANCE = -0.5, 1e-4


class FixedPlan:
    """A receive plan of given calls."""

    def __init__(self, *phases):
        self.phases = phases

    def calls(self, timeout_s):
        yield from (EngineCall(phase, f"{phase}_method") for phase in self.phases)


class FakeEngine:
    """An engine whose calls and scores are given. It can fail in a phase, or never return."""

    def __init__(self, fails_in=None, blocks=False):
        self.fails_in, self.blocks, self.made, self.resets = fails_in, blocks, [], 0

    def collective_rpc(self, method, *, args):
        self.made.append(method)
        if method == f"{self.fails_in}_method":
            raise ConnectionError("the peer is gone\nand a stack frame")

    def reset_prefix_cache(self):
        self.resets += 1
        return True

    def update_weights(self, calls, enter_phase, adapter):
        result = Future()
        if self.blocks:
            return result
        try:
            receive_weights(self, calls, enter_phase)
        except Exception as error:
            result.set_exception(error)
        else:
            result.set_result(None)
        return result

    def score(self, prompt_token_ids, response_token_ids):
        result = Future()
        result.set_result(SCORE)
        return result


def manifest(version, *phases, score=SCORE):
    return VersionManifest(version, "", (), (Probe([1], [2], score),), FixedPlan(*phases))


def updated(engine, versions, timeout_s=5.0):
    """The engine's version, or the error, after each update."""

    async def update_all():
        versioned = VersionedEngine("sampler 7", engine, 0, "weights.timeout_s")
        results = []
        for version in versions:
            try:
                results.append(await versioned.update(version, TOLERANCE, timeout_s))
            except (RuntimeError, ConnectionError) as error:
                results.append(error)
            results.append(versioned.version)
        return results

    return asyncio.run(update_all())


def test_an_update_loads_verifies_and_then_holds_the_version():
    engine = FakeEngine()
    report, version, again, _ = updated(engine, [manifest(3, "rendezvous", "fetch", "load")] * 2)
    assert engine.made == ["rendezvous_method", "fetch_method", "load_method"]
    assert engine.resets == 1
    assert (report.version, report.probe_difference, version) == (3, 0.0, 3)
    assert again == UpdateReport(3)


def test_the_version_that_is_held_is_not_loaded_again():
    engine = FakeEngine()
    assert updated(engine, [manifest(0, "load")]) == [UpdateReport(0), 0]
    assert engine.made == []


def test_another_version_than_the_one_held_is_refused():
    async def require(version):
        VersionedEngine("sampler 7", FakeEngine(), 2, "weights.timeout_s").require_version(version)

    asyncio.run(require(2))
    with pytest.raises(WrongVersion, match="sampler 7 holds version 2, not 3"):
        asyncio.run(require(3))
    with pytest.raises(WrongVersion, match="sampler 7 holds version 2, not None"):
        asyncio.run(require(None))


def test_weights_that_do_not_arrive_leave_no_version_and_the_next_update_succeeds():
    engine = FakeEngine(fails_in="fetch")
    error, version, _, next_version = updated(engine, [manifest(3, "fetch", "load"), manifest(3, "load")])
    assert isinstance(error, WeightUpdateFailed)
    assert str(error) == (
        "sampler 7 did not get through phase 'fetch' of publishing version 3: the peer is gone; "
        "weights.timeout_s (5 s a phase) sets the deadline"
    )
    assert (version, next_version) == (None, 3)


def test_an_error_while_loading_is_raised_as_it_is():
    error, version = updated(FakeEngine(fails_in="load"), [manifest(3, "fetch", "load")])
    assert isinstance(error, ConnectionError)
    assert version is None


def test_probes_that_score_differently_leave_no_version():
    error, version = updated(FakeEngine(), [manifest(3, "load", score=SCORE + 0.01)])
    assert isinstance(error, WeightUpdateFailed)
    assert "sampler 7 scores the probes of version 3 up to 0.01" in str(error)
    assert version is None


def test_a_phase_that_does_not_end_is_named(monkeypatch):
    monkeypatch.setattr(update_phases, "GRACE_S", 0.05)
    began = time.monotonic()
    error, version = updated(FakeEngine(blocks=True), [manifest(3, "load")], timeout_s=0.05)
    assert time.monotonic() - began < 5
    assert isinstance(error, PhaseTimeout)
    assert "sampler 7 did not get through phase 'fetch' of publishing version 3: " in str(error)
    assert version is None


def test_only_a_failed_transfer_is_recoverable():
    plan, phases = FixedPlan("rendezvous", "load"), []
    with pytest.raises(WeightTransferFailed, match=r"^the peer is gone$"):
        receive_weights(FakeEngine(fails_in="rendezvous"), plan.calls(1), phases.append)
    assert phases == ["fetch", "rendezvous"]
    with pytest.raises(ConnectionError):
        receive_weights(FakeEngine(fails_in="load"), plan.calls(1), phases.append)


@pytest.mark.parametrize(
    "said",
    [
        "Call to collective_rpc method failed: {}",
        "Worker failed with error '{}', please check the stack trace above for the root cause",
        "Call to collective_rpc method failed: Worker failed with error '{}', please check the stack trace above for "
        "the root cause",
        "{}",
        "{}\nException raised from recvBytes at socket.hpp:307",
    ],
)
def test_an_error_from_another_process_reads_as_one_from_this_process(said):
    class Client:
        def collective_rpc(self, method, *, args):
            raise RuntimeError(said.format("the peer's store at 10.0.0.1 is gone"))

    calls = iter([EngineCall("rendezvous", "init_weight_transfer_engine")])
    with pytest.raises(WeightTransferFailed, match=r"^the peer's store at 10\.0\.0\.1 is gone$"):
        receive_weights(Client(), calls, lambda phase: None)
