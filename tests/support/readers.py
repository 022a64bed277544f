"""Tasks for tests of verification, among them ones that misbehave. The worker processes can import this module."""

import os
import signal
import sys
import time
from pathlib import Path

from aft_ray.verify.answers.compare import Kind, compare
from aft_ray.verify.result import VerificationResult

HEAVY = ("ray", "torch", "vllm", "transformers", "deepspeed")


class TextTask:
    """A task for which the whole text is the answer, which is compared as one kind."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def extract(self, text: str) -> str | None:
        return text

    def same(self, answer: str | None, gold: str) -> VerificationResult:
        return compare(self.kind, answer, gold)


class MisbehavingTask(TextTask):
    """A task that misbehaves when the text is the name of one of its methods. Any other text is a number."""

    def __init__(self) -> None:
        super().__init__("number")

    def extract(self, text: str) -> str | None:
        return getattr(self, text)() if hasattr(self, text) else text

    def loops(self) -> None:
        while True:
            pass

    def calculates(self) -> int:
        return 9 ** (9**9)  # One instruction, during which no Python signal handler runs.

    def sleeps_a_little(self) -> str:
        time.sleep(0.1)
        return "12"

    def dies(self) -> None:
        os._exit(3)

    def is_killed(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def exits(self) -> None:
        sys.exit(0)

    def raises(self) -> None:
        raise LookupError("no such thing")

    def recurses(self) -> str:
        return self.recurses()

    def eats_memory(self) -> list[bytearray]:
        return [bytearray(100 << 20) for _ in range(1000)]

    def gives_a_number(self) -> int:
        return 12


class ProcessTask(TextTask):
    """A task whose answer describes the process that it runs in. Any other text is a file to write its pid to."""

    def __init__(self) -> None:
        super().__init__("text")

    def extract(self, text: str) -> str | None:
        if text == "modules":
            return ",".join(name for name in HEAVY if name in sys.modules)
        if text == "pid":
            return str(os.getpid())
        Path(text).write_text(str(os.getpid()))
        while True:
            pass
