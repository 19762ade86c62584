"""What a program must not be able to do, from which tier on, and its targets.

Each attack is a program of its own that says `through` or why not. Where a tier
does not promise to stop an attack it has to get through, so that a test that
sees it stopped above knows that it works.

Run by itself, this file starts a sandbox, throws every attack at it and prints
as JSON what got through:

    python tests/host/sandbox/attacks.py '{"without": ["landlock"]}'
"""

import dataclasses
import json
import sys

from roc.host import sandbox
from roc.host.sandbox import contract
from tests.host.sandbox.victims import Victim

_PRELUDE = r"""
import ctypes, errno, fcntl, json, os, resource, signal, socket, struct
import subprocess, sys
t = json.load(sys.stdin)
file, dir, pid = t["file"], t["dir"], t["pid"]
libc = ctypes.CDLL(None, use_errno=True)
def checked(result):
  if result == -1:
    raise OSError(ctypes.get_errno(), "libc")
  return result
def call(number, *arguments):
  libc.syscall.restype = ctypes.c_long
  words = [a if isinstance(a, bytes | ctypes.Array | ctypes.Structure)
           else ctypes.c_long(a) for a in arguments]
  return checked(libc.syscall(ctypes.c_long(number), *words))
def vector(data, address=None):
  return (ctypes.c_ulong * 2)(address or ctypes.addressof(data), len(data))
def insist(is_through):
  if not is_through:
    raise OSError(errno.EACCES, "not got")
try:
"""
_POSTLUDE = """
  print("through")
except OSError as error:
  print("stopped by", errno.errorcode.get(error.errno, error))
"""


@dataclasses.dataclass(frozen=True)
class Attack:
  """A program, and from which tier on it must fail.

  Attributes:
    name: of the test.
    tier: the weakest that stops it.
    code: statements; an OSError means that it was stopped.
    is_sure: it gets through wherever the tier is weaker.
    needs_root: it is sure only where the sandbox was started by root.
    counts: what the victim must have noted of it; "" where the program knows.
  """

  name: str
  tier: str
  code: str
  is_sure: bool = True
  needs_root: bool = False
  counts: str = ""

  @property
  def program(self) -> str:
    """The whole program."""
    body = "".join(f"  {line}\n" for line in self.code.strip().split("\n"))
    return _PRELUDE + body + _POSTLUDE

  def is_stopped_at(self, tier: str) -> bool:
    """Whether a tier promises to stop it."""
    return contract.TIERS.index(tier) >= contract.TIERS.index(self.tier)


def _all(tier: str, codes: dict[str, str], **kw) -> list[Attack]:
  return [Attack(name, tier, code, **kw) for name, code in codes.items()]


