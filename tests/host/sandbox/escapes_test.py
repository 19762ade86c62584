"""What a program tries against the machine, and from which tier on in vain."""

import json
import os
import textwrap

import pytest

from roc.host.sandbox import Limits
from roc.host.sandbox import plan as plan_lib
from roc.layout import ToolStatus
from tests.host.sandbox import attacks, victims


@pytest.fixture(scope="module")
def victim():
  with victims.Victim.start() as victim:
    yield victim


@pytest.mark.parametrize("attack", attacks.ATTACKS, ids=lambda a: a.name)
def test_an_attack_gets_through_exactly_below_its_tier(box, victim, attack):
  outcome = attacks.throw(attack, box, victim)
  if attack.is_stopped_at(box.tier):
    assert not outcome.is_through and not outcome.has_changed, outcome.said
    assert outcome.said.startswith(("stopped by E", "through\n")) or (
      attack.counts or not attack.is_sure
    ), outcome.said
  elif attack.is_sure and (os.getuid() == 0 or not attack.needs_root):
    assert outcome.is_through, outcome.said


def test_no_call_sees_the_secrets_of_the_process_that_started_it(box, tools):
  """Neither in the environment nor anywhere in its own memory."""
  name, canary = tools.canary
  code = textwrap.dedent("""
    import os, sys
    half, rest = sys.stdin.read().split()
    rest = rest[::-1]  # so that the whole word stands nowhere
    found = any(half in k + v and rest in k + v for k, v in os.environ.items())
    try:
      maps = open('/proc/self/maps').read().splitlines()
    except OSError:
      maps = []
    n_bytes = 0
    for line in maps:
      span, mode, *_ = line.split()
      if mode[:2] != 'rw':
        continue
      start, end = (int(word, 16) for word in span.split('-'))
      with open('/proc/self/mem', 'rb', 0) as f:
        f.seek(start)
        data = f.read(end - start) or b''
      n_bytes += len(data)
      at = -1
      while (at := data.find(half.encode(), at + 1)) >= 0:
        after = data[at + len(half):][:len(rest)]
        found |= after == rest.encode()
    print(found, n_bytes > 1 << 20)
  """)
  stdin = f"{canary[:8]} {canary[8:][::-1]}"
  assert os.environ[name] == canary
  result = box.run(code, stdin=stdin)
  can_look = box.tier in ("process", "filtered")
  assert result.stdout == f"False {can_look}\n", result.stderr


def test_the_search_for_secrets_finds_one_that_is_there(boxes):
  code = (
    "import sys\nword = 'canary' + '-' + 'x' * 12\n"
    "data = open('/proc/self/mem', 'rb', 0)\ndata.seek(id(word))\n"
    "print(word.encode() in data.read(200))"
  )
  assert boxes("process").run(code).stdout == "True\n"


def test_another_calls_directory_is_out_of_reach(box, tools):
  leave = "import time\nopen('left', 'w').write('mine')\ntime.sleep(30)"
  look = (
    "import glob, os\n"
    "found = [f for f in glob.glob('../*/left') + glob.glob('../../*/*/left')]"
    "\nfor name in found:\n  print(open(name).read())"
  )
  other = box.submit(leave, limits=Limits(wall_s=40))
  assert tools.wait_until(lambda: tools.survivors(box))
  in_reach = box.tier in ("process", "filtered")
  expected = "mine\n" if in_reach else ""
  looked = lambda: set(box.run(look).stdout.splitlines(True))
  assert tools.wait_until(lambda: looked() == ({expected} - {""}))
  box.cancel(other)
  other.result()


