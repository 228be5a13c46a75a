"""The student's own answers: who is asked, what is learned from them, and a teacher on a server."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import close, sentences, tiny_model
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "rollouts"))
from fake_server import FakeServer

from rlhf import DistillConfig, DistillTrainer
from rlhf.distillation.on_policy import answered_row, mark_prompts, reverse_kl_loss
from rlhf.logprobs import Scores
from rlhf.rollouts import Completion, LocalEngine, ServerError

OPTIONS = dict(max_steps=3, logging_steps=1, learning_rate=1e-3, report_to="none", save_strategy="no")
SHORT = dict(max_length=64, max_completion_length=6)


class Recorder:
    """An engine that remembers what it gave."""

    def __init__(self, engine):
        self.engine, self.given = engine, []

    def generate(self, prompts, n, sampling, seed, index=None):
        groups = self.engine.generate(prompts, n, sampling, seed, index)
        self.given += [(list(prompt), group[0].ids) for prompt, group in zip(prompts, groups, strict=True)]
        return groups

    def __getattr__(self, name):
        return getattr(self.engine, name)


@pytest.fixture
def distill(tmp_path, tokenizer, sft_rows):
    def make(model=None, teacher=None, rows=None, folder="run", record=False, **changes):
        model = tiny_model() if model is None else model
        trainer = DistillTrainer(
            model,
            teacher,
            DistillConfig(str(tmp_path / folder), use_cpu=True, disable_tqdm=True, **{**OPTIONS, **SHORT, **changes}),
            train_dataset=sft_rows if rows is None else rows,
            eval_dataset=sft_rows.select(range(5)),
            processing_class=tokenizer,
            teacher_processing_class=tokenizer,
        )
        if record:
            trainer.rollouts.sampler.engine = Recorder(trainer.rollouts.sampler.engine)
        return trainer

    return make


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def naive(student, teacher, given):
    """KL(p, q), KL(q, p) and log q - log p of each answer's tokens, from all logits, in float64; sums and count."""
    forward = reverse = sampled = count = 0.0
    for prompt, ids in given:
        q, p = (m.eval()(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1) for m in (student, teacher))
        for place, token in enumerate(ids, start=len(prompt) - 1):
            forward += float((p[place].exp() * (p[place] - q[place])).sum())
            reverse += float((q[place].exp() * (q[place] - p[place])).sum())
            sampled += float(q[place, token] - p[place, token])
            count += 1
    return forward / count, reverse / count, sampled / count


@pytest.mark.parametrize("layout", ["segments", "rows"])
def test_the_loss_is_that_of_the_students_own_answers(distill, layout):
    teacher = tiny_model("qwen2", seed=1)
    options = dict(lmbda=1.0, per_device_train_batch_size=4, gradient_accumulation_steps=3, max_steps=1, layout=layout)
    exact = distill(teacher=teacher, record=True, divergence="kl_divergence", reverse=True, **options)
    exact.train()
    given = exact.rollouts.sampler.engine.given
    assert len(given) == 12 and all(1 <= len(ids) <= 6 for _, ids in given)
    forward, reverse, sampled = naive(tiny_model(), teacher, given)
    close(logs(exact)[0]["loss"], reverse)
    close(logs(exact)[0]["kl"], forward)
    lengths = [len(ids) for _, ids in given]
    close(logs(exact)[0]["completions/mean_length"], sum(lengths) / 12)
    assert logs(exact)[0]["own_answers"] == 1
    rewarded = distill(teacher=teacher, record=True, reverse_kl_reward=True, **options)
    rewarded.train()
    assert rewarded.rollouts.sampler.engine.given == given  # the same answers, from the same seed
    close(logs(rewarded)[0]["loss"], sampled)
    close(logs(rewarded)[0]["reverse_kl"], sampled)


def test_the_reward_has_the_gradient_of_thereverse_kl_loss():
    """Over all tokens that can be drawn, each as often as it is drawn."""
    torch.manual_seed(0)
    z, p = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64).log_softmax(0)
    q = z.log_softmax(0)
    kl = (q.exp() * (q - p)).sum()
    (want,) = torch.autograd.grad(kl, z, retain_graph=True)
    losses = reverse_kl_loss(Scores(q), p)
    (got,) = torch.autograd.grad((losses * q.detach().exp()).sum(), z)
    close((losses * q.exp()).sum(), kl, torch.float64)
    close(got, want, torch.float64)


