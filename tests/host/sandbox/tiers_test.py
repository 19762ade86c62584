"""The tier that is reported is the tier that is enforced, on many machines.

Not what a sandbox says of itself decides here but which attacks get through.
Other machines are played by processes with less: another user, fewer
capabilities, a filter like that of a container.
"""

import errno
import json
import os
import pathlib
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap

import pytest

from roc.host.sandbox import SandboxError, namespaces, seccomp
from roc.host.sandbox import plan as plan_lib
from tests.host.sandbox import attacks, victims

ROOT = pathlib.Path(__file__).parents[3]
ATTACKS_FILE = pathlib.Path(attacks.__file__)
BY_NAME = {a.name: a for a in attacks.ATTACKS}
# That not the filter stops.
SIGNALS = {
  a.name
  for a in attacks.ATTACKS
  if a.counts == "signals" and a.tier == "confined"
}
needs_root = pytest.mark.skipif(
  os.getuid() != 0, reason="only root can play another machine"
)


def assert_enforced(report: dict, is_root: bool) -> None:
  """What got through is what the reported plan lets through."""
  plan, through = report["plan"], set(report["through"])
  confines_signals = bool(
    plan["own_uid"] or plan["namespaces"] or plan["landlock_abi"] >= 6
  )
  for attack in attacks.ATTACKS:
    is_stopped = attack.is_stopped_at(plan["tier"])
    if attack.name in SIGNALS:
      is_stopped = is_stopped and confines_signals
    if is_stopped:
      assert attack.name not in through, attack.name
    elif attack.is_sure and (is_root or not attack.needs_root):
      assert attack.name in through, attack.name


def report_of(box) -> dict:
  with victims.Victim.start() as victim:
    through = [
      a.name
      for a in attacks.ATTACKS
      if attacks.throw(a, box, victim).is_through
    ]
  return {"plan": box.info()["plan"], "through": through}


LEFT = {
  (): None,
  ("direct_namespaces",): None,
  ("direct_namespaces", "user_namespaces"): "confined",
  ("own_uid",): None,
  ("own_uid", "direct_namespaces", "user_namespaces"): "confined",
  ("landlock",): "filtered",
  ("seccomp",): "process",
  ("landlock", "seccomp", "own_uid"): "process",
}


@pytest.mark.slow
@pytest.mark.parametrize("without", LEFT, ids="-".join)
def test_without_a_part_the_tier_is_what_is_left(tools, boxes, without):
  with tools.Sandbox(n_workers=1, without=without) as box:
    assert box.tier == (LEFT[without] or boxes(None).tier)
    plan = box.info()["plan"]
    assert not ("own_uid" in without and plan["own_uid"])
    assert not ("seccomp" in without and plan["seccomp"])
    assert_enforced(report_of(box), os.getuid() == 0)
    assert box.run("print(1)").stdout == "1\n"


@pytest.mark.parametrize("feature", plan_lib.FEATURES)
def test_each_part_can_be_left_aside_and_is_missed(tools, feature):
  """In the fast set one attack for each part tells."""
  with tools.Sandbox(n_workers=1, without=(feature,)) as box:
    plan = box.info()["plan"]
    with victims.Victim.start() as victim:
      throw = lambda name: attacks.throw(BY_NAME[name], box, victim).is_through
      for name in ("read a file", "tcp", "make a user namespace"):
        is_stopped = BY_NAME[name].is_stopped_at(plan["tier"])
        assert throw(name) != is_stopped, name
  told = {
    "seccomp": plan["seccomp"],
    "landlock": plan["landlock_abi"],
    "own_uid": plan["own_uid"],
    "direct_namespaces": plan["namespaces"] == "direct",
    "user_namespaces": plan["namespaces"] == "user",
  }
  assert not told[feature]


@pytest.mark.parametrize(
  "least, without",
  [
    ("isolated", ("direct_namespaces", "user_namespaces")),
    ("T2", ("landlock",)),
    ("filtered", ("seccomp",)),
  ],
)
def test_less_than_the_least_refuses_to_start(tools, least, without):
  box = tools.Sandbox(n_workers=1, min_tier=least, without=without)
  with pytest.raises(SandboxError, match="min_tier|cannot be had"):
    box.start()
  with pytest.raises(SandboxError):
    box.run("print(1)")
  assert box.supervisor_pid is None


