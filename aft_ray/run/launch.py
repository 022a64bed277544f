"""The start and the end of a run: it is prepared and checked, its actors start, its rounds run, its actors end.

Invariant: whatever ends the run, the driver's half and the train workers' half end together, and the error that is
raised says why in one sentence.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError

from aft_ray.cluster.connect import connected
from aft_ray.cluster.remote_errors import traceback_message
from aft_ray.cluster.reservations import training_reservations
from aft_ray.config.run import RunConfig
from aft_ray.coordination.client import CoordinatorClient
from aft_ray.coordination.coordinator import PeerFailed, start_coordinator
from aft_ray.evaluation.during_run import EvaluationDuringRun, evaluate_version, evaluation_due
from aft_ray.observe.reporter import Reporter
from aft_ray.run.orchestrator import Orchestrator
from aft_ray.run.preflight import check_run
from aft_ray.run.resume import adopt_config, version_on_disk
from aft_ray.run.samplers import NoSamplers, RunSamplers
from aft_ray.sampling.judge_actor import check_judge, start_judge
from aft_ray.sampling.round import RoundSampling, RunFailed
from aft_ray.sampling.stream import WrittenGroups, sample_round
from aft_ray.storage.groups.group_table import GroupTable
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import CONFIG, LOGS, RunDir
from aft_ray.tasks.dataset import count_by_task, load_tokenizer, round_shares, tokenize_split
from aft_ray.tasks.response_end import response_ends

if TYPE_CHECKING:
    from aft_ray.storage.lease import HeldLock
    from aft_ray.training.launch import WorkerConfig
    from aft_ray.weights.version_manifest import VersionManifest

# Seconds that the train workers have to end after the run has failed elsewhere.
_END_TIMEOUT_S = 15.0
# Seconds between two looks at the events that the train workers have sent.
_EVENTS_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class RunData:
    """The questions of a run as token ids, rendered once, and the tokens that end a response."""

    training: GroupTable
    validation: GroupTable
    eos_token_ids: tuple[int, ...]


def run(config: RunConfig, reporter: Reporter) -> bool:
    """Runs a run to its end, from the first round that the ledger does not have as trained.

    Returns:
        False when the run was finished already.

    Raises:
        ConfigError, RunDirError, SamplersFailed, WeightUpdateFailed, PeerFailed, JudgeFailed, RunFailed: each with one
            sentence for the user.
    """
    run_dir = RunDir(config.run_dir)
    with run_dir.lock(reporter.say) as lock:
        if not run_dir.exists(CONFIG):
            check_run(config)  # a config that is refused must not become that of the run
        config, changed = adopt_config(config, run_dir)
        if changed:
            reporter.say(f"continues with {'; '.join(changed)}, which changes its steps by rounding only")
        ledger = Ledger(run_dir)
        last = config.rounds.count
        if ledger.first_untrained_round(bool(config.vft.epochs)) > last and not evaluation_due(config, run_dir, last):
            return False
        data = _prepare(config, run_dir, reporter)
        with connected(config.cluster, training_reservations(config)):
            run_on_cluster(config, run_dir, lock, ledger, reporter, data)
    return True


def _prepare(config: RunConfig, run_dir: RunDir, reporter: Reporter) -> RunData:
    """Checks the model and the judge, and renders the questions."""
    check_run(config)
    if config.samples:
        check_judge(config.feedback, run_dir)
    tokenizer = load_tokenizer(config)
    training = tokenize_split(config, "train", tokenizer)
    counts = count_by_task(training.groups)
    round_shares(config, counts, min(1, config.rounds.count))  # raises before anything starts
    validation = GroupTable.of([])
    if config.needs_samplers and config.rounds.evaluate_every:
        validation = tokenize_split(config, "validation", tokenizer).groups
    reporter.event("started", questions=len(training.groups), too_long=len(training.too_long))
    reporter.say(
        f"{len(training.groups)} training questions"
        + (f" ({', '.join(f'{count} of {name}' for name, count in counts.items())})" if len(counts) > 1 else "")
        + (f" ({len(training.too_long)} are longer than the context and left out)" if training.too_long else "")
        + f", {len(validation)} for validation; run directory {run_dir.uri()}"
    )
    return RunData(training.groups, validation, response_ends(config, tokenizer).ids)


def run_on_cluster(
    config: RunConfig, run_dir: RunDir, lock: HeldLock, ledger: Ledger, reporter: Reporter, data: RunData
) -> None:
    """Starts the actors of a run on the connected cluster, runs its rounds, and ends the actors.

    Args:
        lock: the lock of the run directory; when it is lost, the run ends.
    """
    from aft_ray.training.launch import WorkerConfig

    started = time.monotonic()
    coordinator = start_coordinator()
    client: CoordinatorClient[VersionManifest] = CoordinatorClient.of_actor(coordinator)
    lock.on_lost = client.fail
    samplers = (
        RunSamplers(config, run_dir, reporter, coordinator, data.eos_token_ids) if config.needs_samplers else None
    )
    try:
        worker = WorkerConfig(config, run_dir, coordinator, count_by_task(data.training))
        with _training(worker, client, reporter) as failures:
            try:
                first_round = ledger.first_untrained_round(bool(config.vft.epochs))
                if samplers is not None and first_round > 0:
                    samplers.wait_ready()
                _orchestrator(config, run_dir, ledger, reporter, client, samplers, data).run(first_round)
            except PeerFailed as error:
                # What Ray Train raised says more than the coordinator does.
                raise RunFailed(str(failures[0]) if failures else str(error)) from error
            except BaseException as error:
                client.fail(f"the driver stopped: {error}")
                raise
    finally:
        if samplers is not None:
            samplers.close()
    reporter.event("finished", seconds=time.monotonic() - started)


def _orchestrator(
    config: RunConfig,
    run_dir: RunDir,
    ledger: Ledger,
    reporter: Reporter,
    coordinator: CoordinatorClient[VersionManifest],
    samplers: RunSamplers | None,
    data: RunData,
) -> Orchestrator:
    """The orchestrator of a run, which samples through Ray Data and vLLM and is trained by Ray Train."""
    judge = start_judge(config.feedback, run_dir) if config.samples else None

    def stream(manifest: VersionManifest, groups: GroupTable) -> Iterator[WrittenGroups]:
        assert samplers is not None, "a run without samplers was asked to sample"
        return sample_round(config, samplers.pool, manifest, groups, run_dir, judge)

    def evaluate(manifest: VersionManifest) -> None:
        assert samplers is not None, "a run without samplers was asked to evaluate"
        evaluate_version(config, run_dir, reporter, samplers.pool, data.validation, manifest)

    return Orchestrator(
        config,
        ledger,
        coordinator,
        samplers or NoSamplers(),
        RoundSampling(config, ledger, reporter, data.training, stream, coordinator.check, judge),
        EvaluationDuringRun(config, run_dir, evaluate if data.validation else None),
        partial(version_on_disk, config, run_dir),
    )


@contextmanager
def _training(
    worker: WorkerConfig, coordinator: CoordinatorClient[VersionManifest], reporter: Reporter
) -> Iterator[list[str]]:
    """Runs `TorchTrainer.fit()` in a thread, and reports the train workers' events from another.

    Yields a list to which a failure of training is added. Both threads have ended when the context ends.
    """
    failures: list[str] = []
    ended = threading.Event()

    def train() -> None:
        from aft_ray.training.launch import fit

        try:
            fit(worker)
        except Exception as error:
            failures.append(_training_failure(error, worker.run_dir))
            with suppress(RayError):  # the driver may have left the cluster meanwhile
                coordinator.fail(failures[0])

    def report_events() -> None:
        while not ended.wait(_EVENTS_INTERVAL_S):
            _report(coordinator.drain_events(), reporter)

    threads = [threading.Thread(target=function, daemon=True) for function in (train, report_events)]
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
        # After a failure elsewhere the workers end by themselves, because the coordinator tells them.
        threads[0].join(_END_TIMEOUT_S)
        ended.set()
        threads[1].join()
        _report(coordinator.drain_events(), reporter)


def _report(events: list[dict[str, Any]], reporter: Reporter) -> None:
    """Writes the train workers' events to metrics.jsonl and shows them in the terminal."""
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
        elif event["event"] == "checkpoint":
            reporter.say(
                f"round {fields['round']}: the training state after step {fields['step']} of {fields['steps']} is "
                f"saved ({fields['bytes'] / 1e9:,.3g} GB in {fields['seconds']:.0f} s)"
            )
        elif event["event"] == "resumed":
            reporter.say(f"round {fields['round']}: training goes on after step {fields['step']} of {fields['steps']}")
        elif event["event"] == "state_damaged":
            reporter.say(f"{fields['reason']}; training goes on from the state before it")


def _training_failure(error: Exception, run_dir: RunDir) -> str:
    """Why training failed, in one sentence that says where the workers' output is."""
    cause = error
    for worker_error in getattr(error, "worker_failures", {}).values():
        cause = worker_error
    # Processes cannot print into an object store.
    where = f"{run_dir.uri(LOGS)}/trainer-*.log" if run_dir.is_local else "Ray's logs of their nodes"
    return f"training failed: {traceback_message(str(cause))} (the workers' output: {where})"
