"""Templates that would not end, or would fill the memory."""

import time

import pytest

from roc.host import bounded_jinja

# Each would take hours or gigabytes.
ENDLESS = {
  "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}"
  "{% endfor %}{% endfor %}",
  "turns that a condition skips": "{% for i in range(99999) %}"
  "{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
  "a macro that calls itself twice": "{% macro f(n) %}{% if n %}"
  "{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(80) }}",
  "text times a number": "{{ 'x' * 10 ** 12 }}",
  "a number times text": "{{ 10 ** 12 * 'x' }}",
  "a list times a number": "{% set x = [1] * 10 ** 10 %}",
  "a tower of powers": "{{ 10 ** (10 ** 10) }}",
  "much text": "{% for i in range(90000) %}{{ 'x' * 99999 }}{% endfor %}",
  "text that doubles": "{% set n = namespace(a='x' * 1000) %}"
  "{% for i in range(40) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
  "text that doubles by +": "{% set n = namespace(a='x' * 1000) %}"
  "{% for i in range(40) %}{% set n.a = n.a + n.a %}{% endfor %}",
}


def write(text, **variables):
  template = bounded_jinja.Environment().template(text)
  return bounded_jinja.render(template, variables)


@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
def test_what_would_not_end_is_an_error(text):
  start = time.thread_time()
  with pytest.raises(bounded_jinja.BudgetError):
    write(text)
  assert time.thread_time() - start < bounded_jinja.MAX_CPU_S


def test_slow_steps_are_timed(monkeypatch):
  monkeypatch.setattr(bounded_jinja, "MAX_CPU_S", 0.2)
  text = "{% for i in range(99999) %}{{ range(9999) | sum }}{% endfor %}"
  with pytest.raises(bounded_jinja.BudgetError, match="seconds"):
    write(text)


@pytest.mark.parametrize(
  "text",
  [
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% block a %}{{ self.a() }}{% endblock %}",
  ],
)
def test_recursion_ends(text):
  with pytest.raises(RecursionError):
    write(text)


def test_each_rendering_has_a_budget_of_its_own():
  text = "{% for i in range(n) %}{% endfor %}{{ n }}"
  template = bounded_jinja.Environment().template(text)
  for _ in range(3):
    for n in (90_000, 10):
      assert bounded_jinja.render(template, {"n": n}) == str(n)


def test_counting_changes_nothing():
  text = (
    "{% macro m(a, b=2) %}[{{ a }}"
    "{{ caller() if caller else b }}]{% endmacro %}"
    "{% for i in range(6) if i % 2 %}{{ loop.index }}{{ i }}{{ loop.last }} "
    "{% else %}none{% endfor %}"
    "{% for i in [] %}x{% else %}none{% endfor %}"
    "{% call m(1) %}c{% endcall %}{{ m(3) }}"
    "{{ 1 ~ 'é' ~ none ~ missing ~ [2] }}"
    "{{ 2 * 3 }}{{ 2 ** 3 }}{{ 1 + 1 }}{{ 'a' + 'b' }}{{ [1] + [2] }}"
    "{{ 2.5 * 2 }}{{ 'ab' * 2 }}{{ (1, 2) * 2 }}"
  )
  assert write(text, count=1) == (
    "11False 23False 35True none[1c][32]1éNone[2]682ab[1, 2]5.0abab(1, 2, 1, 2)"
  )


@pytest.mark.parametrize("text", ["{{ lipsum() }}", "{{ count() }}"])
def test_what_is_not_there(text):
  with pytest.raises(Exception, match="undefined"):
    write(text)


def test_what_draws_is_not_there():
  with pytest.raises(Exception, match="No filter named 'random'"):
    write("{{ [1, 2] | random }}")


@pytest.mark.parametrize(
  "text",
  ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 200],
)
def test_what_is_nested_deeply_cannot_be_read(text):
  text += "{% endif %}" * text.count("{% if")
  with pytest.raises((RecursionError, SyntaxError, MemoryError)):
    bounded_jinja.Environment().template(text)
