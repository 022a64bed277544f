"""Plans: which configs fit, how others are refused, the best split, and properties that hold for any config."""

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import tiny_tree

from aft_ray.cli import main
from aft_ray.cluster import uniform_nodes
from aft_ray.cluster.placement import Node, place
from aft_ray.cluster.reservations import Split, split_of, training_reservations
from aft_ray.config.run import ConfigError, load_config, parse_config
from aft_ray.planning import plan
from aft_ray.planning.plan.architecture import architecture_of
from aft_ray.planning.plan.assumptions import PlanAssumptions, parse_assumptions
from aft_ray.planning.plan.hardware import NODES, ClusterShape, load_node
from aft_ray.planning.plan.plan import fewest_nodes
from aft_ray.planning.plan.planner import Planner
from aft_ray.planning.plan.problems import engine_fits, problems
from aft_ray.planning.plan.report import overrides
from aft_ray.planning.plan.search import TENSOR_PARALLEL, best_split
from aft_ray.planning.plan.step_shape import StepShapes
from aft_ray.planning.plan.workload import workload

CONFIGS = Path(__file__).parents[3] / "jobs/configs"
BIG = sorted(path for path in CONFIGS.glob("*.yaml") if "aft-ray plan" in path.read_text())
H100 = NODES["h100-80gb"]


