"""Which key an unknown one is taken for, in runs and in services."""

import pytest

from aft_ray.config.keys import value_keys
from aft_ray.config.run import ConfigError, RunConfig, parse_config
from aft_ray.config.serve import ServeConfig, parse_serve_config
from aft_ray.planning.plan.assumptions import parse_assumptions

RUN = {"run_dir": "runs/x", "model": {"name": "some/model"}}
TASKS = {"tasks": {"gsm8k": {}, "Sums": {"task": "arithmetic"}}}


def message(parse, tree: dict, key: str) -> str:
    """What is said of a tree in which one more key has a value."""
    *parents, last = key.split(".")
    tree = node = {name: dict(value) if isinstance(value, dict) else value for name, value in tree.items()}
    for parent in parents:
        node[parent] = dict(node.get(parent) or {})
        node = node[parent]
    node[last] = 1
    with pytest.raises(ConfigError) as error:
        parse(tree)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.lr", "training.learning_rate"),
        ("vft.lr", "vft.learning_rate"),
        ("lr", "vft.learning_rate or training.learning_rate"),
        ("learning_rate", "vft.learning_rate or training.learning_rate"),
        ("optimizer.lr", "training.learning_rate"),
        ("training.learning_rat", "training.learning_rate"),
        ("trainin.learning_rate", "training.learning_rate"),
        ("train.lr", "training.learning_rate"),
        ("training_learning_rate", "training.learning_rate"),
        ("training.bs", "training.groups_per_step"),
        ("training.batch_size", "training.groups_per_step"),
        ("vft.batch_size", "vft.questions_per_step"),
        ("sampling.bs", "sampling.batch_size"),
        ("training.micro_batch_size", "training.tokens_per_microbatch"),
        ("training.grad_norm", "training.max_grad_norm"),
        ("training.grad_clip", "training.max_grad_norm"),
        ("training.gradient_checkpointing", "training.activation_checkpointing"),
        ("training.zero", "training.zero_stage"),
        ("training.lr_scheduler_type", "training.schedule"),
        ("actor.optim.min_lr_ratio", "training.min_learning_rate_ratio"),
        ("training.optim", "training.optimizer"),
        ("training.adam_beta2", "training.betas"),
        ("training.adam_epsilon", "training.eps"),
        ("training.torch_compile", "training.compile"),
        ("lora.load_in_4bit", "lora.quantize"),
        ("epochs", "vft.epochs or training.epochs"),
        ("training.num_epochs", "training.epochs"),
        ("num_rounds", "rounds.count"),
        ("max_steps", "rounds.count"),
        ("sampling.tp", "sampling.tensor_parallel_size"),
        ("sampling.pp", "sampling.pipeline_parallel_size"),
        ("tp", "sampling.tensor_parallel_size"),
        ("sampling.temp", "sampling.temperature"),
        ("temp", "sampling.temperature or evaluation.temperature"),
        ("sampling.n", "sampling.k"),
        ("n", "sampling.k or evaluation.k"),
        ("sampling.num_samples", "sampling.k"),
        ("rollout.n", "sampling.k"),
        ("sampling.max_new_tokens", "sampling.max_tokens"),
        ("max_new_tokens", "sampling.max_tokens"),
        ("sampling.sampler", "sampling.samplers"),
        ("sampling.gpus", "sampling.gpus_per_sampler"),
        ("training.ngpu", "training.gpus_per_worker"),
        ("gpus", "sampling.gpus_per_sampler or training.gpus_per_worker"),
        ("training.timeout", "training.timeout_s"),
        ("sampling.seed", "seed"),
        ("seeds", "seed"),
        ("model.path", "model.name"),
        ("model_path", "model.name"),
        ("model.seq_len", "model.max_length"),
        ("seq_len", "model.max_length"),
        ("training.dtype", "model.dtype"),
        ("precision", "model.dtype"),
        ("data.file", "data.path"),
        ("data.min_steps", "data.arithmetic.min_steps"),
        ("data.arithmetic.max_step", "data.arithmetic.max_steps"),
        ("objective.loss", "objective.name"),
        ("objective.aft_boundary.beta", "objective.beta"),
        ("feedback.url", "feedback.judge.url"),
        ("judge_url", "feedback.judge.url"),
        ("lora_alpha", "lora.alpha"),
        ("lora.r", "lora.rank"),
        ("output_dir", "run_dir"),
        ("eval_every", "rounds.evaluate_every"),
        ("evaluation.n", "evaluation.k"),
        ("weights.backend.transport", "weights.transport"),
        ("cluster.ray_address", "cluster.address"),
        ("cluster.autoscaling", "cluster.grows"),
        ("data.train_batch_size", "training.groups_per_step"),
        ("data.prompt_key", "data.custom.question"),
        ("data.custom.answer", "data.custom.reference or data.custom.gold"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size", "training.groups_per_step"),
        ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", "training.tokens_per_microbatch"),
        ("trainer.total_epochs", "rounds.count"),
        ("trainer.default_local_dir", "run_dir"),
        ("weights.type", "weights.transport"),
        ("weights.backend", "weights.transport"),
    ],
)
def test_a_wrong_key_of_a_run_is_answered_with_the_keys_that_fit(key, meant):
    assert message(parse_config, RUN, key) == f"unknown key {key}; did you mean {meant}?"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("tasks.gsm8k.file", "tasks.gsm8k.path"),
        ("tasks.gsm8k.limit", "tasks.gsm8k.train_limit"),
        ("tasks.Sums.min_steps", "tasks.Sums.arithmetic.min_steps"),
        ("tasks.Sums.arithmetic.max_operands", "tasks.Sums.arithmetic.max_operand"),
        ("tasks.Sums.custom.train_file", "tasks.Sums.custom.train"),
        ("tasks.Sums.lr", "vft.learning_rate or training.learning_rate"),
    ],
)
def test_a_wrong_key_of_one_of_several_tasks_is_answered_with_its_own(key, meant):
    assert message(parse_config, {**RUN, **TASKS}, key) == f"unknown key {key}; did you mean {meant}?"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("engine.tp", "engine.tensor_parallel_size"),
        ("engine.ngpu", "engine.gpus"),
        ("tp", "engine.tensor_parallel_size"),
        ("answering.temp", "answering.temperature"),
        ("answering.k", "answering.n"),
        ("answering.max_new_tokens", "answering.max_tokens"),
        ("model_path", "model"),
        ("engine.precision", "engine.dtype"),
        ("engine.seq_len", "engine.max_length"),
        ("limits.timeout", "limits.deadline_s"),
        ("access.api_keys", "access.keys_file or access.keys_env"),
        ("num_replicas", "engine.replicas or reasoner.replicas"),
        ("task.file", "task.path"),
    ],
)
def test_a_wrong_key_of_a_service_is_answered_with_the_keys_that_fit(key, meant):
    assert message(parse_serve_config, {"model": "m"}, key) == f"unknown key {key}; did you mean {meant}?"


