"""MoE-LLaVA's three stages by the command that users type."""

import json
import re

import numpy as np
import pytest

import mole_jax
from mole_jax.training import rundir, state
from tests import test_main
from tests.training import small_run

CONFIG = "configs/moe_llava.py"
STAGES = ("base", "projector", "tuning", "experts")
SMALL = [
  "--config.model.vision.num_layers=1",
  "--config.model.decoder.num_layers=2",
  "--config.model.vision.hidden_size=32",
  "--config.model.decoder.hidden_size=32",
  "--config.evaluation.max_new_tokens=2",
  "--config.evaluation.max_questions=10",
  *(f"--config.stages.{name}.batch_size=2" for name in STAGES),
  *(f"--config.stages.{name}.num_steps=2" for name in STAGES),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "moe_llava"
  done = test_main.run(f"--workdir={workdir}", *SMALL, config=CONFIG)
  assert done.returncode == 0, done.stdout + done.stderr
  return workdir, done.stdout


def test_each_stage_starts_from_the_one_before(finished):
  workdir, out = finished
  for name in STAGES:
    assert (workdir / name / "base.json").exists(), name
  again = test_main.run(f"--workdir={workdir}", *SMALL, config=CONFIG)
  assert again.returncode == 0
  assert re.findall(r"stage (\w+) stands", again.stdout) == list(STAGES)
  parameters = json.loads((workdir / "run.json").read_text())["parameters"]
  projector, tuning, experts = (parameters[name] for name in STAGES[1:])
  assert [g for g in projector if projector[g]["trainable"]] == ["projector"]
  assert not tuning["vision"]["trainable"] and not tuning["decoder"]["frozen"]
  assert experts["experts"]["trainable"] and not experts["experts"]["frozen"]
  assert not experts["projector"]["trainable"]
  row = json.loads(
    (workdir / "experts/metrics.jsonl").read_text().splitlines()[-1]
  )
  assert np.shape(row["expert_load"]) == (1, 4)
  assert len(row["dropped_share"]) == 1


def test_the_model_answers_and_says_its_routing(finished):
  workdir, _ = finished
  model = mole_jax.load(workdir)
  assert (model.num_experts, model.routed_layers) == (4, (0,))
  (routing,) = model.routing("How many are there?")
  assert routing.layers == (0,)
  assert routing.chosen.shape == (1, len(routing.tokens), 2)
  assert isinstance(model.generate("How many?", max_new_tokens=2)[0], str)
  dense = mole_jax.load(workdir / "tuning")
  assert dense.num_experts == 0


def test_lora_goes_on_from_a_tuned_mixture(finished, tmp_path):
  """LoRA on attention and on every expert, the experts themselves frozen."""
  workdir, _ = finished
  done = test_main.run(
    f"--workdir={tmp_path / 'lora'}",
    *SMALL,
    f"--config.base.path={workdir / 'experts'}",
    "--config.stage_names=('experts',)",
    "--config.stages.experts.use_adapters=True",
    "--config.stages.experts.trainable=('.*/lora_[ab]',)",
    "--config.model.lora.rank=2",
    "--config.model.mole.num_experts=1",
    "--config.model.mole.rank=2",
    config=CONFIG,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  model = mole_jax.load(tmp_path / "lora")
  experts = model.params["decoder"]["layers"]["moe_x4"]["experts"]
  assert np.abs(experts["up_proj"]["lora_b"]).max() > 0
  before = mole_jax.load(workdir).params["decoder"]["layers"]["moe_x4"]
  np.testing.assert_array_equal(
    experts["up_proj"]["kernel"], before["experts"]["up_proj"]["kernel"]
  )


ADAPTERS = [flag for flag in SMALL if ".stages." not in flag] + [
  "--config.stages.mole.batch_size=2",
  "--config.stages.mole.num_steps=2",
]


@pytest.mark.parametrize("stage, layers", [("tuning", 2), ("experts", 1)])
def test_a_mixture_of_lora_goes_on_from_a_stage(
  finished, tmp_path, stage, layers
):
  """The base of a run is a variant of configs/mole3.py, as the README says."""
  workdir, _ = finished
  done = test_main.run(
    f"--workdir={tmp_path / 'mole'}",
    *ADAPTERS,
    config=f"configs/mole3.py:{workdir / stage}",
  )
  assert done.returncode == 0, done.stdout + done.stderr
  params = mole_jax.load(tmp_path / "mole").params["decoder"]["layers"]
  # A mixture in each plain layer; a LoRA of its own for each whole FFN.
  assert params["mlp"]["up_proj"]["lora_b"].shape[:2] == (layers, 3)
  if stage == "experts":
    experts = params["moe_x4"]["experts"]["up_proj"]
    assert experts["lora_b"].shape[:2] == (1, 4)


@pytest.mark.parametrize(
  "changes, match",
  [
    (["--config.model.moe.top_k=5"], "top_k=5 must lie between 1"),
    (["--config.model.moe.layers=0,7"], "between 0 and 1"),
    (["--config.stage_names=('experts',)"], "'experts' needs a base"),
  ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
  changes, match, tmp_path
):
  done = test_main.run(f"--workdir={tmp_path}", *SMALL, *changes, config=CONFIG)
  assert done.returncode == 2
  assert re.search(match, done.stderr), done.stderr
  assert "Traceback" not in done.stderr


# Lin et al. 2024, table 1, in billions, counts decoders; it prints 2.0 for
# StableLM's 2.06.
@pytest.mark.parametrize(
  "variant, activated, total",
  [("stablelm", 2.06, 2.9), ("qwen", 2.2, 3.1), ("phi2", 3.6, 5.3)],
)
def test_the_papers_models_have_its_sizes(variant, activated, total):
  config = rundir.plain(small_run.read_config("moe_llava", variant))
  sizes = state.decoder_size(state.model_config(config, "experts"))
  np.testing.assert_allclose(
    np.divide(sizes, 1e9), (activated, total), atol=0.05
  )
