"""Example questions for the page; a task without any does not prevent the start of a service."""

from tiny import tiny_config

from aft_ray.serving.examples import example_questions

SUMS = {"min_steps": 1, "max_steps": 1, "operations": "+", "max_operand": 5, "distractors": 0}


def test_generated_problems_are_examples_where_there_are_enough(tiny_model, tmp_path):
    run = tiny_config(tmp_path, tiny_model)
    assert len(set(example_questions(run, "arithmetic"))) == 5
    assert example_questions(run, "arithmetic") == example_questions(run, "arithmetic")
    assert example_questions(tiny_config(tmp_path, tiny_model, data={"arithmetic": SUMS}), "arithmetic") == []


def test_questions_in_files_are_not_read_for_examples(tmp_path, tiny_model):
    run = tiny_config(tmp_path, tiny_model, data={"task": "gsm8k", "path": str(tmp_path / "nowhere")})
    assert example_questions(run, "gsm8k") == []
