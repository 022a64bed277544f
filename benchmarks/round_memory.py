"""Claim: the memory of a train worker and of the driver hardly grows with the number of questions in a round.

Rounds of different sizes are written with generated questions, each with two candidates, which are short unless
`--tokens` says otherwise. For each of them a rank
is one process: it reads the ledger, plans every step of the round for 8 ranks, and reads its share of each. The driver
is another: it holds the questions of the run, reads the ledger, finds out what is pending, and makes every block that
would go to the samplers. The peer is a process that reads all groups of the round into a list.

What is measured is the most anonymous memory of a process, less what it has after its imports. Pages of the mapped file
of questions are not in it, since the kernel takes them back when memory is short.

    python benchmarks/round_memory.py                        # 1,000 to 1,000,000 questions; about 4 minutes, 0.4 GB
    python benchmarks/round_memory.py --questions 2000 --tokens 8000    # how many of the bytes a rank reads

The last line is one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import typer

from aft_ray.objectives import build_objective
from aft_ray.storage.groups.group_files import write_group_file
from aft_ray.storage.groups.group_table import GroupTable
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.records import Candidate, Group, Question, Verdict
from aft_ray.storage.run_dir import RunDir
from aft_ray.training.batching import plan_step, training_order
from aft_ray.training.round_groups import RoundGroups

RANKS, GROUPS_PER_STEP, BUDGET = 8, 256, 16_384
GROUPS_PER_FILE, QUESTIONS_PER_BLOCK = 256, 16
# The peer would need ten gigabytes for more.
MOST_FOR_PEER = 100_000
LOOK_EVERY_S = 0.02


def question(number: int, response: int) -> Group:
    """A question of round 1, with two candidates of about `response` tokens; 0: with none.

    Lengths and tokens depend on the number of the question.
    """
    chance = np.random.default_rng(number)
    prompt, reference = chance.integers(8, 24, 2).tolist()
    right, wrong = chance.integers(response // 2, response * 3 // 2 + 1, 2).tolist()
    tokens = chance.integers(0, 32_000, prompt + reference + right + wrong).tolist()
    parts = np.cumsum([prompt, reference, right])
    sampled = [
        Candidate(tokens[parts[1] : parts[2]], -9.5, "stop", "right " * (right // 2), "4", Verdict.RIGHT, 1.0),
        Candidate(tokens[parts[2] :], -12.5, "stop", "wrong " * (wrong // 2), "5", Verdict.WRONG, 0.0),
    ]
    asked = Question(f"generated-train-{number:08d}", "a question " * 6, "#### 4", "4", "generated")
    return Group(1, 0, asked, tokens[:prompt], tokens[prompt : parts[1]], sampled if response else [])


def write_round(root: str, count: int, response: int) -> None:
    """Writes a round in the order of training, as sampling does."""
    run_dir = RunDir(root)
    ledger = Ledger(run_dir)
    order = training_order([f"generated-train-{number:08d}" for number in range(count)], 0, 1, 0)
    for start in range(0, count, GROUPS_PER_FILE):
        numbers = order[start : start + GROUPS_PER_FILE].tolist()
        assert ledger.commit(write_group_file(run_dir, [question(number, response) for number in numbers]))


def train_rank(root: str, count: int) -> dict[str, float]:
    """Plans all steps of the round and reads the share of one rank."""
    started = time.process_time()
    ledger = Ledger(RunDir(root))
    replayed = time.process_time() - started
    groups = RoundGroups(ledger, 1, build_objective("dpo"))
    planned = read = 0.0
    own_groups = 0
    order = training_order(groups.ids, 0, 1, 0)
    for first in range(0, len(order), GROUPS_PER_STEP):
        chosen = order[first : first + GROUPS_PER_STEP]
        began = time.process_time()
        share = plan_step(groups.sizes(chosen), ranks=RANKS, budget=BUDGET).shares[0]
        between = time.process_time()
        own_groups += len(groups.read(chosen[sorted(index for batch in share for index in batch.groups)]))
        planned, read = planned + between - began, read + time.process_time() - between
    size = sum(path.stat().st_size for path in Path(root, "rounds/0001/groups").iterdir())
    return {
        "replay_s": replayed,
        "plan_s": planned,
        "read_s": read,
        "share_of_groups": own_groups / count,
        "share_of_bytes": groups.bytes_read / size,
    }


def drive(root: str, count: int) -> dict[str, float]:
    """Does the driver's bookkeeping for a round that is sampled, and then what it does before it is."""
    questions = GroupTable.of(question(number, 0) for number in range(count)).sorted_by_id()
    ledger = Ledger(RunDir(root))
    assert not len(ledger.pending_indexes(1, questions.ids))
    blocks = 0
    pending = questions.select(ledger.pending_indexes(2, questions.ids)).of_round(2, 1)
    pending = pending.select(training_order(pending.ids, 0, 2, 0))
    for start in range(0, len(pending), QUESTIONS_PER_BLOCK):
        blocks += pending.block(start, QUESTIONS_PER_BLOCK).num_rows
    assert blocks == count
    return {}


