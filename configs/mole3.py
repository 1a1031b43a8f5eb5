r"""LLaVA-MoLE: three LoRA experts on three domains that disagree.

python -m mole_jax.main --config=configs/mole3.py --workdir=runs/mole3

11 minutes on 2 CPU cores; accuracy general / document / biomedical, mean of
seeds 0, 1, 2: 53.8 / 35.6 / 49.0, average 46.1 (the commonest answer 26.7,
blank images 17.8), at commit 6e8d6e0.

Variants, after a colon: "tiny" (default; embedded data, a base model trained
on the spot), "smol" (SmolLM2-135M and DINOv2-S, real weights converted to
weights/smol, the embedded data), "7b" and "13b" (LLaVA-1.5 with Vicuna, the
paper's numbers; they need weights and data that this machine does not bring),
"small" (shapes between these and tiny, for `mole_jax.bench` on a CPU),
"smol_shape" (SmolLM2-135M's shapes under the tower of "small", likewise), or a
directory that `python -m mole_jax.convert from-hf` wrote (your weights, the
embedded data), or a stage of a run.
"""

import json
import pathlib

import ml_collections as mlc

VARIANTS = ("tiny", "small", "smol_shape", "smol", "7b", "13b")
SMOL = "weights/smol"

SYSTEM = (
  "A chat between a curious user and an artificial intelligence assistant. "
  "The assistant gives helpful, detailed, and polite answers to the user's "
  "questions."
)
DOMAINS = ("general", "document", "biomedical")


def get_config(arg: str = "tiny") -> mlc.ConfigDict:
  """Returns the configuration of one variant.

  Raises ValueError that names the variants when `arg` is none of them.
  """
  if arg == "tiny":
    return tiny()
  if arg == "small":
    return small()
  if arg == "smol_shape":
    return smol_shape()
  if arg == "smol":
    return smol()
  if arg in VARIANTS:
    return paper(arg)
  about = pathlib.Path(arg) / "base.json"
  if not about.is_file():
    raise ValueError(
      f"variant {arg!r} is unknown; use one of {', '.join(VARIANTS)} "
      "(configs/mole3.py:7b, say), or a directory with a base, converted or "
      "of a run (configs/mole3.py:runs/moe_llava/tuning)."
    )
  about = json.loads(about.read_text())
  return converted(arg, about) if "model" in about else trained(arg)


def tiny() -> mlc.ConfigDict:
  """Minutes on two CPU cores."""
  c = mlc.ConfigDict()
  c.name = "mole3"
  c.variant = "tiny"
  c.seed = 0
  c.mesh = dict(data=-1, fsdp=1, expert=1, tensor=1)
  c.model = dict(
    vision=dict(
      family="clip",
      image_size=48,
      patch_size=8,
      hidden_size=128,
      intermediate_size=512,
      num_layers=4,
      num_heads=4,
      hidden_act="quick_gelu",
      layer_norm_eps=1e-5,
      position_grid=0,
      feature_layer=-1,
    ),
    decoder=dict(
      vocab_size=1152,
      hidden_size=128,
      intermediate_size=352,
      num_layers=4,
      num_heads=4,
      num_kv_heads=2,
      head_dim=32,
      norm="rms",
      norm_eps=1e-5,
      rope_theta=10000.0,
      rotary_fraction=1.0,
      attention_bias="none",
      mlp="swiglu",
      is_parallel=False,
      head_bias=False,
      sliding_window=0,
      max_position_embeddings=4096,
      tie_word_embeddings=False,
    ),
    lora=dict(rank=4, alpha=8.0, dropout=0.0),
    mole=dict(
      num_experts=3,
      top_k=1,
      rank=4,
      alpha=8.0,
      dropout=0.0,
      gate="none",
      router_scope="layer",
      dispatch="auto",
      block_rows=64,
    ),
    image_token_id=3,
    use_visual_tokens=True,
    remat="none",
    dtype="float32",
  )
  c.balance = dict(loss="pooled", weight=1e-2)
  c.data = dict(
    domains=DOMAINS,
    tokenizer="embedded",
    template="vicuna",
    system="",
    use_bos=True,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
    image_resample="bicubic",
    # "packed": rows of several samples; "modality": one a row, batches with
    # images or without, of about equal lengths (LLaVA's way).
    batching="packed",
    # "cached": a stage that freezes the vision tower reads what it makes of
    # the images, kept beside the data; "none": every stage reads pixels.
    features="none",
    max_skipped=1e-3,  # Share of a data set that may be bad; above it, stop.
    num_workers=0,
  )
  # A base that stands already: its directory, and what its hash must be ("":
  # not checked). Without one the stage "base" below makes it.
  c.base = dict(path="", sha256="", dtype="float32")
  c.stage_names = ("base", "mole")
  c.stages = dict(
    base=dict(
      mixture=dict(
        general_captions=_source("general", "plain", 1.0),
        document_captions=_source("document", "plain", 1.0),
        biomedical_captions=_source("biomedical", "plain", 1.0),
        general=_source("general", "chat", 1.0),
      ),
      use_adapters=False,
      trainable=(r".*",),
      num_steps=450,
      batch_size=16,
      max_length=256,
      max_images=4,
      max_segments=8,
      optim=dict(
        lr=1e-3,
        lr_factors=dict(),
        warmup_ratio=0.05,
        b1=0.9,
        b2=0.98,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
      ),
      log_every=10,
      checkpoint_every=150,
      max_checkpoints=2,
    ),
    mole=dict(
      mixture={d: _source(d, "chat", 1.0) for d in DOMAINS},
      use_adapters=True,
      trainable=(
        r".*/lora_[ab]",
        r".*/router/.*",
        r"projector/.*",
        r"visual_(start|end)",
      ),
      # "int8": the frozen decoder's kernels take 8 bits on the devices.
      quantize="none",
      num_steps=300,
      batch_size=16,
      max_length=272,
      max_images=4,
      max_segments=8,
      optim=dict(
        lr=2e-3,
        lr_factors={"projector": 0.1},
        warmup_ratio=0.05,
        b1=0.9,
        b2=0.98,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
      ),
      log_every=10,
      checkpoint_every=100,
      max_checkpoints=2,
    ),
  )
  c.evaluation = dict(
    datasets={d: f"embedded/{d}" for d in DOMAINS},
    split="test",
    batch_size=128,
    max_new_tokens=12,
    max_questions=0,  # In each domain; 0 asks all.
  )
  return c


