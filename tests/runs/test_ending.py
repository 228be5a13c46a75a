"""The four lines at the end of a run."""

from rlhf.cli.commands import COMMANDS
from rlhf.runs.ending import Ending, before_and_after, folder_size, next_commands
from rlhf.runs.lines import FIGURES

SFT = FIGURES["SFTTrainer"]
TRAINING = [{"step": 5, "loss": 6.259, "perplexity": 523.7}, {"step": 30, "loss": 4.175, "perplexity": 65.04}]
EVALUATIONS = [
    {"step": 10, "eval_a_loss": 4.655, "eval_a_perplexity": 105.2},
    {"step": 10, "eval_b_loss": 9.0},
    {"step": 30, "eval_a_loss": 4.159, "eval_a_perplexity": 64.03},
    {"step": 30, "eval_a_loss": 4.159, "eval_a_perplexity": 64.03},  # once more, after training
]


def test_before_and_after_are_of_the_first_set_of_evaluation_rows():
    history = [TRAINING[0], *EVALUATIONS, TRAINING[1]]
    assert before_and_after(history, SFT) == "evaluation: loss 4.655 → 4.159 · ppl 105.2 → 64.03 (steps 10 and 30)"


def test_with_one_evaluation_or_none_it_is_training_and_says_so():
    training = "training: loss 6.259 → 4.175 · ppl 523.7 → 65.04 (steps 5 and 30)"
    assert before_and_after([*TRAINING, {"step": 30, "train_loss": 5.0, "train_runtime": 1.0}], SFT) == training
    assert before_and_after([*TRAINING, EVALUATIONS[-1]], SFT) == f"{training}; evaluation: loss 4.159 · ppl 64.03"
    assert before_and_after(TRAINING[:1], SFT) == "training: loss 6.259 · ppl 523.7 (step 5)"
    rollouts = [{"step": 1, "loss": 0.1, "reward": 0.2}, {"step": 2, "loss": 0.3}]
    assert before_and_after(rollouts, FIGURES["PPOTrainer"]) == "training: reward 0.200 (step 1)"
    assert before_and_after([], SFT) == "no line of the log: see --logging_steps"


def test_a_reward_is_compared_as_well():
    history = [
        {"step": 0, "eval_reward": 0.1},
        {"step": 8, "loss": 0.0, "reward": 0.2},
        {"step": 8, "eval_reward": 0.5},
    ]
    assert before_and_after(history, FIGURES["PPOTrainer"]) == "evaluation: reward 0.100 → 0.500 (steps 0 and 8)"


def test_the_two_figures_that_matter_most_are_compared():
    history = [{"step": step, "loss": 0.6, "rewards/accuracies": step / 10, "rewards/margins": 0.1} for step in (4, 8)]
    assert before_and_after(history, FIGURES["DPOTrainer"]) == (
        "training: loss 0.600 → 0.600 · accuracy 0.400 → 0.800 (steps 4 and 8)"
    )


def test_the_four_lines(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model").write_bytes(bytes(1_500_000))
    assert folder_size(tmp_path) == "1.5 MB"
    ending = Ending(tmp_path, "adapter", TRAINING, SFT, steps=30, seconds=79.0, tokens=33_308)
    assert ending.lines({"chat", "merge"}) == [
        "result  training: loss 6.259 → 4.175 · ppl 523.7 → 65.04 (steps 5 and 30)",
        "cost    30 steps in 1:19 · 33.3k tokens · 422 tok/s",
        f"saved   {tmp_path} (1.5 MB)",
        f"next    rlhf chat {tmp_path} · rlhf merge {tmp_path} -o {tmp_path}-merged",
    ]


def test_what_is_proposed_is_a_command(tmp_path):
    folder = tmp_path / "two words"
    for kind in ("model", "adapter", "reward model"):
        proposed = next_commands(folder, kind, COMMANDS)
        assert proposed == next_commands(folder, kind, [*COMMANDS, "unknown"]) and f"'{folder}'" in proposed[0]
        assert {line.split()[1] for line in proposed} <= set(COMMANDS)
    assert next_commands(folder, "model", ()) == []
