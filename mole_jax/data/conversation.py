"""Conversations and captions to token ids with a label mask.

Every text is tokenised in the pieces that generation sees too (up to where
the answer begins, then the answer), so the ids of a training sample are the
ids of its prompt followed by the ids of its answer, by construction; for each
of several answers, if the template writes a turn alike whatever follows.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int32

from mole_jax.data import templates
from mole_jax.data.templates import VICUNA, Piece, Template, TextEncoder
from mole_jax.data.tokenizer import IMAGE_MARKER

IGNORE_LABEL = -100  # A position without loss; PyTorch's and LLaVA's value.
VICUNA_SYSTEM = (
  "A chat between a curious user and an artificial intelligence assistant. "
  "The assistant gives helpful, detailed, and polite answers to the user's "
  "questions."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
  """One sample: ids, labels of the same length, and what they hold.

  `num_images` images are used, the first ones of the record; `kinds` is the
  question type of each answer that has a supervised token.
  """

  input_ids: Int32[np.ndarray, " T"]
  labels: Int32[np.ndarray, " T"]
  num_images: int
  kinds: tuple[str, ...]


class SkippedSample(ValueError):
  """A sample that cannot be trained on; `reason` is for the accounting.

  Reasons: "image_count" (markers and images disagree), "turn_order",
  "image_in_answer", "no_caption", "no_supervision" (no label left).
  """

  def __init__(self, reason: str, message: str):
    super().__init__(message)
    self.reason = reason


class _Pieces:
  """Ids, labels, image number and answer number (-1 outside) so far."""

  def __init__(self, num_image_tokens: int):
    self._num_image_tokens = num_image_tokens
    self.ids: list[int] = []
    self.labels: list[int] = []
    self.images: list[int] = []
    self.answers: list[int] = []
    self.num_images = 0

  def add(self, piece: Piece):
    ids, image = piece.ids, -1
    if piece.is_image:
      ids, image = ids * self._num_image_tokens, self.num_images
      self.num_images += 1
    is_learnt = piece.answer >= 0
    self.ids += ids
    self.labels += ids if is_learnt else [IGNORE_LABEL] * len(ids)
    self.images += [image] * len(ids)
    self.answers += [piece.answer] * len(ids)

  def cut(self, max_length: int) -> int:
    """Length to keep: never a part of an image."""
    if len(self.ids) <= max_length:
      return len(self.ids)
    image = self.images[max_length]
    return max_length if image < 0 else self.images.index(image)

  def encoded(self, max_length: int, kinds: Sequence[str]) -> Encoded:
    end = self.cut(max_length)
    labels = np.array(self.labels[:end], np.int32)
    # In a packed row the token before a sample belongs to another sample and
    # must not be asked to predict its first token.
    labels[:1] = IGNORE_LABEL
    supervised = np.array(self.answers[:end])[labels != IGNORE_LABEL]
    return Encoded(
      input_ids=np.array(self.ids[:end], np.int32),
      labels=labels,
      num_images=max(self.images[:end], default=-1) + 1,
      kinds=tuple(kinds[i] for i in np.unique(supervised)),
    )


def encode_chat(
  tokenizer: TextEncoder,
  turns: Sequence[Mapping[str, str]],
  *,
  num_images: int,
  num_image_tokens: int,
  max_length: int,
  system: str = VICUNA_SYSTEM,
  use_bos: bool = True,
  template: Template = VICUNA,
) -> Encoded:
  """A conversation with loss on each answer and the token that ends it.

  haotian-liu/LLaVA, llava/train/train.py: preprocess_multimodal (each marker
  moves to the start of its turn), preprocess_v1 (labels). Where the original
  masks a sample in silence this raises.

  Args:
    tokenizer: turns pieces of text into ids.
    turns: {"from": "human" or "gpt", "value": str, "kind": str (optional)},
      alternating, a question first; `<image>` only in questions. A turn from
      "system" may stand before them.
    num_images: images the record holds, one for each marker.
    num_image_tokens: positions one image takes.
    max_length: tokens kept after each image is expanded. A cut inside an
      image drops that whole image and what follows.
    system: text before the first turn, if no turn brings it; may be empty.
    use_bos: whether the sample starts with the BOS token, if the template
      leaves it open.
    template: what stands around the turns.

  Raises:
    ValueError: where template, system text and tokenizer do not go together.
    SkippedSample: with the reason, for a sample that cannot be used.
  """
  turns, system = _own_system(turns, system)
  pieces = _chat_pieces(
    tokenizer, turns, num_image_tokens, system, use_bos, template
  )
  if len(turns) % 2:
    raise SkippedSample(
      "turn_order", "the last question has no answer; drop it or answer it."
    )
  _check_image_count(pieces.num_images, num_images)
  kinds = [turn.get("kind", "") for turn in turns[1::2]]
  return _supervised(pieces.encoded(max_length, kinds), max_length)


def encode_prompt(
  tokenizer: TextEncoder,
  turns: Sequence[Mapping[str, str]],
  *,
  num_image_tokens: int,
  system: str = VICUNA_SYSTEM,
  use_bos: bool = True,
  template: Template = VICUNA,
) -> Int32[np.ndarray, " T"]:
  """Ids after which the model answers the last turn, a question.

  With Vicuna's template they end with "ASSISTANT:" and no space. Training on
  the answered conversation sees these same ids, then those of the answer.

  Raises ValueError as `encode_chat`, and where the last turn is no question.
  """
  turns, system = _own_system(turns, system)
  if len(turns) % 2 == 0:
    raise SkippedSample(
      "turn_order", f"{len(turns)} turns; wanted the last one a question."
    )
  pieces = _chat_pieces(
    tokenizer, turns, num_image_tokens, system, use_bos, template
  )
  return np.array(pieces.ids, np.int32)


def encode_caption(
  tokenizer: TextEncoder,
  caption: str,
  *,
  num_images: int,
  num_image_tokens: int,
  max_length: int,
  use_bos: bool = True,
) -> Encoded:
  """Stage 1's plain template: images, caption, newline; loss on the text.

  haotian-liu/LLaVA, llava/train/train.py: preprocess_plain. The question is
  discarded and no end-of-sequence token follows.

  Raises:
    ValueError: where the tokenizer has no BOS token to start with.
    SkippedSample: without a caption, or where none of it is left.
  """
  if not caption.strip():
    raise SkippedSample("no_caption", "the record has no caption.")
  pieces = _Pieces(num_image_tokens)
  if use_bos:
    pieces.add(templates.bos_piece(tokenizer))
  for _ in range(num_images):
    pieces.add(Piece([tokenizer.image_id], is_image=True))
  pieces.add(Piece(tokenizer.encode(caption + "\n"), answer=0))
  return _supervised(pieces.encoded(max_length, ["caption"]), max_length)


def move_markers(value: str) -> str:
  """Moves the image markers of a turn to its start, a newline after each."""
  count = value.count(IMAGE_MARKER)
  if not count:
    return value
  text = value.replace(IMAGE_MARKER, "").strip()
  return (f"{IMAGE_MARKER}\n" * count + text).strip()


def _own_system(
  turns: Sequence[Mapping[str, str]], system: str
) -> tuple[Sequence[Mapping[str, str]], str]:
  """Questions and answers, and the system text that goes before them."""
  if turns and turns[0]["from"] == "system":
    return turns[1:], turns[0]["value"]
  return turns, system


def _chat_pieces(
  tokenizer: TextEncoder,
  turns: Sequence[Mapping[str, str]],
  num_image_tokens: int,
  system: str,
  use_bos: bool,
  template: Template,
) -> _Pieces:
  """The pieces of any conversation, answered at its end or not."""
  contents = []
  for index, turn in enumerate(turns):
    wanted = ("human", "gpt")[index % 2]
    if turn["from"] != wanted:
      raise SkippedSample(
        "turn_order",
        f"turn {index} is from {turn['from']!r}, wanted {wanted!r}: "
        "questions and answers alternate and a question comes first.",
      )
    if wanted == "human":
      contents.append(move_markers(turn["value"]))
    elif IMAGE_MARKER in turn["value"]:
      raise SkippedSample(
        "image_in_answer",
        f"turn {index}, an answer, holds {IMAGE_MARKER}; only questions may.",
      )
    else:
      contents.append(turn["value"])
  if not turns:
    raise SkippedSample("no_supervision", "the conversation has no turn.")
  pieces = _Pieces(num_image_tokens)
  for piece in template.pieces(
    tokenizer, contents, system=system, use_bos=use_bos
  ):
    pieces.add(piece)
  return pieces


def _check_image_count(num_markers: int, num_images: int):
  if num_markers != num_images:
    raise SkippedSample(
      "image_count",
      f"{num_markers} {IMAGE_MARKER} markers but {num_images} images.",
    )


def _supervised(encoded: Encoded, max_length: int) -> Encoded:
  if not np.any(encoded.labels != IGNORE_LABEL):
    raise SkippedSample(
      "no_supervision",
      f"no answer token is left within max_length={max_length}.",
    )
  return encoded
