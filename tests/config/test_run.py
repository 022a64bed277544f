"""Configs: what loads, what is refused and with which sentence, and that nothing is lost on the way to a file."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from aft_ray.config.keys import describe_keys
from aft_ray.config.loader import config_difference, dump_config
from aft_ray.config.run import ConfigError, RunConfig, load_config, parse_config

HEAVY = {"torch", "ray", "vllm", "pyarrow", "transformers", "deepspeed", "datasets", "numpy"}
CONFIGS = Path(__file__).parents[2] / "jobs/configs"
MINIMAL = {"run_dir": "runs/x", "model": {"name": "some/model"}}

STREAM = ["weights.transport=nccl"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: runs/x\nmodel: {name: some/model}\nvft: {epochs: 2}\n")
    return path


def parsed(**sections) -> RunConfig:
    return parse_config({**MINIMAL, **sections})


def refusal(*overrides: str, file) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(file, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_importing_the_config_and_the_command_brings_in_nothing_heavy():
    code = (
        "import sys, time; start = time.process_time(); import aft_ray.config.run; spent = time.process_time() - start;"
        "import aft_ray.cli, json; print(json.dumps([spent, sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    spent, modules = json.loads(done.stdout)
    assert not HEAVY & set(modules)
    assert spent < 1.5  # seconds of a core; 0.2 on an idle machine


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("trainin.learning_rate=1", "training.learning_rate"),
        ("training.learning_rat=1", "training.learning_rate"),
        ("sampling.sampler=2", "sampling.samplers"),
        ("data.arithmetic.max_step=3", "data.arithmetic.max_steps"),
        ("seeds=1", "seed"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(file, override, nearest):
    key = override.partition("=")[0]
    said = refusal(override, file=file)
    assert said.startswith("unknown key ")
    assert key.split(".")[0] in said
    assert said.endswith(f"did you mean {nearest}?")


def test_an_unknown_key_near_to_nothing_says_where_keys_are_listed(file):
    assert "aft-ray" in refusal("zzzzqqqq=1", file=file)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("sampling.k=many", "sampling.k"),
        ("sampling.k=2.5", "sampling.k"),
        ("sampling.k=0", "sampling.k"),
        ("sampling.k=null", "sampling.k"),
        ("sampling.temperature=0", "sampling.temperature"),
        ("sampling.top_p=1.5", "sampling.top_p"),
        ("training.zero_stage=4", "training.zero_stage"),
        ("training.learning_rate=-1e-5", "training.learning_rate"),
        ("training.learning_rate=.nan", "training.learning_rate"),
        ("training.learning_rate=.inf", "training.learning_rate"),
        ("training.warmup=1", "training.warmup"),
        ("model.dtype=float16", "model.dtype"),
        ("weights.transport=carrier_pigeon", "weights.transport"),
        ("weights.probes=0", "weights.probes"),
        ("rounds.max_staleness=-1", "rounds.max_staleness"),
        ("objective.name=sft", "objective.name"),
        ("data.arithmetic.operations=%", "data.arithmetic.operations"),
        ("model=some/model", "model"),
    ],
)
def test_a_wrong_type_or_a_value_out_of_range_names_its_key(file, override, key):
    assert refusal(override, file=file).startswith(f"{key}=")


def test_a_missing_key_is_named_with_the_way_to_set_it(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert refusal(file=path).startswith("run_dir is missing")
    assert refusal("run_dir=runs/x", file=path) == (
        "model.name is missing; set it in the file or as model.name=VALUE on the command line"
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sampling.k=1"], ["aft_boundary", "sampling.k"]),
        (["sampling.max_tokens=512"], ["sampling.max_tokens (512)", "model.max_length (512)"]),
        (["training.tokens_per_microbatch=500"], ["training.tokens_per_microbatch (500)", "model.max_length (512)"]),
        (["vft.epochs=0", "rounds.count=0"], ["nothing to train"]),
        (["training.workers=8", "training.groups_per_step=4"], ["training.groups_per_step (4)", "(8)"]),
        (["data.arithmetic.min_steps=5"], ["min_steps (5)", "max_steps"]),
        (["data.prompt=Answer"], ["data.prompt", "{question}"]),
        (["data.task=custom", "data.custom.train=train"], ["data.path"]),
        (["data.task=custom", "data.path=/some/where"], ["data.custom.train"]),
        (["feedback.kind=judge"], ["feedback.judge.url"]),
        (["sampling.min_samplers=2"], ["sampling.min_samplers (2)", "sampling.samplers (1)"]),
        (["sampling.colocate=true"], ["rounds.max_staleness must be 0"]),
        (
            ["sampling.colocate=true", "rounds.max_staleness=0", "sampling.gpus_per_sampler=1"],
            ["set training.gpus_per_worker=1"],
        ),
        (
            [
                "sampling.colocate=true",
                "rounds.max_staleness=0",
                "sampling.gpus_per_sampler=2",
                "sampling.tensor_parallel_size=2",
                "training.gpus_per_worker=1",
                "training.zero_stage=2",
            ],
            ["1 engines of 2 GPUs on the 1 GPUs", "at most training.workers"],
        ),
        ([*STREAM, "rounds.max_staleness=2"], ["rounds.max_staleness", "not 2"]),
        ([*STREAM, "sampling.gpus_per_sampler=1"], ["gpus_per_worker=0", "object_store"]),
        ([*STREAM, "lora.rank=8"], ["weights.transport=nccl", "lora"]),
        ([*STREAM, "training.workers=2", "training.timeout_s=600"], ["training.timeout_s (600)", "(600)"]),
        (
            [*STREAM, "sampling.colocate=true", "rounds.max_staleness=0"],
            ["sampling.colocate", "object_store"],
        ),
    ],
)
def test_a_combination_that_cannot_be_run_is_refused(file, overrides, words):
    said = refusal(*overrides, file=file)
    assert all(word in said for word in words)


def test_data_is_one_task_under_its_tasks_name():
    assert list(parsed().task_configs) == ["arithmetic"]
    config = parsed(data={"task": "gsm8k", "train_limit": 5})
    assert config.task_configs == {"gsm8k": config.data}
    assert config.task_weights == {"gsm8k": 1.0}


def test_several_tasks_by_names_of_ones_own(file):
    file.write_text(file.read_text() + "tasks:\n  gsm8k:\n  easy: {task: arithmetic, weight: 3}\n")
    config = load_config(
        file, ["tasks.gsm8k.path=/x", "tasks.gsm8k.weight=2", "tasks.mmlu.mmlu.subjects=law,virology", "seed=1"]
    )
    assert {name: entry.task for name, entry in config.task_configs.items()} == {
        "gsm8k": "gsm8k", "easy": "arithmetic", "mmlu": "mmlu",
    }  # fmt: skip
    assert config.task_weights == {"gsm8k": 2.0, "easy": 3.0, "mmlu": 1.0}
    assert config.tasks["gsm8k"].path == "/x"
    assert config.tasks["mmlu"].mmlu.subjects == ("law", "virology")
    assert config.data is None
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.task=gsm8k", "tasks.ecqa.path=/x"], "data and tasks (ecqa) are both given; "),
        (["tasks.easy.weight=2"], "tasks.easy.task is missing; set it in the file or as tasks.easy.task=VALUE"),
        (["tasks.gsm8k.weight=0"], "tasks.gsm8k.weight=0"),
        (["tasks.gsm8k.weight=.inf"], "tasks.gsm8k.weight="),
        (["tasks.gsm8k.pathh=/x"], "unknown key tasks.gsm8k.pathh; did you mean tasks.gsm8k.path?"),
        (["tasks.e.task=arithmetic", "tasks.e.arithmetic.max_step=3"], "unknown key tasks.e.arithmetic.max_step; did"),
        (["tasks.e.task=arithmetic", "tasks.e.arithmetic.min_steps=5"], "tasks.e.arithmetic.min_steps (5) is more"),
        (["tasks.e.task=custom"], "tasks.e.task=custom needs tasks.e.path: "),
        (["tasks.gsm8k=3"], "tasks.gsm8k=3"),
        (["tasks=gsm8k"], "tasks='gsm8k'"),
        (["tasks.my task.task=gsm8k"], "tasks.my task: a task's name is made of "),
        (["feedback.kind=steps", "data.task=ecqa"], "feedback.kind=steps grades the calculations of task=arithmetic"),
        (["feedback.kind=steps", "tasks.arithmetic.weight=1", "tasks.ecqa.weight=1"], "feedback.kind=steps grades"),
    ],
)
def test_a_mistake_in_the_tasks_is_named_where_it_stands(file, overrides, said):
    assert refusal(*overrides, file=file).startswith(said)


def test_steps_are_graded_of_any_arithmetic(file):
    assert load_config(file, ["feedback.kind=steps"])
    assert load_config(file, ["feedback.kind=steps", "tasks.easy.task=arithmetic", "tasks.arithmetic.weight=1"])


def test_one_candidate_is_enough_for_objectives_that_do_not_compare(file):
    assert load_config(file, ["sampling.k=1", "objective.name=rft"]).samples
    assert not load_config(file, ["sampling.k=1", "objective.name=vft"]).samples


def test_overrides_replace_values_of_the_file_at_any_depth(file):
    config = load_config(
        file,
        [
            "training.learning_rate=2e-5",
            "vft.learning_rate=1.5E-4",
            "data.arithmetic.max_operand=12",
            "data.train_limit=7",
            "data.train_limit=null",
            "weights.tolerance=",
            "model.trust_remote_code=true",
            "run_dir=s3://bucket/run=1",
        ],
    )
    assert config.training.learning_rate == 2e-5
    assert config.vft.learning_rate == 1.5e-4
    assert config.vft.epochs == 2
    assert config.data.arithmetic.max_operand == 12
    assert config.data.train_limit is None
    assert config.weights.tolerance is None
    assert config.model.trust_remote_code is True
    assert config.run_dir == "s3://bucket/run=1"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.prompt={question} Think.", "{question} Think."),
        ("data.prompt=Question: {question}", "Question: {question}"),
        ("data.answer_marker=####", "####"),
        ("data.answer_marker=[answer]:", "[answer]:"),
        ("data.prompt=Problem # {question}", "Problem # {question}"),
        ("data.prompt={question}", "{question}"),
        ("data.answer_marker='null'", "null"),
    ],
)
def test_text_that_yaml_would_read_otherwise_is_taken_as_it_is(file, override, value):
    config = load_config(file, [override])
    assert value in (config.data.prompt, config.data.answer_marker)


@pytest.mark.parametrize("override", ["sampling.k", "=3", "", "run_dir.sub=3"])
def test_an_override_that_is_none_is_refused(file, override):
    assert repr(override) in refusal(override, file=file)


def test_a_float_without_a_point_in_the_file_is_a_float(file):
    file.write_text(file.read_text() + "training: {learning_rate: 2e-5}\n")
    assert load_config(file).training.learning_rate == 2e-5


@pytest.mark.parametrize(
    ("text", "words"),
    [("- a\n- b\n", "must be a mapping"), ("run_dir: [", "not valid YAML"), (None, "cannot read the config file")],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    said = refusal(file=path)
    assert words in said
    assert str(path) in said


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_in_jobs_load(path):
    assert load_config(path).task_configs


def test_the_demos_control_is_a_config():
    demo = runpy.run_path(str(Path(__file__).parents[2] / "jobs/demo.py"))
    control = load_config(demo["CONFIG"], demo["CONTROL"])
    assert (control.objective.name, control.vft.epochs, control.samples) == ("vft", 0, False)


def test_the_default_tolerance_follows_the_precision():
    assert parsed(model={"name": "m", "dtype": "float32"}).score_tolerance == 1e-4
    assert parsed().score_tolerance == 0.05
    assert parsed(weights={"tolerance": 0.01}).score_tolerance == 0.01


@settings(max_examples=25, deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]) | st.just("\n"), max_size=20),
    rate=st.floats(1e-12, 1e3),
    limit=st.none() | st.integers(1, 10**9),
    k=st.integers(2, 64),
    task=st.sampled_from(["arithmetic", "gsm8k"]),
    several=st.booleans(),
)
def test_a_dumped_config_loads_back_equal(tmp_path_factory, text, rate, limit, k, task, several):
    entry = {"task": task, "train_limit": limit, "prompt": "{question}" + text, "answer_marker": f"#{text}"}
    config = parsed(
        run_dir=f"x{text}",
        **({"tasks": {"one": entry, "ecqa": {"weight": rate}}} if several else {"data": entry}),
        training={"learning_rate": rate},
        sampling={"k": k},
    )
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8", newline="")
    assert load_config(path) == config
    assert config_difference(config, load_config(path)) == []


def test_the_difference_of_two_configs_names_every_value():
    old, new = parsed(seed=1), parsed(seed=2, data={"arithmetic": {"max_steps": 3}, "train_limit": 5})
    assert config_difference(old, old) == []
    assert config_difference(old, new) == [
        "seed: 1 -> 2",
        "data.train_limit: None -> 5",
        "data.arithmetic.max_steps: 4 -> 3",
    ]


def test_the_difference_of_configs_with_several_tasks_names_what_is_new_and_what_changed():
    one = parsed(tasks={"gsm8k": {}, "ecqa": {}})
    other = parsed(tasks={"gsm8k": {"weight": 2}, "aqua_rat": {}})
    assert config_difference(one, other) == [
        "tasks.gsm8k.weight: 1.0 -> 2.0",
        "tasks.ecqa: gone",
        "tasks.aqua_rat: new",
    ]
    assert config_difference(parsed(), one) == ["data: gone", "tasks: new"]


def test_every_key_is_described_with_its_default():
    lines = describe_keys(RunConfig)
    assert any(line.startswith("  model.name (required): ") for line in lines)
    assert any(line.startswith("  sampling.k (default 6): ") for line in lines)
    assert not [line for line in lines if line.endswith(": None")]
    keys = yaml.safe_load(dump_config(parsed()))
    described = "\n".join(lines)
    for section in ("sampling", "training"):
        for key in keys[section]:
            assert f"  {section}.{key} (" in described or f"\n{section}.{key}: " in described
    assert "  data.mmlu.subjects (" in described
    assert "  tasks.NAME.weight (default 1.0): " in described
    assert "tasks.NAME.path" not in described  # it is said once, of data
