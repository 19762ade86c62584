"""Folders and repositories: with a hub of our own, on this machine."""

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from roc import errors, hub

ROOT = pathlib.Path(__file__).parents[1]
COMMIT = {"main": "a" * 40, "v2": "b" * 40}
FILES = {
  "config.json": b'{"model_type": "qwen3"}',
  "tokenizer.json": b"{}",
  # More than the ten megabytes that the library takes in at a time.
  "model.safetensors": bytes(range(256)) * (90 << 10),
  "pytorch_model.bin": b"never asked for",
}


class Hub(http.server.BaseHTTPRequestHandler):
  """What huggingface_hub asks of the hub, for one repository."""

  protocol_version = "HTTP/1.1"
  asked: list[str] = []
  ranges: list[str] = []
  cut_at = 0  # bytes after which a download of the weights breaks off, once

  def log_message(self, *args):
    pass

  def do_HEAD(self):
    self._answer(is_head=True)

  def do_GET(self):
    self._answer(is_head=False)

  def _answer(self, is_head):
    path = self.path.split("?")[0]
    if path.startswith("/api/models/org/name/revision/"):
      revision = path.rpartition("/")[2]
      commit = {**COMMIT, **{c: c for c in COMMIT.values()}}.get(revision)
      if commit is None:
        return self._refuse(404, "RevisionNotFound")
      siblings = [{"rfilename": name} for name in FILES]
      body = {"id": "org/name", "sha": commit, "siblings": siblings}
      return self._send(json.dumps(body).encode(), is_head)
    if path.startswith("/api/models/org/name/tree/"):
      tree = [
        {"type": "file", "path": name, "size": len(body), "oid": "0" * 40}
        for name, body in FILES.items()
      ]
      return self._send(json.dumps(tree).encode(), is_head)
    if path.startswith("/api/models/org/private"):
      return self._refuse(401, "")
    if path.startswith("/api/models/org/gated"):
      return self._refuse(403, "GatedRepo")
    if path.startswith("/org/name/resolve/"):
      _, _, _, _, commit, name = path.split("/", 5)
      if not is_head:
        Hub.asked.append(f"{commit[0]}/{name}")
      return self._send(FILES[name], is_head, commit)
    return self._refuse(404, "RepoNotFound")

  def _refuse(self, code, name):
    self.send_response(code)
    self.send_header("X-Error-Code", name)
    self.send_header("X-Error-Message", name)
    self.send_header("Content-Length", "0")
    self.end_headers()

  def _send(self, body, is_head, commit=""):
    start = 0
    wanted = self.headers.get("Range")
    if wanted and not is_head:
      Hub.ranges.append(wanted)
      start = int(wanted.removeprefix("bytes=").split("-")[0])
    self.send_response(206 if start else 200)
    if commit:
      self.send_header("X-Repo-Commit", commit)
      self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
    if start:
      size = len(body)
      self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
    self.send_header("Content-Length", str(len(body) - start))
    self.end_headers()
    if is_head:
      return
    rest = body[start:]
    if Hub.cut_at and len(body) > Hub.cut_at:
      self.wfile.write(rest[: Hub.cut_at])
      Hub.cut_at = 0
      self.close_connection = True
      return
    self.wfile.write(rest)


@pytest.fixture
def served():
  Hub.asked, Hub.ranges, Hub.cut_at = [], [], 0
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  yield f"http://127.0.0.1:{server.server_port}"
  server.shutdown()
  thread.join()
  server.server_close()


@pytest.fixture
def fetch(tmp_path):
  """Fetches in a process of its own: the hub's settings are read at import."""

  def fetch(source, endpoint, *, weights=True, **environment):
    code = (
      "import sys; from roc import errors, hub\n"
      "try:\n"
      f"  print(hub.fetch({source!r}, weights={weights}))\n"
      "except errors.UserError as e:\n"
      "  sys.exit(f'error: {e}')\n"
    )
    plain = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
      [sys.executable, "-c", code],
      cwd=ROOT,
      env={
        **plain,
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        **environment,
      },
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
    )
    if done.returncode:
      last = done.stderr.strip().splitlines()[-1]
      assert last.startswith("error: "), done.stderr
      return last
    return pathlib.Path(done.stdout.strip().splitlines()[-1])

  return fetch


def test_folders_are_taken_as_they_are(tmp_path, monkeypatch):
  assert hub.fetch(str(tmp_path)) == tmp_path
  monkeypatch.chdir(tmp_path)
  found = hub.fetch("experiments/tiny_qwen3")
  assert found == ROOT / "experiments" / "tiny_qwen3"


@pytest.mark.parametrize(
  "source",
  [
    *("nowhere", "./org/name", "/org/name", "~/name", "a/b/c", "", "hf://name"),
    *("experiments/tiny_qwen4", "org/na me", "hf://a/b/c", "@v2"),
  ],
)
def test_paths_that_are_none_do_not_ask_the_hub(source, monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(errors.UserError, match="does not exist; name a folder"):
    hub.fetch(source)


def test_a_file_is_no_folder(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="is a file; name the folder"):
    hub.fetch(str(tmp_path / "file"))


def test_a_repository_is_fetched_once(served, fetch):
  first = fetch("org/name", served, weights=False)
  assert sorted(p.name for p in first.iterdir()) == [
    *("config.json", "tokenizer.json")
  ]
  whole = fetch("hf://org/name", served)
  assert whole == first
  weights = whole / "model.safetensors"
  assert weights.read_bytes() == FILES["model.safetensors"]
  assert sorted(Hub.asked) == [
    *("a/config.json", "a/model.safetensors", "a/tokenizer.json")
  ]
  # Without a connection too, and without asking.
  nowhere = "http://127.0.0.1:9"
  assert fetch("org/name", nowhere, HF_HUB_OFFLINE="1") == whole
  assert len(Hub.asked) == 3


def test_a_revision(served, fetch):
  found = fetch("org/name@v2", served, weights=False)
  assert found.name == COMMIT["v2"]
  said = fetch("org/name@v3", served)
  assert "org/name has no revision v3" in said


def test_what_broke_off_goes_on(served, fetch):
  Hub.cut_at = 12 << 20
  found = fetch("org/name", served)
  if isinstance(found, str):  # the library's own retries may have had enough
    assert "run the same command again" in found
    found = fetch("org/name", served)
  weights = found / "model.safetensors"
  assert weights.read_bytes() == FILES["model.safetensors"]
  assert any(r.startswith("bytes=") for r in Hub.ranges)


def test_what_cannot_be_had(served, fetch):
  assert "the hub has no model org/other" in fetch("org/other", served)
  said = fetch("org/private", served)
  assert "does not give org/private to this token" in said
  assert "check HF_TOKEN" in said
  assert "org/gated is gated: accept" in fetch("org/gated", served)
  said = fetch("org/name", served, HF_HUB_OFFLINE="1")
  assert "is not in the hub's cache" in said
  said = fetch("org/name", "http://127.0.0.1:9")
  assert "org/name" in said and "connect" in said
