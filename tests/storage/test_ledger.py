import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from aft_ray.storage.groups.group_files import GroupFile, write_group_file
from aft_ray.storage.ledger import CheckpointRecord, FailedQuestion, Ledger, SampledRound
from aft_ray.storage.records import Candidate, Group, Question, Verdict
from aft_ray.storage.run_dir import RunDir, RunDirError

QUESTIONS = [f"q{i}" for i in range(8)]


def group(id: str, content: str = "x", round: int = 1, policy_version: int = 0) -> Group:
    candidates = [
        Candidate([1, 2, 3], -1.5, "stop", content, "4", Verdict.RIGHT, 1.0),
        Candidate([4], -0.25, "length", "", None, Verdict.UNDECIDED),
    ]
    return Group(round, policy_version, Question(id, "2 + 2?", "#### 4", "4", "arithmetic"), [7, 8], [9], candidates)


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position // 8 % len(data)] ^= 1 << position % 8
    path.write_bytes(data)


def test_groups_are_read_back_as_they_were_written(run_dir):
    ledger = Ledger(run_dir)
    groups = [group("b"), group("a"), group("c")]
    assert ledger.commit(write_group_file(run_dir, groups[:2]))
    assert ledger.commit(write_group_file(run_dir, groups[2:]))
    assert ledger.read_groups(1) == sorted(groups, key=lambda g: g.question.id)
    assert ledger.read_groups(1, ["b"]) == [group("b")]
    assert ledger.read_groups(2) == []
    assert ledger.pending(1, ["d", "c", "e"]) == ["d", "e"]
    assert Ledger(run_dir).read_groups(1) == ledger.read_groups(1)
    with pytest.raises(KeyError, match="no group of 1 questions, among them 'z'"):
        ledger.read_groups(1, ["a", "z"])


def test_a_question_is_committed_once_even_if_two_files_have_it(run_dir):
    ledger = Ledger(run_dir)
    first, second = write_group_file(run_dir, [group("a"), group("b")]), write_group_file(run_dir, [group("b", "y")])
    assert ledger.commit(first)
    assert not ledger.commit(second)
    assert not run_dir.exists(second.path)
    assert not ledger.commit(first)
    assert run_dir.exists(first.path)
    assert ledger.commit(write_group_file(run_dir, [group("b", round=2)]))  # another round is another matter


def test_a_task_run_again_keeps_the_file_it_wrote(run_dir):
    ledger = Ledger(run_dir)
    first = write_group_file(run_dir, [group("a"), group("b")])
    ledger.commit(first)
    again = write_group_file(run_dir, [group("b", "other"), group("a", "other")])
    assert again == first
    assert [g.candidates[0].text for g in ledger.read_groups(1)] == ["x", "x"]
    run_dir.local_path(first.path).write_bytes(b"PAR1 torn")
    assert write_group_file(run_dir, [group("a"), group("b")]) == first


def test_wrong_files_are_refused(run_dir):
    for groups in ([], [group("a"), group("a")], [group("a"), group("b", round=2)]):
        with pytest.raises(ValueError, match="group"):
            write_group_file(run_dir, groups)


def test_failed_questions_are_pending_again_when_they_are_retried(run_dir):
    ledger = Ledger(run_dir)
    ledger.record_failed(FailedQuestion(1, "a", "the sampler died three times", 3))
    assert ledger.pending(1, ["a", "b"]) == ["b"]
    assert Ledger(run_dir).failed_questions(1) == [FailedQuestion(1, "a", "the sampler died three times", 3)]
    ledger.retry_failed(1)
    assert Ledger(run_dir).pending(1, ["a", "b"]) == ["a", "b"]
    ledger.record_failed(FailedQuestion(1, "a", "again", 3))
    assert ledger.commit(write_group_file(run_dir, [group("a")]))
    assert ledger.failed_questions(1) == []


