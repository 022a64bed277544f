"""Samplers and train workers on the same GPUs: never do both hold a GPU's memory, whatever fails in between.

There are no GPUs: a ledger notes who holds the memory of a GPU, and refuses nothing, so that every overlap is seen.
Samplers are Ray actors without an engine; train workers are threads without a model, started again as Ray Train does.
What is tested is real: the orchestrator, the colocation, the coordinator's actor, the pool with its health, and the
worker's half of lending.
"""

import os
import sys
import threading
import time
from dataclasses import dataclass, replace

import pytest
import ray
from tiny import tiny_config

from aft_ray.cluster.colocated_placement import WorkerPlacement
from aft_ray.coordination.client import CoordinatorClient
from aft_ray.coordination.colocation import Colocation, GpuGate
from aft_ray.coordination.coordinator import PeerFailed, call, start_coordinator
from aft_ray.inference.versioned_engine import UpdateReport
from aft_ray.run.orchestrator import Orchestrator
from aft_ray.sampling.sampler import SamplerStatus
from aft_ray.sampling.sampler_handles import SamplerHandles
from aft_ray.sampling.sampler_pool import SamplerPool
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import RunDir
from aft_ray.training.state import lending
from aft_ray.weights.version_manifest import VersionManifest, WeightUpdateFailed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(180)]
GPUS, ROUNDS, WAIT_S = 2, 3, 60.0
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # other processes cannot import this file


