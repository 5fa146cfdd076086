"""Limits of chat templates: what loops or multiplies text is refused, the rest is as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.data_tokenizers import chatml_tokenizer
from transformers.utils import chat_template_utils

from trivium.data import template_limits
from trivium.data.template import ChatTemplate
from trivium.errors import DataError, ModelError

CHAT = [{"role": "user", "content": "two words"}, {"role": "assistant", "content": "é\n"}]
MANY = "range(99999)"
HOSTILE = {
    "nested loops": f"{{% for a in {MANY} %}}{{% for b in {MANY} %}}{{% endfor %}}{{% endfor %}}",
    "nested loops over one range": f"{{% set r = {MANY} %}}{{% for a in r %}}{{% for b in r %}}"
    "{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}"
    "{% endif %}{% endmacro %}{{ f(40) }}",
    "a loop of filters": f"{{% for a in {MANY} %}}{{{{ {MANY}|map('upper')|list|length }}}}"
    "{% endfor %}",
    "a recursive loop": f"{{% for a in {MANY} recursive %}}{{{{ loop({MANY}) }}}}{{% endfor %}}",
    "text times a number": "{{ 'a' * 10000000000 }}",
    "a number times text": "{{ 10000000000 * 'a' }}",
    "list times a number": "{{ ([0] * 10000000000)|length }}",
    "text that doubles by ~": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "text that doubles by +": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "text that doubles in a block": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}{{ n.x }}",
    "a list that doubles": "{% set n = namespace(x=[]) %}{% for i in range(99) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "a list that doubles by +": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x|tojson }}",
    "an object that doubles": "{% set n = namespace(x={}) %}{% for i in range(99) %}"
    "{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x|tojson }}",
    "an object made by dict": "{% set n = namespace(x={}) %}{% for i in range(99) %}"
    "{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x|tojson }}",
    "powers of powers": "{{ 10 ** 10000000000 }}",
    "a number that squares": "{% set n = namespace(x=3) %}{% for i in range(99) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "a wide method": "{{ 'a'.center(10000000000) }}",
    "a wide filter": "{{ 'a'|center(10000000000) }}",
    "a wide %-format": "{{ '%9999999999d' % 1 }}",
    "a wide format filter": "{{ '%9999999999d'|format(1) }}",
    "a wide format method": "{{ '{:>9999999999}'.format(1) }}",
    "a format with its width from an argument": "{{ '{:{}}'.format('a', '9999999999') }}",
    "replacing nothing with much": "{% set a = 'a' * 1000000 %}{{ a.replace('', a) }}",
    "the filter replace": "{% set a = 'a' * 1000000 %}{{ a|replace('', a) }}",
    "joining with much": "{% set a = 'a' * 1000000 %}{{ a.join(a) }}",
    "the filter join": "{% set a = 'a' * 1000000 %}{{ a|join(a) }}",
    "translate": "{% set a = 'a' * 1000000 %}{{ a.translate({97: a}) }}",
    "tabs": "{% set a = '\\t' * 1000000 %}{{ a.expandtabs(1000000) }}",
    "a wide indent": "{{ 'a\\nb'|indent(100000000) }}",
    "an indented object": "{{ messages|tojson(indent=1000000000) }}",
    "bytes of a number": "{{ (1).to_bytes(10000000000, 'big') }}",
    "an output without end": f"{{% set a = 'a' * 1000000 %}}{{% for i in {MANY} %}}{{{{ a }}}}"
    "{% endfor %}",
    "a long source": "{# " + "a" * 2**20 + " #}",
    "Latin without end": "{{ lipsum(n=100000, html=False) }}",
}


FAILS_ITSELF = {"Latin without end", "a recursive loop"}


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.2)


def rendered(template: str, **arguments: Any) -> str:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer, arguments).render(CHAT)


@pytest.mark.parametrize("name", HOSTILE)
def test_template_that_loops_or_multiplies_is_refused(name: str, briefly: None) -> None:
    with pytest.raises((ModelError, DataError), match="the chat template") as caught:
        rendered(HOSTILE[name])
    assert len(str(caught.value)) < 500
    if name not in FAILS_ITSELF:
        assert "from a source you trust" in str(caught.value)


FAITHFUL = {
    "loops, lists and joins": "{% for m in messages if m.role in ['user', 'assistant'] %}"
    "{{ loop.index ~ ':' ~ m.content|trim }}{{ ['x', m.role]|join(', ') }}{% endfor %}",
    "macros": "{% macro f(x, sep='-') %}{{ x }}{{ sep }}{{ caller() if caller }}{% endmacro %}"
    "{{ f(1600000000) }}{% call f(2) %}inner{% endcall %}{{ f(3, sep='+') }}",
    "namespaces and objects": "{% set n = namespace(a=0) %}{% for m in messages %}"
    "{% set n.a = n.a + 1 %}{% endfor %}{{ {'n': n.a, 'l': [1, 2]}|tojson(indent=4) }}",
    "text": "{{ 'a=%s %05d' % ('b', 3) }}{{ '{}-{:>4}'.format(1, 2) }}{{ '-' * 20 }}"
    "{{ 'a,b'.split(',')[1].replace('b', 'cc') }}{{ 'ab'|indent(2, true) }}{{ 2 ** 10 % 7 }}",
    "unpacking": "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}"
    "{% set a, b = 1, 2 %}{{ (a, b) }}{{ messages[0]['content'][::-1] }}",
    "generation and loop controls": "{% for m in messages %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% if loop.first %}{% continue %}{% endif %}{% break %}{% endfor %}",
    "a recursive loop": "{% for m in [[1, [2]], [3]] recursive %}{% if m is iterable %}"
    "{{ loop(m) }}{% else %}{{ m }}{% endif %}{% endfor %}",
    "filters of many": "{{ messages|map(attribute='role')|list }}{{ [3, 1]|sort|first }}"
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ 'a b'|wordcount }}",
}


@pytest.mark.parametrize("name", FAITHFUL)
def test_limits_do_not_change_what_a_template_writes(name: str) -> None:
    expected = chat_template_utils.render_jinja_template([CHAT], chat_template=FAITHFUL[name])
    assert rendered(FAITHFUL[name]) == expected[0][0]
    assert expected[0][0]


def test_real_template_writes_what_the_library_writes(shared_dir: Path) -> None:
    files = sorted(shared_dir.rglob("tokenizer_config.json"))
    sources = [json.loads(file.read_text()).get("chat_template") for file in files]
    sources += [file.read_text() for file in sorted(shared_dir.rglob("chat_template.jinja"))]
    for source in {source for source in sources if isinstance(source, str)}:
        try:
            expected = chat_template_utils.render_jinja_template([CHAT], chat_template=source)
        except Exception:
            continue
        tokenizer = chatml_tokenizer()
        tokenizer.chat_template = source
        assert ChatTemplate(tokenizer).render(CHAT).strip() in expected[0][0] + "\n"


def test_library_is_left_as_it_was() -> None:
    before = (chat_template_utils._compile_jinja_template, chat_template_utils.datetime)
    rendered("{{ messages[0].content }}")
    with pytest.raises(DataError):
        rendered("{{ raise_exception('no') }}")
    after = (chat_template_utils._compile_jinja_template, chat_template_utils.datetime)
    assert after == before


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", "{{ [1][5] + 1 }}", "{% if %}", "{{ " + "(" * 5000, "{{ messages.x.y.z }}"],
)
def test_template_that_fails_gives_one_message(template: str) -> None:
    with pytest.raises(DataError, match=r"rejects these messages: \S"):
        rendered(template)
