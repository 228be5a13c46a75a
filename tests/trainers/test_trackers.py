"""A tracker knows the run's name, writes into its folder, sees the last evaluation, and never ends the run."""

import os
import types

import pytest
from conftest import tiny_model, write_rows
from transformers.integrations.integration_utils import TrackioCallback

from rlhf.data import load_data
from rlhf.trainers import SFTConfig, SFTTrainer
from rlhf.trainers.trackers import set_places

ROWS = [{"prompt": "the cat", "completion": " sat"}] * 4


class FakeTrackio(TrackioCallback):
    """transformers' own callback, with a package that notes what it is told."""

    def __init__(self, raises_at=None):
        def note(kind):
            def call(*args, **kwargs):
                self.calls.append((kind, args, kwargs))
                if kind == raises_at:
                    raise ConnectionError("no\nserver")

            return call

        self.calls = []
        space = types.SimpleNamespace(current_space_id=types.SimpleNamespace(get=lambda: None))
        config = type("Config", (dict,), {"update": lambda config, *args, **kwargs: note("config")(*args)})()
        self._trackio = types.SimpleNamespace(
            init=note("init"), log=note("log"), finish=note("finish"), config=config, context_vars=space
        )
        self._initialized, self._space_id, self._static_space_id = False, None, None

    def kinds(self):
        return [kind for kind, _, _ in self.calls]


@pytest.fixture
def make(tmp_path, tokenizer):
    rows = load_data(str(write_rows(tmp_path / "rows.jsonl", ROWS)))

    def trainer(*trackers):
        args = SFTConfig(
            str(tmp_path / "cats" / "first run"), max_steps=2, logging_steps=1, use_cpu=True, disable_tqdm=True,
            save_strategy="no", hub_token="s3cr3t",
        )  # fmt: skip
        return SFTTrainer(
            tiny_model(), args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
            callbacks=list(trackers),
        )  # fmt: skip

    return trainer


def test_the_last_evaluation_is_in_the_same_run(make):
    tracker = FakeTrackio()
    trainer = make(tracker)
    with trainer.trackers.open_to_the_end():
        trainer.train()
        trainer.evaluate()
    kinds = tracker.kinds()
    assert kinds.count("init") == kinds.count("finish") == 1 and kinds[-1] == "finish"
    logged = [args[0] for kind, args, _ in tracker.calls if kind == "log"]
    assert "eval/loss" in logged[-1] and "train/loss" in logged[0]
    (named,) = [kwargs for kind, _, kwargs in tracker.calls if kind == "init"]
    assert (named["project"], named["name"]) == ("cats", "first-run")
    assert "s3cr3t" not in str(tracker.calls)


def test_without_the_commands_a_tracker_closes_with_training(make):
    tracker = FakeTrackio()
    make(tracker).train()
    assert tracker.kinds()[-1] == "finish"


def test_a_tracker_that_raises_is_left_out_with_one_warning(make, caplog):
    events = ("init", "log", "finish")
    trackers = [FakeTrackio(raises_at=event) for event in events]
    trainer = make(*trackers)
    assert trainer.train().global_step == 2
    trainer.evaluate()
    warned = [record.getMessage() for record in caplog.records if "failed" in record.getMessage()]
    assert len(warned) == 3
    for line in warned:
        assert line.startswith("FakeTrackio failed (on_")
        assert line.endswith("ConnectionError: no server); the run goes on without it")
    for tracker, event in zip(trackers, events, strict=True):
        assert tracker.kinds().count(event) == 1 and tracker.kinds()[-1] == event


def test_another_callback_that_raises_ends_the_run(make):
    class Own(FakeTrackio.__mro__[2]):  # a plain TrainerCallback of the user
        def on_log(self, *_, **__):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        make(Own()).train()


def test_places_are_the_runs_own_unless_the_user_chose_one(tmp_path, monkeypatch):
    for name in ("WANDB_DIR", "WANDB_PROJECT", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("rlhf.trainers.trackers._set_here", {})
    for run in ("a", "b"):  # the second run in a process has its own folder
        args = types.SimpleNamespace(output_dir=tmp_path / run, report_to=["wandb", "trackio"], project="p")
        set_places(args)
        assert os.environ["WANDB_DIR"] == str(tmp_path / run)
        assert os.environ["TRACKIO_DIR"] == str(tmp_path / run / "trackio")
    monkeypatch.setenv("WANDB_DIR", "/mine")
    set_places(args)
    assert os.environ["WANDB_DIR"] == "/mine"


def test_names_that_were_given_stay(tmp_path):
    args = SFTConfig(str(tmp_path / "out"), run_name="mine", project="ours", use_cpu=True)
    assert (args.run_name, args.project) == ("mine", "ours")
