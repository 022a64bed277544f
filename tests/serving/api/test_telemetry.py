"""What the access log tells of a request."""

from aft_ray.config.run import DataConfig
from aft_ray.inference.request_parameters import SamplingSpec
from aft_ray.serving.api.errors import ApiError
from aft_ray.serving.api.responses import Answer, explanation
from aft_ray.serving.api.telemetry import RequestRecord
from aft_ray.serving.reasoning import ReasoningRequest, ReasoningResult, ScoredCandidate
from aft_ray.serving.strategies import rank
from aft_ray.storage.records import Candidate
from aft_ray.tasks import build_task

QUESTION, SAID = "What is the code of the safe?", "It is 4711. #### 4711"


def answer(strategy="vote", answers=("4711", "4711", "12", None)) -> Answer:
    task = build_task(DataConfig(task="gsm8k"), 0)
    candidates = []
    for index, said in enumerate(answers):
        one = Candidate([5, 6, 7], -0.3 * (index + 1), "stop", SAID)
        candidates.append(
            ScoredCandidate(index, one.text, said, said, one.score, len(one.token_ids), one.finish_reason)
        )
    ranking = rank(strategy, [one.vote for one in candidates])
    ordered = tuple(candidates[vote.index] for vote in ranking.order)
    request = ReasoningRequest([1, 2], task, strategy, 8, SamplingSpec(1, 0.7, 1.0, 40), 3, 0.95)
    return Answer("reason-1", 0, "m", request, ReasoningResult(ranking, ordered, 2, "confident", 12, 0.5), 0.1, 0.6)


def test_a_line_has_neither_the_text_nor_the_key():
    record = RequestRecord("/v1/reason", "Bearer hidden-key")
    record.add_question(QUESTION)
    record.add_answer(answer())
    record.status = 200
    line = record.to_json(with_text=False)
    assert (line["route"], line["status"], line["strategy"], line["version"]) == ("/v1/reason", 200, "vote", 2)
    assert (line["asked"], line["sampled"], line["stopped"]) == (8, 4, "confident")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (2, 12)
    assert "4711" not in str(line)
    assert "safe" not in str(line)
    assert "hidden" not in str(line)
    assert line["key"] != RequestRecord("/v1/reason", "Bearer other").to_json(False)["key"]


def test_the_text_is_logged_when_it_is_asked_for():
    record = RequestRecord("/v1/reason", None)
    record.add_question(QUESTION)
    record.add_answer(answer())
    line = record.to_json(with_text=True)
    assert (line["questions"], line["answers"], line["key"]) == ([QUESTION], [SAID], None)


def test_a_refusal_is_written_with_its_code_and_unknown_paths_are_one_route():
    record = RequestRecord("/v1/whatever/someone/asks", None)
    record.set_error(ApiError(429, "later", "rate_limit_error", None, "queue_full", 3.2))
    line = record.to_json(with_text=False)
    assert (line["route"], line["status"], line["error"]) == ("other", 429, "queue_full")


def test_an_explanation_says_what_decided():
    assert explanation(answer("vote")) == "2 of 4 candidates say 4711."
    weighted = explanation(answer("weighted_vote"))
    assert weighted.startswith("2 of 4 candidates say 4711, with ")
    assert weighted.endswith("% of the weight by score.")
    assert explanation(answer("score")) == "The best score of 4 candidates, -0.100, is of one that says 4711."
    assert (
        explanation(answer("vote", (None, None)))
        == "The best score of 2 candidates, -0.100, is of one that gives no answer."
    )
    assert explanation(answer("greedy", ("7",))) == "The one greedy response says 7."
