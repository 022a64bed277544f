"""A run that is continued with another number of workers takes the same steps."""

import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tiny import tiny_config

from aft_ray.config.run import ConfigError
from aft_ray.observe.reporter import Reporter
from aft_ray.observe.summary import read_events
from aft_ray.run import launch
from aft_ray.run.resume import adopt_config
from aft_ray.sampling.sampler_pool import SamplerPool
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def config_of(run_dir, model, **training):
    return tiny_config(
        run_dir,
        model,
        objective={"name": "vft"},
        rounds={"count": 2},
        data={"train_limit": 24},
        training={"zero_stage": 2, "groups_per_step": 8, **training},
    )


def run(config) -> str:
    said = StringIO()
    with Reporter(RunDir(config.run_dir), Console(file=said, width=1000)) as reporter:
        assert launch.run(config, reporter)
    return said.getvalue()


def steps(run_dir: Path) -> list[tuple]:
    """The steps of round 2 as they were last taken."""
    events = [e for e in read_events(RunDir(run_dir)) if e["event"] == "step" and e["round"] == 2]
    return [(e["step"], e["loss"], e["grad_norm"]) for e in events[-3:]]


def test_one_worker_continues_where_two_stopped(ray_here, tiny_model, tmp_path, monkeypatch):
    """The run is fine-tuning alone, which starts no samplers."""
    monkeypatch.setattr(SamplerPool, "start", lambda *_: pytest.fail("a sampler was started"))
    run(config_of(tmp_path / "two", tiny_model, workers=2))
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    # The state of a run that was killed before round 2 was trained. Ray Train still lists the checkpoint of round 2.
    (*_, last) = sorted((tmp_path / "one" / "ledger").glob("training-*"))
    last.unlink()
    for name in ("checkpoint", "model"):
        shutil.rmtree(tmp_path / "one" / "rounds" / "0002" / name)
    said = run(config_of(tmp_path / "one", tiny_model, tokens_per_microbatch=512))
    changed = "training.workers: 2 -> 1; training.tokens_per_microbatch: 16384 -> 512"
    assert f"continues with {changed}, which changes its steps by rounding only" in said
    ledger = Ledger(RunDir(tmp_path / "one"))
    assert ledger.trained_rounds() == [0, 1, 2]
    assert [len(ledger.read_groups(number)) for number in (0, 1, 2)] == [24, 24, 24]
    taken, expected = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert [step for step, _, _ in taken] == [1, 2, 3]
    for (_, *values), (_, *wanted) in zip(taken, expected, strict=True):
        assert values == pytest.approx(wanted, rel=1e-4)
    assert not list((tmp_path / "one" / "tmp").iterdir())


def test_what_changes_the_result_is_still_refused(tiny_model, tmp_path):
    run_dir = RunDir(tmp_path / "run")
    assert adopt_config(config_of(tmp_path / "run", tiny_model), run_dir)[1] == []
    changed = config_of(tmp_path / "run", tiny_model, workers=4, offload_optimizer=True, learning_rate=1.0)
    with pytest.raises(ConfigError, match=r"another config \(training.learning_rate: 0.0005 -> 1.0\)"):
        adopt_config(changed, run_dir)
