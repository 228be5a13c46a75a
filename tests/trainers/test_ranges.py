"""Every option that is a number has a range, and a value outside is refused before anything is loaded."""

import math
from dataclasses import fields
from pkgutil import resolve_name

import pytest

from rlhf import DistillConfig, DPOConfig, GRPOConfig, PPOConfig, SFTConfig
from rlhf.cli.arguments import DataArguments, ModelArguments
from rlhf.cli.commands import COMMANDS
from rlhf.cli.teacher import TeacherArguments
from rlhf.trainers.ranges import RANGES, UNCHECKED, Range

RANGED = {name: interval for interval, names in RANGES.items() for name in names.split()}


def numeric_options():
    classes = {resolve_name(path) for command in COMMANDS.values() for path in command.option_classes}
    options = {option.name: str(option.type) for cls in classes for option in fields(cls) if option.init}
    return {name for name, kind in options.items() if "int" in kind or "float" in kind}


def test_every_number_is_in_the_table_once():
    listed = [name for names in (*RANGES.values(), *UNCHECKED.values()) for name in names.split()]
    assert len(listed) == len(set(listed))
    assert numeric_options() - set(listed) == set()


def outside(interval):
    below = [interval.least] if interval.open_below else []
    below += [interval.least - 1] if interval.least > -math.inf else []
    above = [interval.most + 1] if interval.most < 2**63 - 1 else []
    infinite = [] if interval.infinite else [math.inf]
    return [value for value in (*below, *above, *infinite, -math.inf, math.nan) if value != interval.also]


@pytest.mark.parametrize("config", [SFTConfig, DPOConfig, PPOConfig, DistillConfig], ids=lambda cls: cls.__name__)
def test_a_number_out_of_its_range_is_refused_by_name(config, tmp_path):
    for option in fields(config):
        if option.name not in RANGED or "list" in str(option.type):
            continue
        for value in outside(RANGED[option.name]):
            with pytest.raises(ValueError, match=rf"\b{option.name} must be .*got {value}"):
                config(output_dir=str(tmp_path), use_cpu=True, **{option.name: value})


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (GRPOConfig, {"gradient_accumulation_steps": -1}, "gradient_accumulation_steps must be at least 1, got -1"),
        (GRPOConfig, {"beta": -1.0}, "beta must be at least 0, got -1.0"),
        (SFTConfig, {"max_steps": 0}, "max_steps must be at least 1, or -1 for all epochs, got 0"),
        (SFTConfig, {"learning_rate": None}, "learning_rate must be a number, got None"),
        (SFTConfig, {"max_length": 10.5}, "max_length must be a whole number, got 10.5"),
        (SFTConfig, {"adam_beta1": 1.0}, r"adam_beta1 must be in \[0, 1\), got 1.0"),
        (SFTConfig, {"seed": 2**32}, "seed must be in"),
        (DPOConfig, {"loss_weights": [1.0, math.nan]}, "loss_weights must be a finite number, got nan"),
        (DPOConfig, {"loss_kwargs": '{"a": [NaN]}'}, "loss_kwargs: a must be a finite number, got nan"),
        (DPOConfig, {"loss_kwargs": '{"a": ' + "[" * 3000}, "its brackets are too deep inside each other"),
        (ModelArguments, {"lora_r": 0, "use_peft": True}, "lora_r must be at least 1, got 0"),
        (DataArguments, {"shuffle_buffer_size": -1}, "shuffle_buffer_size must be at least 0, got -1"),
        (TeacherArguments, {"top_p": math.nan}, r"top_p must be in \(0, 1\], got nan"),
    ],
)
def test_what_is_said(make, options, said, tmp_path):
    place = {"output_dir": str(tmp_path)} if "Config" in make.__name__ else {}
    with pytest.raises(ValueError, match=said):
        make(**place, **options)


def test_infinity_where_it_means_something(tmp_path):
    assert SFTConfig(output_dir=str(tmp_path), use_cpu=True, max_grad_norm=math.inf).max_grad_norm == math.inf
    assert 10**400 not in Range(0, 1) and math.nan not in Range(infinite=True)
