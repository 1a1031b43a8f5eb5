"""From the start of a process to the end of its first step."""

import sys
import tempfile
import time
from collections.abc import Sequence

from mole_jax.timing import protocol


def first_steps(
  stage_name: str, config_arguments: Sequence[str], kinds: Sequence[str]
) -> dict[str, float]:
  """Seconds until the first step of a new process is done, by `kinds`.

  One process after the other on one compilation cache, which is empty for the
  first of them: imports, the stage, random weights, compilation, a step.
  Reading a base and data is not in it. Raises protocol.SideError where a
  process fails.
  """
  seconds = {}
  with tempfile.TemporaryDirectory(prefix="mole_jax-start-") as folder:
    command = [sys.executable, "-m", "mole_jax.bench", "starter"]
    command += ["--stage", stage_name, "--cache", folder, *config_arguments]
    for kind in kinds:
      began = time.perf_counter()
      with protocol.running(protocol.Side(f"a {kind} start", command)) as start:
        seconds[kind] = time.perf_counter() - began
        start.stop()
  return seconds
