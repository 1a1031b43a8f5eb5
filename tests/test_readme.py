"""The README's commands are those that run, and they do."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import transformers
import yaml
from PIL import Image

from mole_jax.training import command_line
from tests import test_main
from tests.interop import torch_models

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line]
MODULES = [line for line in COMMANDS if line.startswith("python -m mole_jax.")]


def test_ci_calls_exactly_the_test_command():
  (command,) = [line for line in COMMANDS if "pytest" in line]
  assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_first_command_is_the_main_job():
  assert COMMANDS[0].endswith(
    ".venv/bin/python -m mole_jax.main --config=configs/mole3.py "
    "--workdir=runs/mole3"
  )


# For the commands that start from a converted model, which has its own shape.
FEW_STEPS = [
  "--config.stages.mole.num_steps=2",
  "--config.stages.mole.batch_size=2",
  "--config.evaluation.max_new_tokens=2",
  "--config.evaluation.max_questions=4",
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
  """The checkout with a place of its own for runs, and a small mole3."""
  folder = tmp_path_factory.mktemp("readme")
  for name in ("configs", "mole_jax"):
    (folder / name).symlink_to(ROOT / name)
  torch_models.save_for_embedded_data(folder / "path" / "to" / "llava")
  write_own_data(folder / "path" / "to")
  # Small random models in the places of the real ones.
  torch_models.save_smollm2(folder / "path" / "to" / "SmolLM2-135M-Instruct")
  torch_models.save_dinov2(folder / "path" / "to" / "dinov2-small")
  args = shlex.split(COMMANDS[0].split("&&")[-1].strip())[1:]
  done = call(folder, args + test_main.SMALL)
  assert done.returncode == 0, done.stdout + done.stderr
  return folder


def write_own_data(folder):
  """Ten pictures, and the README's JSON with eight entries more."""
  (text,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
  (folder / "pictures").mkdir()
  names = ["cat", "dog", *(f"animal{i}" for i in range(8))]
  for index, name in enumerate(names):
    picture = Image.new("RGB", (80, 60), (25 * index, 0, 0))
    picture.save(folder / "pictures" / f"{name}.jpg")
  entries = json.loads(text)
  for name in names[2:]:
    entry = json.dumps(entries[0] | {"id": name, "image": f"{name}.jpg"})
    text = text.rstrip().removesuffix("]").rstrip() + f",\n  {entry}\n]\n"
  (folder / "train.json").write_text(text)


def call(folder, args):
  return subprocess.run(
    [sys.executable, *args],
    cwd=folder,
    env=test_main.environment() | {"PYTHONPATH": str(folder)},
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_other_commands_work_after_it(workplace):
  assert len(MODULES) >= 4
  for line in MODULES:
    if "builders" in line:
      continue  # Marked `rebuild`: it needs the packages.
    if "dry_run" in line and "topology=cpu" not in line:
      continue  # Marked `tpu`: it needs that compiler.
    if "mole_jax.bench" in line and (":7b" in line or ":stablelm" in line):
      continue  # It needs a GPU.
    if "mole_jax.main" in line and ":7b" in line:
      continue  # It needs weights: test_commands_for_gpus_parse.
    if "mole_jax.main" in line and "moe_llava" in line:
      continue  # test_moe_llava.py runs it.
    args = shlex.split(line)[1:]
    if "mole_jax.main" in line and ("weights/" in line or ":smol" in line):
      args += FEW_STEPS
    elif "mole_jax.main" in line:
      args += [a for a in test_main.SMALL if ".base." not in a]
    if "mole_jax.bench" in line:
      args += ["--steps=1", *test_main.SMALL]
      args += ["--rounds=1"] if "compare" in line else ["--skip-warm"]
    if "mole_jax.evaluate" in line:
      args += ["--max-questions", "4"]
    if "configs/own.py" in line and "mole_jax.main" in line:
      args += ["--config.base.path=runs/mole3/base"]
    done = call(workplace, args)
    if "prepare validate" in line:
      check_the_slip(done, workplace / "path" / "to" / "train.json")
      done = call(workplace, args)
    assert done.returncode == 0, line + done.stdout + done.stderr
  assert (workplace / "runs" / "compare" / "index.html").exists()
  exported = workplace / "exported"
  transformers.LlavaForConditionalGeneration.from_pretrained(exported / "plain")
  model = transformers.AutoModelForImageTextToText.from_pretrained(
    exported / "mole3", trust_remote_code=True
  )
  assert model.config.num_experts == 3
  small = transformers.AutoModelForImageTextToText.from_pretrained(
    exported / "small",
    trust_remote_code=True,
    base=workplace / "path" / "to" / "llava",
  )
  assert small.config.num_experts == 3
  assert (exported / "experts" / "expert_2" / "adapter_config.json").exists()


def check_the_slip(done, file):
  """The README shows the message for its mistake; mends it."""
  assert done.returncode == 1, done.stdout + done.stderr
  (message,) = re.findall(r"^train.json line .*$", README, re.MULTILINE)
  assert message in done.stdout.splitlines()
  file.write_text(file.read_text().replace("dgo.jpg", "dog.jpg"))


# ml_collections imports config files in a way that Python will drop.
IMPORTS = "ignore:the load_module:DeprecationWarning"
FOR_GPUS = README.split("## On GPUs")[1].split("\n## ")[0]


@pytest.mark.filterwarnings(IMPORTS)
@pytest.mark.parametrize(
  "line",
  [
    line
    for block in re.findall(r"```bash\n(.*?)```", FOR_GPUS, re.DOTALL)
    for line in block.splitlines()
  ],
)
def test_commands_for_gpus_parse(line):
  words = shlex.split(line)
  if "pip" in line:
    extra = re.search(r"\[(\w+)\]", words[-1])[1]
    assert f"\n{extra} =\n" in (ROOT / "setup.cfg").read_text()
    return
  if words[0] == "sky":
    task = yaml.safe_load((ROOT / words[3]).read_text())
    pairs = zip(words[4::2], words[5::2], strict=True)
    given = [value.partition("=") for flag, value in pairs if flag == "--env"]
    assert {name for name, _, _ in given} <= task["envs"].keys()
    env = task["envs"] | {name: value for name, _, value in given}
    words = [f"--config={env['CONFIG']}", *env["ARGS"].split()]
  elif words[0] == "sbatch":
    assert (ROOT / words[2]).is_file()
  argv = [word for word in words if word.startswith("--config")]
  assert argv[0] == "--config=configs/mole3.py:7b"
  config = command_line.read_config(["main", *argv])
  num_rows = config["stages"]["mole"]["batch_size"]
  assert num_rows % config["mesh"]["fsdp"] == 0


def test_the_notebook_example_works(workplace):
  (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  picture = (
    "from PIL import Image; Image.new('RGB', (96, 96), 'red')"
    ".save('picture.png')\n"
  )
  done = call(workplace, ["-c", picture + code])
  assert done.returncode == 0, done.stderr


def test_every_file_of_the_layout_exists():
  layout = README.split("## How it is laid out")[1].split("```")[1]
  for name in re.findall(r"^  (\w+(?:\.py|/))", layout, re.MULTILINE):
    assert (ROOT / "mole_jax" / name).exists(), name
  assert os.access(ROOT / ".ci" / "run", os.X_OK)
