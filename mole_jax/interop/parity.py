"""How far two models are apart, rung by rung, and the report about it."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import rich.table

from mole_jax.training import files

JSON_FILE = "parity.json"
TEXT_FILE = "parity.md"
# Largest error over largest value, float32 on both sides.
MAX_ERROR = 1e-4
# A kernel that was merged and then rounded to bfloat16 is another kernel:
# 2^-9 of each weight, which add up over layers.
MAX_ERROR_ROUNDED = 5e-2
MAX_KL = 1e-6
# Two experts whose probabilities are this close are a tie of float32.
TIE = 1e-5


@dataclasses.dataclass(frozen=True)
class Check:
  """One line of the report; `limit` None is told and not judged."""

  what: str
  value: int | float
  limit: int | float | None
  note: str = ""

  @property
  def is_good(self) -> bool:
    # NaN is not good.
    return self.limit is None or self.value <= self.limit


@dataclasses.dataclass(frozen=True)
class Parity:
  """What `verify` found; `tensors` has a hash for each tensor compared."""

  ckpt: str
  export: str
  format: str
  versions: dict[str, str]
  checks: tuple[Check, ...]
  tensors: dict[str, dict[str, Any]]

  @property
  def is_equal(self) -> bool:
    return all(check.is_good for check in self.checks)


def compare_outputs(
  inputs: Mapping[str, np.ndarray],
  ours: Mapping[str, np.ndarray],
  theirs: Mapping[str, np.ndarray],
  about: Mapping[str, Any],
  is_rounded: bool,
) -> list[Check]:
  """Errors rung by rung: features, layers, routing, logits, text."""
  limit = MAX_ERROR_ROUNDED if is_rounded else MAX_ERROR
  note = "stored with less precision" if is_rounded else ""
  is_token = inputs["attention_mask"].astype(bool)
  checks = [
    Check(
      "keys that PyTorch misses",
      len(about["missing"]),
      0,
      ", ".join(about["missing"][:3]),
    ),
    Check(
      "keys unknown to PyTorch",
      len(about["unexpected"]),
      0,
      ", ".join(about["unexpected"][:3]),
    ),
    Check(
      "projected features, relative error",
      _error(ours["features"], theirs["features"]),
      limit,
      note,
    ),
  ]
  num_layers = [len(side["hidden"]) - 1 for side in (ours, theirs)]
  checks.append(
    Check(
      "decoder layers more or less",
      abs(num_layers[0] - num_layers[1]),
      0,
      f"{num_layers[0]} here, {num_layers[1]} in PyTorch",
    )
  )
  # As many as both have; the line above tells of others.
  for layer, (mine, other) in enumerate(
    zip(ours["hidden"], theirs["hidden"], strict=False)
  ):
    what = "embeddings" if layer == 0 else f"decoder layer {layer - 1}"
    checks.append(
      Check(f"{what}, relative error", _error(mine, other), limit, note)
    )
  if "chosen" in theirs:
    checks += _routing(ours, theirs, is_token, is_rounded)
  mine, other = ours["logits"][is_token], theirs["logits"][is_token]
  checks.append(
    Check("logits, relative error", _error(mine, other), limit, note)
  )
  checks.append(
    Check(
      "KL divergence, mean, nats",
      _kl(mine, other),
      None if is_rounded else MAX_KL,
    )
  )
  unlike = int((ours["greedy"] != theirs["greedy"]).sum())
  checks.append(
    Check(
      "greedy tokens that differ",
      unlike,
      None if is_rounded else 0,
      f"of {len(ours['greedy'])}",
    )
  )
  return checks


def _routing(
  ours: Mapping[str, np.ndarray],
  theirs: Mapping[str, np.ndarray],
  is_token: np.ndarray,
  is_rounded: bool,
) -> list[Check]:
  """Router decisions, ties apart."""
  differs = (ours["chosen"] != theirs["chosen"]).any(-1)[:, is_token]
  top_k = ours["chosen"].shape[-1]
  probs = np.sort(theirs["probs"], axis=-1)[..., ::-1][:, is_token]
  # All gaps down to the first expert left out.
  gaps = -np.diff(probs, axis=-1)[..., :top_k]
  is_tie = (gaps < TIE).any(-1)
  return [
    Check(
      "router decisions that differ",
      int((differs & ~is_tie).sum()),
      None if is_rounded else 0,
      f"of {differs.size}; {int((differs & is_tie).sum())} more are ties",
    )
  ]


def _error(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Largest difference over the largest value."""
  if ours.shape != theirs.shape:
    return float("inf")
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _kl(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Mean KL(theirs || ours) of the next-token distributions, in nats."""
  log_p, log_q = (_log_softmax(x.astype(np.float64)) for x in (theirs, ours))
  return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


def _log_softmax(x: np.ndarray) -> np.ndarray:
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def table(parity: Parity) -> rich.table.Table:
  """The report for the terminal."""
  result = rich.table.Table(
    title=f"{parity.ckpt} and {parity.export} ({parity.format})"
  )
  for column, justify in (
    ("check", "left"),
    ("value", "right"),
    ("limit", "right"),
    ("", "left"),
    ("note", "left"),
  ):
    result.add_column(column, justify=justify, overflow="fold")
  for check in parity.checks:
    result.add_row(*_cells(check))
  return result


def _cells(check: Check) -> tuple[str, ...]:
  number = lambda x: str(x) if isinstance(x, int) else f"{x:.1e}"
  if check.limit is None:
    return check.what, number(check.value), "", "told", check.note
  verdict = "good" if check.is_good else "BAD"
  return (
    check.what,
    number(check.value),
    number(check.limit),
    verdict,
    check.note,
  )


def write(parity: Parity, out: pathlib.Path) -> None:
  """Writes parity.json and parity.md."""
  out.mkdir(parents=True, exist_ok=True)
  values = dataclasses.asdict(parity) | {"is_equal": parity.is_equal}
  files.write_json(out / JSON_FILE, values)
  lines = [
    f"# {parity.ckpt} and {parity.export}",
    "",
    f"Format `{parity.format}`; {'equal' if parity.is_equal else 'DIFFERENT'}. "
    "Both sides in float32 on random rows of text, with one image and with "
    "three; errors are the largest difference over the largest value.",
    "",
    ", ".join(f"{name} {version}" for name, version in parity.versions.items()),
    "",
    "| check | value | limit | | note |",
    "|---|---|---|---|---|",
    *("| " + " | ".join(_cells(check)) + " |" for check in parity.checks),
    "",
  ]
  (out / TEXT_FILE).write_text("\n".join(lines))
