"""A run on a data set of one's own is killed, and nobody can tell afterwards.

tests/benchmarks/kill_and_resume.py does it at scale, again and again.
"""

import functools
import json
import os
import time

import pytest

from mole_jax.data.builders.prepared.build import build
from tests import conftest
from tests.benchmarks import kill_and_resume
from tests.data.builders import prepared_input

NUM_STEPS = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """A config that trains on a data set of 40 records, with a worker."""
  folder = tmp_path_factory.mktemp("own")
  file, pictures, _ = prepared_input.sample_input(folder, count=40)
  build(file, pictures, name="mine", out=folder / "data")
  return kill_and_resume.write_config(
    folder / "own.py", folder / "data" / "mine", NUM_STEPS, num_workers=1
  )


def test_a_killed_run_leaves_nothing_and_goes_on_bitwise(config, tmp_path):
  # One device, as on a laptop.
  environment = os.environ | {"XLA_FLAGS": " ".join(conftest.FLAGS)}
  start = functools.partial(
    kill_and_resume.Run, config, environment=environment
  )
  whole = start(tmp_path / "whole")
  whole.wait()
  killed = start(tmp_path / "killed")
  # Behind the first checkpoint, ahead of the second.
  while killed.last_step() < 7 and killed.process.poll() is None:
    time.sleep(0.005)
  killed.kill()
  assert killed.last_step() < NUM_STEPS
  assert not killed.processes_left()
  again = start(tmp_path / "killed")
  again.wait()
  losses = [
    kill_and_resume.read_losses(tmp_path / name / "base" / "metrics.jsonl")
    for name in ("whole", "killed")
  ]
  assert losses[0] == losses[1]
  assert sorted(losses[0]) == list(range(1, NUM_STEPS + 1))
  assert len(set(losses[0].values())) == NUM_STEPS
  hashes = [
    json.loads((tmp_path / name / "base" / "base.json").read_text())["sha256"]
    for name in ("whole", "killed")
  ]
  assert hashes[0] == hashes[1]
