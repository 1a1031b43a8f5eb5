"""Trains on a built data set, is killed again and again, and goes on.

python -m tests.benchmarks.kill_and_resume --records 20000 --kills 8 [--dir DIR]

Makes a LLaVA file, builds it, trains 50 steps of a small model with two worker
processes, and does it again with a SIGKILL to the whole process group at
random moments: while lengths are counted, while the step compiles, while it
trains. Prints what was left five seconds after each kill, and whether the
losses are bitwise those of the run that nobody disturbed; exit code 1 where
they are not. Six minutes for 20,000 records and 8 kills on 2 CPU cores that are
not free. For a million give --counted.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

from tests.benchmarks import prepare_scale

ROOT = pathlib.Path(__file__).parents[2]
LEFT_SECONDS = 5.0  # After which nothing of a killed run may be left.
_CONFIG = """
import runpy

def get_config(arg="tiny"):
  c = runpy.run_path({mole3!r})["get_config"]("tiny")
  c.name = "killed"
  c.data.domains = ("mine",)
  c.data.num_workers = {num_workers}
  c.model.vision.update(dict(num_layers=1, hidden_size=32))
  c.model.decoder.update(dict(num_layers=1, hidden_size=32))
  c.stage_names = ("base",)
  stage = c.stages.base
  c.stages = dict(base=stage)
  stage.mixture = dict(
    mine=dict(name={data!r}, split="train", format="chat", weight=1.0)
  )
  stage.update(dict(
    num_steps={num_steps}, batch_size=4, max_length=512, log_every=1,
    checkpoint_every=5,
  ))
  c.evaluation.datasets = {{}}
  return c
"""


def write_config(
  path: pathlib.Path,
  data: pathlib.Path,
  num_steps: int,
  num_workers: int = 2,
) -> pathlib.Path:
  """A config file that trains a small model on one data set of domain mine."""
  mole3 = str(ROOT / "configs" / "mole3.py")
  path.write_text(
    _CONFIG.format(
      mole3=mole3,
      data=str(data),
      num_steps=num_steps,
      num_workers=num_workers,
    )
  )
  return path


class Run:
  """A training run in a process group of its own."""

  def __init__(
    self,
    config: pathlib.Path,
    workdir: pathlib.Path,
    environment: Mapping[str, str] | None = None,
  ):
    self._shared_before = set(os.listdir("/dev/shm"))
    self._metrics = workdir / "base" / "metrics.jsonl"
    self._output = tempfile.TemporaryFile()  # noqa: SIM115
    self.process = subprocess.Popen(
      [
        sys.executable,
        "-m",
        "mole_jax.main",
        f"--config={config}",
        f"--workdir={workdir}",
      ],
      cwd=ROOT,
      env=environment,
      stdout=self._output,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )

  def last_step(self) -> int:
    """The last step with metrics."""
    return max(read_losses(self._metrics), default=0)

  def wait(self) -> None:
    """Waits for the end; RuntimeError with the output where it failed."""
    code = self.process.wait()
    if code:
      self._output.seek(0)
      raise RuntimeError(self._output.read().decode())
    self._output.close()

  def kill(self) -> None:
    """Kills all processes of the run."""
    os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()
    self._output.close()

  def processes_left(self) -> list[str]:
    """Processes of a killed run, after a few seconds at most."""
    return _left(lambda: _session(self.process.pid))

  def left(self) -> list[str]:
    """Those, and what others than this run may have put into /dev/shm."""
    shared = lambda: set(os.listdir("/dev/shm")) - self._shared_before
    return _left(lambda: [*_session(self.process.pid), *sorted(shared())])


def _left(find: Callable[[], list[str]]) -> list[str]:
  deadline = time.monotonic() + LEFT_SECONDS
  while (found := find()) and time.monotonic() < deadline:
    time.sleep(0.1)
  return found


def read_losses(path: pathlib.Path) -> dict[int, float]:
  """Step -> loss of a metrics.jsonl; a killed run may leave half a line."""
  if not path.exists():
    return {}
  rows = [json.loads(x) for x in path.read_text().splitlines() if x[-1:] == "}"]
  return {row["step"]: row["loss"] for row in rows}


def _session(number: int) -> list[str]:
  """Processes of a session that have not ended."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):  # It has ended.
      state, _, _, session = path.read_text().rsplit(")", 1)[1].split()[:4]
      if int(session) == number and state != "Z":
        found.append(f"process {path.parent.name}")
  return found


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--records", type=int, default=20_000)
  parser.add_argument("--steps", type=int, default=50)
  parser.add_argument("--kills", type=int, default=8)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--dir", type=pathlib.Path, help="of the made files")
  parser.add_argument(
    "--counted",
    action="store_true",
    help="tokens are counted once, before the first kill",
  )
  args = parser.parse_args(argv)
  with contextlib.ExitStack() as stack:
    folder = args.dir or pathlib.Path(
      stack.enter_context(tempfile.TemporaryDirectory())
    )
    return _measure(folder.resolve(), args)