def config_of(**sections):
    tree = {
        "run_dir": "runs/x",
        "model": {"name": "meta-llama/Llama-2-70b-hf"},
        "data": {"task": "gsm8k"},
        "sampling": {"samplers": 1, "tensor_parallel_size": 8, "gpus_per_sampler": 8},
        "training": {
            "workers": 24,
            "gpus_per_worker": 1,
            "zero_stage": 3,
            "activation_checkpointing": "full",
            "groups_per_step": 144,
            "tokens_per_microbatch": 8192,
        },
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config(tree)


def planner_of(config, nodes=4, node=H100, assumptions=None):
    assumptions = assumptions or PlanAssumptions()
    return Planner(
        config, ClusterShape(node, nodes), assumptions, architecture_of(config), workload(config, assumptions)
    )


# --- the configs in jobs/configs


@pytest.mark.parametrize("path", BIG, ids=lambda path: path.stem)
def test_every_config_for_gpus_fits_the_nodes_that_its_comment_names(path):
    config = load_config(path)
    nodes, node = re.search(r"aft-ray plan \S+ --nodes (\d+) --node (\S+)", path.read_text()).groups()
    run_plan = plan(config, ClusterShape(load_node(node), int(nodes)))
    assert run_plan.problems == ()
    assert run_plan.gpus <= run_plan.planner.cluster.gpus
    assert fewest_nodes(config, load_node(node)).nodes == int(nodes)
    assert re.search(rf"needs {nodes} nodes? with 8 \S+ of", path.read_text())
    best, time = run_plan.best
    assert time.round <= run_plan.time.round <= 1.15 * time.round, f"{best} would take {time.round:.0f} s"


def test_there_are_configs_for_big_models():
    assert len(BIG) >= 7


def test_long_responses_of_a_7b_fit_one_node():
    config = config_of(
        model={"name": "Qwen/Qwen2.5-7B", "max_length": 9216},
        sampling={"samplers": 2, "tensor_parallel_size": 1, "gpus_per_sampler": 1, "k": 8, "max_tokens": 8192},
        training={"workers": 6, "groups_per_step": 96, "tokens_per_microbatch": 9216},
    )
    run_plan = plan(config, ClusterShape(H100, 1), parse_assumptions(["response_tokens=3500"]))
    assert run_plan.problems == ()
    assert run_plan.training.seconds > 0
    # A group of 9 responses is split over several rows, whose scores are computed first.
    assert any("of them twice" in line.how for line in run_plan.training.lines)


def test_the_time_of_a_step_is_that_of_the_planner_on_drawn_lengths():
    planner = planner_of(config_of())
    shapes = StepShapes(planner.config, planner.work, planner.assumptions)
    few, many = shapes.of(4), shapes.of(24)
    assert few.group_tokens == many.group_tokens  # the same groups
    assert 1 < few.train_passes <= 3
    assert many.train_passes == 1
    assert min(few.balance, many.balance) > 0.95
    # One group each: the slowest worker has one with candidates, others a reference alone.
    assert shapes.of(144).balance < 0.6
    vft = StepShapes(planner.config, planner.work, planner.assumptions, vft=True).of(24)
    assert vft.group_tokens == pytest.approx(65 + 93 - 1, rel=0.1)


def test_workers_that_share_a_row_are_planned_as_one_rank():
    alone = planner_of(config_of(training={"workers": 24}))
    together = planner_of(config_of(training={"workers": 24, "sequence_parallel_size": 4}))
    assert problems(together, Split(1, 8, 22)) != []
    assert together.trainer_memory(24).device == pytest.approx(alone.trainer_memory(24).device, rel=0.1)


# --- refusals, one sentence each


def problem(config, nodes=4, node=H100):
    found = plan(config, ClusterShape(node, nodes)).problems
    return found[0]


def test_stage_2_of_a_large_model_is_refused_with_the_arithmetic_and_a_way_out():
    config = config_of(training={"zero_stage": 2})
    said = problem(config)
    assert said.startswith("ZeRO-2 on 24 workers needs ")
    assert "a GPU of h100-80gb has 85.5 GB; set training.zero_stage=3" in said
    assert not plan(config_of(), ClusterShape(H100, 4)).problems


@pytest.mark.parametrize(
    "training",
    [
        {"zero_stage": 2},
        {"workers": 8},
        {"activation_checkpointing": "none", "tokens_per_microbatch": 16384},
        {"workers": 12, "tokens_per_microbatch": 65536, "activation_checkpointing": "none"},
    ],
)
def test_every_way_out_that_is_named_fits(training):
    config = config_of(training=training)
    said = problem(config, nodes=12)
    ways = said.rpartition("; set ")[2].split(", or ")
    assert ways
    for way in ways:
        tree = config.model_dump()
        for change in way.split():
            key, value = change.removeprefix("training.").split("=")
            tree["training"][key] = yaml.safe_load(value)
        assert not plan(parse_config(tree), ClusterShape(H100, 12)).problems, way


def test_too_few_nodes_are_refused_with_how_many_are_needed():
    said = problem(config_of(), nodes=3)
    assert "the config needs 32 GPUs" in said
    assert "4 x h100-80gb are enough, and 3 x h100-80gb have 24" in said


def test_an_engine_that_is_too_large_for_its_gpu_is_refused():
    said = problem(config_of(sampling={"tensor_parallel_size": 1, "gpus_per_sampler": 1}))
    assert "needs 138.0 GB for weights" in said
    assert said.endswith("set sampling.tensor_parallel_size=2")


def test_heads_that_do_not_divide_are_refused():
    said = problem(config_of(sampling={"tensor_parallel_size": 3, "gpus_per_sampler": 3}))
    assert said.startswith("sampling.tensor_parallel_size=3 splits neither the 64 heads")


def test_an_engine_larger_than_a_node_is_refused():
    said = problem(config_of(sampling={"tensor_parallel_size": 16, "gpus_per_sampler": 16}))
    assert "16 GPUs in one node" in said


def test_offloading_more_than_a_node_has_is_refused():
    small = H100.model_copy(update={"host_memory": 400.0})
    config = config_of(training={"workers": 8, "offload_optimizer": True})
    assert "of host memory, and h100-80gb has 400.0 GB" in problem(config, node=small)


def test_a_task_whose_size_is_not_known_asks_for_it():
    config = config_of(data={"task": "custom", "path": "x", "custom": {"train": "a.jsonl"}})
    with pytest.raises(ConfigError, match=r"--assume questions=NUMBER, or set train_limit"):
        plan(config, ClusterShape(H100, 4))
    assert plan(config, ClusterShape(H100, 4), parse_assumptions(["questions=1000"])).planner.work.questions == 1000


def test_a_length_above_the_models_context_is_refused():
    with pytest.raises(ConfigError, match=r"longer than the context of meta-llama/Llama-2-70b-hf \(4,096 tokens\)"):
        plan(config_of(model={"max_length": 8192}), ClusterShape(H100, 4))


def test_unknown_nodes_and_assumptions_are_named(tmp_path):
    with pytest.raises(ConfigError, match="--node=h100 is none of a100-40gb"):
        load_node("h100")
    with pytest.raises(ConfigError, match="unknown key mfuu; did you mean mfu"):
        parse_assumptions(["mfuu=0.5"])
    described = tmp_path / "ours.yaml"
    described.write_text("gpus: 4\ncpus: 64\nhost_memory: 512\ngpu_memory: 80\nnetwork: 25\nstorage: 2\n")
    with pytest.raises(ConfigError, match="the node ours has 4 GPUs, so it needs gpu_tflops"):
        load_node(str(described))
    described.write_text(described.read_text() + "gpu_tflops: 300\ngpu_bandwidth: 2000\n")
    assert (load_node(str(described)).name, load_node(str(described)).gpus) == ("ours", 4)
    small = config_of(model={"name": "Qwen/Qwen2.5-0.5B"}, sampling={"tensor_parallel_size": 1, "gpus_per_sampler": 1})
    assert plan(small, ClusterShape(load_node(str(described)), 7)).problems == ()  # without NVLink, over PCIe
    with pytest.raises(ConfigError, match="the config reserves GPUs and cpu has none"):
        plan(small, ClusterShape(NODES["cpu"], 1))


# --- the command


def test_the_command_prints_every_part_and_writes_json(tmp_path, capsys):
    file = tmp_path / "plan.json"
    path = str(CONFIGS / "llama2_70b_gsm8k.yaml")
    main(["plan", path, "--nodes", "4", "--price-per-gpu-hour", "2.5", "--json", str(file)])
    said = capsys.readouterr().out
    for part in ("68,976,648,192", ": fits", "GPU-hours", "best split", "KV cache of a token", "mfu"):
        assert part in said
    written = json.loads(file.read_text())
    assert written["model"]["parameters"] == 68_976_648_192
    assert written["round"]["round"] == max(written["round"]["sampling"], written["round"]["training"])
    assert written["gpu_hours"] == pytest.approx(32 * written["run_seconds"] / 3600)


def test_the_command_refuses_after_it_has_shown_the_arithmetic(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(CONFIGS / "llama2_70b_gsm8k.yaml"), "training.zero_stage=2"])
    assert ended.value.code == 2
    said = capsys.readouterr()
    (sentence,) = said.err.splitlines()
    assert sentence.startswith("error: ZeRO-2 on ")
    assert "does NOT fit" in said.out
    assert "best split     none fits: ZeRO-2 on 24 workers" in said.out
    assert "whole run" not in said.out  # a plan that does not fit has no times


