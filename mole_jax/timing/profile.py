"""Where a step spends its time: the profiler's trace, summed up by name."""

import collections
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from mole_jax.timing import steps

# Events that contain others.
_CONTAINERS = re.compile(r"(while|call|conditional)[.\d]*$")
_METADATA = re.compile(r'%([\w.-]+) = .*metadata=\{.*?op_name="([^"]*)"')
# Scopes that say nothing of the model: transformations and loops.
_NOISE = re.compile(
  r"/(while|body|cond|closed_call|eval_jaxpr|pjit|checkpoint|Llava[.\w]*"
  r"|\w+\._run_layers|custom_vjp_call\w*)(?=/|$)"
)


def profile(
  run: steps.Run, compiled: jax.stages.Compiled, num_steps: int = 3
) -> dict[str, Any]:
  """Traces some steps.

  Returns the device's busy seconds a step, those of them by place in the model
  ("forward decoder/layers/mlp/up_proj/dot_general"), and by operation of the
  compiled program with the kernel that does it; longest first.
  """
  with tempfile.TemporaryDirectory(prefix="mole_jax-profile-") as folder:
    with jax.profiler.trace(folder):
      run.steps(num_steps)
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(path))
    by_op: collections.Counter[tuple[str, str]] = collections.Counter()
    for op, kernel, nanoseconds in _events(data):
      by_op[op, kernel] += nanoseconds / 1e9 / num_steps
  places = op_places(compiled.as_text())
  by_place: collections.Counter[str] = collections.Counter()
  for (op, kernel), seconds in by_op.items():
    by_place[places.get(op, kernel)] += seconds
  return {
    "steps": num_steps,
    "busy_seconds": sum(by_op.values()),
    "by_place": dict(by_place.most_common(80)),
    "by_op": [
      {
        "op": op,
        "kernel": kernel,
        "place": places.get(op, ""),
        "seconds": seconds,
      }
      for (op, kernel), seconds in by_op.most_common(80)
    ],
  }


def _events(data: Any) -> Iterator[tuple[str, str, float]]:
  """Operation, kernel and nanoseconds of what ran on the first device."""
  planes = {plane.name: plane for plane in data.planes}
  device = [n for n in sorted(planes) if n.startswith("/device:")]
  for name in device[:1] or ["/host:CPU"]:
    for line in planes[name].lines:
      if device and not line.name.startswith("Stream"):
        continue  # Lines that name the same time by module or scope.
      for event in line.events:
        stats = {key: value for key, value in event.stats if key == "hlo_op"}
        op = str(stats.get("hlo_op", ""))
        if not device and (not op or event.name != op):
          continue
        if not _CONTAINERS.match(op):
          yield op, event.name, event.duration_ns


def op_places(hlo: str) -> dict[str, str]:
  """Operation -> where in the model it comes from, by a program's text."""
  return {op: place(name) for op, name in _METADATA.findall(hlo)}


def place(op_name: str) -> str:
  """A shorter name of a scope, with the pass that it belongs to."""
  direction = "backward" if "transpose(" in op_name else "forward"
  if "rematted_computation" in op_name:
    direction = "recomputed"
  if "jvp(" not in op_name:
    direction = "update"
  scope = re.sub(r"^jit\(\w+\)", "", op_name)
  scope = re.sub(r"/?(transpose\()?jvp\(\w*\)+", "", scope)
  scope = scope.replace("/rematted_computation", "")
  while scope != (shorter := _NOISE.sub("", scope)):
    scope = shorter
  return f"{direction} {scope.strip('/')}"
