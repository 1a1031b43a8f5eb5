"""SLURM's script with fake srun and scontrol, and SkyPilot's file."""

import os
import pathlib
import re
import subprocess

import jsonschema
import pytest
import yaml

from launch import decisions
from tests.launch import fakes
from tests.launch.test_gke import closed
from tests.launch.test_worker import check_shell

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SBATCH = LAUNCH / "train.sbatch"


def submit(tmp_path, code, *argv, **env):
  """Runs the batch script where srun ends with `code`."""
  calls = tmp_path / "calls"
  calls.write_text("")
  fakes.write_program(
    tmp_path / "srun",
    f'#!/bin/sh\nprintf "<%s>" "$@" >> {calls}\n'
    f'echo "$HF_TOKEN" > {tmp_path}/token\nexit {code}\n',
  )
  fakes.write_program(
    tmp_path / "scontrol", f'#!/bin/sh\necho "scontrol $*" >> {calls}\n'
  )
  done = subprocess.run(
    ["bash", str(SBATCH), *argv],
    env=os.environ
    | {"PATH": fakes.path_with(tmp_path), "SLURM_JOB_ID": "42"}
    | env,
    capture_output=True,
    text=True,
    check=False,
  )
  return done, calls.read_text()


@pytest.mark.parametrize("script", ["train.sbatch", "worker.sh"])
def test_scripts_are_clean(script):
  check_shell(LAUNCH / script)


def test_arguments_reach_every_process_as_they_are(tmp_path):
  words = ["--config=c.py:7b", '--workdir=runs/it\'s "mine" $HOME']
  done, calls = submit(tmp_path, 0, *words)
  assert done.returncode == 0
  assert calls == (
    "<--kill-on-bad-exit=1><.venv/bin/python><-m><mole_jax.main>"
    + "".join(f"<{word}>" for word in words)
  )


@pytest.mark.parametrize("code", sorted(decisions.RESUME_CODES))
def test_interrupted_goes_back_into_the_queue(tmp_path, code):
  done, calls = submit(tmp_path, code, "--x")
  assert done.returncode == 0
  assert calls.endswith("scontrol requeue 42\n")
  done, calls = submit(
    tmp_path, code, "--x", SLURM_RESTART_COUNT="3", MOLE_MAX_RESUMES="3"
  )
  assert done.returncode == code
  assert "scontrol" not in calls


@pytest.mark.parametrize("code", [1, 2, 134, 137])
def test_failed_does_not(tmp_path, code):
  done, calls = submit(tmp_path, code, "--x")
  assert done.returncode == code
  assert "scontrol" not in calls


def test_processes_are_told_before_the_time_is_up():
  text = SBATCH.read_text()
  settings = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, re.M))
  # Without B: it goes to the processes, not to this script.
  assert settings["signal"] == "TERM@120"
  assert {"requeue", "gpus-per-node"} <= set(settings)
  assert settings["ntasks-per-node"] == "1"


def test_secrets_come_from_a_file_that_others_cannot_read(tmp_path):
  env = tmp_path / "env"
  env.write_text("HF_TOKEN=abc\n")
  env.chmod(0o644)
  done, calls = submit(tmp_path, 0, "--x", MOLE_ENV=str(env))
  assert done.returncode == 2 and "chmod 600" in done.stderr
  env.chmod(0o600)
  done, calls = submit(tmp_path, 0, "--x", MOLE_ENV=str(env))
  assert done.returncode == 0 and "abc" not in calls
  assert (tmp_path / "token").read_text() == "abc\n"


def test_without_arguments_it_says_how(tmp_path):
  done, calls = submit(tmp_path, 0)
  assert done.returncode == 2 and "usage: sbatch" in done.stderr
  assert not calls


STRING, NUMBER = {"type": "string"}, {"type": "integer", "minimum": 0}
# The fields of a SkyPilot task that we use; its own schema is not copied.
SKY = closed(
  ["name", "resources", "run"],
  name={"type": "string", "pattern": "^[a-z][a-z0-9-]*$"},
  resources=closed(
    ["accelerators"],
    accelerators={
      "type": "object",
      "maxProperties": 1,
      "additionalProperties": {"type": "number"},
    },
    use_spot={"type": "boolean"},
    disk_size=NUMBER,
    job_recovery=closed(
      max_restarts_on_errors=NUMBER,
      recover_on_exit_codes={
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 255},
        "uniqueItems": True,
      },
    ),
  ),
  num_nodes={"type": "integer", "minimum": 1},
  workdir=STRING,
  envs={
    "type": "object",
    "additionalProperties": {"type": ["string", "null"]},
  },
  secrets={"type": "object", "additionalProperties": {"const": ""}},
  file_mounts={
    "type": "object",
    "additionalProperties": closed(
      ["source"],
      source=STRING,
      mode={"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]},
    ),
  },
  setup=STRING,
  run=STRING,
)


def test_the_sky_file_fits_its_schema_and_recovers_on_our_codes(tmp_path):
  task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
  jsonschema.validate(task, SKY)
  codes = task["resources"]["job_recovery"]["recover_on_exit_codes"]
  assert set(codes) == decisions.RESUME_CODES
  for part in ("setup", "run"):
    path = tmp_path / part
    path.write_text(f"#!/usr/bin/env bash\n{task[part]}")
    check_shell(path)


def test_the_codes_are_those_that_main_documents():
  main = (LAUNCH.parent / "mole_jax" / "main.py").read_text()
  text = " ".join(main.split('"""')[1].split())
  assert "2 wrong usage or configuration; 130 or 143 interrupted" in text
  assert sorted(decisions.RESUME_CODES) == [130, 143]
  assert decisions.USAGE_CODE == 2