@pytest.mark.parametrize("key", ["wandb.project", "sampling.top_k", "nodes", "zzzz", "port"])
def test_a_key_without_a_counterpart_gets_no_misleading_answer(key):
    assert message(parse_config, RUN, key) == f"unknown key {key}; `aft-ray keys` lists the known ones"


def test_a_service_and_the_assumptions_of_a_plan_name_their_own_lists_of_keys():
    assert message(parse_serve_config, {"model": "m"}, "zzzz").endswith("; `aft-ray keys --serve` lists the known ones")
    with pytest.raises(ConfigError, match="unknown key zzzz; the end of every plan lists the known ones"):
        parse_assumptions(["zzzz=1"])


@pytest.mark.parametrize(
    ("parse", "model", "tree"), [(parse_config, RunConfig, RUN), (parse_serve_config, ServeConfig, {"model": "m"})]
)
def test_no_answer_is_ever_a_section(parse, model, tree):
    keys = {".".join(key) for key in value_keys(model)}
    for name in ["training", *model.model_fields]:
        for wrong in (f"{name}_", f"{name[:-1]}", f"x{name}"):
            if wrong not in model.model_fields and wrong:
                said = message(parse, tree, wrong)
                if "did you mean" in said:
                    meant = said.partition("did you mean ")[2].rstrip("?").replace(" or ", ", ").split(", ")
                    assert set(meant) <= keys


def test_a_section_that_is_given_as_a_value_is_said_to_be_one():
    with pytest.raises(ConfigError, match=r"^model='some/model': model is a section of keys, such as model\.name$"):
        parse_config({"run_dir": "x", "model": "some/model"})
