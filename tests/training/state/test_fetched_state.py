"""A resumed run fetches its training state: on nodes that share their scratch directory, and when it is damaged."""

import multiprocessing
import os
from datetime import timedelta

import torch.distributed as dist

from aft_ray.storage.run_dir import RunDir
from aft_ray.training.model.loading import LoadingError
from aft_ray.training.process_groups import DamagedState
from aft_ray.training.state.checkpoint import fetched_state

COMMON = "state/mp_rank_00_model_states.pt"
SHARD = "state/zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def node_of_one_rank(rank, run_dir, scratch, results):
    """One of two nodes, each with one rank, whose TMPDIR is the same directory."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TMPDIR": str(scratch)}
    store = f"file://{scratch}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=2)
    with fetched_state(RunDir(str(run_dir)), "rounds/0001/checkpoint", 60) as state:
        files = {
            path.relative_to(state.directory).as_posix(): path.read_text() for path in state.directory.rglob("*.pt")
        }
        results.put((rank, str(state.directory), files, state.universal))
    dist.destroy_process_group()


def test_nodes_that_share_a_scratch_directory_fetch_side_by_side(tmp_path):
    saved = tmp_path / "saved" / "state"
    saved.mkdir(parents=True)
    contents = {COMMON: "weights", SHARD.format(0): "shard 0", SHARD.format(1): "shard 1"}
    for name, text in contents.items():
        (tmp_path / "saved" / name).write_text(text)
    run_dir, path = RunDir(str(tmp_path / "run")), "rounds/0001/checkpoint"
    run_dir.write_manifest(path, run_dir.add_files(tmp_path / "saved", path))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    nodes = [
        context.Process(target=node_of_one_rank, args=(rank, tmp_path / "run", scratch, results)) for rank in range(2)
    ]
    for node in nodes:
        node.start()
    (_, first, of_first, universal), (_, second, of_second, _) = sorted(results.get(timeout=60) for _ in nodes)
    for node in nodes:
        node.join(60)
        assert node.exitcode == 0
    assert not universal
    assert first != second
    assert of_first == {COMMON: "weights", SHARD.format(0): "shard 0"}
    assert of_second == {COMMON: "weights", SHARD.format(1): "shard 1"}
    assert list(scratch.glob("aft-ray-resume-*")) == []


def fetch_with_another_rank(rank, run_dirs, store, results):
    """One of two ranks of a node. Gives the class and the message of the error that each run directory leads to."""
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=2)
    found = {}
    for run_dir in run_dirs:
        try:
            with fetched_state(RunDir(str(run_dir)), "rounds/0001/checkpoint-000004", 60):
                found[run_dir.name] = ("fetched", "")
        except LoadingError as error:
            found[run_dir.name] = (type(error).__name__, str(error))
    results.put(found)
    dist.destroy_process_group()


def test_damage_of_one_file_is_named_on_every_rank(tmp_path):
    (tmp_path / "saved" / "state").mkdir(parents=True)
    for name in (COMMON, SHARD.format(0), SHARD.format(1)):
        (tmp_path / "saved" / name).write_text(f"contents of {name}")
    path, expected = "rounds/0001/checkpoint-000004", {"intact": ("fetched", "")}
    for damage in ("intact", "changed", "missing", "manifest"):
        run_dir = RunDir(str(tmp_path / damage))
        run_dir.write_manifest(path, run_dir.add_files(tmp_path / "saved", path))
        damaged = run_dir.local_path(path) / ("MANIFEST.json" if damage == "manifest" else SHARD.format(1))
        if damage == "missing":
            damaged.unlink()
            expected[damage] = (DamagedState.__name__, f"{damaged} is missing")
        elif damage != "intact":
            damaged.write_text(damaged.read_text().replace("e", "x", 1))
            digest = "" if damage == "manifest" else ": its sha256 is not that of the manifest"
            expected[damage] = (DamagedState.__name__, f"{damaged} is corrupted{digest}")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = [tmp_path / name for name in expected], f"file://{tmp_path}/store", results
    ranks = [context.Process(target=fetch_with_another_rank, args=(rank, *arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    assert [results.get(timeout=60) for _ in ranks] == [expected, expected]
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
