"""Templates from outside: the size of each step is checked before it runs."""

import pytest

from transformers_delta_llava.utils import templates
from transformers_delta_llava.utils.errors import DeltaLlavaError


MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
GROW = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = STEP %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10000000000 }}",
        "{{ 'x' * 99999 * 99999 }}",
        "{{ [0] * 1000000000 }}",
        "{% set n = namespace(x=7) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%9999999999d'|format(1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=999999999) }}",
        "{{ 'x'.center(9999999999) }}",
        "{{ 'x'|center(9999999999) }}",
        "{{ 'x'|indent(9999999999, true) }}",
        "{{ (5).to_bytes(9999999999, 'big') }}",
        "{{ [1]|batch(9999999999, 1)|list }}",
        "{{ {'a': 1}|tojson(indent=9999999999) }}",
        "{{ 2|round(999999999, 'ceil') }}",
        "{{ range(99999)|join('x' * 99999) }}",
        "{{ ('x' * 99999)|replace('x', 'y' * 99999) }}",
        "{{ ('x' * 99999).join(range(9999)|map('string')) }}",
        GROW.replace("STEP", "n.x + n.x"),
        GROW.replace("STEP", "n.x ~ n.x"),
        GROW.replace("STEP", "[n.x, n.x]|join"),
        GROW.replace("STEP", "n.x.replace('a', 'aaaa')"),
        "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}" + GROW.replace("STEP", "twice(n.x)"),
        GROW.replace("{% set n.x = STEP %}", "{% set x %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = x %}"),
    ],
)
def test_a_step_that_makes_something_large(monkeypatch, template):
    monkeypatch.setattr(templates, "_LARGEST_RESULT", 10**6)
    with pytest.raises(DeltaLlavaError, match="^The template makes more than 1,000,000 characters in one step, which"):
        templates.check_template(template, "The template", MESSAGES, {})


def test_what_grows_without_a_large_step(monkeypatch):
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.1)
    with pytest.raises(DeltaLlavaError, match="takes more than 0.1 seconds"):
        templates.check_template(GROW.replace("STEP", "[n.x, n.x]") + "{{ n.x }}", "The template", MESSAGES, {})
    deep = GROW.replace("60", "3000").replace("STEP", "[n.x]") + "{{ n.x }}"
    monkeypatch.setattr(templates, "MAX_SECONDS", 5)
    with pytest.raises(DeltaLlavaError, match="nests values or calls too deeply"):
        templates.check_template(deep, "The template", MESSAGES, {})


@pytest.mark.parametrize(
    "template",
    [
        "{{ '-' * 40 }}{{ 'Name'.ljust(80) }}{{ 'a\nb'|indent(4) }}{{ messages|tojson(indent=2) }}",
        "{{ '%s: %5d' % (bos_token, 17) }}{{ '{:>8}'.format(3.5) }}{{ messages|length % 2 }}{{ strftime_now('%d %b') }}",
        "{% generation %}{{ messages[0].content|map(attribute='type')|join(', ') }}{% endgeneration %}",
        "{{ raise_exception('Only text.') }}",
        "{{ nothing.such() }}",
        "{{ 1732665600 }}{{ 1732665600 % 86400 + 1732665600 }}",
    ],
)
def test_what_prompts_need_is_left_alone(template):
    templates.check_template(template, "The template", MESSAGES, {"bos_token": "<s>", "add_generation_prompt": True})
