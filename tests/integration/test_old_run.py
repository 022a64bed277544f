"""A run that version 0.1 began, killed while it sampled round 2, is finished by this version."""

from io import StringIO

import pytest
from old_run import unpack_old_run
from rich.console import Console

from aft_ray.observe.reporter import Reporter
from aft_ray.observe.summary import read_events
from aft_ray.run.launch import run
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import RunDir
from aft_ray.storage.versions import read_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(900)]


@pytest.fixture
def old_run(tmp_path) -> RunDir:
    return unpack_old_run(tmp_path)


def test_a_run_of_the_version_before_is_continued(old_run):
    before = Ledger(old_run)
    assert before.trained_rounds() == [0, 1]
    # The driver was killed between writing this file and recording it.
    (kept,) = old_run.listdir(old_run.groups(2))
    assert before.count_groups(2) == 0
    with Reporter(old_run, Console(file=StringIO())) as reporter:
        assert run(read_config(old_run), reporter) is True
    ledger = Ledger(old_run)
    assert ledger.trained_rounds() == [0, 1, 2]
    (adopted,) = [file for file in ledger.group_files(2) if file.path.endswith(kept)]
    assert 0 < len(adopted.question_ids) < 24
    assert old_run.verify_manifest(old_run.model(2)) == []
    groups = ledger.read_groups(2)
    assert len({group.question.id for group in groups}) == len(groups) == 24
    (trained,) = [event for event in read_events(old_run) if event["event"] == "trained" and event["round"] == 2]
    assert trained["steps"] == 3
    with Reporter(old_run, Console(file=StringIO())) as reporter:
        assert run(read_config(old_run), reporter) is False
