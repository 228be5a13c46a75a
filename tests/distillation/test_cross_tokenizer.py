"""Distillation across tokenizers: every figure by a naive computation, however the work is cut up; and refusals."""

import math

import pytest
import torch
from conftest import WORDS, close, sentences, tiny_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rlhf import DistillConfig, DistillTrainer
from rlhf.cli.parsing import parse
from rlhf.data import Collator
from rlhf.distillation.alignment import align_answer
from rlhf.logprobs import Divergence, Predictions, compare_sorted
from rlhf.logprobs.head import Head
from rlhf.losses import uld_loss

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

    def places(text, spans, special=False):
        """Ids of the whole text, and the places of the tokens that reach into each span of characters."""
        found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        offsets = list(enumerate(found["offset_mapping"]))
        return found["input_ids"], [[i for i, (a, b) in offsets if a < end and b > start] for start, end in spans]

    if "text" in row:
        whole = [*tokenizer(row["text"])["input_ids"], eos]
        return whole, [list(range(whole[0] == tokenizer.bos_token_id, len(whole)))]
    if "prompt" in row:
        text = row["prompt"] + row["completion"]
        whole, (answer,) = places(text, [(len(row["prompt"]), len(text))], special=True)
        return [*whole, eos], [[*answer, len(whole)]]
    done, spans = "", []
    for turn in row["messages"]:
        role, text = turn["role"], turn["content"]
        if role == "user":
            done += f"<|im_start|>user\n{text}<|im_end|>\n" if student else f"<s>user:\n\n{text.strip()}</s>"
            continue
        done += "<|im_start|>assistant\n" if student else "<s>assistant:\n\n"
        start = len(done)
        done += f"{text}<|im_end|>" if student else f"{text.strip()}</s>"
        spans.append((start, len(done)))
        done += "\n" if student and turn is not row["messages"][-1] else ""
    return places(done, spans)


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


def trained(distill, align, **changes):
    options = dict(align=align, crossentropy_weight=0.5, optim="sgd", learning_rate=0.3, max_steps=3) | changes
    trainer = distill("pieces", **options)
    trainer.train()
    names = ("loss", "grad_norm", {"uld": "uld", "spans": "span"}[align], "aligned", "perplexity", "teacher_perplexity")
    return [{n: entry[n] for n in names} for entry in logs(trainer)], dict(trainer.model.model.named_parameters())


@pytest.mark.parametrize("align", ["uld", "spans"])
def test_the_numbers_are_the_same_however_the_work_is_cut_up(distill, align):
    log, weights = trained(distill, align, per_device_train_batch_size=8, layout="segments")
    assert log[-1]["loss"] < log[0]["loss"]
    for changes in (
        dict(per_device_train_batch_size=1, gradient_accumulation_steps=8),
        dict(per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=1),
        dict(per_device_train_batch_size=8, layout="rows", dataloader_num_workers=1),
        dict(per_device_train_batch_size=8, collator=Collator(7, padding_side="left")),
    ):
        if changes.get("max_steps"):  # six rows a step
            want, end = trained(distill, align, per_device_train_batch_size=6, max_steps=1)
        else:
            want, end = log, weights
        found, found_end = trained(distill, align, **changes)
        for one, other in zip(found, want, strict=True):
            for key in other:
                close(one[key], other[key])
        for key, value in end.items():
            close(found_end[key].detach(), value.detach())


@pytest.mark.parametrize("align", ["uld", "spans"])
def test_batches_planned_by_tokens(distill, align):
    options = dict(max_steps=1, gradient_accumulation_steps=16)
    one, other = (trained(distill, align, **changes)[0][0] for changes in (options, options | {"tokens_per_batch": 90}))
    for key in one:
        close(other[key], one[key])


@pytest.mark.parametrize("align", ["uld", "spans"])
def test_what_is_cut_off_either_side_is_in_no_pair(distill, tokenizer, teachers, texts, align):
    """The two tokenizers need unequal lengths: each side loses another part of the text."""
    for longest in (6, 14):
        trainer = distill("bytes", rows=texts, align=align, max_length=longest)
        both = (tokenizer, teachers["bytes"])
        want = naive(tiny_model(), teacher_model(both[1]), texts.select(range(11)), both, align, longest=longest)
        found = trainer.evaluate()
        for key, value in want.items():
            close(found[f"eval_{key}"], value)
        if align == "spans":  # by position, what is left is beside each other whatever it says
            assert 0 < found["eval_aligned"] < 0.8


@pytest.mark.parametrize("align", ["uld", "spans"])
def test_a_student_comes_nearer(distill, align):
    trainer = distill(align=align, max_steps=40, learning_rate=1e-2)
    name = {"uld": "eval_uld", "spans": "eval_span"}[align]
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after[name] < 0.7 * before[name]
    close(after["eval_teacher_perplexity"], before["eval_teacher_perplexity"])


