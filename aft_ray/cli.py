"""The `aft-ray` command: parses arguments, calls the package and prints results.

Invariant: a mistake of the user is reported as one sentence with a non-zero exit status, without a traceback.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from aft_ray.config.keys import describe_keys
from aft_ray.config.loader import dump_config
from aft_ray.config.run import ConfigError, RunConfig, load_config
from aft_ray.config.section import Section


def file_to_write(path: Path | None) -> Path | None:
    """The path of an option that names a file to write. Raises ConfigError when its directory does not exist."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {path}: the directory {path.parent} does not exist")
    return path


app = typer.Typer(
    help="Alignment Fine-Tuning of language models into better reasoners, on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
# Typer may bundle its own copy of click, so click's UsageError is taken from a class that typer exports.
UsageError: Any = typer.BadParameter.__base__
Overrides = Annotated[
    list[str] | None, typer.Argument(help="`key.sub=value` replaces a value of the file", metavar="[KEY=VALUE]...")
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="also write all numbers to this JSON file", callback=file_to_write)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="only print the resolved config and the placement")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML config, see jobs/configs")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Train a reasoner: VFT (supervised fine-tuning, SFT), then rounds of AFT. Run it again to resume a stopped run.

    Examples:

        aft-ray train jobs/configs/gsm8k_smoke.yaml model.name=/path/to/model data.path=/path/to/gsm8k

        aft-ray train jobs/configs/gsm8k_smoke.yaml model.name=/path/to/model rounds.max_staleness=0 --dry-run

    `aft-ray keys` lists every key with its default and its meaning.
    """
    parsed = load_config(config, overrides or [])
    if dry_run:
        from aft_ray.cluster.connect import placement_table
        from aft_ray.cluster.reservations import training_reservations
        from aft_ray.training.deepspeed_config import check_options, config_lines

        check_options(parsed.training, parsed.model.dtype)
        print_dry_run(parsed, placement_table(parsed.cluster, training_reservations(parsed)))
        lines = config_lines(parsed.training, parsed.model.dtype)
        print("\n".join(["", "# DeepSpeed's configuration", *(f"# {line}" for line in lines)]))
        return
    train_run(parsed)


def print_dry_run(config: Section, placement: list[str]) -> None:
    print(dump_config(config), end="")
    print("\n".join(["", "# placement", *(f"# {line}".rstrip() for line in placement)]))


def train_run(config: RunConfig) -> None:
    """Trains until the run is finished, then prints the table of rounds. Other libraries print to logs/driver.log."""
    from aft_ray.observe.logs import driver_log_path, library_output_to, upload_log_at_exit
    from aft_ray.observe.reporter import Reporter
    from aft_ray.observe.summary import read_events, rounds_table
    from aft_ray.storage.run_dir import RunDir

    run_dir = RunDir(config.run_dir)
    log = driver_log_path(run_dir)
    with upload_log_at_exit(run_dir, log), library_output_to(log) as console, Reporter(run_dir, console) as reporter:
        from aft_ray.run.launch import run

        if not run(config, reporter):
            reporter.say(f"{run_dir.uri()} is finished: all {config.rounds.count} rounds are trained. Nothing to do.")
        table = rounds_table(read_events(run_dir))
        model = run_dir.uri(run_dir.model(config.rounds.count))
    (Console() if sys.stdout.isatty() else Console(width=200)).print(table)
    print(f"the model: {model}")


@app.command("plan")
def plan_run(
    config: Annotated[Path, typer.Argument(help="YAML config, see jobs/configs")],
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="number of nodes; default: as few as possible")] = None,
    node: Annotated[
        str | None,
        typer.Option(
            help="a100-40gb, a100-80gb, h100-80gb, h200-141gb (8 GPUs each), cpu, or a YAML file that describes a node"
        ),
    ] = None,
    assume: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE changes an assumption, such as mfu=0.45; may be repeated")
    ] = None,
    price_per_gpu_hour: Annotated[
        float | None, typer.Option(min=0, help="price of a GPU hour, to show the cost")
    ] = None,
    output: JsonFile = None,
) -> None:
    """Estimate what a run needs before it starts: memory, placement, time and cost, each with its formula.

    It needs no GPU and no weights, and for the models that it knows by name no network. It refuses a run that cannot
    fit. docs/planning.md explains the formulas and how they were checked.

    Find the smallest number of nodes, and the time of a round on them:

        aft-ray plan jobs/configs/llama2_70b_gsm8k.yaml

    Plan for given nodes, and find the best split of them between sampling and training:

        aft-ray plan jobs/configs/llama2_70b_gsm8k.yaml --nodes 8 --node h100-80gb --price-per-gpu-hour 2.5
    """
    from aft_ray.planning.plan.command import plan_run as print_run_plan

    console = Console() if sys.stdout.isatty() else Console(width=160)
    print_run_plan(load_config(config, overrides or []), nodes, node, assume or [], price_per_gpu_hour, output, console)


@app.command()
def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="what to measure: a run directory (its last model), RUN@VERSION, a model directory (with --config), "
            "a generations file or a Parquet file of groups; `key.sub=value` replaces a value of the config",
            metavar="TARGET... [KEY=VALUE]...",
        ),
    ],
    config: Annotated[Path | None, typer.Option(help="YAML config that names the task; default: the run's")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="the target that the others are compared with; default: the first")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; default: in the run's evaluations/, else in this directory")
    ] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="draw PNG and SVG plots beside the JSON")] = True,
) -> None:
    """Measure a model, or compare several models on the same questions with the same sampling seeds.

    Metrics: greedy accuracy, pass@k, maj@k, best-of-k by score, weighted vote, assessment accuracy and perplexity, each
    with a 95 % interval; for every target but the baseline also the paired difference with its interval and p-value.
    The command writes a JSON file, the answers as JSONL, and plots. docs/evaluation.md explains metrics and formats.

    Measure the last model of a run with 3 sampling seeds and 8 samples per question and seed:

        aft-ray evaluate runs/gsm8k evaluation.k=8 evaluation.seeds=3

    Compare version 0 (fine-tuned) with versions 1 and 3 on 100 validation questions:

        aft-ray evaluate runs/gsm8k@0 runs/gsm8k@1 runs/gsm8k@3 evaluation.split=validation data.validation_limit=100

    Compare model directories on the task of a config:

        aft-ray evaluate /models/vft /models/aft --config jobs/configs/gsm8k_smoke.yaml data.path=/path/to/gsm8k

    Measure existing answers, from aft-ray or from another program; no engine is started:

        aft-ray evaluate ours.jsonl theirs.jsonl --baseline theirs --config jobs/configs/gsm8k_smoke.yaml
    """
    from aft_ray.evaluation.command import evaluate_targets
    from aft_ray.evaluation.report.table import results_table
    from aft_ray.evaluation.targets import plan_evaluation
    from aft_ray.observe.logs import driver_log_path

    planned = plan_evaluation(targets, config)
    run_dir = next((target.run_dir for target in planned.targets if target.run_dir is not None), None)
    summary, title, files = evaluate_targets(planned, baseline, output, plots, driver_log_path(run_dir))
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(results_table(summary.results, title, summary.comparisons))
    for model in summary.evaluated:
        if "seconds" in model.facts:
            print(f"{model.label}: {model.facts['tokens']:,} tokens in {model.facts['seconds']:.0f} s")
    print("written: " + ", ".join(files))


@app.command()
def serve(
    model: Annotated[
        str, typer.Argument(help="a run directory (its last model), RUN@VERSION, or a model directory (with task.task)")
    ],
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="YAML config, see jobs/serve.yaml")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 means all and needs API keys")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 8000,
    follow: Annotated[
        bool, typer.Option("--follow", help="serve each new version of the run when it is published")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Serve a reasoner over HTTP: it samples several answers and returns the one with the best score under the model.

    Endpoints: POST /v1/reason, OpenAI's /v1/chat/completions and /v1/completions, a web page at / and API documentation
    at /docs. `aft-ray keys --serve` lists every key; docs/serving.md explains the service.

    Serve the last model of a run, or follow a run that is still training:

        aft-ray serve runs/gsm8k

        aft-ray serve runs/gsm8k --follow answering.n=16

    Serve a model directory to other machines, with API keys:

        aft-ray serve /path/to/model task.task=gsm8k --host 0.0.0.0 access.keys_file=keys.txt
    """
    from aft_ray.config.serve import load_serve_config

    parsed = load_serve_config(model, config, [*(["follow=true"] if follow else []), *(overrides or [])])
    if dry_run:
        from aft_ray.cluster.reservations import serving_reservations

        print_dry_run(parsed, serving_reservations(parsed).lines())
        return
    from aft_ray.observe.logs import driver_log_path
    from aft_ray.serving.command import serve as serve_until_stopped

    serve_until_stopped(parsed, host, port, driver_log_path(None))


