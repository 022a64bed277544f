"""The fake judge endpoint of the tests of feedback and of the judge."""

import pytest
from judge_server import judge_server


@pytest.fixture
def server():
    """An endpoint that rates everything 5 unless a test sets other answers."""
    with judge_server() as server:
        yield server
