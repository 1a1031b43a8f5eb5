"""Two real models, in and out: python -m pytest -m weights.

SmolLM2-135M-Instruct and DINOv2-small in Hugging Face's layout, in the folders
smollm2-135m-instruct and dinov2-small under MOLE_JAX_WEIGHTS (default
~/.cache/mole-jax-weights). Some five minutes on two cores.
"""

import json
import os
import pathlib
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mole_jax import convert
from mole_jax.inference import generator as generator_lib
from mole_jax.inference import pretrained
from mole_jax.interop import from_hf
from mole_jax.models import vision
from tests import test_main

FOLDER = pathlib.Path(
  os.environ.get("MOLE_JAX_WEIGHTS", "~/.cache/mole-jax-weights")
).expanduser()
SMOLLM2 = FOLDER / "smollm2-135m-instruct"
DINOV2 = FOLDER / "dinov2-small"
ABSENT = [str(p) for p in (SMOLLM2, DINOV2) if not p.is_dir()]
pytestmark = [
  pytest.mark.weights,
  pytest.mark.skipif(
    bool(ABSENT), reason=f"real weights are not on disk: {', '.join(ABSENT)}"
  ),
]
PROMPTS = (
  "What is the capital of France?",
  "Write one sentence about the sea.",
  "List three colours.",
  "Explain what a router does in a mixture of experts.",
  "2 + 2 =",
)
NUM_TOKENS = 64


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """The converted pair, where configs/mole3.py:smol looks for it."""
  folder = tmp_path_factory.mktemp("real")
  from_hf.convert(
    SMOLLM2, folder / "weights" / "smol", vision=DINOV2, dtype="float32"
  )
  for name in ("configs", "mole_jax"):
    (folder / name).symlink_to(test_main.ROOT / name)
  return folder / "weights" / "smol"


@pytest.fixture(scope="module")
def ours(base):
  return pretrained.load(base)


def test_greedy_text_is_transformers_token_for_token(ours):
  text = transformers.AutoTokenizer.from_pretrained(SMOLLM2)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    SMOLLM2, dtype=torch.float32
  )
  no_images = np.zeros((0, 224, 224, 3), np.uint8)
  prompts = []
  for prompt in PROMPTS:
    turn = {"from": "human", "value": prompt}
    prompts.append(ours.encode_prompt([turn], no_images))
    wanted = text.apply_chat_template(
      [{"role": "user", "content": prompt}],
      add_generation_prompt=True,
      tokenize=True,
    )
    wanted = wanted["input_ids"] if hasattr(wanted, "keys") else wanted
    assert prompts[-1].input_ids.tolist() == list(wanted)
  # One at a time, as PyTorch below: padding to a batch changes sums.
  for prompt in prompts:
    (answer,) = ours.generator([prompt], max_new_tokens=NUM_TOKENS)
    out = model.generate(
      input_ids=torch.from_numpy(prompt.input_ids)[None].long(),
      max_new_tokens=NUM_TOKENS,
      do_sample=False,
      repetition_penalty=1.0,
    )[0, len(prompt.input_ids) :].tolist()
    end = text.eos_token_id
    out = out[: out.index(end)] if end in out else out
    assert answer.tokens.tolist() == out
  assert isinstance(answer, generator_lib.Answer)


@pytest.mark.parametrize("image_size", [112, 224])
def test_dinov2_features_are_those_of_transformers(ours, image_size):
  model = transformers.AutoModel.from_pretrained(DINOV2)
  rng = np.random.default_rng(0)
  pixels = rng.normal(size=(2, image_size, image_size, 3)).astype(np.float32)
  with torch.no_grad():
    states = model(
      torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
      output_hidden_states=True,
    ).hidden_states
  section = ours.config["model"]["vision"] | {"image_size": image_size}
  for layer in (-1, -2, 1):
    config = vision.VisionConfig(**(section | {"feature_layer": layer}))
    mine = vision.VisionTower(config).apply(
      {"params": ours.params["vision"]}, jnp.asarray(pixels)
    )
    theirs = states[layer][:, 1:].numpy()
    error = np.abs(np.asarray(mine) - theirs).max() / np.abs(theirs).max()
    assert error <= 1e-4


def test_smol_trains_and_its_export_is_the_same_model_in_torch(base, tmp_path):
  folder = base.parents[1]
  run = folder / "runs" / "smol"
  arguments = test_main.command(
    f"--workdir={run}",
    "--config.stages.mole.num_steps=20",
    "--config.stages.mole.log_every=1",
    "--config.evaluation.max_questions=4",
    config="configs/mole3.py:smol",
  )
  # Compiled as users have it: optimised.
  environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(folder)}
  done = subprocess.run(
    arguments, cwd=folder, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr
  lines = (run / "mole" / "metrics.jsonl").read_text().splitlines()
  losses = [json.loads(line)["loss"] for line in lines]
  assert len(losses) == 20
  assert np.mean(losses[-5:]) < np.mean(losses[:5])
  out = tmp_path / "hf"
  arguments = ["--ckpt", str(run), "--format", "mole", "--out", str(out)]
  assert convert.main(["to-hf", *arguments]) == 0
  code = convert.main(["verify", "--ckpt", str(run), "--hf", str(out)])
  text = (out / "parity.md").read_text()
  assert code == 0, text
  shutil.rmtree(out)
