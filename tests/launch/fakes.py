"""A gcloud for PATH that plays a session, and other fake programs."""

import json
import os
import stat
import sys

GCLOUD = """#!{python}
import fcntl, json, os, pathlib, sys, time
folder = pathlib.Path({folder!r})
words = sys.argv[1:]
command = [w for w in words if w.startswith("--command=")]
verb = words[3]
if verb == "ssh" and command:
  line = command[0].partition("worker.sh; then ")[2]
  verb = line.partition("worker.sh ")[2].split(";")[0].split()[0]
if words[2] == "tpu-vm" and verb == "describe":
  verb = "node"
with (folder / "lock").open("w") as lock:
  fcntl.flock(lock, fcntl.LOCK_EX)
  with (folder / "calls").open("a") as log:
    log.write(json.dumps([verb, ["gcloud", *words]]) + "\\n")
  script = json.loads((folder / "script").read_text())
  answers = script.get(verb) or [{{}}]
  answer = answers.pop(0) if len(answers) > 1 else answers[0]
  (folder / "script").write_text(json.dumps(script))
time.sleep(answer.get("sleep", 0))
sys.stdout.write(answer.get("out", ""))
sys.stderr.write(answer.get("err", ""))
sys.exit(answer.get("code", 0))
"""


class Gcloud:
  """Answers each verb from a list, the last one for ever; logs all calls.

  Verbs are those of gcloud, `node` for `tpu-vm describe`, and those of
  worker.sh for what is run over ssh.
  """

  def __init__(self, folder):
    self.folder = folder
    self.path = folder / "bin"
    self.path.mkdir(parents=True)
    program = GCLOUD.format(python=sys.executable, folder=str(folder))
    write_program(self.path / "gcloud", program)

  def play(self, **answers):
    (self.folder / "script").write_text(json.dumps(answers))
    (self.folder / "calls").write_text("")

  @property
  def calls(self):
    lines = (self.folder / "calls").read_text().splitlines()
    return [json.loads(line) for line in lines]

  @property
  def verbs(self):
    return [verb for verb, _ in self.calls]


def write_program(path, text):
  path.write_text(text)
  path.chmod(path.stat().st_mode | stat.S_IXUSR)


def path_with(folder):
  return f"{folder}{os.pathsep}{os.environ['PATH']}"


def queue(state, **more):
  """An answer of describe."""
  return {"out": json.dumps({"name": "q", "state": {"state": state, **more}})}


def missing():
  """What gcloud says of a resource that is not there."""
  return {
    "err": "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: "
    "Resource 'projects/p/locations/z/queuedResources/q' was not found\n",
    "code": 1,
  }


def workers(*states):
  """An answer over ssh, among what else gcloud prints."""
  lines = [f"mole-worker t1v-w-{i} {s}" for i, s in enumerate(states)]
  return {"out": "\n".join(["Welcome", *lines, ""]), "err": "Using ssh batch\n"}
