"""Several rewards on a batch: sums, what is left out, and what a function does wrong, under both policies."""

import asyncio
import contextlib
import logging
import math
import re
import signal
import threading
import time

import numpy as np
import pytest
import torch
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.rewards import get_soft_overlong_punishment, think_format_reward

from rlhf.rewards import RewardError, RewardSet, numeric_answer, soft_overlong_punishment

PROMPTS = ["one", "two", "three", "four"]
COMPLETIONS = ["a", "bb", "ccc", "dddd"]
NAN = math.nan


def length(completions, **columns):
    return [len(c) for c in completions]


def nothing(completions, **columns):
    return [None] * len(completions)


def good_but(**by_text):
    """A function that scores each completion 1, but does something else for some."""

    def picky(completions, **columns):
        return [by_text[c]() if c in by_text else 1.0 for c in completions]

    return picky


def nansum(rows, weights):
    """The oracle: plain floats."""
    totals = []
    for row in rows:
        terms = [w * v for v, w in zip(row, weights, strict=True) if v is not None]
        counted = any(v is not None and w != 0 for v, w in zip(row, weights, strict=True))
        totals.append(math.fsum(terms) if counted else NAN)
    return totals


NUMBER = st.none() | st.floats(-100, 100, width=32)


@settings(deadline=None, max_examples=50)
@given(st.data(), st.integers(1, 5), st.integers(1, 3))
def test_the_sum_runs_over_what_applies(data, size, count):
    rows = data.draw(st.lists(st.lists(NUMBER, min_size=count, max_size=count), min_size=size, max_size=size))
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, -2.0]), min_size=count, max_size=count).filter(any))
    functions = [lambda completions, i=i, **_: [row[i] for row in rows] for i in range(count)]
    scored = RewardSet(functions, weights)(["p"] * size, ["c"] * size)
    want = nansum(rows, weights)
    torch.testing.assert_close(scored.rewards, torch.tensor(want), equal_nan=True, rtol=1e-5, atol=1e-5)
    assert scored.usable.tolist() == [not math.isnan(total) for total in want]
    each = torch.tensor([[NAN if v is None else v for v in row] for row in rows])
    torch.testing.assert_close(scored.reward_components, each, equal_nan=True, rtol=0, atol=0)


def test_shapes_names_and_an_empty_batch():
    rewards = RewardSet([length, length, numeric_answer()], [1, 0, 2])
    assert rewards.names == ["length", "length_2", "numeric_answer"]
    scored = rewards([], [], answer=[])
    assert scored.rewards.shape == scored.usable.shape == (0,) and scored.reward_components.shape == (0, 3)
    scored = rewards(PROMPTS, COMPLETIONS, answer=[None] * 4)
    assert (
        scored.reward_components.shape == (4, 3)
        and scored.rewards.dtype == torch.float32
        and scored.usable.dtype == torch.bool
    )
    close(scored.rewards, [1, 2, 3, 4])


def test_samples_to_which_no_reward_applies_are_named(caplog):
    scored = RewardSet([nothing, length], [1.0, 0.0])(PROMPTS, COMPLETIONS)
    assert not scored.usable.any() and scored.rewards.isnan().all()  # a weight of 0 makes no reward of 0
    said = "no reward applies to 4 of 4 samples, which are left out; the first: sample 1 of 4 (prompt 'one'"
    assert said in caplog.text
    assert scored.failed == {"nothing": 0, "length": 0}


def test_a_function_written_for_trl_works_unchanged():
    def trl(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
        contents = [completion[0]["content"] for completion in completions]
        log_extra("content", contents)
        log_metric("mean_length", sum(map(len, completion_ids)) / len(completion_ids))
        assert trainer_state == "state" and kwargs == {"other": [1, 2]} and prompts[0][0]["role"] == "user"
        return [float(content == wanted) for content, wanted in zip(contents, answer, strict=True)]

    def only_completions(completions, **kwargs):
        return np.array([len(completion[0]["content"]) for completion in completions], dtype=np.float32)

    def without_stars(completions, answer):  # TRL would fail on it
        return torch.tensor([1.0, 2.0])

    overlong = get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)
    functions = [trl, only_completions, without_stars, think_format_reward, overlong]
    prompts = [[{"role": "user", "content": "why"}]] * 2
    completions = [[{"role": "assistant", "content": text}] for text in ("yes", "<think>a</think>")]
    columns = dict(prompt=prompts, answer=["yes", "no"], other=[1, 2])  # TRL takes the prompt column out
    rewards = RewardSet(functions)
    rewards.check({name: values[0] for name, values in columns.items()})
    scored = rewards(prompts, completions, [[1, 2], [1, 2, 3]], trainer_state="state", **columns)
    close(scored.reward_components, [[1, 3, 1, 0, 0], [0, 16, 2, 1, -0.5]])
    assert scored.extra == {"content": ["yes", "<think>a</think>"]} and scored.metrics == {"mean_length": 2.5}


