"""The contract: what every engine does, the one in this process and the one behind a server."""

import pytest
import torch
from conftest import close, tiny_model
from fake_server import FakeServer

from rlhf.data import Collator, encode_prompt
from rlhf.logprobs import model_scores
from rlhf.rollouts import LocalEngine, Sampling, ServerEngine

PROMPTS = [[5, 6, 7], [9], [40, 50, 60, 70, 80]]


@pytest.fixture(params=["local", "model.generate", "server"])
def engine(request, tokenizer, tmp_path):
    model = tiny_model("stablelm" if request.param == "model.generate" else "llama")
    if request.param != "server":
        yield LocalEngine(model, tokenizer)
        return
    server = FakeServer(model, tokenizer)
    engine = ServerEngine(server.url, "tiny", weights_dir=tmp_path)
    engine.behind = server.engine
    yield engine
    engine.close()
    server.shutdown()


def local(engine):
    """The engine that samples in the end."""
    return getattr(engine, "behind", engine)


def flat(groups):
    return [completion for group in groups for completion in group]


def trainer_logps(model, prompt, ids, temperature):
    """The trainer's forward: one padded row, every token of the completion scored."""
    batch = Collator()([{"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids}])
    if temperature == 1:
        return model_scores(model, batch.targets, **batch.inputs()).logps
    logits = model(**batch.inputs()).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)


def test_shape_and_version(engine):
    groups = engine.generate(PROMPTS, 3, Sampling(max_tokens=4), 0)
    assert [len(group) for group in groups] == [3, 3, 3]
    assert {one.version for one in flat(groups)} == {engine.version}
    assert all(len(one.ids) == len(one.logps) for one in flat(groups))
    assert engine.generate([], 3, Sampling(), 0) == []


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_trainers_forward(engine, temperature):
    groups = engine.generate(PROMPTS, 2, Sampling(max_tokens=9, temperature=temperature), 1)
    model = local(engine).model.eval()
    with torch.no_grad():
        for prompt, group in zip(PROMPTS, groups, strict=True):
            for one in group:
                close(one.logps, trainer_logps(model, prompt, one.ids, temperature))


def test_the_seed_decides(engine):
    sampling = Sampling(max_tokens=6, temperature=2.0)
    first, again, other = (engine.generate(PROMPTS, 2, sampling, seed) for seed in (3, 3, 4))
    assert [one.ids for one in flat(first)] == [one.ids for one in flat(again)]
    assert [one.ids for one in flat(first)] != [one.ids for one in flat(other)]
    assert first[0][0].ids != first[0][1].ids  # nor are the samples of a group alike


def test_a_part_of_a_request_is_answered_as_in_the_whole(engine):
    sampling = Sampling(max_tokens=5)
    whole = engine.generate(PROMPTS, 2, sampling, 3)
    part = engine.generate([PROMPTS[1]], 2, sampling, 3, [1])
    assert [one.ids for one in part[0]] == [one.ids for one in whole[1]]


def test_an_update_changes_the_output_and_the_version(engine):
    sampling = Sampling(max_tokens=6, temperature=0)
    before = engine.generate(PROMPTS, 1, sampling, 0)
    new = tiny_model(local(engine).model.config.model_type, seed=7)
    engine.update_weights(((k, v) for k, v in new.state_dict().items()), version=5)
    after = engine.generate(PROMPTS, 1, sampling, 0)
    assert [one.ids for one in flat(before)] != [one.ids for one in flat(after)]
    assert {one.version for one in flat(after)} == {5} == {engine.version}
    want = LocalEngine(new, local(engine).tokenizer).generate(PROMPTS, 1, sampling, 0)
    assert [one.ids for one in flat(want)] == [one.ids for one in flat(after)]


def test_finish_reasons_and_lengths(engine):
    whole = engine.generate([PROMPTS[2]], 1, Sampling(max_tokens=8), 0)[0][0].ids
    at = max(whole.index(i) for i in whole)
    local(engine).end_ids = [whole[at]]  # the last token that is new ends a completion from now on
    assert at > 0
    stopped, cut, exact, longer = (
        engine.generate([PROMPTS[2]], 1, Sampling(**options), 0)[0][0]
        for options in (
            dict(max_tokens=8),
            dict(max_tokens=at),
            dict(max_tokens=at + 1),
            dict(max_tokens=8, min_tokens=8),
        )
    )
    assert (stopped.ids, stopped.finish_reason) == (whole[: at + 1], "stop")  # the end token is part of it
    assert (cut.ids, cut.finish_reason) == (whole[:at], "length")
    assert (exact.ids, exact.finish_reason) == (whole[: at + 1], "stop")
    assert len(longer.ids) == 8 and whole[at] not in longer.ids and longer.finish_reason == "length"


def test_stop_strings(engine, tokenizer):
    sampling = dict(max_tokens=12)
    whole = engine.generate([PROMPTS[0]], 1, Sampling(**sampling), 0)[0][0]
    texts = [tokenizer.decode(whole.ids[: k + 1]) for k in range(len(whole.ids))]
    stop = texts[5][-3:]
    first = next(k for k, text in enumerate(texts) if stop in text)
    one = engine.generate([PROMPTS[0]], 1, Sampling(**sampling, stop=("never said", stop)), 0)[0][0]
    assert (one.ids, one.finish_reason) == (whole.ids[: first + 1], "stop")


def test_a_chat_prompt(engine, tokenizer):
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "the cat"}])
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>user") and text.endswith("<|im_start|>assistant\n")
    assert len(engine.generate([ids], 1, Sampling(max_tokens=3, min_tokens=3), 0)[0][0].ids) == 3


@pytest.mark.parametrize(
    "prompts, n, seed, words",
    [
        ([[1], []], 1, 0, "prompt 1 is empty"),
        ([[1]], 0, 0, "n must be"),
        ([[1]], 1, -1, "seed must be"),
    ],
)
def test_bad_requests(engine, prompts, n, seed, words):
    with pytest.raises(ValueError, match=words):
        engine.generate(prompts, n, Sampling(), seed)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(temperature=-1), "temperature"),
        (dict(top_p=0), "top_p"),
        (dict(top_k=-1), "top_k"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(min_tokens=9, max_tokens=8), "min_tokens"),
        (dict(stop=("a", "")), "stop"),
    ],
)
def test_bad_sampling(options, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**options)


def test_sleep_and_wake(engine):
    engine.sleep()
    engine.wake()
    assert engine.generate(PROMPTS, 1, Sampling(max_tokens=2), 0)
