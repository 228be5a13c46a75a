"""TRL's options of supervised fine-tuning: each acts, or is refused by name."""

import numpy as np
import pytest
import torch
from conftest import close, sentences, tiny_model
from datasets import Dataset, IterableDataset
from transformers import TrainingArguments

from rlhf import SFTConfig, SFTTrainer
from rlhf.trainers.sft import as_text, wrapped


@pytest.fixture
def sft(tmp_path, tokenizer):
    def make(rows, model=None, eval_dataset=None, trainer=None, **changes):
        options = dict(
            max_steps=1, per_device_train_batch_size=len(rows), learning_rate=0.1, logging_steps=1, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="no", optim="sgd", max_length=64,
        )  # fmt: skip
        return SFTTrainer(
            model or tiny_model(), SFTConfig(str(tmp_path / "run"), **options | changes), train_dataset=rows,
            eval_dataset=eval_dataset, processing_class=tokenizer, **(trainer or {}),
        )  # fmt: skip

    return make


@pytest.fixture
def pairs():
    return Dataset.from_list(
        [{"prompt": p, "completion": " " + c} for p, c in zip(sentences(1, 4), sentences(2, 4), strict=True)]
    )


def logps_of(model, rows):
    """Log-probs of the scored tokens of tokenised rows, from whole logits."""
    found = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append(logps[labels != -100])
    return torch.cat(found)


def test_dft_weighs_each_token_by_its_probability(sft, pairs):
    trainer = sft(pairs, loss_type="dft", eval_dataset=pairs)
    model = tiny_model()
    logps = logps_of(model, trainer.train_dataset)
    want = -(logps * logps.detach().exp()).mean()
    want.backward()
    close(trainer.evaluate()["eval_loss"], want.detach())
    trainer.train()
    close(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), want.detach())
    for p, before in zip(trainer.model.parameters(), model.parameters(), strict=True):
        close(p.detach(), (before - 0.1 * before.grad).detach())


@pytest.mark.parametrize("kind", ["completion_only_loss", "assistant_only_loss"])
def test_whole_rows_are_scored_on_request(sft, pairs, kind):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    rows = pairs if kind == "completion_only_loss" else Dataset.from_list([{"messages": turns}] * 2)
    some, default, every = (sft(rows, **{kind: value}).train_dataset["labels"][:] for value in (True, None, False))
    assert some == default and any(-100 in labels for labels in some)
    assert every == sft(rows).train_dataset["input_ids"][:]


def test_an_option_for_other_rows_is_refused(sft, pairs):
    text = Dataset.from_list([{"text": "the cat"}] * 2)
    with pytest.raises(ValueError, match="completion_only_loss needs rows with a 'prompt' and a 'completion'"):
        sft(text, completion_only_loss=True)
    with pytest.raises(ValueError, match="assistant_only_loss needs conversations"):
        sft(text, assistant_only_loss=True)
    with pytest.raises(ValueError, match="compute_loss_func is not supported: the loss is never made from logits"):
        sft(text, trainer={"compute_loss_func": print})
    with pytest.raises(ValueError, match="dataset_kwargs: 'add_special_tokens' has no effect"):
        sft(text, dataset_kwargs={"add_special_tokens": False})
    with pytest.raises(ValueError, match="quantization_config acts when a model is loaded"):
        sft(text, trainer={"quantization_config": object()})


def test_text_is_made_by_a_function(sft, pairs, tokenizer):
    rows = sft(pairs, trainer={"formatting_func": lambda row: f"{row['prompt']} ->{row['completion']}"}).train_dataset
    assert tokenizer.decode(rows[0]["input_ids"][:-1]) == f"{pairs[0]['prompt']} ->{pairs[0]['completion']}"
    assert rows[0]["labels"] == rows[0]["input_ids"]
    with pytest.raises(ValueError, match="formatting_func must give the text of one row, got a list"):
        sft(pairs, trainer={"formatting_func": lambda row: [row["prompt"]]})


def test_text_of_a_stream_whose_columns_are_unknown():
    stream = IterableDataset.from_generator(lambda: iter([{"a": "the", "b": "cat"}, {"a": "a", "b": "dog"}]))
    assert stream.column_names is None
    made = as_text(stream, lambda row: f"{row['a']} {row['b']}", "text")
    assert list(made) == [{"text": "the cat"}, {"text": "a dog"}]
    tokenised = IterableDataset.from_generator(
        lambda: iter([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}])
    )
    assert list(wrapped(tokenised, 2)) == [
        {"input_ids": [1, 2], "labels": [-100, 2]},
        {"input_ids": [3, 4], "labels": [3, 4]},
        {"input_ids": [5], "labels": [5]},
    ]


def test_wrapped_packing_loses_no_token(sft, pairs):
    packed = sft(pairs, packing=True, packing_strategy="wrapped", max_length=16).train_dataset
    stream = [token for ids in sft(pairs).train_dataset["input_ids"] for token in ids]
    assert [token for ids in packed["input_ids"] for token in ids] == stream
    assert {len(ids) for ids in packed["input_ids"][:-1]} == {16}


def test_rows_are_shuffled_by_the_seed(sft, pairs):
    one, two, other = (sft(pairs, shuffle_dataset=True, seed=seed).train_dataset[:] for seed in (1, 1, 3))
    plain = sft(pairs).train_dataset[:]
    assert one == two != other
    assert sorted(one["input_ids"]) == sorted(plain["input_ids"])


def test_metrics_of_ones_own_get_logits_and_labels(sft, pairs):
    seen = []

    def measure(predictions):
        seen.append(predictions)
        return {"mine": 0.5}

    trainer = sft(pairs, eval_dataset=pairs, per_device_eval_batch_size=3, trainer={"compute_metrics": measure})
    metrics = trainer.evaluate()
    assert metrics["eval_mine"] == 0.5
    logits, labels = torch.tensor(seen[0].predictions[:, :-1]), torch.tensor(seen[0].label_ids[:, 1:]).long()
    nll = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
    close(metrics["eval_loss"], nll)


def test_logits_are_reduced_before_they_are_kept(sft, pairs):
    def best(logits, labels):
        return logits.argmax(-1)

    def accuracy(found):
        return {"accuracy": float(np.mean(found.predictions[:, :-1][found.label_ids[:, 1:] != -100] >= 0))}

    options = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": best}
    assert sft(pairs, eval_dataset=pairs, trainer=options).evaluate()["eval_accuracy"] == 1.0


def test_plain_training_arguments_are_taken_over(tmp_path, tokenizer, pairs):
    plain = TrainingArguments(str(tmp_path), learning_rate=0.25, report_to="none", use_cpu=True, seed=7)
    trainer = SFTTrainer(tiny_model(), plain, train_dataset=pairs, processing_class=tokenizer)
    assert isinstance(trainer.args, SFTConfig)
    assert (trainer.args.learning_rate, trainer.args.seed, trainer.args.max_length) == (0.25, 7, 1024)
    assert not trainer.args.remove_unused_columns


def test_parameters_have_the_models_names(sft, pairs):
    trainer = sft(pairs)
    names = [name for name, _ in tiny_model().named_parameters()]
    assert [name for name, _ in trainer.model.named_parameters()] == names
    for name, parameter in trainer.model.named_parameters():
        assert trainer.model.get_parameter(name) is parameter
    decayed, plain = (group["params"] for group in trainer.create_optimizer().param_groups)
    assert len(decayed) + len(plain) == len(names)
    assert {p.dim() for p in decayed} == {2} and {p.dim() for p in plain} == {1}
