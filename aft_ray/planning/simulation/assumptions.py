"""What a simulation assumes about hardware, answers and failures.

Invariant: the candidates of a question (their lengths, right or wrong) depend on the seed, the round and the question
alone, and not on which engine answers it or when. So two simulations that differ only in scheduling do the same work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aft_ray.config.run import RunConfig
from aft_ray.config.section import Natural, Positive, Section
from aft_ray.planning.plan.step_shape import log_normal


class SimulationAssumptions(Section):
    """Speeds of one engine and one train worker, durations of the steps between them, answers, and failures.

    The defaults are round numbers for a 70B model in bfloat16 with 8 H100 per engine and one H100 per train worker.
    They are assumptions, not measurements: `--like RUN` takes them from a run of your own.
    """

    key_list: ClassVar[str] = "`aft-ray simulate CONFIG --assume help`"

    step_ms: float = Field(14, gt=0, description="fixed time of an engine's decoding step: weights and overhead")
    step_us_per_sequence: float = Field(60, ge=0, description="further time of the step for every running sequence")
    max_num_seqs: Positive = Field(
        1024, description="sequences that an engine runs at once, when the config leaves it to vLLM"
    )
    prefill_tokens_per_s: float = Field(
        25_000, gt=0, description="prompt tokens that an engine reads; decoding waits meanwhile"
    )
    train_tokens_per_s: float = Field(
        600, gt=0, description="tokens of a train worker, forward and backward, each prompt once"
    )
    pass_s: float = Field(1.0, ge=0, description="fixed time of each forward and backward pass: ZeRO's gathers")
    optimizer_s: float = Field(0.5, ge=0, description="time of the optimiser in a step")
    publish_s: float = Field(10, ge=0, description="trainer: from its last step until the version is at the engines")
    load_s: float = Field(20, ge=0, description="engine: fetching, loading and verifying a version")
    overhead_s: float = Field(
        3, ge=0, description="fixed time of a round's sampling: start of the pipeline, last labels and files"
    )
    forward_ms: float = Field(0.5, ge=0, description="CPU time of the one forwarding process for each question")
    prompt_tokens: Positive = Field(120, description="mean length of a prompt")
    reference_tokens: Positive = Field(120, description="mean length of a reference response")
    response_tokens: Positive = Field(180, description="mean length of a candidate, before sampling.max_tokens cuts it")
    length_spread: float = Field(0.5, ge=0, le=3, description="standard deviation of log lengths; 0: all the same")
    length_shared: float = Field(
        0.5, ge=0, le=1, description="share of that variance which a question's candidates have in common"
    )
    pass_rate: float = Field(0.6, ge=0, le=1, description="share of right candidates")
    pass_spread: float = Field(0.7, ge=0, lt=1, description="how much questions differ in pass rate; 0: not at all")
    questions: Positive | None = Field(None, description="training questions; none: as many as the config says")
    validation: Natural | None = Field(None, description="validation questions; none: as many as the config says")
    gpus_per_node: Positive = Field(8, description="GPUs that are lost together with their node")
    mtbf_hours: float | None = Field(
        None, gt=0, description="mean time until the process that uses one GPU ends; none: it never does"
    )
    node_mtbf_hours: float | None = Field(None, gt=0, description="mean time until one node is lost; none: it never is")
    start_s: float = Field(180, ge=0, description="start of an engine after a failure")
    trainer_start_s: float = Field(300, ge=0, description="restart of the train workers from a checkpoint")
    node_back_s: float = Field(900, ge=0, description="time until a lost node is replaced")
    notice_s: float = Field(30, ge=0, description="time until calls to a lost node fail; they hang before")


def most_sequences(config: RunConfig, assumed: SimulationAssumptions) -> int:
    """How many sequences an engine runs at most."""
    return config.sampling.max_num_seqs or assumed.max_num_seqs


@dataclass(frozen=True, slots=True)
class Work:
    """The answers of a stage, drawn before any engine gives them.

    Attributes:
        prompts, references: numbers of tokens, [questions].
        lengths: numbers of tokens of the candidates, [questions, k].
        right: whether a candidate is right, [questions, k].
    """

    prompts: NDArray[np.int64]
    references: NDArray[np.int64]
    lengths: NDArray[np.int64]
    right: NDArray[np.bool_]


def draw_work(assumed: SimulationAssumptions, seed: int, stage: int, questions: int, k: int, max_tokens: int) -> Work:
    """Draws the answers of a stage (a round, or an evaluation).

    Lengths are log-normal and cut at `max_tokens`; the pass rates of the questions are beta distributed.
    """
    prompts, references = _tokens(assumed, seed, questions)
    rng = np.random.default_rng([seed, stage])
    shared = np.sqrt(assumed.length_shared) * rng.standard_normal((questions, 1))
    own = np.sqrt(1 - assumed.length_shared) * rng.standard_normal((questions, k))
    lengths = np.minimum(log_normal(assumed.response_tokens, assumed.length_spread, shared + own), max_tokens)
    return Work(
        prompts, references, lengths, rng.random((questions, k)) < _pass_rates(assumed, rng, questions)[:, None]
    )


def _tokens(assumed: SimulationAssumptions, seed: int, questions: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens of each prompt and of each reference, which are the same in every round."""
    rng = np.random.default_rng([seed])
    normal = rng.standard_normal((2, questions))
    spread = assumed.length_spread
    return log_normal(assumed.prompt_tokens, spread, normal[0]), log_normal(assumed.reference_tokens, spread, normal[1])


def _pass_rates(assumed: SimulationAssumptions, rng: np.random.Generator, questions: int) -> NDArray[np.float64]:
    """The pass rate of each question: beta distributed around `pass_rate`; its parameters sum to 1/spread - 1."""
    rate, spread = assumed.pass_rate, assumed.pass_spread
    if spread == 0 or rate in (0, 1):
        return np.full(questions, rate)
    concentration = 1 / spread - 1
    return rng.beta(rate * concentration, (1 - rate) * concentration, questions)