def test_a_sampled_round_is_incomplete_again_when_it_loses_a_file(run_dir):
    ledger = Ledger(run_dir)
    file = write_group_file(run_dir, [group("a")])
    ledger.commit(file)
    ledger.record_failed(FailedQuestion(1, "b", "no answer", 3))
    closed = ledger.complete_sampling(1, 0, {"tokens": 12, 7: 0.5})
    assert closed == SampledRound(1, 0, 1, 1, {"tokens": 12, 7: 0.5})
    assert Ledger(run_dir).sampled(1) == SampledRound(1, 0, 1, 1, {"tokens": 12, "7": 0.5})
    assert Ledger(run_dir).corrupt_entries == []
    run_dir.delete(file.path)
    audit = ledger.open_round(1)
    assert audit.groups == 0
    assert f"{run_dir.uri(file.path)} is missing; its 1 questions are sampled again" in audit.voided
    assert ledger.sampled(1) is None
    assert Ledger(run_dir).pending(1, ["a", "b"]) == ["a"]


def test_the_policy_version_of_a_round_is_written_once(run_dir):
    ledger = Ledger(run_dir)
    assert ledger.policy_version(1) is None
    ledger.record_policy_version(1, 0)
    ledger.record_policy_version(1, 0)
    assert Ledger(run_dir).policy_version(1) == 0
    with pytest.raises(ValueError, match="round 1 is being sampled with policy version 0, not 1"):
        ledger.record_policy_version(1, 1)


def test_the_ledger_of_an_earlier_release_is_read(run_dir):
    entries = [
        ("sampling", {"body": {"attempts": 3, "question_id": "a", "reason": "no answer", "round": 1}, "kind": "park"}),
        ("sampling", {"body": {"round": 1}, "kind": "unpark"}),
        ("sampling", {"body": {"attempts": 3, "question_id": "b", "reason": "no answer", "round": 1}, "kind": "park"}),
        (
            "sampling",
            {
                "body": {"groups": 0, "parked": 1, "policy_version": 0, "round": 1, "stats": {"tokens": 12}},
                "kind": "sampled",
            },
        ),
    ]
    for number, (log, entry) in enumerate(entries):
        payload = json.dumps({"kind": entry["kind"], "body": entry["body"]}, sort_keys=True)
        data = json.dumps({**entry, "sha256": hashlib.sha256(payload.encode()).hexdigest()}, sort_keys=True).encode()
        run_dir.write_bytes(f"ledger/{log}-{number:08d}-{hashlib.sha256(data).hexdigest()[:8]}.json", data)
    ledger = Ledger(run_dir)
    assert ledger.corrupt_entries == []
    assert ledger.failed_questions(1) == [FailedQuestion(1, "b", "no answer", 3)]
    assert ledger.sampled(1) == SampledRound(1, 0, 0, 1, {"tokens": 12})
    names = run_dir.listdir("ledger")
    again = Ledger(RunDir(run_dir.local_path("again")))
    again.record_failed(FailedQuestion(1, "a", "no answer", 3))
    again.retry_failed(1)
    again.record_failed(FailedQuestion(1, "b", "no answer", 3))
    again.complete_sampling(1, 0, {"tokens": 12})
    assert again.run_dir.listdir("ledger") == names  # the names contain digests, so the contents are the same, too


def test_training_begins_with_the_first_round_that_is_not_trained(run_dir):
    ledger = Ledger(run_dir)
    assert (ledger.first_untrained_round(has_vft=True), ledger.first_untrained_round(has_vft=False)) == (0, 1)
    run_dir.write_bytes("c/shard", b"1")
    run_dir.write_manifest("c", run_dir.hash_files("c"))
    ledger.record_checkpoint(CheckpointRecord(2, 3, "c", True))
    assert ledger.first_untrained_round(has_vft=True) == 3
    run_dir.delete("c")
    assert ledger.first_untrained_round(has_vft=True) == 0


