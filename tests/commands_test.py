"""The small commands: what they print, and sentences for mistakes."""

import functools
import io
import json
import pathlib

import jax
import numpy as np
import pytest

from roc import generate, main, scripted
from roc.device import engine, model, weights
from roc.host import pretrained, template_chat
from roc.host import tokenizer as tokenizer_lib

ROOT = pathlib.Path(__file__).parents[1]
TINY = ROOT / "experiments" / "tiny_qwen3"
MODELS = ROOT / "tests" / "golden" / "models"
CALL = '{"name": "python", "arguments": {"code": "print(1)"}}'
CALL = f"<tool_call>{CALL}</tool_call>"
CALLED = {"name": "python", "arguments": {"code": "print(1)"}}
BAD = {"rejected": "bad JSON: 1e999"}
TEMPLATE = (
  "{%- for m in messages -%}"
  "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
  "{%- endfor -%}"
  "{%- if add_generation_prompt -%}"
  "{{ '<|im_start|>assistant\\n' }}"
  "{%- endif -%}"
)


@pytest.fixture(scope="module", autouse=True)
def _loaded_once():
  """Qwen's vocabulary takes three seconds to read, and nothing changes it."""
  with pytest.MonkeyPatch.context() as patch:
    load = functools.cache(pretrained.load_tokenizer)
    patch.setattr(pretrained, "load_tokenizer", load)
    yield


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
  """Engines of the same settings are one, as compiling them takes long."""
  made = {}
  make_sampler = generate.make_sampler

  def reuse(values, asked):
    names = ("model", "n", "max_tokens", "temperature", "top_k", "top_p")
    key = (*(getattr(values, name) for name in names), tuple(asked.stop_ids))
    if key not in made:
      made[key] = make_sampler(values, asked)
    return made[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(generate, "make_sampler", reuse)
    yield


@pytest.fixture
def run(capsys, monkeypatch):
  def run(*argv, text=""):
    given = io.BytesIO(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(given))
    code = main.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err

  return run


@pytest.fixture
def as_json(run):
  """Runs with --json: nothing but JSON on stdout, nothing on stderr."""

  def as_json(*argv, text=""):
    code, out, err = run(*argv, "--json", text=text)
    assert (code, err) == (0, "")
    return [json.loads(line) for line in out.splitlines()]

  return as_json


@pytest.fixture
def refused(run):
  """Runs into a mistake: one sentence, exit code 2."""

  def refused(*argv, text=""):
    code, out, err = run(*argv, text=text)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("error: ")
    return err

  return refused


# -------------------------------------------------------------------- render


def test_render(as_json, tmp_path):
  golden = ROOT / "tests" / "golden" / "chat" / "goldens.jsonl"
  cases = [
    case
    for case in map(json.loads, golden.read_text("utf-8").splitlines())
    if case["template"] == ""
  ]
  path = tmp_path / "rows.jsonl"
  path.write_text(
    "\n\n".join(json.dumps(case["request"]) for case in cases), "utf-8"
  )
  found = as_json("render", "--model", TINY, "--input", path)
  assert found == [{"text": c["text"], "ids": c["ids"]} for c in cases]


def test_any_name_may_be_a_variable_and_any_text_content(as_json, run):
  row = '{"messages": [{"role": "user", "content": "\\ud800 \\ufdd0 x"}], '
  row = (row + '"self": 1, "template": "x"}').encode("utf-8-sig")
  (found,) = as_json("render", "--model", TINY, text=row)
  assert found["text"] == "<|im_start|>user\n\ufffd \ufdd0 x<|im_end|>\n"
  code, out, _ = run("render", "--model", TINY, text=row)
  assert code == 0 and "user\n\ufffd \ufdd0 x" in out


def test_render_for_people_and_with_another_template(run):
  row = '{"messages": [{"role": "user", "content": "Hi"}]}'
  code, out, _ = run("render", "--model", TINY, text=row)
  assert code == 0 and "<|im_start|>user\nHi<|im_end|>" in out
  assert "tokens)" in out
  _, out, _ = run("render", "--model", TINY, "--template=rstar2", text=row)
  assert "<reason></reason>" in out


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("", "standard input holds no line such as"),
    ("{", "standard input line 1: not JSON"),
    ("\n[]", "line 2: expected a JSON object"),
    ("{}", "line 1: field 'messages' must be a list"),
    ('{"messages": []}', "line 1: field 'messages' is empty"),
    ('{"messages": ["a"]}', "'messages' must be a list of objects"),
    ('{"messages": [{}], "tools": {}}', "'tools' must be"),
    ('{"messages": [{"role": "user"}]}', "line 1: "),
  ],
)
def test_lines_that_cannot_be_rendered(refused, text, said):
  flags = ["--template=rstar2"] if "role" in text else []
  assert said in refused("render", "--model", TINY, *flags, text=text)


