"""Two processes with one device each train as one process does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from mole_jax.parallel import processes
from tests import conftest, test_main

NUM_STEPS = 60
SETTINGS = [
  *test_main.SMALL,
  "--config.stage_names=('base',)",
  "--config.stages.base.batch_size=4",
  f"--config.stages.base.num_steps={NUM_STEPS}",
  "--config.stages.base.checkpoint_every=1000",
  "--config.stages.base.log_every=1",
]
NO_EVALUATION = "--config.evaluation.datasets={}"
ADAPTERS = [
  "--config.stage_names=('mole',)",
  "--config.stages.mole.batch_size=4",
  "--config.stages.mole.num_steps=6",
  "--config.stages.mole.log_every=1",
]


def free_port():
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def start(workdir, *args, num_processes=1):
  """The command in one process or several."""
  command = test_main.command(f"--workdir={workdir}", *SETTINGS, *args)
  return start_command(command, num_processes)


def start_command(command, num_processes, **variables):
  """Any command in as many processes, with one device each."""
  address = f"127.0.0.1:{free_port()}"
  started = []
  for index in range(num_processes):
    environment = os.environ | {"XLA_FLAGS": " ".join(conftest.FLAGS)}
    if num_processes > 1:
      values = (address, str(num_processes), str(index))
      environment |= dict(zip(processes.EXPLICIT, values, strict=True))
    started.append(
      subprocess.Popen(
        command,
        cwd=test_main.ROOT,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  return started


def wait_for_steps(started, workdir, count=2):
  """Returns once some are logged; fails if a process ends before."""
  metrics = workdir / "base" / "metrics.jsonl"
  deadline = time.time() + 240
  while not (metrics.exists() and metrics.read_text().count("\n") >= count):
    assert all(p.poll() is None for p in started), finish(started)
    assert time.time() < deadline
    time.sleep(0.005)


def finish(started):
  """Exit codes and what each printed."""
  outputs = [process.communicate(timeout=300) for process in started]
  return [process.returncode for process in started], outputs


def losses(workdir, stage="base"):
  lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
  return {row["step"]: row["loss"] for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  """The run of one process."""
  workdir = tmp_path_factory.mktemp("one") / "run"
  codes, outputs = finish(start(workdir, NO_EVALUATION))
  assert codes == [0], outputs
  return workdir


def test_two_processes_stop_together_and_one_goes_on(one, tmp_path):
  workdir = tmp_path / "run"
  started = start(workdir, NO_EVALUATION, num_processes=2)
  wait_for_steps(started, workdir)
  # The one that does not print is told; both save the same step.
  started[1].send_signal(signal.SIGTERM)
  codes, ((first, _), (second, _)) = finish(started)
  assert codes == [128 + signal.SIGTERM] * 2
  assert "of 2 processes" in first
  assert "saved step" in first
  assert not second.replace("[Gloo]", "").startswith("mole3")
  saved = max(losses(workdir))
  assert 2 <= saved < NUM_STEPS
  # Another number of processes, and of devices, goes on.
  codes, outputs = finish(start(workdir, NO_EVALUATION))
  assert codes == [0], outputs
  alone, together = losses(one), losses(workdir)
  assert together.keys() == alone.keys()
  for step, loss in alone.items():
    assert together[step] == pytest.approx(loss, rel=1e-6), step


def test_what_is_wrong_ends_both_and_is_said_once(tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "config.json").write_text('{"name": "another"}')
  codes, outputs = finish(start(workdir, num_processes=2))
  assert codes == [2, 2], outputs
  errors = [error for _, error in outputs]
  assert "holds a run of another config" in errors[0]
  assert "holds a run of another config" not in errors[1]


def test_when_one_is_killed_the_other_ends_and_says_why(tmp_path):
  workdir = tmp_path / "run"
  started = start(
    workdir, "--config.stages.base.num_steps=100000", num_processes=2
  )
  wait_for_steps(started, workdir)
  started[1].kill()
  began = time.time()
  codes, ((_, error), _) = finish(started)
  assert time.time() - began < 45
  assert codes[1] == -signal.SIGKILL
  # In a computation that both share, or before by the coordinator.
  assert codes[0] in (1, -signal.SIGABRT), error
  if codes[0] == 1:
    last = error.splitlines()[-1]
    assert last.startswith("error: process 0 of 2 cannot go on; if no reason")
    assert last.endswith("the same command, in all processes, resumes.")
  else:
    assert "another task died" in error


def test_two_processes_train_on_features_that_one_of_them_made(one, tmp_path):
  args = [*ADAPTERS, f"--config.base.path={one / 'base'}"]
  found = {}
  for setting in ("none", "cached"):
    workdir = tmp_path / setting
    features = f"--config.data.features={setting}"
    codes, ((out, error), (second, _)) = finish(
      start(workdir, *args, features, num_processes=2)
    )
    assert codes == [0, 0], out + error
    found[setting] = losses(workdir, "mole")
    assert ("reads cached features" in out) == (setting == "cached")
    says = (
      "a run of several processes is evaluated on one machine: python -m "
      f"mole_jax.evaluate --ckpt {workdir}"
    )
    assert says in out.splitlines()
    assert "evaluate" not in second
    assert (workdir / "report" / "index.html").exists()
  for folder in (workdir / "features").iterdir():
    names = {path.name for path in folder.iterdir()}
    assert names == {
      "about.json", "first.npy", "part-00000.npy", "part-00000.bad.npy"
    }  # fmt: skip
  assert found["cached"].keys() == found["none"].keys()
  for step, loss in found["none"].items():
    assert found["cached"][step] == pytest.approx(loss, rel=1e-6), step


# What the loop does, with a step that takes no time to compile.
HANGS = """
import ctypes, sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from mole_jax.parallel import processes

