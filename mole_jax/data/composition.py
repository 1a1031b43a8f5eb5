"""What a mixture really is: who brings what, how often, and what is padding."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import rich.box
import rich.markup
import rich.table

from mole_jax.data import pipeline


@dataclasses.dataclass(frozen=True)
class Part:
  """What a data set or a domain brings to a run.

  Shares are of all the run draws, 0 to 1. `num_records` can be used, of
  `num_read`; `num_epochs` is how often each is seen. Of a domain the latter
  are None, for it may come from sets that are seen more often or less.
  """

  name: str
  samples: float
  images: float
  answer_tokens: float
  tokens: float
  num_records: int
  num_read: int | None
  num_epochs: float | None


@dataclasses.dataclass(frozen=True)
class Composition:
  """A stage's data: by line of the mixture, by domain, and in all."""

  datasets: list[Part]
  domains: list[Part]
  num_steps: int
  num_samples: float
  num_tokens: float
  padding: float
  samples_per_row: float


def compose(
  loader: pipeline.Loader,
  weights: Mapping[str, float | int],
  domains: Sequence[str],
) -> Composition:
  """Counts what the records of a stage bring.

  Args:
    loader: the stage's batches.
    weights: of each line of the mixture, in the order of the data sets.
    domains: names of the data sets' domain numbers.
  """
  plan = loader.plan
  samples_per_row = plan.draws_per_window / plan.rows_per_window
  num_samples = loader.num_rows * samples_per_row
  shares = np.array(list(weights.values()), np.float64)
  shares /= shares.sum()
  # Brought by the average sample: (data set, domain, kind).
  brought = np.zeros((len(shares), len(domains), 4))
  numbers = np.zeros((len(shares), len(domains)), int)
  for index, dataset in enumerate(loader.datasets):
    kinds = (
      np.ones(len(dataset)),
      dataset.image_counts,
      dataset.answer_tokens,
      dataset.lengths,
    )
    size = len(domains)
    numbers[index] = np.bincount(dataset.domains, minlength=size)
    for kind, values in enumerate(kinds):
      sums = np.bincount(dataset.domains, weights=values, minlength=size)
      brought[index, :, kind] = shares[index] * sums / len(dataset)
  total = brought.sum((0, 1))
  part = lambda rows: (rows / np.where(total, total, 1)).tolist()
  datasets = [
    Part(
      name,
      *part(brought[index].sum(0)),
      num_records=len(dataset),
      num_read=account["read"],
      num_epochs=float(num_samples * shares[index] / len(dataset)),
    )
    for index, (name, dataset, account) in enumerate(
      zip(weights, loader.datasets, loader.accounting(), strict=True)
    )
  ]
  by_domain = [
    Part(
      name, *part(brought[:, i].sum(0)), int(numbers[:, i].sum()), None, None
    )
    for i, name in enumerate(domains)
    if numbers[:, i].any()
  ]
  return Composition(
    datasets,
    by_domain,
    loader.num_steps,
    num_samples,
    float(num_samples * total[3]),
    loader.padding.share,
    samples_per_row,
  )


def tables(stage: str, composition: Composition) -> list[rich.table.Table]:
  """The composition, as it is printed; answers and tokens in tokens."""
  return [
    _table(f"stage {stage}, by data set", composition.datasets),
    _table(f"stage {stage}, by domain", composition.domains),
  ]


def summary(composition: Composition) -> str:
  """One line: steps, samples, tokens, padding."""
  return (
    f"{composition.num_steps:,} steps, {composition.num_samples:,.0f} samples, "
    f"{composition.num_tokens:,.0f} tokens; {composition.samples_per_row:.2f} "
    f"samples a row, {composition.padding:.1%} padding"
  )


def _table(title: str, parts: Sequence[Part]) -> rich.table.Table:
  table = rich.table.Table(
    title=title, title_justify="left", box=rich.box.SIMPLE, padding=(0, 1)
  )
  table.add_column("", no_wrap=True)
  has_epochs = parts[0].num_epochs is not None
  for column in (
    "samples",
    "images",
    "answers",
    "tokens",
    "records",
    *(("of", "epochs") if has_epochs else ()),
  ):
    table.add_column(column, justify="right", no_wrap=True)
  for part in parts:
    cells = [
      f"{share:.1%}"
      for share in (part.samples, part.images, part.answer_tokens, part.tokens)
    ]
    cells.append(f"{part.num_records:,}")
    if has_epochs:
      cells += [f"{part.num_read:,}", f"{part.num_epochs:,.2f}"]
    table.add_row(rich.markup.escape(part.name), *cells)
  return table