# Plays another machine and then runs the attacks there. First argument: what
# is to be given up; second: directories to show to a user who may not look
# where they lie; third: the arguments of the sandbox.
MACHINE = """
import ctypes, json, os, sys
what, shown, argument = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
def checked(result):
  if result == -1:
    raise OSError(ctypes.get_errno(), 'libc')
def mount(source, target, kind, flags):
  checked(libc.mount(source.encode(), target.encode(), kind, flags, None))
shown = json.loads(shown)
if shown:
  # Hidden parents become empty directories that hold nothing but what is
  # shown; descriptors keep the way to that open.
  checked(libc.unshare(0x20000))
  mount('none', '/', None, 0x4000 | 0x40000)
  kept = {path: os.open(path, os.O_PATH) for path in shown['paths']}
  for path in shown['hidden']:
    mount('tmpfs', path, b'tmpfs', 0)
    os.chmod(path, 0o755)
  for path, fd in kept.items():
    os.makedirs(path, exist_ok=True)
    mount(f'/proc/self/fd/{fd}', path, None, 4096 | 0x4000)
if what in ('capabilities', 'container'):
  kept = sum(1 << n for n in (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31))
  for n in range(41):
    if not kept >> n & 1:
      libc.prctl(24, n, 0, 0, 0)  # PR_CAPBSET_DROP
  low = kept & 0xFFFFFFFF
  words = (ctypes.c_uint32 * 6)(low, low, 0, 0, 0, 0)
  checked(libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), words))
if what in ('nobody', 'nobody without namespaces'):
  os.setgroups([])
  os.setresgid(65534, 65534, 65534)
  os.setresuid(65534, 65534, 65534)
if what in ('container', 'nobody without namespaces'):
  checked(libc.prctl(38, 1, 0, 0, 0))
  code = bytes.fromhex(os.environ.pop('FILTER'))
  class Program(ctypes.Structure):
    _fields_ = [('n', ctypes.c_ushort), ('code', ctypes.c_char_p)]
  program = Program(len(code) // 8, code)
  checked(libc.prctl(22, 2, ctypes.byref(program), 0, 0))
  assert libc.unshare(0x10000000) == -1
os.execv(sys.executable, [sys.executable, *json.loads(argument)])
"""
# What the usual profile of a container refuses to whoever lacks CAP_SYS_ADMIN.
CONTAINER_DENIES = {
  "x86_64": (165, 166, 155, 272, 308, 321, 298, 323, 250, 248, 249, 304),
  "aarch64": (40, 39, 41, 97, 268, 280, 241, 282, 219, 217, 218, 265),
}


def container_filter() -> str:
  """The profile as hexadecimal BPF, in words of the module under test."""
  machine = platform.machine()
  rules = dict.fromkeys(CONTAINER_DENIES[machine], seccomp._Rule(1))
  clone = namespaces._CLONE[machine][0]
  new = seccomp._Check(0, (0,), mask=0x7E020000)
  rules[clone] = seccomp._Rule(1, (new,))
  rules[435] = seccomp._Rule(38)  # clone3 seems absent
  runs, last = [(0, rules.get(0))], 470
  for number in range(1, last + 1):
    if rules.get(number) != runs[-1][1]:
      runs.append((number, rules.get(number)))
  program = [(0x20, 0, 0, 0), *seccomp._search(runs)]
  return b"".join(struct.pack("<HBBI", *line) for line in program).hex()


def hidden_parents(paths: list[str]) -> list[str]:
  """The topmost directories on the way that not everybody may walk through."""
  hidden = set()
  for path in paths:
    for parent in reversed(pathlib.Path(path).parents):
      if not parent.stat().st_mode & 0o001:
        hidden.add(str(parent))
        break
  return sorted(hidden)


def play(what: str, is_public: bool = True, **arguments) -> dict:
  """Runs all attacks on such a machine; returns the report."""
  return play_program(
    what, [str(ATTACKS_FILE), json.dumps(arguments)], is_public
  )


