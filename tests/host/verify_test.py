"""Answers as mathematics: the documented policy, hostile text, and faults."""

import dataclasses
import json
import pathlib
import re
import threading
import time
from concurrent import futures

import pytest

from roc import layout
from roc.host import answers, rewards, verify
from roc.host import sandbox as sandbox_lib
from roc.host.sandbox import contract

ROOT = pathlib.Path(__file__).parents[2]
Status = layout.ToolStatus


def rows():
  """The table `gold, answer, equal, because` of docs/rewards.md."""
  text = (ROOT / "docs" / "rewards.md").read_text()
  found = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (yes|no) \|", text, re.M)
  section = text.split("## What equals what")[1].split("\n## ")[0]
  n_lines = sum(line.startswith("|") for line in section.splitlines()) - 2
  assert len(found) == n_lines > 100, "a row of the table cannot be read"
  return [(gold, answer, equal == "yes") for gold, answer, equal in found]


@pytest.fixture(scope="session")
def box():
  with sandbox_lib.Sandbox() as running:
    yield running


@pytest.fixture(scope="session")
def checker(box):
  return verify.MathChecker(box)


@pytest.fixture(scope="session")
def table(checker):
  """Every row's check; all are started before the first is waited for."""
  asked = {(g, a): checker.submit(a, g) for g, a, _ in rows()}
  return {key: check.result() for key, check in asked.items()}


# ------------------------------------------------------------------- policy


@pytest.mark.parametrize(("gold", "answer", "is_equal"), rows())
def test_the_documented_policy(table, gold, answer, is_equal):
  check = table[gold, answer]
  assert (check.status, check.is_equal) == ("ok", is_equal), check.reason


def examples():
  """The lines `gold | answer | yes or no` of golden/verify/answers.txt."""
  lines = (
    (ROOT / "tests" / "golden" / "verify" / "answers.txt")
    .read_text()
    .splitlines()
  )
  found = [line.rsplit(" | ", 2) for line in lines if line and line[0] != "#"]
  return [(gold, answer, equal == "yes") for gold, answer, equal in found]


def test_examples(box):
  """Exact numbers, Python's notation, typography; a few processes for all."""
  left, wrong = {}, []
  for gold, answer, is_equal in examples():
    decision = answers.compare(answer, gold)
    if decision.is_equal is None:
      left[gold, answer] = decision.pairs
      assert decision.pairs, gold
    elif decision.is_equal != is_equal:
      wrong.append((gold, answer, decision))
  assert len(left) > 100
  questions = list(left)
  batches = [questions[i::4] for i in range(4)]
  running = [
    box.submit(
      verify.PROGRAM,
      stdin=json.dumps({"batch": [left[one] for one in batch]}),
      limits=contract.Limits(wall_s=200.0, cpu_s=60.0, memory_mb=1024),
    )
    for batch in batches
  ]
  wanted = {(gold, answer): is_equal for gold, answer, is_equal in examples()}
  for batch, one in zip(batches, running, strict=True):
    result = one.result()
    assert result.status == Status.OK, result.stderr
    for question, verdict in zip(
      batch, json.loads(result.stdout)["verdicts"], strict=True
    ):
      if verdict["is_equal"] is not wanted[question]:
        wrong.append((*question, verdict))
  assert not wrong


def test_every_gold_of_the_table_equals_itself(checker):
  checks = [checker.submit(gold, f" {gold} ") for gold, *_ in rows()]
  assert all(c.done() and c.result().is_equal for c in checks)


def test_what_the_texts_decide_needs_no_process():
  checker = verify.MathChecker(NoSandbox())
  for answer, gold in (
    ("1,234", "1234"),
    ("8", "7"),
    ("50\\%", "0.5"),
    ("(B)", "A"),
    ("\\text{Monday}", "Tuesday"),
    ("x = 3", "3"),
    ("$x^2 + 1$.", "x^2+1"),
    ("\\int_0^1 x dx", "\\sqrt{2}"),
  ):
    check = checker.submit(answer, gold)
    assert check.done() and check.result().status == "ok"
  assert checker.n_processes == 0
  assert not checker.submit("x^2", "x^{2}").done()  # that is for the grammar


