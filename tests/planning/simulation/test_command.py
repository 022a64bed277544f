"""`aft-ray simulate`: what it prints, writes and refuses."""

import json
from pathlib import Path

import pytest

from aft_ray import cli

DEMO = str(Path(__file__).parents[3] / "jobs/configs/arithmetic_demo.yaml")
SMALL = ["data.arithmetic.train_size=60", "rounds.evaluate_every=0", "rounds.questions_per_round=null"]


def aft_ray(capsys, *arguments: str) -> tuple[int, str, str]:
    status = 0
    try:
        cli.main(["simulate", DEMO, *SMALL, *arguments])
    except SystemExit as end:
        status = int(end.code)
    out, err = capsys.readouterr()
    return status, out, err


def test_it_shows_each_round_and_draws_the_timeline(capsys, tmp_path):
    plot, figures = tmp_path / "timeline.png", tmp_path / "figures.json"
    status, out, _ = aft_ray(capsys, "--rounds", "2", "--plot", str(plot), "--json", str(figures))
    assert status == 0
    assert "2 rounds in" in out
    assert "wait" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    read = json.loads(figures.read_text())
    assert [one["round"] for one in read["simulated"]["run"]["trained"]] == [1, 2]
    assert read["assumed"]["step_ms"] == 14


def test_it_compares_staleness_and_any_other_key(capsys, tmp_path):
    status, out, _ = aft_ray(capsys, "--staleness", "0,1", "--rounds", "3")
    assert status == 0
    assert "rounds.max_staleness=0" in out
    assert "rounds.max_staleness=1" in out
    figures = tmp_path / "figures.json"
    comparison = ["--compare", "sampling.samplers=1,2", "--json", str(figures)]
    assert aft_ray(capsys, *comparison, "--assume", "response_tokens=40")[0] == 0
    one, two = json.loads(figures.read_text())["simulated"].values()
    assert two["gpus"] == one["gpus"] + 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--assume", "step_mss=3"], "unknown key step_mss; did you mean step_ms?"),
        (["--assume", "step_ms=-1"], "step_ms=-1: input should be greater than 0"),
        (["--compare", "rounds.count"], "is not of the form KEY=VALUE,VALUE"),
        (["--json", "/no/such/x.json"], "cannot write /no/such/x.json: the directory /no/such does not exist"),
        (["--plot", "/tmp/x.xyz", "--rounds", "1"], "cannot draw /tmp/x.xyz: Format 'xyz' is not supported"),
        (["--staleness", "0", "--compare", "rounds.count=1"], "ask for one at a time"),
        (["--like", "/no/such/run"], "/no/such/run is not a run directory"),
        (["objective.name=vft", "objective.beta=null"], "nothing to schedule"),
    ],
)
def test_it_refuses_in_one_sentence(capsys, arguments, sentence):
    status, _, err = aft_ray(capsys, *arguments)
    assert status == 2
    assert sentence in err
    assert err.count("\n") == 1