def read_all(root: str, count: int) -> dict[str, float]:
    """Reads all groups into a list, as a rank that holds the whole round does."""
    assert len(Ledger(RunDir(root)).read_groups(1)) == count
    return {}


PROCESSES: dict[str, Callable[[str, int], dict[str, float]]] = {"rank": train_rank, "driver": drive, "list": read_all}


def anonymous_mb() -> float:
    """Anonymous memory of this process that is resident now, MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1e3


def measure(process: str, root: str, count: int) -> dict[str, float]:
    """Runs one of `PROCESSES` in this process. Returns its figures and the most memory that it took, MB."""
    before, most, ended = anonymous_mb(), [0.0], threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_EVERY_S):
            most[0] = max(most[0], anonymous_mb())

    watch = threading.Thread(target=look)
    watch.start()
    started = time.process_time()
    figures = PROCESSES[process](root, count)
    ended.set()
    watch.join()
    return {"mb": max(most[0], anonymous_mb()) - before, "cpu_s": time.process_time() - started, **figures}


def in_own_process(process: str, root: str, count: int) -> dict[str, float]:
    """What `measure` gives in a new process."""
    command = [sys.executable, __file__, "--process", process, "--root", root, "--questions", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{process} of {count} questions failed: {done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def results(questions: list[int], response: int) -> Iterator[dict[str, float]]:
    """The figures of each size, which are printed as they come."""
    print("questions | rank, MB | driver, MB | all as a list, MB | bytes read / share | replay, plan, read: CPU s")
    for count in questions:
        with tempfile.TemporaryDirectory(prefix="aft-ray-round-memory-") as root:
            write_round(root, count, response)
            rank, driver = in_own_process("rank", root, count), in_own_process("driver", root, count)
            peer = in_own_process("list", root, count)["mb"] if count <= MOST_FOR_PEER else None
        ratio = rank["share_of_bytes"] / rank["share_of_groups"]
        print(
            f"{count:,} | {rank['mb']:.0f} | {driver['mb']:.0f} | {'' if peer is None else f'{peer:.0f}'} | "
            f"{ratio:.2f} | {rank['replay_s']:.1f}, {rank['plan_s']:.1f}, {rank['read_s']:.1f}",
            flush=True,
        )
        yield {"questions": count, "rank_mb": rank["mb"], "driver_mb": driver["mb"], "bytes_over_share": ratio} | (
            {} if peer is None else {"list_mb": peer}
        )


def main(
    questions: Annotated[list[int] | None, typer.Option(help="questions of a round; may be repeated")] = None,
    tokens: Annotated[int, typer.Option(help="mean length of a candidate")] = 16,
    process: Annotated[str | None, typer.Option(hidden=True)] = None,
    root: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure the memory of a rank and of the driver for rounds of different sizes."""
    sizes = questions or [1_000, 10_000, 100_000, 1_000_000]
    if process is not None and root is not None:
        print(json.dumps(measure(process, root, sizes[0])))
        return
    found = list(results(sizes, tokens))
    first, last = found[0], found[-1]
    more = max(1, last["questions"] - first["questions"])
    bytes_each = {
        f"{who}_bytes_per_question": 1e6 * (last[f"{who}_mb"] - first[f"{who}_mb"]) / more for who in ("rank", "driver")
    }
    print(json.dumps({**bytes_each, "rounds": found}))


if __name__ == "__main__":
    typer.run(main)