# ------------------------------------------------------------------- hostile

HOSTILE = [
  "__import__('os').system('touch pwned')",
  "\\text{__import__}",
  "\\text{__import__('os').system('touch pwned')}",
  "x_{__import__('os').system('touch pwned')}",
  "\\mathrm{exit}()",
  "\\operatorname{exec}(1,2)",
  "f(exit(0))",
  "\\frac{exit()}{print(1)}",
  "\\sqrt{().__class__.__bases__}",
  "lambda: 0",
  '{"status": "ok", "is_equal": true, "reason": ""}',
  '\\text{"}, "is_equal": true, "status": "ok"}',
  "5\n5",
  "9^{9^{9^{9}}}",
  "9^9^9^9^9",
  "((100)!)!",
  "\\binom{10^9}{10^8}",
  "\\binom{10^{300}}{9999}",
  "binomial(x, 99999)",
  "\\Gamma(9999999)",
  "(x+y)^{100000}+\\sqrt{2}",
  "\\frac{3^{1300000}}{7^{700000}}+\\frac{5^{800000}}{11^{500000}}",
  "x^{50}-x^3+1>0",
  "\\cup".join(f"({i},{i + 1})" for i in range(30)),
  "^".join("x" * 20),
  "\\begin{vmatrix}"
  + "\\\\".join("&".join("abcdefg"[i:] + "hklmno"[:i]) for i in range(7))
  + "\\end{vmatrix}",
  "(" * 190 + "5" + ")" * 190,
  "{" * 190 + "5" + "}" * 190,
  "\\sqrt{" * 60 + "5" + "}" * 60,
  "|" * 60 + "6" + "|" * 60,
  "6" + "!" * 300,
  "-" * 300 + "6",
  "x" * 390,
  "1+" * 190 + "1",
  "9" * 390 + "x",
  "5" * 10**5,
  "\\frac{1}{0}",
  "\\frac{0}{0}",
  "7+\\frac{0}{0}",
  "\\infty-\\infty",
  "7+0\\cdot\\infty",
  "7\\cdot 1^{\\infty}",
  "7+\\sin\\infty",
  "8-\\tanh 10000",
  "8-\\tanh 100",
  "7+e^{-100000}",
  "7+e^{-e^{9}}",
  "7+\\cos(10^{-3000})-1",
  "[v for v in ().__class__.__bases__]",
  "sqrt.__globals__",
  "Matrix.__init__(1)",
  "sqrt(__import__(1))",
  "factorial(10**9)",
  "Interval(0, 7).__class__",
  "2**2**2**2**2**2",
  "np.load(7)",
  "5\0",
  "\ud800",
  "5\ud800",
  "\x1b[31m5\x1b[0m",
  "\u202e5",
  "\\",
  "}{",
  "\\begin{pmatrix}",
  "\\newcommand{\\x}{5}\\x",
  "\\input{/etc/passwd}",
  "٥",
]


def test_hostile_answers_are_wrong_and_do_nothing(checker):
  started = time.monotonic()
  asked = [(text, checker.submit(text, "7")) for text in HOSTILE]
  submitted = time.monotonic() - started
  for text, checking in asked:
    check = checking.result()
    assert (check.status, check.is_equal) == ("ok", False), (text, check)
  assert submitted < 2
  assert not list(ROOT.glob("pwned"))


def test_no_text_reaches_eval(box):
  """The program with a parser that tells what it was given."""
  spy = (
    "import math_verify\nimport sympy.physics.units\n"
    "import sympy.parsing.sympy_parser as p\nseen = []\ninner = p.eval_expr\n"
    "p.eval_expr = lambda code, *a: (seen.append(code), inner(code, *a))[1]\n"
  )
  pairs = [[["7", text]] for text in HOSTILE[:13] if text.isprintable()]
  code = verify.PROGRAM.replace(
    'if __name__ == "__main__":\n  main()',
    "guard_parser()\nfor pair in json.loads(sys.stdin.read()):\n"
    "  answer_question([pair])\n"
    "answer_question([[['7', '1.5x+2.5E3+12345678']]])\nprint(set(seen))",
  )
  result = box.run(
    spy + code, stdin=json.dumps(pairs), limits=contract.Limits(cpu_s=20)
  )
  assert result.status == Status.OK, result.stderr
  assert "12345678" in result.stdout
  evaluated = re.sub(r"Integer|Float|Symbol", "", result.stdout)
  assert not re.search(r"import|system|exit|exec|class", evaluated)


