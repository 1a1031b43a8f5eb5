"""Records to ids and labels, as one mixture line wants them."""

import dataclasses
import functools
import hashlib
import json

from mole_jax.data import conversation, records, templates
from mole_jax.data import tokenizer as tokenizer_lib

FORMATS = ("chat", "plain")
_VERSION = 1  # Of what encoding means; a new one measures all data anew.


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
  """How records become samples; raises ValueError for an unknown format.

  tokenizer: text to ids.
  format: "chat" (the conversation) or "plain" (image, caption; stage 1).
  num_image_tokens: positions one image takes.
  max_length: tokens of a sample after images are expanded.
  max_images: a record with more images is skipped.
  system: text before a chat's first turn, if it has none of its own.
  use_bos: whether a sample starts with the BOS token, if the template leaves
    it open.
  template: what stands around the turns of a chat.
  """

  tokenizer: tokenizer_lib.Tokenizer
  format: str
  num_image_tokens: int
  max_length: int
  max_images: int
  system: str
  use_bos: bool
  template: templates.Template

  def __post_init__(self):
    if self.format not in FORMATS:
      raise ValueError(
        f"format={self.format!r}; wanted one of {list(FORMATS)}."
      )

  def encode(self, record: records.TextRecord) -> conversation.Encoded:
    """A record as a sample.

    Raises:
      ValueError: where tokenizer, template and system text do not fit.
      SkippedSample: with the reason, for a record that cannot be used.
    """
    num_images = record["num_images"]
    if num_images > self.max_images:
      raise conversation.SkippedSample(
        "too_many_images",
        f"{num_images} images; wanted at most {self.max_images}.",
      )
    fit = {
      "num_images": num_images,
      "num_image_tokens": self.num_image_tokens,
      "max_length": self.max_length,
      "use_bos": self.use_bos,
    }
    if self.format == "plain":
      return conversation.encode_caption(
        self.tokenizer, record["caption"], **fit
      )
    chat = functools.partial(
      conversation.encode_chat,
      self.tokenizer,
      system=self.system,
      template=self.template,
      **fit,
    )
    turns = record["turns"]
    try:
      return chat(turns)
    except conversation.SkippedSample:
      raise
    except ValueError as error:
      if not turns or turns[0]["from"] != "system":
        raise
      chat(turns[1:])  # Raises where the system turn is not the reason.
      raise conversation.SkippedSample("system_turn", str(error)) from error

  @functools.cached_property
  def identity(self) -> str:
    """A hash of all that decides what a record becomes."""
    known = {
      "version": _VERSION,
      "tokenizer": self.tokenizer.identity,
      "template": self.template.identity,
      **{
        key: getattr(self, key)
        for key in (
          "format",
          "num_image_tokens",
          "max_length",
          "max_images",
          "system",
          "use_bos",
        )
      },
    }
    return hashlib.sha256(
      json.dumps(known, sort_keys=True).encode()
    ).hexdigest()
