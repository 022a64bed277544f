"""Generated responses with gold answers, and the tasks that extract and compare their answers.

The worker processes of the verifier import this module.
"""

from __future__ import annotations

import random

from aft_ray.verify.answers.compare import Kind, compare
from aft_ray.verify.answers.numbers import extract_after_marker
from aft_ray.verify.answers.options import extract_option
from aft_ray.verify.process_pool import VerificationRequest
from aft_ray.verify.result import VerificationResult

KINDS: dict[Kind, float] = {"number": 0.6, "option": 0.25, "yes_no": 0.05, "math": 0.1}
REASONING = "There are {a} of them at first and {b} come later, so there are {a} + {b} = {c} in all. "


class MarkedAnswers:
    """A task whose responses give the answer after `####`, or name an option in any wording."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def extract(self, text: str) -> str | None:
        return extract_option(text) if self.kind == "option" else extract_after_marker(text, "####")

    def same(self, answer: str | None, gold: str) -> VerificationResult:
        return compare(self.kind, answer, gold)


def ordinary_requests(count: int, seed: int) -> list[VerificationRequest]:
    """Requests with 4 sentences of reasoning each, about half of them right; `KINDS` gives the share of each kind."""
    rng = random.Random(seed)
    tasks = {kind: MarkedAnswers(kind) for kind in KINDS}
    requests = []
    for kind in rng.choices(list(KINDS), list(KINDS.values()), k=count):
        a, b = rng.randint(2, 5000), rng.randint(2, 5000)
        answer, gold = _answer(rng, kind, a, b)
        text = REASONING.format(a=a, b=b, c=a + b) * 4
        requests.append(
            VerificationRequest(tasks[kind], text + (answer if kind == "option" else f"#### {answer}"), gold)
        )
    return requests


def _answer(rng: random.Random, kind: Kind, a: int, b: int) -> tuple[str, str]:
    """An answer in one of the forms that models write, and the gold answer."""
    value = a + b + rng.choice((0, 0, 0, 1, 2, 10))
    if kind == "number":
        forms = ("{0}", "${0:,}.00", "{0:,} apples", "\\boxed{{{0}}}", "{0} apples or so", "**{0}**", "{0}%")
        return rng.choice(forms).format(value), str(a + b)
    if kind == "option":
        forms = ("The answer is ({0}).", "{0}", "So {0}) is correct.", "**Answer: {0}**", "Option {0}")
        return rng.choice(forms).format(rng.choice("ABCDE")), rng.choice("ABCDE")
    if kind == "yes_no":
        return rng.choice(("Yes.", "no", "**True**", "No, because it is odd", "not sure")), rng.choice(("yes", "no"))
    forms = (
        "$\\frac{{{0}}}{{\\sqrt{{{1}}}}}$",
        "{0}x+{1}",
        "(x+{1})({0}x+1)",
        "\\sqrt{{{0}}}+{1}",
        "{0}\\pi",
        "({0},{1})",
    )
    form = rng.choice(forms)
    return form.format(value, b), form.format(a + b, b)