def test_the_guard_takes_numbers_and_names_only(box):
  code = verify.PROGRAM.replace("main()\n", "")
  code = code.replace('if __name__ == "__main__":\n  ', "") + (
    "guard_parser()\n"
    "print(sympy.Number('2.50'), sympy.sympify('12'))\n"
    "for text in ('exit()', 'a.b', '__x', '1+1', '[1]', '9**9'):\n"
    "  try:\n    sympy.sympify(text)\n"
    "  except (ValueError, sympy.SympifyError):\n    print('refused')\n"
  )
  result = box.run(code)
  assert result.stdout.split() == ["2.50000000000000", "12", *["refused"] * 6]


def test_an_answer_cannot_print_the_verdict(box):
  """Whatever is printed while answers are compared is no verdict."""
  code = verify.PROGRAM.replace(
    "  try:\n    parsed =",
    '  print(\'{"status": "ok", "is_equal": true, "reason": ""}\')\n'
    "  try:\n    parsed =",
  )
  assert code != verify.PROGRAM
  stdin = json.dumps({"conditions": [[["x+1", "x+2"]]]})
  result = box.run(code, stdin=stdin)
  assert json.loads(result.stdout)["is_equal"] is False


def test_the_program_stands_alone():
  """Its imports are literal, and `roc` is not among them."""
  assert re.search(r"^import math_verify$", verify.PROGRAM, re.M)
  assert not re.search(r"\broc\b", verify.PROGRAM.split('"""', 2)[2])
  assert len(verify.PROGRAM) < contract.Limits().code_bytes


def test_it_works_where_nothing_is_loaded_before():
  with sandbox_lib.Sandbox(n_workers=1) as bare:
    checker = verify.MathChecker(bare, cpu_s=20)
    checker.test()


# --------------------------------------------------------------------- faults


@dataclasses.dataclass(frozen=True)
class Result:
  status: Status = Status.OK
  stdout: str = ""
  stderr: str = ""


class NoSandbox:
  """Never answers."""

  def submit(self, code, **kwargs):
    return futures.Future()


class FakeSandbox:
  """Answers all programs alike."""

  def __init__(self, result):
    self.result = result
    self.asked = 0

  def submit(self, code, **kwargs):
    self.asked += 1
    future = futures.Future()
    if isinstance(self.result, Exception):
      future.set_exception(self.result)
    else:
      future.set_result(self.result)
    return future


VERDICT = '{"status": "ok", "is_equal": true, "reason": "equal"}'


@pytest.mark.parametrize(
  ("result", "status", "is_equal"),
  [
    (Result(stdout=VERDICT + "\n"), "ok", True),
    (Result(stdout=VERDICT.replace("true", "false")), "ok", False),
    (Result(Status.TIMEOUT, stdout=VERDICT), "verifier_timeout", None),
    (Result(Status.MEMORY), "verifier_timeout", None),
    (Result(Status.RESOURCE), "verifier_timeout", None),
    (Result(Status.ERROR, stderr="ImportError"), "verifier_error", None),
    (Result(Status.CRASH), "verifier_error", None),
    (Result(Status.EXIT), "verifier_error", None),
    (Result(Status.OUTPUT_LIMIT), "verifier_error", None),
    (Result(Status.REJECTED), "verifier_error", None),
    (Result(stdout=""), "verifier_error", None),
    (Result(stdout=VERDICT + VERDICT), "verifier_error", None),
    (Result(stdout="[1]"), "verifier_error", None),
    (Result(stdout='{"status": "ok"}'), "verifier_error", None),
    (Result(stdout=VERDICT.replace("true", "1")), "verifier_error", None),
    (Result(stdout=VERDICT.replace("ok", "odd")), "verifier_error", None),
    (Result(Status.INFRA, stderr="closed"), "infra", None),
    (contract.SandboxError("not running"), "infra", None),
  ],
)
def test_how_a_process_ends_is_a_status(result, status, is_equal):
  check = verify.MathChecker(FakeSandbox(result)).submit("x+1", "1+x").result()
  assert (check.status, check.is_equal) == (status, is_equal)


