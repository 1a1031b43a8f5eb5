"""Cost against work: a config's step while one size of it grows.

Each point is `bench step` in a process of its own, so that neither memory nor
caches of one are those of the next.
"""

import json
import math
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from mole_jax.timing import protocol

# Sizes by default, and the settings that a size stands for ("{}" the size,
# "{stage}" the stage).
CURVES = {
  "tokens": (
    (512, 1024, 2048, 4096, 8192),
    (
      "stages.{stage}.max_length={}",
      "stages.{stage}.batch_size=1",
      "stages.{stage}.max_images=1",
      "model.decoder.max_position_embeddings={}",
    ),
  ),
  "layers": ((2, 4, 8, 16, 32), ("model.decoder.num_layers={}",)),
  "experts": ((2, 4, 8, 16, 32, 64), ("model.mole.num_experts={}",)),
}
COSTS = ("step_seconds", "flops", "compile_seconds", "peak_gib")


def flags(curve: str, size: int, stage: str) -> list[str]:
  """Command-line settings of a point."""
  settings = CURVES[curve][1]
  return [f"--config.{s.format(size, stage=stage)}" for s in settings]


def measure(
  curve: str,
  sizes: Sequence[int],
  stage: str,
  config_arguments: Sequence[str],
  num_steps: int,
  on_point: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
  """Times every size, smallest first; each point goes to `on_point`, too.

  Returns the points, and the powers with which COSTS grow. Raises
  protocol.SideError where a point does not run.
  """
  points = []
  for size in sorted(sizes):
    arguments = [*config_arguments, *flags(curve, size, stage)]
    points.append({"size": size, **_point(stage, arguments, num_steps)})
    on_point(points[-1])
  powers = {key: growth(points, key) for key in COSTS}
  return {"points": points, "powers": powers}


def _point(stage: str, arguments: Sequence[str], num_steps: int) -> dict:
  with tempfile.TemporaryDirectory(prefix="mole_jax-curves-") as folder:
    file = pathlib.Path(folder) / "step.json"
    command = [sys.executable, "-m", "mole_jax.bench", "step"]
    command += ["--stage", stage, "--steps", str(num_steps), "--skip-warm"]
    command += ["--data", "synthetic", "--json", str(file), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
      last = "\n  ".join(done.stderr.strip().splitlines()[-6:])
      raise protocol.SideError(f"{' '.join(command)} failed:\n  {last}")
    found = json.loads(file.read_text())
  predicted = found["predicted_memory"]
  return {
    "step_seconds": found["synthetic"]["step_seconds"],
    "compile_seconds": found["compile_seconds"]["cold"],
    "flops": found["step"]["flops"]["total"],
    "peak_gib": found["memory"]["peak_gib"],
    "memory_of": found["memory"]["of"],
    "predicted_gib": None if predicted is None else predicted["total_gib"],
  }


def growth(points: Sequence[dict[str, Any]], key: str) -> float | None:
  """The power of the size with which a cost grows, from first to last.

  1 is linear, 0 flat. None for a single point.
  """
  ends = points[0], points[-1]
  sizes = [point["size"] for point in ends]
  if sizes[0] == sizes[1]:
    return None
  found = [point[key] for point in ends]
  costs = [x["median"] if isinstance(x, dict) else x for x in found]
  return math.log(costs[1] / costs[0]) / math.log(sizes[1] / sizes[0])
