"""What reading a file through found, as numbers."""

import bisect
import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping

from mole_jax.data.builders.llava_json.decoding import Decoded
from mole_jax.data.builders.llava_json.samples import Problem, Sample

_NOTES = 20  # Entries named of those whose id another one has.


@dataclasses.dataclass
class Findings:
  """Counts; num_read = num_used + all skipped + all failed, at any time.

  `lengths` counts tokens or characters, `sides` the longer side in pixels of
  each image decoded. Images are counted as often as entries use them, and
  `num_decoded` and what follows once a file.
  """

  num_read: int = 0
  num_used: int = 0
  skipped: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  failed: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  num_turns: int = 0
  num_system: int = 0
  num_images: int = 0
  images_per_entry: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  domains: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  lengths: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  length_unit: str = "characters"
  num_same_ids: int = 0
  same_ids: list[str] = dataclasses.field(default_factory=list)
  num_decoded: int = 0
  num_image_bytes: int = 0
  sides: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  formats: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  largest: tuple[int, int] = (0, 0)
  seconds: float = 0.0

  @property
  def has_problems(self) -> bool:
    """Whether any entry cannot be used, or reading stopped."""
    return self.num_read > self.num_used

  def add_problem(self, problem: Problem) -> None:
    """Counts an entry that cannot be used."""
    self.num_read += 1
    kind = self.failed if problem.is_fatal else self.skipped
    kind[problem.reason] += 1

  def add_sample(self, sample: Sample, length: int) -> None:
    """Counts an entry that can."""
    self.num_read += 1
    self.num_used += 1
    has_system = sample.turns[0]["from"] == "system"
    self.num_system += has_system
    self.num_turns += len(sample.turns) - has_system
    self.num_images += len(sample.images)
    self.images_per_entry[len(sample.images)] += 1
    self.domains[sample.domain or ""] += 1
    self.lengths[length] += 1
    if sample.same_id is not None:
      self.num_same_ids += 1
      if len(self.same_ids) < _NOTES:
        self.same_ids.append(f"line {sample.line}: {sample.id!r}")

  def add_image(self, image: Decoded) -> None:
    """Counts an image that could be decoded."""
    self.num_decoded += 1
    self.num_image_bytes += image.num_bytes
    self.sides[max(image.width, image.height)] += 1
    self.formats[image.format] += 1
    self.largest = max(self.largest, (image.width, image.height), key=_area)

  def facts(self) -> list[tuple[str, str]]:
    """What there is to say in a line each: (name, text)."""
    skipped, failed = self.skipped.total(), self.failed.total()
    per_entry = sorted(self.images_per_entry.items())
    facts = [
      (
        "entries",
        f"read {self.num_read:,} = used {self.num_used:,} + skipped "
        f"{skipped:,} + failed {failed:,}",
      ),
      (
        "turns",
        f"{self.num_turns:,}, and {self.num_system:,} system turns",
      ),
      (
        "images",
        f"{self.num_images:,} in use; entries by their number of images: "
        + (", ".join(f"{k}: {n:,}" for k, n in per_entry) or "none"),
      ),
    ]
    named = sorted((d, n) for d, n in self.domains.items() if d)
    if named:
      rest = self.domains[""]
      facts.append(
        (
          "domains",
          ", ".join(f"{d!r}: {n:,}" for d, n in named)
          + (f", without one: {rest:,}" if rest else ""),
        )
      )
    if self.lengths:
      middle, late, longest = quantiles(self.lengths, (0.5, 0.95, 1.0))
      facts.append(
        (
          f"length in {self.length_unit}",
          f"median {middle:,}, 95% up to {late:,}, longest {longest:,}",
        )
      )
    if self.num_decoded:
      kinds = ", ".join(f"{k}: {n:,}" for k, n in self.formats.most_common())
      middle, _, longest = quantiles(self.sides, (0.5, 0.95, 1.0))
      facts.append(
        (
          "images decoded",
          f"{self.num_decoded:,} files, {size_text(self.num_image_bytes)} "
          f"({kinds}); longer side: median {middle:,}, at most {longest:,} "
          f"pixels; largest {self.largest[0]:,} x {self.largest[1]:,}",
        )
      )
    if self.num_same_ids:
      facts.append(
        (
          "ids used again",
          f"{self.num_same_ids:,}, by entries that say something else: kept, "
          "the entry's number behind the id",
        )
      )
    return facts


def size_text(num_bytes: int) -> str:
  """A number of bytes for people."""
  if num_bytes < 10**5:
    return f"{num_bytes:,} bytes"
  return f"{num_bytes / 10**6:,.1f} MB"


def _area(size: tuple[int, int]) -> int:
  return size[0] * size[1]


def quantiles(
  counts: Mapping[int, int], shares: tuple[float, ...]
) -> list[int]:
  """The smallest values that at least these shares of all do not exceed."""
  rows = sorted(counts.items())
  totals = list(itertools.accumulate(count for _, count in rows))
  wanted = (math.ceil(share * totals[-1]) for share in shares)
  return [rows[bisect.bisect_left(totals, number)][0] for number in wanted]


def histogram(counts: Mapping[int, int]) -> list[tuple[int, int, int]]:
  """(from, to, how many) by powers of two, without gaps; both ends included."""
  if not counts:
    return []
  bins = collections.Counter()
  for value, count in counts.items():
    bins[max(value, 0).bit_length()] += count
  return [
    (2 ** (bits - 1) if bits else 0, 2**bits - 1, bins[bits])
    for bits in range(min(bins), max(bins) + 1)
  ]