@ray.remote(num_cpus=0, max_concurrency=100)
class Memory:
    """The memory of the GPUs: who holds how much of which. A holder whose process has ended holds nothing."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, str], int] = {}  # (GPU, holder) -> its process
        self.overlaps: list[str] = []
        self.journal: list[str] = []

    def take(self, gpu, holder, process) -> None:
        self.held[gpu, holder] = process
        kind = holder.split()[0]
        for (other_gpu, other), pid in self.held.items():
            if other_gpu == gpu and other.split()[0] != kind and alive(pid):
                self.overlaps.append(f"{holder} and {other} on GPU {gpu}")
        self.journal.append(f"{kind} on {gpu}")

    def free(self, gpu, holder) -> None:
        self.held.pop((gpu, holder), None)

    def free_of(self, process_holders) -> None:
        for holder in process_holders:
            for gpu in range(GPUS):
                self.free(gpu, holder)

    def state(self):
        return self.overlaps, self.journal


def alive(pid) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


class FakeSampler:
    """A sampler whose engine is an entry in the ledger of memory."""

    def __init__(self, index, gate, memory, start_s) -> None:
        gate.enter()
        self.index, self.memory, self.version = index, memory, None
        self._hold()
        time.sleep(start_s)  # an engine holds memory while it starts, too

    def _hold(self) -> None:
        ray.get(self.memory.take.remote(self.index, f"sampler {self.index}", os.getpid()))

    async def status(self):
        return SamplerStatus(self.version, "idle", 0, 0.0)

    async def load(self, manifest, tolerance, timeout_s):
        await self.memory.take.remote(self.index, f"sampler {self.index}", os.getpid())
        if manifest.model == "refused":
            raise WeightUpdateFailed("the engine refused the weights")
        self.version = manifest.version
        return UpdateReport(manifest.version)

    async def sleep(self):
        await self.memory.free.remote(self.index, f"sampler {self.index}")
        self.version = None

    async def die(self):
        os._exit(1)


class Killed(Exception):
    """Ends a train worker as a signal would: it does nothing any more."""


@dataclass
class Incarnation:
    """Train workers that were started together. The first failure of one ends all, as with Ray Train."""

    name: str
    ended: threading.Event

    def check(self) -> None:
        if self.ended.is_set():
            raise Killed


class FakeTraining:
    """Ray Train and its workers. `plan`: (round, what happens in it) -> whether to fail there, once each."""

    def __init__(self, config, coordinator, memory, plan) -> None:
        self.config, self.coordinator, self.memory, self.plan = config, coordinator, memory, plan
        self.trained = 0  # the last round whose checkpoint is durable
        self.starts, self.current = 0, None
        self.incarnations: dict[int, Incarnation] = {}  # of each thread
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self.fit, daemon=True)

    def fit(self) -> None:
        while True:
            self.starts += 1
            self.current = Incarnation(f"incarnation {self.starts}", threading.Event())
            call(self.coordinator.begin_training)
            results: list = [None] * GPUS
            workers = [
                threading.Thread(target=self.work, args=(rank, self.current, results), daemon=True)
                for rank in range(GPUS)
            ]
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers) and not self.current.ended.wait(0.05):
                pass
            time.sleep(0.2)
            # Ray Train starts the workers again when the processes before have ended, and their memory is free.
            holders = [f"worker {rank} of {self.current.name}" for rank in range(GPUS)]
            ray.get(self.memory.free_of.remote(holders))
            if all(result == "finished" for result in results) and not self.current.ended.is_set():
                return
            if any(isinstance(result, PeerFailed) for result in results):
                return
            self.errors += [result for result in results if isinstance(result, AssertionError)]

    def work(self, rank, incarnation, results) -> None:
        self.incarnations[threading.get_ident()] = incarnation
        try:
            self.rounds(rank, incarnation)
            results[rank] = "finished"
        except BaseException as error:
            results[rank] = error
            if not isinstance(error, PeerFailed):
                incarnation.ended.set()

    def rounds(self, rank, incarnation) -> None:
        """The order of `TrainWorker.run`, without a model."""
        lender = lending.GpuLender(self.config, self.coordinator, rank, GPUS)
        lender._gpu = True
        engine = None
        for number in range(self.trained + 1, ROUNDS + 1):
            lender.lend(engine and (rank, incarnation), number)
            incarnation.check()
            if engine is None:
                hold(self.memory, rank, incarnation)
                engine = "engine"
            self.happen(number, "training", rank)
            time.sleep(0.05)
            incarnation.check()
            if rank == 0:
                call(self.coordinator.publish, manifest(number, self.plan.get((number, "model"), "")))
            self.happen(number, "published", rank)
            if rank == 0 and (number, "checkpoint is late") not in self.plan:
                self.trained = number
        lender.give_up((rank, incarnation), ROUNDS + 1)
        if rank == 0 and (ROUNDS, "evaluated") in self.plan:
            assert self.plan[ROUNDS, "evaluated"].wait(WAIT_S)
            if self.starts == 1:
                raise RuntimeError("killed in the last evaluation")
        incarnation.check()
        if rank == 0:
            self.trained = ROUNDS

    def happen(self, number, what, rank) -> None:
        if rank == 1 and self.plan.pop((number, what), None):
            raise RuntimeError(f"{what} of round {number} fails")

    def kill(self) -> None:
        self.current.ended.set()


def hold(memory, rank, incarnation) -> None:
    ray.get(memory.take.remote(rank, f"worker {rank} of {incarnation.name}", os.getpid()))


def manifest(version, model=""):
    return replace(VersionManifest(version, model, (), ()), durable=True)


class FakeSamplers:
    """`run.samplers.RunSamplers` without broadcasts and reports."""

    def __init__(self, colocation) -> None:
        self.colocation = colocation

    def load(self, loaded) -> None:
        self.pool = self.colocation.acquire(loaded.version + 1)
        self.pool.load(loaded)

    def release(self) -> None:
        self.colocation.release()


class Run:
    """One run of three rounds with what fails in it. `during`: round -> what is done while it is sampled."""

    def __init__(self, monkeypatch, directory, plan=(), during=None, evaluate=None, start_s=0.0) -> None:
        settings = {"timeout_s": WAIT_S, "count": ROUNDS, "max_staleness": 0}
        sampling = {"samplers": GPUS, "colocate": True, "start_timeout_s": WAIT_S}
        config = tiny_config(
            directory / "run", directory / "model", rounds=settings, sampling=sampling, training={"workers": GPUS}
        )
        self.memory, self.coordinator = Memory.remote(), start_coordinator()
        self.during, self.evaluate, self.start_s = during or {}, evaluate, start_s
        self.actors: list = []
        self.training = FakeTraining(config, self.coordinator, self.memory, dict(plan))
        client = CoordinatorClient.of_actor(self.coordinator)
        self.colocation = Colocation(config, client, self.start)
        run_dir = RunDir(directory / "run")
        self.orchestrator = Orchestrator(
            config,
            Ledger(run_dir),
            client,
            FakeSamplers(self.colocation),
            self,
            self,
            lambda version: manifest(version),
        )
        self.fake_memory(monkeypatch)

    def start(self, placements):
        gates = [GpuGate(self.coordinator, index, WAIT_S) for index in range(GPUS)]
        self.actors = [
            ray.remote(FakeSampler)
            .options(num_cpus=0, max_restarts=100, max_task_retries=0, max_concurrency=50)
            .remote(index, gate, self.memory, self.start_s)
            for index, gate in enumerate(gates)
        ]
        return SamplerPool(SamplerHandles(tuple(self.actors), (), (None,) * GPUS, 1, WAIT_S, WAIT_S, 0.1))

    def fake_memory(self, monkeypatch) -> None:
        """In place of a GPU's memory: an engine is the worker that holds it."""
        run = self

        class Offloaded:
            def __init__(self, rank, incarnation) -> None:
                self.rank, self.incarnation = rank, incarnation

            def reload(self) -> None:
                self.incarnation.check()
                hold(run.memory, self.rank, self.incarnation)

        def offload(device):
            rank, incarnation = run.engine_of_thread()
            incarnation.check()
            ray.get(run.memory.free.remote(rank, f"worker {rank} of {incarnation.name}"))
            return Offloaded(rank, incarnation)

        def placement(rank, workers):
            return WorkerPlacement(rank, workers, "node", (), run.training.current.name)

        def call_unless_killed(method, *arguments):
            run.training.incarnations[threading.get_ident()].check()
            result = call(method, *arguments)
            run.training.incarnations[threading.get_ident()].check()
            return result

        monkeypatch.setattr(lending, "call", call_unless_killed)
        monkeypatch.setattr(lending, "offload_states", offload)
        monkeypatch.setattr(lending, "release_memory", lambda device: None)
        monkeypatch.setattr(lending, "worker_placement", placement)
        monkeypatch.setattr(lending.torch.cuda, "current_device", lambda: 0)
        lend = lending.GpuLender._release

        def release(lender, engine, number):
            self.engines[threading.get_ident()] = engine
            return lend(lender, engine, number)

        self.engines: dict = {}
        monkeypatch.setattr(lending.GpuLender, "_release", release)

    def engine_of_thread(self):
        return self.engines[threading.get_ident()]

    # the orchestrator's `sampling` and `evaluation`

    def sample(self, number, loaded, waited_s) -> None:
        self.during.get(number, lambda run: None)(self)

    def write_references(self, number) -> None:
        raise AssertionError

    def evaluate_if_due(self, loaded) -> None:
        if loaded.version == ROUNDS and self.evaluate is not None:
            self.evaluate(self)

    def go(self) -> list[str]:
        """Runs to the end; returns what the ledger of memory noted."""
        call(self.coordinator.publish, manifest(0))
        self.training.thread.start()
        try:
            self.orchestrator.run(1)
            self.training.thread.join(WAIT_S)
            assert not self.training.thread.is_alive()
        except BaseException:
            call(self.coordinator.fail, "the driver stopped")
            self.training.thread.join(WAIT_S)
            raise
        finally:
            self.overlaps, journal = ray.get(self.memory.state.remote())
            self.colocation.close()
        assert self.overlaps == []
        assert self.training.errors == []
        return journal