def test_a_run_without_gpus_is_compared_with_host_memory(tiny_model):
    tree = tiny_tree("runs/x", tiny_model)
    run_plan = plan(parse_config(tree), ClusterShape(NODES["cpu"], 1))
    assert run_plan.problems == ()
    tree["sampling"]["kv_cache_gib"] = 40
    (said,) = plan(parse_config(tree), ClusterShape(NODES["cpu"], 1)).problems
    assert "of host memory, and cpu has 34.0 GB; lower training.tokens_per_microbatch or sampling.kv_cache_gib" in said


def test_the_plan_of_a_larger_cluster_says_what_is_idle_and_which_split_is_best(capsys):
    main(["plan", str(CONFIGS / "llama2_70b_gsm8k.yaml"), "--nodes", "8"])
    said = capsys.readouterr().out
    assert "32 GPUs idle" in said
    changes = re.search(r"^ +((?:\S+=\S+ ?)+)$", said, re.MULTILINE).group(1).split()
    config = load_config(CONFIGS / "llama2_70b_gsm8k.yaml", changes)
    run_plan = plan(config, ClusterShape(H100, 8))
    assert run_plan.best[1].round == pytest.approx(run_plan.time.round)


# --- properties of any config


@st.composite
def configs(draw):
    stage = draw(st.sampled_from([1, 2, 3]))
    tensor_parallel = draw(st.sampled_from([1, 2, 4, 8]))
    return config_of(
        model={"name": draw(st.sampled_from(["meta-llama/Llama-2-7b-hf", "Qwen/Qwen2.5-14B", "huggyllama/llama-65b"]))},
        rounds={"max_staleness": draw(st.sampled_from([0, 1])), "evaluate_every": draw(st.sampled_from([0, 1, 3]))},
        sampling={
            "k": draw(st.integers(2, 16)),
            "samplers": draw(st.integers(1, 4)),
            "tensor_parallel_size": tensor_parallel,
            "gpus_per_sampler": tensor_parallel,
        },
        training={
            "workers": draw(st.integers(1, 20)),
            "zero_stage": stage,
            "activation_checkpointing": draw(st.sampled_from(["none", "selective", "full"])),
            "offload_optimizer": draw(st.booleans()),
            "groups_per_step": draw(st.integers(20, 64)),
        },
        weights={"transport": draw(st.sampled_from(["object_store", "checkpoint", "nccl"]))},
    )


