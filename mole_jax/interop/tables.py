"""Tables that say what a conversion did or a checkpoint is."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import rich.table

from mole_jax.training import state


def new_table(title: str) -> rich.table.Table:
  """Two columns: what, value."""
  table = rich.table.Table(title=title, show_header=False)
  table.add_column("what")
  table.add_column("value", overflow="fold")
  return table


def entries(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Shapes and types of arrays, as base.json tells them."""
  return {
    name: {"shape": leaf.shape, "dtype": str(leaf.dtype)}
    for name, leaf in leaves.items()
  }


def add_counts(
  table: rich.table.Table,
  parameters: Mapping[str, Mapping[str, Any]],
  prefix: str = "",
) -> None:
  """Rows with numbers of parameters by part, and their types."""
  counts: dict[str, int] = {}
  for name, entry in parameters.items():
    part = prefix + state.group(name)
    size = int(np.prod(entry["shape"], dtype=np.int64))
    counts[part] = counts.get(part, 0) + size
  for part, count in counts.items():
    table.add_row(part, f"{count:,} parameters")
  types = ", ".join(sorted({e["dtype"] for e in parameters.values()}))
  total = sum(counts.values())
  table.add_row(f"{prefix}in all", f"{total:,} parameters, {types}")
