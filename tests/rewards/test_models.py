"""A reward model by path: its own tokenizer and template, pooled at the last token, as Hugging Face scores one row."""

import copy
import shutil

import pytest
import torch
from conftest import close, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf.rewards import ModelReward, RewardError, RewardSet, load_reward

PROMPTS = ["the cat", "a big dog says", "why", "the"]
COMPLETIONS = [" is big", " hello world hello", " no", " red house is blue and the river is small"]


def classifier(name="llama", num_labels=1, **changes):
    config = tiny_model(name, **changes).config
    config.num_labels = num_labels
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_config(config)


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save(tmp_path_factory.mktemp("reward"), classifier(), tokenizer)


def hf_scores(folder, rows):
    """Hugging Face's own forward on one unpadded row at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = None
    return [model(torch.tensor([row])).logits.item() for row in rows]


def plain_ids(tokenizer):
    ids = [tokenizer(p)["input_ids"] + tokenizer(c)["input_ids"] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    return [[*row, tokenizer.eos_token_id] for row in ids]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma2", "mixtral", "phi"])
def test_scores_are_those_of_single_unpadded_rows(name, tmp_path, tokenizer):
    # The padding id is EOS, on which Hugging Face's own batches read the token before it.
    path = save(tmp_path, classifier(name), tokenizer)
    reward = ModelReward(path, batch_size=3, device="cpu")
    assert reward._is_batched and reward.__name__ == tmp_path.name
    close(reward(prompts=PROMPTS, completions=COMPLETIONS, answer=[None] * 4), hf_scores(path, plain_ids(tokenizer)))


def test_conversations_end_with_the_token_that_ends_the_answer(folder, tokenizer):
    prompts = [[{"role": "user", "content": p}] for p in PROMPTS]
    completions = [[{"role": "assistant", "content": c.strip()}] for c in COMPLETIONS]
    texts = [
        f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n{c.strip()}<|im_end|>"
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    rows = []
    for text in texts:  # the prompt's tokens are those of the prompt alone
        cut = text.rindex("assistant\n") + len("assistant\n")
        rows.append(tokenizer(text[:cut])["input_ids"] + tokenizer(text[cut:])["input_ids"])
    close(ModelReward(folder)(prompts, completions), hf_scores(folder, rows))
    whole = [tokenizer(text + "\n")["input_ids"] for text in texts]
    close(ModelReward(folder, rendering="template")(prompts, completions), hf_scores(folder, whole))


def test_plain_text_as_one(folder, tokenizer):
    rows = [tokenizer(p + c + "<|im_end|>")["input_ids"] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    close(ModelReward(folder, rendering="template")(PROMPTS, COMPLETIONS), hf_scores(folder, rows))


def test_its_own_tokenizer_and_template(tmp_path, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    path = save(tmp_path, classifier(), own)
    prompt, answer = [{"role": "user", "content": "why"}], [{"role": "assistant", "content": "no"}]
    rows = [tokenizer("user: why<|im_end|>")["input_ids"] + tokenizer("assistant: no<|im_end|>")["input_ids"]]
    close(ModelReward(path)([prompt], [answer]), hf_scores(path, rows))


def test_more_than_a_head_on_the_last_token(tmp_path, tokenizer, monkeypatch, caplog):
    model = classifier()
    path = save(tmp_path, model, tokenizer)
    forward = type(model).forward

    def doubled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = 2 * output.logits
        return output

    want = 2 * torch.tensor(hf_scores(path, plain_ids(tokenizer)))
    monkeypatch.setattr(type(model), "forward", doubled)
    close(ModelReward(path)(PROMPTS, COMPLETIONS), want)
    assert "scoring one sample at a time" in caplog.text


def test_an_adapter(tmp_path, tokenizer):
    base = save(tmp_path / "base", tiny_model(), tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    adapted.eval()
    adapted.config.pad_token_id = None
    path = save(tmp_path / "adapter", adapted, tokenizer)
    want = [adapted(torch.tensor([row])).logits.item() for row in plain_ids(tokenizer)]
    close(ModelReward(path)(PROMPTS, COMPLETIONS), want)


def test_normalisation(folder):
    raw = torch.tensor(ModelReward(folder)(PROMPTS, COMPLETIONS), dtype=torch.float64)
    close(ModelReward(folder, mean=0.5, std=2.0)(PROMPTS, COMPLETIONS), (raw - 0.5) / 2)


def test_what_is_too_long_is_refused(folder):
    completions = [*COMPLETIONS[:3], " the cat" * 200]
    with pytest.raises(RewardError, match=r"sample 4 of 4 .* which takes 128"):
        RewardSet([folder])(PROMPTS, completions)
    scored = RewardSet([folder], on_error="drop")(PROMPTS, completions)
    assert scored.usable.tolist() == [True, True, True, False]
    close(scored.rewards[:3], ModelReward(folder)(PROMPTS[:3], COMPLETIONS[:3]))


def test_dtype_and_gradient(folder):
    reward = ModelReward(folder, dtype="bfloat16")
    assert reward.model.dtype == torch.bfloat16 and not any(p.requires_grad for p in reward.model.parameters())
    close(reward(PROMPTS, COMPLETIONS), ModelReward(folder)(PROMPTS, COMPLETIONS), torch.bfloat16)


def test_folders_without_a_reward_model(tmp_path, tokenizer, model_folder, folder):
    with pytest.raises(ValueError, match="it is a LlamaForCausalLM, not a …ForSequenceClassification"):
        load_reward(str(model_folder))
    with pytest.raises(FileNotFoundError, match="nowhere/model: no such model folder"):
        load_reward("./nowhere/model")
    with pytest.raises(ValueError, match="its head has 3 labels, expected 1"):
        ModelReward(save(tmp_path / "three", classifier(num_labels=3), tokenizer))
    headless = classifier()
    headless.save_pretrained(
        tmp_path / "headless", state_dict={k: v for k, v in headless.state_dict().items() if k != "score.weight"}
    )
    tokenizer.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"weights are missing: score\.weight"):
        ModelReward(str(tmp_path / "headless"))
    bare = shutil.copytree(folder, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer found there"):
        ModelReward(str(bare))


def test_conversations_without_a_template_are_found_at_the_start(tmp_path, folder):
    path = shutil.copytree(folder, tmp_path / "copy")
    (path / "chat_template.jinja").unlink()
    rewards = RewardSet([str(path)])
    rewards.check({"prompt": "why"})
    with pytest.raises(ValueError, match="the reward model's tokenizer has no chat template"):
        rewards.check({"prompt": [{"role": "user", "content": "why"}]})


@pytest.mark.parametrize("options", [dict(rendering="other"), dict(std=0.0), dict(batch_size=0)])
def test_options_are_checked(options, folder):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        ModelReward(folder, **options)


def test_a_classifier_without_such_a_head(tmp_path, tokenizer):
    config = AutoConfig.for_model("bert", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_labels=1)
    config.num_attention_heads, config.vocab_size, config.max_position_embeddings = 4, 330, 128
    path = save(tmp_path, AutoModelForSequenceClassification.from_config(config), tokenizer)
    close(ModelReward(path)(PROMPTS, COMPLETIONS), hf_scores(path, plain_ids(tokenizer)))
