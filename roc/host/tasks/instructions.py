r"""Prompts that ask for another form of answer than the reward pays.

Many published sets end each prompt with an instruction of their own, such as
"the last line should be of the form Answer: $Answer". A model that obeys it is
right and gets nothing, since the answer is what stands in the box of
`<answer>\boxed{X}</answer>`.
"""

import re
from collections.abc import Sequence

from roc.host import tokenizer as tokenizer_lib
from roc.host.tasks import problem as problem_lib

# What is asked for, and how prompts put it. Bounded, so that they are linear.
_FORMS = {
  "a line `Answer: X`": re.compile(
    r"(?i)[`'\"\u201c]?\banswer:\s{0,3}(?:\$answer|\$?\\boxed|<|\[|\{|x\b|[`'\"\u201d])"
  ),
  "`#### X`": re.compile(r"####"),
  r"a \boxed{X} alone": re.compile(
    r"(?i)\b(?:in|within|inside|into|using|with|put|enclose|box)\b[^.\n]{0,60}"
    r"\\+(?:boxed|fbox)\b"
  ),
  "a letter alone": re.compile(
    r"(?i)\b(?:answer|respond|reply) with (?:only )?(?:the |a )?(?:single )?"
    r"(?:capital )?letter\b"
  ),
}


def form_of(question: str) -> str:
  """What form of answer a prompt's own instruction asks for; "" for none."""
  if tokenizer_lib.ANSWER_OPEN in question:
    return ""
  return next(
    (name for name, asks in _FORMS.items() if asks.search(question)), ""
  )


def notes(name: str, problems: Sequence[problem_lib.Problem]) -> list[str]:
  """Lines for people, one for each form that some of the prompts ask for.

  Args:
    name: of the set.
    problems: all of it.
  """
  found: dict[str, list[str]] = {}
  for problem in problems:
    form = form_of(problem.question)
    if form:
      found.setdefault(form, []).append(problem.id)
  return [
    f"{name}: {len(ids)} of {len(problems)} prompts ask for {form} themselves"
    f" (the first is {ids[0]!r}), and only <answer>\\boxed{{X}}</answer> is"
    " rewarded; take that out of the prompts, or see that the system text or"
    " the instruction says what counts"
    for form, ids in found.items()
  ]
