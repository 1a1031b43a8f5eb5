"""What is said of repeated timings: medians and quartiles, never a mean.

Other work on a shared machine only ever makes a timing longer.
"""

from collections.abc import Callable, Sequence

import numpy as np


def summary(seconds: Sequence[float]) -> dict[str, float]:
  """Median, quartiles and the number of timings."""
  if not len(seconds):
    raise ValueError("no timing to sum up: run one step or more.")
  low, median, high = np.percentile(seconds, [25, 50, 75])
  return {
    "median": float(median),
    "quartile_1": float(low),
    "quartile_3": float(high),
    "count": len(seconds),
  }


def interleave(
  timed: Sequence[Callable[[], float]], num_rounds: int
) -> list[list[float]]:
  """Calls each in turn, round after round, so that all meet the same weather.

  Returns the seconds of each by round.
  """
  seconds: list[list[float]] = [[] for _ in timed]
  for _ in range(num_rounds):
    for row, measure in zip(seconds, timed, strict=True):
      row.append(measure())
  return seconds


def ratio(
  seconds: Sequence[float], baseline: Sequence[float]
) -> dict[str, float]:
  """Summary of the ratios of timings that were taken in the same round."""
  return summary(np.divide(seconds, baseline).tolist())