def test_folders_that_cannot_render(refused, tmp_path):
  row = '{"messages": [{"role": "user", "content": "Hi"}]}'
  assert "required: --model" in refused("render")
  for folder in (tmp_path, tmp_path / "none"):
    assert str(folder) in refused("render", "--model", folder, text=row)
  tokenizer_lib.quickstart_tokenizer().save(tmp_path / "tokenizer.json")
  said = refused("render", "--model", tmp_path, text=row)
  assert "no chat template" in said
  said = refused("render", "--model", TINY, "--input", tmp_path / "x")
  assert "x: No such file" in said
  (tmp_path / "y").write_bytes(b"\xff")
  said = refused("render", "--model", TINY, "--input", tmp_path / "y")
  assert "it is not UTF-8" in said


# --------------------------------------------------------------------- parse


@pytest.mark.parametrize(
  ("text", "want"),
  [
    ("Just text.", {"content": "Just text.", "calls": []}),
    (
      f"See: {CALL} done",
      {
        "content": "See:  done",
        "calls": [{"name": "python", "arguments": {"code": "print(1)"}}],
      },
    ),
    (
      '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>',
      {"content": "", "calls": [{"name": "f", "arguments": {"x": 1}}]},
    ),
    (
      "<tool_call>{bad}</tool_call>" + CALL,
      {
        "content": "",
        "calls": [
          {"rejected": "bad JSON: "},
          {"name": "python", "arguments": {"code": "print(1)"}},
        ],
      },
    ),
    ("a <tool_call>{", {"content": "a", "calls": [{"rejected": "unclosed"}]}),
    ("", {"content": "", "calls": []}),
    (f"Hi {CALL}<|im_end|>\n", {"content": "Hi", "calls": [CALLED]}),
    (
      CALL.replace('"print(1)"', "NaN") + CALL.replace('"print(1)"', "1e999"),
      {"content": "", "calls": [{"rejected": "bad JSON: NaN"}] + [BAD]},
    ),
    ("é 数 \U0001f600", {"content": "é 数 \U0001f600", "calls": []}),
  ],
)
@pytest.mark.parametrize("flags", [(), ("--model", TINY)])
def test_parse(as_json, text, want, flags):
  (found,) = as_json("parse", *flags, text=text)
  for got, wanted in zip(found["calls"], want["calls"], strict=True):
    if "rejected" in wanted:
      assert got["rejected"].startswith(wanted["rejected"]) and len(got) == 1
    else:
      assert got == wanted
  assert found["content"] == want["content"] and len(found) == 2


def test_parse_for_one_tool(as_json, run, refused):
  other = CALL.replace("python", "search")
  (found,) = as_json("parse", "--tool=python", text=other)
  assert found["calls"] == [{"rejected": "unknown tool: use 'python'"}]
  code, out, _ = run("parse", text=CALL + other + "<tool_call>")
  assert code == 0 and out.count("call: ") == 2 and "rejected: unclosed" in out
  assert "invalid choice: 'x'" in refused("parse", "--tool=x")
  assert "none does not exist" in refused("parse", "--model=none")


def test_parse_in_a_dialect(as_json, refused):
  call = '{"name": "python", "parameters": {"code": "1"}}'
  (found,) = as_json("parse", "--dialect=llama3", text=f"So:\n{call}\n")
  assert found == {
    "content": "So:",
    "calls": [{"name": "python", "arguments": {"code": "1"}}],
  }
  (found,) = as_json("parse", text=call)
  assert found["calls"] == []
  assert "invalid choice: 'x'" in refused("parse", "--dialect=x")


# -------------------------------------------------------------------- verify


