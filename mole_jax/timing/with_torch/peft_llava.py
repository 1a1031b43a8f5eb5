"""The step that a user would take instead: Transformers, PEFT and AdamW.

A LLaVA of the same shapes with random weights on the same batch: frozen tower
and Llama, projector trained, LoRA on every linear map of the decoder. With
more than one expert, the MLPs get a top-1 mixture of LoRA experts dispatched by
an index loop, as published PyTorch mixtures do it (PEFT has none).

Run by `bench compare`; answers through timing/protocol.py.
"""

import argparse
import contextlib
import json
import math
import pathlib
import time
from typing import Any

import peft
import torch
import transformers
from torch import nn

from mole_jax.timing import protocol
from mole_jax.timing.with_torch import llava

CHECKPOINTING = ("auto", "off", "on")


class MoleMlp(nn.Module):
  """A frozen SwiGLU MLP with a router and top-1 LoRA experts."""

  def __init__(self, mlp: nn.Module, num_experts: int, rank: int, alpha: float):
    super().__init__()
    self.base, self.scale = mlp, alpha / rank
    where = dict(device=mlp.gate_proj.weight.device, dtype=torch.float32)
    width = mlp.gate_proj.in_features
    self.router = nn.Linear(width, num_experts, **where)
    self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
    for name in ("gate_proj", "up_proj", "down_proj"):
      linear = getattr(mlp, name)
      bound = 1 / math.sqrt(linear.in_features)
      a = torch.empty(num_experts, linear.in_features, rank, **where)
      b = torch.zeros(num_experts, rank, linear.out_features, **where)
      self.a[name] = nn.Parameter(a.uniform_(-bound, bound))
      self.b[name] = nn.Parameter(b)

  def _linear(self, name: str, x: torch.Tensor, rows: list) -> torch.Tensor:
    y = getattr(self.base, name)(x)
    delta = torch.zeros_like(y)
    for expert, row in enumerate(rows):
      z = x[row] @ self.a[name][expert].to(x.dtype)
      z = self.scale * z @ self.b[name][expert].to(x.dtype)
      delta[row] = z.to(delta.dtype)
    return y + delta

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    self.probs = self.router(x.to(self.router.weight.dtype)).softmax(-1)
    chosen = self.probs.argmax(-1)
    rows = [torch.where(chosen == e) for e in range(self.probs.shape[-1])]
    gate = self.base.act_fn(self._linear("gate_proj", x, rows))
    hidden = gate * self._linear("up_proj", x, rows)
    return self._linear("down_proj", hidden, rows)


class Peer:
  """The model, its optimizer and its batch."""

  def __init__(self, spec: dict[str, Any], adapters: str, device: str):
    torch.manual_seed(0)
    self.spec, self.device = spec, torch.device(device)
    self.is_half = spec["dtype"] == "bfloat16"
    self.model = llava.make_model(spec, self.device)
    num_experts = spec["mole"]["num_experts"]
    linears = "q_proj|k_proj|v_proj|o_proj"
    if num_experts == 1:
      linears += "|gate_proj|up_proj|down_proj"
    lora = peft.LoraConfig(
      r=spec["lora"]["rank"],
      lora_alpha=spec["lora"]["alpha"],
      lora_dropout=spec["lora"]["dropout"],
      target_modules=rf".*language_model.*\.({linears})",
      modules_to_save=["multi_modal_projector"],
    )
    self.model = peft.get_peft_model(
      self.model, lora, autocast_adapter_dtype=adapters == "float32"
    )
    self.mixtures = []
    if num_experts > 1:
      decoder = self.model.base_model.model.model.language_model
      mole = spec["mole"]
      for layer in decoder.layers:
        layer.mlp = MoleMlp(layer.mlp, num_experts, mole["rank"], mole["alpha"])
        self.mixtures.append(layer.mlp)
    if adapters == "bfloat16":
      self.model.to(torch.bfloat16)
    # float32 adapters in a half-precision model: as Trainer's bf16=True.
    self.uses_autocast = self.is_half and adapters == "float32"
    self.trained = [p for p in self.model.parameters() if p.requires_grad]
    optim = spec["optim"]
    self.optimizer = torch.optim.AdamW(
      self.trained,
      lr=optim["lr"],
      betas=(optim["b1"], optim["b2"]),
      eps=optim["eps"],
      weight_decay=optim["weight_decay"],
      fused=self.device.type == "cuda",
    )
    self.model.train()
    self.batch = _make_batch(spec, self.device)

  def checkpoint(self) -> None:
    """Turns on gradient checkpointing."""
    self.model.gradient_checkpointing_enable(
      gradient_checkpointing_kwargs={"use_reentrant": False}
    )

  def step(self) -> float:
    """One step; returns the loss, when all work is done."""
    context = contextlib.nullcontext()
    if self.uses_autocast:
      context = torch.autocast(self.device.type, torch.bfloat16)
    with context:
      loss = self.model(**self.batch).loss
      total = loss
      for mixture in self.mixtures:
        probs = mixture.probs.flatten(0, 1)
        chosen = nn.functional.one_hot(probs.argmax(-1), probs.shape[-1])
        balance = (probs.mean(0) * chosen.float().mean(0)).sum()
        total = total + self.spec["balance_weight"] * balance / len(
          self.mixtures
        )
    total.backward()
    clip_norm = self.spec["optim"]["clip_norm"]
    nn.utils.clip_grad_norm_(self.trained, clip_norm)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())  # Waits for the device.


