"""Accuracy by domain and question type, several runs side by side."""

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import rich.markup
import rich.table

from mole_jax.reporting import runs as runs_lib

_KEYS = ("accuracy", "majority", "blank")


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run (or the mean of several) on one set of questions.

  Fractions 0..1, NaN where not measured. `spread` is the sample standard
  deviation of accuracy over runs, None for a single run.
  """

  accuracy: float
  majority: float
  blank: float
  num_questions: int | None = None
  spread: float | None = None

  @property
  def is_above_both(self) -> bool:
    """Whether accuracy beats the majority answer and the blank image."""
    levels = [x for x in (self.majority, self.blank) if not math.isnan(x)]
    return all(self.accuracy > level for level in levels)


def read_cell(entry: dict[str, Any] | None) -> Cell:
  """The cell of an object with the keys accuracy, majority and blank."""
  entry = entry or {}
  numbers = [entry.get(key) for key in _KEYS]
  return Cell(
    *(math.nan if x is None else float(x) for x in numbers),
    num_questions=entry.get("num_questions"),
  )


def mean_cell(cells: Sequence[Cell]) -> Cell:
  """Mean of cells, runs without a number left out, with the spread."""
  values = np.array([[getattr(cell, key) for key in _KEYS] for cell in cells])
  means = [
    float(np.mean(column[~np.isnan(column)]))
    if (~np.isnan(column)).any()
    else math.nan
    for column in values.T
  ]
  known = values[~np.isnan(values[:, 0]), 0]
  spread = float(np.std(known, ddof=1)) if len(known) > 1 else None
  return Cell(*means, num_questions=cells[0].num_questions, spread=spread)


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of cells, a run each, and means of the runs of one name.

  `is_mean` marks the means; `stands` marks one row for each name.
  """

  title: str
  columns: tuple[str, ...]
  rows: tuple[tuple[str, tuple[Cell, ...]], ...]
  is_mean: tuple[bool, ...]
  stands: tuple[bool, ...]

  def best(self, column: int) -> set[int]:
    """Rows with the highest accuracy; one row stands for each name.

    That row is the mean where there is one: the luckiest of several seeds
    wins nothing. Empty when fewer than two names have a number.
    """
    scores = {
      row: cells[column].accuracy
      for row, (_, cells) in enumerate(self.rows)
      if self.stands[row] and not math.isnan(cells[column].accuracy)
    }
    top = max(scores.values(), default=0.0)
    return {r for r, s in scores.items() if s == top and len(scores) > 1}


def domain_table(runs: Sequence[runs_lib.Run]) -> Table:
  """Accuracy by domain, then the mean over domains."""
  domains = _domains(runs)
  return _table(
    "Accuracy by domain",
    runs,
    (*domains, "average"),
    lambda evaluation: (
      *(evaluation["domains"].get(domain) for domain in domains),
      evaluation.get("average"),
    ),
  )


def type_tables(runs: Sequence[runs_lib.Run]) -> tuple[Table, ...]:
  """One table a domain: accuracy by question type."""
  tables = []
  for domain in _domains(runs):
    kinds: dict[str, None] = {}
    for run in _evaluated(runs):
      entry = run.evaluation["domains"].get(domain) or {}
      kinds |= dict.fromkeys(entry.get("types") or ())

    def entries(evaluation, domain=domain, kinds=tuple(kinds)):
      types = (evaluation["domains"].get(domain) or {}).get("types") or {}
      return tuple(types.get(kind) for kind in kinds)

    tables.append(_table(domain, runs, tuple(kinds), entries))
  return tuple(tables)


def rich_table(table: Table) -> rich.table.Table:
  """The table for a terminal; percentages."""
  shown = rich.table.Table(
    title=table.title,
    caption="percent right (majority answer / same model, blank image); "
    "* best, ! not above both",
  )
  shown.add_column("run")
  for name in table.columns:
    shown.add_column(name, justify="right")
  for row, (label, cells) in enumerate(table.rows):
    texts = []
    for column, cell in enumerate(cells):
      is_best = row in table.best(column)
      mark = "*" * is_best + "!" * (not cell.is_above_both)
      texts.append(
        f"{percent(cell.accuracy)}{_spread(cell)}{mark}\n"
        f"({percent(cell.majority)} / {percent(cell.blank)})"
      )
    shown.add_row(rich.markup.escape(label), *texts)
  return shown


def html_table(table: Table) -> str:
  """The table as HTML in a container of its own that scrolls."""
  first = table.rows[0][1]
  head = "".join(
    f'<th scope="col">{html.escape(name)}{_count(first[i])}</th>'
    for i, name in enumerate(table.columns)
  )
  body = "".join(
    f'<tr class="{"mean" if table.is_mean[row] else "run"}">'
    f'<th scope="row">{html.escape(label)}</th>'
    + "".join(
      _html_cell(cell, row in table.best(column))
      for column, cell in enumerate(cells)
    )
    + "</tr>"
    for row, (label, cells) in enumerate(table.rows)
  )
  return (
    '<div class="scroll"><table class="accuracy"><thead><tr>'
    f'<th scope="col">run</th>{head}</tr></thead>'
    f"<tbody>{body}</tbody></table></div>"
  )


def percent(fraction: float) -> str:
  """ "71.2" for 0.712, a dash for NaN."""
  return "–" if math.isnan(fraction) else f"{100 * fraction:.1f}"


def _html_cell(cell: Cell, is_best: bool) -> str:
  if math.isnan(cell.accuracy):
    return '<td class="none">–</td>'
  marks = " ★ best" if is_best else ""
  if not cell.is_above_both:
    marks += ' <span class="low">▽ not above both</span>'
  kind = ' class="best"' if is_best else ""
  return (
    f"<td{kind}><b>{percent(cell.accuracy)}{_spread(cell)}</b>{marks}"
    f"<small>majority {percent(cell.majority)}<br>"
    f"blank {percent(cell.blank)}</small></td>"
  )


def _count(cell: Cell) -> str:
  if cell.num_questions is None:
    return ""
  return f"<small>{cell.num_questions:,} questions</small>"


def _spread(cell: Cell) -> str:
  return "" if cell.spread is None else f" ± {percent(cell.spread)}"


def _evaluated(runs: Sequence[runs_lib.Run]) -> list[runs_lib.Run]:
  return [run for run in runs if run.evaluation]


def _domains(runs: Sequence[runs_lib.Run]) -> tuple[str, ...]:
  names: dict[str, None] = {}
  for run in _evaluated(runs):
    names |= dict.fromkeys(run.evaluation["domains"])
  return tuple(names)


def _table(title, runs, columns, entries) -> Table:
  """Each run's row, and after the runs of one name their mean."""
  rows, is_mean, stands = [], [], []
  for group in runs_lib.group_runs(_evaluated(runs)):
    cells = [
      tuple(read_cell(entry) for entry in entries(run.evaluation))
      for run in group.runs
    ]
    rows += [(run.label, c) for run, c in zip(group.runs, cells, strict=True)]
    is_mean += [False] * len(cells)
    stands += [len(cells) == 1] * len(cells)
    if len(cells) > 1:
      means = tuple(mean_cell(column) for column in zip(*cells, strict=True))
      rows.append((f"{group.name}, mean of {len(cells)}", means))
      is_mean.append(True)
      stands.append(True)
  return Table(title, columns, tuple(rows), tuple(is_mean), tuple(stands))