@settings(deadline=None)
@given(configs(), st.integers(1, 19))
def test_more_workers_never_need_more_memory_each(config, workers):
    planner = planner_of(config)
    fewer, more = planner.trainer_memory(workers), planner.trainer_memory(workers + 1)
    assert more.device <= fewer.device
    assert more.host <= fewer.host


@settings(deadline=None)
@given(configs())
def test_a_larger_k_never_takes_less_time(config):
    tree = config.model_dump()
    tree["sampling"]["k"] += 1
    before, after = planner_of(config), planner_of(parse_config(tree))
    split = split_of(config)
    assume(engine_fits(before, split.tensor_parallel))
    assert after.times.training(split.workers).seconds >= before.times.training(split.workers).seconds * 0.999
    assert after.sampling_seconds(split) >= before.sampling_seconds(split) * 0.999


@settings(deadline=None)
@given(configs())
def test_the_time_of_a_round_lies_between_its_longer_side_and_the_sum(config):
    planner, split = planner_of(config), split_of(config)
    assume(engine_fits(planner, split.tensor_parallel))
    time = planner.round_time(split)
    assert max(time.sampling, time.training) <= time.round <= time.sampling + time.training


@settings(max_examples=30, deadline=None)
@given(configs(), st.sampled_from([0.25, 1, 3]), st.sampled_from(["HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-0.5B"]))
def test_a_config_that_fits_is_no_faster_than_the_best_split(config, gpus, name):
    tree = config.model_dump()
    tree["model"]["name"] = name
    tree["sampling"] |= {"tensor_parallel_size": 3 if gpus == 3 else 1, "gpus_per_sampler": gpus}
    run_plan = plan(parse_config(tree), ClusterShape(H100, 1))
    assume(not run_plan.problems)
    assert run_plan.best[1].round <= run_plan.time.round


@settings(max_examples=40, deadline=None)
@given(configs(), st.integers(1, 2), st.sampled_from([3, 4]))
def test_no_split_is_faster_than_the_best_one(config, nodes, gpus):
    planner = planner_of(config, nodes, H100.model_copy(update={"gpus": gpus, "gpu_memory": 160.0}))
    cluster = planner.cluster
    best = best_split(planner)
    fastest = None
    for size, samplers, workers in itertools.product(TENSOR_PARALLEL, range(1, cluster.gpus), range(1, cluster.gpus)):
        split = Split(samplers, size, workers)
        if not planner.fits(split) or problems(planner, split):
            continue
        time = planner.round_time(split)
        fastest = min(fastest or time.round, time.round)
    if fastest is None:
        assert best is None
    else:
        assert best[1].round == pytest.approx(fastest)
        assert not problems(planner, best[0])


@settings(deadline=None)
@given(
    st.integers(1, 12), st.sampled_from([1, 2, 3, 4, 5, 8]), st.integers(1, 40), st.integers(1, 6), st.integers(1, 30),
    st.integers(1, 6), st.sampled_from([1, 2]),
)  # fmt: skip
def test_a_split_fits_exactly_when_a_run_could_be_placed(samplers, size, workers, nodes, cpus, worker_cpus, stages):
    config = config_of(
        sampling={
            "samplers": samplers,
            "tensor_parallel_size": size,
            "pipeline_parallel_size": stages,
            "gpus_per_sampler": size * stages,
            "cpus_per_sampler": cpus,
        },
        training={"workers": workers, "cpus_per_worker": worker_cpus},
    )
    node = H100.model_copy(update={"cpus": 32})
    try:
        place(training_reservations(config), [Node(str(number), 32, 8) for number in range(nodes)])
    except ConfigError:
        placed = False
    else:
        placed = True
    assert uniform_nodes.fits(config, split_of(config), node.resources, nodes) == placed
    needed = uniform_nodes.nodes_needed(config, split_of(config), node.resources)
    assert (needed is not None and needed <= nodes) == placed


def test_colocated_engines_take_no_gpus_of_their_own():
    config = config_of(
        model={"name": "meta-llama/Llama-2-7b-hf"},
        rounds={"max_staleness": 0},
        sampling={"colocate": True, "samplers": 8, "tensor_parallel_size": 1, "gpus_per_sampler": 1},
        training={"workers": 8, "zero_stage": 2},
    )
    run_plan = plan(config, ClusterShape(H100, 1))
    assert (run_plan.problems, run_plan.gpus) == ((), 8)
    assert run_plan.time.round == run_plan.time.sampling + run_plan.time.training
    assert run_plan.best[0].samplers * run_plan.best[0].tensor_parallel <= run_plan.best[0].workers
    assert run_plan.best[1].round <= run_plan.time.round