def play_program(what: str, program: list[str], is_public: bool = True) -> dict:
  """Runs Python with arguments on such a machine; returns what it prints."""
  environment = {
    "PYTHONPATH": str(ROOT),
    "PATH": os.environ["PATH"],
    "FILTER": container_filter(),
    "HOME": "/",
  }
  shown: dict = {}
  if is_public:
    site = [p for p in sys.path if p.endswith("-packages")]
    paths = {os.path.realpath(sys.base_prefix), str(ROOT), sys.prefix, *site}
    outer = sorted(
      p for p in paths if not any(p.startswith(q + "/") for q in paths - {p})
    )
    shown = {"paths": outer, "hidden": hidden_parents(outer)}
  folder = tempfile.mkdtemp()
  os.chmod(folder, 0o777)
  try:
    done = subprocess.run(
      [
        *(sys.executable, "-c", MACHINE, what, json.dumps(shown)),
        json.dumps(program),
      ],
      env={**environment, "TMPDIR": folder},
      cwd="/",
      capture_output=True,
      text=True,
      timeout=120,
    )
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout)


def has_user_namespaces() -> bool:
  """Whether an ordinary user may make one here."""
  code = textwrap.dedent("""
    import ctypes, os
    os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
    raise SystemExit(ctypes.CDLL(None).unshare(0x10000000) != 0)
  """)
  return subprocess.run([sys.executable, "-c", code]).returncode == 0


@needs_root
@pytest.mark.slow
def test_an_ordinary_user_is_isolated_by_a_user_namespace():
  if not has_user_namespaces():
    pytest.skip("users may make no namespaces here")
  report = play("nobody")
  assert report["plan"]["tier"] == "isolated"
  assert report["plan"]["namespaces"] == "user"
  assert not report["plan"]["own_uid"]
  assert_enforced(report, is_root=False)


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("tier", ["confined", "filtered", "process"])
def test_an_ordinary_user_can_have_less(tier):
  report = play("nobody", tier=tier)
  assert report["plan"]["tier"] == tier
  assert_enforced(report, is_root=False)


MEMORY = """
import json, os
from roc.host import sandbox
from roc.host.sandbox import linux
code = '''
import json, os
opened = []
for pid in json.loads(input()):
  try:
    open(f"/proc/{pid}/mem", "r+b").close()
    opened.append(pid)
  except OSError: pass
print(json.dumps(opened), open("/proc/self/mem", "r+b").name)
'''
with sandbox.Sandbox(n_workers=2, tier="filtered") as box:
  box.run("import numpy")
  others = linux.descendants(box._link.keeper_pid, 100)
  pids = [os.getpid(), box._link.keeper_pid, *others]
  results = [
    box.run(code, stdin=json.dumps(pids), tool=tool, trajectory="t")
    for tool in ("python", "session")
  ]
print(json.dumps([len(pids), *(r.stdout + r.stderr for r in results)]))
"""


@needs_root
def test_the_memory_of_the_trainer_is_closed_to_an_ordinary_user_at_t1():
  """Of the trainer, the keeper, the supervisor, templates and zygotes."""
  n_pids, *opened = play_program("nobody", ["-c", MEMORY])
  assert n_pids >= 6
  assert opened == ["[] /proc/self/mem\n"] * 2, opened


SIGNALLED = """
import json, os
from roc.host import sandbox
from roc.host.sandbox import linux
code = '''
import ctypes, json, os, signal
libc = ctypes.CDLL(None)
number = {"x86_64": (62, 200, 234), "aarch64": (129, 130, 131)}
kill, tkill, tgkill = number[os.uname().machine]
for pid in json.loads(input()):
  for n in (19, 15, 9):
    for how in (kill, pid), (kill, -pid), (tkill, pid), (tgkill, pid, pid):
      if not libc.syscall(*how, n): print("through", how)
'''
with sandbox.Sandbox(n_workers=1, tier="filtered") as box:
  box.run("import numpy")
  keeper, supervisor = box._link.keeper_pid, box.supervisor_pid
  pids = [os.getpid(), keeper, supervisor, *linux.children(supervisor)[:3]]
  results = [
    box.run(code, stdin=json.dumps(pids), tool=tool, trajectory="t")
    for tool in ("python", "session")
  ]
  told = [r.status.name + r.stdout + r.stderr for r in results]
  print(json.dumps([*told, box.stats()["restarts"]]))
"""


