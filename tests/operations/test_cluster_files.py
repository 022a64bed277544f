"""cluster.yaml and jobs/kuberay: valid for Ray, AWS and KubeRay, consistent with each other, and free of secrets.

KubeRay's own schemas are in no package registry. What the operator takes is written down here from its API types
(ray.io/v1 of KubeRay 1.3), with Kubernetes' types from lightkube; keys that neither knows are errors, where a cluster
would drop them without a word.
"""

import copy
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import botocore.session
import msgspec
import pytest
import ray.autoscaler
import yaml
from botocore.validate import ParamValidator
from lightkube.models import core_v1, meta_v1
from ray.autoscaler._private import util
from ray.autoscaler._private.aws import config as aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

from aft_ray.config.run import parse_config
from aft_ray.config.serve import parse_serve_config

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "jobs/kuberay"
IMAGE = "REGISTRY/aft_ray:TAG"
PodTemplate, Env, EnvFrom = core_v1.PodTemplateSpec, core_v1.EnvVar, core_v1.EnvFromSource


class AutoscalerOptions(msgspec.Struct):
    resources: core_v1.ResourceRequirements | None = None
    image: str | None = None
    imagePullPolicy: str | None = None
    securityContext: core_v1.SecurityContext | None = None
    idleTimeoutSeconds: int | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    env: list[Env] | None = None
    envFrom: list[EnvFrom] | None = None
    volumeMounts: list[core_v1.VolumeMount] | None = None


class HeadGroup(msgspec.Struct):
    template: PodTemplate
    rayStartParams: dict[str, str]
    headService: core_v1.Service | None = None
    enableIngress: bool | None = None
    serviceType: str | None = None


class WorkerGroup(msgspec.Struct):
    groupName: str
    minReplicas: int
    maxReplicas: int
    rayStartParams: dict[str, str]
    template: PodTemplate
    replicas: int | None = None
    idleTimeoutSeconds: int | None = None
    numOfHosts: int | None = None
    suspend: bool | None = None


class RayClusterSpec(msgspec.Struct):
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] | None = None
    rayVersion: str | None = None
    enableInTreeAutoscaling: bool | None = None
    autoscalerOptions: AutoscalerOptions | None = None
    headServiceAnnotations: dict[str, str] | None = None
    suspend: bool | None = None
    managedBy: str | None = None


class SubmitterConfig(msgspec.Struct):
    backoffLimit: int | None = None


class RayJobSpec(msgspec.Struct):
    rayClusterSpec: RayClusterSpec | None = None
    entrypoint: str | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode"] | None = None
    backoffLimit: int | None = None
    activeDeadlineSeconds: int | None = None
    shutdownAfterJobFinishes: bool | None = None
    ttlSecondsAfterFinished: int | None = None
    submitterConfig: SubmitterConfig | None = None
    submitterPodTemplate: PodTemplate | None = None
    runtimeEnvYAML: str | None = None
    clusterSelector: dict[str, str] | None = None
    metadata: dict[str, str] | None = None
    jobId: str | None = None
    entrypointNumCpus: float | None = None
    entrypointNumGpus: float | None = None
    entrypointResources: str | None = None
    suspend: bool | None = None


class RayServiceSpec(msgspec.Struct):
    serveConfigV2: str
    rayClusterConfig: RayClusterSpec
    serveService: core_v1.Service | None = None


SPECS = {"RayCluster": RayClusterSpec, "RayJob": RayJobSpec, "RayService": RayServiceSpec}


def manifest_faults(manifest: dict) -> list[str]:
    """The faults of a manifest: missing keys and wrong types, otherwise unknown keys, which a cluster would drop."""
    kind = manifest["kind"]
    if kind in SPECS:
        assert manifest["apiVersion"] == "ray.io/v1"
        parts = [("metadata", meta_v1.ObjectMeta), ("spec", SPECS[kind])]
        found = [f"{key} is unknown" for key in manifest.keys() - {"apiVersion", "kind", "metadata", "spec"}]
        return found + [fault for part, type in parts for fault in faults(manifest[part], type, part)]
    return faults(manifest, getattr(core_v1, kind), kind)


def faults(given: Any, type: Any, at: str) -> list[str]:
    try:
        kept = msgspec.to_builtins(msgspec.convert(given, type))
    except msgspec.ValidationError as error:
        return [f"{at}: {error}"]
    return list(unknown(given, kept, at))


