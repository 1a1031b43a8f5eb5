"""The startup script: what is written, and what it does in a sandbox."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from launch import guard, worker
from tests.launch import fakes

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GIT = f"https://example.com/me/mole_jax@{COMMIT}"
WHEEL = f"gs://bucket/mole_jax-0.1.0-py3-none-any.whl#sha256={'a' * 64}"
LOCK = f"""# Python 3.11, Linux x86_64, mole_jax[tpu].
jax==0.10.2 --hash=sha256:{"1" * 64}
packaging==26.4 --hash=sha256:{"4" * 64}
setuptools==84.2.1 --hash=sha256:{"2" * 64}
wheel==0.48.0 --hash=sha256:{"3" * 64}
"""


def make(**changes):
  return worker.Worker(**{"lock": LOCK, "git": GIT} | changes)


def find_shellcheck():
  beside = pathlib.Path(sys.executable).with_name("shellcheck")
  return str(beside) if beside.exists() else shutil.which("shellcheck")


def check_shell(path):
  subprocess.run(["bash", "-n", str(path)], check=True)
  done = subprocess.run(
    [find_shellcheck(), "--shell=bash", str(path)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"command": ("python", "it's", 'a "b" $HOME `x`', "new\nline")},
    {"mount": "gcs:bucket", "secrets": {"HF_TOKEN": "hf-token"}},
    {"git": "", "wheel": WHEEL, "configs": pathlib.Path("configs")},
  ],
  ids=["git", "command", "mount", "wheel"],
)
def test_what_is_written_is_a_clean_script(tmp_path, changes):
  path = tmp_path / "start.sh"
  path.write_text(worker.render(make(**changes)))
  check_shell(path)
  assert len(path.read_bytes()) < worker.MAX_BYTES


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"git": "https://example.com/me/mole_jax@main"}, "40 digits"),
    ({"git": "", "wheel": "gs://bucket/x.whl"}, "sha256=HEX"),
    (
      {"git": "", "wheel": WHEEL, "configs": pathlib.Path("no")},
      "is no folder",
    ),
    ({"git": GIT, "wheel": WHEEL}, "name one source"),
    ({"lock": "jax==0.10.2\n"}, "python -m launch.lock"),
    ({"lock": "# Python 3.11\njax==0.10.2\n"}, "no hashes"),
    ({"mount": "/somewhere"}, "wanted nfs:HOST"),
    ({"secrets": {"HF_TOKEN": "a value!"}}, "not its value"),
  ],
)
def test_mistakes_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    worker.render(make(**changes))


SECRETS = [
  ("env", "HF_TOKEN=x"),
  ("--wandb-api-key=x",),
  ("--config.hub.token", "x"),
  ("python", "hf_" + "a" * 30),
  ("curl", "https://me:pass@example.com/x"),
  ("--password=x",),
]


@pytest.mark.parametrize("command", SECRETS)
def test_a_secret_in_a_command_is_refused_and_not_repeated(command):
  with pytest.raises(ValueError, match="--secret HF_TOKEN=") as error:
    worker.render(make(command=command))
  for value in ("hf_a", "me:pass"):
    assert value not in str(error.value)


def test_a_token_in_a_git_address_is_refused():
  with pytest.raises(ValueError, match="the source"):
    worker.render(make(git=f"https://ghp_x@example.com/me/mole@{COMMIT}"))


def test_what_only_sounds_like_a_secret_is_not_refused():
  guard.refuse_secrets(
    [
      "--config.data.tokenizer=weights/vicuna/tokenizer.json",
      "--config.model.image_token_id=3",
      "--config.evaluation.max_new_tokens=12",
      "--workdir=runs/task-with-a-long-name-and-numbers-123",
      "git@example.com:me/mole_jax",
      "ssh://git@example.com/me/mole_jax",
    ],
    "here",
  )


def test_a_workdir_that_goes_with_its_machine_is_refused():
  command = ("python", "-m", "mole_jax.main", "--workdir", "runs/x")
  worker.check_survives(command, "nfs:host:/x")
  worker.check_survives(command, "none")
  worker.check_survives(("--workdir=/mnt/mole_jax/x",), "gcs:bucket")
  with pytest.raises(ValueError, match="deleted with it"):
    worker.check_survives(command, "")
  for away in ("elsewhere/x", "/tmp/x", "runs/../x"):
    with pytest.raises(ValueError, match="not on the mounted disk"):
      worker.check_survives((f"--workdir={away}",), "gcs:bucket")


PYTHON = """#!/bin/sh
echo "python $*" >> {log}
case "$*" in
  *failing*) exit 1;;
  "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python";;
