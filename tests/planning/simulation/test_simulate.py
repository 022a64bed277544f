"""Simulated runs: the invariants of the scheduling code hold under any failures, and times agree with arithmetic."""

import asyncio
import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aft_ray.config.run import ConfigError, RunConfig, parse_config
from aft_ray.planning.simulation import samplers as simulation
from aft_ray.planning.simulation.assumptions import SimulationAssumptions, draw_work
from aft_ray.planning.simulation.calibration import like_answers
from aft_ray.planning.simulation.sampler import SimulatedSampler
from aft_ray.planning.simulation.simulate import simulate
from aft_ray.planning.simulation.virtual_time import Stuck, VirtualTimeLoop
from aft_ray.sampling.sample_stage import SampleJob, SampleStage
from aft_ray.sampling.sampler_handles import SamplerHandles
from aft_ray.sampling.stream import sampling_spec
from aft_ray.storage.records import Candidate, Group, Question, Verdict, groups_to_table
from aft_ray.weights.version_manifest import VersionManifest

# Every answer has 100 tokens and every pass takes as long: what is left is arithmetic.
PLAIN = SimulationAssumptions(
    length_spread=0, response_tokens=100, prompt_tokens=50, reference_tokens=100, pass_rate=1, pass_s=0, optimizer_s=0
)


def config(questions: int = 64, samplers: int = 4, *, rounds: int = 4, staleness: int = 1, **sections) -> RunConfig:
    return parse_config(
        {
            "run_dir": "unused",
            "model": {"name": "unused"},
            "data": {"arithmetic": {"train_size": questions}},
            "rounds": {"count": rounds, "max_staleness": staleness, "evaluate_every": 0},
            "sampling": {"samplers": samplers, "k": 4, "batch_size": 4, "max_num_seqs": 128}
            | sections.pop("sampling", {}),
            "training": {"groups_per_step": 16, "max_failures": 1000} | sections.pop("training", {}),
            **sections,
        }
    )


