"""Compiles a stage's step for a target and says what came out."""

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax

from mole_jax.compiled import (
  checks,
  collectives,
  estimate,
  hlo,
  memory,
  topologies,
  work,
)
from mole_jax.models import decoder, moe
from mole_jax.parallel import mesh as mesh_lib
from mole_jax.training import stage as stage_lib


@dataclasses.dataclass(frozen=True)
class Report:
  """One compiled step; bytes and FLOPs are those of one device.

  formula_flops: of the whole step, by the 4N formula.
  exchange: by number of experts, how tokens of layers with full experts meet
    them, in bytes of a layer and step.
  needed_bytes: peak memory; also where the compiler refused for memory, in
    which case what the program would have been like is unknown (`work` None).
  """

  config: str
  stage: str
  topology: str
  mesh: dict[str, int]
  batch_size: int
  max_length: int
  remat: str
  trainable_bytes: int
  frozen_bytes: int
  optimizer_bytes: int
  hbm_bytes: int
  needed_bytes: int
  memory: memory.Memory | None
  advice: list[str]
  formula_flops: float
  work: work.Work | None
  xla_flops: float | None
  collectives: list[collectives.Group]
  estimate: estimate.Estimate | None
  exchange: dict[int, moe.ExchangePlan]
  peak_flops: float
  findings: list[checks.Finding]
  num_instructions: int
  compile_seconds: float

  @property
  def fits(self) -> bool:
    return not self.hbm_bytes or self.needed_bytes <= self.hbm_bytes

  @property
  def mfu(self) -> float:
    """Model FLOPs utilisation of the estimated step; 0 where there is none."""
    return self._mfu(self.estimate.step_seconds if self.estimate else 0.0)

  @property
  def most_mfu(self) -> float:
    """The same by the roofline alone; more than it no step can reach."""
    return self._mfu(self.estimate.least_seconds if self.estimate else 0.0)

  def _mfu(self, seconds: float) -> float:
    return self.formula_flops / seconds / self.peak_flops if seconds else 0.0

  @property
  def tokens_per_second(self) -> float:
    seconds = self.estimate.step_seconds if self.estimate else 0.0
    return self.batch_size * self.max_length / seconds if seconds else 0.0

  def as_json(self) -> dict[str, Any]:
    """Everything but single instructions, as JSON holds it."""
    found = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name not in ("work", "memory", "estimate")
    }
    found["collectives"] = [dataclasses.asdict(c) for c in self.collectives]
    found["findings"] = [dataclasses.asdict(f) for f in self.findings]
    found["exchange"] = {k: p._asdict() for k, p in self.exchange.items()}
    if self.memory:
      found["memory"] = dataclasses.asdict(self.memory)
    if self.work:
      found["compiled_flops"] = self.work.flops
      found["hbm_traffic_bytes"] = self.work.hbm_bytes
      found["unknown_kernels"] = dict(self.work.unknown)
      found["compiler_cycles"] = self.work.cycles
    if self.estimate:
      found["estimate"] = dataclasses.asdict(self.estimate)
      found["step_seconds"] = self.estimate.step_seconds
    return found | {
      "fits": self.fits,
      "mfu": self.mfu,
      "most_mfu": self.most_mfu,
      "tokens_per_second": self.tokens_per_second,
    }


