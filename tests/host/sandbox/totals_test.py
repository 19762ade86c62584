"""What many processes, files or threads add up to has an end as well."""

import base64
import shutil
import subprocess

import pytest

from roc.host.sandbox import Limits
from roc.layout import ToolStatus

# Each process stays below the bound on one; their sum does not.
CHILDREN = """
import os, time
for _ in range({n}):
  if os.fork() == 0:
    break
kept = bytearray(b'x') * ({mb} << 20)
time.sleep(20)
"""


def test_many_processes_below_the_limit_are_memory_together(box):
  limits = Limits(memory_mb=128, total_memory_mb=256, wall_s=15)
  code = CHILDREN.format(n=7, mb=60)
  result = box.run(code, limits=limits)
  assert (result.status, result.cause) == (ToolStatus.MEMORY, "total")


def test_what_processes_share_is_counted_once(box):
  code = (
    "import os, time\nshared = bytearray(b'x') * (90 << 20)\n"
    "for _ in range(6):\n  if os.fork() == 0:\n    time.sleep(0.3)\n"
    "    os._exit(0)\ntime.sleep(0.4)\nprint('fits')"
  )
  limits = Limits(memory_mb=128, total_memory_mb=256)
  result = box.run(code, limits=limits)
  if box.info()["is_root"] or result.status == ToolStatus.OK:
    assert (result.status, result.stdout) == (ToolStatus.OK, "fits\n")


def test_the_sum_of_a_session_is_held_too(cell):
  limits = Limits(memory_mb=128, total_memory_mb=256, wall_s=15)
  assert cell("x = 1", limits=limits).status == ToolStatus.OK
  result = cell(CHILDREN.format(n=7, mb=60), limits=limits)
  assert (result.status, result.cause) == (ToolStatus.MEMORY, "total")


def test_a_session_that_grows_from_cell_to_cell_is_memory(cell):
  limits = Limits(memory_mb=128)
  assert cell("kept = []", limits=limits).status == ToolStatus.OK
  grow = "kept.append(bytearray(b'x') * (20 << 20))\nlen(kept)"
  results = [cell(grow, limits=limits) for _ in range(12)]
  assert results[0].status == ToolStatus.OK
  for full in results[-2:]:  # and the last report fits as well as the first
    assert full.status == ToolStatus.MEMORY
    assert full.stderr.endswith("MemoryError\n")
  assert cell("len(kept) > 3").stdout == "True\n"


MANY_FILES = """
for i in range(100):
  with open(f'f{i}', 'wb') as f:
    f.write(bytes(1 << 20))
"""


def test_many_files_fill_the_disk(box):
  result = box.run(MANY_FILES, limits=Limits(disk_mb=8, wall_s=10))
  assert result.status == ToolStatus.RESOURCE


def test_many_files_fill_the_disk_of_a_program_that_does_not_mind(box):
  code = (
    "import os\nwhile True:\n  try:\n"
    + "".join(f"    {line}\n" for line in MANY_FILES.strip().split("\n"))
    + "  except OSError:\n    break\n"
    "size = sum(os.stat(f).st_size for f in os.listdir())\n"
    "print(size <= 8 << 20)"
  )
  result = box.run(code, limits=Limits(disk_mb=8, wall_s=10))
  if box.tier == "isolated":  # the disk ends; what did not fit was refused
    assert (result.status, result.stdout) == (ToolStatus.OK, "True\n")
  else:
    assert (result.status, result.cause) == (ToolStatus.RESOURCE, "disk")


def test_files_that_were_removed_while_open_count(strong_box):
  code = (
    "import os\nkept = []\nfor i in range(50):\n"
    "  kept.append(open(f'f{i}', 'wb', 0))\n  os.unlink(f'f{i}')\n"
    "  kept[-1].write(bytes(1 << 20))"
  )
  result = strong_box.run(code, limits=Limits(disk_mb=8, wall_s=10))
  if strong_box.tier == "isolated":
    assert result.status == ToolStatus.RESOURCE


@pytest.mark.parametrize("make", ["open(n, 'w').close()", "os.mkdir(n)"])
def test_very_many_entries_are_resource(box, make):
  code = (
    f"import os\nfor i in range(200_000):\n  n = f'f{{i}}'\n  {make}\n"
    "import time\ntime.sleep(1)"
  )
  result = box.run(code, limits=Limits(n_entries=500, wall_s=10))
  assert result.status == ToolStatus.RESOURCE


@pytest.mark.parametrize("kind", ["symlink", "link"])
def test_links_are_entries_too(strong_box, kind):
  code = (
    "import os\nopen('f', 'w').close()\n"
    f"for i in range(5000): os.{kind}('f', f'l{{i}}')\n"
    "import time\ntime.sleep(1)"
  )
  result = strong_box.run(code, limits=Limits(n_entries=500, wall_s=10))
  # A hard link needs no inode: a directory in memory counts it as nothing.
  if kind == "symlink" or strong_box.tier != "isolated":
    assert result.status == ToolStatus.RESOURCE
  else:
    assert result.status in (ToolStatus.OK, ToolStatus.RESOURCE)


def test_one_file_that_grows_by_itself_is_resource(box):
  code = "with open('f', 'ab', 0) as f:\n  while True: f.write(bytes(1 << 16))"
  result = box.run(code, limits=Limits(file_mb=2, wall_s=10))
  assert result.status == ToolStatus.RESOURCE


