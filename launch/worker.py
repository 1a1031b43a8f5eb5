"""The startup script of a TPU worker: settings in front of worker.sh."""

import base64
import dataclasses
import io
import pathlib
import re
import shlex
import tarfile
from collections.abc import Mapping

from launch import guard

BODY = pathlib.Path(__file__).with_name("worker.sh")
PROGRAM = "/opt/mole_jax/worker.sh"
DISK = "/mnt/mole_jax"
MAX_BYTES = 256 * 1024  # Of one value of the metadata.

_GIT = re.compile(r"(?P<url>(?:https://|ssh://|git@)\S+)@(?P<commit>\S+)")
_WHEEL = re.compile(r"(?P<url>gs://\S+\.whl)#sha256=(?P<sha256>[0-9a-f]{64})")


@dataclasses.dataclass(frozen=True)
class Worker:
  """What a worker installs, mounts and runs."""

  lock: str
  git: str = ""  # URL@COMMIT
  wheel: str = ""  # gs://BUCKET/FILE.whl#sha256=HEX
  configs: pathlib.Path | None = None  # Goes along with a wheel.
  mount: str = ""  # nfs:HOST:/EXPORT or gcs:BUCKET
  secrets: Mapping[str, str] = dataclasses.field(default_factory=dict)
  project: str = ""
  command: tuple[str, ...] = ()


def render(worker: Worker) -> str:
  """The startup script, checked: ValueError says what is wrong with it."""
  guard.refuse_secrets(worker.command, "the command")
  guard.refuse_secrets([worker.git, worker.wheel, worker.mount], "the source")
  guard.refuse_secrets(worker.lock.split(), "the lock")
  settings = {
    **_source(worker),
    "MOLE_LOCK": worker.lock.strip(),
    "MOLE_PYTHON": python_of(worker.lock),
    "MOLE_MOUNT": _mount(worker.mount),
    "MOLE_PROJECT": worker.project,
  }
  arrays = {
    "MOLE_SECRETS": [f"{k}={v}" for k, v in worker.secrets.items()],
    "MOLE_COMMAND": list(worker.command),
  }
  for name, secret in worker.secrets.items():
    if not re.fullmatch(r"[A-Za-z_]\w*", name) or not re.fullmatch(
      r"[\w-]{1,255}", secret
    ):
      raise ValueError(
        f"--secret {name}: wanted VARIABLE=NAME, where NAME is that of a "
        "secret in Secret Manager (letters, digits, - and _), not its value."
      )
  shebang, _, body = BODY.read_text().partition("\n")
  lines = [shebang]
  lines += [f"{k}={shlex.quote(v)}" for k, v in settings.items()]
  for name, words in arrays.items():
    # A $ between single quotes is meant for the command.
    lines.append("# shellcheck disable=SC2016")
    lines.append(f"{name}=({shlex.join(words)})")
  text = "\n".join([*lines, body])
  if len(text.encode()) > MAX_BYTES:
    raise ValueError(
      f"the startup script has {len(text.encode()):,} bytes; metadata takes "
      f"{MAX_BYTES:,}. Name a smaller --configs folder."
    )
  return text


def python_of(lock: str) -> str:
  """The Python that a lock is for, "python3.11", from its first lines."""
  found = re.search(r"^# Python (3\.\d+)", lock, re.M)
  if not found or "--hash=sha256:" not in lock:
    raise ValueError(
      "the lock names no Python version or has no hashes; write one with "
      "python -m launch.lock --extra tpu --out launch/tpu.lock"
    )
  return f"python{found[1]}"


def check_survives(command: tuple[str, ...], mount: str) -> None:
  """Raises ValueError where --workdir would go with its machine."""
  workdir = None
  for index, word in enumerate(command):
    name, is_pair, value = word.lstrip("-").partition("=")
    if name == "workdir":
      workdir = value if is_pair else "".join(command[index + 1 : index + 2])
  if workdir is None:
    return
  if not mount:
    raise ValueError(
      f"--workdir={workdir} is on the TPU's own disk and is deleted with it, "
      "so nothing could be resumed: give --mount nfs:HOST:/EXPORT (or "
      "gcs:BUCKET), or --mount none to accept that."
    )
  is_kept = workdir.startswith(("runs/", f"{DISK}/"))
  if mount != "none" and (not is_kept or ".." in workdir.split("/")):
    raise ValueError(
      f"--workdir={workdir} is not on the mounted disk; runs/, data/ and "
      f"weights/ are (and {DISK}/): use --workdir=runs/NAME."
    )


def _source(worker: Worker) -> dict[str, str]:
  if bool(worker.git) == bool(worker.wheel):
    raise ValueError(
      "name one source: --git URL@COMMIT, or --wheel gs://BUCKET/FILE.whl"
      "#sha256=HEX"
    )
  if worker.git:
    found = _GIT.fullmatch(worker.git)
    if not found or not re.fullmatch(r"[0-9a-f]{40}", found["commit"]):
      raise ValueError(
        f"--git {worker.git}: wanted URL@COMMIT with the 40 digits that "
        "`git rev-parse BRANCH` prints; a branch may move between two machines "
        "of one run."
      )
    return {
      "MOLE_SOURCE": "git",
      "MOLE_URL": found["url"],
      "MOLE_COMMIT": found["commit"],
    }
  found = _WHEEL.fullmatch(worker.wheel)
  if not found:
    raise ValueError(
      f"--wheel {worker.wheel}: wanted gs://BUCKET/FILE.whl#sha256=HEX, with "
      "what `sha256sum FILE.whl` prints."
    )
  if worker.configs is None or not worker.configs.is_dir():
    raise ValueError(
      f"--configs {worker.configs} is no folder; a wheel has no configuration "
      "files, so those of a checkout go along: run this in one."
    )
  return {
    "MOLE_SOURCE": "wheel",
    "MOLE_URL": found["url"],
    "MOLE_SHA256": found["sha256"],
    "MOLE_CONFIGS": _archive(worker.configs),
  }


def _mount(mount: str) -> str:
  if mount in ("", "none"):
    return ""
  if not re.fullmatch(r"nfs:[\w.-]+:/[\w./-]*|gcs:[a-z0-9][\w.-]+", mount):
    raise ValueError(
      f"--mount {mount}: wanted nfs:HOST:/EXPORT, gcs:BUCKET or none."
    )
  return mount


def _archive(folder: pathlib.Path) -> str:
  """The folder's Python files as `configs/`; the same bytes for the same."""
  data = io.BytesIO()
  # No times in it: the script's hash says what is installed.
  with tarfile.open(fileobj=data, mode="w:xz") as archive:
    for path in sorted(folder.glob("*.py")):
      entry = tarfile.TarInfo(f"configs/{path.name}")
      content = path.read_bytes()
      entry.size = len(content)
      archive.addfile(entry, io.BytesIO(content))
  return base64.b64encode(data.getvalue()).decode()