def record_state(ledger, number, step=None):
    path = ledger.run_dir.checkpoint(number, step)
    ledger.run_dir.write_bytes(f"{path}/shard", b"1")
    ledger.run_dir.write_manifest(path, ledger.run_dir.hash_files(path))
    record = CheckpointRecord(number, step or 10, path, complete=step is None)
    ledger.record_checkpoint(record)
    return record


def test_a_round_with_a_training_state_inside_it_is_the_next_one_and_is_not_trained(run_dir):
    ledger = Ledger(run_dir)
    inside_vft = record_state(ledger, 0, 4)
    assert ledger.first_untrained_round(has_vft=True) == inside_vft.next_round == 0
    assert ledger.trained_rounds() == []
    after_vft = record_state(ledger, 0)
    assert ledger.first_untrained_round(has_vft=True) == after_vft.next_round == 1
    for step in (3, 6):
        inside = record_state(ledger, 1, step)
    ledger = Ledger(run_dir)
    assert ledger.last_checkpoint() == inside == CheckpointRecord(1, 6, "rounds/0001/checkpoint-000006", False)
    assert ledger.first_untrained_round(has_vft=True) == ledger.first_untrained_round(has_vft=False) == 1
    assert ledger.trained_rounds() == [0]


def test_the_state_before_a_damaged_one_is_the_last(run_dir):
    ledger = Ledger(run_dir)
    after, first, second = record_state(ledger, 1), record_state(ledger, 2, 3), record_state(ledger, 2, 6)
    assert ledger.last_checkpoint() == second
    assert ledger.last_checkpoint({second.checkpoint}) == first
    assert ledger.last_checkpoint({second.checkpoint, first.checkpoint}) == after
    assert ledger.last_checkpoint({second.checkpoint, first.checkpoint, after.checkpoint}) is None


def test_training_states(run_dir):
    ledger = Ledger(run_dir)
    half = CheckpointRecord(1, 5, "rounds/0001/checkpoint/5", False)
    with pytest.raises(RunDirError, match="has no manifest"):
        ledger.record_checkpoint(half)
    assert ledger.last_checkpoint() is None
    done = CheckpointRecord(1, 10, "rounds/0001/checkpoint/10", True, {"loss": 0.5})
    for trained in (half, done):
        run_dir.write_bytes(f"{trained.checkpoint}/shard", b"1")
        run_dir.write_manifest(trained.checkpoint, run_dir.hash_files(trained.checkpoint))
        ledger.record_checkpoint(trained)
    assert Ledger(run_dir).last_checkpoint() == done
    assert Ledger(run_dir).trained_rounds() == [1]
    run_dir.delete(done.checkpoint)
    assert ledger.last_checkpoint() == half
    assert ledger.checkpoints() == [half, done]


def test_both_writers_see_each_other_after_a_refresh(run_dir):
    orchestrator, trainer = Ledger(run_dir), Ledger(run_dir)
    orchestrator.commit(write_group_file(run_dir, [group("a")]))
    run_dir.write_bytes("c/shard", b"1")
    run_dir.write_manifest("c", run_dir.hash_files("c"))
    trainer.record_checkpoint(CheckpointRecord(0, 3, "c", True))
    assert trainer.read_groups(1) == []
    trainer.refresh()
    orchestrator.refresh()
    assert trainer.read_groups(1) == [group("a")]
    assert orchestrator.trained_rounds() == [0]


def test_a_second_driver_overwrites_nothing(run_dir):
    one, two = Ledger(run_dir), Ledger(run_dir)
    assert one.commit(write_group_file(run_dir, [group("a")]))
    assert two.commit(write_group_file(run_dir, [group("b")]))
    assert [g.question.id for g in Ledger(run_dir).read_groups(1)] == ["a", "b"]