@needs_root
@pytest.mark.parametrize("user", ["root", "nobody"])
def test_no_call_ends_what_runs_it_at_t1(user):
  """Trainer, keeper, supervisor and templates, whose end others would pay."""
  assert play_program(user, ["-c", SIGNALLED]) == ["OK", "OK", 0]


PRIORITY = """
import contextlib, json, resource
for kind in (resource.RLIMIT_RTPRIO, resource.RLIMIT_NICE):
  with contextlib.suppress(ValueError):  # this root may not
    resource.setrlimit(kind, (40, 40))
from roc.host import sandbox
code = '''
import ctypes, os
for act in (lambda: os.nice(-9),
    lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(9))):
  try: print(act())
  except OSError as error: print(error.errno)
libc, n = ctypes.CDLL(None), 0
event, timer = (ctypes.c_int * 16)(0, 0, 10, 0), ctypes.c_void_p()
while n < 5000 and not libc.timer_create(0, event, ctypes.byref(timer)): n += 1
print(n < 5000)
'''
with sandbox.Sandbox(n_workers=1) as box:
  results = [
    box.run(code, tool=tool, trajectory="t") for tool in ("python", "session")
  ]
print(json.dumps([r.stdout + r.stderr for r in results]))
"""


@needs_root
def test_no_call_takes_precedence_where_the_user_may():
  results = play_program("root", ["-c", PRIORITY])
  assert results == [f"{errno.EPERM}\n{errno.EPERM}\nTrue\n"] * 2


# Descriptors that are under way are counted for all of a user.
UNDER_WAY = """
import json
from roc.host import sandbox
code = '''
import array, resource, socket
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
kept = []
try:
  while True:
    a, b = socket.socketpair()
    kept += a, b
    a.setblocking(False)
    fds = array.array("i", [a.fileno()] * 250)
    try:
      while True: a.sendmsg([b"x"], [(1, 1, fds)])
    except BlockingIOError: pass
except OSError as error: print(error.errno)
'''
limits = sandbox.Limits(wall_s=10, cpu_s=10)
with sandbox.Sandbox(n_workers=1, max_sessions=8, tier="confined") as box:
  cell = dict(tool="session", limits=limits)
  results = [box.run(code, trajectory="a", **cell)]
  results += [box.run("print(1)") for _ in "12"]
  results += [box.run("print(1)", trajectory=t, **cell) for t in "ab"]
print(json.dumps([r.stdout + r.stderr for r in results]))
"""


@needs_root
def test_descriptors_under_way_keep_nobody_from_passing_his():
  number, *others = play_program("nobody", ["-c", UNDER_WAY])
  assert number in (f"{errno.ETOOMANYREFS}\n", f"{errno.EMFILE}\n")
  assert others == ["1\n"] * 4


@needs_root
@pytest.mark.slow
def test_an_ordinary_user_without_namespaces_is_confined():
  report = play("nobody without namespaces")
  assert report["plan"]["tier"] == "confined"
  assert_enforced(report, is_root=False)


# Where only root can walk to the interpreter, a call keeps the user's id: a
# container's root has no capability that it could leave it for reading.
PUBLIC = [
  pytest.param(True, id="interpreter for all"),
  pytest.param(
    False,
    id="interpreter of root",
    marks=pytest.mark.skipif(
      not hidden_parents([os.path.realpath(sys.base_prefix)]),
      reason="everybody may walk to this interpreter",
    ),
  ),
]


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("is_public", PUBLIC)
def test_root_with_the_capabilities_of_a_container_uses_what_is_left(is_public):
  report = play("capabilities", is_public)
  plan = report["plan"]
  namespaces = "user" if has_user_namespaces() else None
  assert plan["namespaces"] == namespaces
  assert plan["tier"] == ("isolated" if namespaces else "confined")
  assert plan["own_uid"] == is_public
  assert_enforced(report, is_root=True)


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("is_public", PUBLIC)
def test_a_container_is_confined(is_public):
  report = play("container", is_public)
  plan = report["plan"]
  assert (plan["tier"], plan["namespaces"]) == ("confined", None)
  assert plan["own_uid"] == is_public
  assert_enforced(report, is_root=True)


@needs_root
@pytest.mark.slow
def test_a_container_that_is_asked_for_more_refuses(tmp_path):
  with pytest.raises(AssertionError, match="min_tier|isolated"):
    play("container", min_tier="isolated")
