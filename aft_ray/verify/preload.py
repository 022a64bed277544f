"""What the fork server imports, so that every worker starts with it: imports, and the parser of LaTeX.

Invariant: the first answer that a worker compares takes no longer than any other. The parser builds its tables as it
is used; built in a new worker, under a deadline, they would make an innocent answer late.
"""

from __future__ import annotations

import aft_ray.tasks.base
import aft_ray.verify.process_pool  # noqa: F401
from aft_ray.verify.answers.compare import compare

for _answer, _gold in (("\\frac{x^2}{3}+\\sqrt{2}", "\\frac{1}{2}x"), ("2^{1/2}", "\\sqrt{2}"), ("(1,2]", "[1,2]")):
    compare("math", _answer, _gold)
