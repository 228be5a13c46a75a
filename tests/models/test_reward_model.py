"""A reward is read at the last token by position, whatever the layout, and a checkpoint keeps it."""

import logging

import pytest
import torch
from conftest import ARCHITECTURES, close, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertLMHeadModel

from rlhf.data import Collator
from rlhf.models import RewardModel, add_scalar_head, load_reward_model, use_segments
from rlhf.models.reward_model import spare_pad_token

WITHOUT_CLASS = {"granite", "cohere"}
# 0 is both pad and EOS, and occurs inside; an answer of one token; a prompt of one.
PAIRS = [
    {"prompt_ids": [5, 3, 4], "chosen_ids": [6, 0, 7, 3, 0], "rejected_ids": [2, 4, 0]},
    {"prompt_ids": [2], "chosen_ids": [3], "rejected_ids": [0]},
    {"prompt_ids": [0, 9], "chosen_ids": [0, 0], "rejected_ids": [8, 5, 0, 1]},
]


def reward_model(name="llama", **changes):
    model = add_scalar_head(tiny_model(name, **changes)).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


def one_by_one(model, pairs=PAIRS):
    """The head on the last position of each sequence by itself: no padding, no mask, no batch."""
    rewards = []
    for pair in pairs:
        for answer in (pair["chosen_ids"], pair["rejected_ids"]):
            hidden = model.base_model(torch.tensor([pair["prompt_ids"] + answer])).last_hidden_state
            rewards.append(model.score(hidden[0, -1])[0])
    return torch.stack(rewards)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - WITHOUT_CLASS))
@pytest.mark.parametrize("layout", ["right", "left", "segments"])
def test_rewards_and_gradients_in_any_layout(name, layout):
    model = reward_model(name)
    want = one_by_one(model)
    (want**2).sum().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    if layout == "segments":
        reason = use_segments(model)
        assert reason is None
    collator = Collator(layout="segments") if layout == "segments" else Collator(0, padding_side=layout)
    got = RewardModel(model)(collator(PAIRS))
    close(got.detach(), want.detach())
    (got**2).sum().backward()
    for key, p in model.named_parameters():
        close(p.grad / gradients[key].abs().max(), gradients[key] / gradients[key].abs().max())


def test_the_last_token_is_found_by_position():
    assert Collator(0)(PAIRS).last().tolist() == [7, 13, 17, 25, 35, 45]
    assert Collator(0, padding_side="left")(PAIRS).last().tolist() == [7, 15, 23, 31, 39, 47]
    assert Collator(layout="segments")(PAIRS).last().tolist() == [7, 10, 12, 13, 17, 21]