def test_killing_whatever_answers_to_a_number_kills_no_other(boxes, tools):
  """At tiers that promise it: below, this would kill the test itself."""
  for tier in (None, "confined"):
    box = boxes(tier)
    if not plan_lib.Plan(
      tier=box.tier,
      landlock_abi=box.info()["plan"]["landlock_abi"],
      namespaces=box.info()["plan"]["namespaces"] or "",
      first_uid=1 if box.info()["plan"]["own_uid"] else None,
    ).confines_signals:
      continue
    with tools.left_as_found(box):
      neighbour = box.submit("import time\ntime.sleep(0.5)\nprint('lived')")
      code = (
        "import os, sys\nown = {os.getpid()}\n"
        "killed = 0\n"
        "for pid in [*range(1, 300), *map(int, sys.stdin.read().split())]:\n"
        "  if pid not in own:\n"
        "    try:\n      os.kill(pid, 9)\n      killed += pid != 1\n"
        "    except OSError:\n      pass\n"
        "print(killed)"
      )
      near = os.getpid()
      pids = {near, os.getppid(), box.supervisor_pid, box._link.keeper_pid}
      pids |= {*range(max(2, near - 2000), near + 2000)}
      result = box.run(code, stdin=" ".join(map(str, sorted(pids))))
      assert (result.status, result.stdout) == (ToolStatus.OK, "0\n")
      assert neighbour.result().stdout == "lived\n"


@pytest.mark.parametrize("how", ["0", "1", "mark - 1", "mark - 9"])
def test_a_daemon_that_changes_its_mark_dies_all_the_same(box, how):
  """A call's processes are known by a limit; the filter keeps it from them."""
  code = (
    "import os, resource, time\n"
    "try: mark = resource.getrlimit(10)[1]\n"
    "except OSError: mark = 1 << 30\n"
    "r, w = os.pipe()\n"
    "if os.fork() == 0:\n  os.setsid()\n  if os.fork(): os._exit(0)\n"
    f"  try:\n    resource.setrlimit(10, ({how}, {how}))\n"
    "    os.write(w, b'marked')\n"
    "  except (OSError, ValueError): os.write(w, b'refused')\n"
    "  os.closerange(0, 9)\n  while True: time.sleep(1)\n"
    "print(os.read(r, 9).decode())"
  )
  result = box.run(code)  # the fixture looks for what is left
  is_open = box.tier == "process"
  shown = "marked\n" if is_open else "refused\n"
  assert (result.status, result.stdout) == (ToolStatus.OK, shown)


def test_no_way_leads_to_more_privileges(box):
  code = textwrap.dedent(r"""
    import ctypes, os, shutil, stat, subprocess
    libc = ctypes.CDLL(None, use_errno=True)
    def capabilities():
      words = (ctypes.c_uint32 * 6)()
      libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), words)
      return words[0] | words[1] | words[3] | words[4] << 32
    def ids():
      return os.getresuid() + os.getresgid()
    before = ids(), capabilities()
    print('no new privileges', libc.prctl(39, 0, 0, 0, 0) == 1)
    print('few capabilities', capabilities() & ~0b110 == 0)
    print('one id', len({*ids()}) == 1)
    own = os.getuid()
    for call in (
      lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0),
      lambda: os.setgid(0), lambda: os.setgroups([0]),
      lambda: os.setreuid(own, 0), lambda: os.setegid(0),
    ):
      try:
        call()
      except OSError:
        pass
    every = (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)
    print('capset', libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), every))
    print('ambient', libc.prctl(47, 2, 21, 0, 0))
    libc.prctl(8, 1, 0, 0, 0)
    libc.prctl(28, 0, 0, 0, 0)
    shutil.copyfile('/bin/sh', 'sh')
    for mode in (0o6777, 0o777):
      try:
        os.chmod('sh', mode)
      except OSError:
        pass
    here = 'echo $(id -u) $(id -ru)'
    for shell in ('./sh', '/bin/sh'):
      try:
        out = subprocess.run([shell, '-c', here], capture_output=True).stdout
        print('same user', out == f'{own} {own}\n'.encode())
      except OSError:
        print('same user', True)
    for path in ('/bin/su', '/usr/bin/passwd', '/bin/mount', '/usr/bin/chsh'):
      if os.path.exists(path) and os.stat(path).st_mode & stat.S_ISUID:
        out = subprocess.run(
          [path, '-c', 'id -u'], capture_output=True, stdin=subprocess.DEVNULL
        ).stdout
        print('gained', own != 0 and out == b'0\n')
    print('as before', before == (ids(), capabilities()))
  """)
  lines = box.run(code, limits=Limits(wall_s=10)).stdout.splitlines()
  assert lines[-1] == "as before True", lines
  answers = [line.rsplit(" ", 1) for line in lines]
  assert {a for q, a in answers if q in ("capset", "ambient")} == {"-1"}
  assert {a for q, a in answers if q == "gained"} <= {"False"}
  rest = {a for q, a in answers if q not in ("capset", "ambient", "gained")}
  assert rest == {"True"}, lines
  if box.info()["plan"]["own_uid"]:
    assert box.run("import os\nprint(os.getuid() > 0)").stdout == "True\n"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86 only")
