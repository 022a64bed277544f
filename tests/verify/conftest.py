import pytest
from judge_server import judge_server


@pytest.fixture
def server():
    """An endpoint that rates everything 5 until it is told otherwise."""
    with judge_server() as server:
        yield server
