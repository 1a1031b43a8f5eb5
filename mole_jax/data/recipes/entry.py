"""What several layouts need: fields by name, pictures, entries of LLaVA's."""

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from mole_jax.data.builders.llava_json.problems import EntryError, shown
from mole_jax.data.tokenizer import IMAGE_MARKER


def wanted(entry: Mapping[str, Any], key: str, what: str) -> EntryError:
  """The error of a field that is not there or of another kind."""
  keys = f"not there (of {shown(dict(entry))})"
  got = f"it is {shown(entry[key])}" if key in entry else keys
  return EntryError(
    "layout", f"wanted {key!r}, {what}; {got}. Is it the right --recipe?"
  )


def text(entry: Mapping[str, Any], key: str) -> str:
  """A field of text, without the space around it.

  Raises EntryError with the reason "layout" where it is blank or no text.
  """
  value = entry.get(key)
  if not isinstance(value, str) or not value.strip():
    raise wanted(entry, key, "text")
  return value.strip()


def id_text(entry: Mapping[str, Any], key: str) -> str:
  """A field that tells a thing from others, a number or text, as text.

  Raises EntryError with the reason "layout".
  """
  value = entry.get(key)
  if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
    raise wanted(entry, key, "a number or text")
  return str(value)


def picture(value: Any) -> Any:
  """An image of an entry, named by its content if the entry holds its bytes.

  Such images have no path, and records about one picture must not be taken
  for records about several: the name becomes their `Sample.source`.

  Args:
    value: base64 text, or bytes in an object, {"bytes": ..., "path": ...}, as
      Hugging Face's parquet has them. Others are returned as they are.

  Raises EntryError with the reason "bad_image" for what is no base64.
  """
  data = value.get("bytes") if isinstance(value, dict) else value
  if isinstance(data, str):
    try:
      data = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
      raise EntryError(
        "bad_image", f"the image is no base64: {error}; encode it again."
      ) from error
  if not isinstance(data, bytes):
    return value
  return {"bytes": data, "path": hashlib.sha256(data).hexdigest()[:32]}


def question_and_answer(
  images: Sequence[Any], question: str, answer: str, id: str | None = None
) -> dict[str, Any]:
  """An entry with one question, its images before it."""
  turns = [
    {"from": "human", "value": f"{IMAGE_MARKER}\n" * len(images) + question},
    {"from": "gpt", "value": answer},
  ]
  return {"id": id, "image": list(images), "conversations": turns}


def conversation(entry: Mapping[str, Any]) -> dict[str, Any]:
  """LLaVA's own entry, read as LLaVA reads it; of its fields, these alone.

  An answer before the first question is left out (llava/train/train.py skips
  a first turn that is not from "human").

  Raises EntryError with the reason "layout".
  """
  turns = entry.get("conversations")
  if not isinstance(turns, list) or not turns:
    raise wanted(entry, "conversations", "a list of turns")
  first = turns[0]
  if len(turns) > 1 and isinstance(first, dict) and first.get("from") == "gpt":
    turns = turns[1:]
  return {
    "id": entry.get("id"),
    "image": entry.get("image"),
    "conversations": turns,
  }


def caption(entry: Mapping[str, Any]) -> dict[str, Any]:
  """LLaVA's entry of stage 1: a picture, something asked, its caption.

  Raises EntryError with the reason "layout".
  """
  made = conversation(entry)
  text(entry, "image")
  if len(made["conversations"]) != 2:
    raise wanted(entry, "conversations", "two turns, a question and a caption")
  return made
