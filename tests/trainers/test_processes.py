"""Several processes, seen from one of them."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
from conftest import tiny_model
from peft import LoraConfig, get_peft_model

from rlhf.cli.failing import fail
from rlhf.trainers.processes import another_process_failed
from rlhf.trainers.sharding import check_sharding_of, check_tied_tokens, checkpoint_without_wrappers
from rlhf.trainers.stopping import SignalRequests


@pytest.fixture
def failed(tmp_path, monkeypatch):
    """Where torch's launcher looks for the error of the second process; the tests are the first one."""
    for rank in "01":
        (tmp_path / rank).mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    return tmp_path / "1" / "error.json"


def test_sigterm_ends_a_process_at_once_where_another_one_failed(failed, monkeypatch):
    """The launcher sends it: a step that waits for the other process would never end."""
    ends = []
    monkeypatch.setattr(os, "kill", lambda process, number: ends.append(number))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    requests = SignalRequests()
    requests.note(signal.SIGTERM)
    assert not ends and not another_process_failed()
    failed.write_text("{}")
    requests.note(signal.SIGTERM)
    assert ends == [signal.SIGTERM]


def test_the_launcher_gets_a_line_of_what_a_user_can_mend_and_the_traceback_of_a_bug(failed, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    shown = []
    for error in (ValueError("row 3:\n  empty"), KeyError("row")):
        try:
            raise error
        except Exception as caught:
            fail("sft", caught, debug=False)
        content = json.loads((failed.parents[1] / "0" / "error.json").read_text())["message"]
        shown.append(content["extraInfo"]["py_callstack"])
    assert shown[0] == "ValueError: row 3: empty" and shown[1].startswith("Traceback")


@pytest.mark.parametrize(
    ("file", "plugin", "processes", "said"),
    [
        ("pytorch_model_fsdp.bin", "other", 2, "saved with FSDP, and this run has no sharding"),
        ("optimizer.pt", "fsdp_plugin", 2, "saved with no sharding, and this run has FSDP"),
        (
            "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "deepspeed_plugin",
            2,
            "saved its optimizer in 1 pro",
        ),
        ("global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt", "deepspeed_plugin", 1, None),
        ("pytorch_model_fsdp.bin", "fsdp_plugin", 2, None),
    ],
)
def test_a_checkpoint_with_other_shards_is_refused(file, plugin, processes, said, tmp_path):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    run = SimpleNamespace(state=SimpleNamespace(**{plugin: object()}), num_processes=processes)
    if said is None:
        check_sharding_of(str(tmp_path), run)
        return
    with pytest.raises(ValueError, match=said):
        check_sharding_of(str(tmp_path), run)


@pytest.mark.parametrize("is_asked_for", [True, False])
def test_layers_checkpoint_themselves_under_fsdp(is_asked_for):
    plugin = SimpleNamespace(activation_checkpointing=is_asked_for)
    args = SimpleNamespace(activation_checkpointing=False)
    checkpoint_without_wrappers(args, SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    assert not plugin.activation_checkpointing and args.activation_checkpointing == is_asked_for


@pytest.mark.parametrize("is_tied", [True, False])
def test_new_tokens_of_an_adapter_in_a_tied_embedding_are_refused_under_fsdp2(is_tied):
    """One parameter in two groups of FSDP2, which stopped with "value was None" when it sharded the model."""
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[3])
    model = get_peft_model(tiny_model(tie_word_embeddings=is_tied), adapter)
    check_tied_tokens(model, SimpleNamespace(is_fsdp2=False))
    if is_tied:
        with pytest.raises(ValueError, match=r"^--add_tokens with an adapter does not go with FSDP2 where"):
            check_tied_tokens(model, SimpleNamespace(is_fsdp2=True))
    else:
        check_tied_tokens(model, SimpleNamespace(is_fsdp2=True))
