"""What the tasks share whose answer is one of several lettered options.

Invariants: the options stand one a line under the question, each behind its letter; the gold answer is the letter of
one of them; no question is trained on that is tested or validated, and none is validated that is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aft_ray.config.run import ConfigError, DataConfig
from aft_ray.storage.records import Question
from aft_ray.tasks.base import MarkedTask
from aft_ray.verify.answers.markup import shown
from aft_ray.verify.answers.numbers import extract_after_marker
from aft_ray.verify.answers.options import extract_option
from aft_ray.verify.result import VerificationResult, decided, undecided


@dataclass(frozen=True, slots=True)
class Problem:
    """A multiple-choice problem as its source has it.

    id: within the task. gold: a letter. reasoning: the reference chain of thought, empty where the source has none.
    """

    id: str
    stem: str
    options: tuple[str, ...]
    gold: str
    reasoning: str = ""

    @property
    def key(self) -> str:
        """What is left of the stem without case, spaces and punctuation: equal for a question that was copied."""
        return "".join(filter(str.isalnum, self.stem.casefold())) or self.stem

    @property
    def is_ambiguous(self) -> bool:
        """Whether the right option also stands under another letter, so that a right answer may be called wrong."""
        wordings = [" ".join(option.casefold().split()) for option in self.options]
        return wordings.count(wordings[ord(self.gold) - ord("A")]) > 1


class ChoiceTask(MarkedTask):
    """The part that the tasks share. `letters`: those that options may have."""

    def __init__(self, name: str, data: DataConfig, letters: str) -> None:
        super().__init__(name, data.prompt or "Question: {question}\nAnswer:", data.answer_marker)
        self.letters = letters

    def extract(self, text: str) -> str | None:
        """The option's letter: from what follows the marker, else from the whole text.

        What follows the marker and names no option is given back as it is: it may be the wording of the right one.
        """
        after = extract_after_marker(text, self.marker)
        option = extract_option(after, self.letters) if after else None
        return option or extract_option(text, self.letters) or after

    def same(self, answer: str | None, gold: str) -> VerificationResult:
        """No answer is wrong; one that is no letter of an option is undecided."""
        if answer is None or (len(answer) == 1 and answer in self.letters):
            return decided(answer == gold, answer)
        return undecided(f"{shown(answer)} names no option from {self.letters[0]} to {self.letters[-1]}", answer)

    def problem(
        self, identity: str, stem: str, options: Sequence[str], gold: str, reasoning: str, where: str
    ) -> Problem:
        """A problem from a source's row. Raises ConfigError, naming the row by `where`, when it cannot be asked."""
        options = [option.strip() for option in options]
        if not stem.strip():
            raise ConfigError(f"{where} has no text of the question; mend the row or take it out")
        if not 2 <= len(options) <= len(self.letters):
            raise ConfigError(
                f"{where} has {len(options)} options, not 2 to {len(self.letters)}; mend the row or take it out"
            )
        letters = self.letters[: len(options)]
        if len(gold) != 1 or gold not in letters:
            raise ConfigError(
                f"{where} gives {gold!r} as its answer, which is none of {', '.join(letters)}; mend the row or take it "
                f"out"
            )
        return Problem(identity, stem.strip(), tuple(options), gold, reasoning.strip())

    def questions(self, problems: Sequence[Problem]) -> list[Question]:
        """Problems as they are asked; a reference ends in the marker and the letter."""
        return [
            Question(
                f"{self.name}-{problem.id}",
                "\n".join([problem.stem, *map("({}) {}".format, self.letters, problem.options)]),
                "\n".join(filter(None, [problem.reasoning, f"{self.marker} {problem.gold}"])),
                problem.gold,
                self.name,
            )
            for problem in problems
        ]


def held_apart(problems: Sequence[Problem], kept: Sequence[Problem]) -> list[Problem]:
    """The first of every question that is not among `kept`; equal stems are the same question, whatever the options."""
    seen = {problem.key for problem in kept}
    apart = []
    for problem in problems:
        if problem.key not in seen:
            seen.add(problem.key)
            apart.append(problem)
    return apart
