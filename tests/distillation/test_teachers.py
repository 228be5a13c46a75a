"""Teachers and the student's own answers one by one, without a trainer."""

from types import SimpleNamespace

import pytest
import torch
from conftest import close, tiny_model
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from rlhf.data import Collator
from rlhf.distillation.aligned_rows import Alignment
from rlhf.distillation.alignment import Spans
from rlhf.distillation.cross_tokenizer import span_distances
from rlhf.distillation.on_policy import StudentRollouts, rollout_metrics
from rlhf.distillation.teacher_file import TEACHER_ROW
from rlhf.distillation.teacher_setup import adapter_off_teaches, shared_vocabulary
from rlhf.distillation.teachers import AdapterTeacher, FileTeacher, LiveTeacher
from rlhf.logprobs import Divergence, TopK
from rlhf.models import Policy
from rlhf.rollouts import Completion, Sampling

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, 8, 9]},
    {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]},
]
TOKENS = 6  # scored


@torch.no_grad()
def plain(student, teacher):
    """Sums of each row from all logits: JSD at 1/2, KL(p, q), and the log-probs of both."""
    sums = []
    for row in ROWS:
        ids = torch.tensor([row["input_ids"]])
        log_q, log_p = (model.eval()(ids).logits[0, :-1].double().log_softmax(-1) for model in (student, teacher))
        mean = (log_q.exp() + log_p.exp()).log() - torch.tensor(2.0).log()
        jsd = (F.kl_div(mean, log_p, log_target=True, reduction="sum") + F.kl_div(
            mean, log_q, log_target=True, reduction="sum")) / 2  # fmt: skip
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        tokens = ids[0, 1:, None]
        sums.append([jsd, kl, log_q.gather(1, tokens).sum(), log_p.gather(1, tokens).sum()])
    return torch.tensor(sums).T


def test_a_live_teacher_measures_the_plain_sums_of_each_row():
    student, teacher = tiny_model(), tiny_model("qwen2", seed=1)
    source = LiveTeacher(Divergence(crossentropy_weight=0.5), Policy(teacher))
    measures = source.measure(Policy(student), Collator()(ROWS))
    jsd, kl, logps, teacher_logps = plain(student, teacher)
    close(measures.loss, jsd - 0.5 * logps)
    close(measures.total.detach(), (jsd - 0.5 * logps).sum())
    close(measures.metrics["kl"][0], kl)
    close(measures.metrics["teacher_perplexity"][0], -teacher_logps)
    assert measures.counts.tolist() == [4, 2]


def test_the_log_probs_of_single_tokens_have_no_gradient():
    student, teacher = Policy(tiny_model()), Policy(tiny_model(seed=1))
    batch = Collator()(ROWS)
    logps = LiveTeacher(Divergence(), teacher).token_logps(student, batch)
    assert not logps.requires_grad and len(logps) == TOKENS
    close(logps, teacher(batch).logps.detach())


def test_an_adapter_is_switched_for_the_teachers_pass_alone():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", lora_dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    student = Policy(model).train()
    source = AdapterTeacher(Divergence())
    close(source.token_logps(student, Collator()(ROWS)), Policy(tiny_model())(Collator()(ROWS)).logps.detach())
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        with_adapter = Policy(model.eval())(Collator()(ROWS)).logps
    assert (with_adapter - source.token_logps(student, Collator()(ROWS))).abs().max() > 0.01


def test_a_model_without_its_adapter_teaches_unless_it_is_trained_too():
    assert adapter_off_teaches(get_peft_model(tiny_model(), LoraConfig()), is_new=False)
    with pytest.raises(ValueError, match="with its adapter off would be trained too"):
        adapter_off_teaches(get_peft_model(tiny_model("gpt2"), LoraConfig(bias="all")), is_new=False)


class Folder:
    """What a source asks of a teacher's folder."""

    def of_examples(self, examples, collate):
        if TEACHER_ROW not in examples[0]:
            return None
        rows = torch.tensor([0.6, 0.3]).log().expand(TOKENS, 2)
        return TopK(torch.tensor([[1, 2]]).expand(TOKENS, 2), rows, torch.full((TOKENS,), 0.1).log())


def test_a_folder_covers_the_rows_that_it_numbers():
    source = FileTeacher(Divergence("kl_divergence"), Folder())
    collate = source.collator(Collator())
    assert not source.covers(collate(ROWS))
    batch = collate([{**row, TEACHER_ROW: number} for number, row in enumerate(ROWS)])
    assert source.covers(batch)
    measures = source.measure(Policy(tiny_model()), batch)
    assert set(measures.metrics) == {"perplexity", "divergence"}
    close(measures.metrics["divergence"][0], measures.loss)
    with pytest.raises(NotImplementedError, match="FileTeacher has no log-probs of single tokens"):
        source.token_logps(Policy(tiny_model()), batch)


