"""A chat template can neither hang nor fill the memory, and an ordinary one renders as before."""

import copy
import threading
import time

import pytest

from rlhf.data import template_limits
from rlhf.data.formats import Dialogue
from rlhf.data.template_limits import TemplateLimitError
from rlhf.data.templates import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TOO_MUCH = {
    "text times number": "{{ 'a' * 300000000 }}",
    "number times text": "{% set n = 300000000 %}{{ n * messages[0].content }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "list": "{% set l = range(99999)|list * 99999 %}",
    "doubled by ~": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubled by +": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "format": "{{ '%999999999d' % 1 }}",
    "format filter": "{{ '%999999999d'|format(1) }}",
    "format method": "{{ '{:>999999999}'.format(1) }}",
    "width in an argument": "{{ '{:>{}}'.format(1, 999999999) }}",
    "center": "{{ 'a'|center(999999999) }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "indent": "{{ messages|tojson(indent=999999999) }}",
    "replace": "{% set a = 'a' * 100000 %}{{ a.replace('a', a) }}",
    "replace filter": "{% set a = 'a' * 100000 %}{{ a|replace('a', a) }}",
    "join": "{% set a = 'a' * 100000 %}{{ a.join(range(99999)|map('string')) }}",
    "join filter": "{% set a = 'a' * 100000 %}{{ range(99999)|list|join(a) }}",
    "macro": "{% macro m() %}{% for i in range(99999) %}{{ 'aaaaa' * 1000 }}{% endfor %}{% endmacro %}{{ m() }}",
    "output": "{% for i in range(99999) %}{{ 'aaaaa' * 1000 }}{% endfor %}",
    "lorem ipsum": "{{ lipsum(n=999999999) }}",
    "nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "source": "a" * 2_000_000,
}
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}x"


def with_template(tokenizer, source):
    tokenizer = copy.deepcopy(tokenizer)  # other tests share it
    tokenizer.chat_template = source
    return ChatTemplate.of(tokenizer, Dialogue(MESSAGES, ()))


@pytest.mark.parametrize("source", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_template_that_makes_too_much_is_refused_at_once(tokenizer, source):
    start = time.process_time()
    with pytest.raises(ValueError, match="the chat template refuses this conversation"):
        with_template(tokenizer, source).render(MESSAGES)
    assert time.process_time() - start < 2


def test_a_template_that_never_ends_is_stopped_and_then_refused_at_once(tokenizer, monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.2)
    template = with_template(tokenizer, LOOP)
    start = time.process_time()
    # The second conversation waits for nothing: `rlhf data` reads on after a bad row.
    for _ in range(2):
        with pytest.raises(ValueError, match=r"takes more than 0\.2 seconds of processor time"):
            template.render(MESSAGES)
    assert time.process_time() - start < 2


def test_what_is_rendered_elsewhere_has_the_limits_too(tokenizer):
    # As reward functions and reward models do.
    with pytest.raises(TemplateLimitError, match="characters of text"):
        tokenizer.apply_chat_template(MESSAGES, chat_template=TOO_MUCH["doubled by ~"], tokenize=False)


def test_a_thread_renders_without_a_timer(tokenizer):
    template = with_template(tokenizer, "{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}\n{% endfor %}")
    rendered = []
    thread = threading.Thread(target=lambda: rendered.append(template.render(MESSAGES)))
    thread.start()
    thread.join()
    assert rendered == ["user: Hi\nassistant: Hello\n"]


def test_an_ordinary_template_renders_as_before(tokenizer):
    source = (
        "{% macro head(role) %}<{{ role|upper|center(12) }}>{% endmacro %}"
        "{%- for m in messages -%}{{ head(m.role) + m.content * 2 }}{{ '%5.1f' % 2.5 }}{{ 'x{}'.format(3) }}"
        "{{ m.content|replace('H', 'J') ~ loop.index ~ [1, 2]|join('-') }}{{ m|tojson(indent=1) }}{% endfor %}"
        "{{ 7 % 4 }}{{ 2 ** 10 }}{{ ('12345 {' ~ '}')|indent(2) }}"
    )
    assert with_template(tokenizer, source).render(MESSAGES[:1]) == (
        '<    USER    >HiHi  2.5x3Ji11-2{\n "role": "user",\n "content": "Hi"\n}3102412345 {}'
    )