@pytest.mark.parametrize(
  ("gold", "answer", "correct", "status"),
  [
    ("1/2", "0.5", True, "ok"),
    ("42", "43", False, "ok"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt 2}", True, "ok"),
    ("x^2+1", "x^2-1", False, "ok"),
    (r"so \boxed{7}", r"hence \boxed{7.0}", True, "ok"),
    (r"\mathbb{Z}_8", "3", None, "bad_gold"),
    ("", "3", None, "bad_gold"),
    ("3", "", False, "ok"),
    ("3", "\u202e3\x00", False, "ok"),
    ("-x+1", "1-x", True, "ok"),
  ],
)
def test_verify(as_json, gold, answer, correct, status):
  (found,) = as_json("verify", "--gold", gold, "--answer", answer)
  assert (found["correct"], found["status"]) == (correct, status)
  assert found["reason"] and set(found) == {"correct", "status", "reason"}


def test_verify_for_people(run, refused):
  assert run("verify", "--gold=1", "--answer=1")[1].startswith("correct (ok")
  assert run("verify", "--gold=1", "--answer=2")[1].startswith("wrong (ok")
  assert run("verify", "--gold=", "--answer=2")[1].startswith("cannot say (bad")
  assert "required: --answer" in refused("verify", "--gold=1")


# ------------------------------------------------------------------ generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A random model with the quickstart's tokenizer and a template."""
  path = tmp_path_factory.mktemp("published") / "model"
  tokenizer = tokenizer_lib.quickstart_tokenizer()
  shapes = model.ModelConfig(
    vocab_size=tokenizer.vocab_size + 3,
    d_model=32,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=16,
    d_ff=64,
  )
  params = jax.jit(model.Policy(shapes).init)(jax.random.key(5))
  weights.export(params, shapes, path, dtype="float32")
  tokenizer.save(path / "tokenizer.json")
  side = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
  (path / "tokenizer_config.json").write_text(json.dumps(side))
  return path


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_greedy_ids_are_the_reference_s(as_json, name):
  golden = np.load(MODELS / name / "golden.npz")
  flags = ("generate", "--model", MODELS / name, "--greedy", "--max_tokens=24")
  assert len(golden["length"]) == 3
  for i, n in enumerate(golden["length"]):
    ids = ",".join(map(str, golden["right_ids"][i][:n]))
    (found,) = as_json(*flags, "--ids", ids)
    assert found["ids"] == golden["greedy"][i].tolist()
    assert "text" not in found


@pytest.mark.slow
def test_samples_depend_on_the_seed_alone(as_json, folder):
  flags = ("generate", "--model", folder, "--prompt=1 + 1?", "--max_tokens=12")
  sampled = (*flags, "--temperature=1.0", "--n=3")
  first = as_json(*sampled)
  assert first == as_json(*sampled) and len(first) == 3
  assert first != as_json(*sampled, "--seed=1")
  assert len({tuple(f["ids"]) for f in first}) > 1
  (greedy,) = as_json(*flags)
  assert greedy["stop"] in ("max tokens", "end of turn")
  assert len(greedy["ids"]) <= 12


@pytest.mark.slow
def test_the_prompt_may_come_from_stdin_and_be_raw(as_json, run, folder):
  raw = ("generate", "--model", folder, "--raw", "--max_tokens=5")
  (found,) = as_json(*raw, text="12 + 34 =\n")
  (again,) = as_json(*raw, "--prompt=12 + 34 =")
  assert found == again
  code, out, _ = run(*raw, "--n=2", "--temperature=1", text="12")
  assert code == 0 and "--- 2 of 2" in out


def test_with_the_tool_calls_are_run(as_json, folder, monkeypatch):
  """The model's own ids are replaced by a script; the tool is real."""
  tokenizer = pretrained.load_tokenizer(folder)
  chat = template_chat.TemplateChat(
    tokenizer, tools=[generate.schema_of("python")], template="rstar2"
  )
  call = '{"name": "python", "arguments": {"code": "print(6 * 7)"}}'
  turns = [chat.call_ids(call), tokenizer.encode("It is 42.")]
  turns = [[*ids, *chat.turn_end_ids] for ids in turns]
  monkeypatch.setattr(
    generate,
    "make_sampler",
    lambda *_: scripted.ScriptedSampler(lambda *_: turns),
  )
  flags = ("generate", "--model", folder, "--prompt=6 * 7?", "--tool=python")
  (found,) = as_json(*flags, "--template=rstar2")
  (ran,) = found["calls"]
  assert (ran["status"], ran["text"]) == ("ok", "42")
  assert "It is 42." in found["text"] and found["stop"] == "answered"


