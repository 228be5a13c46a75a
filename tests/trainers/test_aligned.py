"""Distillation across tokenizers: every figure by a naive computation, however the work is cut up; and refusals."""

import math

import pytest
import torch
from conftest import WORDS, close, sentences, tiny_model
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rlhf import DistillConfig, DistillTrainer

LLAMA = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ '\n\n' }}{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{{ '\n\n' }}{% endif %}"
)


def byte_level():
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = bpe.pre_tokenizer.alphabet()
    bpe.train_from_iterator(
        ["thetis hello worldly redder", "bigger housing"] * 4,
        trainers.BpeTrainer(vocab_size=280, special_tokens=["</s>", "<s>"], initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", additional_special_tokens=["<s>"])


def unigram():
    """SentencePiece's: a space before the text, and a BOS."""
    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    pieces.train_from_iterator(
        [*sentences(7, 80), *WORDS, "assistant: user\n"],
        trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>"),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="module")
def teachers():
    found = {"bytes": byte_level(), "pieces": unigram()}
    for tokenizer in found.values():
        tokenizer.chat_template = LLAMA
    return found


def teacher_model(tokenizer, **changes):
    return tiny_model("qwen2", vocab_size=len(tokenizer) + 7, seed=1, **changes)


@pytest.fixture(scope="module")
def conversations():
    turns = zip(sentences(21, 16), sentences(22, 16), sentences(23, 16), sentences(24, 16), strict=True)
    return Dataset.from_list([
        {"messages": [
            {"role": "user", "content": a}, {"role": "assistant", "content": b},
            {"role": "user", "content": c}, {"role": "assistant", "content": d + " "},
        ]} for a, b, c, d in turns
    ])  # fmt: skip


@pytest.fixture(scope="module")
def texts():
    return Dataset.from_list([{"text": t} for t in sentences(31, 16)])


@pytest.fixture
def distill(tmp_path, tokenizer, sft_rows, teachers):
    def make(name="bytes", student=None, teacher=None, rows=None, collator=None, teacher_tokenizer="own", **changes):
        options = dict(max_steps=3, logging_steps=1, learning_rate=1e-3, report_to="none", save_strategy="no")
        rows = sft_rows.select(range(16)) if rows is None else rows
        return DistillTrainer(
            tiny_model() if student is None else student,
            teacher_model(teachers[name]) if teacher is None else teacher,
            DistillConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, **(options | {"align": "uld"} | changes)),
            train_dataset=rows,
            eval_dataset=rows.select(range(11)),
            processing_class=tokenizer,
            teacher_processing_class=teachers[name] if teacher_tokenizer == "own" else teacher_tokenizer,
            data_collator=collator,
        )

    return make


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# An oracle that knows text alone: what tokens say is found by decoding, answers by hand.


def rendered(row, tokenizer, student):
    """Token ids, and the places of each answer (its end included), from the template written out by hand."""
    eos = tokenizer.eos_token_id

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if "text" in row:
        whole = [*tokenizer(row["text"])["input_ids"], eos]
        return whole, [list(range(whole[0] == tokenizer.bos_token_id, len(whole)))]
    if "prompt" in row:
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = [*prompt, *ids(row["completion"]), eos]
        return whole, [list(range(len(prompt), len(whole)))]
    whole, answers, done = [], [], ""
    for turn in row["messages"]:
        role, text = turn["role"], turn["content"]
        if role == "user":
            done += f"<|im_start|>user\n{text}<|im_end|>\n" if student else f"<s>user:\n\n{text.strip()}</s>"
            continue
        whole += ids(done + ("<|im_start|>assistant\n" if student else "<s>assistant:\n\n"))
        answer = [*ids(text if student else text.strip()), eos]
        answers.append(list(range(len(whole), len(whole) + len(answer))))
        whole += answer
        done = "\n" if student else ""
        if student and turn is not row["messages"][-1]:
            # The end of an answer and what follows it are tokenised together; nothing merges with a special token.
            assert ids("<|im_end|>\n") == [eos, *ids("\n")]
    return whole, answers


def cuts(tokenizer, ids):
    """Where in the text each token ends, without a first space."""
    return [len(tokenizer.decode(ids[: i + 1], skip_special_tokens=True).lstrip(" ")) for i in range(len(ids))]


def pairs_of(row, align, tokenizers, longest=10**9):
    """Groups of places, (student's, teacher's), that belong together, and the scored places of both sides."""
    (ours, our_answers), (theirs, their_answers) = (rendered(row, t, t is tokenizers[0]) for t in tokenizers)
    groups = []
    for a, b in zip(our_answers, their_answers, strict=True):
        if align == "uld":
            groups += [([i], [j]) for i, j in zip(a, b, strict=False)]
            continue
        ends = [cuts(t, [ids[i] for i in own]) for t, ids, own in zip(tokenizers, (ours, theirs), (a, b), strict=True)]
        if ends[0][-1] != ends[1][-1]:  # a space at the end that one template takes off: with the rest of the word
            limit = min(ends[0][-1], ends[1][-1])
            specials = []
        else:
            limit, specials = ends[0][-1], [([a[-1]], [b[-1]])]
        text = [end[:-1] for end in ends]
        common = sorted(set(text[0]) & set(text[1]) & set(range(limit + 1)))
        for low, high in zip([-1, *common], common, strict=False):
            groups.append(tuple([i for i, e in zip(own, end, strict=False) if low < e <= high]
                                for own, end in zip((a, b), text, strict=True)))  # fmt: skip
        groups += specials
    groups = [g for g in groups if all(0 < i < longest for side in g for i in side)]
    scored = [[i for own in found for i in own if 0 < i < longest] for found in (our_answers, their_answers)]
    return (ours[:longest], theirs[:longest]), groups, scored


@torch.no_grad()
def naive(student, teacher, rows, tokenizers, align, temperature=1.0, soft=1.0, hard=0.0, longest=10**9):
    """Every figure from all the logits of one row at a time, in float64 and plain Python."""
    distance = nll = taught = tokens = groups = matched = taught_tokens = 0.0
    for row in rows:
        ids, found, scored = pairs_of(row, align, tokenizers, longest)
        z, y = (m.eval()(torch.tensor([i])).logits[0].double() for m, i in zip((student, teacher), ids, strict=True))
        log_q, log_p = z.log_softmax(-1), y.log_softmax(-1)
        for ours, theirs in found:
            if align == "uld":
                q, p = ((x[i - 1] / temperature).softmax(-1).tolist() for x, i in ((z, ours[0]), (y, theirs[0])))
                q, p = sorted(q, reverse=True), sorted(p, reverse=True)
                q, p = q + [0.0] * (len(p) - len(q)), p + [0.0] * (len(q) - len(p))
                distance += sum(abs(a - b) for a, b in zip(q, p, strict=True))
                taught -= float(log_p[theirs[0] - 1, ids[1][theirs[0]]])
                taught_tokens += 1
            else:
                q, p = (
                    math.exp(sum(float(x[i - 1, own[i]]) for i in places) / temperature)
                    for x, own, places in ((log_q, ids[0], ours), (log_p, ids[1], theirs))
                )
                distance += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
            matched += len(ours)
        groups += len(found)
        nll -= sum(float(log_q[i - 1, ids[0][i]]) for i in scored[0])
        tokens += len(scored[0])
        if align == "spans":
            taught -= sum(float(log_p[i - 1, ids[1][i]]) for i in scored[1])
            taught_tokens += len(scored[1])
    return {
        "loss": (soft * distance + hard * nll) / tokens,
        {"uld": "uld", "spans": "span"}[align]: distance / groups,
        "aligned": matched / tokens,
        "perplexity": math.exp(nll / tokens),
        "teacher_perplexity": math.exp(taught / taught_tokens),
    }


@pytest.mark.parametrize("align", ["uld", "spans"])
@pytest.mark.parametrize("name", ["bytes", "pieces"])
@pytest.mark.parametrize("kind", ["completions", "conversations", "texts"])
def test_every_figure_is_the_naive_one(distill, request, tokenizer, teachers, align, name, kind):
    rows = None if kind == "completions" else request.getfixturevalue(kind)
    rows = request.getfixturevalue("sft_rows").select(range(16)) if rows is None else rows
    student = tiny_model(max_position_embeddings=256)
    options = dict(align=align, temperature=2.0, distillation_weight=0.7, crossentropy_weight=0.3)
    trainer = distill(name, student, rows=rows, per_device_eval_batch_size=4, **options)
    assert trainer.data_collator.layout == "segments"
    both = (tokenizer, teachers[name])
    want = naive(student, teacher_model(teachers[name]), rows.select(range(11)), both, align, 2.0, 0.7, 0.3)
    found = trainer.evaluate()
    assert 0.1 < want["aligned"] <= 1 and want["loss"] > 0
    for key, value in want.items():
        close(found[f"eval_{key}"], value)
