"""The command as a user types it, in processes of its own."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests import conftest

ROOT = pathlib.Path(__file__).parents[1]
# Three steps of a model that compiles quickly, on the embedded data.
SMALL = [
  "--config.model.vision.num_layers=1",
  "--config.model.decoder.num_layers=1",
  "--config.model.vision.hidden_size=32",
  "--config.model.decoder.hidden_size=32",
  "--config.stages.base.batch_size=2",
  "--config.stages.mole.batch_size=2",
  "--config.stages.base.num_steps=3",
  "--config.stages.mole.num_steps=3",
  "--config.evaluation.max_new_tokens=2",
  "--config.evaluation.max_questions=40",
]


def command(*args, config="configs/mole3.py"):
  return [sys.executable, "-m", "mole_jax.main", f"--config={config}", *args]


def environment():
  # One device: a laptop.
  return os.environ | {"COLUMNS": "100", "XLA_FLAGS": " ".join(conftest.FLAGS)}


def run(*args, config="configs/mole3.py"):
  return call(command(*args, config=config))


def call(args):
  return subprocess.run(
    args,
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A finished small run and what it printed, loaded modules at the end."""
  workdir = tmp_path_factory.mktemp("run") / "mole3"
  _, _, _, *args = command(f"--workdir={workdir}", *SMALL)
  code = (
    "import sys; from mole_jax import main\n"
    f"sys.argv = {['main', *args]!r}\n"
    "code = main.main(sys.argv)\n"
    "print('MODULES', *sorted(sys.modules))\n"
    "sys.exit(code)"
  )
  done = call([sys.executable, "-c", code])
  assert done.returncode == 0, done.stdout + done.stderr
  return workdir, done.stdout


def test_training_imports_neither_torch_nor_tensorflow(finished):
  _, out = finished
  modules = out.split("MODULES")[1].split()
  assert "mole_jax.training.loop" in modules
  assert not {"torch", "tensorflow"} & set(modules)


def test_one_command_trains_evaluates_and_reports(finished):
  workdir, out = finished
  for name in (
    "config.json",
    "run.json",
    "base/base.json",
    "base/metrics.jsonl",
    "mole/metrics.jsonl",
    "evaluation/metrics.json",
    "evaluation/predictions.jsonl",
    "report/index.html",
  ):
    assert (workdir / name).stat().st_size > 0, name
  for domain in ("general", "document", "biomedical"):
    assert domain in out
  assert "report/index.html" in out.replace("\n", "")
  assert re.search(r"padding: [\d.]+% of tokens in [\d,]+ rows", out)


def test_rerunning_skips_what_stands(finished):
  workdir, _ = finished
  done = run(f"--workdir={workdir}", *SMALL)
  assert done.returncode == 0
  for what in ("stage base stands", "stage mole stands", "evaluation stands"):
    assert what in done.stdout


def test_a_damaged_step_is_named_set_aside_and_trained_again(
  finished, tmp_path
):
  workdir = shutil.copytree(finished[0], tmp_path / "mole3")
  folder = workdir / "mole" / "checkpoints" / "3" / "opt_state"
  files = [file for file in folder.rglob("*") if file.is_file()]
  file = max(files, key=lambda file: file.stat().st_size)
  file.write_bytes(file.read_bytes()[:-1])
  done = run(f"--workdir={workdir}", *SMALL)
  assert done.returncode == 0, done.stdout + done.stderr
  out = done.stdout
  assert f"step 3 of stage mole is damaged: {file} has changed" in out
  assert out.index("stage mole starts anew") < out.index("stage mole step 3/3")
  assert "evaluation stands" in out
  assert (workdir / "mole" / "damaged" / "3").is_dir()


def test_another_config_is_refused_with_the_differences(finished):
  workdir, _ = finished
  done = run(f"--workdir={workdir}", *SMALL, "--config.seed=7")
  assert done.returncode == 2
  assert "seed: 0 -> 7" in done.stderr
  assert "Traceback" not in done.stderr


