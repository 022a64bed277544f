"""Rounds that leave questions out: decided from the ledger, recorded once, and the same after any interruption."""

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config

from aft_ray.observe.summary import rounds_table, state_lines
from aft_ray.sampling.counts import count_groups
from aft_ray.sampling.round import RoundSampling
from aft_ray.sampling.stream import WrittenGroups
from aft_ray.storage.groups.group_files import write_group_file
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.records import Candidate, Group, Question, Verdict
from aft_ray.storage.run_dir import RunDir
from aft_ray.weights.version_manifest import VersionManifest

IDS = [f"q{number:02d}" for number in range(24)]
EASY = frozenset(IDS[:16])  # questions to which every answer is right
ROUNDS = 4


class Killed(RuntimeError):
    """The driver dies here."""


class Reporter:
    def __init__(self):
        self.events, self.lines = [], []

    def say(self, text):
        self.lines.append(text)

    def event(self, name, **fields):
        self.events.append({"event": name, **fields})

    def progress(self, what, done, total, note=""):
        pass


class Run:
    """The sampling of a run whose answers are scripted."""

    def __init__(self, place, easy=EASY, **adaptive):
        rules = {"skip_after": 1, "ask_probability": 0.4, "min_ask_probability": 0.2} | adaptive
        self.config = tiny_config(
            place,
            place / "model",
            rounds={"count": ROUNDS},
            sampling={"adaptive": rules},
            training={"groups_per_step": 4},
        )
        self.run_dir, self.asked, self.reporter = RunDir(str(place)), [], Reporter()
        self.easy = easy

    def sample(self, number, die_after=10**6):
        """Samples a round in a new driver, which dies after so many files."""
        files = 0

        def stream(manifest, groups):
            nonlocal files
            for start in range(0, len(groups), 5):
                if files == die_after:
                    raise Killed
                part = [answered(group, self.easy) for group in groups[start : start + 5]]
                self.asked += [(number, group.question.id) for group in part]
                files += 1
                yield WrittenGroups(write_group_file(self.run_dir, part), (), count_groups(part))

        questions = [Group(0, 0, Question(id, "", "r", "1", "arithmetic"), [1], [2], []) for id in IDS]
        sampling = RoundSampling(self.config, Ledger(self.run_dir), self.reporter, questions, stream, lambda: None)
        sampling.sample(number, VersionManifest(number - 1, "somewhere", (), ()), 0.0)

    def groups(self):
        ledger = Ledger(self.run_dir)
        return {number: [group.question.id for group in ledger.read_groups(number)] for number in range(1, ROUNDS + 1)}


def answered(group, easy):
    first = Verdict.RIGHT if group.question.id in easy else Verdict.WRONG
    return replace(group, candidates=[answer(first, 1), answer(Verdict.RIGHT, 2), answer(Verdict.UNDECIDED, 3)])


def answer(verdict, token):
    reason = "unclear" if verdict is Verdict.UNDECIDED else ""
    return Candidate([token], -1.0, "stop", "1", "1", verdict, float(verdict is Verdict.RIGHT), reason)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("uninterrupted"))
    for number in range(1, ROUNDS + 1):
        run.sample(number)
    return run


def test_only_questions_that_were_all_right_are_left_out_and_each_is_asked_again(uninterrupted):
    groups = uninterrupted.groups()
    assert groups[1] == IDS
    for number in range(2, ROUNDS + 1):
        left_out = set(IDS) - set(groups[number])
        assert left_out == Ledger(uninterrupted.run_dir).skipped(number) <= EASY
        assert left_out
    assert EASY & {id for number in range(2, ROUNDS + 1) for id in groups[number]}
    assert sorted(uninterrupted.asked) == sorted((number, id) for number, ids in groups.items() for id in ids)


def test_what_is_left_out_is_neither_failed_nor_pending_and_is_shown(uninterrupted):
    ledger = Ledger(uninterrupted.run_dir)
    sampled = [event for event in uninterrupted.reporter.events if event["event"] == "sampled"]
    for number, event in enumerate(sampled, 1):
        skipped = ledger.skipped(number)
        assert ledger.pending(number, IDS) == []
        assert ledger.failed_questions(number) == []
        record = ledger.sampled(number)
        assert (record.groups, record.failed) == (len(IDS) - len(skipped), 0)
        assert (event["groups"], event["skipped"], event["parked"]) == (record.groups, len(skipped), 0)
        assert event["candidates"] == 3
        assert event["tokens"] == 3 * record.groups
        assert 0 < event["signal"] < 1
        if skipped:
            assert f"{len(skipped)} questions skipped" in uninterrupted.reporter.lines[number - 1]
            assert any(f"{len(skipped)} skipped" in line for line in state_lines(uninterrupted.config, ledger.run_dir))
    table = rounds_table(sampled)
    shown = {column.header: list(column.cells) for column in table.columns}
    assert shown["skipped"] == [str(event["skipped"]) for event in sampled]
    assert shown["k"] == ["3.0"] * ROUNDS


@settings(max_examples=6, deadline=None)
@given(deaths=st.lists(st.tuples(st.integers(1, ROUNDS), st.integers(0, 3)), min_size=1, max_size=6))
def test_a_run_that_is_killed_anywhere_asks_the_same_questions(uninterrupted, tmp_path_factory, deaths):
    whole, killed = uninterrupted, Run(tmp_path_factory.mktemp("killed"))
    for number in range(1, ROUNDS + 1):
        for at, files in deaths:
            if at == number:
                with contextlib.suppress(Killed):
                    killed.sample(number, die_after=files)
        killed.sample(number)
    assert killed.groups() == whole.groups()
    assert len(set(killed.asked)) == len(killed.asked)
    for number in range(1, ROUNDS + 1):
        assert Ledger(killed.run_dir).skipped(number) == Ledger(whole.run_dir).skipped(number)


def test_a_decision_stands_even_if_what_led_to_it_changes(tmp_path):
    run = Run(tmp_path / "run")
    run.sample(1)
    with pytest.raises(Killed):
        run.sample(2, die_after=1)
    skipped = Ledger(run.run_dir).skipped(2)
    assert skipped
    ledger = Ledger(run.run_dir)
    for file in list(ledger.group_files(1)):  # the groups of round 1 are lost, and with them what was right
        run.run_dir.delete(file.path)
    ledger.open_round(1)
    run.sample(2)
    assert Ledger(run.run_dir).skipped(2) == skipped
    assert set(run.groups()[2]) == set(IDS) - skipped


def test_a_decision_is_recorded_once(tmp_path):
    ledger = Ledger(RunDir(str(tmp_path)))
    assert ledger.skipped(1) is None
    ledger.record_skipped(1, [])
    assert ledger.skipped(1) == frozenset()
    with pytest.raises(ValueError, match="round 1 leaves out is recorded already"):
        ledger.record_skipped(1, ["a"])


def test_a_round_in_which_all_are_easy_still_has_a_step_to_train(tmp_path):
    run = Run(tmp_path / "run", frozenset(IDS), ask_probability=0.001, min_ask_probability=0.001)
    run.sample(1)
    run.sample(2)
    assert len(Ledger(run.run_dir).skipped(2)) == len(IDS) - run.config.training.groups_per_step


def test_without_skipping_nothing_is_recorded(tmp_path):
    run = Run(tmp_path / "run", skip_after=0)
    run.sample(1)
    run.sample(2)
    assert Ledger(run.run_dir).skipped(2) is None
    assert sorted(run.asked) == [(number, id) for number in (1, 2) for id in IDS]
