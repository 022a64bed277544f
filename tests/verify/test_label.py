"""Every candidate is labelled by the task of its question, and nothing else about it changes."""

import pytest
from readers import MisbehavingTask

from aft_ray.config.run import DataConfig
from aft_ray.storage.records import Candidate, Group, Question, Verdict
from aft_ray.tasks import build_task
from aft_ray.verify.label import label_groups
from aft_ray.verify.process_pool import shared_verifier


def group(task: str, gold: str, texts: list[str]) -> Group:
    question = Question(f"{task}-{gold}", "how many?", f"#### {gold}", gold, task)
    candidates = [Candidate(token_ids=[5, 1], logprob_sum=-1.5, finish_reason="stop", text=text) for text in texts]
    return Group(1, 0, question, [1, 2], [3, 1], candidates)


def test_labels_every_group_by_its_task() -> None:
    groups = [
        group("arithmetic", "12", ["8 + 4 = 12. #### 12", "8 + 4 = 13. #### 13", "8 + 4 = 12.", "#### 12 or 13"]),
        group("arithmetic", "7", []),
        group("other", "3", ["3", "raises"]),
    ]
    tasks = {"arithmetic": build_task(DataConfig(), 0), "other": MisbehavingTask()}
    labelled = label_groups(groups, tasks, shared_verifier())  # type: ignore[arg-type]
    found = [[(c.answer, c.verdict, c.reward) for c in one.candidates] for one in labelled]
    assert found == [
        [
            ("12", Verdict.RIGHT, 1.0),
            ("13", Verdict.WRONG, 0.0),
            (None, Verdict.WRONG, 0.0),
            ("12 or 13", Verdict.UNDECIDED, 0.0),
        ],
        [],
        [("3", Verdict.RIGHT, 1.0), (None, Verdict.UNDECIDED, 0.0)],
    ]
    for one, before in zip(labelled, groups, strict=True):
        assert (one.question, one.prompt_token_ids, one.round) == (
            before.question,
            before.prompt_token_ids,
            before.round,
        )
        for after, candidate in zip(one.candidates, before.candidates, strict=True):
            assert (after.token_ids, after.logprob_sum, after.text) == ([5, 1], -1.5, candidate.text)
            assert bool(after.reason) == (after.verdict is Verdict.UNDECIDED)
    assert labelled[2].candidates[1].reason == "LookupError: no such thing"


def test_a_group_of_an_unknown_task_is_refused() -> None:
    with pytest.raises(KeyError, match="gsm8k"):
        label_groups([group("gsm8k", "1", ["1"])], {}, shared_verifier())
