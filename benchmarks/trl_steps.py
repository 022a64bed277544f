"""Takes optimiser steps with TRL on one thread. `training.py` starts it in an environment that has TRL.

It imports nothing of aft_ray. It reads one line from stdin before each step, and writes one line of JSON after each:

    {"ready": {...}}                            once, when everything is loaded
    {"loss": ..., "cpu_s": ..., "wall_s": ...}  after each step: from the collation of the batch to the changed weights

Settings are those of a user who wants comparable steps: float32, the whole batch in one pass, no gradient accumulation,
nothing logged or saved, the optimizer of both sides, batches of pre-tokenised rows in the given order. Activations are
recomputed, which is TRL's default, or kept. SFT trains on completions alone. DPO holds policy and reference model.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch


def main(trainer: str, activations: str, model: str, batch: str, rate: str, output: str) -> None:
    """Takes steps until stdin ends.

    Args:
        trainer: "sft" or "dpo".
        activations: "recomputed" or "kept".
        model: the directory of the model.
        batch: a JSON file of the rows: {"prompt": [...], "responses": [[...], ...]} each, in token ids. SFT trains on
            response 0. DPO prefers response 1 to response 2.
        rate: the learning rate.
        output: a directory that the trainer may write to.
    """
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # libraries print to stdout
    os.dup2(2, 1)
    rows = json.loads(Path(batch).read_text())
    common = _common(len(rows), activations == "recomputed", float(rate), output)
    built = _sft(model, rows, common) if trainer == "sft" else _dpo(model, rows, common)
    clock = _steps_on_demand(built, answers)
    built.add_callback(clock)
    built.train()


def _common(rows: int, recompute: bool, rate: float, output: str) -> dict[str, Any]:
    return {
        "output_dir": output,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": recompute,
        "bf16": False,
        "use_cpu": True,
        "max_steps": 1_000_000,
        "max_length": None,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }


def _sft(model: str, rows: list[dict[str, Any]], common: dict[str, Any]) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list(
        [
            {
                "input_ids": row["prompt"] + row["responses"][0],
                "completion_mask": [0] * len(row["prompt"]) + [1] * len(row["responses"][0]),
            }
            for row in rows
        ]
    )
    config = SFTConfig(**common, completion_only_loss=True)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return SFTTrainer(loaded, args=config, train_dataset=data, processing_class=_tokenizer(loaded.config))


def _dpo(model: str, rows: list[dict[str, Any]], common: dict[str, Any]) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    # DPOTrainer tokenises text itself. A token is written as its number; the last one is the end of sequence.
    def text(ids: list[int]) -> str:
        return "".join(f" {token}" for token in ids)

    data = Dataset.from_list(
        [
            {
                "prompt": text(row["prompt"]),
                "chosen": text(row["responses"][1][:-1]) + " <eos>",
                "rejected": text(row["responses"][2][:-1]) + " <eos>",
            }
            for row in rows
        ]
    )
    policy, reference = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2))
    config = DPOConfig(**common, beta=0.1)
    trainer = DPOTrainer(policy, reference, args=config, train_dataset=data, processing_class=_tokenizer(policy.config))
    for row, tokenised in zip(rows, trainer.train_dataset, strict=True):
        found = [tokenised["prompt_ids"], tokenised["chosen_ids"], tokenised["rejected_ids"]]
        if found != [row["prompt"], *row["responses"][1:3]]:
            raise SystemExit("TRL has tokenised the batch into other tokens than the benchmark's")
    return trainer


def _tokenizer(config: Any) -> Any:
    """A tokenizer whose tokens are numbers, separated by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(config.vocab_size)}
    del words[str(config.eos_token_id)], words[str(config.pad_token_id)]
    words |= {"<eos>": config.eos_token_id, "<pad>": config.pad_token_id}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def _steps_on_demand(trainer: Any, answers: Any) -> Any:
    """A callback that waits for a line of stdin before each step and writes a line after it."""
    from transformers import TrainerCallback

    losses: list[torch.Tensor] = []
    inner = trainer.compute_loss

    def compute_loss(*arguments: Any, **options: Any) -> Any:
        result = inner(*arguments, **options)
        losses.append((result[0] if isinstance(result, tuple) else result).detach())
        return result

    trainer.compute_loss = compute_loss

    class Clock(TrainerCallback):  # type: ignore[misc]
        """The time between two lines: the loader collates the next batch in it."""

        def wait(self) -> None:
            if not sys.stdin.readline():
                os._exit(0)
            self.cpu, self.wall = time.process_time(), time.perf_counter()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            answers.write(json.dumps({"ready": {"pid": os.getpid()}}) + "\n")
            self.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
            answers.write(json.dumps({"loss": float(losses[-1]), "cpu_s": cpu, "wall_s": wall}) + "\n")
            self.wait()

    return Clock()


if __name__ == "__main__":
    main(*sys.argv[1:])
