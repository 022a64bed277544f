"""A hostile text is never called right, takes bounded time, and does not end the verifier."""

import sys
import threading
import time
from pathlib import Path

import pytest
from readers import TextTask

from aft_ray.config.run import DataConfig
from aft_ray.storage.records import Verdict
from aft_ray.tasks import build_task
from aft_ray.verify.answers.options import extract_option
from aft_ray.verify.process_pool import VerificationRequest, Verifier

DEADLINE_S = 1.5
HOSTILE = {
    "a tower of powers": "9^{9^{9^9}}",
    "a plain tower": "9**9**9**9",
    "a higher tower": "$" + "9^{" * 60 + "9" + "}" * 60 + "$",
    "a product of towers": "(10^{10^{10}}) \\cdot (10^{10^{10}})",
    "factorials": "1000000000!",
    "factorials of factorials": "((((9!)!)!)!)!",
    "a huge binomial": "\\binom{10^{9}}{5 \\cdot 10^{8}}",
    "a huge sum": "\\sum_{n=1}^{10^{12}} \\frac{1}{n^{n}}",
    "an integral": "\\int_0^1 e^{e^{e^{x^2}}} \\sin(\\tan(x^{x})) dx",
    "a huge root": "\\sqrt[99999999]{2^{99999999}}",
    "an expansion": "(a+b+c+d+e+f+g+h)^{200}",
    "an exponent": "1e99999999",
    "a negative exponent": "1 \\times 10^{-99}",
    "nested fractions": "\\frac{1}{" * 90 + "2" + "}" * 90,
    "nested roots": "\\sqrt{" * 140 + "2" + "}" * 140,
    "nested parentheses": "(" * 490 + "1" + ")" * 490,
    "nested boxes": "\\boxed{" * 120 + "13" + "}" * 120,
    "many boxes": "\\boxed{" * 10_000,
    "open braces": "{" * 99_999,
    "a million open braces": "{" * 1_000_000,
    "nested fractions without end": "\\frac{" * 16_000,
    "a regex bomb": "a" * 50_000 + "!",
    "a regex bomb of digits": "1," * 49_000 + "!",
    "spaces": "#### " + " " * 90_000 + "x",
    "answers": "answer is " * 9_000,
    "markers": "#### " * 19_000,
    "dollars": "$" * 99_000,
    "lines": "\n" * 99_000 + "(",
    "a megabyte": "1 " * 500_000,
    "ten million digits": "1" * 10_000_000,
    "many digits": "1" * 90_000,
    "a long number": "#### " + "9" * 999,
    "nul bytes": "#### 1\x002\x00",
    "only nul bytes": "\x00" * 1000,
    "a lone surrogate": "#### \ud8002",
    "surrogates": "\udfff\ud800" * 100,
    "other digits": "#### १३",
    "circled digits": "#### ①②",
    "superscripts": "#### 1²",
    "right to left": "#### \u202e21\u202c",
    "right-to-left marks": "#### \u200f1\u200f2",
    "zero-width characters": "#### 1\u200b2",
    "combining marks": "#### 1" + "\u0301" * 500,
    "infinity": "\\infty",
    "not a number": "nan",
    "a division by zero": "\\frac{1}{0}",
    "zero to the zero of infinity": "\\infty^{0} - \\infty",
    "a matrix": "\\begin{pmatrix}" + "1 & " * 200 + "1\\end{pmatrix}",
    "code": "__import__('os')._exit(1)",
    "code in LaTeX": "\\text{__import__('os').system('exit')}",
    "an open environment": "\\begin{cases}" * 60,
    "commands": "\\" * 900,
}
GOLDS = {"number": "12", "option": "B", "yes_no": "yes", "math": "\\sqrt{2}", "text": "New York"}


def hostile_requests() -> list[VerificationRequest]:
    tasks = [(TextTask(kind), gold) for kind, gold in GOLDS.items()]  # type: ignore[arg-type]
    return [VerificationRequest(task, text, gold) for text in HOSTILE.values() for task, gold in tasks]


@pytest.fixture(scope="module")
def verifier():
    verifier = Verifier(workers=2, deadline_s=DEADLINE_S, memory_bytes=512 << 20)
    yield verifier
    verifier.close()


def test_none_is_right_and_all_are_answered_in_bounded_time(verifier: Verifier) -> None:
    started = time.monotonic()
    results = verifier.verify(hostile_requests())
    took = time.monotonic() - started
    assert [
        request.text[:50] for request, o in zip(hostile_requests(), results, strict=True) if o.verdict is Verdict.RIGHT
    ] == []
    hung = sum(result.reason.startswith("took longer") for result in results)
    assert took < 30 + hung * (DEADLINE_S + 1)
    good = verifier.verify(
        [
            VerificationRequest(TextTask("number"), "12", "12"),
            VerificationRequest(TextTask("math"), "2^{1/2}", "\\sqrt{2}"),
        ]
    )
    assert [result.verdict for result in good] == [Verdict.RIGHT, Verdict.RIGHT]


def test_none_is_right_as_a_response_to_a_task(verifier: Verifier) -> None:
    task = build_task(DataConfig(), 0)
    results = verifier.verify([VerificationRequest(task, text, "12") for text in HOSTILE.values()])
    assert Verdict.RIGHT not in {result.verdict for result in results}


def test_from_a_thread(verifier: Verifier) -> None:
    """Signals, which math_verify would use, work in the main thread only."""
    found: list[Verdict] = []
    hostile = [
        VerificationRequest(TextTask("math"), HOSTILE[name], "\\sqrt{2}")
        for name in ("a tower of powers", "nested fractions")
    ]
    good = VerificationRequest(TextTask("math"), "\\frac{2}{\\sqrt{2}}", "\\sqrt{2}")
    thread = threading.Thread(target=lambda: found.extend(o.verdict for o in verifier.verify([*hostile, good])))
    thread.start()
    thread.join(60)
    assert found[-1] is Verdict.RIGHT
    assert Verdict.RIGHT not in found[:-1]
    assert len(found) == 3


def test_in_a_ray_actor(ray_here: None) -> None:
    import ray

    tests = str(Path(__file__).parents[2] / "support")
    texts = list(HOSTILE.values())

    class Actor:
        def verify(self) -> list[str]:
            sys.path.insert(0, tests)
            from readers import TextTask

            from aft_ray.verify.process_pool import VerificationRequest, Verifier

            verifier = Verifier(workers=2, deadline_s=1.5)
            task = TextTask("math")
            results = verifier.verify([VerificationRequest(task, text, "\\sqrt{2}") for text in [*texts, "2^{1/2}"]])
            verifier.close()
            return [result.verdict.value for result in results]

    verdicts = ray.get(ray.remote(Actor).remote().verify.remote(), timeout=240)
    assert verdicts[-1] == "right"
    assert "right" not in verdicts[:-1]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_option_is_found(name: str) -> None:
    assert extract_option(HOSTILE[name][:100_000]) is None
