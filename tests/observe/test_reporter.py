"""What a reporter records: TensorBoard reads its scalars back, and recording them imports no torch."""

import json
import os
import subprocess
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aft_ray.observe.logs import driver_log_path, library_output_to
from aft_ray.observe.reporter import Reporter
from aft_ray.storage.run_dir import RunDir


def test_tensorboard_reads_back_tags_steps_and_values(tmp_path):
    run_dir = RunDir(str(tmp_path / "run"))
    with Reporter(run_dir) as reporter:
        reporter.event("step", global_step=7, round=1, loss=0.25, tokens=300)
        reporter.event("step", global_step=8, round=1, loss=-1.5, tokens=100)
        reporter.event("trained", round=1, complete=True, note="text is no scalar")
        reporter.event("started", version=3)  # without a step there is no scalar
    read = EventAccumulator(str(run_dir.local_path("tensorboard")))
    read.Reload()
    assert sorted(read.Tags()["scalars"]) == ["step/loss", "step/tokens", "trained/complete"]

    def scalars(tag):
        return [(scalar.step, scalar.value) for scalar in read.Scalars(tag)]

    assert scalars("step/loss") == [(7, 0.25), (8, -1.5)]
    assert scalars("step/tokens") == [(7, 300.0), (8, 100.0)]
    assert scalars("trained/complete") == [(1, 1.0)]
    lines = [json.loads(line) for line in run_dir.read_lines("metrics.jsonl")]
    assert [line["event"] for line in lines] == ["step", "step", "trained", "started"]
    assert all(abs(scalar.wall_time - lines[0]["time"]) < 60 for scalar in read.Scalars("step/loss"))


def test_a_reporter_imports_no_torch(tmp_path):
    code = (
        "import sys; from aft_ray.observe.reporter import Reporter; from aft_ray.storage.run_dir import RunDir\n"
        f"with Reporter(RunDir({str(tmp_path / 'run')!r})) as reporter: reporter.event('trained', round=1, loss=1.0)\n"
        "print('torch' in sys.modules, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))


def test_output_of_libraries_goes_to_the_log_and_the_console_stays_on_the_terminal(tmp_path, capfd):
    log = tmp_path / "run" / "logs" / "driver.log"
    assert driver_log_path(RunDir(str(tmp_path / "run"))) == log
    with library_output_to(log) as console:
        os.write(1, b"a library's line\n")
        subprocess.run(["sh", "-c", "echo from a child >&2"], check=True)
        console.print("our line")
    os.write(1, b"afterwards\n")
    assert log.read_text() == "a library's line\nfrom a child\n"
    assert capfd.readouterr().out == "our line\nafterwards\n"
