"""Every option that transformers brings acts, is refused by name, or is handed on untouched."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import close, tiny_model
from transformers import TrainingArguments

from rlhf import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from rlhf.cli.arguments import LoadArguments, ModelArguments
from rlhf.cli.parsing import parse
from rlhf.trainers.options import ACTS, HANDED_ON, REFUSED, check_options, greater_is_better

STEPS = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)


@pytest.fixture
def sft(tmp_path, tokenizer, sft_rows):
    def make(cls=SFTTrainer, data=None, eval_rows=None, **options):
        base = dict(
            output_dir=str(tmp_path), max_steps=2, logging_steps=1, report_to="none", save_strategy="no", seed=0,
            disable_tqdm=True, use_cpu=True, per_device_train_batch_size=4, learning_rate=1e-2,
        )  # fmt: skip
        return cls(
            tiny_model(), args=SFTConfig(**{**base, **options}), train_dataset=sft_rows if data is None else data,
            eval_dataset=sft_rows.select(range(6)) if eval_rows is None else eval_rows, processing_class=tokenizer,
        )  # fmt: skip

    return make


def test_every_option_is_classified_once():
    """A field that is new in transformers fails here, until somebody looked what becomes of it."""
    handed_on = [name for names in HANDED_ON.values() for name in names.split()]
    known = [*REFUSED, *ACTS, *handed_on]
    assert len(known) == len(set(known))
    assert {f.name for f in fields(TrainingArguments)} <= set(known)


AWAY = {
    "label_smoothing_factor": 0.1, "liger_kernel_config": {"rope": True}, "eval_do_concat_batches": False,
    "include_for_metrics": ["loss"], "average_tokens_across_devices": False, "length_column_name": "size",
    "parallelism_config": object(),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_would_be_ignored_is_refused_by_name(name, tmp_path):
    with pytest.raises(ValueError, match=f"^--{name} .* has no effect here: "):
        SFTConfig(output_dir=str(tmp_path), use_cpu=True, **{name: AWAY.get(name, True)})


def test_the_docs_say_what_becomes_of_each():
    text = (Path(__file__).parents[2] / "docs" / "options.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` | {said} |" in text for name, said in (REFUSED | ACTS).items())
    assert all(f"`{name}`" in text for names in HANDED_ON.values() for name in names.split())


def test_options_at_their_defaults_are_no_fault(tmp_path):
    defaults = {name: getattr(TrainingArguments(output_dir=str(tmp_path)), name) for name in REFUSED}
    SFTConfig(output_dir=str(tmp_path), use_cpu=True, **defaults)


def test_groups_by_length_are_of_tokens(sft, sft_rows):
    """transformers#31405: group_by_length looked for input_ids in rows that had none."""
    trainer = sft(train_sampling_strategy="group_by_length", gradient_accumulation_steps=2)
    order = list(trainer._get_train_sampler())
    lengths = np.array([len(row["input_ids"]) for row in trainer.train_dataset])
    rises = (np.diff(lengths[order].reshape(-1, 8)) > 0).sum()  # within an optimizer step, of 42 neighbours
    assert sorted(order) == list(range(len(lengths))) and rises <= 2  # the longest row of all is moved to the front
    trainer.train()


def test_pairs_are_grouped_by_length_too(tmp_path, tokenizer, preference_rows):
    args = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", train_sampling_strategy="group_by_length"
    )
    trainer = DPOTrainer(tiny_model(), args=args, train_dataset=preference_rows, processing_class=tokenizer)
    assert sorted(trainer._get_train_sampler()) == list(range(48))


def test_tokens_seen_are_counted_without_padding(sft):
    """transformers#26920: counting crashed on inputs that are no dictionary."""
    trainer = sft(include_num_input_tokens_seen=True, layout="rows")
    trainer.train()
    plain = sft(layout="segments")
    plain.train()
    assert trainer.state.num_input_tokens_seen == plain.state.num_input_tokens_seen > 0
    seen = [line["num_input_tokens_seen"] for line in trainer.state.log_history if "loss" in line]
    assert seen == [line["num_tokens"] for line in plain.state.log_history if "loss" in line]


@pytest.mark.parametrize("metric", [None, "perplexity"])
def test_the_best_checkpoint_is_the_best(metric, sft):
    """transformers took the largest of every metric whose name does not end in loss: the worst perplexity."""
    trainer = sft(**STEPS, max_steps=3, load_best_model_at_end=True, metric_for_best_model=metric, save_total_limit=1)
    trainer.train()
    name = f"eval_{metric or 'loss'}"
    assert trainer.state.best_metric == min(line[name] for line in trainer.state.log_history if name in line)
    assert trainer.evaluate()[name] == pytest.approx(trainer.state.best_metric)


