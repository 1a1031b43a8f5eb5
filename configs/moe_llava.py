r"""MoE-LLaVA: whole FFNs as experts, tuned in three stages.

python -m mole_jax.main --config=configs/moe_llava.py --workdir=runs/moe_llava

Stage "projector" (the paper's I) trains the projector, "tuning" (II) all but
the vision tower, "experts" (III) the FFNs and routers, after each FFN of every
second layer has become four experts, exact copies. Lin et al. 2024 (arXiv
2401.15947).

Variants, after a colon: "tiny" (default; embedded data, and a stage "base"
before the others that stands for the pretrained decoder and tower), "stablelm",
"qwen", "phi2", "openchat" (the paper's models and numbers; they need weights
and data that this machine does not bring).
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
  if arg in BACKBONES:
    return paper(arg)
  raise ValueError(
    f"variant {arg!r} is unknown; use one of tiny, {', '.join(BACKBONES)} "
    "(configs/moe_llava.py:phi2, say)."
  )


def tiny() -> mlc.ConfigDict:
  """Minutes on two CPU cores."""
  c = _without_lora("tiny")
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


def paper(variant: str) -> mlc.ConfigDict:
  """The paper's model and numbers.

  config.base.path is what `mole_jax.convert from-hf` makes of the decoder and
  `--vision` CLIP-L/336, with a new projector.
  """
  c = _without_lora("7b")
  c.variant = variant
  c.model.vision.feature_layer = -2
  c.model.decoder.update(BACKBONES[variant])
  c.model.image_token_id = IMAGE_IDS[variant]
  c.base.path = f"weights/{variant}"
  c.data.tokenizer = f"weights/{variant}/tokenizer.json"
  c.data.use_bos = True
  c.data.system = ""
  if variant == "openchat":
    c.data.template = "tokenizer"
  like = c.stages.mole
  like.max_length = 2048
  like.max_images = 1

  c.stage_names = ("projector", "tuning", "experts")
  c.stages = dict(
    projector=_stage(like, PROJECTOR, lr=1e-3, num_steps=558_000 // 256),
    tuning=_stage(like, ALL_BUT_TOWER, lr=2e-5, num_steps=964_000 // 128),
    experts=_stage(like, FFNS_AND_ROUTERS, lr=2e-5, num_steps=665_000 // 128),
  )
  for stage, batch_size, name, data, form in (
    (c.stages.projector, 256, "llava_pretrain", "llava_pretrain", "plain"),
    (c.stages.tuning, 128, "hybrid_ft", "hybrid_ft", "chat"),
    (c.stages.experts, 128, "mix665k", "llava_mix665k", "chat"),
  ):
    stage.batch_size = batch_size
    line = dict(name=f"data/{data}", split="train", format=form, weight=1.0)
    stage.mixture = {name: line}
  c.stages.experts.use_experts = True
  return c


def _without_lora(variant: str) -> mlc.ConfigDict:
  """A variant of configs/mole3.py with full experts in place of LoRA."""
  c = runpy.run_path(str(MOLE3))["get_config"](variant)
  c.name = "moe_llava"
  c.model.moe = dict(EXPERTS)
  c.model.use_visual_tokens = False
  c.model.lora.rank = 0
  c.model.mole.num_experts = 0
  c.balance = dict(loss="moe_llava", weight=1e-2)
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


# As their config.json have them.
BACKBONES = {
  "stablelm": dict(  # stabilityai/stablelm-2-1_6b
    vocab_size=100352,
    hidden_size=2048,
    intermediate_size=5632,
    num_layers=24,
    num_heads=32,
    num_kv_heads=32,
    head_dim=64,
    norm="layer",
    rotary_fraction=0.25,
    attention_bias="qkv",
  ),
  "qwen": dict(  # Qwen/Qwen-1_8B
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=5504,
    num_layers=24,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    norm_eps=1e-6,
    attention_bias="qkv",
    max_position_embeddings=8192,
  ),
  "phi2": dict(  # microsoft/phi-2
    vocab_size=51200,
    hidden_size=2560,
    intermediate_size=10240,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=80,
    norm="layer",
    rotary_fraction=0.4,
    attention_bias="all",
    mlp="gelu",
    is_parallel=True,
    head_bias=True,
    max_position_embeddings=2048,
  ),
  "openchat": dict(  # openchat/openchat_3.5, a Mistral
    vocab_size=32064,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    sliding_window=4096,
    max_position_embeddings=8192,
  ),
}
# Rows of the embedding tables that no token has.
IMAGE_IDS = dict(stablelm=100351, qwen=151935, phi2=51199, openchat=32002)
