"""A comparison as one page of HTML: answers side by side, or a blind form for a person who judges."""

from typing import Any

from jinja2 import Environment

from rlhf.evaluation.audit_page import STYLE
from rlhf.evaluation.compare_tables import cells, heading
from rlhf.evaluation.comparison import Comparison
from rlhf.evaluation.judging import b_is_first
from rlhf.evaluation.tables import prompt_text
from rlhf.visible import visible

_OWN_STYLE = """
body { max-width: 80rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; }
.pair > div { min-width: 0; } .pair h3 { font-size: .95rem; margin: .3rem 0; } pre { margin: .2rem 0 .6rem; }
.wins { border-left: 4px solid var(--bar); padding-left: .6rem; } .wide { overflow-x: auto; }
td.n, th.n { text-align: right; white-space: nowrap; width: auto; padding-left: .8rem; }
.wide td:first-child { min-width: 8rem; overflow-wrap: normal; }
label { display: inline-block; margin-right: 1.2rem; } fieldset { border: 1px solid var(--line); min-width: 0; }
 button { font: inherit; padding: .4rem 1rem; }
.save { position: sticky; bottom: 0; background: var(--paper); border-top: 1px solid var(--line); padding: .6rem 0; }
@media (max-width: 45rem) { .pair { grid-template-columns: 1fr; } }
"""

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
"""

_PAGE = (
    _HEAD
    + """<h1>{{ title }}</h1>
{% for line in heading %}<div>{{ line }}</div>
{% endfor %}
<h2>Figures</h2>
<div class="wide"><table>
<tr><th>figure</th><th class="n">A</th><th class="n">B</th><th class="n">95 % interval</th><th class="n">p</th>
<th class="n">n</th></tr>
{% for row in figures %}<tr><td>{{ row[0] }}</td>{% for cell in row[1:] %}<td class="n">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% for remark in remarks %}<p>{{ remark }}</p>
{% endfor %}
{% for pair in pairs %}<h2>Prompt {{ loop.index }}{{ pair.result }}</h2>
<pre>{{ pair.prompt }}</pre>
<div class="pair">
<div{% if pair.winner == "A" %} class="wins"{% endif %}><h3>A{{ pair.note_a }}</h3><pre>{{ pair.a }}</pre></div>
<div{% if pair.winner == "B" %} class="wins"{% endif %}><h3>B{{ pair.note_b }}</h3><pre>{{ pair.b }}</pre></div>
</div>
{% endfor %}
</body>
</html>
"""
)

_FORM = (
    _HEAD
    + """<h1>{{ title }}</h1>
<p>Choose the better answer of each pair, without knowing whose it is. The order is random. Save the choices at the
end, also when some are missing, and pass the file on: <code>rlhf compare A B … --choices choices.json</code></p>
<form id="form">
{% for pair in pairs %}<fieldset>
<legend>Prompt {{ loop.index }} of {{ loop.length }}</legend>
<pre>{{ pair.prompt }}</pre>
<div class="pair">
<div><h3>Answer 1</h3><pre>{{ pair.first }}</pre></div>
<div><h3>Answer 2</h3><pre>{{ pair.second }}</pre></div>
</div>
<label><input type="radio" name="{{ pair.index }}" value="first"> answer 1 is better</label>
<label><input type="radio" name="{{ pair.index }}" value="second"> answer 2 is better</label>
<label><input type="radio" name="{{ pair.index }}" value="tie"> tie</label>
</fieldset>
{% endfor %}
<div class="save"><button type="button" id="save">Save the choices</button> <span id="count" role="status"></span></div>
</form>
<script>
const form = document.getElementById("form");
const chosen = () => [...new FormData(form)].map(([index, choice]) => ({index: Number(index), choice}));
const tell = () => {
  document.getElementById("count").textContent = `${chosen().length} of {{ pairs | length }} chosen`;
};
form.addEventListener("change", tell);
document.getElementById("save").addEventListener("click", () => {
  const text = JSON.stringify({comparison: "{{ key }}", choices: chosen()}, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = "choices.json";
  link.click();
});
tell();
</script>
</body>
</html>
"""
)


def comparison_page(comparison: Comparison) -> str:
    """Write a comparison as HTML: figures, remarks and all answers side by side.

    Args:
        comparison: The comparison.

    Returns:
        The page; it needs no other file.
    """
    return _render(
        _PAGE,
        title="Two models on the same prompts",
        heading=[visible(line) for line in heading(comparison)],
        figures=[cells(figure) for figure in comparison.figures],
        remarks=[visible(remark) for remark in comparison.remarks],
        pairs=[_judged_pair(comparison, index) for index in range(len(comparison.questions))],
    )


def _judged_pair(comparison: Comparison, index: int) -> dict[str, str]:
    verdict = comparison.verdicts[index]
    winner = {1.0: "B", 0.0: "A"}.get(-1.0 if verdict.score is None else verdict.score, "")
    result = f": {winner} is better" if winner else ""
    if verdict.score == 0.5:
        result = ": tie"
    notes = ["", ""]
    if verdict.rewards is not None:
        notes = [f", reward {reward:.4g}" for reward in verdict.rewards]
    answers = [answers[index] for answers in comparison.answers]
    for side, answer in enumerate(answers):
        notes[side] += "" if answer.is_whole else ", cut at the longest length"
    return {
        "prompt": visible(prompt_text(comparison.questions[index].dialogue.prompt)),
        "winner": winner,
        "result": result,
        "a": visible(answers[0].text.strip()),
        "b": visible(answers[1].text.strip()),
        "note_a": notes[0],
        "note_b": notes[1],
    }


def blind_page(comparison: Comparison) -> str:
    """Write a form in which a person chooses the better answer of each pair, without names and in random order.

    Args:
        comparison: The comparison; its verdicts are not read.

    Returns:
        The page; it needs no other file.
    """
    pairs = []
    for index, question in enumerate(comparison.questions):
        texts = [visible(answers[index].text.strip()) for answers in comparison.answers]
        # Identical answers are a tie without being asked.
        if comparison.answers[0][index].text == comparison.answers[1][index].text:
            continue
        if b_is_first(comparison.key, index):
            texts.reverse()
        prompt = visible(prompt_text(question.dialogue.prompt))
        pairs.append({"index": index, "prompt": prompt, "first": texts[0], "second": texts[1]})
    return _render(_FORM, title="Which answer is better?", key=comparison.key, pairs=pairs)


def _render(template: str, **values: Any) -> str:
    # Prompts and answers are text of data and models, in which HTML is common.
    environment = Environment(autoescape=True)
    return environment.from_string(template).render(style=STYLE + _OWN_STYLE, **values)
