"""An object store on this machine, as Google Cloud Storage speaks.

One dictionary of objects behind both ways in: the JSON protocol over HTTP,
which tensorstore speaks, and a file system of fsspec in place of gcsfs, which
etils opens and which remembers listings as that does. Directories are prefixes,
nothing can be renamed, and an object is there when its upload is over.
"""

import contextlib
import functools
import http.server
import json
import sys
import threading
import urllib.parse
from collections.abc import Iterator

import fsspec
import fsspec.spec
from etils.epath import backend

_API = "/storage/v1/b/"


class Store:
  """The objects of all buckets, by `bucket/name`."""

  def __init__(self):
    self.objects: dict[str, bytes] = {}
    self.generations: dict[str, int] = {}
    self.n_written = 0
    self.lock = threading.Lock()
    self.requests: list[str] = []
    self.fail_after = -1  # writes that still succeed; negative: all of them

  def put(self, key: str, data: bytes) -> None:
    with self.lock:
      if self.fail_after == 0:
        raise PermissionError(13, "Permission denied", f"gs://{key}")
      self.fail_after -= 1
      self.n_written += 1
      self.objects[key] = data
      self.generations[key] = self.n_written

  def delete(self, key: str) -> None:
    with self.lock:
      self.objects.pop(key, None)
      self.generations.pop(key, None)


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  store: Store

  def log_message(self, *args):
    pass

  def _parts(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    bucket, _, rest = url.path.partition(_API)[2].partition("/o")
    name = urllib.parse.unquote(rest.removeprefix("/"))
    self.store.requests.append(f"{self.command} {name}")
    return bucket, name, query

  def _answer(self, code, body=b"", **headers):
    self.send_response(code)
    for key, value in headers.items():
      self.send_header(key.replace("_", "-"), str(value))
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def _resource(self, key):
    bucket, _, name = key.partition("/")
    return {
      **{"kind": "storage#object", "bucket": bucket, "name": name},
      "size": str(len(self.store.objects[key])),
      "generation": str(self.store.generations[key]),
      "updated": "2020-01-01T00:00:00.000Z",
      "timeCreated": "2020-01-01T00:00:00.000Z",
    }

  def _is_refused(self, key, query):
    generation = self.store.generations.get(key, 0)
    wanted = query.get("ifGenerationMatch")
    return wanted is not None and int(wanted) != generation

  def do_GET(self):
    bucket, name, query = self._parts()
    key = f"{bucket}/{name}"
    store = self.store
    if not name:
      prefix = f"{bucket}/{query.get('prefix', '')}"
      start = f"{bucket}/{query.get('startOffset', '')}"
      end = f"{bucket}/{query['endOffset']}" if "endOffset" in query else None
      found = sorted(
        k
        for k in store.objects
        if k.startswith(prefix) and k >= start and (end is None or k < end)
      )
      items = [self._resource(k) for k in found]
      body = {"kind": "storage#objects", "items": items}
      return self._answer(200, json.dumps(body).encode())
    if key not in store.objects:
      return self._answer(404)
    if self._is_refused(key, query):
      return self._answer(412)
    generation = store.generations[key]
    if query.get("ifGenerationNotMatch") == str(generation):
      return self._answer(304)
    if query.get("alt") != "media":
      return self._answer(200, json.dumps(self._resource(key)).encode())
    data, code = store.objects[key], 200
    headers = {"x_goog_generation": generation}
    if wanted := self.headers.get("Range"):
      first, last = wanted.removeprefix("bytes=").split("-")
      n = len(data)
      first, last = int(first), min(int(last or n - 1), n - 1)
      data, code = data[first : last + 1], 206
      headers["Content_Range"] = f"bytes {first}-{last}/{n}"
    return self._answer(code, data, **headers)

  def do_POST(self):
    bucket, _, query = self._parts()
    data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    key = f"{bucket}/{query['name']}"
    if self._is_refused(key, query):
      return self._answer(412)
    try:
      self.store.put(key, data)
    except PermissionError:
      return self._answer(403, b'{"error": {"message": "Permission denied"}}')
    return self._answer(200, json.dumps(self._resource(key)).encode())

  def do_DELETE(self):
    bucket, name, query = self._parts()
    key = f"{bucket}/{name}"
    if key not in self.store.objects:
      return self._answer(404)
    if self._is_refused(key, query):
      return self._answer(412)
    self.store.delete(key)
    return self._answer(204)


class _Upload(fsspec.spec.AbstractBufferedFile):
  """Reads by range; writes when it is closed."""

  def _fetch_range(self, start, end):
    return self.fs.store.objects[self.path][start:end]

  def _initiate_upload(self):
    self.parts = []

  def _upload_chunk(self, final=False):
    self.buffer.seek(0)
    self.parts.append(self.buffer.read())
    if final:
      self.fs.store.put(self.path, b"".join(self.parts))
    return True


class FileSystem(fsspec.AbstractFileSystem):
  """What gcsfs would be."""

  protocol = ("gcs", "gs")
  cachable = False
  store: Store

  def ls(self, path, detail=True, refresh=False, **kwargs):
    path = self._strip_protocol(path).rstrip("/")
    with contextlib.suppress(KeyError):
      if not refresh and (known := self.dircache[path]):
        return known if detail else [entry["name"] for entry in known]
    found = {}
    for key, data in sorted(self.store.objects.items()):
      if key == path:
        found[key] = {"name": key, "size": len(data), "type": "file"}
      elif key.startswith(f"{path}/"):
        name, is_below, _ = key[len(path) + 1 :].partition("/")
        name = f"{path}/{name}"
        kind = "directory" if is_below else "file"
        size = 0 if is_below else len(data)
        found[name] = {"name": name, "size": size, "type": kind}
    if not found:
      raise FileNotFoundError(path)
    self.dircache[path] = list(found.values())
    return list(found.values()) if detail else list(found)

  def invalidate_cache(self, path=None):
    self.dircache.clear()

  def mkdir(self, path, create_parents=True, **kwargs):
    pass

  def makedirs(self, path, exist_ok=False):
    pass

  def rmdir(self, path):
    pass

  def _rm(self, path):
    self.store.delete(self._strip_protocol(path))

  def created(self, path):
    return None

  def _open(self, path, mode="rb", block_size=None, **kwargs):
    if "r" in mode and path not in self.store.objects:
      raise FileNotFoundError(path)
    return _Upload(self, path, mode, cache_type="readahead")


@functools.cache
def _server() -> tuple[type[_Handler], str]:
  """One for the whole process: tensorstore reads its address once."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  return _Handler, f"http://127.0.0.1:{server.server_port}"


@contextlib.contextmanager
def serving(monkeypatch) -> Iterator[Store]:
  """An empty store that `gs://` means until the block ends."""
  store = Store()
  handler, url = _server()
  handler.store = store
  registry = sys.modules["fsspec.registry"]._registry
  system = type("Local", (FileSystem,), {"store": store})
  for name in FileSystem.protocol:
    monkeypatch.setitem(registry, name, system)
  monkeypatch.setenv("EPATH_USE_TF", "false")
  monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
  monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
  # etils keeps the file systems that it has made.
  known = backend.fsspec_backend._get_filesystem
  known.cache_clear()
  try:
    yield store
  finally:
    known.cache_clear()
