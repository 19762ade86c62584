"""Programs that turn on what lies around them; whoever comes next sees none."""

import os

import pytest

from roc.layout import ToolStatus

DIRECTORY = {
  "remove it": "os.rmdir(here)",
  "put a link in its place": "os.rmdir(here)\nos.symlink(input(), here)",
  "put a file in its place": "os.rmdir(here)\nopen(here, 'w').close()",
  "close it": "os.mkdir('inner')\nos.chmod(here, 0)",
  "remove all directories": "shutil.rmtree(os.path.dirname(here))",
  "remove the sandbox's": "shutil.rmtree(os.path.dirname(here) + '/..', True)",
}


@pytest.mark.parametrize("tool", ["python", "session"])
@pytest.mark.parametrize("code", DIRECTORY.values(), ids=DIRECTORY.keys())
def test_a_program_may_do_away_with_its_directory(box, code, tool, tmp_path):
  canary = tmp_path / "canary"
  canary.mkdir(mode=0o755)
  code = f"import os, shutil\nhere = os.getcwd()\n{code}"
  result = box.run(code, stdin=str(canary), tool=tool, trajectory="away")
  box.end_trajectory("away")
  assert result.status in (ToolStatus.OK, ToolStatus.ERROR), result
  again = box.run("open('own', 'w').write('x')\nprint('fine')")
  assert (again.status, again.stdout) == (ToolStatus.OK, "fine\n")
  assert os.stat(canary).st_mode & 0o777 == 0o755


LEAVE = """
import fcntl, os, time
flags = fcntl.fcntl(0, fcntl.F_GETFL)
for _ in range(300):  # a call that is ending, of any sandbox here, may hold it
  try:
    fcntl.flock(0, fcntl.LOCK_EX | fcntl.LOCK_NB)
    break
  except BlockingIOError:
    time.sleep(0.01)
else:
  raise TimeoutError
fcntl.fcntl(0, fcntl.F_SETFL, flags | os.O_NONBLOCK | os.O_APPEND)
print(flags & (os.O_NONBLOCK | os.O_APPEND))
"""


@pytest.mark.parametrize("tool", ["python", "session"])
def test_locks_and_flags_of_a_device_end_with_their_call(box, tool):
  for name in "abc":
    result = box.run(LEAVE, tool=tool, trajectory=name)
    box.end_trajectory(name)
    shown = result.stdout.splitlines()[0]
    assert (result.status, shown) == (ToolStatus.OK, "0"), result
