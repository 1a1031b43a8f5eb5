"""The command line as a user meets it, with a fake gcloud on PATH."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from launch import tpu
from tests.launch import fakes
from tests.launch.fakes import queue, workers

ROOT = pathlib.Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHERE = ["mole3", "--zone=us-west4-a", "--project=my-project"]
MACHINE = [
  *WHERE,
  "--type=v5litepod-16",
  f"--git=https://example.com/me/mole_jax@{COMMIT}",
  "--spot",
]
COMMAND = ["--", "python", "-m", "mole_jax.main", "--workdir=runs/it's mine"]
MOUNT = "--mount=nfs:host:/x"


@pytest.fixture
def fake(tmp_path, monkeypatch):
  made = fakes.Gcloud(tmp_path / "fake")
  monkeypatch.setenv("PATH", fakes.path_with(made.path))
  monkeypatch.chdir(tmp_path)
  made.play()
  return made


def call(*argv):
  return tpu.main([*argv])


VERBS = {
  "create": MACHINE,
  "status": WHERE,
  "logs": WHERE,
  "ssh": WHERE,
  "run": [*WHERE, *COMMAND],
  "babysit": [*MACHINE, MOUNT, *COMMAND],
  "delete": WHERE,
}


@pytest.mark.parametrize("verb, argv", VERBS.items())
def test_a_dry_run_prints_commands_and_runs_none(fake, capsys, verb, argv):
  assert call(verb, argv[0], "--dry-run", *argv[1:]) == 0
  printed = capsys.readouterr().out.splitlines()
  commands = [shlex.split(line) for line in printed if line[:6] == "gcloud"]
  assert commands
  assert fake.calls == []
  # What is printed is what would be run.
  fake.play(describe=[queue("ACTIVE")], state=[workers(*["exited 0"] * 4)])
  assert call(verb, *argv) == 0
  assert fake.calls
  for _, argv in fake.calls:
    without = [word for word in argv if word != "--async"]
    assert argv in commands or [*without, "--async"] in commands


def test_the_startup_script_is_written_where_the_command_says(fake, capsys):
  assert call("create", *MACHINE, *COMMAND) == 0
  ((verb, argv),) = fake.calls
  (word,) = [w for w in argv if w.startswith("--metadata-from-file=")]
  text = pathlib.Path(word.split("=", 2)[2]).read_text()
  assert "'--workdir=runs/it'\"'\"'s mine'" in text
  assert "python -m launch.tpu delete mole3" in capsys.readouterr().out


def test_secrets_stand_on_no_command_line_and_in_no_metadata(fake, capsys):
  secret = "--secret=HF_TOKEN=hf-token"
  assert call("create", *MACHINE, secret, *COMMAND) == 0
  (script,) = pathlib.Path("runs/launch").iterdir()
  assert "HF_TOKEN=hf-token" in script.read_text()
  for argv in (
    ["create", *MACHINE, "--", "env", "HF_TOKEN=abc"],
    ["run", *WHERE, "--", "x", "--api_key=abc"],
    ["create", *MACHINE, "--labels=token=abc"],
    ["babysit", *MACHINE, MOUNT, "--", "x", "hf_abcabcabcabcabcabcabcabc"],
  ):
    fake.play()
    assert call(*argv) == 2
    assert fake.calls == []
    assert "abc" not in capsys.readouterr().err


@pytest.mark.parametrize(
  "argv, message",
  [
    (["run", *WHERE], "give the command after --"),
    (["babysit", *MACHINE, *COMMAND], "give --mount"),
    (["delete", *WHERE, "--", "x"], "takes no command"),
    (["create", *MACHINE, "--type=v5p-100"], "v5p-128 counts TensorCores"),
    (["create", *MACHINE, "--lock=nowhere"], "python -m launch.lock"),
    (["create", *MACHINE, "--type=tpu7x:2x2x2"], "python -m launch.gke"),
    (["ssh", *WHERE, "--slice=1"], "there are 1"),
  ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(fake, capsys, argv, message):
  assert call(*argv) == 2
  error = capsys.readouterr().err
  assert message in error and len(error.splitlines()) == 1
  assert fake.calls == []


def test_what_gcloud_refuses_is_exit_code_1(fake):
  fake.play(delete=[{"code": 1}], describe=[{"code": 1, "err": "no"}])
  assert call("delete", *WHERE) == 1
  assert call("status", *WHERE) == 1


def test_a_name_counts_what_the_command_says(fake, capsys):
  assert call("create", *MACHINE, "--type=v5p-64", "--dry-run") == 0
  out = capsys.readouterr().out
  assert "v5p:2x4x4 (v5p-64 counts TensorCores): 32 chips on 8 host(s)" in out
  assert call("create", *MACHINE, "--type=v5p:4x4x4", "--dry-run") == 0
  assert "--accelerator-type=v5p-128" in capsys.readouterr().out


def test_a_finished_run_is_deleted_unless_its_results_go_with_it(fake, capsys):
  play = dict(describe=[queue("ACTIVE")], state=[workers(*["exited 0"] * 4)])
  for more, is_deleted in (
    ([MOUNT], True),
    ([MOUNT, "--keep"], False),
    (["--mount=none"], False),
  ):
    fake.play(**play)
    assert call("babysit", *MACHINE, *more, *COMMAND) == 0
    assert ("delete" in fake.verbs) is is_deleted


def test_giving_up_leaves_all_and_says_how_to_delete(fake, capsys):
  fake.play(describe=[queue("ACTIVE")], state=[workers(*["exited 2 no"] * 4)])
  assert call("babysit", *MACHINE, MOUNT, *COMMAND) == 1
  out, error = capsys.readouterr()
  assert "python -m launch.tpu delete mole3 --zone us-west4-a" in out
  assert "exit code 2 (t1v-w-0: no)" in error
  assert "delete" not in fake.verbs


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_stopped_leaves_the_tpu_and_says_so(fake, number):
  fake.play(describe=[queue("WAITING_FOR_RESOURCES")])
  process = subprocess.Popen(
    [sys.executable, "-m", "launch.tpu", "babysit", *MACHINE, MOUNT, *COMMAND],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  deadline = time.monotonic() + 20
  while not fake.calls and time.monotonic() < deadline:
    time.sleep(0.02)
  line = process.stdout.readline() + process.stdout.readline()
  assert "WAITING_FOR_RESOURCES -> wait" in line
  process.send_signal(number)
  out, error = process.communicate(timeout=20)
  assert process.returncode == 128 + number
  assert "mole3 is as it was, and costs" in out
  assert "python -m launch.tpu delete mole3 --zone us-west4-a" in out
  assert "Traceback" not in error
  assert set(fake.verbs) == {"describe"}


def test_it_runs_with_the_standard_library_alone(tmp_path):
  for module in ("tpu", "gke", "lock"):
    done = subprocess.run(
      [sys.executable, "-S", "-m", f"launch.{module}", "--help"],
      cwd=ROOT,
      env={"PATH": os.environ["PATH"]},
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stderr
