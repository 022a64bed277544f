"""The aft-ray command: parses, calls, prints. An error of the user's is one sentence and a non-zero exit status."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from aft_ray.config.loader import describe_keys, dump_config
from aft_ray.config.run import ConfigError, RunConfig, load_config
from aft_ray.config.section import Section

app = typer.Typer(
    help="Alignment Fine-Tuning of language models into better reasoners, on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
# The click that typer runs on, which may be a copy inside it, is only reached through what typer exports.
UsageError: Any = typer.BadParameter.__base__
Overrides = Annotated[
    list[str] | None, typer.Argument(help="`key.sub=value`, each overriding the file", metavar="[KEY=VALUE]...")
]

DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved config and the placement, then stop")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML config, see jobs/configs")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Train a reasoner: VFT, then rounds of sampling and AFT. The same command resumes a run that was stopped.

    Examples:

        aft-ray train jobs/configs/gsm8k_smoke.yaml model.name=/path/to/model data.path=/path/to/gsm8k

        aft-ray train jobs/configs/gsm8k_smoke.yaml model.name=/path/to/model rounds.max_staleness=0 --dry-run

    Every key, its default and its meaning: `aft-ray keys`.
    """
    parsed = load_config(config, overrides or [])
    if dry_run:
        from aft_ray.cluster.connect import plan_lines, training_placement

        print_plan(parsed, plan_lines(parsed.cluster, training_placement(parsed)))
        return
    train_run(parsed)


def print_plan(config: Section, placement: list[str]) -> None:
    print(dump_config(config), end="")
    print("\n".join(["", "# placement", *(f"# {line}".rstrip() for line in placement)]))


def train_run(config: RunConfig) -> None:
    """Runs to the end and prints the table of rounds. Other libraries' output goes to logs/driver.log."""
    from aft_ray.observe.reporter import Reporter, chatter_to
    from aft_ray.observe.summary import read_events, rounds_table
    from aft_ray.storage.run_dir import RunDir

    run_dir = RunDir(config.run_dir)
    log = driver_log(run_dir)
    with kept_log(run_dir, log), chatter_to(log) as console, Reporter(run_dir, console) as reporter:
        from aft_ray.run.orchestrator import run

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
    nodes: Annotated[int | None, typer.Option(min=1, help="nodes; default: as few as the config needs")] = None,
    node: Annotated[
        str | None,
        typer.Option(
            help="a100-40gb, a100-80gb, h100-80gb, h200-141gb (8 GPUs each), cpu, or a YAML file that describes a node"
        ),
    ] = None,
    assume: Annotated[
        list[str] | None, typer.Option(help="name=value of an assumption, such as mfu=0.45; repeatable")
    ] = None,
    price_per_gpu_hour: Annotated[float | None, typer.Option(min=0, help="shows what the run costs")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="write every figure to this file")] = None,
) -> None:
    """Say what a run needs before it runs: memory, placement, time and cost, each figure beside its formula.

    Needs no GPU, no weights and, for the models it knows by name, no network. Refuses what cannot fit. docs/planning.md
    has the formulas and what was checked.

    How few nodes hold it, and how long a round takes there:

        aft-ray plan jobs/configs/llama2_70b_gsm8k.yaml

    On the nodes that there are, and what would be the best split of them:

        aft-ray plan jobs/configs/llama2_70b_gsm8k.yaml --nodes 8 --node h100-80gb --price-per-gpu-hour 2.5
    """
    from aft_ray.planning.plan.command import plan_run as print_plan_of

    console = Console() if sys.stdout.isatty() else Console(width=160)
    print_plan_of(load_config(config, overrides or []), nodes, node, assume or [], price_per_gpu_hour, output, console)


