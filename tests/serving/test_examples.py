"""Questions to try: a service starts whether or not a task has some."""

from tiny import tiny_config

from aft_ray.serving.examples import examples

SUMS = {"min_steps": 1, "max_steps": 1, "operations": "+", "max_operand": 5, "distractors": 0}


def test_generated_problems_are_examples_where_there_are_enough(tiny_model, tmp_path):
    run = tiny_config(tmp_path, tiny_model)
    assert len(set(examples(run, "arithmetic"))) == 5
    assert examples(run, "arithmetic") == examples(run, "arithmetic")
    assert examples(tiny_config(tmp_path, tiny_model, data={"arithmetic": SUMS}), "arithmetic") == []


def test_questions_in_files_are_not_read_for_examples(tmp_path, tiny_model):
    run = tiny_config(tmp_path, tiny_model, data={"task": "gsm8k", "path": str(tmp_path / "nowhere")})
    assert examples(run, "gsm8k") == []
