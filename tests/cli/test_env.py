"""``rlhf env`` holds what a report of a bug needs, and no secret."""

import json

import torch

from rlhf.cli.main import main


def test_env(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_aaaaaaaaaaaaaaaaaaaaaaaa")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert main(["env", "--json"]) == 0
    text = capsys.readouterr().out
    facts = json.loads(text)
    assert facts["versions"]["torch"] == torch.__version__ and facts["machine"]["cores"] >= 1
    assert facts["environment"]["OMP_NUM_THREADS"] == "3" and "hf_aaaa" not in text
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["torch", torch.__version__] for line in lines)
