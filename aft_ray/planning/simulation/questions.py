"""The questions of a simulated run: how many there are, and how a simulated engine recognises them.

A simulated question is a group whose prompt has two token ids: the stage that asks it (a round, or an evaluation), and
its number, under which `Work` has its lengths.
"""

from __future__ import annotations

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.planning.plan.workload import KNOWN_TASKS
from aft_ray.planning.simulation.assumptions import SimulationAssumptions
from aft_ray.storage.records import Group, Question

# Stages of rounds are numbered from 1, those of evaluations from here.
EVALUATION_STAGE = 1_000_000


def simulated_group(stage: int, number: int, task: str) -> Group:
    """The question with a number, as it is asked in a stage, without candidates."""
    question = Question(f"{task}/{number:08d}", "", "", "", task)
    return Group(stage % EVALUATION_STAGE, 0, question, [stage, number], [0], [])


def number_of(group: Group) -> int:
    """The number of a simulated question."""
    return group.prompt_token_ids[1]


def training_questions(config: RunConfig, assumed: SimulationAssumptions) -> list[Group]:
    """The training questions of each task, numbered over all tasks.

    Raises:
        ConfigError: the number of a task's questions is unknown.
    """
    counts: dict[str, int | None] = dict.fromkeys(config.task_configs, assumed.questions)
    for name, entry in config.task_configs.items():
        if assumed.questions is None:
            facts = KNOWN_TASKS.get(entry.task)
            known = entry.arithmetic.train_size if entry.task == "arithmetic" else facts.train if facts else 0
            counts[name] = entry.train_limit or known or config.rounds.questions_per_round
    groups: list[Group] = []
    for name, count in counts.items():
        if count is None:
            raise ConfigError(
                f"{config.task_key(name)} does not say how many training questions there are; add "
                f"--assume questions=NUMBER, or set {config.task_key(name)}.train_limit"
            )
        groups += [simulated_group(0, len(groups) + number, name) for number in range(count)]
    return groups


def count_validation_questions(config: RunConfig, assumed: SimulationAssumptions) -> int:
    """The number of validation questions; those of a task of unknown size are not counted."""
    if assumed.validation is not None:
        return assumed.validation
    total = 0
    for entry in config.task_configs.values():
        facts = KNOWN_TASKS.get(entry.task)
        known = entry.arithmetic.validation_size if entry.task == "arithmetic" else facts.validation if facts else 0
        total += entry.validation_limit or known
    return total
