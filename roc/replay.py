"""Saved rollouts in the place of sampling: the input of `train --replay`.

A directory of *.jsonl files, each line an `Episode` as `rollout` and `train`
write them. All of it is read and checked once, before any work starts; what
stays in memory is where each rollout lies. Groups are the rollouts of one
(step, place), in the order in which they first appear, files by name. Used
again, a group belongs to the step and the place where it is used.
"""

import dataclasses
import hashlib
import math
import pathlib

from roc import errors, layout
from roc.host import episode as episode_lib

_ROLES = frozenset(role.value for role in layout.Role if role != 0)
_MEND = "mend that line, or give a copy without it"

Key = tuple[int, int]  # (step, place), as drawn


@dataclasses.dataclass(frozen=True)
class Needs:
  """What a rollout and a group must be like to be trained on."""

  n_drawn: int  # rollouts of a group
  vocab_size: int  # of the model
  max_length: int  # tokens of an episode
  max_calls: int  # tool calls of an episode
  temperature: float  # at which its tokens were drawn


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where a line lies."""

  path: pathlib.Path
  number: int  # from 1
  offset: int
  size: int

  def __str__(self) -> str:
    return f"{self.path} line {self.number}"


class Replay:
  """Groups of saved rollouts, in a fixed order without end."""

  def __init__(self, directory: pathlib.Path, needs: Needs):
    """Reads and checks the whole directory.

    Args:
      directory: holds *.jsonl files.
      needs: what is checked.

    Raises:
      errors.UserError: names the file, the line or group, and the remedy.
    """
    self.directory = directory
    self.needs = needs
    self._n_passed_over = 0
    self._places: dict[Key, dict[int, _Place]] = {}
    self._paths = self._find()
    digest = hashlib.sha256()
    for path in self._paths:
      digest.update(f"{path.name}\n".encode())
      self._read(path, digest)
    self._digest = digest.hexdigest()[:16]
    self._check_groups()
    self._keys = list(self._places)

  def __len__(self) -> int:
    return len(self._keys)

  @property
  def identity(self) -> dict[str, str]:
    """What must not change between a run and its continuation."""
    return {"contents of train.replay": self._digest}

  def about(self, n_steps: int, n_prompts: int) -> str:
    """A line for people: what there is, and how often it will be used."""
    n_files = f"{len(self._paths)} file{'s' * (len(self._paths) > 1)}"
    text = (
      f"replay: {len(self)} groups of {self.needs.n_drawn} rollouts from"
      f" {n_files} in {self.directory}"
    )
    if self._n_passed_over:
      text += f", {self._n_passed_over} rollouts of evaluations passed over"
    if n_steps * n_prompts > len(self):
      step = len(self) // n_prompts + 1
      text += f"; they start over from the first in step {step}"
    return text

  def groups(
    self, start: int, count: int, step: int
  ) -> list[list[episode_lib.Episode]]:
    """Groups start .. start + count - 1 of the endless order, read anew.

    Returns:
      `count` lists of `needs.n_drawn` episodes: the first by rollout id,
      numbered 0..n_drawn - 1, at places start .. start + count - 1 of `step`,
      without what an earlier filter made of them.

    Raises:
      errors.UserError: a file is not as it was when it was checked.
    """
    return [
      self._group(
        self._keys[i % len(self)], group_index=i - start, place=i, step=step
      )
      for i in range(start, start + count)
    ]

  def _group(
    self, key: Key, group_index: int, place: int, step: int
  ) -> list[episode_lib.Episode]:
    group = []
    for _, at in sorted(self._places[key].items())[: self.needs.n_drawn]:
      try:
        with at.path.open("rb") as f:
          f.seek(at.offset)
          line = f.read(at.size)
        e = episode_lib.Episode.from_json(line, str(at))
      except (OSError, ValueError) as error:
        raise errors.UserError(
          f"{at} has changed since it was checked ({error}); start again"
        ) from error
      e.step, e.place = step, place
      e.group_index, e.rollout_id = group_index, len(group)
      e.kept = e.advantage = e.p_err = e.p_format = e.p_total = None
      e.why = ""
      group.append(e)
    return group

  # -------------------------------------------------------------- checking

  def _find(self) -> list[pathlib.Path]:
    if not self.directory.is_dir():
      raise errors.UserError(
        f"config.train.replay: {self.directory} is no directory; give one with"
        " *.jsonl files of rollouts, such as a run's rollouts/"
      )
    if (self.directory / "run.json").exists():
      raise errors.UserError(
        f"config.train.replay: {self.directory} is the directory of a run; give"
        f" that of its rollouts, {self.directory / 'rollouts'}"
      )
    paths = sorted(self.directory.glob("*.jsonl"))
    if not paths:
      raise errors.UserError(
        f"config.train.replay: {self.directory} holds no *.jsonl file; give a"
        " directory that `rollout` or `train` wrote, such as a run's rollouts/"
      )
    return paths

  def _read(self, path: pathlib.Path, digest) -> None:
    offset = 0
    try:
      with path.open("rb") as f:
        for number, line in enumerate(f, start=1):
          digest.update(line)
          if line.strip():
            self._add(_Place(path, number, offset, len(line)), line)
          offset += len(line)
    except OSError as e:
      raise errors.UserError(
        f"cannot read {path}: {e.strerror}; mend its permissions or move it out"
        " of the directory"
      ) from e

  def _add(self, place: _Place, line: bytes) -> None:
    try:
      e = episode_lib.Episode.from_json(line, str(place))
    except ValueError as error:
      text = str(error).removeprefix(f"{place}: ")
      if place.offset == 0:
        raise errors.UserError(
          f"{place.path} is no file of rollouts (line 1: {text}); give a"
          " directory that holds nothing else, such as a run's rollouts/"
        ) from error
      raise errors.UserError(
        f"{place} is no rollout ({text}); {_MEND}"
      ) from error
    if e.drawn_by == "evaluate":
      self._n_passed_over += 1
      return
    fault = _fault(e, self.needs)
    if fault:
      raise errors.UserError(f"{place}: {fault}")
    group = self._places.setdefault((e.step, e.place), {})
    if e.rollout_id in group:
      raise errors.UserError(
        f"{place}: step {e.step}, place {e.place}, rollout"
        f" {e.rollout_id} is also {group[e.rollout_id]}; give a copy"
        " without one of the two, and keep the rollouts of different runs in"
        " different directories"
      )
    group[e.rollout_id] = place

  def _check_groups(self) -> None:
    if not self._places:
      raise errors.UserError(
        f"config.train.replay: the files in {self.directory} hold no rollout to"
        f" train on ({self._n_passed_over} of evaluations); give a directory"
        " that `rollout` or `train` wrote"
      )
    n = self.needs.n_drawn
    for (step, at), group in self._places.items():
      if len(group) < n:
        path = next(iter(group.values())).path
        raise errors.UserError(
          f"{path}: the group of step {step}, place {at} has"
          f" {len(group)} of the {n} rollouts that config.filter.n_drawn asks"
          " for; lower n_drawn (and n_kept), or draw more with `rollout`"
        )


def _fault(e: episode_lib.Episode, needs: Needs) -> str:
  """Why an episode cannot be trained on, and the remedy; empty if it can."""
  if e.stop_reason is None:
    return (
      "the rollout has not ended (stop_reason is null); give a copy without its"
      " group, or draw it again"
    )
  if not e.token_ids:
    return f"the rollout holds no token; {_MEND}"
  for index in (min(e.token_ids), max(e.token_ids)):
    if not 0 <= index < needs.vocab_size:
      return (
        f"token id {index} is outside the model's vocabulary of"
        f" {needs.vocab_size}; replay with the tokenizer and the model that"
        " drew these rollouts"
      )
  if len(e) > needs.max_length:
    return (
      f"the rollout has {len(e)} tokens and the largest of"
      f" config.train.buckets is {needs.max_length}; add a longer bucket"
    )
  if len(e.tool_records) > needs.max_calls:
    return (
      f"the rollout has {len(e.tool_records)} tool calls and"
      f" config.sampling.max_calls is {needs.max_calls}; raise that"
    )
  if not _ROLES.issuperset(e.roles):
    return f"a role is not one of {sorted(_ROLES)}; {_MEND}"
  if not all(map(math.isfinite, (*e.logprobs, e.reward))):
    return f"a log-prob or the reward is not a finite number; {_MEND}"
  if fault := _logprob_fault(e, needs.temperature):
    return fault
  for name in ("place", "rollout_id", "n_turns"):
    if not 0 <= getattr(e, name) < 2**31:
      return f"{name} {getattr(e, name)} is out of range; {_MEND}"
  return ""


def _logprob_fault(e: episode_lib.Episode, temperature: float) -> str:
  """Why log-probs are not those of drawn tokens; empty if they are."""
  if e.temperature is None:
    return (
      "the rollout does not say at which temperature it was drawn; write it"
      " into the field temperature, or draw the rollouts again"
    )
  if e.temperature != temperature:
    return (
      f"the rollout was drawn at temperature {e.temperature:g} and"
      f" config.sampling.temperature is {temperature:g}, so its log-probs are"
      " those of another policy; set that to the same"
    )
  drawn, others = [], []
  for role, logprob in zip(e.roles, e.logprobs, strict=True):
    (drawn if role == layout.Role.MODEL else others).append(logprob)
  if drawn and max(drawn) > 0:
    return f"{max(drawn):g} is not the log of a probability; {_MEND}"
  if any(others):
    return f"a token that the model did not draw has a log-prob; {_MEND}"
  if drawn and not any(drawn):
    return (
      "all log-probs are 0, so they were not recorded; draw the rollouts again"
      " with `rollout`"
    )
  return ""
