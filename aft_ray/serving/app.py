"""The Serve application: engines (LLMServer), the reasoner in front of them and, to follow a run, the rollout.

Invariant: everything that can be wrong with the config is found while the application is built, before anything starts.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.deployment import Application
from ray.serve.llm import LLMConfig, build_llm_deployment

from aft_ray.config import ConfigError, RunConfig, parse_config
from aft_ray.preflight import check_model
from aft_ray.published import find_published, find_run, read_config
from aft_ray.questions import load_tokenizer
from aft_ray.sampling.engine import EngineSpec, engine_arguments, engine_environment
from aft_ray.serve_config import ServeConfig, parse_serve_config
from aft_ray.serving.http import build_http
from aft_ray.serving.policy import PolicyServer, PolicySpec
from aft_ray.serving.rollout import Rollout
from aft_ray.serving.service import ServedModel, Service
from aft_ray.tasks.rendering import end_of_sequence
from aft_ray.weights.publication import Publication, read_publication

# Context of a model that is of no run, when the config does not say: tokens.
_MAX_LENGTH = 2048
# Beside the questions at work and waiting: health checks, pages, and refusals, which are quick.
_SLACK = 64


@serve.ingress()
class Reasoner:
    """The deployment that clients talk to."""

    def __init__(self, config: ServeConfig, served: ServedModel, engines: Any) -> None:
        self._service = Service(config, served, engines)

    async def __serve_build_asgi_app__(self) -> Any:
        return build_http(self._service)


def build(args: dict[str, Any]) -> Application:
    """What a Serve config file names as `import_path`; `args` are the keys of ServeConfig. Raises ConfigError."""
    return application(parse_serve_config(args))


def application(config: ServeConfig) -> Application:
    """The Serve application of a config. Raises ConfigError, one sentence."""
    served, publication = resolve(config)
    tokenizer = load_tokenizer(served.run)
    policy = PolicySpec(
        publication=publication,
        eos_token_id=end_of_sequence(tokenizer),
        max_length=served.run.model.max_length,
        tolerance=served.run.score_tolerance,
        drain_s=config.engine.drain_s,
        follow_s=config.follow_s,
    )
    bind: dict[str, Any] = {"spec": policy}
    if config.follow:
        turn_s = config.engine.drain_s + config.engine.start_timeout_s
        options = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}}
        run_dir, _ = _followed(config)
        bind["rollout"] = serve.deployment(Rollout).options(**options).bind(run_dir, turn_s)  # type: ignore[attr-defined]
    engines = build_llm_deployment(
        llm_config(config, served, policy.eos_token_id),
        deployment_cls=PolicyServer,
        name_prefix="Policy:",
        bind_kwargs=bind,
    )
    reasoner = serve.deployment(Reasoner).options(  # type: ignore[attr-defined]
        num_replicas=config.reasoner.replicas,
        ray_actor_options={"num_cpus": config.reasoner.cpus},
        # Its own bound on the queue comes first, so that a refusal is a 429 that says when to come again.
        max_ongoing_requests=config.limits.admitted + _SLACK,
        graceful_shutdown_timeout_s=config.limits.deadline_s + 5,
    )
    return reasoner.bind(config, served, engines)


def resolve(config: ServeConfig) -> tuple[ServedModel, Publication | None]:
    """What `model` names, with the config it is asked by; a run's version also as a publication with its proof."""
    found = find_run(config.model)
    engine = config.engine
    if found is None:
        if config.follow:
            raise ConfigError(f"follow=true needs a run directory, and {config.model} is none")
        if config.task is None:
            raise ConfigError(
                f"{config.model} is not a run directory, which would know its task; name the task, such as "
                f"task.task=gsm8k"
            )
        run = parse_config({"run_dir": ".", "model": {"name": config.model}, "data": config.task.model_dump()})
        run = _with_engine(run, config.model, engine.dtype or "bfloat16", engine.max_length or _MAX_LENGTH)
        check_model(run)
        return ServedModel(config.name or _last_part(config.model), config.model, run), None
    if config.task is not None:
        raise ConfigError(f"{config.model} is a run, which knows its task; leave task out")
    run_dir, version = found
    if config.follow and version is not None:
        raise ConfigError(f"follow=true serves the newest version; leave @{version} out, or follow")
    run = read_config(run_dir)
    published = find_published(run_dir, run, version)
    run = _with_engine(run, published.model, engine.dtype or run.model.dtype, engine.max_length or run.model.max_length)
    check_model(run)
    served = ServedModel(config.name or _last_part(run_dir.uri()), published.model, run)
    return served, read_publication(published.version, published.model)


def llm_config(config: ServeConfig, served: ServedModel, eos_token_id: int) -> LLMConfig:
    """The engines as ray.serve.llm takes them."""
    engine = config.engine
    gpu = engine.gpus > 0
    spec = EngineSpec(
        model=served.model,
        eos_token_id=eos_token_id,
        dtype=served.run.model.dtype,
        max_length=served.run.model.max_length,
        max_num_seqs=engine.max_num_seqs,
        gpu=gpu,
        threads=max(1, int(engine.cpus)),
        kv_cache_gib=engine.kv_cache_gib,
        gpu_memory_utilization=engine.gpu_memory_utilization,
    )
    # Ray chooses the executor and names the model; LLMServer's OpenAI methods need the tokenizer.
    ours = ("model", "distributed_executor_backend", "skip_tokenizer_init")
    arguments = {key: value for key, value in engine_arguments(spec).items() if key not in ours}
    arguments |= {
        "tensor_parallel_size": engine.tensor_parallel_size,
        "pipeline_parallel_size": engine.pipeline_parallel_size,
    }
    processes = engine.tensor_parallel_size * engine.pipeline_parallel_size
    # Serve adds one CPU for the replica itself to the first bundle.
    bundle = {"GPU": 1, "CPU": engine.cpus} if gpu else {"CPU": engine.cpus}
    deployment: dict[str, Any] = {
        "max_ongoing_requests": config.reasoner.replicas * config.limits.concurrency + _SLACK,
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
        model_loading_config={"model_id": served.name, "model_source": served.model},
        accelerator_type=engine.accelerator_type,
        placement_group_config={
            "bundles": [dict(bundle) for _ in range(processes)],
            "strategy": "PACK" if engine.pipeline_parallel_size > 1 else "STRICT_PACK",
        },
        engine_kwargs=arguments,
        deployment_config=deployment,
        runtime_env={"env_vars": engine_environment(spec)},
        log_engine_metrics=False,
    )


def _with_engine(run: RunConfig, model: str, dtype: str, max_length: int) -> RunConfig:
    # No code that comes with a model is run in a service, whatever its training allowed.
    update = {"name": model, "dtype": dtype, "max_length": max_length, "trust_remote_code": False}
    return run.model_copy(update={"model": run.model.model_copy(update=update)})


def _followed(config: ServeConfig) -> tuple[str, int | None]:
    found = find_run(config.model)
    assert found is not None, "resolve has checked it"
    return found[0].uri(), found[1]


def _last_part(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2] or place