def _make_batch(
  spec: dict[str, Any], device: torch.device
) -> dict[str, torch.Tensor]:
  """Every token but the images' is learnt."""
  sizes = [spec[key] for key in ("batch_size", "max_length", "max_images")]
  batch = llava.make_inputs(spec, *sizes, device)
  ids = batch["input_ids"]
  batch["labels"] = ids.masked_fill(ids == spec["image_token_id"], -100)
  return batch


def warm_up(peer: Peer, checkpointing: str, num_steps: int) -> str:
  """First steps; says whether checkpointing is on.

  "auto" turns it on where the device's memory does not suffice without.
  """
  if checkpointing == "on":
    peer.checkpoint()
  try:
    for _ in range(num_steps):
      peer.step()
    return "on" if checkpointing == "on" else "off"
  except torch.OutOfMemoryError:
    if checkpointing != "auto":
      raise
  # Out of the handler, whose traceback would hold the tensors.
  peer.optimizer.zero_grad(set_to_none=True)
  torch.cuda.empty_cache()
  torch.cuda.reset_peak_memory_stats()
  return warm_up(peer, "on", num_steps)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--spec", type=pathlib.Path, required=True)
  parser.add_argument("--checkpointing", choices=CHECKPOINTING, default="auto")
  parser.add_argument("--adapters", default="float32")
  parser.add_argument("--warmup", type=int, default=3)
  args = parser.parse_args()
  llava.use_cores()
  device = "cuda" if torch.cuda.is_available() else "cpu"
  began = time.perf_counter()
  peer = Peer(json.loads(args.spec.read_text()), args.adapters, device)
  checkpointing = warm_up(peer, args.checkpointing, args.warmup)
  count = lambda params: sum(p.numel() for p in params)
  about = {
    "program": "transformers + peft",
    "checkpointing": checkpointing,
    "adapters": args.adapters,
    "attention": "sdpa",
    "threads": torch.get_num_threads(),
    "device_kind": "cpu" if device == "cpu" else torch.cuda.get_device_name(),
    "trainable_parameters": count(peer.trained),
    "parameters": count(peer.model.parameters()),
    "ready_seconds": time.perf_counter() - began,
    "versions": {
      "torch": torch.__version__,
      "transformers": transformers.__version__,
      "peft": peft.__version__,
    },
  }

  def steps(number: int) -> dict[str, list[float]]:
    seconds, losses = [], []
    for _ in range(number):
      began = time.perf_counter()
      losses.append(peer.step())
      seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "losses": losses}

  last = lambda: llava.peak_memory(peer.device)
  protocol.serve(about, steps, last)


if __name__ == "__main__":
  main()
