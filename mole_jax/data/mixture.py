"""A mixture of data sets, each read and encoded once."""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from mole_jax.data import conversation, records, templates
from mole_jax.data import tokenizer as tokenizer_lib

FORMATS = ("chat", "plain")


@dataclasses.dataclass(frozen=True)
class Source:
  """One line of a mixture: a data set, how it is read, its share.

  `weight` is the share of the drawn records, on any scale. `format` is "chat"
  (the conversation) or "plain" (image, caption; stage 1).
  """

  name: str
  split: str
  format: str
  weight: float | int


class Dataset:
  """Records encoded once: ids and labels in memory, images by index.

  Index i counts the usable records only; `accounting` tells what became of
  the others. Lengths and image counts are known without decoding an image.
  """

  name: str
  lengths: Int32[np.ndarray, " N"]  # Tokens, images expanded.
  image_counts: Int32[np.ndarray, " N"]
  domains: Int32[np.ndarray, " N"]

  def __init__(
    self,
    rows: Sequence[records.Record],
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    name: str,
    format: str,
    domains: Sequence[str],
    num_image_tokens: int,
    max_length: int,
    max_images: int,
    system: str,
    use_bos: bool,
    template: templates.Template,
  ):
    """Reads and tokenises every record.

    Args:
      rows: records by index; kept for their images.
      tokenizer: text to ids.
      name: for messages and the accounting, e.g. "embedded/general".
      format: "chat" or "plain".
      domains: domain names; a record's domain becomes its index in them.
      num_image_tokens: positions one image takes.
      max_length: tokens of a sample after images are expanded.
      max_images: a record with more images is skipped.
      system: text before a chat's first turn; may be empty.
      use_bos: whether a sample starts with the BOS token, if the template
        leaves it open.
      template: what stands around the turns of a chat.

    Raises:
      ValueError: for an unknown format or domain, or if no record is usable.
    """
    if format not in FORMATS:
      raise ValueError(
        f"{name}: format={format!r}; wanted one of {list(FORMATS)}."
      )
    self.name = name
    self._rows = rows
    self._skipped: collections.Counter[str] = collections.Counter()
    encode = functools.partial(
      _encode_record,
      tokenizer=tokenizer,
      format=format,
      num_image_tokens=num_image_tokens,
      max_length=max_length,
      max_images=max_images,
      system=system,
      use_bos=use_bos,
      template=template,
    )
    used: list[int] = []
    samples: list[conversation.Encoded] = []
    domain_ids: list[int] = []
    for index, record in enumerate(rows):
      try:
        samples.append(encode(record))
      except conversation.SkippedSample as error:
        self._skipped[error.reason] += 1
        continue
      if record["domain"] not in domains:
        raise ValueError(
          f"{name}: record {record['id']!r} is of domain "
          f"{record['domain']!r}; wanted one of {list(domains)}."
        )
      used.append(index)
      domain_ids.append(domains.index(record["domain"]))
    if not samples:
      raise ValueError(
        f"{name}: none of {len(rows)} records can be used as {format!r}; "
        f"skipped {dict(self._skipped)}."
      )
    self._used = np.array(used, np.int32)
    self.domains = np.array(domain_ids, np.int32)
    self.lengths = np.array([len(s.input_ids) for s in samples], np.int32)
    self.image_counts = np.array([s.num_images for s in samples], np.int32)
    self._offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=int)])
    self._input_ids = np.concatenate([s.input_ids for s in samples])
    self._labels = np.concatenate([s.labels for s in samples])

  def __len__(self) -> int:
    return len(self._used)

  def tokens(
    self, index: int
  ) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, " T"]]:
    """Ids and labels of a usable record."""
    span = slice(self._offsets[index], self._offsets[index + 1])
    return self._input_ids[span], self._labels[span]

  def encoded_images(self, index: int) -> list[bytes]:
    """The images of a usable record that its ids refer to, encoded."""
    record = self._rows[int(self._used[index])]
    return record["images"][: self.image_counts[index]]

  def record(self, index: int) -> records.Record:
    """The record behind a usable index."""
    return self._rows[int(self._used[index])]

  def accounting(self, num_failed: int = 0) -> dict[str, object]:
    """{"read", "used", "skipped": {reason: n}, "failed"}; read adds up."""
    return {
      "read": len(self._rows),
      "used": len(self) - num_failed,
      "skipped": dict(sorted(self._skipped.items())),
      "failed": num_failed,
    }


def load_mixture(
  sources: Sequence[Source],
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  domains: Sequence[str],
  num_image_tokens: int,
  max_length: int,
  max_images: int,
  system: str,
  use_bos: bool,
  template: templates.Template,
) -> list[Dataset]:
  """Opens and encodes each source; arguments as for `Dataset`."""
  if not sources:
    raise ValueError("the mixture is empty; wanted at least one data set.")
  return [
    Dataset(
      records.open_records(source.name, source.split),
      tokenizer,
      # One set may stand in a mixture twice, as captions and as chats.
      name=f"{source.name} as {source.format}",
      format=source.format,
      domains=domains,
      num_image_tokens=num_image_tokens,
      max_length=max_length,
      max_images=max_images,
      system=system,
      use_bos=use_bos,
      template=template,
    )
    for source in sources
  ]


def _encode_record(
  record: records.Record,
  *,
  tokenizer: tokenizer_lib.Tokenizer,
  format: str,
  num_image_tokens: int,
  max_length: int,
  max_images: int,
  system: str,
  use_bos: bool,
  template: templates.Template,
) -> conversation.Encoded:
  num_images = len(record["images"])
  if num_images > max_images:
    raise conversation.SkippedSample(
      "too_many_images", f"{num_images} images; wanted at most {max_images}."
    )
  if format == "plain":
    return conversation.encode_caption(
      tokenizer,
      record["caption"],
      num_images=num_images,
      num_image_tokens=num_image_tokens,
      max_length=max_length,
      use_bos=use_bos,
    )
  return conversation.encode_chat(
    tokenizer,
    record["turns"],
    num_images=num_images,
    num_image_tokens=num_image_tokens,
    max_length=max_length,
    system=system,
    use_bos=use_bos,
    template=template,
  )