def kill_sampler(run, index=0) -> None:
    ray.get(run.memory.free.remote(9, "nobody"))
    with pytest.raises(ray.exceptions.RayError):
        ray.get(run.actors[index].die.remote())


def test_samplers_and_train_workers_take_turns(monkeypatch, tmp_path):
    journal = Run(monkeypatch, tmp_path).go()
    kinds = [entry.split()[0] for entry in journal]
    turns = [kind for number, kind in enumerate(kinds) if number == 0 or kinds[number - 1] != kind]
    assert turns == ["sampler", "worker"] * ROUNDS + ["sampler"]  # the last turn evaluates


def test_a_sampler_that_dies_while_it_samples_starts_in_its_turn_and_is_waited_for(monkeypatch, tmp_path):
    run = Run(monkeypatch, tmp_path, during={2: kill_sampler}, start_s=1.0)
    run.go()


def test_a_sampler_that_dies_while_the_workers_train_starts_in_the_samplers_turn(monkeypatch, tmp_path):
    run = Run(monkeypatch, tmp_path)
    release = run.colocation.release

    def release_and_kill() -> None:
        release()
        kill_sampler(run)

    run.colocation.release = release_and_kill
    run.go()


def test_workers_that_die_while_the_next_round_is_sampled_wait_before_they_train_again(monkeypatch, tmp_path):
    """The round before has no durable checkpoint yet, so that the new workers train it again."""

    def kill_workers(run) -> None:
        run.training.kill()
        while run.training.starts < 2:
            time.sleep(0.05)
        time.sleep(0.5)

    plan = {(1, "checkpoint is late"): True}
    run = Run(monkeypatch, tmp_path, plan=plan, during={2: kill_workers})
    run.go()
    assert run.training.starts == 2


@pytest.mark.parametrize("what", ["training", "published"])
def test_workers_whose_training_fails_start_again(monkeypatch, tmp_path, what):
    run = Run(monkeypatch, tmp_path, plan={(2, what): True, (2, "checkpoint is late"): True})
    run.go()
    assert run.training.starts == 2


def test_workers_that_die_in_the_last_evaluation_train_after_it(monkeypatch, tmp_path):
    evaluated = threading.Event()

    def evaluate(run) -> None:
        evaluated.set()
        while run.training.starts < 2:
            time.sleep(0.05)
        time.sleep(0.5)

    plan = {(ROUNDS, "evaluated"): evaluated, (ROUNDS, "checkpoint is late"): True}
    run = Run(monkeypatch, tmp_path, plan=plan, evaluate=evaluate)
    run.go()
    assert run.training.starts == 2
    assert run.training.trained == ROUNDS


def test_an_update_that_fails_ends_the_run_in_the_samplers_turn(monkeypatch, tmp_path):
    run = Run(monkeypatch, tmp_path, plan={(1, "model"): "refused"})
    with pytest.raises(WeightUpdateFailed):
        run.go()
    assert run.overlaps == []
