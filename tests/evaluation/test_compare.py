"""``rlhf compare``: answers, judges, figures, page and files of two models."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch
from conftest import close, tiny_model
from tenacity import wait_none
from transformers import AutoModelForSequenceClassification

from rlhf.cli.judges import ServerJudge
from rlhf.cli.main import main
from rlhf.data import Dialogue, RowFormat, load_data
from rlhf.evaluation.answers import Answer, Question, answer_questions, questions_of
from rlhf.evaluation.comparison import Likelihoods, answer_figures, judged_figures, likelihood_figures
from rlhf.evaluation.endpoint_judge import EndpointJudge, read_choice, verdict_of_orders
from rlhf.evaluation.judging import Verdict, b_is_first, verdict_of_choice
from rlhf.rewards import ModelReward
from rlhf.rollouts import Sampling


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("other")
    tiny_model(seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the command keeps answers: the two models answer once for all tests."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def compare(tmp_path, model_folder, other_folder, data_files, kept):
    """Runs the command on five prompts and returns its JSON."""

    def run(*argv, file="preferences.jsonl", status=0):
        words = ["compare", str(model_folder), str(other_folder), "--dataset_name", str(data_files / file)]
        words += ["--num_prompts", "5", "--max_new_tokens", "6", "--output_dir", str(kept)]
        words += ["--json", str(tmp_path / "compare.json"), "--overwrite"]
        assert main([*words, *argv]) == status
        file = tmp_path / "compare.json"
        return json.loads(file.read_text()) if file.exists() else None

    return run


def figure(result, name):
    (found,) = [row for row in result["figures"] if row["name"] == name]
    return found


def test_figures_are_those_of_the_models_own_forward(compare, model_folder, other_folder, tokenizer, preference_rows):
    result = compare()
    # Without our trainers: whole sequences, one at a time.
    models = [tiny_model(seed=0).eval(), tiny_model(seed=1).eval()]
    for model, side in zip(models, ("a", "b"), strict=True):
        sums, tokens, right = 0.0, 0, 0
        for row in preference_rows:
            nll = {}
            for answer in ("chosen", "rejected"):
                prompt = tokenizer(row["prompt"])["input_ids"]
                ids = tokenizer(row["prompt"] + row[answer])["input_ids"] + [tokenizer.eos_token_id]
                with torch.no_grad():
                    logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                count = len(ids) - len(prompt)
                nll[answer] = -float(sum(logps[len(prompt) + i - 1, ids[len(prompt) + i]] for i in range(count)))
                if answer == "chosen":
                    sums, tokens = sums + nll[answer], tokens + count
            right += nll["chosen"] < nll["rejected"]
        close(figure(result, "loss, nats a token")[side], sums / tokens)
        assert figure(result, "accuracy on pairs")[side] == right / len(preference_rows)
    assert result["judge"] is None and len(result["answers"]) == 5


def test_a_reward_judges_and_a_second_judge_costs_no_answer(compare, monkeypatch, capsys):
    first = compare("--reward_funcs", "length_reward(target=10)")
    scores = [row["score"] for row in first["answers"]]
    for row in first["answers"]:
        rewards = row["rewards"]
        assert row["score"] == (0.5 if rewards[0] == rewards[1] else float(rewards[1] > rewards[0]))
    assert first["wins"] == {"a": scores.count(0.0), "ties": scores.count(0.5), "b": scores.count(1.0)}
    assert figure(first, "win rate")["value"] == pytest.approx(sum(scores) / 5)
    assert "win rate" in capsys.readouterr().out
    # Nothing is loaded again. Greedy answers do not depend on the seed.
    monkeypatch.setattr("rlhf.cli.compare.load_model", None)
    second = compare("--reward_funcs", "length_reward(target=1)", "--seed", "7")
    assert [row["a"] for row in second["answers"]] == [row["a"] for row in first["answers"]]
    assert [row["b"] for row in second["answers"]] == [row["b"] for row in first["answers"]]


def test_json_alone_on_stdout_and_a_page(compare, tmp_path, capsys):
    page = tmp_path / "page.html"
    compare("--json", "-", "--html", str(page), "--reward_funcs", "length_reward(target=10)")
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["answers"]) == 5
    text = page.read_text()
    assert text.count('<div class="pair">') == 5 and "95 % interval" in text and "http" not in text


def test_choices_of_the_blind_page_are_read_back(compare, tmp_path, model_folder, other_folder, capsys):
    page, choices = tmp_path / "page.html", tmp_path / "choices.json"
    compare("--judge", "page", "--html", str(page))
    text = page.read_text()
    # Nothing in it tells whose answers they are.
    assert str(model_folder) not in text and str(other_folder) not in text
    key = re.search(r'comparison: "(\w+)"', text)[1]
    names = sorted(set(map(int, re.findall(r'type="radio" name="(\d+)"', text))))
    saved = [{"index": index, "choice": "second" if b_is_first(key, index) else "first"} for index in names]
    choices.write_text(json.dumps({"comparison": key, "choices": saved}))
    result = compare("--choices", str(choices))
    assert result["wins"]["a"] == len(names) and result["wins"]["b"] == 0
    choices.write_text(json.dumps({"comparison": "another", "choices": saved}))
    compare("--choices", str(choices), status=2)
    assert "these choices are about other answers" in capsys.readouterr().err


def test_a_person_goes_on_where_they_stopped(compare, monkeypatch):
    typed = iter(["1", "what?", "t", "q", *"1111"])
    monkeypatch.setattr("builtins.input", lambda text: next(typed))
    first = compare("--judge", "person")
    judged = [row["score"] for row in first["answers"] if row["a"] != row["b"]]
    assert judged[2:] == [None] * (len(judged) - 2) and 0.5 in judged
    assert any("Without a verdict" in remark for remark in first["remarks"])
    second = compare("--judge", "person")
    assert None not in [row["score"] for row in second["answers"]]
    assert [row["score"] for row in second["answers"] if row["a"] != row["b"]][:2] == judged[:2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--reward_funcs", "think_format", "--judge", "person"], "exclude each other: pass one judge"),
        (["--judge_url", "http://127.0.0.1:1"], "--judge_url and --judge_model belong together"),
        (["--judge", "page"], "--judge page needs --html"),
        (["--reward_funcs", "numeric_answer"], "numeric_answer"),
        (["--reward_model", "./nowhere"], "./nowhere"),
        (["--temperature", "-1"], "temperature"),
        (["--models", "one"], "two models are compared, got 1"),
    ],
)
def test_mistakes_are_told_in_one_line_before_a_model_is_loaded(compare, argv, message, monkeypatch, capsys):
    monkeypatch.setattr("rlhf.cli.compare.load_model", None)
    compare(*argv, status=2)
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert message in line


def test_an_answer_does_not_depend_on_its_batch(tokenizer, data_files):
    questions = questions_of(load_data(str(data_files / "preferences.jsonl")), 7, RowFormat())
    model = tiny_model()
    found = []
    for size, temperature, seed in ((1, 0.0, 0), (3, 0.0, 1), (7, 0.0, 2), (1, 1.0, 0), (7, 1.0, 0)):
        sampling = Sampling(temperature=temperature, max_tokens=8)
        batches = list(answer_questions(model, tokenizer, questions, sampling, seed, size))
        found.append([answer for batch in batches for answer in batch])
    assert found[0] == found[1] == found[2] and found[3] == found[4] != found[0]
    # Going on in the middle gives the same answers.
    (rest,) = answer_questions(model, tokenizer, questions, Sampling(temperature=1.0, max_tokens=8), 0, 7, start=4)
    assert rest == found[4][4:]


class FakeJudge(BaseHTTPRequestHandler):
    """Prefers the longer answer, except for one prompt, where it always takes the first; is busy once."""

    requests: ClassVar[list[dict]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
        self.send_response(503 if len(self.requests) == 1 else 200)
        self.end_headers()
        text = body["messages"][1]["content"]
        first, second = (part.split("\n[End")[0] for part in re.split(r"\[Answer of assistant [AB]\]\n", text)[1:])
        decision = "A" if text.startswith("[Prompt]\np2\n") or len(first) > len(second) else "B"
        reply = {"choices": [{"message": {"content": f"Because. [[{decision}]]"}}]}
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *words):
        pass


@pytest.fixture
def judge_url(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeJudge)
    monkeypatch.setattr(FakeJudge, "requests", [])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_in_both_orders_once(judge_url, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.data.http_client.wait_exponential", lambda **kwargs: wait_none())
    questions = [Question(Dialogue(f"p{index}"), {}) for index in range(4)]
    a, b = answers("short", "much longer", "x", "same"), answers("not short", "tiny", "yy", "same")

    def verdicts():
        judge = ServerJudge(EndpointJudge(judge_url, "a-model", "a-secret"), tmp_path)
        return judge.verdicts("key", questions, a, b), judge.name

    found, name = verdicts()
    assert [verdict.score for verdict in found] == [1.0, 0.0, 0.5, 0.5]
    assert found[2].positions == ("first", "first") and found[3].positions is None
    assert len(FakeJudge.requests) == 7  # three prompts in two orders, and one request that was repeated
    assert {request["path"] for request in FakeJudge.requests} == {"/v1/chat/completions"}
    assert {(request["key"], request["model"]) for request in FakeJudge.requests} == {("Bearer a-secret", "a-model")}
    assert "a-secret" not in name + "".join(file.read_text() for file in tmp_path.iterdir())
    # Judgements are stored: nothing is asked again.
    assert verdicts() == (found, name) and len(FakeJudge.requests) == 7


def test_a_reward_model_judges(compare, tmp_path, tokenizer):
    config = tiny_model().config
    config.num_labels = 1
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    result = compare("--reward_model", str(tmp_path / "reward"))
    reward = ModelReward(str(tmp_path / "reward"))
    for row in result["answers"]:
        close(row["rewards"], reward([row["prompt"]] * 2, [row["a"], row["b"]]))
        assert row["score"] == float(row["rewards"][1] > row["rewards"][0])


def answers(*texts):
    return [Answer(text, [1] * len(text), is_whole=True) for text in texts]


def test_a_judge_is_asked_in_both_orders_and_its_bias_is_told():
    pairs = [("first", "second"), ("second", "first"), ("first", "first"), ("first", "first"), ("tie", "second")]
    verdicts = [verdict_of_orders(*pair) for pair in pairs]
    assert [verdict.score for verdict in verdicts] == [0.0, 1.0, 0.5, 0.5, 0.5]
    assert verdict_of_orders("first", None).score is None
    _, remarks = judged_figures(verdicts, answers(*"abcde"), answers(*"fghij"))
    assert any("first answer in both orders for 40 %" in remark for remark in remarks)


def test_the_last_decision_of_a_judge_counts():
    assert read_choice("[[A]] looks fine at first, but … [[B]]") == "second"
    assert read_choice("[[C]]") == "tie" and read_choice("neither") is None


def test_a_person_sees_a_random_order_without_names():
    orders = [b_is_first("key", index) for index in range(400)]
    assert 160 < sum(orders) < 240 and orders == [b_is_first("key", index) for index in range(400)]
    first_wins = [verdict_of_choice("key", index, "first").score for index in range(400)]
    assert first_wins == [float(order) for order in orders]
    assert verdict_of_choice("key", 0, "tie").score == 0.5


def test_few_prompts_are_called_few():
    verdicts = [Verdict(score) for score in (1.0, 1.0, 0.0)]
    figures, remarks = judged_figures(verdicts, answers("a", "b", "c"), answers("dd", "e", "f"))
    assert "3 prompts do not tell the models apart (p = 1): about 69 prompts would show a true win rate" in remarks[0]
    assert figures[1].estimate.low < 0.3 and figures[1].estimate.high > 0.9
    _, remarks = judged_figures([Verdict(1.0)] * 40, answers(*"a" * 40), answers(*"b" * 40))
    assert remarks[0].startswith("B's win rate of 100.0 % differs from 50 %")


def test_models_with_other_tokens_compare_by_bytes():
    a, b = Likelihoods([2.0, 3.0, 1.0], [4, 5, 2]), Likelihoods([2.5, 2.0, 1.0], [2, 3, 1])
    names = [row.name for row in likelihood_figures(a, b, [8, 10, 4])]
    assert names == ["perplexity (other tokens: see bits per byte)", "bits per byte"]
    same = Likelihoods([2.5, 2.0, 1.0], [4, 5, 2], [3.0, 1.0, 0.5], [4, 5, 2])
    pairs = Likelihoods(a.nll, a.tokens, [2.5, 2.0, 2.0], [4, 5, 2])
    found = {row.name: row for row in likelihood_figures(pairs, same, [8, 10, 4])}
    close(found["bits per byte"].a, 6.0 / 22 / torch.log(torch.tensor(2.0, dtype=torch.float64)))
    assert found["accuracy on pairs, %"].a == pytest.approx(2 / 3)
    assert found["accuracy on pairs, %"].b == pytest.approx(1 / 3)


def test_figures_of_answers_count_what_was_cut():
    b = [Answer("xy", [1, 2], is_whole=False), Answer("a", [1], is_whole=True)]
    rows = {row.name: row for row in answer_figures(answers("x", "a"), b)}
    assert rows["cut at the longest length, %"].b == 0.5 and rows["identical answers, %"].a == 0.5
    assert rows["characters an answer"].estimate.value == 0.5
