import pytest
import yaml
from tiny import tiny_config, tiny_tree

from aft_ray.config.loader import dump_config
from aft_ray.config.run import ConfigError
from aft_ray.evaluation.answers import AnsweredQuestion, Response
from aft_ray.evaluation.generations import generations_text
from aft_ray.evaluation.targets import plan_evaluation
from aft_ray.storage.ledger import CheckpointRecord, Ledger
from aft_ray.storage.records import Verdict
from aft_ray.storage.run_dir import CONFIG, RunDir


@pytest.fixture
def run_dir(tmp_path, tiny_model):
    """A run that has published the versions 0 and 1."""
    config = tiny_config(tmp_path / "gsm8k", tiny_model, rounds={"count": 2})
    run_dir = RunDir(config.run_dir)
    run_dir.write_bytes(CONFIG, dump_config(config).encode())
    ledger = Ledger(run_dir)
    for number in (0, 1):
        for place in (run_dir.checkpoint(number), run_dir.model(number)):
            run_dir.write_json(f"{place}/config.json", {})
            run_dir.write_manifest(place, run_dir.hash_files(place))
        ledger.record_checkpoint(CheckpointRecord(number, 1, run_dir.checkpoint(number), True))
    return run_dir


def test_a_run_means_its_last_model_and_a_version_can_be_named(run_dir):
    run = str(run_dir.local_path())
    planned = plan_evaluation([run, f"{run}@0", "evaluation.k=2"], None)
    assert [target.label for target in planned.targets] == ["gsm8k@1", "gsm8k@0"]
    assert [target.source for target in planned.targets] == [f"{run}/rounds/0001/model", f"{run}/rounds/0000/model"]
    assert planned.config.evaluation.k == 2
    assert planned.targets[0].model.max_length == planned.config.model.max_length


def test_unknown_versions_are_refused(run_dir):
    with pytest.raises(ConfigError, match="has no version 7; it has published: 0, 1"):
        plan_evaluation([f"{run_dir.local_path()}@7"], None)


def test_a_config_sets_the_questions_and_a_run_its_model_section(run_dir, tmp_path):
    tree = tiny_tree(tmp_path / "other", tmp_path / "model", data={"test_limit": 3}, model={"max_length": 99})
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(tree))
    planned = plan_evaluation(
        [str(run_dir.local_path()), str(tmp_path / "model"), "evaluation.seeds=2"], tmp_path / "other.yaml"
    )
    assert (planned.config.data.test_limit, planned.config.evaluation.seeds) == (3, 2)
    run, model = planned.targets
    assert run.model.max_length == 160
    assert model.model is None
    assert planned.config.model.max_length == 99


def test_files_and_models_are_distinguished(run_dir, tmp_path):
    (tmp_path / "generations-x.jsonl").write_text(generations_text([AnsweredQuestion("a", Response(Verdict.RIGHT))]))
    (tmp_path / "model").mkdir()
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups" / "0.parquet").write_bytes(b"")
    named = [str(tmp_path / name) for name in ("generations-x.jsonl", "model", "groups")]
    planned = plan_evaluation([*named, str(run_dir.local_path())], None)
    assert [(target.label, target.kind) for target in planned.targets] == [
        ("x", "file"), ("model", "model"), ("groups", "file"), ("gsm8k@1", "model"),
    ]  # fmt: skip
    assert plan_evaluation([named[0]], None).config is None
