"""From conversations to what supervised training reads: ids and roles.

Everything goes through the chat format of the rollouts, piece by piece as a
rollout grows, so that what is learnt is what will be sampled: the assistant's
turns carry loss, their end included, and nothing else does. Every call is read
back as the agent loop will read it; one that the loop would not run is refused.
"""

from collections.abc import Iterable, Iterator

from roc import layout
from roc.host import chat as chat_lib
from roc.host import conversations as conversations_lib
from roc.host import episode as episode_lib
from roc.host import messages as messages_lib
from roc.host import tools


class Writer:
  """Writes conversations down as episodes.

  Args:
    chat: makes the ids.
    toolbox: says which tool there is; nothing is run.
  """

  def __init__(self, chat: chat_lib.Chat, toolbox: tools.Toolbox):
    self._chat = chat
    self._toolbox = toolbox

  def episodes(
    self, conversations: Iterable[conversations_lib.Conversation]
  ) -> Iterator[episode_lib.Episode]:
    """`episode` of each."""
    return map(self.episode, conversations)

  def episode(
    self, conversation: conversations_lib.Conversation
  ) -> episode_lib.Episode:
    """Writes one conversation down.

    Returns:
      An episode that has ended and has no verdict: the conversation does not
      say what a right answer is.

    Raises:
      ValueError: it offers or calls another tool than the toolbox has, a call
        is without its answer, or the chat format has no place for something;
        the message names file, line and field.
    """
    try:
      return self._write(conversation)
    except messages_lib.MessageError as error:
      raise ValueError(f"{conversation.where}: {error}") from error

  def _write(
    self, conversation: conversations_lib.Conversation
  ) -> episode_lib.Episode:
    tool = self._toolbox.tool_name
    if conversation.tools is not None and set(conversation.tools) - {tool}:
      other = sorted(set(conversation.tools) - {tool})[0]
      raise messages_lib.MessageError(
        "tools", f"offers {other!r}, and the run's tool is {tool!r}"
      )
    turns = list(conversation.messages)
    system = turns.pop(0).content if turns[0].role == "system" else ""
    at = len(conversation.messages) - len(turns)
    out = episode_lib.Episode(
      task_id=conversation.id or conversation.where,
      question=turns[0].content,
    )
    out.append_prompt(self._chat.prompt_ids(turns[0].content, system))
    n_calls, i = 0, 1
    while i < len(turns):
      where = f"messages[{at + i}]"
      if turns[i].role == "assistant":
        n_calls = self._write_turn(out, turns[i], where)
        i += 1
      elif turns[i].role == "user":
        _check_answers(0, n_calls, where)
        out.append_environment(*self._chat.user_suffix(turns[i].content))
        i += 1
      else:
        answers = []
        while turns[i].role == "tool":
          answers.append(turns[i].content)
          i += 1
        _check_answers(len(answers), n_calls, where)
        out.append_environment(*self._chat.tool_suffix(answers))
    out.stop(layout.StopReason.ANSWERED)
    return out

  def _write_turn(
    self, out: episode_lib.Episode, turn: messages_lib.Message, where: str
  ) -> int:
    """Appends a turn of the assistant; returns how many calls it makes."""
    try:
      text = self._chat.turn_text(turn.content, turn.calls, turn.reasoning)
    except ValueError as error:
      raise messages_lib.MessageError(
        where, f"cannot be written: {error}"
      ) from error
    ids = self._chat.assistant_ids(text)
    parsed = self._toolbox.parse_turn(ids, self._chat)
    for i, call in enumerate(parsed.calls):
      if call.error is not None:
        field = f".tool_calls[{i}]" if turn.calls else ".content"
        raise messages_lib.MessageError(
          where + field,
          f"makes a call that would not run ({call.error}: {call.detail})",
        )
    if len(parsed.calls) < len(turn.calls):
      raise messages_lib.MessageError(
        f"{where}.tool_calls",
        "is written by the chat template in a way that is not read as calls;"
        " use another template, such as rstar2",
      )
    out.append_lesson(ids)
    out.record_turn(parsed)
    return len(parsed.calls)


def _check_answers(n_answers: int, n_calls: int, where: str) -> None:
  if n_answers != n_calls:
    raise messages_lib.MessageError(
      where,
      f"follows a turn with {n_calls} tool calls, and {n_answers} of them are"
      " answered; each needs one message of role tool",
    )
