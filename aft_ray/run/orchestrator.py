"""THE loop: in what order a round happens.

One driver conducts: it samples round after round through the samplers and the ledger, while one `TorchTrainer.fit()`
trains them as they become ready. The two meet on the board. Invariant: a round is sampled by one policy version, fixed
in the ledger before its first question is asked, and at most `max_staleness` behind the version it trains.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from ray.exceptions import RayError

from aft_ray.cluster.colocated_placement import EnginePlacement
from aft_ray.cluster.connect import connected, needs_samplers, training_placement
from aft_ray.config.loader import config_difference, dump_config
from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.coordination.colocation import Colocation
from aft_ray.coordination.coordinator import PeerFailed, call, start_coordinator
from aft_ray.evaluation.evaluator import answer_questions, unanswered
from aft_ray.evaluation.generations import generations_text
from aft_ray.evaluation.statistics.metrics import measure
from aft_ray.observe.reporter import Reporter
from aft_ray.run.preflight import check_model
from aft_ray.run.schedule import AwaitVersion, SampleRound, order_of_rounds
from aft_ray.sampling.broadcast import meet
from aft_ray.sampling.judge_actor import RemoteJudge, check_judge, start_judge
from aft_ray.sampling.sampler import UpdateReport
from aft_ray.sampling.sampler_health import HealthChange, last_line
from aft_ray.sampling.sampler_pool import SamplerPool
from aft_ray.sampling.stream import SampleCounts, count_groups, sample_round
from aft_ray.storage.lease import Hold
from aft_ray.storage.ledger import Ledger, write_group_file
from aft_ray.storage.records import Group
from aft_ray.storage.run_dir import CONFIG, EVALUATIONS, LOGS, RunDir
from aft_ray.storage.versions import read_config
from aft_ray.tasks.dataset import count_by_task, load_tokenizer, prepare, questions_of_round, round_shares
from aft_ray.training.worker import WorkerConfig, first_round, fit
from aft_ray.weights.adapter import given_manifest, stored_manifest
from aft_ray.weights.version_manifest import VersionManifest

# What a resumed run may change: it moves the same steps to other hardware.
_HARDWARE = frozenset(
    f"training.{key}"
    for key in (
        "workers",
        "cpus_per_worker",
        "gpus_per_worker",
        "tokens_per_microbatch",
        "offload_optimizer",
        "offload_parameters",
        "activation_checkpointing",
    )
)
# Seconds that the train workers get to end after the run has failed elsewhere.
_PATIENCE_S = 15.0


class RunFailed(RuntimeError):
    """A run that ended short. The message says what is missing and how to go on."""


@dataclass(slots=True)
class Orchestrator:
    """The driver's side of a run: what every step of a round needs."""

    config: RunConfig
    run_dir: RunDir
    ledger: Ledger
    reporter: Reporter
    coordinator: Any
    pool: SamplerPool | None  # none when the run neither samples nor evaluates
    judge: RemoteJudge | None
    questions: list[Group]
    validation: list[Group]
    colocation: Colocation | None = None  # with the train workers, on their GPUs

    def conduct(self) -> None:
        """All rounds, from the first that is not trained yet to the last."""
        first = first_round(self.config, self.ledger)
        self._publish_what_is_on_disk(first - 1)
        for step in order_of_rounds(first, self.config.rounds.count, self.config.rounds.max_staleness):
            if isinstance(step, AwaitVersion):
                manifest, _ = call(self.coordinator.wait_version, step.version, self.config.rounds.timeout_s)
                if self.pool is not None or self.colocation is not None:
                    self._bring_samplers_to(manifest)
                continue
            if step.round == 0 or not self.config.samples:
                self._write_references(step.round)
            else:
                manifest, waited = self._manifest_for(step)
                self._bring_samplers_to(manifest)
                self._sample(step.round, manifest, waited)
            if self.colocation is not None:
                self.colocation.end()
            call(self.coordinator.set_ready, step.round)

    @property
    def samplers(self) -> SamplerPool:
        assert self.pool is not None, "a run that needs no samplers asked for them"
        return self.pool

    def _manifest_for(self, step: SampleRound) -> tuple[VersionManifest, float]:
        """The version that samples a round: the newest within max_staleness, or the one it was begun with."""
        begun_with = self.ledger.policy_version(step.round)
        manifest, waited = call(self.coordinator.wait_version, step.version, self.config.rounds.timeout_s)
        if begun_with is not None and begun_with != manifest.version:
            manifest = self._on_disk(begun_with)
        self.ledger.record_policy_version(step.round, manifest.version)
        return manifest, waited

    def _bring_samplers_to(self, manifest: VersionManifest) -> None:
        if self.colocation is not None:
            self.pool = self.colocation.begin(manifest.version + 1)
        started = time.monotonic()
        loaded = self._meet(manifest) if manifest.broadcast is not None else []
        loaded += self.samplers.load(manifest)  # whoever holds it already says so
        slowest = max(loaded, key=lambda one: one.seconds)
        if slowest.seconds > 0:
            self.reporter.event(
                "published",
                version=manifest.version,
                seconds=time.monotonic() - started,
                bytes=manifest.bytes,
                rendezvous_s=slowest.rendezvous_s,
                fetch_s=slowest.fetch_s,
                load_s=slowest.load_s,
                prove_s=slowest.prove_s,
                probe_difference=max(one.difference for one in loaded),
            )
        if self.validation and evaluation_due(self.config, self.run_dir, manifest.version):
            self._evaluate(manifest)

    def _meet(self, manifest: VersionManifest) -> list[UpdateReport]:
        """The samplers that the trainer's stream reached."""
        met = meet(self.coordinator, self.samplers, manifest, self.config.sampling.processes_per_sampler)
        for sentence in met.missed:
            self.reporter.say(f"version {manifest.version} did not reach every engine by stream: {sentence}")
        return met.loaded

    def _sample(self, number: int, manifest: VersionManifest, waited: float) -> None:
        """Step 1 of a round: every question sampled once, labelled, and in the ledger."""
        wanted = questions_of_round(self.config, self.questions, number)
        self._open(number)
        pending = set(self.ledger.pending(number, [group.question.id for group in wanted]))
        groups = [g for g in unanswered(wanted, manifest.version) if g.question.id in pending]
        started, total = time.monotonic(), SampleCounts()
        done = len(wanted) - len(groups)
        what = f"round {number} sampling with version {manifest.version}"
        try:
            for written in (
                sample_round(self.config, self.samplers, manifest, groups, self.run_dir, self.judge) if groups else ()
            ):
                if written.file is not None:
                    self.ledger.commit(written.file)
                for parked in written.parked:
                    self.ledger.park(parked)
                call(self.coordinator.check)  # training may have failed meanwhile
                total, done = total + written.count_groups, done + written.count_groups.groups + len(written.parked)
                speed = total.tokens / (time.monotonic() - started)
                self.reporter.progress(what, done, len(wanted), f"{speed:,.0f} tokens/s, {total.pass_rate:.0%} right")
        except RayError as error:
            raise RunFailed(
                f"sampling of round {number} failed: {last_line(str(error))}; what is sampled is kept, start the same "
                f"command again to go on"
            ) from error
        seconds = time.monotonic() - started
        self._check_complete(number, wanted)
        if self.ledger.sampled(number):
            return  # sampled whole before this run was resumed
        speed = total.tokens / max(seconds, 1e-9)
        if total.groups < len(wanted):  # the rest was sampled before this run was resumed
            total = count_groups(self.ledger.read_groups(number))
        stats = _stats(total, seconds, waited, speed)
        if self.judge is not None:
            counts = self.judge.counts()
            self.reporter.event("judged", round=number, **asdict(counts))
            self.reporter.say(f"round {number}: {counts.line()}")
        closed = self.ledger.complete_sampling(number, manifest.version, stats)
        self.reporter.event(
            "sampled",
            round=number,
            version=manifest.version,
            staleness=number - 1 - manifest.version,
            parked=closed.parked,
            **stats,
        )
        self.reporter.say(
            f"round {number}: sampled {closed.groups} groups with version {manifest.version} in "
            f"{stats['seconds']:.0f} s ({stats['tokens_per_s']:,.0f} tokens/s, waited {waited:.0f} s), "
            f"{stats['pass_rate']:.1%} right, {stats['signal']:.0%} of groups with a signal"
            + (f", {closed.parked} parked" if closed.parked else "")
        )

    def _write_references(self, number: int) -> None:
        """A round that trains on reference responses alone: its groups have no candidates."""
        wanted = questions_of_round(self.config, self.questions, number)
        self._open(number)
        pending = set(self.ledger.pending(number, [group.question.id for group in wanted]))
        groups = [replace(g, policy_version=max(0, number - 1)) for g in wanted if g.question.id in pending]
        size = 64 * self.config.sampling.groups_per_file
        for start in range(0, len(groups), size):
            self.ledger.commit(write_group_file(self.run_dir, groups[start : start + size]))
        self._check_complete(number, wanted)
        if not self.ledger.sampled(number):
            self.ledger.complete_sampling(number, max(0, number - 1), {"groups": len(wanted)})

    def _open(self, number: int) -> None:
        audit = self.ledger.open_round(number)
        self.ledger.unpark(number)
        for sentence in (*audit.voided, *audit.adopted, *audit.deleted):
            self.reporter.say(f"round {number}: {sentence}")

    def _check_complete(self, number: int, wanted: list[Group]) -> None:
        if missing := self.ledger.pending(number, [group.question.id for group in wanted]):
            raise RunFailed(
                f"round {number} ended with {len(missing)} questions neither grouped nor parked, among them "
                f"{missing[0]}; start the same command again to sample them"
            )
        parked = self.ledger.parked(number)
        if len(parked) > self.config.sampling.max_parked * len(wanted):
            reason, count = Counter(one.reason for one in parked).most_common(1)[0]
            raise RunFailed(
                f"round {number}: {len(parked)} of {len(wanted)} questions could not be sampled, more than "
                f"sampling.max_parked={self.config.sampling.max_parked:g}; {count} times: {reason}. "
                f"Start the same command again to try them again"
            )

    def _evaluate(self, manifest: VersionManifest) -> None:
        """Step 5: the validation split, answered by a version that has reached the samplers."""
        version, evaluation = manifest.version, self.config.evaluation
        answered, cost = answer_questions(
            self.config,
            self.samplers,
            manifest,
            unanswered(self.validation, version),
            evaluation.during_training_k,
            1,
            lambda done, total: self.reporter.progress(f"evaluating version {version}", done, total),
        )
        result, facts = measure(answered, resamples=evaluation.resamples, seed=evaluation.seed), asdict(cost)
        name = f"validation-{version:04d}"
        self.run_dir.write_bytes(f"{EVALUATIONS}/generations-{name}.jsonl", generations_text(answered).encode())
        record = {"version": version, "split": "validation", **result.to_json(), **facts}
        self.run_dir.write_json(self.run_dir.evaluation(name), record)
        self.reporter.event("evaluated", split="validation", version=version, **facts, **result.figures())
        greedy = result.estimates["greedy"]
        by_task = "".join(f", {task} {part.estimates['greedy'].value:.1%}" for task, part in result.tasks.items())
        self.reporter.say(
            f"version {version}: {greedy.value:.1%} [{greedy.low:.1%}, {greedy.high:.1%}] of {result.questions} "
            f"validation questions right, greedy{by_task}"
        )

    def _publish_what_is_on_disk(self, version: int) -> None:
        if version > 0 or (version == 0 and self.config.vft.epochs):
            call(self.coordinator.publish, self._on_disk(version))
        elif not self.config.vft.epochs:
            # The model as it was given is version 0; engines start from it.
            call(self.coordinator.publish, VersionManifest(0, self.config.model.name, (), ()))

    def _on_disk(self, version: int) -> VersionManifest:
        if version == 0 and not self.config.vft.epochs:
            return given_manifest(self.config)
        return stored_manifest(self.config, self.run_dir, version)