def small() -> mlc.ConfigDict:
  """Shapes that tell on a CPU what a step costs; there are no such weights."""
  c = tiny()
  c.variant = "small"
  c.model.vision.update(
    image_size=112,
    patch_size=14,
    hidden_size=256,
    intermediate_size=1024,
    num_layers=6,
    num_heads=4,
    feature_layer=-2,
  )
  c.model.decoder.update(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1376,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
  )
  c.model.lora = dict(rank=32, alpha=64.0, dropout=0.0)
  c.model.mole.update(dict(rank=32, alpha=64.0, dropout=0.0))
  c.model.image_token_id = 8191
  c.model.remat = "named"
  c.base.path = "weights/small"
  c.stage_names = ("mole",)
  stage = c.stages.mole
  c.stages = dict(mole=stage)
  _set_visual_tokens(c, False)
  stage.batch_size = 4
  stage.max_length = 256
  stage.max_images = 1
  return c


def smol_shape() -> mlc.ConfigDict:
  """SmolLM2-135M's decoder under the tower of `small`; no such weights."""
  c = small()
  c.variant = "smol_shape"
  c.model.decoder.update(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    norm_eps=1e-5,
    rope_theta=100000.0,
    tie_word_embeddings=True,
  )
  c.model.image_token_id = 49151
  c.base.path = "weights/smol_shape"
  return c


def paper(variant: str) -> mlc.ConfigDict:
  """LLaVA-1.5 7B or 13B with the numbers of the paper and its release."""
  c = tiny()
  c.variant = variant
  c.model.vision = dict(
    family="clip",
    image_size=336,
    patch_size=14,
    hidden_size=1024,
    intermediate_size=4096,
    num_layers=24,
    num_heads=16,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    position_grid=0,
    feature_layer=-1,
  )
  is_7b = variant == "7b"
  c.model.decoder = dict(
    vocab_size=32064,
    hidden_size=4096 if is_7b else 5120,
    intermediate_size=11008 if is_7b else 13824,
    num_layers=32 if is_7b else 40,
    num_heads=32 if is_7b else 40,
    num_kv_heads=32 if is_7b else 40,
    head_dim=128,
    norm="rms",
    norm_eps=1e-5,
    rope_theta=10000.0,
    rotary_fraction=1.0,
    attention_bias="none",
    mlp="swiglu",
    is_parallel=False,
    head_bias=False,
    sliding_window=0,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
  )
  c.model.lora = dict(rank=32, alpha=64.0, dropout=0.05)
  c.model.mole.update(dict(rank=32, alpha=64.0, dropout=0.05))
  c.model.image_token_id = 32000
  c.model.remat = "named"
  c.model.dtype = "bfloat16"
  c.data.tokenizer = "weights/vicuna/tokenizer.json"
  c.data.system = SYSTEM
  c.data.use_bos = False
  c.base.path = f"weights/llava-1.5-{variant}"
  c.base.dtype = "bfloat16"
  c.stage_names = ("mole",)
  stage = c.stages.mole
  c.stages = dict(mole=stage)
  # Built by `prepare build --recipe NAME --name NAME --out data`; the paper
  # gives 2.3, 1.1 and 0.4 million samples by domain, PathVQA about 20 times.
  stage.mixture = dict(
    m3it=_prepared("m3it", 1.6e6),
    sharegpt4v=_prepared("sharegpt4v_finetune", 0.7e6),
    ureader=_prepared("ureader", 1.1e6),
    pathvqa=_prepared("pathvqa", 0.4e6),
  )
  c.data.batching = "modality"  # One sample a row, so 64 samples a batch.
  stage.num_steps = 59375  # 3.8 million samples in batches of 64, once.
  stage.batch_size = 64
  stage.max_length = 4096
  stage.max_images = 8
  stage.max_segments = 1
  stage.optim.lr = 2e-5
  stage.optim.lr_factors = dict()
  stage.optim.warmup_ratio = 0.03
  stage.optim.b2 = 0.999
  stage.checkpoint_every = 1000
  c.evaluation.batch_size = 16
  c.evaluation.max_new_tokens = 256
  return c


