"""`aft-ray evaluate` on files of answers, run as a command in a process that imports no engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import tiny_tree

from aft_ray.config.run import ConfigError, EvaluationConfig
from aft_ray.evaluation.answers import AnsweredQuestion, Response
from aft_ray.evaluation.generations import generations_text, read_generations
from aft_ray.evaluation.statistics.metrics import EvaluationMetrics, measure
from aft_ray.evaluation.targets import plan_evaluation
from aft_ray.storage.records import Verdict

# Runs the command, then prints which modules of engines it imported.
WATCHED = """
import sys
from aft_ray.cli import main
try:
    main()
finally:
    heavy = {"ray", "vllm", "torch", "deepspeed", "transformers"}
    print("imported:", sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
"""


def command(directory, *arguments, status=0) -> str:
    """Runs the command. Returns its output, or the sentence of its error if `status` is not 0."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, "evaluate", *map(str, arguments)],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin", "HOME": str(directory)},
    )
    assert done.returncode == status, done.stdout + done.stderr
    if status:
        (sentence,) = done.stderr.splitlines()
        return sentence.removeprefix("error: ")
    assert done.stderr == ""
    assert "imported: []" in done.stdout
    return done.stdout


def answers(right, task="arithmetic") -> list[AnsweredQuestion]:
    """8 questions, of which the first `right` have right answers, with 4 samples for each of 2 seeds."""

    def response(good, score, seed=0):
        return Response(
            Verdict.RIGHT if good else Verdict.WRONG, "4" if good else "5", score, seed, f"#### {4 if good else 5}", 5
        )

    return [
        AnsweredQuestion(
            f"q{i}",
            response(i < right, -0.5),
            [response(i + j < right, -0.1 * (j + 1), seed) for seed in (0, 1) for j in range(4)],
            task,
            f"question {i}",
            "4",
        )
        for i in range(8)
    ]


@pytest.fixture
def here(tmp_path):
    """A directory with the answers of two models and the config of a task."""
    for name, right in (("vft", 3), ("aft", 7)):
        (tmp_path / f"generations-{name}.jsonl").write_text(generations_text(answers(right)))
    tree = tiny_tree(tmp_path / "run", tmp_path / "model")
    del tree["model"]["name"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def test_a_file_is_measured_without_an_engine_and_equals_what_is_measured_here(here):
    said = command(here, "generations-aft.jsonl")
    record = json.loads((here / "aft-answers.json").read_text())
    expected = measure(answers(7), resamples=EvaluationConfig().resamples)
    assert EvaluationMetrics.from_json(record).to_json() == expected.to_json()
    assert record["curves"]["n"] == [1, 2, 4]
    assert sum(record["histogram"]["right"]) == sum(s.right for q in answers(7) for s in q.samples)
    assert "87.5 [" in said
    for name in ("paths.png", "paths.svg", "scores.png", "scores.svg"):
        assert f"aft-answers-{name}" in said
        assert (here / f"aft-answers-{name}").stat().st_size > 5000


def test_two_files_are_compared_with_the_baseline_that_is_named(here):
    said = command(here, "generations-aft.jsonl", "generations-vft.jsonl", "--baseline", "vft", "--no-plots")
    record = json.loads((here / "comparison-answers.json").read_text())
    assert record["baseline"] == "vft"
    assert list(record["models"]) == ["aft", "vft"]
    greedy = record["comparisons"]["aft"]["differences"]["greedy"]
    assert (greedy["value"], greedy["p"]) == (0.5, 0.125)  # 4 questions, all in favour
    assert "+50.0 [" in said
    assert "p=0.125" in said
    assert len(record["models"]["vft"]["estimates"]["maj@4"]["per_seed"]) == 2
    assert not list(here.glob("*.png"))
    assert sorted(path.name for path in here.glob("*.json*")) == [
        "comparison-answers.json", "generations-aft.jsonl", "generations-vft.jsonl",
    ]  # fmt: skip


def test_answers_are_verified_again_by_the_task_of_a_config_and_written(here):
    lines = [{"id": "a", "gold": "4", "responses": ["#### 4", "#### 6"]}, {"id": "b", "gold": "5", "responses": ["5"]}]
    (here / "theirs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "add --config" in command(here, "theirs.jsonl", status=2)
    said = command(here, "theirs.jsonl", "--config", "run.yaml", "--output", "out/x.json")
    record = json.loads((here / "out/x.json").read_text())
    assert record["task"] == "arithmetic"
    assert record["estimates"]["pass@1"]["value"] == 0.25
    assert "best-of-1" not in record["estimates"]  # there are no scores
    assert "out/generations-x.jsonl" in said
    assert [q.samples[0].verdict for q in read_generations(here / "out/generations-x.jsonl", None)] == [
        Verdict.RIGHT,
        Verdict.WRONG,
    ]
    assert "give another --output" in command(
        here / "out", "generations-x.jsonl", "--config", "../run.yaml", "--output", "x.json", status=2
    )


def test_several_tasks_are_sections_of_the_table(here):
    both = [*answers(6, "gsm8k")[:4], *answers(6, "ecqa")[4:]]
    (here / "both.jsonl").write_text(generations_text(both))
    said = command(here, "both.jsonl", "--no-plots")
    assert "gsm8k (4 questions)" in said
    assert "mean over the tasks" in said
    record = json.loads((here / "both-answers.json").read_text())
    assert record["tasks"]["ecqa"]["estimates"]["greedy"]["value"] == 0.5
    assert record["macro"]["greedy"]["value"] == 0.75


def test_mistakes_are_one_sentence(here):
    files = ("generations-aft.jsonl", "generations-vft.jsonl")
    assert "there is no file none.jsonl" in command(here, "none.jsonl", status=2)
    assert "they are aft, vft" in command(here, *files, "--baseline", "sft", status=2)
    assert "is named twice" in command(here, files[0], files[0], status=2)
    assert "give one with --config" in command(here, files[0], "evaluation.k=3", status=2)
    assert "a run directory, RUN@VERSION" in command(here, "evaluation.k=3", status=2)
    (here / "other.jsonl").write_text(generations_text([AnsweredQuestion("x", Response(Verdict.RIGHT))]))
    assert "no question in common" in command(here, files[0], "other.jsonl", status=2)
    (here / "torn.jsonl").write_text('{"id": 1,')
    assert "torn.jsonl, line 1: not JSON" in command(here, "torn.jsonl", status=2)


def test_help_shows_how_each_kind_of_target_is_given(here):
    said = command(here, "--help")
    for example in ("evaluation.seeds=3", "runs/gsm8k@0 runs/gsm8k@1", "--baseline theirs", "/models/vft"):
        assert example in said


def test_targets_with_the_same_name_get_distinct_labels(here):
    for place in ("one", "two"):
        (here / place / "model").mkdir(parents=True)
    arguments = [str(here / place / "model") for place in ("one", "two")]
    planned = plan_evaluation([*arguments, "evaluation.k=2"], here / "run.yaml")
    assert [target.label for target in planned.targets] == arguments
    assert planned.config.evaluation.k == 2
    with pytest.raises(ConfigError, match="--config must name the task"):
        plan_evaluation(arguments, None)