@app.command()
def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="what to measure: a run directory (its last model), RUN@VERSION, a model directory (with --config), "
            "a generations file, a Parquet file of groups; and `key.sub=value` overrides of the config",
            metavar="TARGET... [KEY=VALUE]...",
        ),
    ],
    config: Annotated[Path | None, typer.Option(help="YAML config that names the task; a run has its own")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="which target the others are compared with; default the first")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; default in the run's evaluations/, else in this directory")
    ] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="draw PNG and SVG pictures beside the JSON")] = True,
) -> None:
    """Measure a model, or compare several on the same questions and the same draws.

    Greedy accuracy, pass@k, maj@k, best-of-k by score, weighted vote, assessment accuracy and perplexity, each with a
    95 % interval; for every target but the baseline also the paired difference with its interval and p-value. Writes a
    JSON file, the answers as JSONL and pictures. What each figure means and the formats: docs/evaluation.md.

    One model of a run, with 8 samples a question drawn by each of 3 seeds:

        aft-ray evaluate runs/gsm8k evaluation.k=8 evaluation.seeds=3

    Did the rounds help? Version 0 (fine-tuned) against 1 and 3, on 100 validation questions:

        aft-ray evaluate runs/gsm8k@0 runs/gsm8k@1 runs/gsm8k@3 evaluation.split=validation data.validation_limit=100

    Model directories, with the task of a config:

        aft-ray evaluate /models/vft /models/aft --config jobs/configs/gsm8k_smoke.yaml data.path=/path/to/gsm8k

    Answers that exist already, from here or from elsewhere; no engine is started:

        aft-ray evaluate ours.jsonl theirs.jsonl --baseline theirs --config jobs/configs/gsm8k_smoke.yaml
    """
    from aft_ray.evaluation.command import evaluate_targets
    from aft_ray.evaluation.report.table import results_table
    from aft_ray.evaluation.targets import plan

    planned = plan(targets, config)
    run_dir = next((target.run_dir for target in planned.targets if target.run_dir is not None), None)
    outcome, title, files = evaluate_targets(planned, baseline, output, plots, driver_log(run_dir))
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(results_table(outcome.results, title, outcome.comparisons))
    for model in outcome.evaluated:
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
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0: all, which needs keys")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 8000,
    follow: Annotated[
        bool, typer.Option("--follow", help="of a run: serve each new version as it is published, without an outage")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Serve a reasoner over HTTP: samples several answers and returns the one its own score ranks best.

    POST /v1/reason, OpenAI's /v1/chat/completions and /v1/completions, a page at /, API documents at /docs. Every key:
    `aft-ray keys --serve`; all of it: docs/serving.md.

    The last model of a run, and one that goes on training:

        aft-ray serve runs/gsm8k

        aft-ray serve runs/gsm8k --follow answering.n=16

    A model directory, for other machines, with keys:

        aft-ray serve /path/to/model task.task=gsm8k --host 0.0.0.0 access.keys_file=keys.txt
    """
    from aft_ray.config.serve import load_serve_config

    parsed = load_serve_config(model, config, [*(["follow=true"] if follow else []), *(overrides or [])])
    if dry_run:
        from aft_ray.cluster.connect import serving_placement

        print_plan(parsed, serving_placement(parsed).lines())
        return
    from aft_ray.serving.command import serve as serve_until_stopped

    serve_until_stopped(parsed, host, port, driver_log(None))


@app.command()
def status(run_dir: Annotated[str, typer.Argument(help="run directory")]) -> None:
    """Show how far a run is: its rounds so far, what is sampled of the next, and whether a driver works on it.

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
    assume: Annotated[
        list[str] | None, typer.Option(help="`key=value` of a speed, of the answers or of failures; repeatable")
    ] = None,
    like: Annotated[
        str | None, typer.Option(help="run directory whose answers and speeds are assumed, instead of a 70B's on H100s")
    ] = None,
    mtbf_hours: Annotated[float | None, typer.Option(help="mean hours until one GPU ends its process")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="rounds to simulate; none: rounds.count")] = None,
    seed: Annotated[int, typer.Option(help="of the answers and the failures")] = 0,
    staleness: Annotated[str | None, typer.Option(help="compare these values of rounds.max_staleness: 0,1,2")] = None,
    compare: Annotated[str | None, typer.Option(help="compare these values of a key: KEY=VALUE,VALUE")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the timeline to this PNG, SVG or PDF file")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all figures to this file")] = None,
) -> None:
    """Play through a run's rounds in virtual time: round times, who waits for whom, what failures cost.

    The scheduling code is the one that runs use; engines, train workers and failures are simulated, for any number of
    GPUs, without one. What is assumed and how near it comes: docs/simulation.md; every assumption: `--assume help`.

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
    config: Annotated[Path, typer.Argument(help="YAML config, see jobs/configs; it may lie anywhere")],
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="http://HEAD:8265; default RAY_API_SERVER_ADDRESS, then RAY_ADDRESS")
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(help="checkout to upload; default this directory, or aft_ray's own"),
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="variable for every process of the job; no secrets")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="follow the job and end with its exit status")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the shell command, then stop")] = False,
) -> None:
    """Train on a cluster: check the config, then `ray job submit` it. See docs/clusters.md.

    Examples:

        aft-ray submit run.yaml run_dir=/shared/runs/gsm8k model.name=/shared/model --address http://head:8265

        aft-ray submit jobs/configs/gsm8k_smoke.yaml run_dir=s3://bucket/gsm8k --no-wait --dry-run
    """
    from aft_ray.operations.submit import plan, run

    submission = plan(config, overrides or [], address, working_dir, env or [], wait)
    print(submission.shell(), flush=True)
    if not dry_run:
        raise SystemExit(run(submission, print))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="YAML config: also look for its model and run_dir")] = None,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="HOST:6379 of the head; default RAY_ADDRESS, else here")] = None,
    storage: Annotated[str | None, typer.Option(help="directory or URI that all nodes share; default run_dir")] = None,
    working_dir: Annotated[
        Path | None, typer.Option(help="what `submit` would upload; default this directory, or aft_ray's own checkout")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print findings and facts as JSON")] = False,
) -> None:
    """Look at every node of a running cluster for what would make a run fail; exit status 1 when something would.

    Versions, GPUs, clocks, shared storage, the model, shared memory, disks, limits, ports, a sum over all nodes, and
    the size of the upload. Every failure comes with its cure.

    Examples:

        aft-ray doctor jobs/configs/gsm8k_smoke.yaml run_dir=/shared/runs/gsm8k model.name=/shared/model

        ray job submit --address http://head:8265 --working-dir . -- python -m aft_ray.cli doctor --storage /shared
    """
    from aft_ray.operations import report
    from aft_ray.operations.doctor import examine, what_to_ask
    from aft_ray.operations.upload import checkout

    parsed = load_config(config, overrides or []) if config is not None else None
    say = (lambda _: None) if as_json else print
    facts, findings = examine(address, what_to_ask(parsed, storage, working_dir or checkout()), say)
    if as_json:
        print(report.as_json(facts, findings))
    else:
        (Console() if sys.stdout.isatty() else Console(width=200)).print(report.table(findings))
        print("\n".join(report.lines(findings)) or f"{len(facts.nodes)} nodes are well")
    if not report.healthy(findings):
        raise SystemExit(1)


@app.command()
def keys(serve: Annotated[bool, typer.Option("--serve", help="the keys of `aft-ray serve` instead")] = False) -> None:
    """List every config key with its default and its meaning."""
    from aft_ray.config.serve import ServeConfig

    for line in describe_keys(ServeConfig if serve else RunConfig):
        print(line)


def user_errors() -> tuple[type[BaseException], ...]:
    """The errors whose message is one sentence for the user; everything else is ours and keeps its traceback."""
    from aft_ray.coordination.coordinator import PeerFailed
    from aft_ray.operations.submit import SubmissionFailed
    from aft_ray.run.orchestrator import RunFailed
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
    """Entry point. Exit status: 0 done, 1 the run failed, 2 the command or the config is wrong, 130 interrupted."""
    quiet()
    try:
        app(arguments, standalone_mode=False)
    except ConfigError as error:
        fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted; the same command goes on from here", 130)
    except UsageError as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if not isinstance(error, user_errors()):
            raise
        fail(str(error), 1)


def driver_log(run_dir: Any) -> Path:
    """Where this process's libraries print: into the run directory, when that is on a mounted filesystem."""
    from aft_ray.storage.run_dir import LOGS

    if run_dir is not None and run_dir.is_local:
        return Path(run_dir.local_path(f"{LOGS}/driver.log"))
    return Path(tempfile.gettempdir()) / f"aft-ray-{os.getpid()}.log"


@contextlib.contextmanager
def kept_log(run_dir: Any, log: Path) -> Iterator[None]:
    """Puts the log of a driver whose run directory is an object store there at the end, if it can."""
    from aft_ray.storage.run_dir import LOGS, RunDirError

    try:
        yield
    finally:
        if not run_dir.is_local and log.exists():
            with contextlib.suppress(OSError, RunDirError):
                run_dir.write_bytes(f"{LOGS}/driver-{int(log.stat().st_ctime)}.log", log.read_bytes())
                log.unlink()


def fail(sentence: str, status_code: int) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(status_code)


def quiet() -> None:
    """The libraries' warnings and logs do not belong between our lines; actors log to the run directory."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")


if __name__ == "__main__":
    main()
