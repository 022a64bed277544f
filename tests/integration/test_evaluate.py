"""Two models through `aft-ray evaluate` with real engines: the same questions, the same seeds, one comparison."""

import json

import pytest
import yaml
from commands import command
from tiny import tiny_tree

from aft_ray.evaluation.generations import read_generations
from aft_ray.evaluation.statistics.metrics import EvaluationMetrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MODELS = {"tied": "tiny_model", "untied": "untied_model"}


@pytest.fixture(scope="module")
def compared(tmp_path_factory, tiny_model, untied_model):
    """The directory of an evaluation of two models with two seeds, and what the command printed."""
    here = tmp_path_factory.mktemp("compared")
    (here / "run.yaml").write_text(yaml.safe_dump(tiny_tree(here / "run", tiny_model)))
    said = command(
        "evaluate", tiny_model, untied_model, "--config", here / "run.yaml", "--output", here / "both.json",
        "evaluation.k=3", "evaluation.seeds=2", "evaluation.seed=5", timeout=600,
    )  # fmt: skip
    return here, said


def test_both_models_answer_the_same_questions_by_both_seeds(compared):
    here, said = compared
    read = {label: read_generations(here / f"generations-both-{label}.jsonl", None) for label in MODELS}
    for answered in read.values():
        assert len(answered) == 8
        for question in answered:
            assert [sample.seed for sample in question.samples] == [5, 5, 5, 6, 6, 6]
            assert len({sample.text for sample in question.samples}) > 1
            assert question.greedy.text
            assert all(s.tokens and s.score < 0 for s in question.samples)
    tied, untied = read.values()
    assert [(q.id, q.question, q.gold) for q in tied] == [(q.id, q.question, q.gold) for q in untied]
    assert [q.greedy.text for q in tied] != [q.greedy.text for q in untied]
    texts = [[sample.text for sample in question.samples] for question in tied]
    assert all(drawn[:3] != drawn[3:] for drawn in texts)
    assert "its difference to tied" in " ".join(said.split())


def test_the_record_holds_both_models_and_their_difference(compared):
    here, _ = compared
    record = json.loads((here / "both.json").read_text())
    assert (record["task"], record["split"], record["seed"], record["baseline"]) == ("arithmetic", "test", 5, "tied")
    for label in MODELS:
        result = EvaluationMetrics.from_json(record["models"][label])
        assert (result.questions, result.seeds, result.k) == (8, 2, 3)
        assert len(result.estimates["maj@3"].per_seed) == 2
        assert record["models"][label]["parked"] == 0
        assert record["models"][label]["curves"]["n"] == [1, 2, 3]
    assert list(record["comparisons"]) == ["untied"]
    assert record["comparisons"]["untied"]["questions"] == 8
    for name in ("both-paths.png", "both-paths.svg", "both-scores.png", "both-scores.svg"):
        assert (here / name).exists()


def test_the_written_answers_give_the_same_metrics_again(compared):
    here, _ = compared
    files = [here / f"generations-both-{label}.jsonl" for label in MODELS]
    verify = ["--config", here / "run.yaml", "evaluation.seed=5"]
    command("evaluate", *files, *verify, "--output", here / "again.json", "--no-plots")
    before, again = (json.loads((here / name).read_text()) for name in ("both.json", "again.json"))
    for label in MODELS:
        result = EvaluationMetrics.from_json(again["models"][f"both-{label}"])
        assert result.to_json() == EvaluationMetrics.from_json(before["models"][label]).to_json()
