"""Runs an exported model in PyTorch and stores what comes out.

python -m mole_jax.interop.with_torch.run_model FOLDER INPUTS.npz OUT.npz
    [--base FOLDER]

A program of its own, so that PyTorch is never loaded beside JAX. INPUTS has
input_ids and attention_mask int[B, T], pixel_values float[N, 3, Y, X] in order
of appearance, probe_ids int[T] of one row whose layers are told apart, and
num_new_tokens. Everything is computed in float32.

The folder's own modeling files are executed: the caller vouches for them.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np
import torch
import transformers


def load(folder: pathlib.Path, base: str | None) -> tuple[Any, dict[str, Any]]:
  """The model in float32, and what Transformers said while loading it."""
  if (folder / "adapter_config.json").exists():
    import peft

    stock = transformers.LlavaForConditionalGeneration.from_pretrained(
      base, dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(stock, folder)
    # Wrong names only warn in PEFT: compare them.
    stored = {
      name for name in _names(folder) if not name.endswith("position_ids")
    }
    used = set(peft.get_peft_model_state_dict(model))
    info = {
      "missing_keys": sorted(used - stored),
      "unexpected_keys": sorted(stored - used),
    }
    return model.merge_and_unload(), info
  values = json.loads((folder / "config.json").read_text())
  options = dict(dtype=torch.float32, output_loading_info=True)
  if values["model_type"] == "llava":
    kind = transformers.LlavaForConditionalGeneration
    return kind.from_pretrained(folder, **options)
  kind = transformers.AutoModelForImageTextToText
  if values.get("base_name"):
    options["base"] = base
  return kind.from_pretrained(folder, trust_remote_code=True, **options)


def _names(folder: pathlib.Path) -> list[str]:
  from safetensors import safe_open

  names = []
  for file in folder.glob("*.safetensors"):
    with safe_open(file, "pt") as opened:
      names += list(opened.keys())
  return names


def run(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Features, logits, hidden states of the probe, routing, greedy tokens."""
  ids = torch.from_numpy(inputs["input_ids"]).long()
  mask = torch.from_numpy(inputs["attention_mask"]).long()
  pixels = torch.from_numpy(inputs["pixel_values"])
  probe = torch.from_numpy(inputs["probe_ids"]).long()[None]
  results = {}
  gates = _watched_gates(model)
  with torch.no_grad():
    features = model.get_image_features(pixels).pooler_output
    results["features"] = torch.stack(list(features)).numpy()
    results["logits"] = model(
      input_ids=ids, attention_mask=mask, pixel_values=pixels
    ).logits.numpy()
    if hasattr(model, "routing"):
      routing = model.routing()
    else:
      routing = _routing(gates, ids.shape)
    if routing is not None:
      results["chosen"], results["probs"] = (x.numpy() for x in routing)
    states = model(
      input_ids=probe, pixel_values=pixels[:1], output_hidden_states=True
    ).hidden_states
    results["hidden"] = torch.stack([state[0] for state in states]).numpy()
    model.generation_config.eos_token_id = None  # All tokens are compared.
    made = model.generate(
      input_ids=probe,
      pixel_values=pixels[:1],
      attention_mask=torch.ones_like(probe),
      max_new_tokens=int(inputs["num_new_tokens"]),
      do_sample=False,
      repetition_penalty=1.0,
    )
    results["greedy"] = made[0, probe.shape[1] :].numpy()
  return results


def _watched_gates(model: Any) -> list[Any]:
  """Mixtral's routers, each of which keeps its latest output as `seen`."""
  gates = [
    module
    for module in model.modules()
    if type(module).__name__ == "MixtralTopKRouter"
  ]

  def keep(gate, _, output):
    gate.seen = output

  for gate in gates:
    gate.register_forward_hook(keep)
  return gates


def _routing(
  gates: list[Any], rows: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor] | None:
  """Experts of the latest call: chosen [layer, B, T, k], probs [..., E]."""
  if not gates:
    return None
  logits, _, chosen = zip(*(gate.seen for gate in gates), strict=True)
  return tuple(
    torch.stack([x.reshape(*rows, -1) for x in of_layers])
    for of_layers in (chosen, [x.float().softmax(-1) for x in logits])
  )


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("inputs", type=pathlib.Path)
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("--base")
  args = parser.parse_args()
  model, info = load(args.folder, args.base)
  with np.load(args.inputs) as inputs:
    results = run(model.eval(), dict(inputs))
  about = {
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "missing": sorted(map(str, info["missing_keys"])),
    "unexpected": sorted(map(str, info["unexpected_keys"])),
  }
  np.savez(args.out, about=np.array(json.dumps(about)), **results)
  return 0


if __name__ == "__main__":
  sys.exit(main())
