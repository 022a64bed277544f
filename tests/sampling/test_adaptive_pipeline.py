"""Adaptive sampling with a real engine through the real pipeline: more candidates only where they are needed."""

import json
from dataclasses import replace

import pytest
from tiny import tiny_config

from aft_ray.sampling.adaptive import needs_more, next_candidates
from aft_ray.sampling.sampler_pool import SamplerPool
from aft_ray.sampling.stream import sample_all, sample_round, sampling_spec
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.records import Verdict
from aft_ray.storage.run_dir import RunDir
from aft_ray.tasks.dataset import load_tokenizer, tokenize_split

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(900)]

K, QUESTIONS = 6, 24
MARKER = " "  # so the answer of a response is its last word


def run_config(place, model, golds=None, **sampling):
    """The config of a run on own questions, with these gold answers."""
    rows = [
        {
            "question": f"Tom has {n} apples. How many apples?",
            "answer": "He has 1 . # 1",
            "gold": gold,
            "id": f"q{n:02d}",
        }
        for n, gold in enumerate(golds or ["?"] * QUESTIONS)
    ]
    place.mkdir(parents=True)
    (place / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "validation.jsonl").write_text(json.dumps(rows[0]))
    columns = {"train": "train.jsonl", "validation": "validation.jsonl", "gold": "gold", "id": "id", "compare": "text"}
    data = {"task": "custom", "path": str(place), "train_limit": None, "answer_marker": MARKER, "custom": columns}
    return tiny_config(
        place / "run",
        model,
        data={**data, "prompt": "{question}"},
        sampling={"k": K, "max_tokens": 6, "groups_per_file": 7, "batch_size": 5, **sampling},
    )


def questions(config):
    return [replace(one, round=1) for one in tokenize_split(config, "train", load_tokenizer(config)).groups]


def sample(config, pool, groups):
    """Samples groups of round 1 into the ledger."""
    ledger = Ledger(RunDir(config.run_dir))
    ledger.open_round(1)
    for written in sample_round(config, pool, None, groups, ledger.run_dir):
        assert not written.failed
        assert ledger.commit(written.file)
    return {group.question.id: group for group in ledger.read_groups(1)}


@pytest.fixture(scope="module")
def pool(ray_here, tiny_model, tmp_path_factory):
    config = run_config(tmp_path_factory.mktemp("pool") / "p", tiny_model)
    pool = SamplerPool.start(config, config.model.name, (load_tokenizer(config).eos_token_id,), None, None)
    pool.wait_ready()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def golds(pool, tiny_model, tmp_path_factory):
    """Gold answers of which the model gives one with its first, second ... or last candidate, or never."""
    groups = sample(config := run_config(tmp_path_factory.mktemp("first") / "f", tiny_model), pool, questions(config))
    answers = [[one.answer for one in groups[f"q{n:02d}"].candidates] for n in range(QUESTIONS)]
    return [(of_one[n % 8] or "none") if n % 8 < K else "never" for n, of_one in enumerate(answers)]


@pytest.fixture(scope="module")
def uniform(pool, golds, tiny_model, tmp_path_factory):
    config = run_config(tmp_path_factory.mktemp("uniform") / "u", tiny_model, golds)
    return sample(config, pool, questions(config))


def adaptive_config(place, model, golds, **keys):
    return run_config(place, model, golds, adaptive={"initial_k": 2, "step": 2}, **keys)


@pytest.fixture(scope="module")
def adaptive(pool, golds, tiny_model, tmp_path_factory):
    config = adaptive_config(tmp_path_factory.mktemp("adaptive") / "a", tiny_model, golds)
    return sample(config, pool, questions(config))


def test_a_question_has_more_candidates_only_where_they_are_needed(uniform, adaptive):
    assert adaptive.keys() == uniform.keys()
    sizes = set()
    for id, group in adaptive.items():
        whole, count = uniform[id].candidates, 2
        while needs_more(whole[:count]) and (more := next_candidates(count, K, 2)):
            count += more
        # The first candidates are those of uniform sampling, and so are their labels.
        assert group.candidates == whole[:count]
        assert group.has_signal == uniform[id].has_signal
        sizes.add(count)
    assert sizes == {2, 4, 6}
    assert all(one.verdict is not Verdict.UNDECIDED for group in adaptive.values() for one in group.candidates)


def test_the_groups_of_a_run_that_was_interrupted_are_the_same(pool, golds, adaptive, tiny_model, tmp_path):
    config = adaptive_config(tmp_path / "halves", tiny_model, golds, batch_size=3, groups_per_file=4)
    first, rest = questions(config)[::2], questions(config)[1::2]
    sample(config, pool, first)
    assert sample(config, pool, rest) == adaptive


def test_an_evaluation_gets_the_k_that_it_asks_for(pool, golds, tiny_model, tmp_path):
    config = adaptive_config(tmp_path / "evaluation", tiny_model, golds)
    spec = replace(sampling_spec(config.sampling), k=3)
    answered = list(sample_all(config, pool, None, questions(config)[:6], spec, "test"))
    assert [(len(group.candidates), reason) for group, reason in answered] == [(3, None)] * 6
