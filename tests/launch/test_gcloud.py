"""The gcloud commands, word by word, and what is made of the answers."""

import os
import subprocess

import pytest

from launch import gcloud
from mole_jax.parallel import accelerators
from tests.launch import fakes

ONE = gcloud.Target("mole3", "us-west4-a", "my-project")
TWO = gcloud.Target("mole3", "us-east5-b", slices=2)
V5E, V5P = (accelerators.find(name) for name in ("v5e:4x4", "v5p:4x4x4"))

GOLDEN = [
  (
    gcloud.create(ONE, V5E, "runs/launch/mole3.sh", options=["--spot"]),
    "gcloud compute tpus queued-resources create mole3 --zone=us-west4-a "
    "--project=my-project --quiet --accelerator-type=v5litepod-16 "
    "--runtime-version=v2-alpha-tpuv5-lite --node-id=mole3 "
    "--metadata-from-file=startup-script=runs/launch/mole3.sh --spot",
  ),
  (
    gcloud.create(TWO, V5P, "s.sh"),
    "gcloud compute tpus queued-resources create mole3 --zone=us-east5-b "
    "--quiet --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 "
    "--node-count=2 --node-prefix=mole3 "
    "--metadata-from-file=startup-script=s.sh",
  ),
  (
    gcloud.describe(ONE),
    "gcloud compute tpus queued-resources describe mole3 --zone=us-west4-a "
    "--project=my-project --quiet --format=json",
  ),
  (
    gcloud.delete(ONE, is_async=True),
    "gcloud compute tpus queued-resources delete mole3 --zone=us-west4-a "
    "--project=my-project --quiet --force --async",
  ),
  (
    gcloud.delete(TWO),
    "gcloud compute tpus queued-resources delete mole3 --zone=us-east5-b "
    "--quiet --force",
  ),
  (
    gcloud.describe_node(TWO, "mole3-1"),
    "gcloud compute tpus tpu-vm describe mole3-1 --zone=us-east5-b --quiet "
    "--format=value(state)",
  ),
  (
    gcloud.log_in(ONE, "mole3", "3"),
    "gcloud compute tpus tpu-vm ssh mole3 --zone=us-west4-a "
    "--project=my-project --worker=3",
  ),
]


@pytest.mark.parametrize("argv, golden", GOLDEN, ids=lambda v: str(v)[:50])
def test_commands_are_flat_lists_of_these_words(argv, golden):
  assert argv == golden.split()


def test_a_command_reaches_the_worker_as_it_was_typed(tmp_path):
  words = ["start", "python", "it's", 'a "b"', "$HOME", "a  b", "*", ""]
  argv = gcloud.on_workers(ONE, "mole3", words)
  head = "gcloud compute tpus tpu-vm ssh mole3 --zone=us-west4-a"
  assert argv[:-1] == [*head.split(), "--project=my-project", "--quiet"] + [
    "--worker=all"
  ]
  # gcloud splits the line at spaces and ssh joins it; then a shell reads it.
  line = " ".join(argv[-1].removeprefix("--command=").split(" "))
  fakes.write_program(
    tmp_path / "sudo",
    '#!/bin/sh\n[ "$1" = test ] && exit 0\nprintf "<%s>\\n" "$@"\n',
  )
  done = subprocess.run(
    ["sh", "-c", line],
    env=os.environ | {"PATH": fakes.path_with(tmp_path)},
    capture_output=True,
    text=True,
    check=True,
  )
  expected = ["bash", "/opt/mole_jax/worker.sh", *words]
  assert done.stdout == "".join(f"<{word}>\n" for word in expected)


@pytest.mark.parametrize(
  "name", ["", "Mole", "a b", "a;b", "-a", "a-", "a" * 59]
)
def test_names_that_google_refuses_are_refused_here(name):
  with pytest.raises(ValueError, match="name .*wanted"):
    gcloud.Target(name, "us-west4-a")


def test_other_wrong_places():
  with pytest.raises(ValueError, match="--zone 'us west'"):
    gcloud.Target("a", "us west")
  with pytest.raises(ValueError, match="--slices 0"):
    gcloud.Target("a", "us-west4-a", slices=0)
  with pytest.raises(ValueError, match="has a comma"):
    gcloud.create(ONE, V5E, "a,b.sh")
  for name in ("tpu7x:2x2x2", "h100:8"):
    with pytest.raises(ValueError, match="no queued resources"):
      gcloud.create(ONE, accelerators.find(name), "s.sh")


def error(text):
  return gcloud.GcloudError(["gcloud"], 1, text)


def test_errors_are_told_apart():
  assert error("NOT_FOUND: Resource 'x' was not found").is_missing
  assert error("ALREADY_EXISTS: Resource 'x' already exists").is_there_already
  for text in (
    "PERMISSION_DENIED: no",
    "You do not currently have an active account selected.",
    "There was a problem refreshing your current auth tokens",
    "unrecognized arguments: --x",
  ):
    assert error(text).is_hopeless
  for text in (
    "UNAVAILABLE: try again",
    "no answer within 300 s",
    "RESOURCE_EXHAUSTED: quota",
    "user@1.2.3.4: Permission denied (publickey).",
  ):
    assert not error(text).is_hopeless


def test_a_failure_tells_what_gcloud_complained_of(tmp_path, monkeypatch):
  fake = fakes.Gcloud(tmp_path)
  monkeypatch.setenv("PATH", fakes.path_with(fake.path))
  fake.play(
    describe=[{"err": "Waiting...\nERROR: (gcloud) UNAVAILABLE\n", "code": 1}]
  )
  with pytest.raises(gcloud.GcloudError) as caught:
    gcloud.run(gcloud.describe(ONE))
  assert caught.value.text == "ERROR: (gcloud) UNAVAILABLE"


def test_a_slow_answer_is_not_waited_for(tmp_path, monkeypatch):
  fake = fakes.Gcloud(tmp_path)
  monkeypatch.setenv("PATH", fakes.path_with(fake.path))
  fake.play(describe=[{"sleep": 60}])
  with pytest.raises(gcloud.GcloudError, match="no answer within 0.5 s"):
    gcloud.run(gcloud.describe(ONE), seconds=0.5)


def test_without_gcloud_the_message_says_so(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(gcloud.GcloudError, match="not installed") as caught:
    gcloud.run(gcloud.describe(ONE))
  assert caught.value.is_hopeless


def test_states_come_with_their_reason():
  failed = {"error": {"code": 8, "message": "no capacity"}}
  answer = fakes.queue("FAILED", failedData=failed, stateInitiator="SERVICE")
  assert gcloud.read_state(ONE, lambda argv: answer["out"]) == (
    "FAILED",
    "no capacity, SERVICE",
  )

  def no(argv):
    raise error(fakes.missing()["err"])

  assert gcloud.read_state(ONE, no) == (gcloud.MISSING, "")
  with pytest.raises(gcloud.GcloudError, match="cannot be understood: 'oops"):
    gcloud.read_state(ONE, lambda argv: "oops")
