r"""MoE-LLaVA: whole FFNs as experts, tuned in three stages.

python -m mole_jax.main --config=configs/moe_llava.py --workdir=runs/moe_llava

Stage "projector" (the paper's I) trains the projector, "tuning" (II) all but
the vision tower, "experts" (III) the FFNs and routers, after each FFN of every
second layer has become four experts, exact copies. Lin et al. 2024 (arXiv
2401.15947).

Variants, after a colon: "tiny" (default; embedded data, and a stage "base"
before the others that stands for the pretrained decoder and tower).
"""

import pathlib
import runpy

import ml_collections as mlc

MOLE3 = pathlib.Path(__file__).with_name("mole3.py")
EXPERTS = dict(
  layers="sparse",
  num_experts=4,
  top_k=2,
  capacity_factor=1.5,
  eval_capacity_factor=2.0,
  capacity_groups=0,
  use_gumbel_noise=False,
  count_padding=False,
  move="auto",
  block_rows=128,
)
# Each stage's trainable parameters, by path.
PROJECTOR = (r"projector/.*",)
ALL_BUT_TOWER = (r"projector/.*", r"decoder/.*")
FFNS_AND_ROUTERS = (r"decoder/layers/(mlp|moe_x\d+)/.*",)


def get_config(arg: str = "tiny") -> mlc.ConfigDict:
  """Returns the configuration of one variant.

  Raises ValueError that names the variants when `arg` is none of them.
  """
  if arg == "tiny":
    return tiny()
  raise ValueError(f"variant {arg!r} is unknown; there is 'tiny'.")


def tiny() -> mlc.ConfigDict:
  """Minutes on two CPU cores."""
  c = runpy.run_path(str(MOLE3))["get_config"]("tiny")
  c.name = "moe_llava"
  c.model.moe = dict(EXPERTS)
  c.model.use_visual_tokens = False
  c.model.lora.rank = 0
  c.model.mole.num_experts = 0
  c.balance = dict(loss="moe_llava", weight=1e-2)
  c.stage_names = ("base", "projector", "tuning", "experts")
  base, adapters = c.stages.base, c.stages.mole
  base.num_steps = 300
  c.stages = dict(
    base=base,
    projector=_stage(base, PROJECTOR, lr=1e-3, num_steps=20),
    tuning=_stage(adapters, ALL_BUT_TOWER, lr=5e-4, num_steps=150),
    experts=_stage(adapters, FFNS_AND_ROUTERS, lr=5e-4, num_steps=150),
  )
  c.stages.experts.use_experts = True
  return c


def _stage(like: mlc.ConfigDict, trainable, lr, num_steps) -> mlc.ConfigDict:
  """A stage that ends in a whole model, with the data of another."""
  stage = like.copy_and_resolve_references()
  stage.use_adapters = False
  stage.use_experts = False
  stage.trainable = trainable
  stage.num_steps = num_steps
  stage.optim.lr = lr
  stage.optim.lr_factors = dict()
  return stage