def next_batch(number):
  if number == 3 and jax.process_index() == 1:
    {hang}

processes.start()
try:
  with processes.Watchdog() as watchdog:
    for number in range(10**6):
      watchdog.still_alive()
      next_batch(number)
      multihost_utils.process_allgather(np.int32(number))
except jax.errors.JaxRuntimeError as error:
  processes.end_after(error)
"""


@pytest.mark.parametrize(
  "hang",
  ["time.sleep(600)", "ctypes.PyDLL(None).sleep(600)"],
  ids=["in Python", "in C, where no other thread of Python can run"],
)
def test_when_one_hangs_all_end_and_say_where(tmp_path, hang):
  script = tmp_path / "hangs.py"
  script.write_text(HANGS.format(hang=hang))
  started = start_command(
    [sys.executable, str(script)],
    num_processes=2,
    PYTHONPATH=str(test_main.ROOT),
    MOLE_HANG_SECONDS="8",
  )
  began = time.time()
  codes, ((_, waiting), (_, hanging)) = finish(started)
  assert time.time() - began < 120
  # The other one hangs in its turn, or is ended by the coordinator.
  assert codes[1] == 1 and codes[0] in (1, -signal.SIGABRT), waiting
  assert "in next_batch" in hanging and str(script) in hanging
  if "time" in hang:
    assert hanging.splitlines()[-1].startswith(
      "error: process 1 of 2 has done no step for 8 s (MOLE_HANG_SECONDS)"
    )
  else:
    assert "Timeout (0:00:13)!" in hanging


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", ""])
def test_a_time_to_hang_that_is_none_is_refused(value):
  with pytest.raises(ValueError, match="MOLE_HANG_SECONDS=.*wanted seconds"):
    processes.start({processes.HANG_VARIABLE: value})


def test_half_of_the_variables_is_an_error():
  environment = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}
  with pytest.raises(ValueError, match="without JAX_NUM_PROCESSES, JAX_PROC"):
    processes.start(environment)


def test_a_laptop_is_no_cluster():
  assert processes.start({}) is False
  assert processes.start({"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"}) is False
