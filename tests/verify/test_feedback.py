"""Rewards by verdict, by right steps and by a judge. An undecided candidate stays undecided and is not judged."""

import subprocess
import sys

import pytest
from judge_server import chat, rated

from aft_ray.config.run import DataConfig, FeedbackConfig, JudgeConfig
from aft_ray.storage.records import Candidate, Group, Question, Verdict
from aft_ray.tasks import build_task
from aft_ray.verify.feedback import reward_groups
from aft_ray.verify.judge.judge import Judge

TEXT = "Ana has 8 coins. Ana finds 4 more. Ana loses 2. how many coins does Ana have?"
CHAIN = "8 + 4 = 12. 12 - 2 = 10. #### 10"

TASKS = {"arithmetic": build_task(DataConfig(), 0)}


def candidate(text: str, verdict: Verdict, reason: str = "") -> Candidate:
    reward = 1.0 if verdict is Verdict.RIGHT else 0.0
    return Candidate([5, 1], -1.0, "stop", text, "10", verdict, reward, reason)


def group(name: str, *candidates: Candidate, text: str = TEXT) -> Group:
    return Group(1, 0, Question(name, text, CHAIN, "10", "arithmetic"), [5], [5, 1], list(candidates))


GROUPS = [
    group(
        "one",
        candidate(CHAIN, Verdict.RIGHT),
        candidate("#### 10", Verdict.RIGHT),
        candidate("8 + 4 = 12. 12 - 2 = 9. #### 9", Verdict.WRONG),
        candidate(CHAIN, Verdict.UNDECIDED, "timeout"),
        candidate("#### 9", Verdict.WRONG),
        candidate("#### 10", Verdict.RIGHT),
    ),
    group("two"),
    group("three", candidate("(8 + 4) - 2 = 10. #### 10", Verdict.RIGHT)),
]


def rewards(groups: list[Group]) -> list[list[float]]:
    return [[c.reward for c in group.candidates] for group in groups]


def untouched(groups: list[Group]) -> list[Group]:
    """The groups without what feedback may change."""
    return [
        Group(g.round, g.policy_version, g.question, g.prompt_token_ids, g.reference_token_ids,
              [Candidate(c.token_ids, c.logprob_sum, c.finish_reason, c.text, c.answer) for c in g.candidates])
        for g in groups
    ]  # fmt: skip


@pytest.fixture
def judged(server, tmp_path):
    feedback = FeedbackConfig(kind="judge", judge=JudgeConfig(url=server.url, ratings=2, concurrency=1))
    return feedback, Judge(feedback.judge, tmp_path / "judge.sqlite")


def test_binary_feedback_is_the_verdict():
    assert reward_groups(GROUPS, TASKS, FeedbackConfig(), None) == GROUPS


def test_steps_are_graded():
    graded = reward_groups(GROUPS, TASKS, FeedbackConfig(kind="steps"), None)
    assert rewards(graded) == [[1.0, 1 / 3, 1 / 3, 0.0, 0.0, 1 / 3], [], [1.0]]
    assert untouched(graded) == untouched(GROUPS)
    assert [c.verdict for c in graded[0].candidates] == [c.verdict for c in GROUPS[0].candidates]
    assert graded[0].candidates[3] == GROUPS[0].candidates[3]


def test_steps_of_another_task_are_an_error():
    other = group("other", candidate("#### 10", Verdict.RIGHT), text="what is 5 + 5?")
    with pytest.raises(ValueError, match="not a generated word problem"):
        reward_groups([other], TASKS, FeedbackConfig(kind="steps"), None)


def test_a_task_that_cannot_grade_steps_is_an_error():
    gsm8k = {"arithmetic": build_task(DataConfig(task="gsm8k"), 0, "arithmetic")}
    with pytest.raises(ValueError, match="cannot grade arithmetic, whose task has no `grade_steps`"):
        reward_groups(GROUPS, gsm8k, FeedbackConfig(kind="steps"), None)


def test_a_judge_rates_each_decided_response_of_a_question_once(server, judged):
    server.answer = lambda number, request: rated(number)
    done = reward_groups(GROUPS, TASKS, *judged)
    assert untouched(done) == untouched(GROUPS)
    assert [c.verdict for g in done for c in g.candidates] == [c.verdict for g in GROUPS for c in g.candidates]
    first = done[0].candidates
    assert first[1].reward == first[5].reward
    assert len({c.reward for c in first if c.verdict is not Verdict.UNDECIDED}) == 4
    assert first[3] == GROUPS[0].candidates[3]
    assert len(server.requests) == 2 * 5  # four distinct decided responses of one question, and one of another
    assert reward_groups(GROUPS, TASKS, *judged) == done
    assert len(server.requests) == 2 * 5


def test_a_candidate_that_the_judge_does_not_rate_is_undecided(server, judged):
    server.answer = lambda number, request: chat("?") if "\n#### 9\n" in request["messages"][0]["content"] else rated(4)
    done = reward_groups(GROUPS, TASKS, *judged)
    unrated = done[0].candidates[4]
    assert (unrated.verdict, unrated.reward, unrated.reason) == (Verdict.UNDECIDED, 0.0, "the judge gave no rating")
    assert rewards(done) == [[4.0, 4.0, 4.0, 0.0, 0.0, 4.0], [], [4.0]]


def test_without_a_decided_candidate_no_request_is_sent(server, judged):
    assert reward_groups([GROUPS[1]], TASKS, *judged) == [GROUPS[1]]
    assert reward_groups([], TASKS, *judged) == []
    assert not server.requests


def test_feedback_imports_no_client_library_before_a_judge_is_used():
    code = "import sys, aft_ray.verify.feedback; print({'openai', 'ray', 'torch', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