def make(
  config: Mapping[str, Any],
  stage_name: str,
  target: topologies.Target,
  sizes: Mapping[str, int],
  hlo_file: pathlib.Path | None = None,
) -> Report:
  """Lowers and compiles the step of a stage, and reads the program.

  Args:
    config: resolved; batch size and rematerialisation are its own.
    stage_name: one of its stages.
    target: what to compile for.
    sizes: of the mesh axes.
    hlo_file: where to write the compiled program's text, if anywhere.

  Raises:
    ValueError: where the mesh does not fill the topology or the batch does not
      divide.
  """
  mesh = mesh_lib.make_mesh(sizes, topologies.devices(target))
  stage = stage_lib.Stage(config, stage_name, mesh)
  chip, hbm = target.accelerator.chip, target.hbm_bytes
  began = time.perf_counter()
  compiled, needed = None, 0
  try:
    compiled = stage.lower().compile(topologies.compiler_options(target))
  except jax.errors.JaxRuntimeError as error:
    found = memory.out_of_memory(str(error))
    if found is None:
      raise
    needed, hbm = found
  seconds = time.perf_counter() - began
  settings = stage.settings
  rows = settings["batch_size"] // mesh_lib.num_row_shards(mesh)
  held = {
    "trainable_bytes": memory.shard_bytes(
      stage.trainable_shapes, stage.shardings["trainable"]
    ),
    "frozen_bytes": memory.shard_bytes(
      stage.frozen_shapes, stage.shardings["frozen"]
    ),
    "optimizer_bytes": _optimizer_bytes(stage),
  }
  measured = program = done = guess = xla_flops = None
  found, wrong = [], []
  if compiled is not None:
    measured = memory.measure(compiled)
    needed = measured.peak
    text = compiled.as_text()
    if hlo_file is not None:
      hlo_file.write_text(text)
    program = hlo.parse(text)
    done = work.count(program)
    found = collectives.find(program, dict(mesh.shape))
    guess = estimate.step_estimate(
      done, found, chip, dict(mesh.shape), mesh.devices
    )
    wrong = checks.check(program, found, _expected(stage, rows))
    xla_flops = _xla_flops(compiled)
  return Report(
    config=f"{config['name']}:{config['variant']}",
    stage=stage_name,
    topology=target.name,
    mesh=dict(mesh.shape),
    batch_size=settings["batch_size"],
    max_length=settings["max_length"],
    remat=config["model"]["remat"],
    **held,
    hbm_bytes=hbm,
    needed_bytes=needed,
    memory=measured,
    advice=memory.advice(
      needed,
      hbm,
      sum(held.values()),
      rows=rows,
      remat=config["model"]["remat"],
      fsdp=mesh.shape["fsdp"],
      num_devices=mesh.size,
    ),
    formula_flops=sum(stage.flops_by_part().values()),
    work=done,
    xla_flops=xla_flops,
    collectives=collectives.summarise(found),
    estimate=guess,
    exchange=stage.exchange_plans(),
    peak_flops=chip.peak_flops * target.accelerator.chips,
    findings=wrong,
    num_instructions=(
      sum(map(len, program.computations.values())) if program else 0
    ),
    compile_seconds=seconds,
  )


def _optimizer_bytes(stage: stage_lib.Stage) -> int:
  leaves = jax.tree.leaves(stage.state_shapes().opt_state)
  shapes = {str(i): leaf for i, leaf in enumerate(leaves)}
  return memory.shard_bytes(shapes, {k: v.sharding for k, v in shapes.items()})


def _xla_flops(compiled: jax.stages.Compiled) -> float | None:
  """`cost_analysis()`, which counts loops once; None where there is none."""
  found = compiled.cost_analysis()
  value = found.get("flops", -1.0) if found else -1.0
  return value if value > 0 else None


def _expected(stage: stage_lib.Stage, rows: int) -> checks.Expected:
  """`rows` of the batch are on a device."""
  model, settings = stage.model_config, stage.settings
  widths = (model.decoder.hidden_size, model.decoder.intermediate_size)
  routed = decoder.experts_of_routed_layers(
    model.decoder, model.mole, model.moe
  )
  cut = tuple(width // stage.mesh.shape["tensor"] for width in widths)
  return checks.Expected(
    stage.trainable_shapes,
    stage.frozen_shapes,
    dict(stage.mesh.shape),
    model.decoder.num_layers,
    max(routed.values(), default=model.mole.num_experts),
    rows * settings["max_length"],
    tuple({*widths, *cut}),
  )