def trained(path: str) -> mlc.ConfigDict:
  """What a stage of a run left, such as runs/moe_llava/tuning."""
  folder = pathlib.Path(path)
  file = folder.parent / "config.json"
  if not file.is_file():
    raise ValueError(
      f"the base in {path} was trained by a run, and {file}, which says what "
      "model it is, is not there; leave it in its run."
    )
  run = json.loads(file.read_text())
  model = dict(run["model"])
  if not run["stages"].get(folder.name, {}).get("use_experts", False):
    model.pop("moe", None)
  c = _on_base(path, model, run["data"])
  c.base.dtype = run["base"]["dtype"]
  return c


def converted(path: str, about: dict) -> mlc.ConfigDict:
  """Weights that `mole_jax.convert from-hf` wrote, on the embedded data.

  Adapters that came with them are trained on.
  """
  model, data = about["model"], about["config"]["data"]
  c = _on_base(path, model, data | {"tokenizer": f"{path}/tokenizer.json"})
  c.model.lora = dict(rank=32, alpha=64.0, dropout=0.05)
  c.model.mole.update(dict(rank=32, alpha=64.0, dropout=0.05))
  if model.get("lora", {}).get("rank"):
    c.model.lora.update(model["lora"])
  if model.get("mole", {}).get("num_experts"):
    c.model.mole.update(model["mole"])
  c.model.remat = "named"
  stage, vision = c.stages.mole, c.model.vision
  num_patches = (vision.image_size // vision.patch_size) ** 2
  stage.max_length = 4 * (num_patches + 2) + 256
  stage.optim.lr = 2e-4  # LLaVA-1.5's for LoRA.
  stage.optim.warmup_ratio = 0.03
  c.evaluation.batch_size = 32
  c.evaluation.max_new_tokens = 24
  return c


def _on_base(path: str, model: dict, data: dict) -> mlc.ConfigDict:
  """The tiny variant's adapters and data on a base of this model.

  `data`: `config.data` of whoever made it.
  """
  c = tiny()
  c.variant = path
  c.model.vision = model["vision"]
  c.model.decoder = model["decoder"]
  # A base converted without a tokenizer has no id for images.
  c.model.image_token_id = model.get("image_token_id", 32000)
  c.base.path = path
  c.stage_names = ("mole",)
  c.stages = dict(mole=c.stages.mole)
  _set_visual_tokens(c, model["use_visual_tokens"])
  stage = c.stages.mole
  if "moe" in model:  # Whole FFNs as experts: each gets a LoRA of its own.
    c.model.moe = model["moe"]
    c.balance = dict(loss="moe_llava", weight=1e-2)
    stage.use_experts = True
  for key in (
    "tokenizer",
    "template",
    "system",
    "use_bos",
    "image_mean",
    "image_std",
    "image_resample",
  ):
    c.data[key] = data[key]
  return c


def _set_visual_tokens(c: mlc.ConfigDict, are_there: bool) -> None:
  """Whether vectors enclose a picture; stage "mole" trains what is there."""
  c.model.use_visual_tokens = are_there
  stage = c.stages.mole
  if not are_there:
    stage.trainable = tuple(p for p in stage.trainable if "visual" not in p)


def smol() -> mlc.ConfigDict:
  """Two real models under a new projector.

  The projector learns from nothing, hence five times the rate of the adapters;
  pictures of 112 pixels are 64 patches of DINOv2, whose positions are
  interpolated.
  """
  about = pathlib.Path(SMOL) / "base.json"
  if not about.is_file():
    raise ValueError(
      f"variant 'smol' needs converted weights in {SMOL}; make them with "
      "python -m mole_jax.convert from-hf --src SMOLLM2 --vision DINOV2 --out "
      f"{SMOL}, the folders of SmolLM2-135M-Instruct and DINOv2-small."
    )
  c = converted(SMOL, json.loads(about.read_text()))
  c.variant = "smol"
  c.model.vision.image_size = 112
  c.model.lora = dict(rank=8, alpha=16.0, dropout=0.0)
  c.model.mole.update(dict(rank=8, alpha=16.0, dropout=0.0))
  stage = c.stages.mole
  stage.max_length = 512
  stage.max_images = 3
  stage.batch_size = 3
  stage.num_steps = 200
  stage.optim.lr_factors = {"projector": 5.0}
  stage.checkpoint_every = 50
  c.evaluation.max_questions = 200
  return c


def _source(domain: str, format: str, weight: float) -> dict:
  """A data set of a mixture; weights are shares of samples, not of tokens."""
  return dict(
    name=f"embedded/{domain}", split="train", format=format, weight=weight
  )


def _prepared(domain: str, weight: float) -> dict:
  return dict(
    name=f"data/{domain}", split="train", format="chat", weight=weight
  )
