"""What a run writes as it goes: JSONL, TensorBoard, and lines on a terminal."""

import json
import math
import pathlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np


def _import_tensorboard() -> ModuleType:
  """tensorboardX, kept from importing PyTorch.

  Where PyTorch is installed it would be loaded to recognise its tensors, at
  the cost of seconds and hundreds of megabytes; we write plain numbers.
  """
  present = "torch" in sys.modules
  torch = sys.modules.get("torch")
  sys.modules["torch"] = None  # type: ignore[assignment]
  try:
    import tensorboardX
  finally:
    if present:
      sys.modules["torch"] = torch
    else:
      del sys.modules["torch"]
  return tensorboardX


tensorboard = _import_tensorboard()


class NonFiniteLossError(RuntimeError):
  """A loss or gradient was NaN or infinite; `step` is where."""

  def __init__(self, stage: str, step: int):
    super().__init__(
      f"stage {stage!r}: the loss or its gradient is not finite at step "
      f"{step}. Parameters were left as they were before it, and the last "
      "checkpoint is good. Lower the learning rate, or look at that batch."
    )
    self.step = step


class Window:
  """Adds up the metrics of the steps between two log lines."""

  def __init__(self, domains: Sequence[str]):
    self._domains = tuple(domains)
    self._steps: list[dict[str, np.ndarray]] = []
    self._num_tokens = 0
    self._num_positions = 0
    self._num_failed = 0
    self._waited = 0.0

  def add_wait(self, seconds: float) -> None:
    """Adds time in which nothing was done but to wait for a batch."""
    self._waited += seconds

  def add(self, metrics: dict[str, np.ndarray]) -> None:
    """Adds one step's metrics; positions are tokens and padding."""
    self._steps.append(metrics)
    self._num_tokens += int(metrics["num_tokens"])
    self._num_positions += int(metrics["num_positions"])
    self._num_failed += int(metrics["num_failed"])

  def __len__(self) -> int:
    return len(self._steps)

  def summary(self, seconds: float) -> dict[str, Any]:
    """Means over the window's steps; domains weighted by their tokens.

    A domain without a token in the window is None.
    """
    mean = lambda key: np.mean([step[key] for step in self._steps], axis=0)
    total = lambda key: np.sum([step[key] for step in self._steps], axis=0)
    count = total("domain_count")
    loss, correct = total("domain_loss_sum"), total("domain_correct")

    def by_domain(sums):
      return {
        domain: float(value / number) if number else None
        for domain, value, number in zip(
          self._domains, sums, count, strict=True
        )
      }

    row = {
      "loss": float(mean("loss")),
      "lm_loss": float(mean("lm_loss")),
      "accuracy": float(correct.sum() / count.sum()) if count.sum() else None,
      "grad_norm": float(mean("grad_norm")),
      "learning_rate": float(self._steps[-1]["learning_rate"]),
      "domain_loss": by_domain(loss),
      "domain_accuracy": by_domain(correct),
      "step_seconds": seconds / len(self._steps),
      "tokens_per_second": self._num_tokens / seconds,
      "padding_share": 1 - self._num_tokens / self._num_positions,
      "num_failed": self._num_failed,
      "stall_share": self._waited / seconds,
    }
    if "balance_loss" in self._steps[0]:
      row["balance_loss"] = float(mean("balance_loss"))
      row["expert_load"] = mean("expert_load").tolist()
      row["router_entropy"] = mean("router_entropy").tolist()
    if "dropped_share" in self._steps[0]:
      row["dropped_share"] = mean("dropped_share").tolist()
    return row


def scalars(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
  """Flattens a row to named numbers: "expert_load/layer_3/expert_0"."""
  levels = {
    "expert_load": ("layer", "expert"),
    "router_entropy": ("layer",),
    "dropped_share": ("layer",),
  }
  flat: dict[str, float] = {}
  for key, value in row.items():
    name = f"{prefix}{key}"
    if isinstance(value, dict):
      flat |= scalars(value, f"{name}/")
    elif isinstance(value, list):
      for index, entry in np.ndenumerate(np.asarray(value)):
        labels = zip(levels[key], index, strict=True)
        suffix = "/".join(f"{level}_{i}" for level, i in labels)
        flat[f"{name}/{suffix}"] = float(entry)
    elif value is not None:
      flat[name] = float(value)
  return flat


class NoWriter:
  """Takes the place of `Writer` in all processes but the first."""

  def __init__(self, directory: pathlib.Path, start_step: int):
    del directory, start_step

  def __enter__(self) -> "NoWriter":
    return self

  def __exit__(self, *_) -> None:
    pass

  def write(self, step: int, row: dict[str, Any]) -> None:
    """The first process writes the same row."""


class Writer:
  """A stage's metrics.jsonl and TensorBoard events; a context manager.

  Opening it for a run that resumes at `start_step` drops the lines behind
  that step: those steps are about to be done again.
  """

  def __init__(self, directory: pathlib.Path, start_step: int):
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "metrics.jsonl"
    kept = []
    if path.exists():
      for line in path.read_text().splitlines():
        # A killed run may leave half a line.
        if line.endswith("}") and json.loads(line)["step"] <= start_step:
          kept.append(line + "\n")
    path.write_text("".join(kept))
    self._file = path.open("a")
    self._board = tensorboard.SummaryWriter(
      str(directory / "tensorboard"), purge_step=start_step + 1
    )

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *_) -> None:
    self._file.close()
    self._board.close()

  def write(self, step: int, row: dict[str, Any]) -> None:
    """Writes one line; non-finite numbers become null (JSON has none)."""
    row = {
      key: None if isinstance(x, float) and not math.isfinite(x) else x
      for key, x in row.items()
    }
    self._file.write(json.dumps({"step": step} | row) + "\n")
    self._file.flush()
    for name, value in scalars(row).items():
      self._board.add_scalar(name, value, step)