@pytest.mark.parametrize("kind", ["x32", "int 0x80"])
def test_foreign_system_calls_pass_by_no_filter(box, kind):
  if kind == "x32":
    call = "print(libc.syscall(0x40000000 | 41, 1, 1, 0) >= 0)"  # socket
  else:
    call = textwrap.dedent(r"""
      import mmap
      page = mmap.mmap(-1, 4096, prot=7)  # calls getpid by its old number
      page.write(b'\x53\xb8\x14\x00\x00\x00\xcd\x80\x5b\xc3')
      at = ctypes.addressof(ctypes.c_char.from_buffer(page))
      print(ctypes.CFUNCTYPE(ctypes.c_int)(at)() > 0)
    """)
  code = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n{call}"
  result = box.run(code)
  if box.tier == "process":
    assert result.status in (ToolStatus.OK, ToolStatus.CRASH)
    assert kind == "x32" or result.stdout in ("True\n", "")
  else:
    assert (result.status, result.stdout) == (ToolStatus.OK, "False\n")


def test_cleaning_up_after_a_call_follows_no_link(box, victim, tools):
  told = victim.plant(box._link._root)
  before = victim.snapshot()
  code = textwrap.dedent("""
    import json, os, sys
    t = json.load(sys.stdin)
    for name, target in (('dir', t['dir']), ('file', t['file']), ('up', '..')):
      os.symlink(target, name)
    os.makedirs('locked/inner')
    os.symlink(t['dir'], 'locked/inner/dir')
    os.symlink('/', 'locked/root')
    try:
      os.chmod('locked/inner', 0)
      os.chmod('locked', 0)
    except OSError:
      pass
    deep = os.open('.', os.O_RDONLY)
    for i in range(600):
      os.mkdir('d' * 100, dir_fd=deep)
      below = os.open('d' * 100, os.O_RDONLY, dir_fd=deep)
      os.close(deep)
      deep = below
    os.symlink(t['dir'], 'dir', dir_fd=deep)
    for i in range(300):
      open(f'f{i}', 'w').close()
    print('left')
  """)
  result = box.run(code, stdin=json.dumps(told))
  # Where the directory is on disk, a look may find it too deep before.
  assert result.stdout == "left\n" or result.cause == "disk", result
  trash = os.path.join(box._link._root, tools.scratch.TRASH)
  assert tools.wait_until(lambda: not tools.scratch_left(box), 3)
  assert tools.wait_until(lambda: not os.listdir(trash), 3)
  assert victim.snapshot() == before


@pytest.mark.slow
def test_a_hundred_thousand_files_hold_nobody_up(boxes, tools):
  box = boxes("process")
  limits = Limits(wall_s=60, cpu_s=60, n_entries=200_000, disk_mb=1024)
  code = "for i in range(100_000): open(f'f{i}', 'w').close()\nprint('left')"
  with tools.left_as_found(box):
    assert box.run(code, limits=limits).stdout == "left\n"
    waits = [box.run("print(1)").wall_ms for _ in range(100)]
    assert sorted(waits)[50] < 100
    trash = os.path.join(box._link._root, tools.scratch.TRASH)
    assert tools.wait_until(lambda: not os.listdir(trash), 60)