def test_of_two_drivers_that_commit_the_same_question_the_first_counts(run_dir):
    one, two = Ledger(run_dir), Ledger(run_dir)
    two.record_policy_version(1, 0)  # so that the number of its next entry is the higher one
    assert one.commit(write_group_file(run_dir, [group("a", "first")]))
    assert two.commit(write_group_file(run_dir, [group("a", "second"), group("b")]))
    ledger = Ledger(run_dir)
    assert ledger.read_groups(1) == [group("a", "first")]
    assert len(ledger.open_round(1).deleted) == 1
    assert ledger.pending(1, ["a", "b"]) == ["b"]


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10**6))
def test_any_flipped_bit_of_an_entry_is_detected_and_named(tmp_path_factory, position):
    run_dir = RunDir(tmp_path_factory.mktemp("entry"))
    Ledger(run_dir).record_failed(FailedQuestion(1, "a", "reason", 3))
    [name] = run_dir.listdir("ledger")
    flip(run_dir.local_path(f"ledger/{name}"), position)
    ledger = Ledger(run_dir)
    assert ledger.corrupt_entries == [run_dir.uri(f"ledger/{name}.corrupt")]
    assert ledger.failed_questions(1) == []
    ledger.record_failed(FailedQuestion(1, "b", "reason", 3))
    assert [p.question_id for p in Ledger(run_dir).failed_questions(1)] == ["b"]


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10**6), truncate=st.booleans())
def test_any_damage_to_a_committed_file_is_detected_and_named(tmp_path_factory, position, truncate):
    run_dir = RunDir(tmp_path_factory.mktemp("file"))
    ledger = Ledger(run_dir)
    file = write_group_file(run_dir, [group("a"), group("b")])
    ledger.commit(file)
    path = run_dir.local_path(file.path)
    if truncate:
        path.write_bytes(path.read_bytes()[: position % path.stat().st_size])
    else:
        flip(path, position)
    with pytest.raises(RunDirError, match=rf"{path.name} is corrupted.*start the run again"):
        ledger.read_groups(1)
    audit = Ledger(run_dir).open_round(1)
    assert path.name in audit.voided[0]
    assert not path.exists()
    assert Ledger(run_dir).pending(1, ["a", "b"]) == ["a", "b"]


@settings(max_examples=100, deadline=None)
@given(position=st.integers(0, 10**6))
def test_a_damaged_uncommitted_file_is_never_adopted_with_other_contents(tmp_path_factory, position):
    run_dir = RunDir(tmp_path_factory.mktemp("orphan"))
    file = write_group_file(run_dir, [group("a"), group("b")])
    flip(run_dir.local_path(file.path), position)
    ledger = Ledger(run_dir)
    audit = ledger.open_round(1)
    assert len(audit.adopted) + len(audit.deleted) == 1
    if audit.adopted:
        assert ledger.read_groups(1) == [group("a"), group("b")]


def test_an_uncommitted_file_is_adopted_unless_its_weights_or_questions_are_others(run_dir):
    ledger = Ledger(run_dir)
    ledger.record_policy_version(1, 0)
    good = write_group_file(run_dir, [group("a")])
    stale = write_group_file(run_dir, [group("b", policy_version=1)])
    run_dir.write_bytes(f"{run_dir.groups(1)}/.x.parquet.1.tmp", b"half")
    audit = Ledger(run_dir).open_round(1)
    assert good.path in audit.adopted[0]
    assert stale.path in audit.deleted[0]
    assert [path.name for path in run_dir.local_path(run_dir.groups(1)).iterdir()] == [Path(good.path).name]
    assert Ledger(run_dir).open_round(1).groups == 1


def test_an_uncommitted_file_with_a_damaged_footer_is_not_adopted(run_dir):
    # The pages are as written; the schema, which Parquet keeps no checksum of, calls the ids bytes.
    file = write_group_file(run_dir, [group("a")])
    path = run_dir.local_path(file.path)
    table = pq.read_table(path)
    fields = [pa.field(f.name, pa.binary() if f.name == "id" else f.type) for f in table.schema.field("question").type]
    question = table["question"].cast(pa.struct(fields))
    pq.write_table(table.set_column(table.column_names.index("question"), "question", question), path)
    assert len(Ledger(run_dir).open_round(1).deleted) == 1


