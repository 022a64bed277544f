"""What serving adds and what it costs, through HTTP, of one run's model.

    python benchmarks/serving.py runs/demo/seed0/aft

Accuracy: each strategy on the same unseen questions, with the same draws. Adaptive n: tokens saved at which accuracy.
Cost: requests/s of n candidates through the reasoner, over the same candidates asked directly of the engine's handle,
turn by turn in one run; and over LLMServer's own OpenAI endpoint, which returns their log-probs and ranks nothing.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import aiohttp
import typer

from aft_ray.cluster import connected, serving_placement
from aft_ray.evaluation.bootstrap import bootstrap
from aft_ray.observe.reporter import chatter_to
from aft_ray.records import Question, Verdict
from aft_ray.sampling.engine import SamplingSpec
from aft_ray.serve_config import ServeConfig, load_serve_config
from aft_ray.serving.command import APPLICATION, Serving
from aft_ray.serving.policy import Draw
from aft_ray.tasks import build_tasks, load_split
from aft_ray.tasks.rendering import render_prompt

PORT = 8017
STRATEGIES = ("greedy", "score", "vote", "weighted_vote")


def main(
    model: Annotated[str, typer.Argument(help="run directory")],
    questions: Annotated[int, typer.Option(help="unseen questions of the accuracy table")] = 300,
    n: Annotated[int, typer.Option(help="candidates")] = 8,
    temperature: Annotated[float, typer.Option(help="of sampling")] = 0.7,
    requests: Annotated[int, typer.Option(help="requests of one turn of the cost")] = 200,
    concurrency: Annotated[int, typer.Option(help="requests in flight")] = 16,
    repeats: Annotated[int, typer.Option(help="turns of each side")] = 3,
    output: Annotated[Path | None, typer.Option(help="JSON file of all figures")] = None,
) -> None:
    """Serve a run's model here and measure."""
