"""Compiles a stage's step for a machine that is not there, and says how it is.

python -m mole_jax.dry_run --config=configs/mole3.py:7b --topology=v5p:4x4x4

Needs no weights and no accelerator; the compiler of TPUs comes with the extra
`tpu`, that of GPUs with `cuda12`, and cpu:64 is 64 fake devices. The mesh is
the table's for that topology, or --mesh=data=4,fsdp=16. Exit codes: 0 fits and
is sound; 1 does not fit, or the program does what it must not; 2 wrong usage.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags
from rich import console as rich_console

from mole_jax.compiled import report, search, terminal, topologies
from mole_jax.parallel import accelerators
from mole_jax.parallel import mesh as mesh_lib
from mole_jax.training import command_line, quantised, state

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration file, with :variant.", lock_config=True
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "What to compile for: v5p:4x4x4, h200:8, cpu:64."
)
_MESH = flags.DEFINE_string(
  "mesh", "", "Sizes of mesh axes, data=4,fsdp=16; others are 1."
)
_STAGE = flags.DEFINE_string("stage", "", "Of the config; default: its last.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON and nothing else.")
_HLO = flags.DEFINE_string("hlo", "", "File for the compiled program's text.")
_SEARCH = flags.DEFINE_bool(
  "search", False, "Try meshes and rematerialisation policies."
)
_MAX_MESHES = flags.DEFINE_integer(
  "max_meshes", 6, "How many meshes --search compiles.", lower_bound=1
)


def main(argv: Sequence[str]) -> int:
  """Runs the command line; returns the exit code."""
  console = rich_console.Console(
    soft_wrap=True, highlight=False, stderr=_is_json(argv)
  )
  try:
    config = command_line.parse(flags.FLAGS, _CONFIG, argv)
    if config is None or _TOPOLOGY.value is None:
      raise command_line.UsageError(
        "--config=FILE[:variant] and --topology=NAME are needed, for example "
        "--config=configs/mole3.py:7b --topology=v5p:4x4x4\n"
        + topologies.known()
      )
    # Whatever plugins are there; nothing here runs on a device.
    jax.config.update("jax_platforms", "cpu")
    target = topologies.find(_TOPOLOGY.value)
    stage = _STAGE.value or config["stage_names"][-1]
    if stage not in config["stages"]:
      raise ValueError(
        f"--stage={stage}: the config has {', '.join(config['stages'])}."
      )
    if _SEARCH.value:
      found = _search(config, stage, target, console)
    else:
      sizes = parse_mesh(_MESH.value) if _MESH.value else target.sizes()
      text_file = pathlib.Path(_HLO.value) if _HLO.value else None
      found = report.make(config, stage, target, sizes, text_file)
      terminal.show(found, console)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  if found is None:
    print("error: no mesh and policy that was tried fits.", file=sys.stderr)
    return 1
  if _JSON.value:
    print(json.dumps(found.as_json(), indent=1, default=str))
  return 0 if found.fits and not found.findings else 1


def _is_json(argv: Sequence[str]) -> bool:
  return any(argument.lstrip("-").startswith("json") for argument in argv)


def parse_mesh(text: str) -> dict[str, int]:
  """ "data=4,fsdp=16" -> sizes of all axes; ValueError for anything else."""
  sizes = dict.fromkeys(mesh_lib.AXES, 1)
  for part in text.split(","):
    axis, _, size = part.partition("=")
    if axis not in sizes or not size.lstrip("-").isdigit():
      raise ValueError(
        f"--mesh={text}: {part!r} is no axis=size; axes are "
        f"{', '.join(mesh_lib.AXES)}, as in --mesh=data=4,fsdp=16."
      )
    sizes[axis] = int(size)
  return sizes


def _search(
  config: dict[str, Any],
  stage: str,
  target: topologies.Target,
  console: rich_console.Console,
) -> report.Report | None:
  model = state.model_config(config, stage)
  settings = config["stages"][stage]
  shapes = state.parameter_shapes(model)
  count = state.count_parameters(shapes, settings["trainable"])
  trainable = sum(pair[0] for pair in count.values())
  frozen = sum(pair[1] for pair in count.values())
  item = jax.numpy.dtype(config["base"]["dtype"]).itemsize
  short = sum(shapes[path].size for path in quantised.kernels(config, stage))
  # Trainable parameters and two moments, all float32.
  held = (frozen - short) * item + short + trainable * 12

  def show(found: report.Report) -> None:
    mesh = accelerators.mesh_text(found.mesh)
    console.print(
      f"{mesh or 'one device'}, remat {found.remat}: "
      f"{found.needed_bytes / 2**30:.1f} GiB"
      + ("" if found.fits else " does not fit")
      + (f", MFU {found.mfu:.1%}" if found.mfu else "")
      + (f", {len(found.findings)} finding(s)" if found.findings else ""),
      markup=False,
    )

  best = search.search(
    config,
    stage,
    target,
    search.meshes(target.num_devices, model, settings["batch_size"]),
    lambda mesh: held // (mesh["fsdp"] * mesh["tensor"]),
    show,
    _MAX_MESHES.value,
  )
  if best is not None:
    console.print("[bold]Best that fits[/]")
    terminal.show(best, console)
    console.print(
      "To train with it: "
      + " ".join(f"--config.mesh.{k}={v}" for k, v in best.mesh.items())
      + f" --config.model.remat={best.remat}",
      markup=False,
    )
  return best


if __name__ == "__main__":
  sys.exit(main(sys.argv))