def evaluation_due(config: RunConfig, run_dir: RunDir, version: int) -> bool:
    """Whether a version is to be measured on the validation split and was not yet. The last version always is."""
    every, last = config.rounds.evaluate_every, config.rounds.count
    if not every or (version % every and version != last):
        return False
    return not run_dir.exists(run_dir.evaluation(f"validation-{version:04d}"))


def run(config: RunConfig, reporter: Reporter) -> bool:
    """Trains a run to its end, from wherever it is. False when it was finished already.

    Raises ConfigError, RunDirError, SamplersFailed, WeightUpdateFailed or RunFailed: one sentence each.
    """
    run_dir = RunDir(config.run_dir)
    with run_dir.lock(reporter.say) as hold:
        if changed := adopt_config(config, run_dir):
            reporter.say(f"goes on with {'; '.join(changed)}: the same steps, up to rounding")
        ledger = Ledger(run_dir)
        last = config.rounds.count
        if first_round(config, ledger) > last and not evaluation_due(config, run_dir, last):
            return False
        check_model(config)
        if config.samples:
            check_judge(config.feedback, run_dir)
        tokenizer = load_tokenizer(config)
        training = prepare(config, "train", tokenizer)
        counts = count_by_task(training.groups)
        round_shares(config, counts, min(1, config.rounds.count))  # raises before anything starts
        validation: list[Group] = []
        if needs_samplers(config) and config.rounds.evaluate_every:
            validation = prepare(config, "validation", tokenizer).groups
        reporter.event("started", questions=len(training.groups), too_long=len(training.too_long))
        reporter.say(
            f"{len(training.groups)} training questions"
            + (f" ({', '.join(f'{count} of {name}' for name, count in counts.items())})" if len(counts) > 1 else "")
            + (f" ({len(training.too_long)} are longer than the context and left out)" if training.too_long else "")
            + f", {len(validation)} for validation; run directory {run_dir.uri()}"
        )
        with connected(config.cluster, training_placement(config)):
            _run_on_cluster(
                config, run_dir, hold, ledger, reporter, training.groups, validation, tokenizer.eos_token_id
            )
    return True


