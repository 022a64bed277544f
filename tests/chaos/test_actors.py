"""The only sampler is killed in the middle of a round: Ray restarts it, and every question is answered once."""

import threading
import time

import pytest
import ray
from tiny import tiny_config

from aft_ray.evaluation.evaluator import unanswered_groups
from aft_ray.sampling.sampler_pool import SamplerPool
from aft_ray.sampling.stream import sample_round
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import RunDir
from aft_ray.tasks.dataset import load_tokenizer, questions_of_round, tokenize_split
from aft_ray.weights.version_manifest import read_version_manifest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(1200)]


def kill_at_work(actor) -> None:
    """Kills the only sampler as soon as it has answered something."""
    while not ray.get(actor.status.remote()).tokens:
        time.sleep(0.02)
    ray.kill(actor, no_restart=False)


def test_a_sampler_that_is_killed_catches_up_and_the_round_is_whole(tiny_model, tmp_path):
    config = tiny_config(
        tmp_path / "run",
        tiny_model,
        vft={"epochs": 0},
        data={"train_limit": 160},
        sampling={"batch_size": 4, "in_flight": 1, "groups_per_file": 16, "max_tokens": 60},
    )
    run_dir, tokenizer = RunDir(config.run_dir), load_tokenizer(config)
    questions = questions_of_round(config, tokenize_split(config, "train", tokenizer).groups, 1)
    ledger, manifest = Ledger(run_dir), read_version_manifest(1, tiny_model)
    pool = SamplerPool.start(config, str(tiny_model), (tokenizer.eos_token_id,), None, None)
    pool.wait_ready()
    try:
        pool.load(manifest)
        killer = threading.Thread(target=kill_at_work, args=pool.actors)
        killer.start()
        for written in sample_round(config, pool, manifest, unanswered_groups(questions, 1), run_dir):
            assert written.failed == ()
            assert ledger.commit(written.file)
        killer.join()
        (status,) = pool.statuses()
        assert status.version == 1  # it was updated to this version after its restart
    finally:
        pool.close()
    groups = ledger.read_groups(1)
    assert [group.question.id for group in groups] == [group.question.id for group in questions]
    assert {group.policy_version for group in groups} == {1}
    assert {len(group.candidates) for group in groups} == {config.sampling.k}