def test_the_disk_of_a_session_is_one_for_all_cells(cell):
  limits = Limits(disk_mb=8)
  write = "open('f{}', 'wb').write(bytes(3 << 20)) and None"
  seen = [cell(write.format(i), limits=limits).status for i in range(5)]
  assert seen[0] == ToolStatus.OK and ToolStatus.RESOURCE in seen
  cell("import os\nfor f in os.listdir(): os.unlink(f)", limits=limits)
  assert cell("open('g', 'w').write('x')").stdout == "1\n"


def test_memory_without_a_process_is_refused(strong_box):
  code = (
    "import os\nfor make in (lambda: os.memfd_create('x'),\n"
    "             lambda: open('/dev/shm/roc-test', 'w')):\n"
    "  try:\n    make()\n    print('made')\n  except OSError:\n    pass"
  )
  assert strong_box.run(code).stdout == ""


BOMB = """
int main() { for (;;) fork(); }
"""


@pytest.mark.parametrize("tool", ["python", "session"])
def test_a_fork_bomb_in_c_ends(strong_box, tmp_path, tool):
  compiler = shutil.which("gcc") or shutil.which("cc")
  if compiler is None:
    pytest.skip("there is no C compiler here")
  source, binary = tmp_path / "bomb.c", tmp_path / "bomb"
  source.write_text("#include <unistd.h>" + BOMB)
  command = [compiler, "-O1", "-o", str(binary), str(source)]
  subprocess.run(command, check=True)
  code = (
    "import base64, os, sys\n"
    "fd = os.open('bomb', os.O_CREAT | os.O_WRONLY, 0o700)\n"
    "os.write(fd, base64.b64decode(sys.stdin.read()))\nos.close(fd)\n"
    "os.fork() or os.execv('./bomb', ['bomb'])\nos.wait()\n"
  )
  result = strong_box.run(
    code,
    stdin=base64.b64encode(binary.read_bytes()),
    limits=Limits(wall_s=2),
    tool=tool,
    trajectory="bomb",
  )
  strong_box.end_trajectory("bomb")
  assert result.status in (ToolStatus.RESOURCE, ToolStatus.TIMEOUT), result


def test_a_fork_bomb_by_the_shell_ends(strong_box):
  code = "import subprocess\nsubprocess.run(['sh', '-c', 'f() { f | f & }; f'])"
  code += "\nimport time\ntime.sleep(20)"
  result = strong_box.run(code, limits=Limits(wall_s=2))
  # The shells that cannot fork say so, each of them, which may be too much.
  ends = (ToolStatus.RESOURCE, ToolStatus.TIMEOUT, ToolStatus.OUTPUT_LIMIT)
  assert result.status in ends, result


def test_threads_and_files_until_there_are_no_more_can_be_caught(strong_box):
  code = (
    "import threading, time\n"
    "def more(make):\n  kept = []\n  try:\n"
    "    for _ in range(10_000): kept.append(make())\n"
    "  except (OSError, RuntimeError): pass\n  return len(kept)\n"
    "n_files = more(lambda: open('/dev/null'))\n"
    "n_threads = more(lambda: threading.Thread(\n"
    "  target=time.sleep, args=(0.2,)).start())\n"
    "print(8 < n_files < 64, 8 < n_threads < 100)"
  )
  result = strong_box.run(code)
  assert (result.status, result.stdout) == (ToolStatus.OK, "True True\n")


HOGS = {
  "processes": "import os\nwhile True:\n  try: os.fork()\n"
  "  except OSError: pass",
  "memory": "kept = []\nwhile True: kept.append(bytearray(b'x') * (1 << 20))",
  "output": "while True: print('x' * 10000)",
  "disk": MANY_FILES * 9,
  "time": "while True: pass",
}


@pytest.mark.parametrize("code", HOGS.values(), ids=HOGS.keys())
def test_a_neighbour_of_a_greedy_call_is_served(strong_box, code):
  greedy = [strong_box.submit(code, limits=Limits(wall_s=0.6))]
  walls = []
  while not greedy[-1].done():
    result = strong_box.run("print(1)")
    assert (result.status, result.stdout) == (ToolStatus.OK, "1\n")
    walls.append(result.wall_ms)
    if greedy[-1].done() and len(greedy) < 3:
      greedy.append(strong_box.submit(code, limits=Limits(wall_s=0.6)))
  assert max(walls) < 1000
  bounded = (
    *(ToolStatus.RESOURCE, ToolStatus.MEMORY, ToolStatus.TIMEOUT),
    *(ToolStatus.OUTPUT_LIMIT, ToolStatus.OK),
  )
  assert {f.result().status for f in greedy} <= set(bounded)


def test_monstrous_literals_are_never_infra(strong_box):
  limits = Limits(code_bytes=2 << 20, wall_s=3, memory_mb=256)
  for code in (
    "x = " + "9" * 1_000_000,
    "x = [" + "1," * 300_000 + "]",
    "x = " + "[" * 90 + "]" * 90,
    "x = '''" + "é" * 700_000 + "'''\nprint(len(x))",
    "print(len(str(7 ** 200_000)))",
    "f(" * 900 + ")" * 900,
    "if 1:\n"
    + "".join(" " * i + "if 1:\n" for i in range(1, 150))
    + " " * 150
    + "pass",
  ):
    result = strong_box.run(code, limits=limits)
    excuses = (ToolStatus.INFRA, ToolStatus.REJECTED)
    assert result.status not in excuses, (code[:50], result)