esac
"""


class Sandbox:
  """A worker whose programs are fakes, but for bash and git."""

  def __init__(self, folder):
    self.folder = folder
    self.log = folder / "log"
    self.calls = folder / "calls"
    self.bin = folder / "bin"
    self.bin.mkdir()
    self.program("python3.11", PYTHON.format(log=self.calls))
    for name in ("mount", "apt-get", "mount.nfs"):
      self.program(name, f'#!/bin/sh\necho "{name} $*" >> {self.calls}\n')
    self.program("mountpoint", "#!/bin/sh\nexit 1\n")
    self.program("gcloud", '#!/bin/sh\necho "secret of $4"\n')
    self.env = os.environ | {
      "PATH": fakes.path_with(self.bin),
      "MOLE_ROOT": str(folder / "root"),
      "MOLE_RUN": str(folder / "run"),
      "MOLE_LOG": str(self.log),
      "MOLE_DISK": str(folder / "disk"),
      "MOLE_PAUSE": "0",
      "MOLE_GRACE": "1",
    }

  def program(self, name, text):
    fakes.write_program(self.bin / name, text)

  def serve_git(self):
    """A repository that git takes for the one in the address; its commit."""
    source = self.folder / "source"
    (source / "configs").mkdir(parents=True)
    (source / "configs" / "mole3.py").write_text("x = 1\n")
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
      subprocess.run([*git, *words], check=True)
    self.env |= {
      "GIT_CONFIG_COUNT": "1",
      "GIT_CONFIG_KEY_0": f"url.file://{source}.insteadOf",
      "GIT_CONFIG_VALUE_0": "https://example.com/me/mole_jax",
    }
    done = subprocess.run(
      [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()

  def boot(self, **changes):
    path = self.folder / "startup-script"
    path.write_text(worker.render(make(**changes)))
    subprocess.run(["bash", str(path)], env=self.env, check=True)

  def call(self, *words):
    done = subprocess.run(
      ["bash", str(self.folder / "root" / "worker.sh"), *words],
      env=self.env,
      capture_output=True,
      text=True,
      check=True,
    )
    return done.stdout.strip().partition(" ")[2].partition(" ")[2]

  def wait_for(self, prefix):
    for _ in range(200):
      state = self.call("state")
      if state.startswith(prefix):
        return state
      time.sleep(0.02)
    raise AssertionError(f"{state!r}; log:\n{self.log.read_text()}")


@pytest.fixture
def sandbox(tmp_path):
  return Sandbox(tmp_path)


def git_of(sandbox):
  return f"https://example.com/me/mole_jax@{sandbox.serve_git()}"


def test_boot_installs_by_the_lock_mounts_and_starts_the_command(sandbox):
  show = 'printf "<%s>" "$@" > out; pwd >> out; echo "$HF_TOKEN" >> out'
  sandbox.boot(
    git=git_of(sandbox),
    mount="nfs:host:/x",
    secrets={"HF_TOKEN": "hf-token"},
    command=("bash", "-c", show, "-", "it's", 'a  "b"', "$HOME"),
  )
  assert sandbox.wait_for("exited 0")
  work = sandbox.folder / "root" / "work"
  lines = (work / "out").read_text().splitlines()
  assert lines[0] == f'<it\'s><a  "b"><$HOME>{work}'
  assert lines[1] == "secret of latest"
  calls = sandbox.calls.read_text().splitlines()
  assert [c.split(" ", 1)[1].split(f" {sandbox.folder}")[0] for c in calls] == [
    "-m venv --clear",
    "-m pip install -q --require-hashes -r",
    "-m pip install -q --require-hashes --no-build-isolation -r",
    "-m pip install -q --no-deps --no-build-isolation",
    "-t nfs -o hard host:/x",
  ]
  root = sandbox.folder / "root"
  assert (root / "lock.txt").read_text().strip() == LOCK.strip()
  build = (root / "build.txt").read_text().splitlines()
  assert [line.split("=")[0] for line in build] == [
    "packaging",
    "setuptools",
    "wheel",
  ]
  assert (work / "configs" / "mole3.py").exists()
  for name in ("runs", "data", "weights"):
    assert (work / name).resolve() == sandbox.folder / "disk" / name
  text = "".join(
    p.read_text() for p in (root / "worker.sh", sandbox.log, sandbox.calls)
  )
  assert "secret of" not in text


def test_once_per_boot_and_installed_once(sandbox):
  git = git_of(sandbox)
  command = ("bash", "-c", "echo started")
  sandbox.boot(git=git, command=command)
  sandbox.wait_for("exited 0")
  sandbox.boot(git=git, command=command)
  assert sandbox.log.read_text().count("\nstarted\n") == 1
  assert "already started in this boot" in sandbox.log.read_text()
  # What a boot leaves: the disk, not /run.
  shutil.rmtree(sandbox.folder / "run")
  assert sandbox.call("state") == "booting"
  sandbox.boot(git=git, command=command)
  sandbox.wait_for("exited 0")
  assert sandbox.log.read_text().count("\nstarted\n") == 2
  assert sandbox.calls.read_text().count("-m venv") == 1


def test_a_wheel_is_fetched_and_checked_and_configs_go_along(sandbox, tmp_path):
  wheel = tmp_path / "x.whl"
  wheel.write_bytes(b"wheel")
  sandbox.program("gcloud", f'#!/bin/sh\ncp {wheel} "$5"\n')
  configs = tmp_path / "mine"
  configs.mkdir()
  (configs / "mole3.py").write_text("changed = 1\n")
  address = "gs://bucket/mole_jax.whl#sha256="
  good = "3ed5ff04b8fbbc8c5c07f0d9d8b0c4b4f6f60a56dbbc5ee0cb1bb1d3ab9c4e8e"
  digest = subprocess.run(
    ["sha256sum", str(wheel)], capture_output=True, text=True, check=True
  ).stdout.split()[0]
  sandbox.boot(git="", wheel=address + digest, configs=configs)
  assert sandbox.wait_for("idle") == "idle"
  work = sandbox.folder / "root" / "work"
  assert (work / "configs" / "mole3.py").read_text() == "changed = 1\n"
  assert "mole_jax.whl" in sandbox.calls.read_text().splitlines()[-1]
  # Another file behind the same name.
  shutil.rmtree(sandbox.folder / "run")
  sandbox.boot(git="", wheel=address + good, configs=configs)
  assert sandbox.call("state") == ("broken install_package failed three times")


def test_a_failed_installation_is_told_and_repaired(sandbox):
  git = git_of(sandbox)
  good = (sandbox.bin / "python3.11").read_text()
  sandbox.program("python3.11", "#!/bin/sh\necho no network >&2\nexit 1\n")
  sandbox.boot(git=git)
  assert sandbox.call("state") == "broken install_package failed three times"
  assert sandbox.log.read_text().count("no network") == 3
  assert sandbox.call("start", "true").startswith("broken")
  sandbox.program("python3.11", good)
  sandbox.call("repair")
  sandbox.wait_for("idle")


def test_a_job_is_one_and_tells_its_exit_code_and_last_words(sandbox):
  sandbox.boot(git=git_of(sandbox))
  assert sandbox.call("state") == "idle"
  long = ("bash", "-c", "echo one >> count; sleep 30")
  assert sandbox.call("start", *long) == "running"
  assert sandbox.call("start", *long) == "running"
  work = sandbox.folder / "root" / "work"
  assert (work / "count").read_text() == "one\n"
  sandbox.call("stop")
  assert sandbox.call("state").startswith("exited 143")
  sandbox.call("start", "bash", "-c", "echo ValueError: no; exit 1")
  assert sandbox.wait_for("exited") == "exited 1 ValueError: no"
  assert sandbox.call("start", "sleep", "30") == "running"
  os.killpg(
    int((sandbox.folder / "run" / "leader").read_text()), signal.SIGKILL
  )
  assert sandbox.wait_for("exited").startswith("exited 137")


def test_stop_gives_time_to_save_and_takes_who_does_not_leave(sandbox):
  sandbox.boot(git=git_of(sandbox))
  saves = (
    "trap 'echo saved; exit 143' TERM; echo up; while :; do sleep 0.05; done"
  )
  sandbox.call("start", "bash", "-c", saves)
  wait_for_text(sandbox.log, "\nup\n")
  assert sandbox.call("stop").startswith("exited 143 saved")
  stays = "trap '' TERM; echo deaf; while :; do sleep 0.05; done"
  sandbox.call("start", "bash", "-c", stays)
  wait_for_text(sandbox.log, "\ndeaf\n")
  assert sandbox.call("stop").startswith("exited 137")


def wait_for_text(path, text):
  for _ in range(200):
    if text in path.read_text():
      return
    time.sleep(0.02)
  raise AssertionError(path.read_text())


def test_an_older_python_brings_the_one_of_the_lock(sandbox):
  python = sandbox.bin / "python3.99"
  sandbox.program(
    "apt-get",
    f'#!/bin/sh\necho "apt-get $*" >> {sandbox.calls}\n'
    f'[ "$1" = install ] && cp {sandbox.bin}/python3.11 {python}\nexit 0\n',
  )
  lock = LOCK.replace("3.11", "3.99")
  sandbox.boot(git=git_of(sandbox), lock=lock)
  assert sandbox.call("state") == "idle"
  assert "apt-get install -qy python3.99 python3.99-venv" in (
    sandbox.calls.read_text()
  )


def test_a_secret_that_cannot_be_read_fails_the_job(sandbox):
  sandbox.program("gcloud", "#!/bin/sh\nexit 1\n")
  sandbox.boot(git=git_of(sandbox), secrets={"HF_TOKEN": "hf-token"})
  sandbox.call("start", "touch", "ran")
  sandbox.wait_for("exited 1")
  assert "secret hf-token cannot be read" in sandbox.log.read_text()
  assert not (sandbox.folder / "root" / "work" / "ran").exists()
