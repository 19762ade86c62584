"""Makes goldens.jsonl: conversations as reference implementations write them.

The text is transformers' own, the ids are tiktoken's, so neither shares code
with the project. Qwen3's template and ranks are those of
experiments/tiny_qwen3; the other templates lie beside this file. Made with
transformers 5.12.1, jinja2 3.1.6 and tiktoken 0.14.0:

    python tests/golden/chat/make.py
"""

import base64
import json
import pathlib
import unicodedata

import tiktoken
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]
QWEN3 = ROOT / "experiments" / "tiny_qwen3"
CONFIG = json.loads((QWEN3 / "tokenizer_config.json").read_text("utf-8"))
PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATES = {
  "": CONFIG["chat_template"],
  "rstar2": (ROOT / "roc" / "templates" / "rstar2.jinja").read_text("utf-8"),
  "headers.jinja": (HERE / "headers.jinja").read_text("utf-8"),
  "plain.jinja": (HERE / "plain.jinja").read_text("utf-8"),
}
TOOL = {
  "type": "function",
  "function": {
    "name": "python",
    "description": "Führt <code> aus & gibt 出力 zurück.",
    "parameters": {
      "type": "object",
      "properties": {"code": {"type": "string", "description": "it's code"}},
      "required": ["code"],
    },
  },
}


def turn(role, content, **others):
  return {"role": role, "content": content, **others}


def call(code):
  function = {"name": "python", "arguments": {"code": code}}
  return {"type": "function", "id": "call00000", "function": function}


ASK = turn("user", "What is 12 * 13?")
SYSTEM = turn("system", "Be brief.\nAnd exact.")
CALLED = turn("assistant", "Let me see.", tool_calls=[call("print(12*13)")])
THOUGHT = turn("assistant", "156", reasoning_content="It is 12 * 13.")
INLINE = turn("assistant", "<think>\nhm\n</think>\n\n156")
ANSWER = turn("tool", "156")
AGAIN = turn("user", "And 13 * 14?")

# Decomposed, compatibility and joined characters; runs of white space.
UNICODE = (
  "e\u0301te\u0301 \u212b 한국 \U0001f469\u200d\U0001f52c 数学\t \n\n\n x"
)

CASES = [
  {"messages": [ASK]},
  {"messages": [ASK], "add_generation_prompt": True},
  {"messages": [SYSTEM, ASK], "add_generation_prompt": True},
  {"messages": [SYSTEM, ASK], "tools": [TOOL], "add_generation_prompt": True},
  {"messages": [ASK], "tools": [TOOL, TOOL], "add_generation_prompt": True},
  {"messages": [ASK, CALLED, ANSWER], "tools": [TOOL]},
  {
    "messages": [ASK, CALLED, ANSWER, ANSWER, turn("assistant", "156")],
    "tools": [TOOL],
  },
  {"messages": [ASK, turn("assistant", "156"), AGAIN]},
  {
    "messages": [turn("user", UNICODE)],
    "add_generation_prompt": True,
  },
  {"messages": [turn("user", "I'LL  don't 1234567 \r\n\r\n  \u00a0end ")]},
  {
    "messages": [
      ASK,
      turn("assistant", "", tool_calls=[call('print("<b>&é\\n")')]),
      ANSWER,
    ],
    "tools": [TOOL],
    "add_generation_prompt": True,
  },
]
# What only Qwen3's template knows.
OWN_CASES = [
  {
    "messages": [ASK],
    "add_generation_prompt": True,
    "enable_thinking": False,
  },
  {"messages": [ASK, THOUGHT]},
  {"messages": [ASK, THOUGHT, AGAIN], "add_generation_prompt": True},
  {"messages": [ASK, INLINE]},
  {"messages": [ASK, INLINE, AGAIN, INLINE]},
]


def encoding():
  ranks = {}
  for line in (QWEN3 / "qwen.tiktoken").read_bytes().splitlines():
    token, rank = line.split()
    ranks[base64.b64decode(token)] = int(rank)
  added = CONFIG["added_tokens_decoder"]
  # Every <...> token is a tag in a rendered conversation, special or not.
  tags = {token["content"]: int(i) for i, token in added.items()}
  return tiktoken.Encoding(
    "qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=tags
  )


def main():
  qwen = encoding()
  lines = []
  for name, template in TEMPLATES.items():
    for case in CASES + (OWN_CASES if not name else []):
      if name == "headers.jinja":
        case = case | {"bos_token": "<|endoftext|>"}
      messages, tools = case["messages"], case.get("tools")
      others = {k: v for k, v in case.items() if k not in ("messages", "tools")}
      (text,), _ = chat_template_utils.render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        **others,
      )
      plain = unicodedata.normalize("NFC", text)  # as Qwen's tokenizer does
      ids = qwen.encode(plain, allowed_special="all")
      row = {"template": name, "request": case, "text": text, "ids": ids}
      lines.append(json.dumps(row, ensure_ascii=False))
  out = HERE / "goldens.jsonl"
  out.write_text("\n".join(lines) + "\n", encoding="utf-8")
  print(f"{out}: {len(lines)} conversations")


if __name__ == "__main__":
  main()