_READS = {
  "read a file": "open(file).read()",
  "read the users": "open('/etc/passwd').read()",
  "list the home": "os.listdir(t['home'])",
  "list the root": "os.listdir('/')",
  "list the processes": "os.listdir('/proc')",
  "list the sandbox": "os.listdir(t['root'])",
  "list the neighbours": "os.listdir('..')",
  "read an environment": (
    "insist(b'victim-environment' in open(f'/proc/{pid}/environ', 'rb').read())"
  ),
  "read a command line": "open(f'/proc/{pid}/cmdline').read()",
  "read descriptors": "os.listdir(f'/proc/{pid}/fd')",
  "read memory": (
    "with open(f'/proc/{pid}/mem', 'rb') as f:\n"
    "  f.seek(t['address'])\n"
    "  insist(f.read(13) == b'victim-memory')"
  ),
  "run a foreign program": "subprocess.run([dir + '/tool'], check=True)",
  "climb by dots": "open('../' * 30 + file[1:]).read()",
  "climb by the root link": "open('/proc/self/root' + file).read()",
  "climb by the directory link": (
    "open('/proc/self/cwd/' + '../' * 30 + file[1:]).read()"
  ),
  "follow a link": "os.symlink(file, 'mine')\nopen('mine').read()",
  "follow a directory link": (
    "os.symlink(dir, 'mine')\nopen('mine/file').read()"
  ),
  "read below a descriptor": (
    "root = os.open('/', os.O_PATH | os.O_DIRECTORY)\n"
    "os.read(os.open(file[1:], os.O_RDONLY, dir_fd=root), 1)"
  ),
  "reopen a descriptor": (
    "fd = os.open(file, os.O_PATH)\nopen(f'/proc/self/fd/{fd}').read()"
  ),
  "read from another directory": "os.chdir(dir)\nopen('file').read()",
  "read by openat2": (
    "how = (ctypes.c_ulonglong * 3)(0, 0, 0)\n"
    "os.read(call(437, -100, file.encode(), how, 24), 1)"
  ),
}
_WRITES = {
  "make a file": "open(dir + '/new', 'w').write('x')",
  "make a shared memory file": "open(t['shm'], 'w').write('x')",
  "overwrite a file": "open(file, 'w').write('x')",
  "append to a file": "open(file, 'a').write('x')",
  "truncate a file": "os.truncate(file, 0)",
  "empty a file by reading": "os.open(file, os.O_RDONLY | os.O_TRUNC)",
  "remove a file": "os.unlink(file)",
  "replace a file": "open('own', 'w').close()\nos.replace('own', file)",
  "take a file away": "os.rename(file, dir + '/moved')",
  "link to a file": "os.link(file, 'mine')\nopen('mine', 'a').write('x')",
  "write through a link": "os.symlink(file, 'm')\nopen('m', 'a').write('x')",
  "make a directory": "os.mkdir(dir + '/new')",
  "make a nameless file": "os.open(dir, os.O_TMPFILE | os.O_RDWR)",
  "write beside its directory": (
    "open('../new', 'w').close()\nos.unlink('../new')"
  ),
}
_SIGNALS = {
  "signal": "os.kill(pid, signal.SIGUSR1)",
  "signal a thread": "call(t['tgkill'], pid, pid, signal.SIGUSR1)",
  "signal a group": "os.killpg(pid, signal.SIGUSR1)",
  "signal with a value": (
    "info = (ctypes.c_int * 32)(signal.SIGUSR1, 0, -1)\n"
    "call(t['sigqueue'], pid, signal.SIGUSR1, info)"
  ),
}
_ROUNDABOUT_SIGNALS = {
  "signal by descriptor": (
    "signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGUSR1)"
  ),
  "signal by directory": (
    "at = os.open(f'/proc/{pid}', os.O_RDONLY)\n"
    "signal.pidfd_send_signal(at, signal.SIGUSR1)"
  ),
  "signal by input": (
    "a, b = socket.socketpair()\n"
    "fcntl.fcntl(a, fcntl.F_SETOWN, pid)\n"
    "fcntl.fcntl(a, 10, signal.SIGUSR1)\n"  # F_SETSIG
    "fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC)\n"
    "b.send(b'x')"
  ),
  "signal by an owner's control": (
    "a, b = socket.socketpair()\n"
    "fcntl.ioctl(a, 0x8901, struct.pack('i', pid))\n"  # FIOSETOWN
    "fcntl.fcntl(a, 10, signal.SIGUSR1)\n"
    "fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC)\n"
    "b.send(b'x')"
  ),
}
_NETWORK = {
  "tcp": "socket.create_connection(('127.0.0.1', t['tcp']), 2)",
  "udp": (
    "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "s.sendto(b'x', ('127.0.0.1', t['udp']))"
  ),
  "unix": "socket.socket(socket.AF_UNIX).connect(t['unix'])",
  "abstract": "socket.socket(socket.AF_UNIX).connect('\\0' + t['abstract'])",
}
_METADATA = {
  "change an owner": "os.chown(file, os.getuid(), -1)",
  "change times": "os.utime(file, (1, 1))",
  "change a mode": "os.chmod(file, 0o600)",
  "make a pipe": "os.mkfifo(dir + '/new')",
}
_SOCKETS = {
  "serve": "s = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()",
  "ask the kernel": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
  "connect from a child": (
    'code = \'import socket, sys; socket.create_connection(("127.0.0.1",'
    " int(sys.argv[1])), 2)'\n"
    "insist(not subprocess.run([sys.executable, '-c', code, str(t['tcp'])],"
    " stderr=subprocess.DEVNULL).returncode)"
  ),
  "make a datagram pair": (
    "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)"
  ),
}
_OTHERS = {
  "trace": "checked(libc.ptrace(0x4206, pid, 0, 0))",  # PTRACE_SEIZE
  "read by process_vm_readv": (
    "got = ctypes.create_string_buffer(13)\n"
    "theirs = vector(got, t['address'])\n"
    "call(t['vm_readv'], pid, vector(got), 1, theirs, 1, 0)\n"
    "insist(got.raw[:6] == b'victim')"
  ),
  "take a descriptor": "call(438, os.pidfd_open(pid), 0, 0)",
  "read limits": "resource.prlimit(pid, resource.RLIMIT_CORE)",
  "pin": "os.sched_setaffinity(pid, os.sched_getaffinity(0))",
  "slow down": "os.setpriority(os.PRIO_PROCESS, pid, 1)",
  "ask for everybody": "os.kill(-1, 0)",
  "make a user namespace": "checked(libc.unshare(0x10000000))",
  "fork into a user namespace": (
    "child = call(t['clone'], 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)\n"
    "child or os._exit(0)"
  ),
  "watch what others open": (
    "fd = checked(libc.inotify_init())\n"
    "checked(libc.inotify_add_watch(fd, os.__file__.encode(), 0x20))"
  ),
  "write out all disks": "checked(libc.syncfs(os.open('.', os.O_RDONLY)))",
  "take all slots for requests": (
    "call(0 if os.uname().machine == 'aarch64' else 206, 9, bytes(8))"
  ),
  "make a message queue": "checked(libc.msgget(0, 0o1600))",
  "make a shared segment": "checked(libc.shmget(0, 4096, 0o1600))",
  "add a key": "call(t['add_key'], b'user', b'k', b'x', 1, -2)",
}
# Denied everywhere that promises it; whether they work below is the machine's.
_MACHINE = {
  "raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
  "packet socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
  "virtual machine socket": "socket.socket(socket.AF_VSOCK)",
  "metadata server": "socket.create_connection(('169.254.169.254', 80), 0.3)",
  "name server": "insist(socket.getaddrinfo('metadata.google.internal', 80))",
  "mount": "checked(libc.mount(b'/', b'.', None, 4096, None))",
  "change the root": "os.chroot('.')",
  "enter a namespace": "checked(libc.setns(os.pidfd_open(pid), 0x40000000))",
  "set the time": "checked(libc.settimeofday((ctypes.c_long * 2)(1, 1), 0))",
  "set a clock": "checked(libc.clock_settime(0, (ctypes.c_long * 2)(1, 1)))",
  "name the machine": "checked(libc.sethostname(b'x', 1))",
  "load a program": "call(t['bpf'], 0, bytes(128), 128)",
  "count events": "call(t['perf'], bytes(128), 0, -1, -1, 0)",
  "handle faults": "call(t['userfaultfd'], 0)",
  "ring": "call(425, 4, bytes(120))",
  "change personality": "checked(libc.personality(0x0040000))",
  "make a device": "os.mknod('null', 0o20666, os.makedev(1, 3))",
}