def test_heads_of_two_sizes_are_compared_on_the_tokens_of_the_tokenizer(tokenizer):
    student, teacher = Policy(tiny_model(vocab_size=340)), Policy(tiny_model(vocab_size=352))
    assert shared_vocabulary(student, student, None) is None
    assert shared_vocabulary(student, teacher, tokenizer) == max(tokenizer.get_vocab().values()) + 1
    with pytest.raises(ValueError, match="has 340 tokens, the teacher 352: pass teacher_processing_class"):
        shared_vocabulary(student, teacher, None)


def test_a_span_has_its_loss_at_the_token_that_begins_it():
    logps = torch.tensor([-1.0, -2.0, -3.0, -0.5], requires_grad=True)
    teacher_logps = torch.tensor([-1.5, -1.5, -0.25])
    # Two spans: tokens 1 and 2 of the student with tokens 0 and 1 of the teacher, and the last ones.
    spans = Spans(torch.tensor([-1, 0, 0, 1]), torch.tensor([0, 0, 1]), 2)
    alignment = Alignment(SimpleNamespace(), spans, torch.tensor([-1, 0, -1, 2]))
    distances = span_distances(logps, teacher_logps, alignment, temperature=1.0)
    p, q = torch.tensor([-3.0, -0.25]).exp(), torch.tensor([-5.0, -0.5]).exp()
    want = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    close(distances.detach(), torch.stack([torch.tensor(0.0), want[0], torch.tensor(0.0), want[1]]))
    distances.sum().backward()
    assert logps.grad[0] == 0 and logps.grad[1] == logps.grad[2] != 0


class Echo:
    """A sampler whose engine answers with the last token of the prompt, twice."""

    def __init__(self):
        self.calls, self.engine = [], self

    def sample(self, policy, trained_model, step, draw):
        return draw()

    def generate(self, prompts, n, sampling, seed, index):
        self.calls.append((seed, list(index)))
        return [[Completion([prompt[-1]] * 2, [0.0] * 2, "length", 0)] for prompt in prompts]


def rows_to_answer(count):
    return [
        {"input_ids": [1, 2, 3, number + 10], "labels": [-100] * 3 + [number + 10], "row_number": number,
         "answer_start": 3}
        for number in range(count)
    ]  # fmt: skip


def test_the_answers_do_not_depend_on_how_rows_are_batched():
    rows = rows_to_answer(40)
    whole, parts = StudentRollouts(Echo(), Sampling(), 0.5, 7), StudentRollouts(Echo(), Sampling(), 0.5, 7)
    one, _ = whole.answer([rows], None, None, step=3)
    two, _ = parts.answer([rows[:13], rows[13:]], None, None, step=3)
    assert one[0] == two[0] + two[1] and [len(batch) for batch in two] == [13, 27]
    assert whole.sampler.calls == parts.sampler.calls
    answered = [row for row in one[0] if row["input_ids"] == [1, 2, 3, 3, 3]]
    assert 10 < len(answered) < 30 and answered[0]["labels"] == [-100] * 3 + [3, 3]
    other, _ = StudentRollouts(Echo(), Sampling(), 0.5, 7).answer([rows], None, None, step=4)
    assert other != one


def test_nothing_is_sampled_where_no_row_is_chosen():
    rollouts = StudentRollouts(Echo(), Sampling(), 0.0, 7)
    rows, metrics = rollouts.answer([rows_to_answer(3)], None, None, step=0)
    assert rows == [rows_to_answer(3)] and rollouts.sampler.calls == [] and metrics == {"own_answers": (0, 3)}


def test_an_answer_that_the_teacher_cannot_read_is_left_out():
    rollouts = StudentRollouts(Echo(), Sampling(), 1.0, 7, vocab_size=3)
    rows, metrics = rollouts.answer([rows_to_answer(2)], None, None, step=0)
    assert rows == [rows_to_answer(2)] and metrics["own_answers"] == (2, 2)


def test_metrics_are_sums_and_counts():
    completions = [Completion([1, 2, 3], [0.0] * 3, "length", 0), Completion([1], [0.0], "stop", 0)]
    metrics = rollout_metrics(completions, num_rows=5, seconds=2.0)
    assert metrics["own_answers"] == (2, 5) and metrics["completions/mean_length"] == (4, 2)
    assert metrics["completions/clipped_ratio"] == (1, 2) and metrics["tokens_per_second/rollout"] == (4, 2.0)