def test_half_precision_weights_score_in_float32():
    model = reward_model().bfloat16()
    got = RewardModel(model)(Collator(0)(PAIRS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert RewardModel(reward_model())(Collator(0)(PAIRS)).dtype == torch.float32
    hidden = [model.base_model(torch.tensor([p["prompt_ids"] + p["chosen_ids"]]))[0][0, -1] for p in PAIRS]
    want = [float((h.double() @ model.score.weight[0].double()).detach()) for h in hidden]
    assert got.dtype == torch.float32
    close(got[::2].detach(), want, torch.bfloat16)


def test_a_new_head_is_zero_and_the_backbone_the_same(model_folder):
    model = load_reward_model(str(model_folder))
    assert RewardModel(model.model)(Collator(0)(PAIRS)).tolist() == [0.0] * 6
    start = AutoModelForCausalLM.from_pretrained(model_folder).base_model.state_dict()
    assert all(torch.equal(value, start[key]) for key, value in model.model.base_model.state_dict().items())
    assert model.config.num_labels == 1 and model.dtype == torch.float32
    assert load_reward_model(str(model_folder), dtype="bfloat16").dtype == torch.bfloat16


def test_a_saved_head_is_kept_also_by_transformers(tmp_path):
    model = reward_model()
    model.save_pretrained(tmp_path)
    want = one_by_one(model)
    close(one_by_one(load_reward_model(str(tmp_path)).model).detach(), want.detach())
    close(
        one_by_one(AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)).detach(), want.detach()
    )


@pytest.mark.parametrize("kind", ["SEQ_CLS", "CAUSAL_LM"])
def test_an_adapter_is_merged(kind, tmp_path, model_folder):
    """Of a reward model with its head; of a causal LM, under a new head."""
    base = load_reward_model(str(model_folder)).model
    if kind == "CAUSAL_LM":
        base = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = get_peft_model(base, LoraConfig(task_type=kind, target_modules="all-linear", init_lora_weights=False))
    for name, p in adapted.named_parameters():
        if "score.modules_to_save" in name:
            torch.nn.init.normal_(p)
    adapted.eval().save_pretrained(tmp_path)
    loaded = load_reward_model(str(tmp_path)).model
    assert all(p.requires_grad for p in loaded.parameters())
    ids = torch.tensor([[5, 6, 7, 8]])
    want = adapted.get_base_model().base_model(ids).last_hidden_state
    close(loaded.base_model(ids).last_hidden_state.detach(), want.detach())
    if kind == "SEQ_CLS":
        close(RewardModel(loaded)(Collator(0)(PAIRS)).detach(), RewardModel(adapted)(Collator(0)(PAIRS)).detach())
        assert loaded.score.weight.abs().max() > 0
    else:
        assert loaded.score.weight.abs().max() == 0


def test_rewards_of_text_and_messages(tokenizer):
    model = RewardModel(reward_model())
    prompts, answers = ["the cat", "a", "why"], [" is big", " no", " the river is green"]
    ids = [tokenizer(p + a + "<|im_end|>")["input_ids"] for p, a in zip(prompts, answers, strict=True)]
    want = [float(model.model.score(model.model.base_model(torch.tensor([i]))[0][0, -1]).detach()) for i in ids]
    for size in (1, 2, 8):
        close(model.rewards(tokenizer, prompts, answers, batch_size=size), want)
    turns = [{"role": "user", "content": "why"}], [{"role": "assistant", "content": "no"}]
    text = "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"
    whole = torch.tensor([tokenizer(text)["input_ids"]])
    close(
        model.rewards(tokenizer, [turns[0]], [turns[1]]),
        model.model.score(model.model.base_model(whole)[0][0, -1]).detach(),
    )
    with pytest.raises(ValueError, match="'completion' is empty"):
        model.rewards(tokenizer, ["a"], [""])


def test_the_pad_token_is_one_that_ends_no_answer(tokenizer):
    assert spare_pad_token(tokenizer, {7}, 330) == 0  # its own
    assert spare_pad_token(tokenizer, {0, 7}, 330) == 1  # <|im_start|>, as the pad is EOS
    assert spare_pad_token(tokenizer, {0, 1}, 330) is None
    assert spare_pad_token(tokenizer, {0}, 1) is None  # outside the model's vocabulary


def test_what_cannot_be_a_reward_model_is_said_in_a_line(tmp_path, model_folder):
    with pytest.raises(ValueError, match="no sequence-classification class for granite"):
        add_scalar_head(tiny_model("granite"))
    tiny_model("cohere").save_pretrained(tmp_path / "cohere")
    with pytest.raises(ValueError, match="no sequence-classification class for cohere"):
        load_reward_model(str(tmp_path / "cohere"))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no head `score`.*load_reward_model"):
        RewardModel(tiny_model())
    config = tiny_model().config
    config.num_labels = 2
    two = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ValueError, match="a head `score` of 2 outputs"):
        RewardModel(two)
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="two: cannot be loaded as a reward model"):
        load_reward_model(str(tmp_path / "two"))
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        load_reward_model("./nowhere/model")
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, is_decoder=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with pytest.raises(ValueError, match="BertForSequenceClassification has no linear head"):
        add_scalar_head(BertLMHeadModel(BertConfig(**small)))