def test_directions_of_metrics():
    less = ["loss", "eval_loss", "eval_a_loss", "perplexity", "kl", "divergence", "brier_score", "perplexity/chosen"]
    more = ["reward", "rewards/accuracies", "accuracy", "rewards/margins", "rewards/chosen", "agreement"]
    assert not any(map(greater_is_better, less)) and all(map(greater_is_better, more))


def test_a_metric_that_is_not_there_is_found_before_training(sft, sft_rows):
    with pytest.raises(ValueError, match="--metric_for_best_model bleu: evaluation gives loss, perplexity"):
        sft(**STEPS, load_best_model_at_end=True, metric_for_best_model="bleu").train()
    halves = {"a": sft_rows.select(range(4)), "b": sft_rows.select(range(4, 8))}
    with pytest.raises(ValueError, match="evaluation gives a_loss, a_perplexity, b_loss, b_perplexity"):
        sft(**STEPS, load_best_model_at_end=True, eval_rows=halves).train()
    trainer = sft(**STEPS, load_best_model_at_end=True, metric_for_best_model="b_loss", eval_rows=halves)
    trainer.train()
    assert trainer.state.best_metric is not None


def test_looking_for_the_metric_moves_no_figure(sft):
    one, other = sft(**STEPS), sft(**STEPS, metric_for_best_model="loss")
    one.train(), other.train()
    key = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (one, other)]
    assert key[0] == key[1]


def test_rewards_choose_the_best_policy(tmp_path, tokenizer, sft_rows):
    """TRL#3384, TRL#5811, ms-swift#8030: the metric was eval_loss, which evaluation by rewards does not have."""
    args = GRPOConfig(
        output_dir=str(tmp_path), **STEPS, max_steps=2, num_generations=2, per_device_train_batch_size=4, seed=0,
        max_completion_length=6, max_length=64, load_best_model_at_end=True, use_cpu=True, report_to="none",
        disable_tqdm=True, learning_rate=1e-2, data_seed=7,
    )  # fmt: skip
    trainer = GRPOTrainer(
        tiny_model(), lambda completion_ids, **_: [float(ids[0] % 7) for ids in completion_ids], args,
        train_dataset=sft_rows.select(range(8)), eval_dataset=sft_rows.select(range(4)), processing_class=tokenizer,
    )  # fmt: skip
    assert (args.metric_for_best_model, args.greater_is_better) == ("reward", True)
    assert trainer.collector.prompts.seed == 7
    trainer.train()
    assert trainer.state.best_metric == max(x["eval_reward"] for x in trainer.state.log_history if "eval_reward" in x)
    found = trainer.predict(sft_rows.select(range(3)))
    assert len(found.predictions["completions"]) == 3
    assert found.metrics["test_reward"] == pytest.approx(found.predictions["reward"].mean())


