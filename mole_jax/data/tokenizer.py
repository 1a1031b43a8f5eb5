"""Text to token ids and back, over one `tokenizers` JSON file."""

import pathlib
from collections.abc import Sequence

import numpy as np
import tokenizers
from jaxtyping import Int

EMBEDDED_TOKENIZER = pathlib.Path(__file__).parent / "built" / "tokenizer.json"
_PAD_TOKENS = ("<pad>", "<unk>")  # LLaVA-1.5 pads with unk, id 0.


class Tokenizer:
  """A vocabulary with the special tokens that a LLaVA model needs.

  The file must hold `<s>`, `</s>`, `<image>` and one of `<pad>` or `<unk>`
  (which then pads). Special tokens are never read out of text: a question that
  contains the characters "</s>" cannot end its own turn.

  Raises ValueError where the file is missing, unreadable or lacks a token.
  """

  bos_id: int
  eos_id: int
  pad_id: int
  image_id: int

  def __init__(self, path: str | pathlib.Path = EMBEDDED_TOKENIZER):
    path = pathlib.Path(path)
    if not path.is_file():
      raise ValueError(
        f"no tokenizer file at {str(path)!r}; wanted the tokenizer.json that "
        "stands beside the model's weights."
      )
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The Rust side raises bare Exception.
      raise ValueError(
        f"{str(path)!r} is not a `tokenizers` JSON file: {error}"
      ) from error
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    self._tokenizer.encode_special_tokens = True
    self.bos_id = self._find(path, "<s>")
    self.eos_id = self._find(path, "</s>")
    self.image_id = self._find(path, "<image>")
    self.pad_id = self._find(path, *_PAD_TOKENS)
    # Llama's vocabularies put a space before every text by themselves,
    # byte-level ones do not: ask the file rather than its name.
    is_prefixed = self.encode("a a") == self.encode("a") * 2
    self._continuation = "" if is_prefixed else " "

  def _find(self, path: pathlib.Path, *tokens: str) -> int:
    for token in tokens:
      token_id = self._tokenizer.token_to_id(token)
      if token_id is not None:
        return token_id
    raise ValueError(
      f"{str(path)!r} has no token {' or '.join(tokens)}; wanted <s>, </s>, "
      "<image> and <pad> or <unk>. Add it as a special token of the file."
    )

  @property
  def vocab_size(self) -> int:
    """Number of ids, special tokens included."""
    return self._tokenizer.get_vocab_size(with_added_tokens=True)

  def encode(self, text: str) -> list[int]:
    """Ids of `text` as a piece of its own, without special tokens."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_continuation(self, text: str) -> list[int]:
    """Ids of one space and `text`, as they stand after other text."""
    return self.encode(self._continuation + text)

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