@app.command()
def status(run_dir: Annotated[str, typer.Argument(help="run directory")]) -> None:
    """Show the state of a run: its rounds so far, the progress of the next, and whether a driver is running.

    Example:

        aft-ray status runs/gsm8k
    """
    from aft_ray.observe.summary import read_events, rounds_table, state_lines
    from aft_ray.storage.run_dir import RunDir
    from aft_ray.storage.versions import read_config

    directory = RunDir(run_dir)
    config = read_config(directory)
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(rounds_table(read_events(directory)))
    for line in state_lines(config, directory):
        print(line)


@app.command()
def simulate(
    config: Annotated[Path, typer.Argument(help="YAML config, see jobs/configs")],
    overrides: Overrides = None,
    assume: Annotated[list[str] | None, typer.Option(help="KEY=VALUE changes an assumption; may be repeated")] = None,
    like: Annotated[
        str | None, typer.Option(help="run directory to take answers and speeds from; default: a 70B model on H100s")
    ] = None,
    mtbf_hours: Annotated[float | None, typer.Option(help="mean hours until a GPU fails and ends its process")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="rounds to simulate; default: rounds.count")] = None,
    seed: Annotated[int, typer.Option(help="seed of the simulated answers and failures")] = 0,
    staleness: Annotated[str | None, typer.Option(help="compare these values of rounds.max_staleness: 0,1,2")] = None,
    compare: Annotated[str | None, typer.Option(help="compare these values of a key: KEY=VALUE,VALUE")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="draw the timeline to this PNG, SVG or PDF file", callback=file_to_write)
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Simulate the rounds of a run in virtual time: round times, waiting times, and the cost of failures.

    The scheduling code is the code of real runs. Engines, train workers and failures are simulated, so any number of
    GPUs can be tried without one. `--assume help` lists the assumptions; docs/simulation.md compares with real runs.

    Examples:

        aft-ray simulate jobs/configs/arithmetic_demo.yaml --staleness 0,1,2

        aft-ray simulate my_70b.yaml sampling.samplers=96 training.workers=232 --mtbf-hours 5000 --plot timeline.png

        aft-ray simulate my_70b.yaml --compare sampling.batch_size=4,16,64 --assume response_tokens=400
    """
    from aft_ray.planning.simulation.command import Request, simulate_all

    simulate_all(
        Request(
            config, overrides or [], assume or [], like, mtbf_hours, rounds, seed, staleness, compare, plot, json_file
        ),
        Console() if sys.stdout.isatty() else Console(width=200),
    )


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="YAML config, see jobs/configs; in any directory")],
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, then RAY_ADDRESS")
    ] = None,
    working_dir: Annotated[
        Path | None, typer.Option(help="checkout to upload; default: this directory, else aft_ray's own")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="variable for every process of the job; no secrets")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="show the job's output, exit with its status")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print the shell command")] = False,
) -> None:
    """Train on a cluster: check the config, then submit the run with `ray job submit`. See docs/clusters.md.

    Examples:

        aft-ray submit run.yaml run_dir=/shared/runs/gsm8k model.name=/shared/model --address http://head:8265

        aft-ray submit jobs/configs/gsm8k_smoke.yaml run_dir=s3://bucket/gsm8k --no-wait --dry-run
    """
    from aft_ray.operations.submit import plan_submission, run_submission

    submission = plan_submission(config, overrides or [], address, working_dir, env or [], wait)
    print(submission.shell(), flush=True)
    if not dry_run:
        raise SystemExit(run_submission(submission, print))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="YAML config; its model and run_dir are checked too")] = None,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="HOST:6379 of the head; default: RAY_ADDRESS, else here")] = None,
    storage: Annotated[str | None, typer.Option(help="directory or URI that all nodes share; default: run_dir")] = None,
    working_dir: Annotated[
        Path | None, typer.Option(help="what `submit` would upload; default: this directory, else aft_ray's own")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print findings and facts as JSON")] = False,
    acceptance: Annotated[
        bool, typer.Option("--accept", help="run the acceptance suite on this machine's GPUs instead")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help="--accept: a check or a part of the suite; repeatable")] = None,
    small: Annotated[bool, typer.Option("--small", help="--accept: tiny models; without a GPU, on the CPU")] = False,
) -> None:
    """Check every node of a running cluster for faults that would make a run fail. Exit status 1 means that there are.

    It checks versions, GPUs and their driver, clocks, shared storage, the model, shared memory, disks, limits, ports,
    the bandwidth of an all-reduce over all nodes, and the size of the upload. It says how to repair each fault.

    With `--accept` it runs the acceptance suite instead (docs/acceptance.md), which needs no cluster: the training step
    against float32, memory and speed against the plan, the engine, and whole runs. It prints one line for each check.

    Examples:

        aft-ray doctor jobs/configs/gsm8k_smoke.yaml run_dir=/shared/runs/gsm8k model.name=/shared/model

        ray job submit --address http://head:8265 --working-dir . -- python -m aft_ray.cli doctor --storage /shared

        aft-ray doctor --accept --only training
    """
    if acceptance:
        from aft_ray.operations.acceptance.command import accept
        from aft_ray.operations.acceptance.suite import Setting

        if config is not None or address or working_dir or as_json:
            raise ConfigError("--accept takes --only, --small and --storage; leave the config and other options out")
        if not accept(only or [], Setting(small, storage), lambda line: print(line, flush=True)):
            raise SystemExit(1)
        return
    if only or small:
        raise ConfigError("--only and --small are options of --accept; add it, or leave them out")
    from aft_ray.operations import report
    from aft_ray.operations.doctor import check_cluster, requirements_of
    from aft_ray.operations.upload import checkout

    parsed = load_config(config, overrides or []) if config is not None else None
    say = (lambda _: None) if as_json else print
    facts, findings = check_cluster(address, requirements_of(parsed, storage, working_dir or checkout()), say)
    if as_json:
        print(report.as_json(facts, findings))
    else:
        (Console() if sys.stdout.isatty() else Console(width=200)).print(report.table(findings))
        print("\n".join(report.lines(findings)) or f"no fault found on {len(facts.nodes)} nodes")
    if not report.healthy(findings):
        raise SystemExit(1)


@app.command()
def keys(serve: Annotated[bool, typer.Option("--serve", help="keys of `aft-ray serve` instead")] = False) -> None:
    """List every config key with its default and its meaning."""
    from aft_ray.config.serve import ServeConfig

    for line in describe_keys(ServeConfig if serve else RunConfig):
        print(line)


def user_errors() -> tuple[type[BaseException], ...]:
    """The errors whose message is one sentence for the user. Any other error is a bug and keeps its traceback."""
    from aft_ray.coordination.coordinator import PeerFailed
    from aft_ray.operations.submit import SubmissionFailed
    from aft_ray.sampling.round import RunFailed
    from aft_ray.sampling.sampler_health import SamplersFailed
    from aft_ray.serving.command import ServingFailed
    from aft_ray.storage.run_dir import RunDirError
    from aft_ray.verify.judge.judge import JudgeFailed
    from aft_ray.weights.version_manifest import WeightUpdateFailed

    return (
        RunFailed,
        RunDirError,
        SamplersFailed,
        WeightUpdateFailed,
        PeerFailed,
        JudgeFailed,
        ServingFailed,
        SubmissionFailed,
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs the command. Exit status: 0 success, 1 the run failed, 2 a wrong command or config, 130 interrupted."""
    quiet()
    try:
        app(arguments, standalone_mode=False)
    except ConfigError as error:
        fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted; run the same command again to continue", 130)
    except UsageError as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if not isinstance(error, user_errors()):
            raise
        fail(str(error), 1)


def fail(sentence: str, status_code: int) -> None:
    """Prints the error and exits."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(status_code)


def quiet() -> None:
    """Silences warnings and logs of other libraries in this process. Actors log to the run directory."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")


if __name__ == "__main__":
    main()
