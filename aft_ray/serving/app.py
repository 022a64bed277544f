"""The Serve application: the engines, the reasoner in front of them and, if a run is followed, the rollout.

Invariant: mistakes in the config are found while the application is built, before any of its processes starts.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.deployment import Application
from ray.serve.llm import LLMConfig, build_llm_deployment

from aft_ray.cluster.compat import engine_runtime_env
from aft_ray.config.section import ConfigError
from aft_ray.config.serve import ServeConfig, parse_serve_config
from aft_ray.inference.engine_spec import EngineSpec, engine_arguments, engine_environment
from aft_ray.inference.installed_arguments import check_engine_arguments
from aft_ray.serving.api.routes import build_http_app
from aft_ray.serving.api.service import Service
from aft_ray.serving.engine.rollout import Rollout
from aft_ray.serving.engine.server import PolicyServer, PolicySpec
from aft_ray.serving.model import Resolved, ServedModel, resolve
from aft_ray.storage.run_dir import RunDir, local_model
from aft_ray.tasks.dataset import load_tokenizer
from aft_ray.tasks.response_end import response_ends
from aft_ray.weights.version_manifest import VersionManifest

# Requests that a replica takes besides the questions: health checks, pages, and questions that are rejected at once.
_OTHER_REQUESTS = 64


@serve.ingress()
class Reasoner:
    """The deployment that answers the clients' HTTP requests."""

    def __init__(self, config: ServeConfig, served: ServedModel, engines: Any) -> None:
        self._service = Service(config, served, engines)

    async def __serve_build_asgi_app__(self) -> Any:
        return build_http_app(self._service)


def build(args: dict[str, Any]) -> Application:
    """Returns the application of a Serve config file, which names this function as its `import_path`.

    Args:
        args: the keys of ServeConfig.

    Raises:
        ConfigError: a key is wrong.
    """
    config = parse_serve_config(args)
    return application(config, resolve(config))


def application(config: ServeConfig, resolved: Resolved) -> Application:
    """Returns the Serve application of a config and of the model that it names. Raises ConfigError, one sentence."""
    served, manifest = resolved
    _check_engine_arguments(config, manifest)
    policy = PolicySpec(
        manifest=manifest,
        model=served.run.model,
        eos_token_ids=response_ends(served.run, load_tokenizer(served.run)).ids,
        max_length=served.run.model.max_length,
        tolerance=served.run.score_tolerance,
        drain_s=config.engine.drain_s,
        update_timeout_s=config.engine.start_timeout_s,
        follow_s=config.follow_s,
    )
    bind_arguments: dict[str, Any] = {"spec": policy}
    if config.follow:
        update_timeout_s = config.engine.drain_s + config.engine.start_timeout_s
        options = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}}
        bind_arguments["rollout"] = (
            serve.deployment(Rollout).options(**options).bind(RunDir(config.model).uri(), update_timeout_s)
        )  # type: ignore[attr-defined]
    engines = build_llm_deployment(
        llm_config(config, served, policy.eos_token_ids),
        deployment_cls=PolicyServer,
        name_prefix="Policy:",
        bind_kwargs=bind_arguments,
    )
    reasoner = serve.deployment(Reasoner).options(  # type: ignore[attr-defined]
        num_replicas=config.reasoner.replicas,
        ray_actor_options={"num_cpus": config.reasoner.cpus},
        # Above the bound of the admission queue, so that a question above it gets the queue's 429 with Retry-After.
        max_ongoing_requests=config.limits.admitted + _OTHER_REQUESTS,
        graceful_shutdown_timeout_s=config.limits.deadline_s + 5,
    )
    return reasoner.bind(config, served, engines)


def _check_engine_arguments(config: ServeConfig, manifest: VersionManifest | None) -> None:
    """Raises ConfigError for engine arguments that vLLM does not have, or that do not go with the version of a run."""
    check_engine_arguments(config.engine.args, "engine.args")
    for name in ("quantization", "quantization_config"):
        if manifest is not None and name in config.engine.args:
            raise ConfigError(
                f"engine.args.{name} rounds the weights, which then score otherwise than the run recorded, so that its "
                f"version cannot be verified; serve the directory of the model itself, {manifest.model}"
            )


def llm_config(config: ServeConfig, served: ServedModel, eos_token_ids: tuple[int, ...]) -> LLMConfig:
    """Returns the config of the engines for ray.serve.llm."""
    engine = config.engine
    gpu = engine.gpus > 0
    spec = EngineSpec(
        model=local_model(served.model),
        eos_token_ids=eos_token_ids,
        dtype=served.run.model.dtype,
        max_length=served.run.model.max_length,
        max_num_seqs=engine.max_num_seqs,
        gpu=gpu,
        threads=max(1, int(engine.cpus)),
        kv_cache_gib=engine.kv_cache_gib,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        trust_remote_code=served.run.model.trust_remote_code,
        arguments=engine.args,
    )
    # Ray sets the model and the executor itself, and LLMServer's OpenAI methods need the tokenizer.
    excluded = ("model", "distributed_executor_backend", "skip_tokenizer_init")
    arguments = {key: value for key, value in engine_arguments(spec).items() if key not in excluded}
    arguments |= {
        "tensor_parallel_size": engine.tensor_parallel_size,
        "pipeline_parallel_size": engine.pipeline_parallel_size,
    }
    processes = engine.tensor_parallel_size * engine.pipeline_parallel_size
    # The replica itself runs in the first bundle and needs no resources of its own.
    bundle = {"GPU": 1, "CPU": engine.cpus} if gpu else {"CPU": engine.cpus}
    deployment: dict[str, Any] = {
        "max_ongoing_requests": config.reasoner.replicas * config.limits.concurrency + _OTHER_REQUESTS,
        "graceful_shutdown_timeout_s": config.limits.deadline_s + 5,
        "ray_actor_options": {"num_cpus": 0},
    }
    if engine.max_replicas is None:
        deployment["num_replicas"] = engine.replicas
    else:
        deployment["autoscaling_config"] = {
            "min_replicas": engine.replicas,
            "max_replicas": engine.max_replicas,
            "target_ongoing_requests": engine.ongoing_per_replica,
        }
    return LLMConfig(
        model_loading_config={"model_id": served.name, "model_source": local_model(served.model)},
        accelerator_type=engine.accelerator_type,
        placement_group_config={
            "bundles": [dict(bundle) for _ in range(processes)],
            "strategy": "PACK" if engine.pipeline_parallel_size > 1 else "STRICT_PACK",
        },
        engine_kwargs=arguments,
        deployment_config=deployment,
        runtime_env=engine_runtime_env(engine_environment(spec)),
        log_engine_metrics=False,
    )
