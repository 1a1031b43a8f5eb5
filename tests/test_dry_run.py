"""The command as a user types it; what it finds is tested in compiled/."""

import json
import subprocess
import sys

import pytest

from mole_jax import dry_run
from tests import test_main

ARGS = ["--config=configs/mole3.py", *test_main.SMALL]


def run(*args):
  # Fake devices are its own business.
  environment = test_main.environment()
  environment.pop("XLA_FLAGS")
  return subprocess.run(
    [sys.executable, "-m", "mole_jax.dry_run", *ARGS, *args],
    cwd=test_main.ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )


def test_it_prints_json_of_fake_devices_and_tables_beside_it(tmp_path):
  file = tmp_path / "step.txt"
  done = run(
    "--topology=cpu:16",
    "--mesh=data=2,fsdp=8",
    "--config.stages.mole.batch_size=16",
    "--json",
    f"--hlo={file}",
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found["mesh"] == dict(data=2, fsdp=8, expert=1, tensor=1)
  assert found["topology"] == "cpu:16"
  for word in ("Memory", "Collectives", "all-gather", "4N formula", "Sound"):
    assert word in done.stderr
  assert "ENTRY" in file.read_text()


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--topology=v9:1"], "v5p:4x4x4"),
    (["--topology=cpu:8", "--mesh=fsdp=3"], "does not fill 8 device"),
    (["--topology=cpu:8", "--mesh=rows=8"], "axes are data, fsdp"),
    (["--topology=cpu:8", "--stage=mol"], "the config has base, mole"),
    (["--topology=cpu:8"], r"batch_size=2 must be divisible by the 8"),
    ([], "--topology=NAME are needed"),
  ],
)
def test_mistakes_are_told(args, message):
  done = run(*args)
  assert done.returncode == 2
  assert message in done.stderr
  assert "Traceback" not in done.stderr


def test_a_mesh_is_read():
  assert dry_run.parse_mesh("data=4,fsdp=16") == dict(
    data=4, fsdp=16, expert=1, tensor=1
  )


def compile_for(topology, *args):
  """JSON of a small step on a machine that is not there."""
  done = run(f"--topology={topology}", "--json", *args)
  assert done.stdout, done.stderr
  return json.loads(done.stdout)


@pytest.mark.tpu
def test_a_tpu_gathers_weights_and_keeps_rows_apart():
  found = compile_for(
    "v5p:2x2x1",
    "--config.stages.mole.batch_size=4",
    "--config.model.dtype=bfloat16",
    "--config.base.dtype=bfloat16",
    "--config.model.remat=named",
  )
  assert found["fits"] and found["findings"] == []
  assert found["compiler_cycles"] > 0
  assert found["step_seconds"] > 0
  kinds = {one["kind"] for one in found["collectives"]}
  assert "all-gather" in kinds or "collective-permute" in kinds


@pytest.mark.tpu
def test_what_no_chip_holds_is_refused_with_advice():
  done = run(
    "--topology=v5e:1x1",
    "--config.stages.mole.batch_size=64",
    "--config.stages.mole.max_length=4096",
    "--config.model.decoder.hidden_size=2048",
  )
  assert done.returncode == 1
  assert "Does not fit" in done.stdout
  assert "batch_size: " in done.stdout
