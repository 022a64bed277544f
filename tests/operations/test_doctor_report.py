"""The checks of the doctor as pure functions of facts, with one fault at a time, and its report."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aft_ray.config.run import parse_config
from aft_ray.operations import probe, report
from aft_ray.operations.checks import CLOCK_FAIL_S, CLOCK_WARN_S, GIB, check_all
from aft_ray.operations.doctor import requirements_of
from aft_ray.operations.findings import AllReduceFacts, ClusterFacts, Finding, Gpu, NodeFacts, StorageFacts, Upload

HERE = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0", "vllm": "0.33.0", "deepspeed": "0.19.8", "aft_ray": "1"}
H100 = Gpu("H100", "580.1", 81920, 4, 0)


def node(name, **changes) -> NodeFacts:
    facts = NodeFacts(
        name=name,
        head=False,
        gpus_announced=2,
        gpus_free=2,
        object_store_bytes=8 * GIB,
        host=f"host-{name}",
        versions=HERE,
        gpus=[H100, H100],
        torch_gpus=2,
        torch_cuda="13.0",
        rdma=["uverbs0", "uverbs1"],
        memlock_bytes=None,
        operators={},
        shm_bytes=16 * GIB,
        free_bytes={"/tmp/ray": 500 * GIB, "/shared/run": 5000 * GIB},
        open_files=65536,
        models={"/shared/model": 14 * GIB},
        clock_s=0.01,
        clock_error_s=0.02,
    )
    return replace(facts, **changes)


def cluster(*nodes, **changes) -> ClusterFacts:
    names = [one.name for one in nodes]
    facts = ClusterFacts(
        nodes=nodes,
        here=HERE,
        storage=StorageFacts("/shared/run", dict.fromkeys(names), {name: [] for name in names}),
        pings=[AllReduceFacts("gloo", 64 << 20, 2, met_s=1.0, seconds=0.02)],
        upload=Upload("/project", 2 << 20, 300, [("big.bin", 1 << 20)]),
        upload_limit=100 << 20,
    )
    return replace(facts, **changes)


def bad(facts) -> list[tuple[str, str, str]]:
    return [(one.check, one.node, one.level) for one in check_all(facts) if one.level != "ok"]


def only(facts) -> Finding:
    (finding,) = (one for one in check_all(facts) if one.level != "ok")
    return finding


def test_a_healthy_cluster_has_an_ok_of_every_check_on_every_node():
    findings = check_all(cluster(node("a"), node("b")))
    assert {finding.level for finding in findings} == {"ok"}
    checks = ("answers", "versions", "gpus", "clock", "storage", "model", "shm", "disk", "open files", "ports", "rdma")
    for check in checks:
        assert [one.node for one in findings if one.check == check] == ["a", "b"], check


@pytest.mark.parametrize(
    ("changes", "check", "level", "said"),
    [
        ({"versions": {**HERE, "torch": "2.12.0"}}, "versions", "fail", "torch 2.12.0, here 2.13.0"),
        ({"versions": {**HERE, "aft_ray": None}}, "versions", "fail", "aft_ray missing, here 1"),
        ({"gpus": [H100], "torch_gpus": 1}, "gpus", "fail", "Ray announces 2 and nvidia-smi sees 1"),
        ({"gpus_announced": 1, "gpus_free": 1}, "gpus", "warn", "Ray announces 1 of 2"),
        ({"torch_gpus": None}, "gpus", "fail", "nvidia-smi sees 2 and torch failed"),
        ({"torch_gpus": 0}, "gpus", "fail", "nvidia-smi sees 2 and torch sees 0"),
        ({"rdma": []}, "rdma", "fail", "no RDMA device, unlike a, c"),
        ({"memlock_bytes": 64 << 10}, "rdma", "fail", "may lock only 0 MiB"),
        ({"gpus": [H100, replace(H100, ecc=3)]}, "gpus", "fail", "GPU 1 has 3 uncorrected memory errors"),
        ({"gpus": [H100, replace(H100, used_mib=9000)]}, "gpus", "warn", "GPU 1 has 9000 MiB in use"),
        ({"clock_s": 90.0}, "clock", "fail", "+90.00 s"),
        ({"clock_s": -5.0}, "clock", "warn", "-5.00 s"),
        ({"clock_s": None}, "clock", "warn", "could not be read"),
        ({"models": {"/shared/model": None}}, "model", "fail", "no model directory"),
        ({"models": {"/shared/model": 13 * GIB}}, "model", "fail", "elsewhere"),
        ({"shm_bytes": 64 << 20}, "shm", "fail", "/dev/shm has 0.1 GiB, Ray's object store 8.0"),
        ({"shm_bytes": 7 * GIB, "object_store_bytes": 1 * GIB}, "shm", "warn", "/dev/shm has 7.0 GiB"),
        ({"shm_bytes": None}, "shm", "warn", "there is no /dev/shm"),
        ({"free_bytes": {"/tmp/ray": 5 << 20}}, "disk", "fail", "0.0 GiB free for /tmp/ray"),
        ({"free_bytes": {"/tmp/ray": 5 * GIB}}, "disk", "warn", "5.0 GiB free for /tmp/ray"),
        ({"open_files": 1000}, "open files", "fail", "at most 1000"),
        ({"open_files": 4096}, "open files", "warn", "at most 4096"),
    ],
)
def test_a_fault_of_a_node_is_found_there_alone_and_has_a_cure(changes, check, level, said):
    finding = only(cluster(node("a"), node("b", **changes), node("c")))
    assert (finding.check, finding.node, finding.level) == (check, "b", level)
    assert said in finding.message
    assert finding.cure.endswith(".")


def test_a_head_without_gpus_may_do_without_engines_but_not_without_torch():
    plain = {"gpus_announced": 0, "gpus_free": 0, "gpus": [], "torch_gpus": None}
    without = {**HERE, "vllm": None, "deepspeed": None}
    assert bad(cluster(node("a", versions=without, **plain), node("b"))) == []
    assert only(cluster(node("a", versions={**without, "torch": None}, **plain), node("b"))).check == "versions"


def test_memory_in_use_on_a_gpu_that_ray_assigned_is_no_fault():
    assert bad(cluster(node("a", gpus=[replace(H100, used_mib=70000)] * 2, gpus_free=0))) == []


def test_different_drivers_are_reported_for_both_nodes():
    other = node("b", gpus=[replace(H100, driver="570.9")] * 2)
    assert bad(cluster(node("a"), other)) == [("gpus", "a", "warn"), ("gpus", "b", "warn")]


@pytest.mark.parametrize(
    ("cuda", "driver", "said"),
    [
        ("13.0", "570.86.15", "driver 570.86.15 is too old for torch 2.13.0, which is built for CUDA 13.0"),
        ("12.9", "520.61.05", "driver 520.61.05 is too old"),
        ("13.0", "580.65.06", "torch failed"),
        ("12.9", "570.86.15", "torch failed"),
        (None, "570.86.15", "torch failed"),
    ],
)
def test_an_old_driver_is_named_where_torch_cannot_use_it(cuda, driver, said):
    old = {"gpus": [replace(H100, driver=driver)] * 2, "torch_cuda": cuda}
    finding = only(cluster(node("a", torch_gpus=None, **old)))
    assert (finding.check, finding.level) == ("gpus", "fail")
    assert said in finding.message
    assert ("R580" in finding.cure) == (cuda == "13.0" and said.startswith("driver"))
    # NVIDIA's compatibility package makes an older driver work.
    assert bad(cluster(node("a", **old))) == []


def test_the_compiler_is_checked_for_configs_whose_operators_are_compiled():
    broken = node("a", operators={"CPUAdamBuilder": "Ninja is required to load C++ extensions"})
    finding = only(cluster(broken, node("b", operators={"CPUAdamBuilder": None})))
    assert (finding.check, finding.node, finding.level) == ("operators", "a", "fail")
    assert "g++ and ninja" in finding.cure
    error = "Installed CUDA version 12.8 does not match the version torch was compiled with"
    assert "nvcc) 13.0" in only(cluster(node("a", operators={"QuantizerBuilder": error}))).cure
    quantized = {"deepspeed": {"zero_optimization": {"zero_quantized_weights": True}}}
    assert need_of("/x").operators == ()
    assert need_of("/x", offload_optimizer=True).operators == ("CPUAdamBuilder",)
    assert need_of("/x", **quantized).operators == ("QuantizerBuilder",)


def test_an_operator_is_really_compiled():
    assert probe.compile_error("NoSuchBuilder").startswith("ImportError: cannot import name 'NoSuchBuilder'")
    assert probe.compile_error("CPUAdamBuilder", timeout_s=0.1) == "it was not compiled within 0 s"


def nccl(gb_s, ranks=16) -> AllReduceFacts:
    """An all-reduce with this bus bandwidth."""
    size = 1 << 30
    return AllReduceFacts("nccl", size, ranks, met_s=3.0, seconds=size * 2 * (ranks - 1) / ranks / (gb_s * 1e9))


@pytest.mark.parametrize(
    ("ranks", "seconds", "expected"), [(2, 0.01, 100), (16, 0.01, 187.5), (4, 0.1, 15), (1, 1, None)]
)
def test_bus_bandwidth_is_that_of_nccl_tests(ranks, seconds, expected):
    measured = AllReduceFacts("nccl", 10**9, ranks, met_s=1, seconds=seconds).bus_bandwidth
    assert measured == (None if expected is None else pytest.approx(expected))


def need_of(name, **sections):
    training = {"workers": 16, "gpus_per_worker": 1, "zero_stage": 3, "groups_per_step": 64, **sections}
    return requirements_of(parse_config({"run_dir": "/x", "model": {"name": name}, "training": training}), None, None)


def test_a_70b_plan_needs_50_gb_s_between_nodes_and_a_slower_cluster_fails_with_a_way_out():
    need = need_of("meta-llama/Llama-2-70b-hf").bandwidth
    assert need.gb_s == 50
    eight = {"gpus_announced": 8, "gpus_free": 8, "gpus": [H100] * 8, "torch_gpus": 8}
    nodes = [node("a", **eight), node("b", **eight)]
    assert bad(cluster(*nodes, pings=[nccl(51)], bandwidth_needed=need)) == []
    finding = only(cluster(*nodes, pings=[nccl(49)], bandwidth_needed=need))
    assert (finding.check, finding.node, finding.level) == ("nccl", "cluster", "fail")
    assert finding.message.startswith("49 GB/s of bus bandwidth (1024 MiB over 16 processes")
    assert "16 workers needs 50 GB/s, because ZeRO-3 moves 3 x 138.0 GB in every pass" in finding.message
    assert "NCCL_DEBUG=INFO" in finding.cure
    bare = [replace(one, rdma=[]) for one in nodes]
    found = check_all(cluster(*bare, pings=[nccl(2)], bandwidth_needed=need))
    (cure,) = (one.cure for one in found if one.level == "fail")
    assert cure.startswith("There is no RDMA device on a, b, so NCCL used TCP")
    # Only one GPU of each node was free, and the adapters of the others were idle.
    few = only(cluster(*nodes, pings=[nccl(30, ranks=2)], bandwidth_needed=need))
    assert (few.level, few.cure.startswith("Only 2 of 16 GPUs took part")) == ("warn", True)
    # All workers fit on one node: the network between nodes does not matter.
    inside = replace(need, workers=8)
    assert bad(cluster(*nodes, pings=[nccl(2)], bandwidth_needed=inside)) == []
    # No config was given.
    assert bad(cluster(*nodes, pings=[nccl(2)])) == []


def test_the_bandwidth_that_a_smaller_plan_needs_follows_from_its_arithmetic():
    usual = need_of("meta-llama/Llama-2-7b-hf", tokens_per_microbatch=16384)
    # 3 x 2 bytes a parameter, in the time of 6 x 16384 FLOPs a parameter at 0.4 x 989 TFLOP/s.
    assert usual.bandwidth.gb_s == pytest.approx(0.4 * 989e12 / 16384 / 1e9)
    small = need_of("meta-llama/Llama-2-7b-hf", tokens_per_microbatch=4096)
    assert small.bandwidth.gb_s == 50  # four times as much would be needed, which no message should demand
    assert need_of("meta-llama/Llama-2-7b-hf", zero_stage=2).bandwidth is None
    # hpZ keeps the second gather inside a node, and 8-bit weights have half of the bytes.
    for zero, share in (
        ({"zero_hpz_partition_size": 8}, 2 / 3),
        ({"zero_quantized_weights": True}, 2 / 3),
        ({"zero_hpz_partition_size": 8, "zero_quantized_weights": True}, 1.5 / 3),
    ):
        less = need_of("meta-llama/Llama-2-70b-hf", deepspeed={"zero_optimization": zero})
        assert less.bandwidth.gb_s == pytest.approx(50 * share)
    assert need_of("/no/such/model").bandwidth is None


def test_storage_that_cannot_be_written_or_is_not_shared():
    nodes = [node("a"), node("b"), node("c")]
    stored = StorageFacts(
        "/shared", {"a": None, "b": "Read-only file system", "c": None}, {"a": [], "b": [], "c": ["a"]}
    )
    found = [one for one in check_all(cluster(*nodes, storage=stored)) if one.level == "fail"]
    assert [(one.check, one.node) for one in found] == [("storage", "b"), ("storage", "c")]
    assert "Read-only file system" in found[0].message
    assert "what a wrote" in found[1].message


def test_ports_that_are_closed_name_the_pair():
    finding = only(cluster(node("a"), node("b"), blocked={("a", "b"): "timed out"}))
    assert (finding.check, finding.node) == ("ports", "a")
    assert "cannot connect to b (timed out)" in finding.message


def test_nodes_that_did_not_join_are_named_and_those_that_waited_for_them_are_not():
    ping = AllReduceFacts("gloo", 1 << 20, 2, errors={"a": "timed out", "b": "gone"}, absent=["b"])
    assert bad(cluster(node("a"), node("b"), pings=[ping])) == [("gloo", "b", "fail")]
    failed = AllReduceFacts("nccl", 1 << 20, 2, errors={"a": "unhandled system error"})
    assert bad(cluster(node("a"), node("b"), pings=[failed])) == [("nccl", "a", "fail")]
    busy = AllReduceFacts("nccl", 1 << 20)
    assert bad(cluster(node("a"), node("b"), pings=[busy])) == [("nccl", "cluster", "warn")]
    slow = AllReduceFacts("gloo", 32 << 20, 2, met_s=1.0, seconds=5.0)
    assert bad(cluster(node("a"), node("b"), pings=[slow])) == [("gloo", "cluster", "warn")]


def test_a_node_on_which_nothing_ran_is_a_failure():
    finding = only(cluster(node("a"), silent={"b": "did not answer within 120 s"}))
    assert (finding.check, finding.node, finding.level) == ("answers", "b", "fail")


@pytest.mark.parametrize(("mib", "level"), [(49, "ok"), (60, "warn"), (101, "fail")])
def test_an_upload_is_compared_with_rays_limit_and_its_largest_files_are_named(mib, level):
    facts = cluster(node("a"), upload=Upload("/project", mib << 20, 7, [("data/train.bin", 40 << 20)]))
    (finding,) = (one for one in check_all(facts) if one.check == "upload")
    assert finding.level == level
    assert level == "ok" or "data/train.bin (40.0 MiB)" in finding.cure


@given(ahead=st.floats(-1e6, 1e6), error=st.floats(0, 1e3))
def test_a_clock_is_only_blamed_for_what_is_certain(ahead, error):
    (finding,) = (
        one for one in check_all(cluster(node("a", clock_s=ahead, clock_error_s=error))) if one.check == "clock"
    )
    certain = max(0.0, abs(ahead) - error)
    assert finding.level == ("fail" if certain >= CLOCK_FAIL_S else "warn" if certain >= CLOCK_WARN_S else "ok")


def test_the_space_that_a_run_needs_is_computed_and_compared(tmp_path, tiny_model):
    tree = {"run_dir": "/shared/run", "model": {"name": str(tiny_model)}, "rounds": {"count": 3}}
    required = requirements_of(parse_config(tree), None, None)
    weights = (tiny_model / "model.safetensors").stat().st_size
    # Four models in bfloat16 (2 bytes per parameter), two training states with 12 bytes per parameter, and a third one
    # while it is saved.
    assert required.storage_needed == 4 * weights + 3 * 6 * weights
    tree |= {"rounds": {"count": 1}, "training": {"checkpoint_every_s": 0}}
    assert requirements_of(parse_config(tree), None, None).storage_needed == 2 * weights + 2 * 6 * weights
    assert (required.storage, required.models) == ("/shared/run", (str(tiny_model),))
    finding = only(cluster(node("a"), storage_needed=9000 * GIB))
    assert (finding.check, finding.level) == ("disk", "warn")
    assert "and the run wants 9000" in finding.message


def test_the_report_shows_the_worst_of_each_check_and_lists_failures_first():
    facts = cluster(node("a", open_files=4096), node("b", clock_s=100.0))
    findings = check_all(facts)
    lines = report.lines(findings)
    assert [line.partition(":")[0] for line in lines] == ["fail", "warn"]
    assert "clock, b: +100.00 s" in lines[0]
    assert not report.healthy(findings)
    assert report.healthy(check_all(cluster(node("a", open_files=4096))))
    record = json.loads(report.as_json(facts, findings))
    assert record["healthy"] is False
    assert record["facts"]["nodes"][0]["host"] == "host-a"
    assert report.table(findings).row_count == 3