class Asynchronous:
    async def __call__(self, completions, **columns):
        await asyncio.sleep(0.2)
        return [1.0] * len(completions)


async def asynchronous(completions, **columns):
    await asyncio.sleep(0.2)
    return [2.0] * len(completions)


def test_async_functions_work_at_the_same_time():
    began = time.monotonic()
    scored = RewardSet([Asynchronous(), asynchronous, length, asynchronous])(PROMPTS, COMPLETIONS)
    assert time.monotonic() - began < 0.4
    close(scored.reward_components[0], [1, 2, 1, 2])


def test_async_functions_keep_their_loop():
    loops = []

    async def looped(completions, **columns):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    rewards = RewardSet([looped])
    rewards(PROMPTS, COMPLETIONS), rewards(PROMPTS, COMPLETIONS)
    assert loops[0] is loops[1]


def backtrack():
    re.search(r"(a+)+$", "a" * 40 + "b")  # years, with the interpreter's lock held


def stubborn():
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


def fail(error):
    def failing():
        raise error

    return failing


FAULTS = {
    "raises": (fail(KeyError("oh")), "KeyError: 'oh'"),
    "NaN": (lambda: NAN, r"it returned nan, expected a finite number \(None where it does not apply\)"),
    "infinity": (lambda: -math.inf, "it returned -inf, expected a finite number"),
    "text": (lambda: "1.0", "it returned '1.0', a str, expected a number"),
    "a list": (lambda: [1.0], r"it returned \[1.0\], a list, expected a number"),
    "sleeps": (lambda: time.sleep(60), "no answer within 1 s"),
    "sleeps and catches everything": (stubborn, "no answer within 1 s"),
    "backtracks for ever": (backtrack, "no answer within 1 s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_stop_names_function_sample_and_reason(fault):
    act, said = FAULTS[fault]
    rewards = RewardSet([length, good_but(ccc=act)], timeout=0.5)
    where = r"reward 'picky' failed on sample 3 of 4 \(prompt 'three', completion 'ccc'\): "
    with pytest.raises(RewardError, match=where + said):
        rewards(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize("fault", FAULTS)
def test_drop_leaves_out_what_failed_and_says_so(fault, caplog):
    act, said = FAULTS[fault]
    scored = RewardSet([length, good_but(ccc=act)], [1.0, 0.5], on_error="drop", timeout=0.5)(PROMPTS, COMPLETIONS)
    assert scored.usable.tolist() == [True, True, False, True] and scored.failed == {"length": 0, "picky": 1}
    assert scored.rewards[2].isnan() and scored.reward_components[2, 1].isnan()
    close(scored.rewards[scored.usable], [1.5, 2.5, 4.5])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(
        r"reward 'picky' failed on 1 of 4 samples, which are left out; the first: sample 3 of 4 .*: " + said,
        record.getMessage(),
    )


ANSWERS = {
    "one too few": (lambda c, **_: [0.0] * (len(c) - 1), "it returned 0 values, expected 1"),
    "one too many": (lambda c, **_: [0.0] * (len(c) + 1), "it returned 2 values, expected 1"),
    "None": (lambda c, **_: None, "it returned a NoneType, expected a list of 1 numbers"),
    "one number": (lambda c, **_: 1.0, "it returned a float, expected a list of 1 numbers"),
    "a string": (lambda c, **_: "a" * len(c), "it returned a str, expected a list"),
    "a 0-d tensor": (lambda c, **_: torch.tensor(1.0), "it returned a float, expected a list"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_wrong_number_of_values(answer):
    act, said = ANSWERS[answer]

    def wrong(completions, **columns):
        return act(completions)

    with pytest.raises(RewardError, match=f"reward 'wrong' failed on sample 1 of 4 .*: {said}"):
        RewardSet([wrong])(PROMPTS, COMPLETIONS)
    scored = RewardSet([length, wrong], on_error="drop")(PROMPTS, COMPLETIONS)
    assert not scored.usable.any() and scored.failed == {"length": 0, "wrong": 4}


def test_a_function_that_leaves_one_out():
    def filters(completions, **columns):
        return [1.0 for c in completions if c != "bb"]

    with pytest.raises(RewardError, match=r"sample 2 of 4 \(prompt 'two', completion 'bb'\): it returned 0 values"):
        RewardSet([filters])(PROMPTS, COMPLETIONS)
    scored = RewardSet([filters], on_error="drop")(PROMPTS, COMPLETIONS)
    assert scored.usable.tolist() == [True, False, True, True]


def test_a_batch_that_fails_though_no_sample_does():
    def lonely(completions, **columns):
        if len(completions) > 1:
            raise ValueError("one at a time")
        return [1.0]

    said = "ValueError: one at a time, for 4 samples at once but for none of them alone"
    with pytest.raises(RewardError, match=said):
        RewardSet([lonely])(PROMPTS, COMPLETIONS)
    assert not RewardSet([lonely], on_error="drop")(PROMPTS, COMPLETIONS).usable.any()


def test_an_error_of_the_outside_world_blames_no_sample():
    calls = []

    def server(completions, **columns):
        calls.append(len(completions))
        raise ConnectionError("refused")

    scored = RewardSet([server], on_error="drop")(PROMPTS, COMPLETIONS)
    assert calls == [4] and not scored.usable.any() and scored.failed == {"server": 4}
    with pytest.raises(RewardError, match="ConnectionError: refused"):
        RewardSet([server])(PROMPTS, COMPLETIONS)


def test_columns_go_with_their_sample():
    def check(prompts, completions, completion_ids, answer, **columns):
        assert len(prompts) == len(completions) == len(completion_ids) == len(answer)
        if "bad" in answer:
            raise ValueError(f"{prompts} {completions} {completion_ids}")
        return [1.0] * len(prompts)

    with pytest.raises(RewardError, match=r"ValueError: \['three'\] \['ccc'\] \[\[3\]\]"):
        RewardSet([check])(PROMPTS, COMPLETIONS, [[1], [2], [3], [4]], answer=["", "", "bad", ""])
    with pytest.raises(ValueError, match="4 prompts, but 3 values in 'answer'"):
        RewardSet([length])(PROMPTS, COMPLETIONS, answer=[1, 2, 3])


@pytest.mark.parametrize("kind", ["async", "blocks the loop"])
def test_an_async_function_that_hangs(kind):
    async def hangs(completions, **columns):
        if "bb" in completions:
            time.sleep(4) if kind == "blocks the loop" else await asyncio.sleep(60)
        return [1.0] * len(completions)

    began = time.monotonic()
    with pytest.raises(RewardError, match=r"'hangs' failed on sample 2 of 4 .* no answer within"):
        RewardSet([hangs], timeout=0.3)(PROMPTS, COMPLETIONS)
    assert time.monotonic() - began < 15
    close(RewardSet([asynchronous])(PROMPTS, COMPLETIONS).rewards, [2, 2, 2, 2])  # another loop serves those after


def test_outside_the_main_thread_a_hanging_function_is_left_behind():
    released = threading.Event()
    rewards = RewardSet([good_but(bb=lambda: released.wait(30))], on_error="drop", timeout=0.3)
    found = []
    worker = threading.Thread(target=lambda: found.append(rewards(PROMPTS, COMPLETIONS)))
    worker.start(), worker.join(10)
    released.set()
    assert found[0].usable.tolist() == [True, False, True, True]


def test_someone_elses_alarm_goes_on():
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(time.monotonic()))
    old = signal.setitimer(signal.ITIMER_REAL, 0.6)
    try:
        began = time.monotonic()
        with pytest.raises(RewardError, match=r"no answer within 0\.2 s"):
            RewardSet([lambda completions, **_: time.sleep(30)], timeout=0.2)(PROMPTS[:1], COMPLETIONS[:1])
        assert not rang
        time.sleep(0.8)
        assert len(rang) == 1 and 0.5 < rang[0] - began < 0.8
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *old)


def test_functions_that_cannot_be_called_are_refused_at_once():
    def by_position(completions, /, **columns):
        return []

    def blind(prompts):
        return []

    with pytest.raises(ValueError, match="reward 'by_position' takes 'completions' by position only"):
        RewardSet([by_position])
    with pytest.raises(
        ValueError, match="reward 'blind' takes prompts, so it would see no completion: expected `def blind"
    ):
        RewardSet([blind])
    with pytest.raises(ValueError, match=r"call a factory to get its function: soft_overlong_punishment\("):
        RewardSet([soft_overlong_punishment])
    with pytest.raises(ValueError, match="a reward is a function, a name or a path; got 3"):
        RewardSet([3])
    with pytest.raises(ValueError, match="functions must be a list"):
        RewardSet("exact_match")


def test_missing_columns_are_found_before_the_first_rollout():
    def needs_level(completions, level, seed=0):
        return [0.0] * len(completions)

    row = {"prompt": "why", "solution": "42"}
    for rewards, name in (([numeric_answer()], "answer"), ([needs_level], "level")):
        with pytest.raises(ValueError, match=f"needs '{name}', which is no column of the data: solution"):
            RewardSet(rewards).check(row)
    RewardSet([numeric_answer("solution")]).check(row)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(weights=[1.0, 2.0]), "2 weights for 1 rewards"),
        (dict(weights=[0.0]), "not all 0"),
        (dict(weights=[NAN]), "weights must be finite"),
        (dict(on_error="skip"), "on_error must be stop or drop, got 'skip'"),
        (dict(timeout=0), "timeout must be positive or None"),
    ],
)
def test_options_are_checked(options, said):
    with pytest.raises(ValueError, match=said):
        RewardSet([length], **options)