def run_virtually(main):
    """The result of a coroutine that is run to its end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


async def walk(seconds: list[float]) -> list[float]:
    loop = asyncio.get_running_loop()
    seen = [loop.time()]

    async def one(delay: float) -> None:
        await asyncio.sleep(delay)
        seen.append(loop.time())

    await asyncio.gather(*map(one, seconds))
    return seen


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_virtual_time_passes_as_asked_and_never_goes_back(seconds):
    seen = run_virtually(walk(seconds))
    assert seen == sorted(seen)
    assert seen[1:] == pytest.approx(sorted(seconds), abs=1e-6)


def test_coroutines_that_wait_for_each_other_are_found_out():
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Stuck, match="every coroutine waits"):
        run_virtually(main())


def test_a_round_without_a_tail_takes_what_the_engines_and_the_workers_take():
    (sampled,), (trained,) = (r := simulate(config(rounds=1), PLAIN)).sampled, r.trained
    # 16 questions an engine: 64 sequences of 100 tokens at once; and prompts before the first token.
    decoding = 100 * (PLAIN.step_ms / 1e3 + 64 * PLAIN.step_us_per_sequence / 1e6)
    expected = decoding + 16 * 50 / PLAIN.prefill_tokens_per_s + PLAIN.overhead_s + 64 * PLAIN.forward_ms / 1e3
    assert sampled.seconds == pytest.approx(expected, rel=0.02)
    assert sampled.tokens == 64 * 4 * 100
    # All answers are right, so the references alone are trained on; their last token is predicted and not computed.
    assert trained.train_s == pytest.approx(64 * 149 / PLAIN.train_tokens_per_s)
    assert trained.published - trained.trained == pytest.approx(PLAIN.publish_s)


@settings(deadline=None, max_examples=12)
@given(step_ms=st.floats(1, 400), train=st.floats(20, 5000), publish=st.floats(0, 100), load=st.floats(0, 50))
def test_rounds_alternate_or_overlap(step_ms, train, publish, load):
    """Steady rounds take G + T with staleness 0 and max(G, T) with 1, where G is load and sampling, T the rest."""
    assumed = PLAIN.model_copy(
        update={"step_ms": step_ms, "train_tokens_per_s": train, "publish_s": publish, "load_s": load}
    )
    sequential, overlapped = (simulate(config(rounds=6, staleness=s), assumed) for s in (0, 1))
    g = sequential.sampled[1].seconds + load
    t = sequential.trained[1].train_s + publish
    assert sequential.round_s == pytest.approx([g + t] * 6, rel=1e-6)
    assert overlapped.round_s[-1] == pytest.approx(max(g, t), rel=1e-6)
    assert overlapped.seconds <= sequential.seconds + 1e-6


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 1000), spread=st.floats(0, 1.5), step_ms=st.floats(1, 400))
def test_with_any_answers_an_overlapped_run_is_no_slower_and_within_its_bound(seed, spread, step_ms):
    assumed = SimulationAssumptions(
        length_spread=spread, step_ms=step_ms, publish_s=5, load_s=3, train_tokens_per_s=2000
    )
    sequential, overlapped = (simulate(config(rounds=5, staleness=s), assumed, seed) for s in (0, 1))
    assert [one.tokens for one in sequential.sampled] == [one.tokens for one in overlapped.sampled]
    assert overlapped.seconds <= sequential.seconds + 1e-6
    assert overlapped.seconds >= max(
        sum(one.seconds for one in overlapped.sampled),
        sum(one.published - one.started for one in overlapped.trained),
    )


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10_000),
    staleness=st.integers(0, 2),
    samplers=st.integers(1, 6),
    batch_size=st.integers(1, 20),
    in_flight=st.integers(1, 8),
    hours=st.floats(0.005, 1),
    node_hours=st.none() | st.floats(0.02, 1),
)
def test_whatever_fails_every_question_is_answered_or_failed_once_by_a_version_that_is_fresh_enough(
    seed, staleness, samplers, batch_size, in_flight, hours, node_hours
):
    assumed = SimulationAssumptions(
        mtbf_hours=hours, node_mtbf_hours=node_hours, gpus_per_node=2, start_s=20, node_back_s=60, trainer_start_s=20,
        publish_s=5, load_s=3, train_tokens_per_s=5000,
    )  # fmt: skip
    sampling = {"batch_size": batch_size, "in_flight": in_flight, "max_failed": 1.0}
    # The simulation raises when a question is lost or answered twice.
    result = simulate(config(48, samplers, staleness=staleness, sampling=sampling), assumed, seed)
    assert [one.round for one in result.sampled] == list(range(1, len(result.sampled) + 1))
    assert [one.round for one in result.trained] == list(range(1, len(result.trained) + 1))
    published = {0: 0.0} | {one.round: one.published for one in result.trained}
    for one in result.sampled:
        assert 0 <= one.staleness <= staleness
        assert one.questions == 48
        assert published[one.version] <= one.started
    for one in result.trained:
        assert one.started >= result.sampled[one.round - 1].ended
    assert [at for at, _ in result.curve] == sorted(at for at, _ in result.curve)
    assert result.stopped is not None or len(result.trained) == 4


def test_the_same_seed_gives_the_same_run_to_the_second():
    assumed = SimulationAssumptions(mtbf_hours=0.2, start_s=30)
    first, again, other = (simulate(config(200), assumed, seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert first.sampler_failures > 0


def test_failures_cost_time_and_too_many_of_the_workers_end_the_run():
    calm = simulate(config(200), SimulationAssumptions())
    stormy = simulate(config(200), SimulationAssumptions(mtbf_hours=0.05))
    assert stormy.trainer_failures > 0
    assert stormy.seconds > calm.seconds
    once = config(200, training={"max_failures": 0})
    assert "more than training.max_failures=0" in (simulate(once, SimulationAssumptions(mtbf_hours=0.05)).stopped or "")


class OneSidedAsk(SampleStage):
    """A bug on purpose: it forgets whom it has asked, and so asks the first sampler again and again."""

    async def _attempt(self, job, members, groups):
        self._load.clear()
        return await super()._attempt(job, members, groups)


def test_a_fault_in_the_scheduling_code_shows(monkeypatch):
    """So it is that code which is measured, not a likeness of it."""
    right = simulate(config(2000, 8, rounds=1), SimulationAssumptions())
    monkeypatch.setattr(simulation, "SampleStage", OneSidedAsk)
    wrong = simulate(config(2000, 8, rounds=1), SimulationAssumptions())
    assert right.sampled[0].busy > 0.6
    assert wrong.sampled[0].busy < 1 / 8 + 0.01
    assert wrong.sampled[0].seconds > 3 * right.sampled[0].seconds


def test_questions_of_a_sampler_that_hangs_wait_for_the_deadline_of_its_calls_and_no_longer():
    """It never answers and is never reported dead: after the deadline of its calls, others take its questions."""
    given, assumed, count = (
        config(samplers=3, sampling={"timeout_s": 100, "batch_size": 8}),
        SimulationAssumptions(),
        96,
    )

    async def main() -> tuple[float, int]:
        work = {1: draw_work(assumed, 0, 1, count, given.sampling.k, given.sampling.max_tokens)}
        samplers = [SimulatedSampler(index, assumed, 128, work) for index in range(3)]
        pool = SamplerHandles(tuple(samplers), (), (None,) * 3, 1, 900, 600, 0.1, frozenset(range(3)))
        manifest = VersionManifest(0, "", (), ())
        await asyncio.gather(*(sampler.load.remote(manifest, 0.1, 600) for sampler in samplers))
        loop = asyncio.get_running_loop()
        began = loop.time()
        loop.call_later(1, samplers[1].fail, 1e9, 1e9)
        job = SampleJob(pool, manifest, sampling_spec(given.sampling), given.sampling, 0, "test")
        groups = [Group(1, 0, Question(str(n), "", "", "", ""), [1, n], [0], []) for n in range(count)]
        ask = SampleStage()
        tables = await asyncio.gather(*(ask(groups_to_table(groups[n : n + 8]), job) for n in range(0, count, 8)))
        await ask.close()
        reasons = [reason for table in tables for reason in table["failure"].to_pylist()]
        assert len(reasons) == count
        return loop.time() - began, sum(reason is not None for reason in reasons)

    seconds, failed = run_virtually(main())
    assert failed == 0
    assert 100 < seconds < 130


def test_answers_are_read_off_groups_as_they_were_drawn():
    assumed = SimulationAssumptions(
        response_tokens=150, length_spread=0.6, length_shared=0.7, pass_rate=0.4, pass_spread=0.5
    )
    work = draw_work(assumed, 1, 1, 3000, 6, 10_000)

    def candidates(number: int) -> list[Candidate]:
        drawn = zip(work.lengths[number].tolist(), work.right[number].tolist(), strict=True)
        return [
            replace(Candidate([0] * length, 0.0, "stop", ""), verdict=Verdict.RIGHT if right else Verdict.WRONG)
            for length, right in drawn
        ]

    groups = [
        Group(1, 0, Question(str(n), "", "", "", ""), [0] * prompt, [0] * reference, candidates(n))
        for n, (prompt, reference) in enumerate(zip(work.prompts.tolist(), work.references.tolist(), strict=True))
    ]
    read = like_answers(groups)
    assert read == pytest.approx({name: getattr(assumed, name) for name in read}, rel=0.08)


def test_what_cannot_be_simulated_is_refused_in_a_sentence():
    with pytest.raises(ConfigError, match="nothing to schedule"):
        simulate(config(objective={"name": "vft"}), SimulationAssumptions())
    with pytest.raises(ConfigError, match=r"sampling\.adaptive=null"):
        simulate(config(sampling={"adaptive": {}}), SimulationAssumptions())
    mmlu = parse_config({"run_dir": "x", "model": {"name": "x"}, "data": {"task": "mmlu"}})
    with pytest.raises(ConfigError, match="--assume questions=NUMBER"):
        simulate(mmlu, SimulationAssumptions())
    assert math.isfinite(simulate(mmlu, SimulationAssumptions(questions=50)).steady_s)
