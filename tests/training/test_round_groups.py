"""The groups of a round as a train worker reads them: what it gets, how little it reads, and what it refuses."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aft_ray.objectives import build_objective
from aft_ray.storage import ledger as ledger_module
from aft_ray.storage.groups import committed_files, group_files
from aft_ray.storage.groups.group_files import GroupFile, write_group_file
from aft_ray.storage.groups.outlines import outline_of
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.records import Candidate, Group, Question, Verdict
from aft_ray.storage.run_dir import RunDir, RunDirError
from aft_ray.training import round_groups
from aft_ray.training.batching import BatchingError, group_size, plan_step, training_order
from aft_ray.training.round_groups import RoundGroups, trained_lengths

VERDICTS = {1.0: Verdict.RIGHT, 0.0: Verdict.WRONG, None: Verdict.UNDECIDED}


def group(number: int, lengths=(3, 5), rewards=(1.0, 0.0), prompt=4, reference=2) -> Group:
    """A group whose tokens depend on its number."""
    id = f"q{number:06d}"
    candidates = [
        Candidate([number + 1] * length, -1.0 * length, "stop", "text " * length, "4", VERDICTS[reward], reward or 0.0)
        for length, reward in zip(lengths, rewards, strict=True)
    ]
    question = Question(id, "2 + 2?", "#### 4", "4", "arithmetic")
    return Group(1, 0, question, [7] * prompt, [number] * reference, candidates)


def recorded(run_dir: RunDir, groups: list[Group], per_file: int) -> Ledger:
    ledger = Ledger(run_dir)
    for start in range(0, len(groups), per_file):
        assert ledger.commit(write_group_file(run_dir, groups[start : start + per_file]))
    return ledger


def random_groups(count: int, candidates: int = 4, seed: int = 0) -> list[Group]:
    chance = np.random.default_rng(seed)
    return [
        group(number, chance.integers(1, 40, candidates).tolist(), chance.choice([0.0, 1.0], candidates).tolist())
        for number in range(count)
    ]


class Flags:
    """An objective as far as the choice of candidates goes."""

    def __init__(self, uses: bool, ranks: bool, right: bool) -> None:
        self.uses_candidates, self.ranks_candidates, self.right_candidates_only = uses, ranks, right


CANDIDATES = st.lists(
    st.builds(
        lambda ids, verdict, reward: Candidate(
            ids, -1.0, "stop", "", None, verdict, 0.0 if verdict is Verdict.UNDECIDED else reward
        ),
        st.lists(st.integers(0, 1), max_size=2),
        st.sampled_from(list(Verdict)),
        st.sampled_from([0.0, 0.5, 1.0]),
    ),
    max_size=5,
)


@settings(max_examples=300, deadline=None)
@given(
    candidates=CANDIDATES,
    reference=st.lists(st.integers(0, 1), min_size=1, max_size=2),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_the_outline_of_a_group_gives_the_size_of_the_group(candidates, reference, flags):
    one = Group(1, 0, Question("a", "", "", "", "t"), [1], reference, candidates)
    objective = Flags(*flags)
    assert trained_lengths(outline_of(one), objective) == group_size(one, objective).responses
    outline = outline_of(one)
    assert outline.right == sum(candidate.verdict is Verdict.RIGHT for candidate in candidates)
    assert outline.decided == sum(candidate.verdict is not Verdict.UNDECIDED for candidate in candidates)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 40),
    per_file=st.integers(1, 12),
    row_group=st.sampled_from([1, 300, 1 << 20]),
    cache=st.sampled_from([0, 1 << 20]),
    choice=st.randoms(use_true_random=False),
)
def test_groups_are_read_as_they_were_written(tmp_path_factory, count, per_file, row_group, cache, choice):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_files, "_ROW_GROUP_BYTES", row_group)
        patch.setattr(round_groups, "_CACHE_BYTES", cache)
        written = random_groups(count, seed=count)
        choice.shuffle(written)
        ledger = recorded(RunDir(tmp_path_factory.mktemp("round")), written, per_file)
        objective = build_objective("aft_boundary")
        for state in (ledger, Ledger(ledger.run_dir)):
            groups = RoundGroups(state, 1, objective)
            by_id = {one.question.id: one for one in written}
            assert sorted(groups.ids) == sorted(by_id)
            for _ in range(3):
                indexes = [choice.randrange(count) for _ in range(choice.randrange(1, 12))]
                expected = [by_id[groups.ids[index]] for index in indexes]
                assert groups.read(indexes) == expected
                assert groups.sizes(indexes) == [group_size(one, objective) for one in expected]


def test_the_sizes_are_those_of_the_runs_objective(tmp_path):
    ledger = recorded(RunDir(tmp_path), [group(0, (3, 5, 7), (1.0, 0.0, 1.0)), group(1, (3, 5), (1.0, 1.0))], 2)
    sizes = {
        name: [size.responses for size in RoundGroups(ledger, 1, build_objective(name)).sizes([0, 1])]
        for name in ("vft", "rft", "dpo")
    }
    assert sizes == {"vft": [(2,), (2,)], "rft": [(2, 3, 7), (2, 3, 5)], "dpo": [(2, 3, 5, 7), (2,)]}


def test_the_longest_groups_do_not_depend_on_the_files(tmp_path):
    written = random_groups(30)
    objective = build_objective("rft")
    chosen = []
    for number, per_file in enumerate((1, 7, 30)):
        groups = RoundGroups(recorded(RunDir(tmp_path / str(number)), written, per_file), 1, objective)
        chosen.append([one.question.id for one in groups.read_longest(5)])
        assert len(groups.read_longest(100)) == 30
        assert groups.read_longest(0) == []
    by_length = sorted(written, key=lambda one: (-max(group_size(one, objective).responses), one.question.id))
    assert chosen == [[one.question.id for one in by_length[:5]]] * 3


def test_a_rank_reads_about_its_share(tmp_path):
    """Each response has 200 tokens and more, so that a row group has few groups; 8 ranks, 32 groups in a step."""
    chance = np.random.default_rng(0)
    written = []
    for number in range(192):
        one = group(number)
        candidates = [
            Candidate(chance.integers(0, 32_000, 400).tolist(), -1.0, "stop", "", "4", verdict, reward)
            for verdict, reward in ((Verdict.RIGHT, 1.0), (Verdict.WRONG, 0.0)) * 8
        ]
        written.append(Group(1, 0, one.question, [7] * 100, [number] * 100, candidates))
    order = training_order([one.question.id for one in written], 0, 1, 0)
    ledger = recorded(RunDir(tmp_path), [written[index] for index in order], 64)
    whole = sum(ledger.run_dir.local_path(file.path).stat().st_size for file in ledger.group_files(1))
    read = []
    for rank in range(8):
        groups = RoundGroups(ledger, 1, build_objective("dpo"))
        seen = []
        order = training_order(groups.ids, 0, 1, 0)
        for start in range(0, len(order), 32):
            step = order[start : start + 32]
            share = plan_step(groups.sizes(step), ranks=8, budget=100_000).shares[rank]
            mine = [step[index] for batch in share for index in batch.groups]
            seen += [one.question.id for one in groups.read(mine)]
        assert len(seen) == 24
        read.append(groups.bytes_read)
    assert sum(read) < 1.6 * whole
    assert max(read) < 1.6 * whole / 8


def test_what_was_read_is_not_read_again(tmp_path):
    groups = RoundGroups(recorded(RunDir(tmp_path), random_groups(20), 10), 1, build_objective("dpo"))
    groups.read([3, 14])
    read = groups.bytes_read
    assert read > 0
    groups.read([14, 3, 4])
    assert groups.bytes_read == read


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10**6), cut=st.booleans())
def test_damage_is_named_when_a_group_is_read(tmp_path_factory, position, cut):
    """A flipped bit is found where it is read: in the row group of the group, or in the footer."""
    run_dir = RunDir(tmp_path_factory.mktemp("damaged"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_files, "_ROW_GROUP_BYTES", 1)
        written = random_groups(4)
        ledger = recorded(run_dir, written, 4)
    (file,) = ledger.group_files(1)
    assert [part.groups for part in file.parts] == [1, 1, 1, 1, 0]
    path = run_dir.local_path(file.path)
    data = bytearray(path.read_bytes())
    place = position % len(data)
    damaged = next(number for number, part in enumerate(file.parts) if place < part.end)
    if cut:
        path.write_bytes(data[:place])
    else:
        data[place] ^= 1 << position % 8
        path.write_bytes(data)
    groups = RoundGroups(ledger, 1, build_objective("dpo"))
    for index in range(4):
        if cut or damaged in (index, 4):
            with pytest.raises(RunDirError, match=rf"{path.name} is corrupted: .*; start the run again"):
                groups.read([index])
        else:
            assert groups.read([index]) == [written[index]]


def test_a_missing_file_is_named(tmp_path):
    ledger = recorded(RunDir(tmp_path), random_groups(4), 4)
    (file,) = ledger.group_files(1)
    ledger.run_dir.delete(file.path)
    with pytest.raises(RunDirError, match=r"is missing; start the run again to have its questions sampled again"):
        RoundGroups(ledger, 1, build_objective("dpo")).read([0])


def test_a_file_of_an_earlier_release_is_read_whole_for_its_sizes(tmp_path):
    run_dir, written = RunDir(tmp_path), random_groups(12)
    ledger = Ledger(run_dir)
    new, old = write_group_file(run_dir, written[:6]), write_group_file(run_dir, written[6:])
    ledger.commit(new)
    ledger.commit(GroupFile(old.round, old.path, old.sha256, old.question_ids))
    sentences: list[str] = []
    groups = RoundGroups(Ledger(run_dir), 1, build_objective("rft"), sentences.append)
    assert sentences == ["round 1: 1 files of an earlier release have no sizes in the ledger, so all of them were read"]
    by_id = {one.question.id: one for one in written}
    assert groups.read(range(12)) == [by_id[id] for id in groups.ids]
    assert groups.sizes(range(12)) == [group_size(by_id[id], build_objective("rft")) for id in groups.ids]
    assert dict(ledger.outlines(1)) == {id: outline_of(one) for id, one in by_id.items()}


def test_a_group_without_a_prompt_or_a_reference_is_refused(tmp_path):
    for number, sizes in enumerate(({"prompt": 0}, {"reference": 0})):
        ledger = recorded(RunDir(tmp_path / str(number)), [group(3, **sizes)], 1)
        with pytest.raises(BatchingError, match=rf"question 'q000003' has an empty {next(iter(sizes))}"):
            RoundGroups(ledger, 1, build_objective("dpo"))


def test_a_round_without_groups_is_empty(tmp_path):
    groups = RoundGroups(Ledger(RunDir(tmp_path)), 1, build_objective("dpo"))
    assert (len(groups), groups.read_longest(3), groups.sizes([]), groups.read([])) == (0, [], [], [])


def test_ten_times_the_questions_take_little_more_memory(tmp_path, monkeypatch):
    """The peak of Python's memory, of a rank that plans all steps and reads its share of them."""
    monkeypatch.setattr(ledger_module, "_ENTRIES", 2)  # what may be in memory at once, in proportion to the rounds here
    monkeypatch.setattr(committed_files, "_RECENT", 100)
    peaks = []
    for count in (400, 4_000):
        run_dir = RunDir(tmp_path / str(count))
        written = random_groups(count, candidates=2)
        recorded(run_dir, written, 100)
        del written
        tracemalloc.start()
        groups = RoundGroups(Ledger(run_dir), 1, build_objective("dpo"))
        order = training_order(groups.ids, 0, 1, 0)
        for start in range(0, len(order), 200):
            step = order[start : start + 200]
            share = plan_step(groups.sizes(step), ranks=8, budget=20_000).shares[3]
            groups.read(step[index] for batch in share for index in batch.groups)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 3 * peaks[0]
