"""What `validate` finds, on a terminal: problems, then a summary."""

from collections.abc import Mapping

import rich.console
import rich.markup
import rich.table

from mole_jax.data.builders.llava_json.findings import Findings, histogram
from mole_jax.data.builders.llava_json.problems import Problem

_SHOWN = 20
_BAR = 30


class Problems:
  """Prints the first problems as they come; the rest is counted."""

  def __init__(self, console: rich.console.Console):
    self._console = console
    self._count = 0

  def add(self, problem: Problem) -> None:
    """Prints one, if there is room."""
    self._count += 1
    if self._count <= _SHOWN:
      # Somebody's text: no markup of it is taken for ours.
      self._console.print(problem.message, markup=False)

  @property
  def num_hidden(self) -> int:
    """How many were not printed."""
    return max(0, self._count - _SHOWN)


def summary(
  found: Findings, num_hidden: int, console: rich.console.Console
) -> None:
  """Prints the facts, histograms and the problems by reason."""
  facts = rich.table.Table.grid(padding=(0, 2))
  for name, text in found.facts():
    facts.add_row(name, rich.markup.escape(text))
  console.print()
  console.print(facts)
  _print_bars(f"length in {found.length_unit}", found.lengths, console)
  _print_bars("longer side of an image, pixels", found.sides, console)
  if not found.has_problems:
    console.print("\nNo problem: every entry can be used.")
    return
  if num_hidden:
    console.print(f"\n{num_hidden:,} more problems are not shown here.")
  table = rich.table.Table("reason", "entries are", title="problems")
  table.add_column("number", justify="right")
  for kind, counts in (("skipped", found.skipped), ("failed", found.failed)):
    for reason, count in counts.most_common():
      table.add_row(reason, kind, f"{count:,}")
  console.print(table)


def _print_bars(
  title: str, counts: Mapping[int, int], console: rich.console.Console
) -> None:
  bins = histogram(counts)
  if not bins:
    return
  top = max(count for _, _, count in bins)
  table = rich.table.Table.grid(padding=(0, 2))
  table.add_column(justify="right")
  table.add_column(justify="right")
  table.add_column()
  for low, high, count in bins:
    bar = "#" * -(-_BAR * count // top)
    table.add_row(f"{low:,} to {high:,}", f"{count:,}", bar)
  console.print(f"\n{title}")
  console.print(table)
