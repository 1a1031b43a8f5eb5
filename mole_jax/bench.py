r"""Timings, printed and written as JSON; nothing here asserts one.

python -m mole_jax.bench step --config=configs/mole3.py --steps 20
python -m mole_jax.bench step --config=configs/mole3.py:7b --data synthetic \
  --config.stages.mole.batch_size=8 --config.stages.mole.max_length=2048 \
  --config.stages.mole.max_images=1 --json step.json
python -m mole_jax.bench dispatch --experts 3 8 32
python -m mole_jax.bench compare --config=configs/lora.py --rounds 5
python -m mole_jax.bench curves --config=configs/mole3.py:small --json c.json
python -m mole_jax.bench decode --config=configs/mole3.py
python -m mole_jax.bench decode --config=configs/mole3.py:smol_shape \
  --beside transformers --batch-size 1
python -m mole_jax.bench data --config=configs/mole3.py
python -m mole_jax.bench data --config=configs/mole3.py --beside transformers

`step` times a config's train step: on random weights and batches, which any
config has, and on its data where they are there. `dispatch` times one MLP with
each strategy, beside plain LoRA and the frozen base. `compare` takes turns with
a step of Transformers and PEFT on the same shapes (needs `.[torch]`); `decode
--beside transformers` with its `generate`, without adapters on both sides.
`data --beside transformers`: on one thread each side decodes, pads and resizes
a record's pictures to the same uint8 size and turns its conversation, templated
and images expanded, into ids (ours makes labels too). `curves` lets tokens,
layers, experts and the records of a data set grow, one point a process. MFU is
by the formula in training/flops.py. Exit codes: 0 done; 1 it did not run (out
of memory, say); 2 wrong usage.
"""

import argparse
import datetime
import json
import signal
import sys
from collections.abc import Sequence
from typing import Any

import jax
import rich.console

from mole_jax.timing import (
  arguments,
  beside,
  compare,
  curves,
  decode,
  dispatch,
  machine,
  profile,
  protocol,
  real,
  starts,
  steps,
  synthetic,
  terminal,
)
from mole_jax.timing import sides as sides_lib
from mole_jax.training import command_line, metrics, state

