"""The judge with vLLM's own server: real replies, with and without guided decoding, and a kill during a batch."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import free_ports, wait_for

from aft_ray.config.run import JudgeConfig
from aft_ray.verify.judge.judge import Judge, JudgeFailed, RatingRequest

pytestmark = pytest.mark.timeout(900)
START_S = 600
LENGTH = 4096
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"


def build_byte_model(directory: Path) -> Path:
    """An untrained Llama that reads and writes bytes: it can be held to any form, and keeps to none of itself."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).float().save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Vllm:
    url: str
    root: str

    def answered(self) -> int:
        """Requests that vLLM worked off, those whose client went away not included."""
        with urllib.request.urlopen(f"{self.root}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        return sum(
            int(float(line.rsplit(" ", 1)[1]))
            for line in lines
            if line.startswith("vllm:request_success_total") and not re.search(r'finished_reason="abort"', line)
        )


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    place = tmp_path_factory.mktemp("vllm")
    model = build_byte_model(place / "model")
    (place / "chat.jinja").write_text(CHAT_TEMPLATE)
    (port,) = free_ports(1)
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_CI_ENV": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "TORCH_COMPILE_DISABLE": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "bytes", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--chat-template", str(place / "chat.jinja"), "--enforce-eager", "--max-num-seqs", "16"]
    # vLLM's CPU engine crashes when it splits the prompt of a request with a seed.
    command += ["--max-model-len", str(LENGTH), "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(LENGTH)]
    root = f"http://127.0.0.1:{port}"
    with open(place / "log", "w") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(lambda: healthy(root), START_S, "the server", server, place / "log")
        yield Vllm(f"{root}/v1", root)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def healthy(root: str) -> bool:
    try:
        with urllib.request.urlopen(f"{root}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def config(url: str, **settings) -> JudgeConfig:
    return JudgeConfig(**{"url": url, "guided": True, "max_tokens": 60, "ratings": 1, "timeout_s": 120, **settings})


def rating_requests(count: int) -> list[RatingRequest]:
    return [
        RatingRequest(
            f"q{index}", f"what is {index} + 2?", f"{index} + 2 = {index + 2}.", f"{index} + 2 = {index + 3}."
        )
        for index in range(count)
    ]


def test_with_guided_decoding_everything_is_rated(vllm, tmp_path):
    judge = Judge(config(vllm.url, ratings=2), tmp_path / "judge.sqlite")
    assert judge.check() == "bytes"
    ratings = judge.rate(rating_requests(4))
    assert all(1 <= rating.reward <= 10 and len(rating.evidence) == 2 for rating in ratings)
    assert any(len(set(rating.evidence)) == 2 for rating in ratings)  # a seed for each rating
    assert (judge.counts.calls, judge.counts.unparsable, judge.counts.refused) == (8, 0, 0)
    assert judge.counts.completion_tokens > 8 * len("Evaluation Evidence: \nRating: 1")
    assert judge.counts.prompt_tokens > 8 * 1000
    # the same seeds at the same endpoint give the same ratings
    assert Judge(config(vllm.url, ratings=2), tmp_path / "other.sqlite").rate(rating_requests(1)) == ratings[:1]


def test_a_judge_that_does_not_keep_the_form_gives_no_ratings(vllm, tmp_path):
    rambling = config(vllm.url, guided=False, ratings=2, max_tokens=20)
    judge = Judge(rambling, tmp_path / "judge.sqlite")
    assert [rating.reward for rating in judge.rate(rating_requests(1))] == [None]
    assert judge.counts.unparsable == 2
    with pytest.raises(JudgeFailed, match=r"have no rating, more than feedback.judge.max_unparsable=0.1"):
        judge.rate(rating_requests(4))


def test_a_candidate_longer_than_the_context_is_refused_and_the_others_are_rated(vllm, tmp_path):
    judge = Judge(config(vllm.url), tmp_path / "judge.sqlite")
    long = RatingRequest("long", "how many?", "12", "8 + 4 = 12. " * 1000)
    assert [rating.reward is None for rating in judge.rate([*rating_requests(1), long])] == [False, True]
    assert (judge.counts.refused, judge.counts.retries) == (1, 0)


def test_nothing_is_paid_twice_when_the_judging_process_is_killed(vllm, tmp_path):
    count, concurrency, cache = 120, 4, tmp_path / "judge.sqlite"
    code = (
        "import sys; sys.path[:0] = sys.argv[3:]\n"
        "from pathlib import Path\n"
        "from test_judge_vllm import config, rating_requests\n"
        "from aft_ray.verify.judge.judge import Judge\n"
        f"Judge(config(sys.argv[1], concurrency={concurrency}), Path(sys.argv[2])).rate(rating_requests({count}))\n"
    )
    before = vllm.answered()
    here = Path(__file__).parent
    judging = subprocess.Popen(
        [sys.executable, "-c", code, vllm.url, str(cache), str(here), str(here.parents[1] / "support")]
    )
    deadline = time.monotonic() + 150
    while kept(cache) < 30:
        assert judging.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    judging.send_signal(signal.SIGKILL)
    judging.wait()
    paid = kept(cache)
    assert paid < count
    judge = Judge(config(vllm.url, concurrency=concurrency), cache)
    assert all(rating.reward is not None for rating in judge.rate(rating_requests(count)))
    assert judge.counts.hits == paid
    assert judge.counts.calls == count - paid
    assert kept(cache) == count
    assert count <= vllm.answered() - before <= count + concurrency
    again = Judge(config(vllm.url), cache)
    again.rate(rating_requests(count))
    assert (again.counts.calls, again.counts.hits) == (0, count)


def kept(cache: Path) -> int:
    """Replies that are in the file now."""
    if not cache.exists():
        return 0
    connection = sqlite3.connect(cache, timeout=30)
    try:
        return connection.execute("SELECT COUNT(*) FROM replies").fetchone()[0]
    except sqlite3.OperationalError:  # the table is not there yet
        return 0
    finally:
        connection.close()