def test_pandas_and_datasets_read_the_files_as_they_are(run_dir, tmp_path):
    import datasets

    ledger = Ledger(run_dir)
    ledger.commit(write_group_file(run_dir, [group("a"), group("b")]))
    ledger.commit(write_group_file(run_dir, [group("c")]))
    folder = run_dir.local_path(run_dir.groups(1))
    frame = pandas.read_parquet(folder)
    assert sorted(question["id"] for question in frame["question"]) == ["a", "b", "c"]
    assert {len(candidates) for candidates in frame["candidates"]} == {2}
    files = str(folder / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(row["question"]["id"] for row in loaded) == ["a", "b", "c"]
    assert list(loaded[0]["candidates"][0]["token_ids"]) == [1, 2, 3]


# ── whatever happens, in whatever order ──────────────────────────────────────────────────────────────────────────


class AnyOrder(RuleBasedStateMachine):
    """Writes, commits, restarts and damage in any order, on one round; checked at every restart."""

    @initialize()
    def start(self):
        self.root = tempfile.mkdtemp()
        self.run_dir = RunDir(self.root)
        self.ledger = Ledger(self.run_dir)
        self.written: set[tuple[str, str]] = set()  # every (question, content) that was ever sampled
        self.files: list[GroupFile] = []
        self.durable: set[str] = set()  # committed, and not damaged since
        self.damaged: set[str] = set()
        self.other = group("q0", "other round", round=2)
        self.ledger.commit(write_group_file(self.run_dir, [self.other]))

    def teardown(self):
        if hasattr(self, "root"):
            self.restart()
            shutil.rmtree(self.root)

    @rule(ids=st.sets(st.sampled_from(QUESTIONS), min_size=1, max_size=3), commit=st.booleans())
    def write(self, ids, commit):
        content = str(len(self.files))
        self.written |= {(id, content) for id in ids}
        file = write_group_file(self.run_dir, [group(id, content) for id in ids])
        self.files.append(file)
        if commit:
            self.commit(file)

    def commit(self, file):
        free = self.ledger.pending(1, file.question_ids) + [p.question_id for p in self.ledger.failed_questions(1)]
        committed = self.ledger.commit(file)
        assert not committed or set(file.question_ids) <= set(free)
        if committed and file.path not in self.damaged:
            self.durable |= set(file.question_ids)

    @precondition(lambda self: self.files)
    @rule(choice=st.randoms(use_true_random=False))
    def commit_again(self, choice):
        file = choice.choice(self.files)
        if self.run_dir.exists(file.path):
            self.commit(file)

    @rule(id=st.sampled_from(QUESTIONS))
    def fail(self, id):
        self.ledger.record_failed(FailedQuestion(1, id, "reason", 3))
        assert id not in self.ledger.pending(1, QUESTIONS)

    @rule()
    def retry_failed(self):
        self.ledger.retry_failed(1)
        assert self.ledger.failed_questions(1) == []

    @rule(choice=st.randoms(use_true_random=False), how=st.sampled_from(["flip", "truncate", "delete"]))
    def damage_a_file(self, choice, how):
        names = self.run_dir.listdir(self.run_dir.groups(1))
        if not names:
            return
        path = f"{self.run_dir.groups(1)}/{choice.choice(names)}"
        self._damage(path, choice, how)
        self.damaged.add(path)
        for file in self.files:
            if file.path == path:
                self.durable -= set(file.question_ids)

    @rule(choice=st.randoms(use_true_random=False), how=st.sampled_from(["flip", "truncate", "delete"]))
    def damage_an_entry(self, choice, how):
        names = [name for name in self.run_dir.listdir("ledger") if name.endswith(".json")]
        names = [name for name in names if b'"round": 2' not in self.run_dir.read_bytes(f"ledger/{name}")]
        if names:
            self._damage(f"ledger/{choice.choice(names)}", choice, how)
            self.durable.clear()  # the group may be sampled again; that it counts once is what must hold

    def _damage(self, path, choice, how):
        file = self.run_dir.local_path(path)
        if how == "delete":
            file.unlink()
        elif how == "truncate":
            file.write_bytes(file.read_bytes()[: choice.randrange(max(1, file.stat().st_size))])
        elif file.stat().st_size:
            flip(file, choice.randrange(8 * file.stat().st_size))

    @rule()
    def leave_a_half_written_file(self):
        self.run_dir.write_bytes(f"{self.run_dir.groups(1)}/.half.parquet.0.tmp", b"PAR1")

    @rule()
    def read(self):
        problem = ""
        try:
            self._check_groups()
        except RunDirError as error:
            problem = str(error)
        assert not problem or any(path in problem for path in self.damaged)

    @rule()
    def restart(self):
        self.ledger = Ledger(self.run_dir)
        audit = self.ledger.open_round(1)
        self.damaged.clear()
        ids = self._check_groups()
        assert audit.groups == len(ids)
        assert self.durable <= set(ids)
        failed = {failed.question_id for failed in self.ledger.failed_questions(1)}
        assert set(self.ledger.pending(1, QUESTIONS)) == set(QUESTIONS) - set(ids) - failed
        committed = {Path(file.path).name for file in self.ledger.group_files(1)}
        folder = self.run_dir.local_path(self.run_dir.groups(1))
        assert {path.name for path in folder.glob("*")} | {path.name for path in folder.glob(".*")} == committed
        assert self.ledger.read_groups(2) == [self.other]
        again = Ledger(self.run_dir)
        assert (list(again.group_files(1)), again.failed_questions(1)) == (
            list(self.ledger.group_files(1)),
            self.ledger.failed_questions(1),
        )

    def _check_groups(self):
        groups = self.ledger.read_groups(1)
        ids = [g.question.id for g in groups]
        assert len(set(ids)) == len(ids)
        for g in groups:
            content = g.candidates[0].text
            assert (g.question.id, content) in self.written
            assert g == group(g.question.id, content)
        return ids


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


SAMPLE_THE_ROUND = """
import sys
from aft_ray.storage.groups.group_files import write_group_file
from aft_ray.storage.ledger import FailedQuestion, Ledger
from aft_ray.storage.run_dir import RunDir
from tests.storage.test_ledger import group
run_dir = RunDir(sys.argv[1])
with run_dir.lock():
    ledger = Ledger(run_dir)
    ledger.open_round(1)
    ledger.retry_failed(1)
    print("opened", flush=True)
    ids = ledger.pending(1, [f"{i:03d}" for i in range(120)])
    for i in range(0, len(ids), 3):
        assert ledger.commit(write_group_file(run_dir, [group(id, sys.argv[2]) for id in ids[i : i + 3]]))
        if i % 9 == 0:
            ledger.record_failed(FailedQuestion(1, f"failed-{i}", "reason", 3))
    ledger.complete_sampling(1, 0, {})
"""


def test_a_driver_killed_again_and_again_groups_every_question_once(tmp_path):
    run_dir, chance = RunDir(tmp_path), random.Random(0)
    ids = [f"{i:03d}" for i in range(120)]
    kills = 0
    for attempt in range(60):
        code = [sys.executable, "-c", SAMPLE_THE_ROUND, str(tmp_path), str(attempt)]
        driver = subprocess.Popen(code, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE)
        assert driver.stdout.readline() == b"opened\n"
        if kills < 6:
            time.sleep(chance.uniform(0.0, 0.06))
            driver.send_signal(signal.SIGKILL)
            kills += 1
        driver.communicate()
        ledger = Ledger(run_dir)
        assert ledger.corrupt_entries == []
        found = [g.question.id for g in ledger.read_groups(1)]
        assert len(set(found)) == len(found)
        if ledger.sampled(1):
            break
    assert kills > 1
    assert [g.question.id for g in Ledger(run_dir).read_groups(1)] == ids
    frame = pandas.read_parquet(run_dir.local_path(run_dir.groups(1)))
    assert sorted(question["id"] for question in frame["question"]) == ids