def _run_on_cluster(
    config: RunConfig,
    run_dir: RunDir,
    hold: Hold,
    ledger: Ledger,
    reporter: Reporter,
    questions: list[Group],
    validation: list[Group],
    eos_token_id: int,
) -> None:
    started = time.monotonic()
    coordinator = start_coordinator()
    hold.on_lost = lambda reason: call(coordinator.fail, reason)
    pool = colocation = None

    def start_samplers(placements: tuple[EnginePlacement, ...] | None) -> SamplerPool:
        log_dir = str(run_dir.local_path(LOGS)) if run_dir.is_local else None
        version = None if config.vft.epochs else 0
        return SamplerPool.start(
            config, config.model.name, eos_token_id, log_dir, version, _teller(reporter), placements
        )

    if needs_samplers(config) and config.sampling.colocate:
        colocation = Colocation(config, coordinator, start_samplers)
    elif needs_samplers(config):
        pool = start_samplers(None)
    try:
        with _training(WorkerConfig(config, run_dir, coordinator, count_by_task(questions)), reporter) as failures:
            try:
                if pool is not None and first_round(config, ledger) > 0:
                    pool.wait_ready()
                judge = start_judge(config.feedback, run_dir) if config.samples else None
                Orchestrator(
                    config, run_dir, ledger, reporter, coordinator, pool, judge, questions, validation, colocation
                ).conduct()
            except PeerFailed as error:
                # Training failed: what Ray Train raised says more than the board does.
                raise RunFailed(str(failures[0]) if failures else str(error)) from error
            except BaseException as error:
                call(coordinator.fail, f"the driver stopped: {error}")
                raise
    finally:
        for samplers in (pool, colocation):
            if samplers is not None:
                samplers.close()
    reporter.event("finished", seconds=time.monotonic() - started)