def test_a_tool_that_the_template_does_not_show(refused, folder):
  flags = ("generate", "--model", folder, "--prompt=x", "--tool=python")
  assert "does not show the tool 'python'" in refused(*flags)


def test_what_cannot_be_generated(refused, folder, tmp_path):
  flags = ("generate", "--model", folder, "--prompt=x")
  for flag, said in (
    ("--temperature=-1", "--temperature must be 0 (greedy), or at least"),
    ("--temperature=1e-9", "--temperature must be 0 (greedy), or at least"),
    ("--greedy --temperature=1", "not allowed with argument --greedy"),
    ("--temperature=inf", "at least 0.0001 and finite"),
    ("--top_p=0", "--top_p must be above 0"),
    ("--top_p=nan", "--top_p must be above 0"),
    ("--top_k=999999", "--top_k (999999) exceeds the vocabulary of"),
    ("--max_tokens=0", "--max_tokens must be from 1 to"),
    ("--max_tokens=10000000", "--max_tokens must be from 1 to"),
    ("--n=0", "--n must be at least 1"),
    ("--seed=-1", "--seed must be from 0"),
    ("--n=x", "invalid int"),
    ("--ids=1,x", "--ids: invalid literal"),
    ("--ids=99999", "--ids must be numbers from 0 to"),
    ("--prompt=", "the prompt is empty"),
  ):
    assert said in refused(*flags, *flag.split())
  assert "leave out one" in refused(*flags, "--raw", "--tool=python")
  assert "no tokenizer" in refused(
    "generate", "--model", MODELS / "qwen3", "--prompt=x"
  )
  (tmp_path / "tokenizer_config.json").write_text("{}")
  (tmp_path / "tokenizer.json").write_bytes(
    (folder / "tokenizer.json").read_bytes()
  )
  said = refused("generate", "--model", tmp_path, "--prompt=x")
  assert "no chat template" in said and "--raw" in said
  said = refused("generate", "--model", tmp_path, "--prompt=x", "--raw")
  assert "config.json cannot be read" in said
  said = refused("generate", "--model", TINY, "--prompt=x")
  assert "safetensors" in said


def test_help_of_each_names_its_flags(run):
  for name in ("render", "parse", "verify", "generate"):
    with pytest.raises(SystemExit) as done:
      run(name, "--help")
    assert done.value.code == 0


def test_samples_come_as_they_are_written(folder, monkeypatch):
  """The first is there while the engine still draws the second."""
  flags = ["--model", str(folder), "--prompt=1?", "--n=2", "--max_tokens=20"]
  values = generate.make_parser().parse_args(flags)
  asked = generate._read_prompt(values)
  n_left = []

  class Sampler:
    def submit(self, requests):
      return list(range(len(requests)))

    def decode(self):
      n_left.append(2 - len(n_left))
      end = engine.Drawn([asked.stop_ids[0]], [0.0], [0.0], True)
      more = engine.Drawn([5], [0.0], [0.0], False)
      return ({0: end, 1: more}, {1: end}, {})[len(n_left) - 1]

    def release(self, handles):
      pass

  found = generate._without(values, Sampler(), asked)
  assert next(found)["ids"] == [asked.stop_ids[0]] and len(n_left) == 1
  assert next(found)["ids"] == [5, asked.stop_ids[0]] and len(n_left) == 2
  assert list(found) == []


def test_too_little_memory_is_a_sentence(refused, folder, monkeypatch):
  def full(*args, **options):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

  monkeypatch.setattr(engine, "Engine", full)
  said = refused("generate", "--model", folder, "--prompt=1?", "--n=7")
  assert "7 times" in said and "lower --max_tokens or --n" in said


def test_an_interrupt_is_a_word(run, monkeypatch):
  def interrupt(argv):
    raise KeyboardInterrupt

  monkeypatch.setattr("roc.parse.main", interrupt)
  code, out, err = run("parse")
  assert (code, out, err.strip()) == (130, "", "interrupted")
  monkeypatch.setattr("roc.convert.main", interrupt)  # which goes on
  code, _, err = run("convert", "gsm8k")
  assert code == 130 and "python -m roc.main convert gsm8k" in err
