"""A mixture of data sets: what each brings, and its samples by number."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from mole_jax.data import encoding, measure, records

# What a format asks for by its nature is no fault of the record.
_CHOSEN = ("no_caption",)


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


class TooManySkipped(ValueError):
  """More records cannot be used than was allowed."""


class Sample(NamedTuple):
  """A record that is trained on, its images still encoded."""

  input_ids: Int32[np.ndarray, " T"]
  labels: Int32[np.ndarray, " T"]
  images: list[bytes]


class Dataset:
  """The records of a split that can be used, by number.

  Lengths and image counts are known from the start, samples are encoded when
  they are asked for. `accounting` tells what became of the other records.

  Args:
    name: for messages and the accounting, e.g. "embedded/general as chat".
    rows: records by index; opened anew in each process.
    encoder: what makes samples of them.
    measured: what it finds in each.
    domains: domain names; a record's domain becomes its index in them.

  Raises:
    ValueError: for a domain that is not among them, or if no record is usable.
  """

  name: str
  lengths: Int32[np.ndarray, " N"]  # Tokens, images expanded.
  image_counts: Int32[np.ndarray, " N"]
  answer_tokens: Int32[np.ndarray, " N"]  # Those with a label.
  domains: Int32[np.ndarray, " N"]

  def __init__(
    self,
    name: str,
    rows: Sequence[records.Record],
    encoder: encoding.Encoder,
    measured: measure.Measured,
    domains: Sequence[str],
  ):
    self.name = name
    self._rows = rows
    self._encoder = encoder
    self._skipped = measured.skipped()
    self._log = measured.log
    found = measured.rows
    self._num_read = len(found)
    self._used = np.flatnonzero(found["reason"] == 0).astype(np.int32)
    if not len(self._used):
      raise ValueError(
        f"{name}: none of {self._num_read} records can be used as "
        f"{encoder.format!r}; skipped {self._skipped}.{self._where()}"
      )
    used = found[self._used]
    self.lengths = used["length"].astype(np.int32)
    self.image_counts = used["images"].astype(np.int32)
    self.answer_tokens = used["answer_tokens"].astype(np.int32)
    indices = [
      domains.index(domain) if domain in domains else -1
      for domain in measured.domains
    ]
    self.domains = np.array(indices, np.int32)[used["domain"]]
    foreign = np.flatnonzero(self.domains < 0)
    if len(foreign):
      record = self.record(int(foreign[0]))
      raise ValueError(
        f"{name}: record {record['id']!r} is of domain {record['domain']!r} "
        f"(and so are others, {len(foreign):,} in all with domains that are "
        f"not in config.data.domains); wanted one of {list(domains)}."
      )

  def __len__(self) -> int:
    return len(self._used)

  def record(self, index: int) -> records.Record:
    """The record behind the number of a usable one.

    Raises ValueError for a record that cannot be read.
    """
    return self._rows[int(self._used[index])]

  def sample(self, index: int) -> Sample:
    """A usable record as ids, labels and the images that the ids refer to.

    Raises ValueError for a record that cannot be read, or is another one than
    it was when it was measured.
    """
    record = self.record(index)
    encoded = self._encoder.encode(records.without_images(record))
    if len(encoded.input_ids) != self.lengths[index]:
      raise ValueError(
        f"{self.name}: record {record['id']!r} has {len(encoded.input_ids)} "
        f"tokens, wanted the {self.lengths[index]} that were measured."
      )
    images = record["images"][: self.image_counts[index]]
    return Sample(encoded.input_ids, encoded.labels, images)

  def place(self, index: int) -> int:
    """The number of a usable record among all records of the split."""
    return int(self._used[index])

  def accounting(self, num_failed: int = 0) -> dict[str, object]:
    """{"read", "used", "skipped": {reason: n}, "failed"}; read adds up."""
    return {
      "read": self._num_read,
      "used": len(self) - num_failed,
      "skipped": self._skipped,
      "failed": num_failed,
    }

  def check_skipped(
    self, max_skipped: float | int, num_failed: int = 0
  ) -> None:
    """Raises TooManySkipped where more of the records are bad than allowed.

    Args:
      max_skipped: share of the records, 0 to 1.
      num_failed: usable ones whose images turned out bad.
    """
    bad = {
      **{k: v for k, v in self._skipped.items() if k not in _CHOSEN},
      **({"failed": num_failed} if num_failed else {}),
    }
    share = sum(bad.values()) / self._num_read
    if share > max_skipped:
      raise TooManySkipped(
        f"{self.name}: {sum(bad.values()):,} of {self._num_read:,} records "
        f"cannot be trained on ({share:.2%}: {bad}), more than "
        f"config.data.max_skipped={max_skipped:g} allows; mend them, or go on "
        f"without them with --config.data.max_skipped={_above(share):g}."
        f"{self._where()}"
      )

  def _where(self) -> str:
    return f" Each is named in {self._log}." if self._log else ""


def load_mixture(
  sources: Sequence[Source],
  make_encoder: Callable[[str], encoding.Encoder],
  *,
  domains: Sequence[str],
  max_skipped: float | int,
  report: Callable[[str, int, int], object] = lambda name, done, total: None,
) -> list[Dataset]:
  """Opens and measures each source.

  Args:
    sources: lines of the mixture.
    make_encoder: the encoder for a format.
    domains: domain names of the run.
    max_skipped: share of the records of a source, 0 to 1, that may be bad.
    report: called with a name, how many records were measured, of how many.

  Raises:
    TooManySkipped: with the reasons and where each record is named.
    ValueError: as `Dataset`, and for an empty mixture.
  """
  if not sources:
    raise ValueError("the mixture is empty; wanted at least one data set.")
  _check_found(sources)
  datasets = []
  for source in sources:
    # One set may stand in a mixture twice, as captions and as chats.
    name = f"{source.name} as {source.format}"
    try:
      encoder = make_encoder(source.format)
    except ValueError as error:
      raise ValueError(f"{source.name}: {error}") from None
    rows = records.open_records(source.name, source.split)
    tell = lambda done, total, name=name: report(name, done, total)
    measured = measure.load_or_measure(source.name, source.split, encoder, tell)
    dataset = Dataset(name, rows, encoder, measured, domains)
    dataset.check_skipped(max_skipped)
    datasets.append(dataset)
  return datasets


def _check_found(sources: Sequence[Source]) -> None:
  """Raises ValueError that tells of every data set that is not there."""
  problems = []
  for source in sources:
    try:
      records.find(source.name)
    except ValueError as error:
      problems.append(str(error))
  if len(problems) > 1:
    raise ValueError(
      f"{len(problems)} of {len(sources)} data sets are not there:\n  "
      + "\n  ".join(problems)
    )
  if problems:
    raise ValueError(problems[0])


def _above(share: float) -> float:
  """A limit of two digits that is enough."""
  return min(1.0, float(f"{share * 1.1:.2g}"))
