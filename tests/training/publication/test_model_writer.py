"""How long a worker waits for a model directory that is being written in the background."""

from concurrent.futures import Future

import pytest

from aft_ray.training.publication import model_writer
from aft_ray.training.publication.model_writer import ModelWriteFailed, Writing


def test_a_directory_that_takes_too_long_is_named_after_a_line_in_the_log(monkeypatch, capfd):
    monkeypatch.setattr(model_writer, "_QUIET_S", 0.05)
    sentence = r"the model directory of version 3 was not written in training.timeout_s=0 s"
    with pytest.raises(ModelWriteFailed, match=sentence):
        Writing(3, 0.1, Future()).wait()
    assert capfd.readouterr().err == "waits until the model directory of version 3 is written\n"


def test_what_ended_is_told_at_once(capfd):
    written, failed = Future(), Future()
    written.set_result(2.5)
    assert Writing(3, 60, written).wait() == 2.5
    failed.set_exception(RuntimeError("another rank ended"))
    with pytest.raises(RuntimeError, match="another rank ended"):
        Writing(3, 60, failed).wait()
    assert capfd.readouterr().err == ""
