"""Programs that other processes of `bench` start: sides, and points."""

import argparse
import time
from typing import Any

import jax

from mole_jax.parallel import mesh as mesh_lib
from mole_jax.timing import (
  arguments,
  beside,
  decode,
  machine,
  opening,
  protocol,
  steps,
  synthetic,
)
from mole_jax.training import stage as stage_lib
from mole_jax.training import state


def make_stage(args: argparse.Namespace) -> stage_lib.Stage:
  """The stage that the arguments name, on the mesh of their config."""
  mesh = mesh_lib.make_mesh(args.config["mesh"])
  return stage_lib.Stage(args.config, args.stage, mesh)


def _memory() -> dict[str, Any]:
  """What a side says last."""
  return {"memory": machine.peak_memory(jax.local_devices())}


def worker(args: argparse.Namespace) -> dict[str, Any]:
  """Our side of `compare`: steps, as many as it is asked for."""
  stage = make_stage(args)
  batches = steps.synthetic_batches(stage)
  weights = synthetic.parameters(stage)
  compiled = steps.compile_step(stage)
  run = steps.Run(stage, compiled.step, batches, weights)
  del weights
  run.steps(steps.NUM_WARMUP)
  about = {
    "program": "mole_jax",
    "compile_seconds": compiled.seconds,
    "predicted_memory": compiled.memory,
    "device_kind": jax.devices()[0].device_kind,
    "remat": stage.model_config.remat,
    "versions": machine.versions(),
  }

  def timed(count):
    begun = len(run.losses)
    seconds = run.steps(count)["seconds"]
    return {"seconds": seconds, "losses": run.losses[begun:]}

  protocol.serve(about, timed, _memory)
  return {}


def decode_worker(args: argparse.Namespace) -> dict[str, Any]:
  """Our side of `decode --beside`: answers of so many tokens."""
  args.config = beside.without_adapters(args.config, args.stage)
  timed = decode.answering(
    make_stage(args),
    batch_size=args.batch_size,
    num_prompt=args.prompt_tokens,
    num_images=args.images,
    is_unrolled=arguments.UNROLLED[args.unrolled],
  )
  about = {
    "program": "mole_jax",
    "first_call_seconds": [timed(1), timed(args.new_tokens)],
    "device_kind": jax.devices()[0].device_kind,
    "versions": machine.versions(),
  }
  turn = lambda count: {"seconds": [timed(count)], "losses": []}
  protocol.serve(about, turn, _memory)
  return {}


def data_worker(args: argparse.Namespace) -> dict[str, Any]:
  """Our side of `data --beside`: records made ready."""
  rows = beside.data_records(args.config, args.stage, args.records)
  model = state.model_config(args.config, args.stage)
  prepare = beside.preparing(
    args.config, args.stage, model.num_image_tokens, rows
  )
  prepare(len(rows))  # The first calls are slower.
  _, tokens, pixels = prepare(len(rows))
  about = {"program": "mole_jax", "tokens": tokens, "pixels": pixels}
  about["versions"] = machine.versions()
  turn = lambda count: {"seconds": [prepare(count)[0]], "losses": []}
  protocol.serve(about, turn, dict)
  return {}


def starter(args: argparse.Namespace) -> dict[str, Any]:
  """A first step, by a process that started for it."""
  with steps.cache_in(args.cache):
    stage = make_stage(args)
    weights = synthetic.parameters(stage)
    batches = steps.synthetic_batches(stage)
    run = steps.Run(stage, stage.lower().compile(), batches, weights)
    del weights
    run.steps(1)
  protocol.serve({"losses": run.losses}, run.steps, dict)
  return {}


def open_set(args: argparse.Namespace) -> dict[str, Any]:
  """A point of `curves --only records`: makes a set, or opens it."""
  if args.make:
    began = time.perf_counter()
    opening.make_set(args.folder, args.make)
    return {"make_seconds": time.perf_counter() - began}
  return opening.measure(args.config, args.stage, args.folder)
