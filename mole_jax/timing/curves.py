"""Cost against work: a config's step, or its data, while one size grows.

Each point is a `bench` command in a process of its own, so that neither memory
nor caches of one are those of the next.
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
  "experts": ((1, 2, 4, 8, 16, 32, 64), ("model.mole.num_experts={}",)),
}
RECORDS = (1_000, 10_000, 100_000)
COSTS = ("step_seconds", "flops", "compile_seconds", "peak_gib")
RECORD_COSTS = (
  "count_seconds",
  "open_seconds",
  "first_batch_seconds",
  "plan_seconds",
  "peak_gib",
)


def flags(
  curve: str, size: int, stage: str, trainable: Sequence[str]
) -> list[str]:
  """Command-line settings of a point.

  `trainable`: the stage's patterns; one expert has no router to train.
  """
  settings = [s.format(size, stage=stage) for s in CURVES[curve][1]]
  if curve == "experts" and size == 1:
    kept = tuple(pattern for pattern in trainable if "router" not in pattern)
    settings.append(f"stages.{stage}.trainable={kept!r}")
  return [f"--config.{setting}" for setting in settings]


def measure(
  curve: str,
  sizes: Sequence[int],
  stage: str,
  config_arguments: Sequence[str],
  trainable: Sequence[str],
  num_steps: int,
  on_point: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
  """Times every size, smallest first; each point goes to `on_point`, too.

  Returns the points, and the powers with which COSTS grow. Raises
  protocol.SideError where a point does not run.
  """
  points = []
  for size in sorted(set(sizes)):
    own = flags(curve, size, stage, trainable)
    arguments = [*config_arguments, *own]
    points.append({"size": size, **_point(stage, arguments, num_steps)})
    on_point(points[-1])
  powers = {key: growth(points, key) for key in COSTS}
  return {"points": points, "powers": powers}


def measure_records(
  sizes: Sequence[int],
  stage: str,
  config_arguments: Sequence[str],
  on_point: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
  """Opens made sets of every size, smallest first; as `measure` otherwise.

  A set is opened twice, in two processes: for the first time, where its tokens
  are counted, and again, which gives all other costs.
  """
  points = []
  for size in sorted(set(sizes)):
    with tempfile.TemporaryDirectory(prefix="mole_jax-curves-") as folder:
      arguments = ["--stage", stage, "--folder", folder, *config_arguments]
      # This process stays small: a child's peak begins with its parent's.
      made = _bench("opening", ["--make", str(size), *arguments])
      first = _bench("opening", arguments)
      again = _bench("opening", arguments)
    points.append(
      {
        "size": size,
        "make_seconds": made["make_seconds"],
        "count_seconds": first["open_seconds"],
        **{key: again[key] for key in RECORD_COSTS[1:]},
        "count_peak_gib": first["peak_gib"],
      }
    )
    on_point(points[-1])
  powers = {key: growth(points, key) for key in RECORD_COSTS}
  return {"points": points, "powers": powers}


def _bench(command: str, arguments: Sequence[str]) -> dict[str, Any]:
  """What a command of `bench` writes; SideError where it fails."""
  with tempfile.TemporaryDirectory(prefix="mole_jax-curves-") as folder:
    file = pathlib.Path(folder) / "found.json"
    line = [sys.executable, "-m", "mole_jax.bench", command]
    line += ["--json", str(file), *arguments]
    done = subprocess.run(
      line,
      capture_output=True,
      text=True,
      check=False,
      env=protocol.environment(folder),
    )
    if done.returncode:
      last = "\n  ".join(done.stderr.strip().splitlines()[-6:])
      raise protocol.SideError(f"{' '.join(line)} failed:\n  {last}")
    return json.loads(file.read_text())


def _point(stage: str, arguments: Sequence[str], num_steps: int) -> dict:
  options = ["--stage", stage, "--steps", str(num_steps), "--skip-warm"]
  options += ["--data", "synthetic"]
  found = _bench("step", [*options, *arguments])
  predicted = found["predicted_memory"]
  return {
    "step_seconds": found["synthetic"]["step_seconds"],
    "compile_seconds": found["compile_seconds"]["cold"],
    "flops": found["step"]["flops"]["total"],
    "peak_gib": found["memory"]["peak_gib"],
    "memory_of": found["memory"]["of"],
    "host_peak_gib": found["host_peak_gib"],
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