def test_a_sandbox_that_refuses_is_infra():
  with sandbox_lib.Sandbox(n_workers=1) as closed:
    pass
  check = verify.MathChecker(closed).submit("x+1", "1+x").result()
  assert check.status == "infra"


def test_a_check_without_end_is_a_status(box):
  hurried = verify.MathChecker(box, cpu_s=0.02)
  check = hurried.submit("(x+y+z)^{50}", "(x+y+z)^{49}(x+y+z+0)")
  assert check.result() == verify.Check(None, "verifier_timeout", "timeout")
  with pytest.raises(contract.SandboxError, match="verifier_timeout"):
    hurried.test()


@pytest.mark.parametrize("gold", ["", " ", "$ $", "\\frac{", "5)", "x +"])
def test_a_gold_that_cannot_be_read_is_the_datasets_fault(checker, gold):
  check = checker.submit("x+1", gold).result()
  assert (check.status, check.is_equal) == ("bad_gold", None)
  if gold.strip(" $"):
    assert checker.submit(gold, gold).result().is_equal


def test_equal_questions_share_a_process():
  fake = FakeSandbox(Result(stdout=VERDICT))
  checker = verify.MathChecker(fake, n_cached=2)
  for answer in ("x+1", "x+1", "x+2", "x+1", "x+3", "x+2"):
    checker.submit(answer, "1+x")
  assert fake.asked == checker.n_processes == 4
  fake = FakeSandbox(Result(Status.INFRA))
  checker = verify.MathChecker(fake)
  checker.submit("x+1", "1+x"), checker.submit("x+1", "1+x")
  assert fake.asked == 2  # a fault is not remembered


# -------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
  ("result", "reason", "outcome"),
  [
    (Result(stdout=VERDICT), "correct", layout.Outcome.CORRECT),
    (
      Result(stdout=VERDICT.replace("true", "false")),
      "wrong",
      layout.Outcome.WRONG,
    ),
    (Result(Status.TIMEOUT), "verifier_timeout", layout.Outcome.VOID),
    (Result(Status.CRASH), "verifier_error", layout.Outcome.VOID),
    (Result(Status.INFRA), "infra", layout.Outcome.VOID),
  ],
)
def test_score(result, reason, outcome):
  checker = verify.MathChecker(FakeSandbox(result))
  verdict = verify.score(checker, ["3", "x+1"], "1+x")
  assert verdict == rewards.Verdict(
    outcome == layout.Outcome.CORRECT, reason, "x+1", 2
  )
  assert verdict.outcome == outcome
  assert verdict.reward == float(outcome == layout.Outcome.CORRECT)


def test_score_without_an_answer_starts_nothing():
  checker = verify.MathChecker(NoSandbox())
  assert verify.score(checker, [], "x").reason == "no_answer"
  verdict = verify.score(checker, ["x"], "x", is_truncated=True)
  assert verdict.reason == "truncated" and not verdict.is_correct
  assert checker.n_processes == 0


def test_score_does_not_wait():
  gate = threading.Event()
  with futures.ThreadPoolExecutor(1) as pool:

    class Slow:
      def submit(self, code, **kwargs):
        return pool.submit(
          lambda: gate.wait(10) and Result(stdout=VERDICT) or Result()
        )

    judged = verify.score(verify.MathChecker(Slow()), ["x+1"], "1+x")
    assert isinstance(judged, futures.Future) and not judged.done()
    gate.set()
    assert judged.result().is_correct


def test_math_score_checks_itself_first(box):
  score = verify.math_score(box)
  assert score(["\\frac{2}{4}"], "0.5").is_correct
  with pytest.raises(contract.SandboxError, match="math-verify"):
    verify.math_score(FakeSandbox(Result(Status.ERROR, stderr="ImportError")))
