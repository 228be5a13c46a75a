"""Rewards by what is written in a config."""

import pytest
from trl.rewards import get_soft_overlong_punishment, think_format_reward

from rlhf.rewards import BUILTINS, RewardSet, load_reward
from rlhf.rewards.calling import call

FILE = """
from dataclasses import dataclass

@dataclass
class Settings:
    weight: float = 2.0

def short(completions, **columns):
    return [-float(len(c)) for c in completions]

def times(weight, offset=0.0):
    def reward(completions, **columns):
        return [weight * len(c) + offset for c in completions]
    return reward
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def score(spec, completions=("a", "bb"), **columns):
    return load_reward(spec)(completions=list(completions), **columns)


def test_built_ins_by_name_with_options():
    assert score("numeric_answer", ["is 42", "41"], answer=["42", "42"]) == [1.0, 0.0]
    assert score("matches('b+')") == score("matches(pattern='b+')") == [0.0, 1.0]
    assert score(" exact_match( column = 'x', ignore_case=True )", ["A"], x=["a"]) == [1.0]
    assert load_reward("soft_overlong_punishment(100, soft_punish_cache=20)")(completion_ids=[[1] * 90]) == [-0.5]


def test_trl_names():
    spec = "get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4)"
    ids = [[1] * n for n in range(14)]
    assert load_reward(spec)(completion_ids=ids) == get_soft_overlong_punishment(10, 4)(ids)
    assert load_reward("think_format_reward")(completions=["<think>a</think>"]) == [1.0]
    assert load_reward("trl.rewards.think_format_reward") is think_format_reward
    assert load_reward("trl.rewards:think_format_reward") is think_format_reward


def test_a_function_of_a_file(file, monkeypatch):
    assert score(f"{file}:short") == [-1.0, -2.0]
    assert score(f"{file}:times(3)") == [3.0, 6.0] and score(f"{file}:times(weight=1, offset=-1.5)") == [-0.5, 0.5]
    monkeypatch.chdir(file.parent)
    assert score("mine.py:short") == score("./mine.py:short") == [-1.0, -2.0]
    monkeypatch.syspath_prepend(file.parent)
    assert score("mine:short") == score("mine.short") == [-1.0, -2.0]
    assert RewardSet(["mine.py:short", f"{file}:times(3)"]).names == ["short", "reward"]


@pytest.mark.parametrize(
    "spec, said",
    [
        ("numeric_anser", r"unknown reward 'numeric_anser'; did you mean numeric_answer\? \(built in: exact_match, "),
        ("length_reward", r"'length_reward': .*missing 1 required positional argument: 'target'; write the options as"),
        ("length_reward(tagret=3)", "unexpected keyword argument 'tagret'"),
        ("length_reward(target=0)", "target must be at least 1 token, got 0"),
        ("matches(open('x'))", r"the options must be plain values"),
        ("matches('a'", "unknown reward"),
        ("no_such_package.module:f", "no module 'no_such_package'; for a file write file.py:function"),
        ("trl.rewards.think_format_rewards", "no 'think_format_rewards' in .*; did you mean think_format_reward?"),
        ("trl.rewards:nothing_like_it_at_all", "no 'nothing_like_it_at_all' in "),
    ],
)
def test_one_line_says_what_is_wrong(spec, said):
    with pytest.raises(ValueError, match=said):
        load_reward(spec)


def test_files_that_cannot_be_read(file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.py: no such file"):
        load_reward(f"{tmp_path}/none.py:short")
    with pytest.raises(ValueError, match=r"no 'shor' in .*mine.py; did you mean short\?"):
        load_reward(f"{file}:shor")
    file.write_text("import a_module_that_is_not_there")
    with pytest.raises(ValueError, match=r"running .*mine.py fails \(ModuleNotFoundError: No module named"):
        load_reward(f"{file}:short")
    file.write_text("def f(:")
    with pytest.raises(ValueError, match=r"fails \(SyntaxError: "):
        load_reward(f"{file}:f")
    file.write_text("import sys\nscore = 3\ndef leaves(completions): sys.exit(5)")
    with pytest.raises(ValueError, match=r"mine.py:score': 3 is no function"):
        load_reward(f"{file}:score")
    with pytest.raises(RuntimeError, match=r"it ended the process \(sys.exit\(5\)\)"):
        call(load_reward(f"{file}:leaves"), {"completions": []}, 1.0)
    file.write_text("import sys\nsys.exit(7)")
    with pytest.raises(ValueError, match=r"running .*mine.py fails \(SystemExit: 7\)"):
        load_reward(f"{file}:f")


def test_a_name_on_the_hub_is_a_model():
    with pytest.raises(ValueError, match="nobody/no-such-model: no tokenizer found there"):
        load_reward("nobody/no-such-model")


def test_every_built_in_is_a_factory():
    assert all(callable(factory) and factory.__doc__ for factory in BUILTINS.values())
