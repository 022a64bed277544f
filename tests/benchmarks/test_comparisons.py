"""The comparisons of objectives, small: every part runs, and a second start does nothing twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# Few enough for a test; the numbers mean nothing.
PROGRAM = """
import sys
sys.path.insert(0, {benchmarks!r})
import compare_beta, compare_objectives, laboratory
small = laboratory.Settings(
    train_size=64, vft_epochs=1, groups=16, groups_per_step=8, greedy_questions=6, sampled_questions=3, evaluation_k=2
)
compare_objectives.QUICK = compare_beta.QUICK = small
from pathlib import Path
if __name__ == "__main__":
    names = ["vft", "align", "aft_boundary", "dpo"]
    compare_objectives.main(3, ["binary", "steps"], names, 1, True, Path(sys.argv[1]))
    compare_beta.main(3, "binary", [0.0, 0.15], 1, True, Path(sys.argv[1]))
"""


def compare(place: Path) -> str:
    program = place / "compare.py"
    program.write_text(PROGRAM.format(benchmarks=str(BENCHMARKS)))
    done = subprocess.run([sys.executable, str(program), str(place / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_comparison_and_its_second_start(tmp_path):
    printed = compare(tmp_path)
    (place,) = (tmp_path / "out").iterdir()
    records = {path: path.read_text() for kind in ("binary", "steps") for path in place.glob(f"seed0/{kind}/*.json")}
    found = {str(path.relative_to(place / "seed0")) for path in records}
    rules = ("0.0", "spread", "gap", "hold", "balance", "extent")
    assert found == {
        "binary/start.json", "binary/vft.json",
        *(f"{kind}/{name}.json" for kind in ("binary", "steps") for name in ("align", "aft_boundary", "dpo")),
        *(f"binary/aft_boundary_beta={value}.json" for value in rules),
    }  # fmt: skip
    for path, text in records.items():
        record = json.loads(text)
        assert len(record["greedy_right"]) == 6, path
        assert [len(samples) for samples in record["samples"]] == [2, 2, 2]
        assert record["training"].get("steps", 2) == 2
        assert path.parent.name == record["feedback"]
    for row in ("`vft`", "`align`", "AFT (`align` → `aft_boundary`)", "`dpo`", "`balance`", "Feedback: steps"):
        assert row in printed
    assert {"tables.md", "beta.md", "overview.svg", "scores.png", "beta.svg"} <= {path.name for path in place.iterdir()}

    models = {path: path.stat().st_mtime_ns for path in place.glob("seed*/vft-model/*")}
    compare(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in models} == models
    assert all(path.read_text() == text for path, text in records.items())