@contextmanager
def _training(worker: Any, reporter: Reporter) -> Iterator[list[str]]:
    """`TorchTrainer.fit()` in a thread, and another that passes the workers' events on. Ends with both."""
    failures: list[str] = []
    ended = threading.Event()

    def train() -> None:
        try:
            fit(worker)
        except Exception as error:
            failures.append(_training_failure(error, worker.run_dir))
            with suppress(RayError):  # the driver may have left the cluster meanwhile
                call(worker.coordinator.fail, failures[0])

    def listen() -> None:
        while not ended.wait(0.5):
            _pass_on(call(worker.coordinator.drain), reporter)

    threads = [threading.Thread(target=function, daemon=True) for function in (train, listen)]
    for thread in threads:
        thread.start()
    try:
        yield failures
        threads[0].join(worker.config.training.timeout_s)
        if threads[0].is_alive():
            raise RunFailed("the train workers did not end after the last round; see logs/trainer-*.log")
        if failures:
            raise RunFailed(failures[0])
    finally:
        # After a failure elsewhere the workers end by themselves, because the board says so.
        threads[0].join(_PATIENCE_S)
        ended.set()
        threads[1].join()
        _pass_on(call(worker.coordinator.drain), reporter)


def _pass_on(events: list[dict[str, Any]], reporter: Reporter) -> None:
    for event in events:
        fields = {key: value for key, value in event.items() if key != "event"}
        if event["event"] == "step":
            what = f"round {fields['round']} training"
            reporter.progress(what, fields["step"], fields["steps"], f"loss {fields['loss']:.4f}")
        reporter.event(event["event"], **fields)
        if event["event"] == "trained":
            reporter.say(
                f"round {fields['round']}: trained {fields['steps']} steps in {fields['train_s']:.0f} s "
                f"({fields['tokens_per_s']:,.0f} tokens/s, waited {fields['waited_s']:.0f} s), "
                f"loss {fields['loss']:.4f}"
            )


