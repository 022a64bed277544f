"""Whole runs in this process: each round answers every question once, with the right version, and the models load."""

import json
from collections import Counter
from dataclasses import replace
from io import StringIO

import pandas as pd
import pytest
import torch
from rich.console import Console
from tiny import tiny_config, tiny_tree
from transformers import AutoModelForCausalLM, AutoTokenizer

from aft_ray.config.run import parse_config
from aft_ray.evaluation.generations import read_generations
from aft_ray.evaluation.statistics.metrics import EvaluationMetrics, measure
from aft_ray.observe.reporter import Reporter
from aft_ray.observe.summary import read_events, state_lines
from aft_ray.run import launch
from aft_ray.sampling.round import RoundSampling, RunFailed
from aft_ray.sampling.sampler_pool import SamplerPool
from aft_ray.sampling.stream import sample_round
from aft_ray.storage.groups.group_table import GroupTable
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.records import Verdict
from aft_ray.storage.run_dir import RunDir
from aft_ray.tasks.dataset import count_by_task, load_tokenizer, questions_of_round, tokenize_split
from aft_ray.verify.answers.numbers import extract_after_marker
from aft_ray.weights.version_manifest import WeightUpdateFailed, read_version_manifest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(1200)]


def run(config) -> bool:
    with quiet_reporter(config) as reporter:
        return launch.run(config, reporter)


def quiet_reporter(config) -> Reporter:
    return Reporter(RunDir(config.run_dir), Console(file=StringIO()))


def events(config, name):
    return [event for event in read_events(RunDir(config.run_dir)) if event["event"] == name]


def groups_of(config, number):
    return Ledger(RunDir(config.run_dir)).read_groups(number)


def assert_each_question_once(config, number, k):
    """Every question of the round has exactly one group, labelled, with k candidates."""
    tokenizer = load_tokenizer(config)
    questions = tokenize_split(config, "train", tokenizer).groups
    wanted = {group.question.id: group for group in questions_of_round(config, questions, number)}
    groups = groups_of(config, number)
    assert [group.question.id for group in groups] == sorted(wanted)
    for group in groups:
        assert group.prompt_token_ids == wanted[group.question.id].prompt_token_ids
        assert len(group.candidates) == k
        for candidate in group.candidates:
            assert candidate.text == tokenizer.decode(candidate.token_ids, skip_special_tokens=True)
            assert (candidate.reward == 1.0) is (candidate.verdict is Verdict.RIGHT)
    return groups


def model_of(config, number):
    directory = RunDir(config.run_dir).local_path(f"rounds/{number:04d}/model")
    AutoTokenizer.from_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory)


def assert_model_scores_its_probes(config, number):
    model, directory = model_of(config, number).eval(), RunDir(config.run_dir).local_path(f"rounds/{number:04d}/model")
    manifest = read_version_manifest(number, directory)
    assert manifest.probes
    for probe in manifest.probes:
        with torch.no_grad():
            ids = torch.tensor([probe.prompt_token_ids + probe.response_token_ids])
            logprobs = model(ids).logits[0].log_softmax(-1)
        at = range(len(probe.prompt_token_ids) - 1, ids.shape[1] - 1)
        mean = sum(logprobs[i, ids[0, i + 1]].item() for i in at) / len(at)
        assert mean == pytest.approx(probe.score, abs=1e-5)


@pytest.fixture(scope="module")
def overlapped(ray_here, tiny_model, tmp_path_factory):
    config = tiny_config(
        tmp_path_factory.mktemp("overlapped") / "run",
        tiny_model,
        rounds={"count": 2, "max_staleness": 1, "evaluate_every": 1, "questions_per_round": 24},
        sampling={"samplers": 2},
    )
    assert run(config)
    return config


def test_each_round_of_an_overlapped_run_has_every_question_once(overlapped):
    for number in (1, 2):
        assert_each_question_once(overlapped, number, overlapped.sampling.k)
    assert all(group.candidates == [] for group in groups_of(overlapped, 0))
    assert len(groups_of(overlapped, 0)) == 40


def test_each_round_was_sampled_by_one_version_not_staler_than_allowed(overlapped):
    ledger = Ledger(RunDir(overlapped.run_dir))
    for number in (1, 2):
        (version,) = {group.policy_version for group in groups_of(overlapped, number)}
        assert version == ledger.policy_version(number)
        assert number - 1 - overlapped.rounds.max_staleness <= version <= number - 1
    assert ledger.trained_rounds() == [0, 1, 2]


