"""A run over three hosts with a network between them, two of which are lost and replaced while it runs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from hosts import Host, hosts, hosts_missing
from tiny import tiny_config, tiny_tree

from aft_ray.observe.summary import read_events
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import RunDir
from aft_ray.tasks.dataset import load_tokenizer, questions_of_round, tokenize_split

ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(hosts_missing()), reason=f"no hosts of our own: {hosts_missing()}"),
]
# Two samplers fit on no single host, nor do two train workers beside a sampler; the first host has room for neither
# sampler, so it can be the one that stays.
CPUS = (2, 4, 4)
SAMPLER, WORKER = 2.2, 1.4
QUESTIONS = 64
# The ports are given, because a raylet that must find out the ports of its agents ends if that takes longer than 15 s.
PORTS = (
    "--dashboard-agent-grpc-port=7001", "--dashboard-agent-listen-port=7002", "--runtime-env-agent-port=7003",
    "--metrics-export-port=7004",
)  # fmt: skip


@dataclass
class Cluster:
    """Ray on some hosts, the first of which is the head."""

    hosts: list[Host]
    logs: Path
    started: dict[str, subprocess.Popen] = field(default_factory=dict)

    def start(self, index: int) -> None:
        """Starts Ray on the host. It is repeated if it fails, since Ray allows a busy machine only half a minute."""
        host, head = self.hosts[index], self.hosts[0].address
        place = ["--head", "--port=6379", "--include-dashboard=false"] if index == 0 else [f"--address={head}:6379"]
        command = [
            *RAY, "start", "--block", f"--node-ip-address={host.address}", f"--num-cpus={CPUS[index]}",
            f"--object-store-memory={128 << 20}", "--disable-usage-stats", *PORTS, *place,
        ]  # fmt: skip
        with open(self.logs / f"{host.name}.log", "a") as log:
            self.started[host.name] = subprocess.Popen(
                host.command("sh", "-c", 'until "$@"; do sleep 1; done', "ray", *command),
                env=self.environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def lose(self, host: Host) -> None:
        """Kills all processes of the host at once, as a power failure would."""
        listed = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True, check=True)
        for process in map(int, listed.stdout.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if host.name in self.started:
            self.started.pop(host.name).wait(60)

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VLLM_"))}
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return kept | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": path, "RAY_raylet_start_wait_time_s": "300"}

    def ask(self, expression: str) -> list:
        """The list that a Python expression gives on the head; `ray` in it is connected to the cluster."""
        program = (
            "import json, logging, ray\n"
            "from ray._private.state import actors\n"
            "ray.init('auto', log_to_driver=False, logging_level=logging.ERROR)\n"
            f"print('ANSWER', json.dumps({expression}))"
        )
        command = self.hosts[0].command(sys.executable, "-c", program)
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=120)
        answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
        assert answers, (done.stdout + done.stderr)[-3000:]
        return json.loads(answers[0].removeprefix("ANSWER "))

    def alive(self) -> list[str]:
        return self.ask("[node['NodeManagerAddress'] for node in ray.nodes() if node['Alive']]")

    def hosts_of(self, kind: str) -> list[Host]:
        """The hosts of the live actors of a class."""
        nodes = self.ask(
            "[{n['NodeID']: n['NodeManagerAddress'] for n in ray.nodes()}[actor['Address']['NodeID']] "
            f"for actor in actors().values() if actor['State'] == 'ALIVE' and actor['ActorClassName'] == '{kind}']"
        )
        return [host for address in nodes for host in self.hosts if host.address == address]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with hosts(len(CPUS)) as made:
        cluster = Cluster(made, tmp_path_factory.mktemp("nodes"))
        try:
            for index in range(len(CPUS)):
                cluster.start(index)
                if index == 0:
                    patiently(lambda: len(cluster.alive()) == 1, 300, "the head")
            patiently(lambda: len(cluster.alive()) == len(CPUS), 300, "all hosts")
            yield cluster
        finally:
            for host in made:
                cluster.lose(host)


def patiently(condition, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            if condition():
                return
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.5)


def events(run_dir: RunDir, name: str, **fields) -> list[dict]:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return [e for e in read_events(run_dir) if e["event"] == name and fields.items() <= e.items()]
    return []


@pytest.fixture(scope="module")
def survived(cluster, tiny_model, tmp_path_factory):
    """A run that lost a host while it sampled round 1, and another while it trained round 2.

    Its config, the hosts of its actors with what the ledger had when a host was lost, and the log of its driver.
    """
    place = tmp_path_factory.mktemp("run")
    sections = {
        "data": {"train_limit": QUESTIONS},
        "rounds": {"count": 2, "max_staleness": 0, "timeout_s": 600},
        "sampling": {
            "samplers": 2, "cpus_per_sampler": SAMPLER, "batch_size": 2, "in_flight": 2, "groups_per_file": 8,
            "max_tokens": 60, "start_timeout_s": 600,
        },
        "training": {
            "workers": 2, "cpus_per_worker": WORKER, "zero_stage": 2, "epochs": 6, "groups_per_step": 8,
            "max_failures": 6,
        },
    }  # fmt: skip
    config = tiny_config(place / "run", tiny_model, **sections)
    (place / "config.yaml").write_text(yaml.safe_dump(tiny_tree(place / "run", tiny_model, **sections)))
    run_dir, seen = RunDir(config.run_dir), {}
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), str(place / "config.yaml")]
    with open(place / "driver.log", "w") as log:
        driver = subprocess.Popen(
            cluster.hosts[0].command(*command),
            env=cluster.environment() | {"RAY_ADDRESS": f"{cluster.hosts[0].address}:6379"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def going(condition) -> bool:
        assert driver.poll() is None, (place / "driver.log").read_text()[-3000:]
        return bool(condition())

    def wait(condition, what: str) -> None:
        deadline = time.monotonic() + 900
        while not going(condition):
            assert time.monotonic() < deadline, f"{what}\n{(place / 'driver.log').read_text()[-3000:]}"
            time.sleep(0.1)

    def lose_and_replace(host: Host) -> None:
        cluster.lose(host)
        cluster.start(cluster.hosts.index(host))

    ledger = Ledger(run_dir)

    def grouped(number: int) -> int:
        ledger.refresh()
        return len(ledger.read_groups(number)) if run_dir.exists("ledger") else 0

    try:
        wait(lambda: grouped(1) > 0, "no group of round 1 came")
        seen["samplers"], seen["workers"] = cluster.hosts_of("Sampler"), cluster.hosts_of("RayTrainWorker")
        lose_and_replace(seen["samplers"][0])
        seen["sampled when lost"] = grouped(1)
        wait(lambda: grouped(2) > 0, "no group of round 2 came")
        (at, *_) = [host for host in cluster.hosts_of("RayTrainWorker") if host != cluster.hosts[0]]
        wait(lambda: events(run_dir, "step", round=2), "round 2 was not trained")
        lose_and_replace(at)
        seen["trained when lost"] = ledger.refresh() or ledger.trained_rounds()
        assert driver.wait(900) == 0, (place / "driver.log").read_text()[-3000:]
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
    return config, seen, (place / "driver.log").read_text()


def test_the_run_was_on_different_hosts(survived, cluster):
    _, seen, _ = survived
    assert len(set(seen["samplers"])) == len(set(seen["workers"])) == 2
    assert len({*seen["samplers"], *seen["workers"]}) >= 2


def test_the_hosts_were_lost_in_the_middle(survived):
    _, seen, _ = survived
    assert 0 < seen["sampled when lost"] < QUESTIONS
    assert seen["trained when lost"] == [0, 1]


def test_every_question_is_answered_and_trained_exactly_once(survived):
    config, _, log = survived
    run_dir, tokenizer = RunDir(config.run_dir), load_tokenizer(config)
    ledger = Ledger(run_dir)
    questions = tokenize_split(config, "train", tokenizer).groups
    for number in (1, 2):
        wanted = Counter(group.question.id for group in questions_of_round(config, questions, number))
        groups = ledger.read_groups(number)
        assert Counter(group.question.id for group in groups) == wanted, log
        assert {group.policy_version for group in groups} == {number - 1}
        assert {len(group.candidates) for group in groups} == {config.sampling.k}
        assert ledger.failed_questions(number) == []
    assert ledger.trained_rounds() == [0, 1, 2]
    (trained,) = events(run_dir, "trained", round=2)
    assert (trained["groups"], trained["steps"]) == (QUESTIONS, 6 * QUESTIONS // 8)
