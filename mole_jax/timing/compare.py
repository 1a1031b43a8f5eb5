"""Our step beside that of Transformers and PEFT, on the same shapes.

Each side runs in a process of its own on the same cores. On a CPU both stay
and take turns, so that a busy neighbour slows both; a GPU that holds only one
of them takes one after the other.
"""

import contextlib
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mole_jax.models import decoder
from mole_jax.timing import clock, protocol
from mole_jax.training import flops, state

OURS, PEER = "mole_jax", "peft"
PROGRAM = "mole_jax.timing.with_torch.peft_llava"
# The decoder that the peer builds.
LLAMA = {
  "norm": "rms",
  "rotary_fraction": 1.0,
  "attention_bias": "none",
  "mlp": "swiglu",
  "is_parallel": False,
  "head_bias": False,
}


def unlike_llava(model: Mapping[str, Any]) -> str | None:
  """What a section `model` has that no LLaVA of the peers has."""
  shape = decoder.DecoderConfig(**model["decoder"])
  unlike = [k for k, value in LLAMA.items() if getattr(shape, k) != value]
  if model["vision"]["family"] != "clip":
    return f"has a {model['vision']['family']} tower"
  if unlike:
    return f"has a decoder that is no Llama ({', '.join(unlike)})"
  return None


def peer_spec(config: Mapping[str, Any], stage_name: str) -> dict[str, Any]:
  """What the peer builds; ValueError for what it cannot."""
  stage, model = config["stages"][stage_name], config["model"]
  mole, lora = model["mole"], model["lora"]
  unlike, problem = unlike_llava(model), None
  if not stage["use_adapters"] or not mole["num_experts"]:
    problem = "trains no adapters"
  elif stage.get("use_experts", False):
    problem = "has whole FFNs as experts"
  elif unlike:
    problem = unlike
  elif mole["num_experts"] > 1 and mole["top_k"] > 1:
    problem = f"uses {mole['top_k']} experts a token"
  elif mole["num_experts"] == 1 and (lora["rank"], lora["alpha"]) != (
    mole["rank"],
    mole["alpha"],
  ):
    problem = "has LoRA of another rank or alpha in its MLPs"
  if problem:
    raise ValueError(
      f"stage {stage_name!r} {problem}, which the peer does not; compare a "
      "stage with plain LoRA or a top-1 mixture, such as configs/lora.py."
    )
  return {
    **{key: model[key] for key in ("vision", "decoder", "lora", "mole")},
    **{key: stage[key] for key in ("batch_size", "max_length", "max_images")},
    "image_token_id": model["image_token_id"],
    "dtype": model["dtype"],
    "optim": stage["optim"],
    "balance_weight": config["balance"]["weight"],
  }


@contextlib.contextmanager
def sides(
  config: Mapping[str, Any],
  stage_name: str,
  names: Sequence[str],
  config_arguments: Sequence[str],
  peer_arguments: Sequence[str],
) -> Iterator[list[protocol.Side]]:
  """The commands of `names`, for as long as their files last."""
  with tempfile.TemporaryDirectory(prefix="mole_jax-compare-") as folder:
    commands = {}
    if OURS in names:
      commands[OURS] = ["mole_jax.bench", "worker", "--stage", stage_name]
      commands[OURS] += config_arguments
    if PEER in names:
      spec = pathlib.Path(folder) / "spec.json"
      spec.write_text(json.dumps(peer_spec(config, stage_name)))
      commands[PEER] = [PROGRAM, "--spec", str(spec), *peer_arguments]
    yield [
      protocol.Side(name, [sys.executable, "-m", *commands[name]])
      for name in names
    ]


def take_turns(
  sides: Sequence[protocol.Side],
  num_rounds: int,
  turns: Sequence[int],
  *,
  is_sequential: bool,
  on_ready: Callable[[str, Mapping[str, Any]], None],
) -> dict[str, dict[str, Any]]:
  """Runs the sides; what each says, and its seconds by round.

  In a round a side is told each number of `turns`, one after another.
  Raises protocol.SideError where a side fails.
  """
  found: dict[str, dict[str, Any]] = {}

  def start(stack: contextlib.ExitStack, side: protocol.Side):
    process = stack.enter_context(protocol.running(side))
    on_ready(side.name, process.about)
    found[side.name] = {**process.about, "rounds": [], "losses": []}
    return process

  def turn(name: str, process: protocol.Process) -> None:
    answers = [process.steps(count) for count in turns]
    found[name]["rounds"].append([s for one in answers for s in one["seconds"]])
    found[name]["losses"] += [x for one in answers for x in one["losses"]]

  if is_sequential:
    for side in sides:
      with contextlib.ExitStack() as stack:
        process = start(stack, side)
        for _ in range(num_rounds):
          turn(side.name, process)
        found[side.name] |= process.stop()
  else:
    with contextlib.ExitStack() as stack:
      processes = {side.name: start(stack, side) for side in sides}
      for _ in range(num_rounds):
        for name, process in processes.items():
          turn(name, process)
      for name, process in processes.items():
        found[name] |= process.stop()
  return found


def summed_up(
  config: Mapping[str, Any],
  stage_name: str,
  found: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
  """Seconds, tokens and FLOP/s of each side; their ratio by round."""
  stage = config["stages"][stage_name]
  model = state.model_config(config, stage_name)
  shapes = state.parameter_shapes(model)
  trained, _ = state.split(shapes, stage["trainable"])
  shape = [stage[key] for key in ("batch_size", "max_length", "max_images")]
  step_flops = flops.step_flops(model, trained, *shape)
  result: dict[str, Any] = {"flops": step_flops, "sides": {}}
  for name, side in found.items():
    seconds = clock.summary([s for row in side["rounds"] for s in row])
    result["sides"][name] = {
      **side,
      "step_seconds": seconds,
      "tokens_per_second": shape[0] * shape[1] / seconds["median"],
      "tflops_per_second": step_flops / seconds["median"] / 1e12,
    }
  if OURS in found and PEER in found:
    by_round = [
      [clock.summary(row)["median"] for row in found[name]["rounds"]]
      for name in (PEER, OURS)
    ]
    # Above 1: ours is faster.
    result["peer_over_ours"] = clock.ratio(*by_round)
  return result