def test_the_events_tell_the_whole_run(overlapped):
    names = Counter(event["event"] for event in read_events(RunDir(overlapped.run_dir)))
    assert names == {
        "started": 1, "sampler_joined": 2, "sampled": 2, "trained": 3, "published": 3, "evaluated": 3, "finished": 1,
        "step": 3 + 2 + 2,
    }  # fmt: skip
    assert [event["groups"] for event in events(overlapped, "sampled")] == [24, 24]
    assert [event["version"] for event in events(overlapped, "published")] == [0, 1, 2]
    for event in events(overlapped, "published"):
        assert 0 <= event["probe_difference"] < overlapped.score_tolerance
    losses = [event["loss"] for event in events(overlapped, "step") if event["round"] == 0]
    assert losses[-1] < losses[0]
    assert [event["global_step"] for event in events(overlapped, "step")] == [0, 1, 2, 0, 1, 2, 3]


def test_each_validation_is_written(overlapped):
    for version in (0, 1, 2):
        record = json.loads(
            RunDir(overlapped.run_dir).read_bytes(f"evaluations/validation-{version:04d}.json").decode()
        )
        assert (record["version"], record["parked"]) == (version, 0)
        answers = RunDir(overlapped.run_dir).local_path(f"evaluations/generations-validation-{version:04d}.jsonl")
        again = measure(read_generations(answers, overlapped), resamples=overlapped.evaluation.resamples)
        assert again.to_json() == EvaluationMetrics.from_json(record).to_json()
        (event,) = (event for event in events(overlapped, "evaluated") if event["version"] == version)
        assert event["greedy"] == again.estimates["greedy"].value


def test_each_published_model_loads_anywhere_and_scores_as_the_trainer_said(overlapped):
    for number in (0, 1, 2):
        assert_model_scores_its_probes(overlapped, number)
    first, last = model_of(overlapped, 0).state_dict(), model_of(overlapped, 2).state_dict()
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_group_files_are_readable_as_they_are(overlapped):
    frame = pd.read_parquet(RunDir(overlapped.run_dir).local_path("rounds/0001/groups"))
    assert len(frame) == 24
    assert {len(candidates) for candidates in frame["candidates"]} == {overlapped.sampling.k}


def test_a_finished_run_has_nothing_to_do(overlapped):
    before = RunDir(overlapped.run_dir).listdir("ledger")
    assert run(overlapped) is False
    assert RunDir(overlapped.run_dir).listdir("ledger") == before
    (line,) = state_lines(overlapped, RunDir(overlapped.run_dir))
    assert line.startswith("finished: 2 rounds")


def test_two_sharded_workers_train_rft_around_a_question_that_the_engine_refuses(untied_model, tmp_path):
    """The run starts from the given model, and its sampler reads versions from disk."""
    config = tiny_config(
        tmp_path / "run",
        untied_model,
        objective={"name": "rft"},
        vft={"epochs": 0},
        training={"workers": 2, "zero_stage": 3},
        weights={"transport": "checkpoint", "shard_mib": 1},
        data={"train_limit": 24},
    )
    run_with_refused(config, 1)
    (failed,) = Ledger(RunDir(config.run_dir)).failed_questions(1)
    assert failed.question_id == "too-long-0"
    assert "leaves no room" in failed.reason
    assert failed.attempts == 1
    (sampled,) = events(config, "sampled")
    assert (sampled["groups"], sampled["parked"]) == (24, 1)
    assert {group.policy_version for group in assert_each_question_once(config, 1, 3)} == {0}
    assert [(event["round"], event["steps"]) for event in events(config, "trained")] == [(1, 2)]
    assert [event["version"] for event in events(config, "published")] == [1]
    assert_model_scores_its_probes(config, 1)


def run_with_refused(config, refused) -> None:
    """A run with questions that are longer than the context, which its preparation would leave out."""
    tokenizer = load_tokenizer(config)
    groups = tokenize_split(config, "train", tokenizer).groups
    groups = GroupTable.of([*groups, *(too_long(groups[0], number) for number in range(refused))])
    run_dir = RunDir(config.run_dir)
    with quiet_reporter(config) as reporter, run_dir.lock(reporter.say) as lock:
        ledger = Ledger(run_dir)
        launch.run_on_cluster(
            config,
            run_dir,
            lock,
            ledger,
            reporter,
            launch.RunData(groups, GroupTable.of([]), (tokenizer.eos_token_id,)),
        )


def too_long(group, number):
    prompt = (group.prompt_token_ids * 50)[:200]
    return replace(group, prompt_token_ids=prompt, question=replace(group.question, id=f"too-long-{number}"))


