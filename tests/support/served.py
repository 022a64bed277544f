"""The model that the tests of a running service share, and what the tests need to know of the service.

The model answers most problems but is often wrong, so that votes differ. Its answer to one question never ends, so that
tests can keep the service busy. It ends about half of the other answers with a second end token, which its generation
config names, and which its tokenizer would not leave out of a text by itself.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
# The kind of problems that the model is trained on.
SMALL = {"min_steps": 1, "max_steps": 2, "max_operand": 9, "max_value": 20, "operations": "+-", "distractors": 0}
# The question that the model is trained to answer without an end.
ENDLESS = "then then"
TURN_END = "<end_of_turn>"
LENGTH = 512


def train(directory: Path) -> Path:
    """Fine-tunes a tiny Llama on references for some 20 seconds of one core."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from aft_ray.config.run import ArithmeticConfig
    from aft_ray.tasks.arithmetic.problems import generate
    from jobs.tiny_model import build_tiny_model

    steps, batch, peak = 250, 32, 4e-3
    # With so small a model, several threads would only wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    build_tiny_model(directory, 0, hidden_size=96, layers=2, heads=3, max_length=LENGTH)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer.add_tokens([TURN_END])
    tokenizer.save_pretrained(directory)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)]
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.generation_config.eos_token_id = ends
    examples = [
        (tokenizer(question.text)["input_ids"], [*tokenizer(question.reference)["input_ids"], ends[number % 2]])
        for number, question in enumerate(generate(ArithmeticConfig(**SMALL, phrasings=1), "train", 1500))
    ]
    examples += [(tokenizer(ENDLESS)["input_ids"], tokenizer("then " * 40)["input_ids"])] * 40
    drawn = random.Random(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        some = drawn.sample(examples, batch)
        columns = max(len(prompt) + len(response) for prompt, response in some)
        inputs, labels = torch.zeros(batch, columns, dtype=torch.long), torch.full((batch, columns), -100)
        for row, (prompt, response) in enumerate(some):
            whole = len(prompt) + len(response)
            inputs[row, :whole] = torch.tensor(prompt + response)
            labels[row, len(prompt) : whole] = torch.tensor(response)
        optimiser.zero_grad()
        model(input_ids=inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    torch.set_num_threads(threads)
    model.save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Reasoner:
    """The running service.

    Attributes:
        session: Ray's session directory with its logs.
        problems: questions that the model was not trained on.
    """

    url: str
    model: str
    model_directory: Path
    key: str
    keys_file: Path
    concurrency: int
    queue: int
    session: Path
    said: str
    problems: tuple[str, ...]

    def client(self, **options) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, **options)

    def access_log(self) -> list[dict]:
        """Returns the lines of the access log so far."""
        lines = [line for file in self.session.glob("logs/worker*.out") for line in file.read_text().splitlines()]
        return [json.loads(line) for line in lines if line.startswith("{") and '"route"' in line]
