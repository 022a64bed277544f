"""The imports of the fork server, which every verification process starts with.

Invariant: the first answer that a process compares takes no longer than any other. So the modules that tasks import
are imported here, and the parser of LaTeX, which builds its tables when it is first used, is used here once. Otherwise
this time would count against the deadline of the first answer.
"""

from __future__ import annotations

import aft_ray.config.run
import aft_ray.verify.answers.options
import aft_ray.verify.process_pool  # noqa: F401
from aft_ray.verify.answers.compare import compare

for _answer, _gold in (("\\frac{x^2}{3}+\\sqrt{2}", "\\frac{1}{2}x"), ("2^{1/2}", "\\sqrt{2}"), ("(1,2]", "[1,2]")):
    compare("math", _answer, _gold)