def _teller(reporter: Reporter) -> Callable[[HealthChange], None]:
    """Says when a sampler joins or is lost."""

    def tell(change: HealthChange) -> None:
        name = "sampler_joined" if change.reason is None else "sampler_lost"
        reporter.event(name, **asdict(change))
        reporter.say(change.line)

    return tell


def _training_failure(error: Exception, run_dir: RunDir) -> str:
    cause = error
    for worker_error in getattr(error, "worker_failures", {}).values():
        cause = worker_error
    # Processes cannot print into an object store.
    where = f"{run_dir.uri(LOGS)}/trainer-*.log" if run_dir.is_local else "Ray's logs of their nodes"
    return f"training failed: {last_line(str(cause))} (the workers' output: {where})"


def _stats(total: Any, seconds: float, waited: float, tokens_per_s: float) -> dict[str, Any]:
    return {
        "groups": total.groups,
        "seconds": seconds,
        "waited_s": waited,
        "tokens": total.tokens,
        "tokens_per_s": tokens_per_s,
        "pass_rate": total.pass_rate,
        "signal": total.with_signal / max(1, total.groups),
        "right_score": total.right_score / total.right if total.right else None,
        "wrong_score": total.wrong_score / total.wrong if total.wrong else None,
        "undecided": total.undecided,
        "truncated": total.truncated,
    }


def adopt_config(config: RunConfig, run_dir: RunDir) -> list[str]:
    """Writes the resolved config down; on an existing run, refuses one that differs in more than rounding.

    Where and on how much hardware a run goes on may change. Returns the lines `key: old -> new` of such changes.
    """
    if not run_dir.exists(CONFIG):
        run_dir.write_bytes(CONFIG, dump_config(config).encode())
        return []
    difference = config_difference(read_config(run_dir), config)
    difference = [line for line in difference if not line.startswith(("cluster.", "run_dir:"))]
    changed = [line for line in difference if line.partition(":")[0] in _HARDWARE]
    if refused := [line for line in difference if line not in changed]:
        raise ConfigError(
            f"{run_dir.uri()} was started with another config ({'; '.join(refused)}); give the run the config it "
            f"was started with, or another run_dir"
        )
    return changed
