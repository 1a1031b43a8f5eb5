"""What became of the records, as shards are written: it must add up."""

import collections
import pathlib
from collections.abc import Mapping
from typing import Any

from mole_jax.data.builders.llava_json.problems import by_reason
from mole_jax.data.builders.prepared import spool

LOG = "skipped.jsonl"


class TooManySkipped(spool.BadInput):
  """More records are bad than was allowed."""


class Tally:
  """Takes what workers say; `log` is where skipped records are named."""

  def __init__(
    self, plan: spool.Plan, max_skipped: float | int, log: pathlib.Path
  ):
    self.known: dict[int, dict[str, Any]] = {}
    self._plan = plan
    self._max_skipped = max_skipped
    self._log = log
    self._begun: dict[int, tuple[int, dict[str, int]]] = {}

  @property
  def num_done(self) -> int:
    done = sum(len(self._plan.span(shard)) for shard in self.known)
    return done + sum(count for count, _ in self._begun.values())

  def add(self, shard: int, answer: Mapping[str, Any]) -> None:
    """Takes what a worker says."""
    if "known" in answer:
      self._begun.pop(shard, None)
      self.known[shard] = answer["known"]
    else:
      self._begun[shard] = answer["done"], answer["skipped"]

  def skipped(self) -> dict[str, int]:
    """Number of records by reason, those that failed not among them."""
    total = collections.Counter(self._plan.skipped)
    for known in self.known.values():
      total.update(known["skipped"])
    for _, counts in self._begun.values():
      total.update(counts)
    return dict(sorted(total.items()))

  def total(self, key: str) -> int:
    """Sum of a number over the finished shards."""
    return sum(known[key] for known in self.known.values())

  def check(self) -> None:
    """Raises TooManySkipped above the limit."""
    skipped, failed = self.skipped(), self.total("failed")
    bad, read = sum(skipped.values()) + failed, self._plan.num_read
    if bad <= self._max_skipped * read:
      return
    raise TooManySkipped(
      f"{bad:,} of {read:,} records are bad ({bad / read:.2%}), more than "
      f"--max-skipped {self._max_skipped:g} allows: "
      f"{by_reason({**skipped, 'failed': failed} if failed else skipped)}. "
      f"{self._log} names each with its line; mend them, or go on without them "
      f"with --max-skipped {_above(bad / read)}."
    )


def _above(share: float) -> float:
  """A limit of two digits that is enough."""
  return min(1.0, float(f"{share * 1.1:.2g}"))
