"""The common part of the multiple-choice tasks.

Invariants: each option stands on its own line below the question, after its letter. The gold answer is the letter of
one of the options. No training question occurs in validation or test, and no validation question occurs in test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aft_ray.config.run import ConfigError, DataConfig
from aft_ray.storage.records import Question
from aft_ray.tasks.base import MarkedTask
from aft_ray.verify.answers.markup import quote
from aft_ray.verify.answers.numbers import extract_after_marker
from aft_ray.verify.answers.options import extract_option
from aft_ray.verify.result import VerificationResult, decided, undecided


@dataclass(frozen=True, slots=True)
class ChoiceProblem:
    """A multiple-choice problem of a source.

    Attributes:
        id: The id within the task.
        stem: The text of the question without its options.
        gold: The letter of the right option.
        reasoning: The reference chain of thought; empty when the source has none.
    """

    id: str
    stem: str
    options: tuple[str, ...]
    gold: str
    reasoning: str = ""

    @property
    def key(self) -> str:
        """The stem without case, spaces and punctuation. Copies of a question have equal keys."""
        return "".join(filter(str.isalnum, self.stem.casefold())) or self.stem

    @property
    def is_ambiguous(self) -> bool:
        """Whether the right option also has another letter, so that a right answer could be labelled wrong."""
        wordings = [" ".join(option.casefold().split()) for option in self.options]
        return wordings.count(wordings[ord(self.gold) - ord("A")]) > 1


class ChoiceTask(MarkedTask):
    """The base class of the multiple-choice tasks. `letters` are the letters that an option can have."""

    def __init__(self, name: str, data: DataConfig, letters: str) -> None:
        super().__init__(name, data.prompt or "Question: {question}\nAnswer:", data.answer_marker)
        self.letters = letters

    def extract(self, text: str) -> str | None:
        """The letter of the option that a response names, after the marker if possible, else in the whole text.

        A text after the marker that names no option is returned unchanged: it may be the wording of the right option.
        """
        after = extract_after_marker(text, self.marker)
        option = extract_option(after, self.letters) if after else None
        return option or extract_option(text, self.letters) or after

    def same(self, answer: str | None, gold: str) -> VerificationResult:
        """The verdict on an answer. No answer is wrong. An answer that is no letter of an option is undecided."""
        if answer is None or (len(answer) == 1 and answer in self.letters):
            return decided(answer == gold, answer)
        return undecided(f"{quote(answer)} names no option from {self.letters[0]} to {self.letters[-1]}", answer)

    def check_problem(
        self, problem_id: str, stem: str, options: Sequence[str], gold: str, reasoning: str, where: str
    ) -> ChoiceProblem:
        """A problem made from the values of a row.

        Raises ConfigError, which names the row by `where`, when the stem, the options or the gold answer are not valid.
        """
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
        return ChoiceProblem(problem_id, stem.strip(), tuple(options), gold, reasoning.strip())

    def to_questions(self, problems: Sequence[ChoiceProblem]) -> list[Question]:
        """Problems as questions. A reference response ends in the marker and the letter of the right option."""
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


def without_duplicates(problems: Sequence[ChoiceProblem], excluded: Sequence[ChoiceProblem]) -> list[ChoiceProblem]:
    """The first problem of each stem, without those whose stem occurs in `excluded`. The options are not compared."""
    seen = {problem.key for problem in excluded}
    kept = []
    for problem in problems:
        if problem.key not in seen:
            seen.add(problem.key)
            kept.append(problem)
    return kept
