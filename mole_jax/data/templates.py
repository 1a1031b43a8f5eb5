"""Chat templates: what stands around the turns of a chat, as token ids.

Two kinds, one method: role words (Vicuna's) and the Jinja template that comes
with a tokenizer. Neither ever reads a special token or template syntax out of
what somebody wrote.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from mole_jax.data import jinja, layout
from mole_jax.data.tokenizer import (
  IMAGE_MARKER,
  SpecialToken,
  Tokenizer,
  read_json,
)

NAMES = ("vicuna", "tokenizer")


@runtime_checkable
class TextEncoder(Protocol):
  """What role words need of a tokenizer (`tokenizer.Tokenizer`)."""

  bos_id: int | None
  eos_id: int
  image_id: int

  def encode(self, text: str) -> list[int]: ...

  def encode_continuation(self, text: str) -> list[int]: ...


class Piece(NamedTuple):
  """Ids that follow each other, or one image (then its one id).

  `answer` is the index of the answer that they are learnt in, -1 in none.
  """

  ids: list[int]
  answer: int = -1
  is_image: bool = False


@runtime_checkable
class Template(Protocol):
  """A way to write a chat down; `identity` tells it from others."""

  @property
  def identity(self) -> str: ...

  def pieces(
    self,
    tokenizer: TextEncoder,
    contents: Sequence[str],
    *,
    system: str,
    use_bos: bool,
  ) -> Iterator[Piece]:
    """The chat as ids: questions and answers in turn, a question first.

    After a question at the end they stop where its answer begins. A marker
    `<image>` in a question is an image. What is learnt of an answer ends with
    the token at which generation stops.

    Args:
      tokenizer: text to ids.
      contents: what is asked and said.
      system: instructions before the first turn; may be empty.
      use_bos: whether the ids start with BOS, if a template leaves it open.

    Raises:
      ValueError: where the template does not allow for these arguments.
    """
    ...


@dataclasses.dataclass(frozen=True)
class RoleTemplate:
  """Role words in plain text, LLaVA-1.5's way.

  A prompt is the system text and a space (nothing where it is empty), then
  for each turn `user + question + assistant`; the answer follows after one
  space and ends with the end-of-sequence token. Text around an image is
  tokenised chunk by chunk.
  """

  user: str
  assistant: str

  @property
  def identity(self) -> str:
    return repr((self.user, self.assistant))

  def pieces(
    self,
    tokenizer: TextEncoder,
    contents: Sequence[str],
    *,
    system: str,
    use_bos: bool,
  ) -> Iterator[Piece]:
    if use_bos:
      yield bos_piece(tokenizer)
    opening = f"{system} " if system else ""
    for index, content in enumerate(contents):
      if index % 2:
        ids = [*tokenizer.encode_continuation(content), tokenizer.eos_id]
        yield Piece(ids, answer=index // 2)
        continue
      text = opening + self.user + content + self.assistant
      opening = ""
      for number, chunk in enumerate(text.split(IMAGE_MARKER)):
        if number:
          yield Piece([tokenizer.image_id], is_image=True)
        if chunk:
          yield Piece(tokenizer.encode(chunk))


VICUNA = RoleTemplate(user="USER: ", assistant=" ASSISTANT:")


def bos_piece(tokenizer: TextEncoder) -> Piece:
  """The token that begins a text; ValueError where there is none."""
  if tokenizer.bos_id is None:
    raise ValueError(
      "config.data.use_bos=True, but the tokenizer has no bos_token; set "
      "config.data.use_bos=False."
    )
  return Piece([tokenizer.bos_id])


def answer_ids(
  template: Template, tokenizer: TextEncoder, text: str
) -> list[int]:
  """What is learnt of an answer: its ids after a prompt, its end included."""
  pieces = template.pieces(tokenizer, ["", text], system="", use_bos=False)
  return [i for piece in pieces if piece.answer == 0 for i in piece.ids]


def end_id(template: Template, tokenizer: TextEncoder) -> int:
  """The token that ends an answer."""
  return answer_ids(template, tokenizer, "")[-1]


def read_template(name: str, tokenizer: Tokenizer) -> Template:
  """The template that `config.data.template` names.

  Args:
    name: "vicuna", or "tokenizer": the Jinja template beside the tokenizer's
      file, in chat_template.jinja, tokenizer_config.json or
      chat_template.json, the first that has one.
    tokenizer: whose file that is.

  Raises:
    ValueError: for another name, where there is no template, or for one that
      cannot write a question and its answer.
  """
  if name == "vicuna":
    return VICUNA
  if name != "tokenizer":
    raise ValueError(
      f"config.data.template={name!r}; wanted one of {list(NAMES)}."
    )
  path, source = _find_source(tokenizer.path.parent)
  template = JinjaTemplate(jinja.Script(source, str(path)))
  layout.find_form(template.script, tokenizer)
  return template


def _find_source(folder: pathlib.Path) -> tuple[pathlib.Path, str]:
  path = folder / "chat_template.jinja"
  if path.is_file():
    return path, path.read_text(encoding="utf-8")
  for name in ("tokenizer_config.json", "chat_template.json"):
    path = folder / name
    source = read_json(path).get("chat_template")
    if isinstance(source, list):
      named = {each["name"]: each["template"] for each in source}
      if "default" not in named:
        raise ValueError(
          f"{str(path)!r} has the chat templates {sorted(named)}; wanted one "
          "named 'default'."
        )
      source = named["default"]
    if source:
      return path, source
  raise ValueError(
    "config.data.template='tokenizer', but there is no chat template in "
    f"{str(folder)!r}; wanted chat_template.jinja, or 'chat_template' in "
    "tokenizer_config.json or chat_template.json; else set "
    "config.data.template='vicuna'."
  )


@dataclasses.dataclass(frozen=True, eq=False)
class JinjaTemplate:
  """A tokenizer's own template, as Transformers' apply_chat_template has it.

  `use_bos` puts BOS before it unless it begins with that itself, as processors
  of Transformers do. Where an answer has no special token behind it the
  tokenizer's end of sequence is put there.

  The template never sees what the turns say: it writes marks, which are
  replaced afterwards. So a template that looks at the text (for "</think>",
  say) takes it for one that holds nothing of the kind.
  """

  script: jinja.Script

  @property
  def identity(self) -> str:
    return self.script.source

  def pieces(
    self,
    tokenizer: Tokenizer,
    contents: Sequence[str],
    *,
    system: str,
    use_bos: bool,
  ) -> Iterator[Piece]:
    counts = [0] * len(contents)
    if layout.find_form(self.script, tokenizer).is_list:
      counts = [content.count(IMAGE_MARKER) for content in contents]
      contents = [
        content.replace(IMAGE_MARKER, "").strip() if count else content
        for content, count in zip(contents, counts, strict=True)
      ]
    parts = layout.find_layout(
      self.script, tokenizer, tuple(counts), bool(system)
    )
    texts = dict(enumerate(contents)) | {layout.SYSTEM: system}
    first = next(part for part in parts if part != "")
    has_bos = isinstance(first, SpecialToken) and first.id == tokenizer.bos_id
    if use_bos and not has_bos:
      yield bos_piece(tokenizer)
    yield from _fill(tokenizer, parts, texts)


def _fill(
  tokenizer: Tokenizer, parts: Sequence[layout.Part], texts: Mapping[int, str]
) -> Iterator[Piece]:
  """Puts the contents in and tokenises.

  Text between special tokens, images and starts of answers is one run,
  whoever wrote its parts: so Transformers tokenises it too.
  """
  encode, answer, is_eaten = tokenizer.encode, -1, False
  for part in _runs(tokenizer, parts, texts):
    if isinstance(part, str):
      text = _LEADING.sub("", part) if is_eaten else part
      if text:
        yield Piece(encode(text), answer)
        encode, is_eaten = tokenizer.encode_inside, False
    elif isinstance(part, SpecialToken):
      is_image = layout.is_image(part, tokenizer)
      yield Piece([part.id], answer, is_image)
      encode, is_eaten = tokenizer.encode_after_special, part.rstrip
    else:
      answer = part.answer if isinstance(part, layout.Start) else -1


# Rust's white space, which tokens eat: without four of Python's.
_LEADING = re.compile(r"\A[^\S\x1c-\x1f]+")
_TRAILING = re.compile(r"[^\S\x1c-\x1f]+\Z")


def _runs(
  tokenizer: Tokenizer, parts: Sequence[layout.Part], texts: Mapping[int, str]
) -> Iterator[str | SpecialToken | layout.Start | layout.Stop]:
  """Contents in their slots, images found, neighbouring text joined."""
  image = tokenizer.special_tokens[IMAGE_MARKER]
  run = ""
  for part in parts:
    if isinstance(part, str):
      run += part
      continue
    if isinstance(part, layout.Slot):
      text = texts[part.index]
      text = text.lstrip() if part.is_lstripped else text
      text = text.rstrip() if part.is_rstripped else text
      first, *others = text.split(IMAGE_MARKER)
      run += first
      for other in others:
        yield _TRAILING.sub("", run) if image.lstrip else run
        yield image
        run = other
      continue
    is_eaten = isinstance(part, SpecialToken) and part.lstrip
    yield _TRAILING.sub("", run) if is_eaten else run
    yield part
    run = ""
  yield run