ATTACKS = [
  *_all("confined", _READS),
  *_all("confined", _WRITES),
  *_all("confined", _SIGNALS, counts="signals"),
  *_all("filtered", _ROUNDABOUT_SIGNALS, counts="signals"),
  *_all("filtered", _NETWORK, counts="connections"),
  *_all("filtered", _METADATA),
  *_all("filtered", _SOCKETS),
  *_all("filtered", _OTHERS),
  *_all("filtered", _MACHINE, is_sure=False),
  Attack(
    "change the library",
    "confined",
    "os.open(os.path.dirname(os.__file__) + '/colorsys.py', os.O_RDWR)",
    needs_root=True,
  ),
  Attack(
    "open by handle",
    "filtered",
    "handle = (ctypes.c_uint * 34)(128)\nmount = (ctypes.c_int * 1)()\n"
    "call(t['to_handle'], -100, file.encode(), handle, mount, 0)\n"
    "call(t['by_handle'], os.open(dir, os.O_RDONLY), handle, 0)",
    needs_root=True,
  ),
  Attack("signal process 1", "confined", "os.kill(1, 0)", needs_root=True),
]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came of an attack.

  Attributes:
    is_through: it did what it wanted.
    said: what its program printed.
    has_changed: something of the victim's is not as before.
  """

  is_through: bool
  said: str
  has_changed: bool


def throw(attack: Attack, box: sandbox.Sandbox, victim: Victim) -> Outcome:
  """Runs an attack and looks at what it has done."""
  told = victim.plant(box._link._root)
  before, counts = victim.snapshot(), victim.counts()
  result = box.run(attack.program, stdin=json.dumps(told))
  after, new_counts = victim.snapshot(), victim.counts()
  is_through = result.stdout == "through\n"
  if attack.counts:
    is_through = counts[attack.counts] != new_counts[attack.counts]
  has_changed = (before, counts) != (after, new_counts)
  return Outcome(is_through, result.stdout + result.stderr, has_changed)


def main(argv: list[str]) -> None:
  """Prints the plan in force and which attacks got through."""
  with (
    sandbox.Sandbox(n_workers=1, **json.loads(argv[1])) as box,
    Victim.start() as victim,
  ):
    through = [a.name for a in ATTACKS if throw(a, box, victim).is_through]
    plan = box.info()["plan"]
  print(json.dumps({"plan": plan, "through": through}))


if __name__ == "__main__":
  main(sys.argv)