Config = dict[str, Any]
_CONSOLE = rich.console.Console(soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  parser = arguments.make_parser(_RUNS)
  args, rest = parser.parse_known_args(argv)
  try:
    if args.has_config:
      args.config = command_line.read_config(["bench", *rest])
      args.config_arguments = rest
      args.stage = _stage_name(args.config, args.stage)
    elif rest:
      parser.error(f"unrecognized arguments: {' '.join(rest)}")
    found = args.run(args)
    if args.json:
      text = json.dumps(_identity(args) | found, indent=2)
      args.json.write_text(f"{text}\n")
      _CONSOLE.print(f"Written to {args.json}", markup=False)
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except (jax.errors.JaxRuntimeError, metrics.NonFiniteLossError) as error:
    print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
    return 1
  except protocol.SideError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 130
  return 0


def _names_beside(args: argparse.Namespace) -> list[str]:
  """The sides, none without --beside; ValueError for flags that need it."""
  if args.beside:
    return [args.only] if args.only else [beside.OURS, beside.PEER]
  for name in ("only", "sequential"):
    if getattr(args, name):
      raise ValueError(f"--{name} needs --beside {beside.PEER}.")
  return []


def _print_ready(side: str, about: dict[str, Any]) -> None:
  _CONSOLE.print(f"{side} is ready: {about}", markup=False)


def _stage_name(config: Config, name: str | None) -> str:
  name = name or config["stage_names"][-1]
  if name not in config["stages"]:
    raise ValueError(
      f"--stage={name} is none of the config's: {list(config['stages'])}."
    )
  return name


def _identity(args: argparse.Namespace) -> dict[str, Any]:
  """What every JSON begins with."""
  now = datetime.datetime.now(datetime.UTC)
  found = {
    "command": args.command,
    "time": now.isoformat(timespec="seconds"),
    "commit": machine.commit(),
    "machine": machine.describe(),
    "versions": machine.versions(),
  }
  if args.has_config:
    found["config"] = args.config["name"]
    found["variant"] = args.config["variant"]
    found["stage"] = args.stage
    found["arguments"] = args.config_arguments
  return found


def _step(args: argparse.Namespace) -> dict[str, Any]:
  kinds = steps.COMPILATIONS[: 1 if args.skip_warm else 2]
  first_steps = None
  if args.first_step:  # Before this process takes the device: they need it.
    first_steps = starts.first_steps(args.stage, args.config_arguments, kinds)
  stage = sides_lib.make_stage(args)
  batches = steps.synthetic_batches(stage)
  found: dict[str, Any] = {"step": steps.describe(stage)}
  terminal.print_about(_identity(args) | found, _CONSOLE)
  if first_steps:
    found["first_step_seconds"] = first_steps
    terminal.print_first_steps(first_steps, _CONSOLE)
  # In the order of the loop, for the same peaks.
  weights = synthetic.parameters(stage)
  jax.block_until_ready(weights)
  found["memory_of_weights"] = machine.peak_memory(jax.local_devices())
  compiled = steps.compile_step(stage, kinds)
  found["compile_seconds"] = compiled.seconds
  found["predicted_memory"] = compiled.memory
  terminal.print_compiled(found, _CONSOLE)
  run = steps.Run(stage, compiled.step, batches, weights)
  del weights  # The step donates what it trains.
  run.steps(steps.NUM_WARMUP)
  timing = steps.report(stage, run.steps(args.steps))
  found["synthetic"] = {**timing, "losses": list(run.losses)}
  found["memory"] = machine.peak_memory(jax.local_devices())
  found["host_peak_gib"] = machine.gib(machine.peak_rss())
  terminal.print_timing("synthetic data", timing, _CONSOLE)
  terminal.print_memory(found["memory"], _CONSOLE)
  if args.profile:
    found["profile"] = profile.profile(run, compiled.step)
    terminal.print_profile(found["profile"], _CONSOLE)
  if args.data == "both":
    found["real"] = timing = real.time_steps(
      args.config, stage, compiled.step, run.weights(), args.steps
    )
    if "not_there" in timing:
      _CONSOLE.print(f"real data: {timing['not_there']}", markup=False)
    else:
      terminal.print_timing("real data", timing, _CONSOLE)
  return found


def _dispatch(args: argparse.Namespace) -> dict[str, Any]:
  on_cpu = jax.devices()[0].platform == "cpu"
  shape = dispatch.Shape(
    args.hidden,
    args.intermediate,
    args.tokens,
    args.rank,
    args.dtype or ("float32" if on_cpu else "bfloat16"),
  )
  _CONSOLE.print(f"{shape} on {jax.devices()[0].device_kind}", markup=False)
  rows = dispatch.measure(
    shape,
    args.experts,
    args.strategies,
    args.rounds,
    lambda experts, name: _CONSOLE.print(f"compiled {name}, {experts} experts"),
  )
  found = {"rows": rows, "rounds": args.rounds}
  terminal.print_dispatch(found, _CONSOLE)
  return found


def _compare(args: argparse.Namespace) -> dict[str, Any]:
  """Asks for no device before the sides are done: they need it."""
  if args.cores:
    machine.use_cores(args.cores)
  names = [args.only] if args.only else [compare.OURS, compare.PEER]
  peer_arguments = [
    f"--checkpointing={args.peer_checkpointing}",
    f"--adapters={args.peer_adapters}",
  ]
  with compare.sides(
    args.config, args.stage, names, args.config_arguments, peer_arguments
  ) as sides:
    found = compare.take_turns(
      sides,
      args.rounds,
      [args.steps],
      is_sequential=args.sequential,
      on_ready=_print_ready,
    )
  result = {
    "is_sequential": args.sequential,
    **compare.summed_up(args.config, args.stage, found),
  }
  terminal.print_comparison(result, _CONSOLE)
  return result


def _curves(args: argparse.Namespace) -> dict[str, Any]:
  """Asks for no device: its points need it."""
  found = {}
  trainable = args.config["stages"][args.stage]["trainable"]
  for name in dict.fromkeys(args.only):
    done = lambda point, name=name: _CONSOLE.print(
      f"done: {point['size']:,} {name}"
    )
    sizes = getattr(args, name)
    if name == "records":
      found[name] = curves.measure_records(
        sizes, args.stage, args.config_arguments, done
      )
    else:
      found[name] = curves.measure(
        name,
        sizes,
        args.stage,
        args.config_arguments,
        trainable,
        args.steps,
        done,
      )
    terminal.print_curve(name, found[name], _CONSOLE)
  return {"curves": found, "steps": args.steps}


def _decode(args: argparse.Namespace) -> dict[str, Any]:
  names = _names_beside(args)
  if names:
    return _decode_beside(args, names)
  found = decode.measure(
    sides_lib.make_stage(args),
    batch_size=args.batch_size,
    num_prompt=args.prompt_tokens,
    num_images=args.images,
    num_new=args.new_tokens,
    num_rounds=args.rounds,
    is_unrolled=arguments.UNROLLED[args.unrolled],
  )
  terminal.print_decode(found, _CONSOLE)
  return found


def _decode_beside(
  args: argparse.Namespace, names: list[str]
) -> dict[str, Any]:
  """Asks for no device before the sides are done: they need it."""
  shape = {
    key: getattr(args, key)
    for key in ("batch_size", "prompt_tokens", "images", "new_tokens")
  }
  flags = [f"--{k.replace('_', '-')}={value}" for k, value in shape.items()]
  ours = ["--stage", args.stage, "--unrolled", args.unrolled, *flags]
  ours += args.config_arguments
  spec = beside.decode_spec(args.config, shape)
  with beside.sides("decode", names, ours, spec) as sides:
    found = compare.take_turns(
      sides,
      args.rounds,
      [1, args.new_tokens],
      is_sequential=args.sequential,
      on_ready=_print_ready,
    )
  result = beside.decode_summary(shape, found)
  result["is_sequential"] = args.sequential
  terminal.print_decode_beside(result, _CONSOLE)
  return result


def _data(args: argparse.Namespace) -> dict[str, Any]:
  names = _names_beside(args)
  if names:
    return _data_beside(args, names)
  model = state.model_config(args.config, args.stage)
  found = real.time_batches(args.config, args.stage, model, args.batches)
  terminal.print_data(found, _CONSOLE)
  return found


def _data_beside(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
  """One process and one thread on either side."""
  rows = beside.data_records(args.config, args.stage, args.records)
  ours = ["--stage", args.stage, f"--records={len(rows)}"]
  ours += args.config_arguments
  model = state.model_config(args.config, args.stage)
  spec = beside.data_spec(args.config, model.num_image_tokens, rows)
  with beside.sides("data", names, ours, spec) as sides:
    found = compare.take_turns(
      sides,
      args.rounds,
      [len(rows)],
      is_sequential=args.sequential,
      on_ready=_print_ready,
    )
  result = beside.data_summary(len(rows), found)
  result["is_sequential"] = args.sequential
  terminal.print_data_beside(result, _CONSOLE)
  return result


_RUNS: dict[str, arguments.Run] = {
  "step": _step,
  "dispatch": _dispatch,
  "compare": _compare,
  "curves": _curves,
  "decode": _decode,
  "data": _data,
  "worker": sides_lib.worker,
  "decode-worker": sides_lib.decode_worker,
  "data-worker": sides_lib.data_worker,
  "starter": sides_lib.starter,
  "opening": sides_lib.open_set,
}

if __name__ == "__main__":
  # Told to end it leaves neither sides nor files behind, as after Ctrl-C.
  signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
  sys.exit(main())
