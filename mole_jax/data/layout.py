"""The layout of a chat, as a Jinja template writes it down.

The template writes marks in place of what the turns say, so that contents can
be put in afterwards, as text and nothing else, and a layout serves every chat
of as many turns and images.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from mole_jax.data import jinja
from mole_jax.data.tokenizer import IMAGE_MARKER, SpecialToken, Tokenizer


class Slot(NamedTuple):
  """Where a content goes, and on which sides the template strips it."""

  index: int
  is_lstripped: bool
  is_rstripped: bool


class Start(NamedTuple):
  """Here an answer begins: what follows is learnt."""

  answer: int


class Stop(NamedTuple):
  """Here what is learnt ends."""


SYSTEM = -2  # Index of the system text; those of answers are odd.

# A chat without its contents: the template's words, special tokens, slots.
Part = str | SpecialToken | Slot | Start | Stop


class Form(NamedTuple):
  """How a template takes content, and what it puts behind an answer.

  `is_list`: as [{"type": "image"}, {"type": "text", "text": ...}].
  """

  is_list: bool
  end: SpecialToken | None


class _Written(NamedTuple):
  """A chat with marks for its contents, and where these are by index."""

  text: str
  marks: dict[int, re.Match[str]]


# White space around the mark shows whether the template strips contents; the
# quotes whether it escapes them, which nothing could be put in place of.
_MARK = '\x1f"\ue0a7Content {}\ue0a7"\x1f'
_MARKS = re.compile('(\x1f?)"\ue0a7Content (-?\\d+)\ue0a7"(\x1f?)')


def _write(
  script: jinja.Script,
  tokenizer: Tokenizer,
  form: Form,
  counts: Sequence[int],
  *,
  has_system: bool = False,
  is_prompt: bool = False,
) -> _Written:
  """Renders a chat of this many turns, each with this many images.

  Raises ValueError where the template fails or leaves a content out.
  """

  def message(role: str, index: int, count: int) -> jinja.Message:
    mark = _MARK.format(index)
    if not form.is_list:
      return {"role": role, "content": mark}
    parts = [{"type": "image"}] * count + [{"type": "text", "text": mark}]
    return {"role": role, "content": parts}

  messages = [message("system", SYSTEM, 0)] if has_system else []
  messages += [
    message(("user", "assistant")[index % 2], index, count)
    for index, count in enumerate(counts)
  ]
  text = script.render(messages, is_prompt, tokenizer.names)
  found = list(_MARKS.finditer(text))
  marks = {int(match[2]): match for match in found}
  wanted = {*range(len(counts)), *([SYSTEM] if has_system else [])}
  if len(found) != len(wanted) or set(marks) != wanted:
    raise ValueError(
      f"{script.name} does not write each of {len(messages)} "
      "messages once and as it stands."
    )
  return _Written(text, marks)


@functools.lru_cache(maxsize=64)
def find_form(script: jinja.Script, tokenizer: Tokenizer) -> Form:
  """Tries a question and its answer, contents as strings, then as lists."""
  form = Form(False, None)
  try:
    written = _write(script, tokenizer, form, (0, 0))
  except ValueError as error:
    form = Form(True, None)
    try:
      written = _write(script, tokenizer, form, (0, 0))
    except ValueError:
      raise error from None
  behind = _split(tokenizer, written.text[written.marks[1].end() :])
  ends = [part for part in behind if _is_end(part, tokenizer)]
  return form._replace(end=ends[0] if ends else None)


@functools.lru_cache(maxsize=4096)
def find_layout(
  script: jinja.Script,
  tokenizer: Tokenizer,
  counts: tuple[int, ...],
  has_system: bool,
) -> tuple[Part, ...]:
  """The parts of a chat of this many turns, each with this many images.

  Raises ValueError where the template cannot write such a chat.
  """
  form = find_form(script, tokenizer)
  write = functools.partial(_write, script, tokenizer, form)
  # What stands before an answer shows only where there is one.
  whole = (*counts, 0) if len(counts) % 2 else counts
  try:
    text, marks = write(whole, has_system=has_system)
  except ValueError as error:
    write(whole)  # Raises where the system text is not the reason.
    raise ValueError(
      f"config.data.system is not empty, which the template does not allow "
      f'for; set config.data.system="". {error}'
    ) from error
  spans: list[tuple[int, int, Part]] = [
    (match.start(), match.end(), Slot(index, not match[1], not match[3]))
    for index, match in marks.items()
  ]
  for index in range(1, len(whole), 2):
    prompt = write(whole[:index], has_system=has_system, is_prompt=True).text
    # A generation prompt that is no part of the chat (it opens a thought,
    # say) is left out.
    is_part = text.startswith(prompt)
    cut = len(prompt) if is_part else marks[index].start()
    spans.append((cut, cut, Start(index // 2)))
  spans.append((len(text), len(text), ""))
  parts: list[Part] = []
  position, is_behind_answer = 0, False
  for start, stop, part in sorted(spans, key=lambda span: span[:2]):
    words = _split(tokenizer, text[position:start])
    parts += _stopped(words, tokenizer, form) if is_behind_answer else words
    parts.append(part)
    position = stop
    is_behind_answer = isinstance(part, Slot) and part.index % 2 == 1
  num_images = sum(is_image(part, tokenizer) for part in parts)
  if num_images != sum(counts):
    raise ValueError(
      f"{script.name} writes {num_images} {IMAGE_MARKER} for "
      f"{sum(counts)} images; wanted one for each."
    )
  if len(whole) > len(counts):
    starts = [i for i, part in enumerate(parts) if isinstance(part, Start)]
    parts = parts[: starts[-1]]
  return tuple(parts)


def _split(tokenizer: Tokenizer, words: str) -> list[Part]:
  """A template's own words, its special tokens found; the longest first."""
  tokens = sorted(tokenizer.special_tokens, key=len, reverse=True)
  pattern = "|".join(re.escape(token) for token in tokens)
  pieces = re.split(f"({pattern})", words)
  return [
    tokenizer.special_tokens[piece] if index % 2 else piece
    for index, piece in enumerate(pieces)
  ]


def _stopped(words: list[Part], tokenizer: Tokenizer, form: Form) -> list[Part]:
  """What stands behind an answer, with the stop, and an end if it has none."""
  if form.end is None:
    end = SpecialToken(tokenizer.eos_id, lstrip=False, rstrip=False)
    return [end, Stop(), *words]
  for index, part in enumerate(words, 1):
    if _is_end(part, tokenizer):
      return [*words[:index], Stop(), *words[index:]]
  return [form.end, Stop(), *words]


def is_image(part: Part, tokenizer: Tokenizer) -> bool:
  """Whether a part stands for an image."""
  return isinstance(part, SpecialToken) and part.id == tokenizer.image_id


def _is_end(part: Part, tokenizer: Tokenizer) -> bool:
  return isinstance(part, SpecialToken) and part.id != tokenizer.image_id