def test_a_run_of_overlapping_rounds_starts_and_ends_without_overlap():
    overlapped = plan(config_of(rounds={"count": 5}, vft={"epochs": 0}), ClusterShape(H100, 4))
    g, t = overlapped.time.sampling, overlapped.time.training
    assert overlapped.seconds == pytest.approx(g + t + 4 * max(g, t))
    apart = plan(config_of(rounds={"count": 5, "max_staleness": 0}, vft={"epochs": 0}), ClusterShape(H100, 4))
    assert apart.seconds == pytest.approx(5 * (g + t))


def test_the_overrides_for_a_split_make_it():
    run_plan = plan(config_of(), ClusterShape(H100, 4))
    split = Split(2, 4, 16)
    changed = load_like(run_plan.planner.config, overrides(run_plan, split))
    assert split_of(changed) == split


def load_like(config, changes):
    tree = config.model_dump()
    for change in changes:
        key, value = change.split("=")
        section, name = key.split(".")
        tree[section][name] = json.loads(value)
    return parse_config(tree)


# --- the work of a round


def test_questions_come_from_the_config_or_the_task():
    def of(**sections):
        return workload(config_of(**sections), PlanAssumptions())

    assert of().questions == 7473
    assert "training split of gsm8k" in of().counted
    assert of(data={"train_limit": 100}).questions == 100
    assert "data.train_limit" in of(data={"train_limit": 100}).counted
    limited = of(rounds={"questions_per_round": 500})
    assert (limited.questions, limited.vft_questions) == (500, 7473)
    assert of(data={"task": "arithmetic", "arithmetic": {"train_size": 321}}).questions == 321


def test_responses_are_no_longer_than_the_config_allows():
    config = config_of(sampling={"max_tokens": 40})
    assert workload(config, PlanAssumptions()).response == 40
    assert (
        workload(config, parse_assumptions(["response_tokens=20", "prompt_tokens=500"])).response == 12
    )  # of max_length=512


def test_several_tasks_share_a_round():
    tree = config_of().model_dump(exclude={"data"})
    tree["tasks"] = {"gsm8k": {"weight": 1, "train_limit": 300}, "ecqa": {"weight": 2, "train_limit": 400}}
    work = workload(parse_config(tree), PlanAssumptions())
    assert (work.questions, work.vft_questions) == (600, 700)
    assert 49 < work.prompt < 65


def test_only_what_an_objective_trains_on_is_counted():
    def responses(name):
        return workload(config_of(objective={"name": name}), parse_assumptions(["signal=0.5", "distinct=1"])).responses

    assert (responses("vft"), responses("aft_boundary"), responses("rft")) == (1, 4, 4)
    assert (
        plan(config_of(objective={"name": "vft"}, rounds={"evaluate_every": 0}), ClusterShape(H100, 4)).sampling is None
    )


def test_adapters_need_less_memory_and_less_time_to_publish():
    whole = plan(config_of(), ClusterShape(H100, 4))
    adapted = plan(config_of(lora={"rank": 16}, weights={"transport": "lora"}), ClusterShape(H100, 4))
    assert adapted.trainer.states < 0.2 * whole.trainer.states
    assert adapted.publish_times["lora"].engines < 0.02 * adapted.publish_times["object_store"].engines
    assert "lora" not in whole.publish_times


def test_a_directory_is_written_beside_the_next_round_unless_engines_read_it():
    def of(transport):
        run_plan = plan(config_of(weights={"transport": transport}), ClusterShape(H100, 4))
        return run_plan, run_plan.publish_times[transport]

    run_plan, sent = of("nccl")
    _, read = of("checkpoint")
    labels = [[line.label for line in lines] for lines in (sent.trainer_lines, sent.beside, read.trainer_lines)]
    assert labels == [
        ["copying to host memory"],
        ["writing the model directory", "saving the training state"],
        ["copying to host memory", "writing the model directory"],
    ]
    # All nodes of the train workers write it.
    size, nodes = 2 * run_plan.planner.model.parameters, -(-run_plan.split.workers // H100.gpus)
    seconds = size / (nodes * H100.storage * 1e9)
    assert sent.beside[0].value == read.trainer_lines[1].value == pytest.approx(seconds)
    (kept,) = [line for line in run_plan.trainer.host_lines if line.label == "layers to be written"]
    assert kept.value == pytest.approx(size / run_plan.split.workers)
