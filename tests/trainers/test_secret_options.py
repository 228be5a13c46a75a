"""Tokens and passwords among the options reach neither a file nor a tracker nor the screen."""

import copy
import pickle
import sys
from dataclasses import dataclass

import pytest
import torch

from rlhf.cli.main import main
from rlhf.online import PPOConfig
from rlhf.secret_names import without_secret_words
from rlhf.trainers import DPOConfig, SFTConfig
from rlhf.trainers.secret_options import without_secrets

HUB, OTHER = "hf_" + "Xy9" * 8, "s3cr3t"


@dataclass
class OwnConfig(DPOConfig):
    extra: int = 1


def config(folder, config_class=SFTConfig):
    return config_class(
        str(folder), hub_token=OTHER, eos_token="<|im_end|>", run_name=f"with {HUB} in it", use_cpu=True,
        model_init_kwargs={"token": OTHER, "proxies": {"https": f"http://me:{OTHER}@proxy:8080/?api_key={OTHER}&a=1"}},
    )  # fmt: skip


@pytest.mark.parametrize("config_class", [SFTConfig, DPOConfig, PPOConfig, OwnConfig])
def test_no_secret_is_written_or_printed(tmp_path, config_class):
    args = config(tmp_path, config_class)
    torch.save(args, tmp_path / "training_args.bin")
    written = [
        (tmp_path / "training_args.bin").read_bytes().decode("latin-1"),
        pickle.dumps(args).decode("latin-1"),
        *map(str, (args.to_dict(), args.to_sanitized_dict(), args.to_json_string(), str(args), repr(args))),
    ]
    for text in written:
        assert OTHER not in text and HUB not in text


def test_what_is_no_secret_stays(tmp_path):
    args = config(tmp_path)
    assert args.to_dict()["eos_token"] == "<|im_end|>"
    assert args.to_dict()["model_init_kwargs"]["proxies"] == {"https": "http://proxy:8080/"}
    pickled = pickle.loads(pickle.dumps(args))
    assert pickled.hub_token == "***" and pickled.learning_rate == args.learning_rate
    assert without_secrets({"num_tokens": 3, "token": True, "a": ["b/c.py:d", "https://hub/x?y=z"]}) == {
        "num_tokens": 3, "token": True, "a": ["b/c.py:d", "https://hub/x"],
    }  # fmt: skip


def test_no_secret_stays_on_the_command_line(monkeypatch, capsys):
    words = ["sft", "--hub_token", OTHER, f"--hub-token={OTHER}", "--eos_token", "<e>", "--run_name", HUB]
    assert without_secret_words(words) == [
        "sft", "--hub_token", "***", "--hub-token=***", "--eos_token", "<e>", "--run_name", "***",
    ]  # fmt: skip
    assert without_secret_words(["--hub_token", "--use_cpu"]) == ["--hub_token", "--use_cpu"]
    monkeypatch.setattr("sys.argv", ["rlhf", *words, "--unknown_option"])
    assert main() == 2
    assert OTHER not in str(sys.argv) and "unknown option --unknown_option" in capsys.readouterr().err


def test_a_copy_in_memory_is_whole(tmp_path):
    args = config(tmp_path)
    for clone in (copy.copy(args), copy.deepcopy(args)):
        assert clone.hub_token == OTHER and clone.model_init_kwargs["token"] == OTHER
    assert copy.deepcopy(args).model_init_kwargs is not args.model_init_kwargs
