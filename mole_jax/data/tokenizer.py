"""Text to token ids and back, over one `tokenizers` JSON file."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int

EMBEDDED_TOKENIZER = pathlib.Path(__file__).parent / "built" / "tokenizer.json"
IMAGE_MARKER = "<image>"
_CONFIG = "tokenizer_config.json"


class SpecialToken(NamedTuple):
  """A token that no text contains; whether it eats the white space beside."""

  id: int
  lstrip: bool
  rstrip: bool


class Tokenizer:
  """A vocabulary with the special tokens that a LLaVA model needs.

  The file must hold `<image>`. The tokens that begin and end a text and the
  one that pads are those of the tokenizer_config.json beside it, else `<s>`,
  `</s>` and `<pad>`. Without padding the unknown token pads, as in LLaVA-1.5,
  without that the end. Special tokens are never read out of text: a question
  that contains the characters "</s>" cannot end its own turn.

  path: the file.
  bos_id: None where texts begin with no token.
  vocab_size: one more than the highest id, special tokens included.
  special_tokens: by their text; beginning, end and image are among them.
  names: what the files call them, {"bos_token": "<s>", ...}.

  Raises ValueError where a file is missing, unreadable or lacks a token.
  """

  path: pathlib.Path
  bos_id: int | None
  eos_id: int
  pad_id: int
  image_id: int
  vocab_size: int
  special_tokens: Mapping[str, SpecialToken]
  names: Mapping[str, str]

  def __init__(self, path: str | pathlib.Path = EMBEDDED_TOKENIZER):
    self.path = path = pathlib.Path(path)
    self._tokenizer = _read(path)
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    self._tokenizer.encode_special_tokens = True
    names = _read_names(path.with_name(_CONFIG))
    for name in ("bos_token", "eos_token"):
      if names.get(name) and not self._has(names[name]):
        raise ValueError(
          f"{str(path)!r} lacks {names[name]!r}, the {name} of the {_CONFIG} "
          "beside it; wanted the two files of one tokenizer."
        )
    names = {n: t for n, t in names.items() if t is None or self._has(t)}
    image = self._find(IMAGE_MARKER)
    if image is None:
      raise ValueError(
        f"{str(path)!r} has no token {IMAGE_MARKER}; convert the checkpoint "
        "with `python -m mole_jax.convert from-hf`, which adds it."
      )
    if "bos_token" not in names:  # One that is null is none.
      names["bos_token"] = self._find("<s>")
    eos = names["eos_token"] = names.get("eos_token") or self._find("</s>")
    if eos is None:
      raise ValueError(
        f"{str(path)!r} has no token </s>; wanted it, or the eos_token in a "
        f"{_CONFIG} beside the file."
      )
    pad = names.get("pad_token") or self._find("<pad>", "<unk>")
    pad = pad or names.get("unk_token") or eos
    self.names = {name: token for name, token in names.items() if token}
    bos = names["bos_token"]
    self.bos_id = None if bos is None else self._tokenizer.token_to_id(bos)
    self.eos_id = self._tokenizer.token_to_id(eos)
    self.pad_id = self._tokenizer.token_to_id(pad)
    self.image_id = self._tokenizer.token_to_id(image)
    found = self._special_tokens()
    # Some files call their own ends ordinary, and would read them in text.
    ends = [token for token in (bos, eos, image) if token is not None]
    self._tokenizer.add_special_tokens([t for t in ends if t not in found])
    self.special_tokens = self._special_tokens()
    self._ids = frozenset(self._tokenizer.get_vocab().values())
    self.vocab_size = max(self._ids) + 1
    # Llama's vocabularies put a space before every text by themselves,
    # byte-level ones do not: ask the file rather than its name.
    is_prefixed = self.encode("a a") == self.encode("a") * 2
    self._continuation = "" if is_prefixed else " "

  def __reduce__(self):
    # Pickles of the library forget how special tokens are read.
    return Tokenizer, (self.path,)

  @functools.cached_property
  def identity(self) -> str:
    """A hash of all that decides which ids a text becomes."""
    known = [self._tokenizer.to_str(), self.names]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()

  def _special_tokens(self) -> dict[str, SpecialToken]:
    return {
      token.content: SpecialToken(token_id, token.lstrip, token.rstrip)
      for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
      if token.special
    }

  def _has(self, token: str) -> bool:
    return self._tokenizer.token_to_id(token) is not None

  def _find(self, *tokens: str) -> str | None:
    return next((token for token in tokens if self._has(token)), None)

  def unused_ids(self, size: int) -> list[int]:
    """Ids below `size` that no token owns, such as padding of a table."""
    return [i for i in range(size) if i not in self._ids]

  def encode(self, text: str) -> list[int]:
    """Ids of `text` as a piece of its own, without special tokens."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_continuation(self, text: str) -> list[int]:
    """Ids of one space and `text`, as they stand after other text."""
    return self.encode(self._continuation + text)

  def encode_after_special(self, text: str) -> list[int]:
    """Ids of `text` as they stand after a special token.

    Llama's older files put a space there too, its newer ones ("first") only
    before the very first text.
    """
    if self._is_prefixed_once:
      return self.encode_inside(text)
    return self.encode(text)

  def encode_inside(self, text: str) -> list[int]:
    """Ids of `text` as they stand after other text, no space between."""
    return self._inside.encode(text, add_special_tokens=False).ids

  @functools.cached_property
  def _is_prefixed_once(self) -> bool:
    step = _state(self._tokenizer.pre_tokenizer) or {}
    steps = step.get("pretokenizers", [step])
    return any(step.get("prepend_scheme") == "first" for step in steps)

  @functools.cached_property
  def _inside(self) -> tokenizers.Tokenizer:
    """The tokenizer without the space that it puts before a text."""
    steps = {
      "normalizer": _state(self._tokenizer.normalizer),
      "pre_tokenizer": _state(self._tokenizer.pre_tokenizer),
    }
    bare = {name: _without_prefix(step) for name, step in steps.items()}
    if bare == steps:
      return self._tokenizer
    description = json.loads(self._tokenizer.to_str()) | bare
    inside = tokenizers.Tokenizer.from_str(json.dumps(description))
    inside.encode_special_tokens = True
    return inside

  def decode(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> str:
    """Text of `ids`, special tokens left out.

    Raises ValueError for an id outside the vocabulary.
    """
    ids = [int(i) for i in ids]
    bad = [i for i in ids if not 0 <= i < self.vocab_size]
    if bad:
      raise ValueError(
        f"token ids {bad[:5]} are outside the vocabulary of "
        f"{self.vocab_size}; is this the tokenizer of that model?"
      )
    return self._tokenizer.decode(ids, skip_special_tokens=True)


def add_image_token(
  source: pathlib.Path, target: pathlib.Path, min_id: int
) -> int:
  """Writes a copy of a tokenizer.json that has `<image>` as a special token.

  A file that has it is copied byte for byte. A new token gets the next id,
  but at least `min_id`, which a caller sets to the rows of the model's table
  where these may have owners that the file does not know. The ids between
  then stay without a token.

  Returns:
    the id of `<image>` in the file that was written.

  Raises:
    ValueError: where the file is missing or unreadable, or its kind of model
      cannot leave ids out to reach `min_id`.
  """
  tokenizer = _read(source)
  added = tokenizer.get_added_tokens_decoder()
  for token_id, token in added.items():
    if token.content == IMAGE_MARKER and token.special:
      target.write_bytes(source.read_bytes())
      return token_id
  description = json.loads(source.read_text(encoding="utf-8"))
  old_id = tokenizer.token_to_id(IMAGE_MARKER)
  ids = tokenizer.get_vocab().values()
  new_id = max(*ids, min_id - 1) + 1 if old_id is None else old_id
  kept = description.get("added_tokens") or []
  kept = [token for token in kept if token["content"] != IMAGE_MARKER]
  entry = dict(
    id=new_id,
    content=IMAGE_MARKER,
    single_word=False,
    lstrip=False,
    rstrip=False,
    normalized=False,
    special=True,
  )
  tokens = sorted([*kept, entry], key=lambda token: token["id"])
  description["added_tokens"] = tokens
  vocabulary = description["model"]["vocab"]
  # `tokenizers` numbers added tokens itself, from the size of the vocabulary:
  # another id than that must stand in the vocabulary.
  if old_id is None and new_id != tokenizer.get_vocab_size():
    if not isinstance(vocabulary, dict):
      raise ValueError(
        f"{str(source)!r} holds {len(ids)} tokens of a "
        f"{description['model'].get('type')} model, which leaves no id out: "
        f"{IMAGE_MARKER} cannot be {new_id}; wanted min_id={len(ids)} or less."
      )
    vocabulary[IMAGE_MARKER] = new_id
  text = json.dumps(description, ensure_ascii=False, indent=2)
  target.write_text(text, encoding="utf-8")
  return new_id


def _read(path: pathlib.Path) -> tokenizers.Tokenizer:
  if not path.is_file():
    raise ValueError(
      f"no tokenizer file at {str(path)!r}; wanted the tokenizer.json that "
      "stands beside the model's weights."
    )
  try:
    return tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # The Rust side raises bare Exception.
    raise ValueError(
      f"{str(path)!r} is not a `tokenizers` JSON file: {error}"
    ) from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object, empty where there is no file; ValueError for another."""
  if not path.is_file():
    return {}
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
  if not isinstance(config, dict):
    raise ValueError(f"{str(path)!r} holds no JSON object.")
  return config


def _read_names(path: pathlib.Path) -> dict[str, str | None]:
  """{"bos_token": "<s>" or None, ...} of a tokenizer_config.json."""
  names: dict[str, str | None] = {}
  for name, value in read_json(path).items():
    if isinstance(value, dict) and "content" in value:
      value = value["content"]
    if name.endswith("_token") and (value is None or isinstance(value, str)):
      names[name] = value
  return names


def _state(step: Any) -> dict[str, Any] | None:
  """A normalizer or pre-tokenizer as the file writes it."""
  return None if step is None else json.loads(step.__getstate__())


def _without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
  """The same step, adding nothing before a text; None where that was all."""
  if step is None or step["type"] == "Prepend":
    return None
  if "prepend_scheme" in step:
    return step | {"prepend_scheme": "never"}
  if "add_prefix_space" in step:
    return step | {"add_prefix_space": False}
  for steps in ("normalizers", "pretokenizers"):
    if steps in step:
      kept = map(_without_prefix, step[steps])
      return step | {steps: [each for each in kept if each is not None]}
  return step