@pytest.mark.timeout(900)
def test_two_tasks_share_every_round_by_weight_and_are_both_validated(tiny_model, tmp_path):
    tree = tiny_tree(tmp_path / "run", tiny_model, rounds={"questions_per_round": 12, "evaluate_every": 1})
    del tree["data"]
    tree["tasks"] = {
        "easy": {"task": "arithmetic", "arithmetic": {"min_steps": 1, "max_steps": 1}},
        "hard": {"task": "arithmetic", "arithmetic": {"max_steps": 2, "seed": 1}, "answer_marker": "=", "weight": 2},
    }
    for entry, limit in zip(tree["tasks"].values(), (4, 5), strict=True):
        entry |= {"train_limit": 24, "validation_limit": limit}
    config = parse_config(tree)
    assert run(config)
    assert count_by_task(groups_of(config, 0)) == {"easy": 24, "hard": 24}
    groups = assert_each_question_once(config, 1, config.sampling.k)
    assert count_by_task(groups) == {"easy": 4, "hard": 8}
    for group in groups:  # the answer is what the task of the question extracts
        marker = config.tasks[group.question.task].answer_marker
        assert group.question.reference.rpartition(marker)[2].strip() == group.question.gold
        assert [c.answer for c in group.candidates] == [extract_after_marker(c.text, marker) for c in group.candidates]
    assert [event["steps"] for event in events(config, "trained")] == [3, 1]
    record = json.loads(RunDir(config.run_dir).read_bytes("evaluations/validation-0001.json"))
    assert record["questions"] == 9
    assert run(config) is False


def test_weights_that_are_not_finite_end_the_run_in_one_sentence_with_the_questions(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "broken")
    model.save_pretrained(tmp_path / "broken")
    config = tiny_config(tmp_path / "run", tmp_path / "broken", objective={"name": "vft"})
    with pytest.raises(RunFailed, match="the loss is not finite on the questions arithmetic-train-0") as error:
        run(config)
    assert "\n" not in str(error.value)
    assert events(config, "trained") == []
    assert Ledger(RunDir(config.run_dir)).trained_rounds() == []


@pytest.fixture(scope="module")
def pool(overlapped):
    """A sampler that starts from the fine-tuned model of the overlapped run, and holds no version yet."""
    model = RunDir(overlapped.run_dir).local_path("rounds/0000/model")
    alone = overlapped.model_copy(update={"sampling": overlapped.sampling.model_copy(update={"samplers": 1})})
    pool = SamplerPool.start(alone, str(model), (1,), None, None)
    pool.wait_ready()
    yield pool
    pool.close()


def published(config, version):
    return read_version_manifest(version, RunDir(config.run_dir).local_path(f"rounds/{version:04d}/model"))


def test_wrong_weights_are_refused_and_the_right_version_is_loaded_after_them(overlapped, pool):
    right = published(overlapped, 2)
    wrong = replace(right, probes=tuple(replace(probe, score=probe.score + 0.01) for probe in right.probes))
    with pytest.raises(
        WeightUpdateFailed, match=r"sampler 0 scores .* version 2 .* 0\.01 .* weights.tolerance \(0\.0001;"
    ):
        pool.load(wrong)
    with pytest.raises(WeightUpdateFailed, match="nan"):
        pool.load(replace(right, probes=(replace(right.probes[0], score=float("nan")), *right.probes[1:])))
    assert pool.statuses()[0].version is None
    (loaded,) = pool.load(right)
    assert loaded.version == 2
    assert loaded.probe_difference < 1e-4
    assert pool.load(right)[0].load_s == 0.0  # the sampler holds this version already
    assert pool.statuses()[0].version == 2


def test_more_refused_questions_than_allowed_end_the_round_in_one_sentence(overlapped, pool, tmp_path):
    config = overlapped.model_copy(update={"run_dir": str(tmp_path / "run")})
    tokenizer = load_tokenizer(config)
    groups = tokenize_split(config, "train", tokenizer).groups[:10]
    groups = [*groups, *(too_long(groups[0], number) for number in range(3))]
    run_dir = RunDir(config.run_dir)
    ledger, manifest = Ledger(run_dir), published(overlapped, 2)
    pool.load(manifest)

    def stream(manifest, groups):
        return sample_round(config, pool, manifest, groups, run_dir)

    with quiet_reporter(config) as reporter:
        sampling = RoundSampling(config, ledger, reporter, groups, stream, lambda: None)
        for _ in range(2):  # a run that is resumed tries failed questions again
            with pytest.raises(RunFailed, match=r"3 of 13 questions could not .* sampling.max_failed=0.05; 3 times"):
                sampling.sample(1, manifest, 0.0)
    assert len(ledger.failed_questions(1)) == 3
    assert len(ledger.read_groups(1)) == 10
    assert ledger.sampled(1) is None