def test_cached_features_are_kept_in_the_run_and_train_as_pixels(
  finished, tmp_path, monkeypatch
):
  workdir, _ = finished
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  base = f"--config.base.path={workdir / 'base'}"
  small = [arg for arg in SMALL if ".base." not in arg]
  small += ["--config.evaluation.max_questions=1", base]
  cached = "--config.data.features=cached"
  done = run(f"--workdir={tmp_path / 'run'}", cached, *small)
  assert done.returncode == 0, done.stdout + done.stderr
  assert "stage mole reads cached features" in done.stdout
  made = sorted((tmp_path / "run" / "features").glob("*/about.json"))
  names = [json.loads(path.read_text())["name"] for path in made]
  domains = ("biomedical", "document", "general")
  assert sorted(names) == [f"embedded/{domain}" for domain in domains]
  assert not (tmp_path / "cache" / "mole_jax").exists()
  rows = [
    json.loads((path / "mole" / "metrics.jsonl").read_text().splitlines()[-1])
    for path in (tmp_path / "run", workdir)
  ]
  for key in ("loss", "balance_loss"):
    assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-6)


def test_a_base_is_shared_by_path_and_hash(finished, tmp_path):
  workdir, _ = finished
  base = f"--config.base.path={workdir / 'base'}"
  small = [arg for arg in SMALL if ".base." not in arg]
  lora = "configs/lora.py"
  done = run(f"--workdir={tmp_path}/l", base, *small, config=lora)
  assert done.returncode == 0, done.stdout + done.stderr
  assert "stage base stands" in done.stdout
  assert not (tmp_path / "l" / "base").exists()
  wrong = "--config.base.sha256=" + "0" * 64
  done = run(f"--workdir={tmp_path}/m", base, wrong, *small, config=lora)
  assert done.returncode == 2
  assert "refers to it says 0000" in done.stderr


@pytest.mark.parametrize(
  ("config", "args", "message"),
  [
    (
      "configs/mole3.py",
      ["--config.stages.mole.optim.l=1"],
      "are b1, b2, clip_norm, eps, lr,",
    ),
    ("configs/mole3.py", ["--config.sede=1"], 'Did you mean "seed"'),
    (
      "configs/mole3.py:70b",
      [],
      "use one of tiny, small, smol_shape",
    ),
    ("configs/none.py", [], "No such file or directory: 'configs/none.py'"),
    ("README.md", [], "README.md is no Python file"),
    ("configs/mole3.py", ["--wordir=x"], "workdir"),
    ("configs/mole3.py", ["extra"], "unexpected argument 'extra'"),
    (
      "configs/mole3.py",
      ["--config.mesh.data=3"],
      "does not fill 1 device",
    ),
    (
      "configs/mole3.py",
      ["--config.model.mole.gate=soft"],
      "mole.gate='soft' must be one of",
    ),
    (
      "configs/mole3.py",
      ["--config.model.decoder.vocab_size=10"],
      "vocab_size=10 is less than the tokenizer's",
    ),
  ],
)
def test_a_mistake_is_one_line_with_the_way_out(
  config, args, message, tmp_path
):
  done = run(f"--workdir={tmp_path}/run", *args, config=config)
  assert done.returncode == 2, done.stdout + done.stderr
  assert message in done.stderr
  assert "Traceback" not in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_both_flags_are_asked_for():
  done = call([sys.executable, "-m", "mole_jax.main"])
  assert done.returncode == 2
  assert "--config=" in done.stderr and "--workdir=" in done.stderr


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
  args = [f"--workdir={tmp_path}/run", *SMALL]
  args = [a for a in args if "base.num_steps" not in a]
  args += ["--config.stages.base.log_every=1"]
  process = subprocess.Popen(
    command(*args),
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  log = tmp_path / "run" / "base" / "metrics.jsonl"
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline:
    if log.exists() and len(log.read_text().splitlines()) >= 2:
      break
    time.sleep(0.2)
  process.send_signal(signal.SIGINT)
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 130, out
  assert "To resume, run the same command" in out
  assert "python -m mole_jax.main --config=configs/mole3.py" in out
  steps = [int(p.name) for p in (tmp_path / "run/base/checkpoints").iterdir()]
  last = json.loads(log.read_text().splitlines()[-1])["step"]
  assert max(steps) == last >= 2
