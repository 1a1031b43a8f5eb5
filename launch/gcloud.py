"""The gcloud commands of a queued resource, and what comes of them.

Every command is a flat list of strings, run without a shell, and of gcloud's
general release (`--best-effort` and `--max-run-duration` are alpha).
"""

import dataclasses
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from launch import worker
from mole_jax.parallel import accelerators

SECONDS = 300  # Longest wait for an answer of gcloud.
MISSING = "MISSING"  # The state of a queued resource that there is none of.

# What is certain not to go away by itself.
_HOPELESS = re.compile(
  r"PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|unrecognized arguments"
  r"|active account|Reauthentication|refreshing your current auth"
  r"|required property \[project\]|must be specified"
)
_NOT_FOUND = re.compile(r"NOT_FOUND|was not found|HTTPError 404")
_EXISTS = re.compile(r"ALREADY_EXISTS|already exists|HTTPError 409")


class GcloudError(RuntimeError):
  """A command failed; `is_hopeless` where trying again cannot help."""

  def __init__(
    self, argv: Sequence[str], code: int, text: str, printed: str = ""
  ):
    self.text = text
    self.printed = printed  # By the workers that did answer, say.
    self.is_missing = bool(_NOT_FOUND.search(text))
    self.is_there_already = bool(_EXISTS.search(text))
    self.is_hopeless = code == 127 or bool(_HOPELESS.search(text))
    super().__init__(f"{shlex.join(argv[:6])} ...: {text}")


@dataclasses.dataclass(frozen=True)
class Target:
  """A queued resource: where it is, and of how many slices."""

  name: str
  zone: str
  project: str = ""
  slices: int = 1

  def __post_init__(self):
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,56}[a-z0-9])?", self.name):
      raise ValueError(
        f"name {self.name!r}: wanted 1 to 58 of a-z, 0-9 and -, beginning with "
        "a letter and not ending with -, for example mole3-v5e."
      )
    if not re.fullmatch(r"[a-z]+-[a-z0-9]+-[a-z]", self.zone):
      raise ValueError(f"--zone {self.zone!r}: wanted one like us-west4-a.")
    if not re.fullmatch(r"[a-z0-9.:-]*", self.project):
      raise ValueError(f"--project {self.project!r} is no project's id.")
    if self.slices < 1:
      raise ValueError(f"--slices {self.slices}: wanted 1 or more.")

  @property
  def nodes(self) -> tuple[str, ...]:
    """Names of the TPU VMs: gcloud numbers those of several slices."""
    if self.slices == 1:
      return (self.name,)
    return tuple(f"{self.name}-{i}" for i in range(self.slices))

  def flags(self) -> list[str]:
    project = [f"--project={self.project}"] if self.project else []
    return [f"--zone={self.zone}", *project]


def create(
  target: Target,
  accelerator: accelerators.Accelerator,
  startup_script: str,
  *,
  options: Sequence[str] = (),
) -> list[str]:
  """Asks for the machines. ValueError where the API does not have them."""
  if not accelerator.gcloud_name:
    raise ValueError(
      f"{accelerator.name} has no queued resources; start it on GKE: "
      "python -m launch.gke jobset --help"
    )
  if "," in startup_script or "=" in startup_script:
    raise ValueError(
      f"the path {startup_script!r} has a comma or =, which gcloud takes for a "
      "separator; run this elsewhere."
    )
  nodes = (
    [f"--node-id={target.name}"]
    if target.slices == 1
    else [f"--node-count={target.slices}", f"--node-prefix={target.name}"]
  )
  return [
    *_queued("create", target),
    f"--accelerator-type={accelerator.gcloud_name}",
    f"--runtime-version={accelerator.chip.runtime_version}",
    *nodes,
    f"--metadata-from-file=startup-script={startup_script}",
    *options,
  ]


def describe(target: Target) -> list[str]:
  return [*_queued("describe", target), "--format=json"]


def delete(target: Target, *, is_async: bool = False) -> list[str]:
  """Deletes the queued resource and its machines, which takes minutes."""
  waits = ["--async"] if is_async else []
  return [*_queued("delete", target), "--force", *waits]


def describe_node(target: Target, node: str) -> list[str]:
  return [*_vm("describe", target, node), "--format=value(state)"]


def on_workers(
  target: Target, node: str, words: Sequence[str], which: str = "all"
) -> list[str]:
  """Runs worker.sh with `words`; one more shell reads the line over there."""
  program = shlex.join(["sudo", "bash", worker.PROGRAM, *words])
  line = (
    f"if sudo test -f {worker.PROGRAM}; then {program}; "
    'else echo "mole-worker $(hostname) booting"; fi'
  )
  return [
    *_vm("ssh", target, node),
    f"--worker={which}",
    f"--command={line}",
  ]


def log_in(target: Target, node: str, which: str) -> list[str]:
  argv = [*_vm("ssh", target, node), f"--worker={which}"]
  argv.remove("--quiet")  # A person is there to be asked.
  return argv


def _queued(verb: str, target: Target) -> list[str]:
  head = ["gcloud", "compute", "tpus", "queued-resources", verb, target.name]
  return [*head, *target.flags(), "--quiet"]


def _vm(verb: str, target: Target, node: str) -> list[str]:
  head = ["gcloud", "compute", "tpus", "tpu-vm", verb, node]
  return [*head, *target.flags(), "--quiet"]


def run(argv: Sequence[str], seconds: float = SECONDS) -> str:
  """What a command printed. GcloudError if it failed or took too long."""
  try:
    done = subprocess.run(
      argv, capture_output=True, text=True, timeout=seconds, check=False
    )
  except FileNotFoundError:
    text = "gcloud is not installed, or not on PATH"
    raise GcloudError(argv, 127, text) from None
  except subprocess.TimeoutExpired:
    text = f"no answer within {seconds:g} s"
    raise GcloudError(argv, 124, text) from None
  if done.returncode:
    raise GcloudError(argv, done.returncode, _complaint(done), done.stdout)
  return done.stdout


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
  """The error among the progress that gcloud also writes to stderr."""
  lines = [line for line in done.stderr.splitlines() if line.strip()]
  errors = [i for i, line in enumerate(lines) if line.startswith("ERROR")]
  lines = lines[errors[0] :] if errors else lines[-3:]
  return "\n".join(lines) or f"exit code {done.returncode}"


def read_state(
  target: Target, run: Callable[[Sequence[str]], str] = run
) -> tuple[str, str]:
  """State of the queued resource and the reason given with it, if any."""
  try:
    text = run(describe(target))
  except GcloudError as error:
    if error.is_missing:
      return MISSING, ""
    raise
  try:
    state = json.loads(text)["state"]
    return state["state"], _reason(state)
  except (KeyError, TypeError, json.JSONDecodeError):
    text = f"cannot be understood: {text[:200]!r}"
    raise GcloudError(describe(target), 0, text) from None


def _reason(state: dict[str, Any]) -> str:
  error = state.get("failedData", {}).get("error", {})
  parts = [error.get("message", ""), state.get("stateInitiator", "")]
  return ", ".join(part for part in parts if part)