def _measure(folder: pathlib.Path, args: argparse.Namespace) -> int:
  data = _build(folder, args.records)
  lengths = data / "1.0.0" / "lengths"
  config = write_config(folder / "killed.py", data, args.steps)
  workdirs = [folder / name for name in ("whole", "killed")]
  for path in (*workdirs, lengths):
    shutil.rmtree(path, ignore_errors=True)
  began = time.perf_counter()
  run = Run(config, workdirs[0])
  while not run.last_step():
    time.sleep(0.1)
  starting = time.perf_counter() - began
  run.wait()
  print(f"undisturbed: {time.perf_counter() - began:.1f} s", flush=True)
  print(f"  {starting:.1f} s of them to the first step", flush=True)
  if args.counted:
    starting = min(starting, 30.0)
  else:
    shutil.rmtree(lengths)
  rng = random.Random(args.seed)
  is_clean = True
  for number in range(args.kills):
    left = _start_and_kill(config, workdirs[1], rng, number, starting)
    is_clean &= not left
  Run(config, workdirs[1]).wait()
  whole, killed = (
    read_losses(path / "base" / "metrics.jsonl") for path in workdirs
  )
  is_same = whole == killed and len(whole) == args.steps
  print(f"losses of {len(whole)} steps bitwise the same: {is_same}")
  return 0 if is_same and is_clean else 1


def _start_and_kill(
  config: pathlib.Path,
  workdir: pathlib.Path,
  rng: random.Random,
  number: int,
  starting: float,
) -> list[str]:
  """Kills by turns before the first step, and one or more steps later."""
  run = Run(config, workdir)
  began, first = time.perf_counter(), run.last_step()
  if number % 2:
    while run.last_step() <= first and run.process.poll() is None:
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 1))
  else:
    time.sleep(rng.uniform(0, starting))
  run.kill()
  seconds, step = time.perf_counter() - began, run.last_step()
  left = run.left()
  print(
    f"killed after {seconds:.1f} s at step {step}; left: {left}", flush=True
  )
  return left


def _build(folder: pathlib.Path, count: int) -> pathlib.Path:
  """The data set of so many made records, which may be there."""
  prepare_scale.write_images(folder / "pictures")
  file = folder / f"{count}.json"
  if not file.exists():
    prepare_scale.write_json(file, count)
  out = folder / f"out{count}"
  began = time.perf_counter()
  subprocess.run(
    [
      sys.executable, "-m", "mole_jax.prepare", "build", f"--json={file}",
      f"--images={folder / 'pictures'}", "--name=mine", "--domain=mine",
      f"--out={out}",
    ],
    cwd=ROOT,
    check=True,
  )  # fmt: skip
  print(f"built in {time.perf_counter() - began:.1f} s", flush=True)
  return out / "mine"


if __name__ == "__main__":
  sys.exit(main())
