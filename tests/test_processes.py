"""Two processes with one device each train as one process does."""

import json
import os
import signal
import socket
import subprocess
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
  "--config.evaluation.datasets={}",
]


def free_port():
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def start(workdir, *args, num_processes=1):
  """The command in one process or several; each is a leader of its group."""
  address = f"127.0.0.1:{free_port()}"
  started = []
  for index in range(num_processes):
    environment = os.environ | {"XLA_FLAGS": " ".join(conftest.FLAGS)}
    if num_processes > 1:
      values = (address, str(num_processes), str(index))
      environment |= dict(zip(processes.EXPLICIT, values, strict=True))
    started.append(
      subprocess.Popen(
        test_main.command(f"--workdir={workdir}", *SETTINGS, *args),
        cwd=test_main.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  return started


def finish(started):
  """Exit codes and what each printed."""
  outputs = [process.communicate(timeout=300) for process in started]
  return [process.returncode for process in started], outputs


def losses(workdir):
  lines = (workdir / "base" / "metrics.jsonl").read_text().splitlines()
  return {row["step"]: row["loss"] for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  """Losses of one process."""
  workdir = tmp_path_factory.mktemp("one") / "run"
  codes, outputs = finish(start(workdir))
  assert codes == [0], outputs
  return losses(workdir)


def test_two_processes_stop_together_and_one_goes_on(one, tmp_path):
  workdir = tmp_path / "run"
  started = start(workdir, num_processes=2)
  metrics = workdir / "base" / "metrics.jsonl"
  deadline = time.time() + 240
  while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
    assert all(p.poll() is None for p in started), finish(started)
    assert time.time() < deadline
    time.sleep(0.005)
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
  codes, outputs = finish(start(workdir))
  assert codes == [0], outputs
  together = losses(workdir)
  assert together.keys() == one.keys()
  for step, loss in one.items():
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


def test_half_of_the_variables_is_an_error():
  environment = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}
  with pytest.raises(ValueError, match="without JAX_NUM_PROCESSES, JAX_PROC"):
    processes.start(environment)


def test_a_laptop_is_no_cluster():
  assert processes.start({}) is False
  assert processes.start({"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"}) is False