def test_a_share_of_the_rows_whatever_the_batches(distill):
    """Half of the rows: which, and what is answered, depends on no batch size."""
    teacher = tiny_model(seed=1)
    whole = distill(teacher=teacher, lmbda=0.5, record=True, per_device_train_batch_size=8, adam_epsilon=1e-5)
    parts = distill(
        teacher=teacher, lmbda=0.5, record=True, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        layout="rows", adam_epsilon=1e-5,
    )  # fmt: skip
    whole.train(), parts.train()
    given = whole.rollouts.sampler.engine.given
    assert 6 <= len(given) <= 18 and given == parts.rollouts.sampler.engine.given
    for one, other in zip(logs(whole), logs(parts), strict=True):
        for name in ("loss", "kl", "own_answers", "completions/mean_length", "num_tokens"):
            close(one[name], other[name])


def test_lambda_0_is_offline(distill):
    teacher = tiny_model(seed=1)
    offline, own = distill(teacher=teacher), distill(teacher=teacher, lmbda=1e-9)
    offline.train(), own.train()
    assert [entry["loss"] for entry in logs(offline)] == [entry["loss"] for entry in logs(own)]
    assert offline.rollouts is None and own.rollouts is not None


def test_resumed_is_uninterrupted(distill, tmp_path):
    options = dict(teacher=tiny_model(seed=1), lmbda=0.5, max_steps=4, per_device_train_batch_size=4)
    whole = distill(**options, save_strategy="steps", save_steps=2)
    whole.train()
    second = distill(folder="again", **options)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, weight in whole.policy.model.state_dict().items():
        close(second.policy.model.state_dict()[name], weight)
    assert logs(second)[-1]["loss"] == logs(whole)[-1]["loss"]


@pytest.mark.parametrize("options", [dict(beta=1.0), dict(reverse_kl_reward=True)])
def test_a_student_comes_nearer_by_its_own_answers(distill, options):
    trainer = distill(teacher=tiny_model(seed=1), lmbda=1.0, max_steps=40, learning_rate=1e-2, **options)
    trainer.train()
    name = "reverse_kl" if "reverse_kl_reward" in options else "loss"
    first, last = (sum(entry[name] for entry in part) / 5 for part in (logs(trainer)[:5], logs(trainer)[-5:]))
    assert last < 0.7 * first
    assert trainer.evaluate()["eval_kl"] > 0  # of the rows as they are


def test_the_answers_are_those_of_the_student_as_it_is(distill, tokenizer):
    """At each step: what an engine around the weights before it gives."""
    trainer = distill(teacher=tiny_model(seed=1), lmbda=1.0, record=True, learning_rate=1e-2, max_steps=2)
    seen = []

    class Twin:
        def generate(self, *request):
            seen.append([group[0].ids for group in LocalEngine(trainer.policy.model, tokenizer).generate(*request)])

    recorder = trainer.rollouts.sampler.engine
    own = recorder.generate

    def generate(prompts, n, sampling, seed, index=None):
        Twin().generate(prompts, n, sampling, seed, index)
        return own(prompts, n, sampling, seed, index)

    recorder.generate = generate
    trainer.train()
    assert [ids for step in seen for ids in step] == [ids for _, ids in recorder.given] and len(seen) == 2


def test_the_prompt_is_what_comes_before_the_last_answer():
    rows = Dataset.from_list(
        [
            {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
            {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, -100]},  # two turns, and the template's newline
        ]
    )
    assert mark_prompts(rows, 10, False)["answer_start"] == [2, 3]
    with pytest.raises(ValueError, match=r"row 2: its prompt has 3 tokens, .* leaves 2: raise max_length, or"):
        mark_prompts(rows, 2, False)
    assert mark_prompts(rows, 2, True)["row_number"] == [0]
    with pytest.raises(ValueError, match="no prompt has at most the 1 tokens"):
        mark_prompts(rows, 1, True)


def test_text_has_no_prompt(distill):
    with pytest.raises(ValueError, match="row 1 is all scored, so it has no prompt"):
        distill(teacher=tiny_model(seed=1), lmbda=1.0, rows=Dataset.from_dict({"text": sentences(1, 4)}))


def test_an_answer_ends_before_a_token_that_no_teacher_knows():
    answer = Completion([5, 6, 331, 7], [0.0] * 4, "length", 0)
    assert answered_row([1, 2], answer, None)["input_ids"] == [1, 2, 5, 6, 331, 7]
    assert answered_row([1, 2], answer, 330) == {"input_ids": [1, 2, 5, 6], "labels": [-100, -100, 5, 6]}
    assert answered_row([1, 2], answer, 5) is None