def test_a_teacher_is_read_from_its_folder(distill, tmp_path, teachers):
    folder = tmp_path / "teacher"
    teacher_model(teachers["bytes"]).save_pretrained(folder)
    teachers["bytes"].save_pretrained(folder)
    read, given = distill(teacher=str(folder), teacher_tokenizer=None), distill()
    close(read.evaluate()["eval_loss"], given.evaluate()["eval_loss"])


@pytest.mark.parametrize("align", ["uld", "spans"])
def test_a_student_that_runs_its_own_head_and_a_teacher_in_rows(distill, teachers, align):
    """An adapter on the head, new, changes nothing; StableLM's attention takes no segments."""
    teacher = tiny_model("stablelm", vocab_size=300, seed=1)
    plain = distill(teacher=teacher, align=align)
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["lm_head"]))
    trainer = distill(student=adapted, teacher=teacher, align=align, crossentropy_weight=0.0)
    assert trainer.data_collator.layout == "rows"
    close(trainer.evaluate()["eval_loss"], plain.evaluate()["eval_loss"])
    trainer.train()
    assert logs(trainer)[0]["grad_norm"] > 0


def kept(logits, temperature):
    return (logits / temperature).softmax(-1).sort(-1, descending=True).values


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_gradient_is_autograds(chunk_size, frozen):
    g = torch.Generator().manual_seed(0)
    N, M, H, V, W = 9, 7, 5, 11, 17
    rows, weight, bias, theirs, their_weight = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((N, H), (V, H), (V,), (M, H), (W, H))
    )
    token, beside = torch.randint(V, (N,), generator=g), torch.randint(W, (M,), generator=g)
    partner = torch.tensor([-1, 0, 2, -1, 3, 4, 6, 5, -1])
    weights = Divergence(temperature=1.7, distillation_weight=0.6, crossentropy_weight=0.3)

    def head():
        return Head(*(p.clone().requires_grad_(not frozen) for p in (weight, bias)), scale=0.5, softcap=4.0)

    own, mine = rows.clone().requires_grad_(), head()
    got = compare_sorted(
        Predictions(own, mine), Predictions(theirs, Head(their_weight)), token, beside, partner, weights,
        chunk_size=chunk_size,
    )  # fmt: skip
    plain, other = rows.clone().requires_grad_(), head()
    z, y = other.logits(plain), theirs @ their_weight.T
    has = partner >= 0
    p = torch.nn.functional.pad(kept(z[has], 1.7), (0, W - V))
    uld = torch.zeros(N, dtype=torch.float64).index_put(
        (has.nonzero().squeeze(1),), (kept(y[partner[has]], 1.7) - p).abs().sum(-1)
    )
    logps = z.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    want = (0.6 * uld - 0.3 * logps).sum()
    close(got.loss.detach(), want.detach(), torch.float64)
    close(got.teacher.divergence, uld.detach(), torch.float64)
    close(got.logps, logps.detach(), torch.float64)
    (2 * got.loss).backward(), (2 * want).backward()
    pairs = [(own, plain)] if frozen else [(own, plain), (mine.weight, other.weight), (mine.bias, other.bias)]
    for one, two in pairs:
        close(one.grad, two.grad, torch.float64)
    with torch.no_grad():
        close(compare_sorted(Predictions(rows, head()), Predictions(theirs, Head(their_weight)), token, beside, partner,
                             weights).loss, want.detach(), torch.float64)  # fmt: skip
    logits = compare_sorted(Predictions(z.detach()), Predictions(y), token, beside, partner, weights)
    close(logits.loss, want.detach(), torch.float64)
    close(logits.teacher.logps, got.teacher.logps, torch.float64)


def test_no_more_logits_than_a_chunk(monkeypatch):
    seen = []

    def watched(student_logits, *args, **kwargs):
        seen.append(student_logits.shape)
        return uld_loss(student_logits, *args, **kwargs)

    monkeypatch.setattr("rlhf.logprobs.sorted_comparison.uld_loss", watched)
    head, other = Head(torch.randn(300, 4, requires_grad=True)), Head(torch.randn(500, 4))
    token = torch.zeros(40, dtype=torch.int64)
    compare_sorted(
        Predictions(torch.randn(40, 4), head), Predictions(torch.randn(40, 4), other), token, token, torch.arange(40),
        Divergence(), chunk_size=16,
    )  # fmt: skip
    assert seen == [(16, 300), (16, 300), (8, 300)]
    with pytest.raises(ValueError, match="got 40, 39 and 40 rows; teacher and teacher_token too, got 40 and 40"):
        compare_sorted(Predictions(torch.randn(40, 4), head), Predictions(torch.randn(40, 4), other), token[1:], token,
                       torch.arange(40), Divergence())  # fmt: skip


