"""Sixteen ranks save a training state and resume from it: each reads and writes its own bytes alone.

The ranks are threads, and their files are random bytes under DeepSpeed's names; the functions are those of a run.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from slow_storage import CountedStorage

from aft_ray.storage.run_dir import RunDir, RunDirError
from aft_ray.training.state.checkpoint import Place, files_to_fetch

RANKS, OF_NODE, SHARD, COMMON = 16, 8, 40_000, 60_000
PLACES = [Place(rank, RANKS, rank % OF_NODE, OF_NODE) for rank in range(RANKS)]
SECONDS_PER_BYTE = 4e-6


def names(rank, stage):
    """The files that a rank writes, with their sizes."""
    files = {f"state/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt": SHARD}
    if stage == 3:
        files[f"state/zero_pp_rank_{rank}_mp_rank_00_model_states.pt"] = 500
    elif rank == 0:
        files["state/mp_rank_00_model_states.pt"] = COMMON
    return files


def mounts(kind, directory):
    """The run directory as each rank sees it, and a function that says how many bytes a rank has read and written."""
    if kind == "mounted":
        return [RunDir(directory) for _ in range(RANKS)], None
    stores = [CountedStorage(directory, SECONDS_PER_BYTE) for _ in range(RANKS)]
    return [RunDir("run", pafs.PyFileSystem(store)) for store in stores], stores


def on_every_rank(work):
    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(work, range(RANKS)))


def save(run_dirs, scratch, stage):
    """Every rank adds its files, and rank 0 writes the manifest of all. Returns the sizes of each rank's files."""

    def add(rank):
        for name, size in names(rank, stage).items():
            file = scratch / str(rank) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(os.urandom(size))
        return run_dirs[rank].add_files(scratch / str(rank), "checkpoint")

    written = on_every_rank(add)
    run_dirs[0].write_manifest("checkpoint", [file for files in written for file in files])
    return [sum(file.size for file in files) for files in written]


def fetch(run_dirs, target, place, universal=False):
    """What one rank does when a run is resumed. Returns the bytes of the files that it fetched."""
    run_dir = run_dirs[place.rank]
    files = files_to_fetch(run_dir.read_manifest("checkpoint"), place, universal, shared=run_dir.is_local)
    run_dir.fetch_files("checkpoint", files, target / str(place.rank // OF_NODE))
    return sum(file.size for file in files)


@pytest.mark.parametrize("stage", [2, 3])
def test_each_rank_writes_and_reads_its_own_bytes_on_a_slow_object_store(tmp_path, stage):
    run_dirs, stores = mounts("object store", tmp_path / "store")
    started = time.monotonic()
    sizes = save(run_dirs, tmp_path / "scratch", stage)
    manifest = len(run_dirs[0].read_bytes("checkpoint/MANIFEST.json"))
    slowest = time.monotonic() - started
    # Nobody reads anything back; rank 0 also writes the manifest.
    assert [store.written for store in stores] == [sizes[0] + manifest, *sizes[1:]]
    assert [store.read for store in stores] == [manifest, *[0] * (RANKS - 1)]  # read by this test
    assert slowest < RANKS * max(sizes) * SECONDS_PER_BYTE  # else one rank would have paid for all

    for store in stores:
        store.read = store.written = 0
    fetched = on_every_rank(lambda rank: fetch(run_dirs, tmp_path / "node", PLACES[rank]))
    own = [sum(names(rank, stage).values()) for rank in range(RANKS)]
    # The weights that all ranks load are fetched once on each of the two nodes.
    own[OF_NODE] += COMMON if stage == 2 else 0
    assert fetched == own
    assert [store.read for store in stores] == [size + manifest for size in own]
    assert [store.written for store in stores] == [0] * RANKS
    for node in range(2):
        there = {file.name for file in (tmp_path / "node" / str(node) / "state").iterdir()}
        needed = {
            Path(name).name for rank in range(node * OF_NODE, (node + 1) * OF_NODE) for name in names(rank, stage)
        }
        assert there == needed | ({"mp_rank_00_model_states.pt"} if stage == 2 else set())


def read_and_written():
    """The bytes that this process has read and written by system calls."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"]), int(counts["wchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc")
def test_each_rank_reads_its_own_bytes_once_on_mounted_storage(tmp_path):
    run_dirs, _ = mounts("mounted", tmp_path / "run")
    save(run_dirs, tmp_path / "scratch", 3)
    slack = 20_000  # the manifest, and the counters themselves
    for place in PLACES:
        before = read_and_written()
        size = fetch(run_dirs, tmp_path / "node", place)
        read, written = (after - earlier for after, earlier in zip(read_and_written(), before, strict=True))
        assert size <= read < size + slack
        assert written < slack
    before = read_and_written()
    (tmp_path / "again/state").mkdir(parents=True)
    (tmp_path / "again/state/shard").write_bytes(os.urandom(3_000_000))
    once = read_and_written()
    run_dirs[0].add_files(tmp_path / "again", "other")
    read, written = (after - earlier for after, earlier in zip(read_and_written(), once, strict=True))
    assert 3_000_000 <= read < 3_000_000 + slack  # from the scratch directory, and nothing from the run directory
    assert 3_000_000 <= written < 3_000_000 + slack


@pytest.mark.parametrize("kind", ["mounted", "object store"])
def test_another_number_of_ranks_shares_the_files_among_them(tmp_path, kind):
    run_dirs, _ = mounts(kind, tmp_path / "store")
    sizes = save(run_dirs, tmp_path / "scratch", 3)
    fetched = on_every_rank(lambda rank: fetch(run_dirs, tmp_path / "node", PLACES[rank], universal=True))
    # On mounted storage one rank converts for all; else each node needs all files.
    assert sum(fetched) == sum(sizes) * (1 if kind == "mounted" else 2)
    assert max(fetched) <= (1 if kind == "mounted" else 2) * max(sizes)


def test_a_damaged_file_is_named_by_the_rank_that_fetches_it(tmp_path):
    run_dirs, _ = mounts("mounted", tmp_path / "run")
    save(run_dirs, tmp_path / "scratch", 3)
    name = "state/bf16_zero_pp_rank_5_mp_rank_00_optim_states.pt"
    file = run_dirs[0].local_path(f"checkpoint/{name}")
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    fetch(run_dirs, tmp_path / "node", PLACES[4])
    with pytest.raises(RunDirError, match=rf"{name} is corrupted"):
        fetch(run_dirs, tmp_path / "node", PLACES[5])