def test_padded_heads_are_sampled_from(distill, tokenizer):
    known = len(tokenizer)
    student, teacher = tiny_model(vocab_size=known + 90), tiny_model(vocab_size=known + 8, seed=1)
    trainer = distill(student, teacher, lmbda=1.0, max_steps=4, sampling_temperature=3.0)
    trainer.train()
    assert all(0 < entry["loss"] < 1 for entry in logs(trainer))
    with pytest.raises(ValueError, match=r"reverse_kl_reward reads log-probs over whole heads.*use --beta 1"):
        distill(tiny_model(vocab_size=known + 90), teacher, lmbda=1.0, reverse_kl_reward=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lmbda=1.5), r"lmbda must be in \[0, 1\], got 1.5"),
        (dict(reverse_kl_reward=True), "set lmbda to 1"),
        (dict(reverse_kl_reward=True, lmbda=1.0, sampling_temperature=0.7), "it is a sample of the KL"),
        (dict(lmbda=0.5, teacher_file="x"), "no predictions for the student's own answers"),
        (dict(lmbda=0.5, packing=True), "unknown for answers to be"),
        (dict(lmbda=0.5, crossentropy_weight=1.0), "train the student on its own answers"),
        (dict(lmbda=0.5, max_length=64, max_completion_length=64), "leaves no room for a prompt"),
        (dict(lmbda=0.5, sampling_temperature=-1.0), "temperature must be at least 0"),
        (dict(teacher_server_url="http://x"), "needs teacher_server_model"),
        (dict(teacher_server_url="http://x", teacher_server_model="y", temperature=2.0), "at temperature 1 alone"),
        (dict(teacher_server_url="http://x", teacher_server_model="y", teacher_file="z"), "stands for a teacher"),
        (dict(teacher_server_url="http://x", teacher_server_model="y", teacher_top_k=0), "teacher_top_k must be"),
        (dict(teacher_server_url="http://x", teacher_server_model="y", divergence="skew_kl"), "skew_kl has no estim"),
    ],
)
def test_options_that_do_not_fit_are_refused_at_once(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(str(tmp_path), use_cpu=True, **options)


# A teacher on a server


@pytest.fixture
def server(tokenizer):
    one = FakeServer(tiny_model(seed=1), tokenizer, weights="vllm")
    yield one
    one.shutdown()


def there(server, **changes):
    return dict(teacher_server_url=server.url, teacher_server_model="tiny") | changes


def test_packed_rows_reach_a_server_one_by_one(distill, server):
    far = distill(**there(server, teacher_top_k=330), packing=True, max_length=128)
    near = distill(teacher=tiny_model(seed=1), packing=True, max_length=128)
    far.train(), near.train()
    for one, other in zip(logs(far), logs(near), strict=True):
        close(one["loss"], other["loss"])


@pytest.mark.parametrize("lmbda", [0.0, 0.5])
def test_a_server_that_tells_all_is_the_live_teacher(distill, server, lmbda):
    """k = V: nothing is left out."""
    options = dict(lmbda=lmbda, beta=0.3, adam_epsilon=1e-5)
    far = distill(**there(server, teacher_top_k=330), **options)
    near = distill(teacher=tiny_model(seed=1), **options)
    far.train(), near.train()
    for one, other in zip(logs(far), logs(near), strict=True):
        for name in ("loss", "grad_norm", "teacher_perplexity"):
            close(one[name], other[name])
    assert "eval_perplexity" in far.evaluate()  # of the student alone


def test_a_server_rewards_as_the_live_teacher_does(distill, server):
    options = dict(lmbda=1.0, reverse_kl_reward=True, adam_epsilon=1e-5)
    far = distill(**there(server, teacher_top_k=1), **options)
    near = distill(teacher=tiny_model(seed=1), **options)
    far.train(), near.train()
    for one, other in zip(logs(far), logs(near), strict=True):
        for name in ("loss", "grad_norm", "reverse_kl"):
            close(one[name], other[name])


def test_few_tokens_of_a_server_say_less(distill, server):
    few, all_ = (distill(**there(server, teacher_top_k=k), divergence="kl_divergence", max_steps=1) for k in (4, 330))
    few.train(), all_.train()
    assert 0 < logs(few)[0]["loss"] < logs(all_)[0]["loss"]


def test_servers_that_cannot_teach(distill, server, tokenizer):
    server.engine.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    server.engine.tokenizer.add_tokens(["naïve"])
    with pytest.raises(ValueError, match=r"the teacher on .* has another tokenizer"):
        distill(**there(server))
    other = FakeServer(tiny_model(seed=1), tokenizer, weights="sglang")
    with pytest.raises(ServerError, match="reports no prompt_logprobs, which a teacher must: serve it with vLLM"):
        distill(**there(other)).train()
    other.shutdown()
    with pytest.raises(ConnectionError, match="does not answer"):
        distill(teacher_server_url="http://127.0.0.1:9", teacher_server_model="tiny", server_startup_timeout=0.0)
    with pytest.raises(ValueError, match="serves tiny, not 'huge'"):
        distill(teacher_server_url=server.url, teacher_server_model="huge")