def unknown(given: Any, kept: Any, at: str) -> Iterator[str]:
    if isinstance(given, dict):
        for key, value in given.items():
            if key not in kept:
                yield f"{at}.{key} is unknown"
            else:
                yield from unknown(value, kept[key], f"{at}.{key}")
    elif isinstance(given, list):
        for number, (value, other) in enumerate(zip(given, kept, strict=True)):
            yield from unknown(value, other, f"{at}[{number}]")


def manifests() -> dict[str, dict]:
    files = sorted(KUBERAY.glob("*.yaml"))
    return {f"{file.name} {one['kind']}": one for file in files for one in yaml.safe_load_all(file.read_text())}


def cluster_specs() -> list[dict]:
    found = []
    for manifest in manifests().values():
        spec = manifest.get("spec", {})
        found += [{"RayCluster": spec, **spec}.get(key) for key in ("rayClusterSpec", "rayClusterConfig")]
        found += [spec] if manifest["kind"] == "RayCluster" else []
    return [one for one in found if one]


@pytest.mark.parametrize("name", manifests())
def test_a_manifest_has_only_what_kubernetes_and_kuberay_know(name):
    assert manifest_faults(manifests()[name]) == []


@pytest.mark.parametrize(
    ("path", "key", "value", "fault"),
    [
        ((), "entryPoint", "x", "spec.entryPoint is unknown"),
        (("rayClusterSpec",), "enableInTreeAutoScaling", True, "enableInTreeAutoScaling is unknown"),
        (("rayClusterSpec", "workerGroupSpecs", 0), "maxReplica", 4, "maxReplica is unknown"),
        (
            ("rayClusterSpec", "workerGroupSpecs", 0),
            "maxReplicas",
            "4",
            "got `str` - at `$.rayClusterSpec.workerGroupSpecs[0].max",
        ),
        (
            ("rayClusterSpec", "headGroupSpec"),
            "rayStartParams",
            {"num-gpus": 0},
            "got `int` - at `$.rayClusterSpec.headGroupSpec.ray",
        ),
        (("rayClusterSpec", "headGroupSpec", "template", "spec"), "tolerance", [], "tolerance is unknown"),
        (
            ("rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "env", 0),
            "valuesFrom",
            {},
            "env[0].valuesFrom is unknown",
        ),
    ],
)
def test_a_mistake_in_a_manifest_is_found(path, key, value, fault):
    job = copy.deepcopy(manifests()["rayjob.yaml RayJob"])
    node = job["spec"]
    for step in path:
        node = node[step]
    node[key] = value
    found = manifest_faults(job)
    assert found
    assert all(fault in one for one in found)


def test_the_worker_groups_are_consistent():
    (requirement,) = [
        line.partition("==")[2]
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if line.startswith("ray[")
    ]
    assert len(cluster_specs()) == 3
    for spec in cluster_specs():
        assert spec["rayVersion"] == requirement
        (group,) = spec["workerGroupSpecs"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert spec["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
        for template in (spec["headGroupSpec"]["template"]["spec"], group["template"]["spec"]):
            (container,) = template["containers"]
            assert container["image"] == IMAGE
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {mount["name"] for mount in container["volumeMounts"]} == {
                one["name"] for one in template["volumes"]
            }
            assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_secrets_are_named_and_never_written():
    for spec in cluster_specs():
        for pod in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            (container,) = pod["template"]["spec"]["containers"]
            for variable in container["env"]:
                secret = any(word in variable["name"] for word in ("TOKEN", "KEY", "SECRET"))
                assert ("secretKeyRef" in variable.get("valueFrom", {})) == secret, variable


def test_the_training_job_runs_a_config_that_loads():
    found = manifests()
    config = parse_config(yaml.safe_load(found["rayjob.yaml ConfigMap"]["data"]["run.yaml"]))
    spec = found["rayjob.yaml RayJob"]["spec"]
    assert spec["entrypoint"] == "aft-ray train /etc/aft_ray/run.yaml"
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    gpus = group["minReplicas"] * int(
        group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    )
    assert gpus == config.sampling.samplers + config.training.workers


def test_the_service_deploys_what_the_serve_config_file_does():
    from ray.serve.schema import ServeDeploySchema

    spec = manifests()["rayservice.yaml RayService"]["spec"]
    deployed = yaml.safe_load(spec["serveConfigV2"])
    ServeDeploySchema.model_validate(deployed)
    parse_serve_config(deployed["applications"][0]["args"])
    plain = yaml.safe_load((ROOT / "jobs/serve_deploy.yaml").read_text())
    plain["applications"][0]["args"]["access"]["keys_file"] = "/run/secrets/aft_ray/keys"
    assert deployed == plain
    (container,) = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "keys", "mountPath": "/run/secrets/aft_ray", "readOnly": True} in container["volumeMounts"]


def launcher_file() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_the_launcher_takes_cluster_yaml():
    config = launcher_file()
    prepared = util.prepare_config(copy.deepcopy(config))
    util.validate_config(prepared)  # against ray-schema.json, which knows every key
    assert prepared["available_node_types"]["gpu"]["max_workers"] == config["max_workers"]
    assert prepared["docker"]["image"] == IMAGE
    (start,) = [line for line in prepared["head_start_ray_commands"] if "ray start" in line]
    assert "--num-gpus=0" in start
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start


def test_a_mistake_in_cluster_yaml_is_refused():
    import jsonschema

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    for section, key in ((None, "max_worker"), ("docker", "images"), ("auth", "user")):
        config = launcher_file()
        (config[section] if section else config)[key] = 1
        with pytest.raises(jsonschema.ValidationError, match=key):
            jsonschema.validate(config, schema)


def test_the_image_copies_what_exists():
    for line in (KUBERAY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            *sources, _ = line.split()[1:]
            assert all((ROOT / source).exists() for source in sources), line


def run_instances_faults(arguments: dict) -> str:
    """What AWS's own description of RunInstances says against the arguments that Ray gives it."""
    model = botocore.session.get_session().get_service_model("ec2")
    shape = model.operation_model("RunInstances").input_shape
    return ParamValidator().validate(arguments, shape).generate_report()


class Launches:
    """Stands in for EC2: it keeps the arguments of `create_instances` and launches nothing."""

    def __init__(self):
        self.arguments = []

    def create_instances(self, **arguments):
        self.arguments.append(arguments)
        return []


@pytest.fixture
def launched() -> dict[str, dict]:
    """By node type, the arguments with which Ray's node provider launches a node of cluster.yaml."""
    config = aws._configure_from_network_interfaces(launcher_file())
    found = {}
    for name, node_type in config["available_node_types"].items():
        provider = object.__new__(AWSNodeProvider)
        provider.cluster_name, provider.provider_config = config["cluster_name"], config["provider"]
        provider.ec2_fail_fast = Launches()
        provider._create_node(copy.deepcopy(node_type["node_config"]), {}, 1)
        (found[name],) = provider.ec2_fail_fast.arguments
    return found


def test_aws_takes_what_ray_launches_nodes_with(launched):
    for name, arguments in launched.items():
        assert run_instances_faults(arguments) == "", name
    misspelt = copy.deepcopy(launched["gpu"])
    misspelt["NetworkInterfaces"][3]["NetworkCard"] = 3
    assert "NetworkCard" in run_instances_faults(misspelt)


def test_a_gpu_node_has_an_efa_adapter_on_each_of_its_network_cards(launched):
    adapters = launched["gpu"]["NetworkInterfaces"]
    assert launched["gpu"]["InstanceType"] == "p5.48xlarge"
    assert [adapter["NetworkCardIndex"] for adapter in adapters] == list(range(32))
    assert [adapter["DeviceIndex"] for adapter in adapters] == [0] + 31 * [1]
    # Only an interface that is not "efa-only" carries IP, which Ray and NCCL's first connections need.
    assert [adapter["InterfaceType"] for adapter in adapters] == ["efa"] + 31 * ["efa-only"]
    assert all(adapter["DeleteOnTermination"] for adapter in adapters)
    # AWS refuses groups beside interfaces, and all nodes must be in one group.
    assert "SecurityGroupIds" not in launched["gpu"]
    assert {tuple(adapter["Groups"]) for adapter in adapters} == {tuple(launched["head"]["SecurityGroupIds"])}


def test_containers_may_use_rdma_devices():
    docker = launcher_file()["docker"]
    assert "--ulimit memlock=-1" in docker["run_options"]
    assert "--privileged" in docker["worker_run_options"]
    for name in ("raycluster.yaml RayCluster", "rayjob.yaml RayJob"):
        spec = manifests()[name]["spec"]
        (group,) = spec.get("rayClusterSpec", spec)["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["vpc.amazonaws.com/efa"] == "32"
        assert container["resources"]["limits"]["hugepages-2Mi"] == "5Gi"
        assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]


def test_every_file_has_the_lines_that_choose_a_network_interface():
    for path in [ROOT / "cluster.yaml", *(KUBERAY / f"ray{kind}.yaml" for kind in ("cluster", "job", "service"))]:
        commented = [line for line in path.read_text().splitlines() if line.strip().startswith("# -")]
        for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            assert any(variable in line for line in commented), (path.name, variable)