@pytest.mark.parametrize("given", ["argument", "option", "last"])
def test_a_run_goes_on_from_any_checkpoint(given, sft, tmp_path):
    """transformers#23325, TRL#3179: resume_from_checkpoint among the arguments was ignored, and training began anew."""
    whole = sft(max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    if given == "last":
        (tmp_path / "checkpoint-4").rename(tmp_path / "later")
    options = {
        "argument": {},
        "option": {"resume_from_checkpoint": checkpoint},
        "last": {"resume_from_checkpoint": "true"},
    }
    again = sft(max_steps=4, **options[given], output_dir=str(tmp_path if given == "last" else tmp_path / "again"))
    again.train(**({"resume_from_checkpoint": checkpoint} if given == "argument" else {}))
    losses = [[(x["step"], x["loss"]) for x in t.state.log_history if "loss" in x] for t in (whole, again)]
    assert losses[0] == losses[1] and again.state.global_step == 4


def test_weights_alone_are_no_checkpoint(sft, tmp_path):
    """The folder of a finished run, and one saved with save_only_model: training would go on with a fresh optimizer."""
    first = sft(save_strategy="steps", save_steps=2)
    first.train()
    first.save_model()
    first.save_state()
    with pytest.raises(ValueError, match=r"no state of the optimizer to go on with; did you mean .*checkpoint-2"):
        sft().train(resume_from_checkpoint=str(tmp_path))
    sft(save_strategy="steps", save_steps=2, save_only_model=True, output_dir=str(tmp_path / "light")).train()
    with pytest.raises(ValueError, match="it was saved with --save_only_model"):
        sft().train(resume_from_checkpoint=str(tmp_path / "light" / "checkpoint-2"))


def test_a_finished_run_says_that_nothing_is_left(sft, tmp_path, caplog):
    sft(max_steps=2, save_strategy="steps", save_steps=2).train()
    sft(max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "step 2 of 2, so all steps are trained; to train more, raise --max_steps" in caplog.text


def test_predictions_are_of_each_row(sft, sft_rows):
    """transformers' predict gave None: what a row scores could not be had."""
    trainer = sft(per_device_eval_batch_size=4)
    rows = sft_rows.select(range(7))
    found = trainer.predict(rows)
    each = [trainer.evaluate(rows.select([index]))["eval_loss"] for index in range(7)]
    close(torch.tensor(found.predictions["loss"]), torch.tensor(each))
    close(torch.tensor(found.predictions["perplexity"]), torch.tensor(each).exp())
    assert found.metrics["test_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"])
    assert set(trainer.evaluate({"a": rows, "b": rows.select([0])})) >= {"eval_a_loss", "eval_b_perplexity"}
    assert trainer.evaluate(list(rows))["eval_loss"] == pytest.approx(found.metrics["test_loss"])
    trainer.args.prediction_loss_only = True
    assert trainer.predict(rows).predictions is None


def test_predictions_of_pairs_are_their_rewards(tmp_path, tokenizer, preference_rows):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", precompute_ref_log_probs=False)
    trainer = DPOTrainer(tiny_model(), args=args, train_dataset=preference_rows, processing_class=tokenizer)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.mul_(1.1)
    found = trainer.predict(preference_rows.select(range(3))).predictions
    assert found["rewards/margins"].shape == (3,)
    assert np.abs(found["rewards/margins"]).min() > 0
    close(torch.tensor(found["rewards/margins"]), torch.tensor(found["rewards/chosen"] - found["rewards/rejected"]))


def test_trackers_come_in_a_list_and_with_commas(tmp_path):
    """transformers#39378: --report_to a b was refused, as it takes one word."""
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--report_to"]
    for given in (["none"], ["all"]):
        parse("sft", (SFTConfig,), [*argv, *given])
    with pytest.raises(ValueError, match="--report_to b is unknown"):
        parse("sft", (SFTConfig,), [*argv, "b,c"])
    with pytest.raises(ValueError, match=r"--report_to b is unknown"):
        parse("sft", (SFTConfig,), [*argv, "b", "c"])
    assert SFTConfig(output_dir=str(tmp_path), use_cpu=True).report_to == []


def test_switches_that_are_undecided_by_default_need_no_value(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "--activation_checkpointing"]
    (args,) = parse("sft", (SFTConfig,), argv)
    assert args.bf16 is True and args.activation_checkpointing is True
    assert SFTConfig(output_dir=str(tmp_path), use_cpu=True).bf16 is False


@pytest.mark.parametrize(
    ("options", "launched", "expected"),
    [({}, "no", True), ({"fp16": True}, "no", False), ({"use_cpu": True}, "no", False), ({}, "fp16", False)],
)
def test_bfloat16_is_on_where_a_gpu_has_it(options, launched, expected, tmp_path, monkeypatch):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True)
    args.bf16, args.use_cpu, args.report_to = None, False, "none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    for name, value in options.items():
        setattr(args, name, value)
    args._set_defaults()
    assert args.bf16 is expected


def test_training_is_in_float32_and_evaluation_in_the_checkpoints_dtype():
    """TRL#1580: of weights that are trained in bfloat16 in place, most updates are rounded away."""
    assert ModelArguments().load_kwargs()["dtype"] == "float32"
    assert LoadArguments().load_kwargs()["dtype"] == "auto"


def test_selective_checkpointing_of_compiled_layers_is_refused(tmp_path):
    selective = dict(activation_checkpointing=True, activation_checkpointing_kwargs={"selective": True})
    SFTConfig(str(tmp_path), use_cpu=True, **selective)
    with pytest.raises(ValueError, match="selective does not work with --torch_compile: leave one out"):
        SFTConfig(str(tmp_path), use_cpu=True, torch_compile=True, **selective)


@pytest.mark.parametrize(("processes", "drop_last"), [(1, False), (2, False), (2, True)])
def test_uneven_batches_of_several_processes(processes, drop_last, tmp_path, monkeypatch):
    args = SFTConfig(tmp_path, use_cpu=True, report_to="none", dataloader_drop_last=drop_last)
    monkeypatch.setattr(SFTConfig, "world_size", processes)
    args.accelerator_config.even_batches = False
    if processes == 1 or drop_last:
        check_options(args)
    else:
        with pytest.raises(ValueError, match="even_batches false: processes with fewer batches"):
            check_options(args)
