"""A real engine has the scores and greedy responses of transformers and the trainer, also after a weight update."""

import shutil
import threading

import pytest
import torch
from tiny import LENGTH
from transformers import AutoModelForCausalLM

from aft_ray.inference.engine import Engine, EngineDead
from aft_ray.inference.engine_spec import EngineSpec
from aft_ray.inference.request_parameters import Prompt, SamplingSpec
from aft_ray.storage.records import Candidate
from aft_ray.training.forward.packing import pack
from aft_ray.training.forward.scoring import install_scoring, response_logprobs
from aft_ray.training.model.loading import load_model
from aft_ray.weights.receive_plan import FromDirectory
from jobs.tiny_model import build_tiny_model

EOS = 1
PROMPT = [7, 8, 9, 10, 11, 12]
FREE = SamplingSpec(k=4, temperature=1.0, top_p=1.0, max_tokens=20)
GREEDY = SamplingSpec(k=1, temperature=0.0, top_p=1.0, max_tokens=12)
DEADLINE = 120


def start(directory) -> Engine:
    return Engine(EngineSpec(str(directory), (EOS,), "float32", LENGTH, 32, gpu=False, kv_cache_gib=0.25))


def sharpened(directory, source):
    """A copy of a model whose scores vary from token to token, and some of whose responses end by themselves."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    shutil.copytree(source, directory)
    model.save_pretrained(directory)
    return directory


def loaded(directory):
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


def score(model, prompt, response) -> float:
    """Mean token log-probability of a response, computed with transformers."""
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(response)) / len(response)


def greedy(model, prompt, most) -> list[int]:
    with torch.no_grad():
        tokens = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=most, eos_token_id=EOS, pad_token_id=0
        )
    return tokens[0, len(prompt) :].tolist()


def load(engine, directory) -> None:
    """Loads new weights from a model directory into an engine."""
    files = tuple(path.name for path in sorted(directory.glob("*.safetensors")))
    engine.update_weights(FromDirectory(str(directory), files).calls(DEADLINE), lambda phase: None).result(DEADLINE)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_model, untied_model):
    """For each kind: a model directory, and one with other weights."""
    scratch = tmp_path_factory.mktemp("sharp")
    later = {
        "tied": build_tiny_model(scratch / "tied-raw", 11, 64, 2, 2, True, LENGTH),
        "untied": build_tiny_model(scratch / "untied-raw", 12, 64, 2, 2, False, LENGTH),
    }
    return {
        kind: (sharpened(scratch / f"{kind}-1", before), sharpened(scratch / f"{kind}-2", later[kind]))
        for kind, before in (("tied", tiny_model), ("untied", untied_model))
    }


@pytest.fixture(scope="module")
def reference(models):
    return loaded(models["tied"][0])


@pytest.fixture(scope="module")
def engine(models):
    engine = start(models["tied"][0])
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def candidates(engine) -> list[Candidate]:
    """So many responses to one prompt that some of them end by themselves."""
    how = SamplingSpec(k=48, temperature=1.0, top_p=1.0, max_tokens=60)
    return engine.sample(Prompt(PROMPT, 5), how).result(DEADLINE)


def test_candidates_are_k_and_end_with_the_end_token_when_they_stop(candidates):
    assert len(candidates) == 48
    assert {candidate.finish_reason for candidate in candidates} == {"stop", "length"}
    for candidate in candidates:
        stopped = candidate.finish_reason == "stop"
        assert (candidate.token_ids[-1] == EOS) is stopped
        assert EOS not in candidate.token_ids[:-1]
        assert stopped or len(candidate.token_ids) == 60


def test_scores_are_those_of_transformers(candidates, reference):
    for candidate in candidates:
        assert candidate.score == pytest.approx(score(reference, PROMPT, candidate.token_ids), abs=1e-5)


def test_scores_are_those_of_the_trainer(candidates, models):
    trained = load_model(models["tied"][0], "float32")
    install_scoring(trained)
    row = pack([PROMPT], [[candidate.token_ids for candidate in candidates[:7]]])
    with torch.no_grad():
        scores = response_logprobs(trained, row) / row.lengths
    assert scores.tolist() == pytest.approx([candidate.score for candidate in candidates[:7]], abs=1e-5)


def test_a_given_response_scores_as_it_did_when_it_was_sampled(engine, candidates):
    futures = [engine.score(PROMPT, candidate.token_ids) for candidate in candidates[:8]]
    assert [f.result(DEADLINE) for f in futures] == pytest.approx([c.score for c in candidates[:8]], abs=1e-5)


def test_scores_do_not_depend_on_temperature_and_top_p(engine, reference):
    for candidate in engine.sample(Prompt(PROMPT, 3), SamplingSpec(3, 0.5, 0.8, 20)).result(DEADLINE):
        assert candidate.score == pytest.approx(score(reference, PROMPT, candidate.token_ids), abs=1e-5)


def test_a_seed_gives_the_same_candidates_whatever_else_is_in_flight(engine):
    alone = [c.token_ids for c in engine.sample(Prompt(PROMPT, 5), FREE).result(DEADLINE)]
    others = [engine.sample(Prompt([*PROMPT[:4], 20 + i], i), FREE) for i in range(6)]
    among = engine.sample(Prompt(PROMPT, 5), FREE)
    others += [engine.sample(Prompt([20 + i] * 30, i), FREE) for i in range(6)]
    assert [c.token_ids for c in among.result(DEADLINE)] == alone
    assert [c.token_ids for c in engine.sample(Prompt(PROMPT, 6), FREE).result(DEADLINE)] != alone
    assert len({tuple(tokens) for tokens in alone}) == 4
    assert all(len(other.result(DEADLINE)) == 4 for other in others)


def test_greedy_responses_are_those_of_transformers(engine, reference):
    for first in (7, 20, 33):
        prompt = [first, *PROMPT]
        (candidate,) = engine.sample(Prompt(prompt, 1), GREEDY).result(DEADLINE)
        assert candidate.token_ids == greedy(reference, prompt, 12)


def test_a_response_ends_where_the_context_ends(engine):
    prompt = [5] * (LENGTH - 3)
    for candidate in engine.sample(Prompt(prompt, 1), FREE).result(DEADLINE):
        assert len(candidate.token_ids) <= 3


def test_a_prompt_without_room_for_a_response_is_refused_and_the_engine_lives_on(engine):
    with pytest.raises(ValueError, match=f"{LENGTH} tokens as a prompt, which leaves no room"):
        engine.sample(Prompt([5] * LENGTH, 1), FREE).result(DEADLINE)
    with pytest.raises(ValueError, match=r"length|tokens"):
        engine.score([5] * LENGTH, [6]).result(DEADLINE)
    assert engine.alive()
    assert len(engine.sample(Prompt(PROMPT, 1), FREE).result(DEADLINE)) == 4


def test_a_cancelled_request_does_not_harm_the_engine(engine):
    futures = [engine.sample(Prompt(PROMPT, i), FREE) for i in range(8)]
    for future in futures[::2]:
        future.cancel()
    assert all(len(future.result(DEADLINE)) == 4 for future in futures[1::2])
    assert engine.alive()
    assert len(engine.sample(Prompt(PROMPT, 1), FREE).result(DEADLINE)) == 4


@pytest.fixture(scope="module")
def untied_engine(models):
    engine = start(models["untied"][0])
    yield engine
    engine.close()


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_after_an_update_the_engine_is_the_new_model_and_nothing_of_the_old(kind, models, request):
    engine = request.getfixturevalue("engine" if kind == "tied" else "untied_engine")
    for directory in (models[kind][1], models[kind][0], models[kind][1]):
        model = loaded(directory)
        load(engine, directory)
        (answer,) = engine.sample(Prompt(PROMPT, 1), GREEDY).result(DEADLINE)
        assert answer.token_ids == greedy(model, PROMPT, 12)
        for candidate in engine.sample(Prompt(PROMPT, 5), FREE).result(DEADLINE):
            assert candidate.score == pytest.approx(score(model, PROMPT, candidate.token_ids), abs=1e-5)
        # The prefix cache holds this long prompt as the previous model computed it.
        long = PROMPT * 10
        assert engine.score(long, [9, 10, 1]).result(DEADLINE) == pytest.approx(
            score(model, long, [9, 10, 1]), abs=1e-5
        )


def test_every_request_is_answered_wholly_by_one_set_of_weights(untied_engine, models):
    """Requests arrive while the weights change between two models; each answer must be of a single model."""
    before, after = map(loaded, models["untied"])
    futures, done = [], threading.Event()

    def send_requests() -> None:
        seed = 0
        while not done.is_set() and seed < 60:
            futures.append(untied_engine.sample(Prompt(PROMPT, seed), FREE))
            seed += 1
            done.wait(0.02)

    sending = threading.Thread(target=send_requests)
    sending.start()
    try:
        for directory in (models["untied"][0], models["untied"][1], models["untied"][0]):
            load(untied_engine, directory)
    finally:
        done.set()
        sending.join()
    assert len(futures) > 3
    for future in futures:
        answers = future.result(DEADLINE)
        assert any(
            all(c.score == pytest.approx(score(model, PROMPT, c.token_ids), abs=1e-5) for c in answers)
            for model in (before, after)
        )
    (answer,) = untied_engine.sample(Prompt(PROMPT, 1), GREEDY).result(DEADLINE)
    assert answer.token_ids == greedy(before, PROMPT, 12)


def test_requests_to_a_closed_engine_fail_at_once(models):
    engine = start(models["untied"][0])
    answer = engine.sample(Prompt(PROMPT, 1), FREE)
    engine.close()
    assert len(answer.result(0)) == 4
    with pytest.raises(EngineDead):
        engine.sample(Prompt(PROMPT, 1), FREE)


def test_a_missing_model_cannot_start(tmp_path):
    with pytest.raises(EngineDead, match="could not start"):
        start(tmp_path / "nothing")


# This test is the last: vLLM keeps the state of the unfinished reload in this process.
def test_a_file_that_is_no_safetensors_kills_the_engine_and_fails_every_waiting_request(models, tmp_path):
    engine = start(models["untied"][0])
    shutil.copy(next(models["untied"][1].glob("*.safetensors")), tmp_path / "1.safetensors")
    (tmp_path / "2.safetensors").write_bytes(b"no tensors " * 100)
    running = [engine.sample(Prompt(PROMPT, i), FREE) for i in range(3)]
    failure: list[BaseException] = []

    def update() -> None:
        try:
            load(engine, tmp_path)
        except EngineDead as error:
            failure.append(error)

    updating = threading.Thread(target=update)
    updating.start()
    waiting = []
    try:
        while updating.is_alive() and len(waiting) < 2000:
            waiting.append(engine.sample(Prompt(PROMPT, 1), FREE))
    except EngineDead:
        pass
    updating.join(DEADLINE)
    assert len(failure) == 1
    assert not engine.alive()
    assert all(len(future.result(DEADLINE)) == 4 for future in running)
    for future in waiting:  # each was answered before the update, or fails
        try:
            assert len(future.result(10)) == 4
        except EngineDead:
            continue
    with pytest.raises(EngineDead):
        engine.sample(Prompt(PROMPT, 1), FREE)
    with pytest.raises(EngineDead):
        engine.score(PROMPT, [1])
    engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")
def test_an_engine_on_a_gpu_scores_as_transformers_does_before_and_after_a_weight_update(models):
    before, after = models["untied"]
    spec = EngineSpec(str(before), (EOS,), "bfloat16", LENGTH, 32, gpu=True, gpu_memory_utilization=0.3)
    engine = Engine(spec)
    for directory in (before, after):
        load(engine, directory)
        (candidate,) = engine.sample(Prompt(PROMPT, 5), GREEDY).result(DEADLINE)
        expected = score(loaded(directory), PROMPT, candidate.token_ids)
        assert candidate.score == pytest.approx(expected, abs=0.05)  # bfloat16 against float32, nats per token
    engine.close()