@pytest.mark.parametrize(
    ("student", "teacher", "want"),
    [
        ([b"cat", b"s", None], [b"ca", b"ts", None], ([0, 0, 1], [0, 0, 1])),
        ([b"<think>", b"\n\n", b"the", b" cat", None], [b"the cat", None], ([-1, -1, 0, 0, 1], [0, 1])),
        ([b"\n\nthe", b" cat", None], [b"the", b" cat", None], ([-1, 0, 1], [-1, 0, 1])),  # a token half of it
        ([b"the", b" cat", b"\n", None], [b" ", b"the", b" ca", b"t", None], ([0, 1, -1, -1], [0, 0, 1, 1, -1])),
        ([b"\n"], [b"  "], ([-1], [-1])),
    ],
)
def test_answers_with_more_around_them(student, teacher, want):
    for one, other, (ours, theirs) in ((student, teacher, want), (teacher, student, want[::-1])):
        found = align_answer(one, other)
        assert (found.student.tolist(), found.teacher.tolist()) == (ours, theirs)
        assert found.total == max(ours) + 1
    with pytest.raises(ValueError, match="do not have the same text: they differ at byte 3"):
        align_answer([b"the", b" cat"], [b"the", b"n"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(align="tokens"), "align must be one of uld, spans, got 'tokens'"),
        (dict(align="uld", teacher_file="x"), "align uld needs the teacher itself, not teacher_file: teacher_model"),
        (dict(align="uld", teacher_server_url="http://x", teacher_server_model="x"), "itself, not teacher_server_url"),
        (dict(align="uld", hidden_state_weight=1.0), "hidden_state_weight compares token by token"),
        (dict(align="spans", lmbda=0.5), "align spans reads the text of rows, and lmbda would give ids"),
        (
            dict(align="uld", beta=0.5, teacher_estimate="truncate"),
            "a loss of its own: leave beta, teacher_estimate out",
        ),
        (dict(align="spans", divergence="kl_divergence", reverse=True), "of its own: leave divergence, reverse out"),
        (dict(align="spans", temperature=0.0), "temperature must be"),
        (dict(align="uld", crossentropy_weight=-1.0), "crossentropy_weight must be at least 0"),
    ],
)
def test_options_that_do_not_fit_are_refused_at_once(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        DistillConfig(str(tmp_path), use_cpu=True, **options)
    assert "\n" not in str(error.value)


def test_what_cannot_be(distill, tokenizer, teachers, tmp_path, conversations):
    with pytest.raises(ValueError, match=r"another tokenizer: .*; pass --align uld or --align spans to learn from it"):
        distill(align=None)
    with pytest.raises(ValueError, match="the same tokenizer: leave --align out"):
        distill(teacher=tiny_model(seed=1), teacher_tokenizer=tokenizer)
    with pytest.raises(ValueError, match="align uld needs the teacher's tokenizer: pass teacher_processing_class"):
        distill(teacher_tokenizer=None)
    with pytest.raises(ValueError, match="the student's own model has the same tokenizer; pass --teacher_model_name"):
        config = DistillConfig(str(tmp_path), use_cpu=True, align="spans")
        DistillTrainer(get_peft_model(tiny_model(), LoraConfig()), args=config, processing_class=tokenizer)
    with pytest.raises(
        ValueError, match="rows of 'input_ids' are in one tokenizer already, and --align needs their te"
    ):
        distill(rows=Dataset.from_list([{"input_ids": [1, 2, 3]}] * 11))
    with pytest.raises(ValueError, match=r"align uld needs a rlhf.data.Collator, got function"):
        distill(collator=(lambda rows: Collator()(rows)))
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[UNK]")
    with pytest.raises(
        ValueError, match=r"--align spans \(--align uld compares without a common text\): the tokenizer"
    ):
        distill(teacher=tiny_model(seed=1), teacher_tokenizer=other, align="spans")
    assert math.isfinite(distill(teacher=tiny_model(seed=1), teacher_tokenizer=other).evaluate()["eval_loss"])
    with pytest.raises(
        ValueError, match="row 1: for the teacher, whose template is its tokenizer's: the data is conver"
    ):
        distill(teacher=tiny_model(seed=1), teacher_tokenizer=other, rows=conversations)
    with pytest.raises(ValueError, match=r"row 1: for the teacher, .*: token \d+ in 'input_ids' is outside .* of 120"):
        distill(teacher=tiny_model(seed=1, vocab_size=120))
    rows = Dataset.from_list([{"prompt": "the", "completion": " naïve 🙂"}] * 11)
    with pytest.raises(
        ValueError, match=r"row 1: --align spans .*: the two tokenizers do not have the same text: they"
    ):
        distill("pieces", rows=rows, align="spans")  # what it has no piece for is unknown to it


def test_from_the_command_line(tmp_path):
    argv = ["--align", "spans", "--output_dir", str(tmp_path), "--use_cpu"]
    assert parse("distill", (DistillConfig,), argv)[0].align == "spans"
    with pytest.raises(ValueError, match="align"):
        parse("distill", (DistillConfig,), ["--align", "tokens", *argv[2:]])
