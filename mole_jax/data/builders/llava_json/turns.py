"""The turns of an entry: spelled in several ways, written in one."""

from collections.abc import Mapping
from typing import Any

from mole_jax.data.builders.llava_json.problems import EntryError, shown
from mole_jax.data.records import Turn
from mole_jax.data.tokenizer import IMAGE_MARKER

# LLaVA's and ShareGPT's names, and those of chat messages.
ROLES = {
  "human": "human",
  "user": "human",
  "gpt": "gpt",
  "assistant": "gpt",
  "system": "system",
}


def read_turns(data: Mapping[str, Any]) -> tuple[list[Turn], int]:
  """The turns of an entry and the number of image markers in them.

  A system turn (or the entry's "system") comes first, if it says anything;
  then questions and answers alternate, a question first and an answer last.

  Raises EntryError with the reason "no_turns", "bad_turn", "unknown_role",
  "no_question", "turn_order", "empty_answer", "image_in_answer",
  "lone_surrogate" or "bad_kind".
  """
  rows = data.get("conversations")
  if not isinstance(rows, list) or not rows:
    got = f"it is {shown(rows)}" if "conversations" in data else "not there"
    keys = "" if "conversations" in data else f" (of {shown(dict(data))})"
    raise EntryError(
      "no_turns",
      f"wanted 'conversations', a list of turns; {got}{keys}.",
    )
  turns = [_read_turn(row, index) for index, row in enumerate(rows, 1)]
  system = data.get("system")
  if system is not None and turns[0]["from"] != "system":
    value = text(system, "the entry's 'system'", "bad_turn")
    turns.insert(0, Turn({"from": "system", "value": value, "kind": ""}))
  if turns[0]["from"] == "system" and not turns[0]["value"].strip():
    del turns[0]
  _check_order(turns, len(rows) - len(turns))
  for turn in turns:
    if turn["from"] != "human" and IMAGE_MARKER in turn["value"]:
      name = "an answer" if turn["from"] == "gpt" else "the system turn"
      raise EntryError(
        "image_in_answer",
        f"{name} holds {IMAGE_MARKER}; only questions may. Remove it.",
      )
  return turns, sum(turn["value"].count(IMAGE_MARKER) for turn in turns)


def text(value: Any, what: str, reason: str) -> str:
  """The value if it is text that UTF-8 can hold; else raises EntryError."""
  if not isinstance(value, str):
    raise EntryError(reason, f"{what} is {shown(value)}; wanted text.")
  if not value.isascii():
    try:
      value.encode()
    except UnicodeEncodeError as error:
      raise EntryError(
        "lone_surrogate",
        f"{what} holds half a character, "
        f"\\u{ord(value[error.start]):04x}; write the whole one (an emoji "
        "takes two such escapes), or remove it.",
      ) from None
  return value


def _read_turn(row: Any, index: int) -> Turn:
  if not isinstance(row, dict):
    raise EntryError(
      "bad_turn",
      f"turn {index} is {shown(row)}; wanted "
      '{"from": "human" or "gpt", "value": text}.',
    )
  # Tables hold null for the spelling that a row does not have.
  role = row.get("role") if row.get("from") is None else row["from"]
  value = row.get("content") if row.get("value") is None else row["value"]
  # Not hashable, if it is a list: no look-up before the type is known.
  known = ROLES.get(role) if isinstance(role, str) else None
  if known is None:
    raise EntryError(
      "unknown_role",
      f"turn {index} is from {shown(role)}; wanted one of {list(ROLES)}.",
    )
  kind = row.get("kind")
  return Turn(
    {
      "from": known,
      "value": text(value, f"the value of turn {index}", "bad_turn"),
      "kind": "" if kind is None else text(kind, "its kind", "bad_kind"),
    }
  )


def _check_order(turns: list[Turn], num_dropped: int) -> None:
  """Raises EntryError, turns counted as the file has them."""
  start = 1 if turns and turns[0]["from"] == "system" else 0
  if not any(turn["from"] == "human" for turn in turns):
    raise EntryError(
      "no_question", "no turn is from 'human'; wanted a question first."
    )
  for index, turn in enumerate(turns[start:]):
    number = index + start + num_dropped + 1
    wanted = ("human", "gpt")[index % 2]
    if turn["from"] != wanted:
      raise EntryError(
        "turn_order",
        f"turn {number} is from {turn['from']!r}, wanted "
        f"{wanted!r}: questions and answers alternate, a question first.",
      )
    if wanted == "gpt" and not turn["value"].strip():
      raise EntryError(
        "empty_answer",
        f"turn {number}, an answer, is empty; wanted text, or the "
        "turn and its question removed.",
      )
  if (len(turns) - start) % 2:
    raise EntryError(
      "turn_order", "the last question has no answer; answer or remove it."
    )
