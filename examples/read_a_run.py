"""What a run directory holds: its rounds, read with the public API.

python examples/read_a_run.py runs/gsm8k_smoke
"""

from __future__ import annotations

import sys

from aft_ray import Ledger, RunDir, Verdict, read_config


def main(path: str) -> None:
    run_dir = RunDir(path)
    config = read_config(run_dir)
    ledger = Ledger(run_dir)
    trained = ledger.trained_rounds()
    print(f"{config.model.name}: rounds {trained} are trained, {config.rounds.count} is the last")
    for number in range(1, config.rounds.count + 1):
        groups = ledger.read_groups(number)
        verdicts = [candidate.verdict for group in groups for candidate in group.candidates]
        if verdicts:
            share = verdicts.count(Verdict.RIGHT) / len(verdicts)
            print(f"round {number}: {len(groups)} groups, {len(verdicts)} candidates, {share:.0%} right")
    if trained:
        print(f"the newest model: {run_dir.uri(run_dir.model(trained[-1]))}")


if __name__ == "__main__":
    main(sys.argv[1])
