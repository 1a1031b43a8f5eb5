"""A report in words and tables."""

import math

from rich import console as rich_console
from rich import table as rich_table

from mole_jax.compiled import collectives, report
from mole_jax.models import moe
from mole_jax.parallel import accelerators

MOST = 8  # Findings to print.


def show(found: report.Report, console: rich_console.Console) -> None:
  """Prints a report."""
  mesh = accelerators.mesh_text(found.mesh)
  console.print(
    f"[bold]{found.config}[/], stage {found.stage}, on {found.topology}: mesh "
    f"{mesh or 'of one device'}, batch {found.batch_size} x "
    f"{found.max_length} tokens, remat {found.remat}; compiled in "
    f"{found.compile_seconds:.0f} s"
  )
  _memory(found, console)
  if found.work is not None:
    _flops(found, console)
    _collectives(found, console)
  for experts, how in found.exchange.items():
    _exchange(experts, how, found.mesh["expert"], console)
  if found.estimate is not None and found.mfu:
    guess = found.estimate
    console.print(
      f"Estimated step {found.estimate.step_seconds:.3f} s (compute "
      f"{guess.compute_seconds:.3f}, collectives {guess.hidden_seconds:.3f} "
      f"beside it and {guess.exposed_seconds:.3f} alone): "
      f"{found.tokens_per_second:,.0f} tokens/s, [bold]MFU "
      f"{found.mfu:.1%}[/], by the roofline alone at most {found.most_mfu:.1%}"
    )
  for finding in found.findings[:MOST]:
    console.print(f"[red]{finding.rule}[/]", end=" ")
    console.print(finding.message, markup=False)
  if len(found.findings) > MOST:
    console.print(f"and {len(found.findings) - MOST} more (--json has all)")
  if found.work is not None and not found.findings:
    console.print(
      "[green]Sound[/]: weights are gathered layer by layer, rows stay where "
      "they are, only what is trained has gradients, no buffer of experts x "
      "tokens x width"
    )


def _exchange(
  experts: int,
  how: moe.ExchangePlan,
  axis_size: int,
  console: rich_console.Console,
) -> None:
  slots = "no capacity" if how.capacity is None else f"capacity {how.capacity}"
  text = f"Layers of {experts} experts: {slots}"
  if axis_size > 1:
    text += (
      f", {how.move} travel along expert: {amount(how.bytes_tokens)}B of "
      f"tokens or {amount(how.bytes_weights)}B of weights a layer and step, "
      f"equal at {how.break_even_tokens:,} tokens a device"
    )
  console.print(text)


def _memory(found: report.Report, console: rich_console.Console) -> None:
  table = rich_table.Table("on one device", "bytes", title="Memory")
  row = lambda name, size: table.add_row(name, amount(size, 1024))
  row("frozen parameters", found.frozen_bytes)
  row("trainable parameters", found.trainable_bytes)
  row("optimizer state", found.optimizer_bytes)
  if found.memory is not None:
    rest = found.memory
    held = found.frozen_bytes + found.trainable_bytes + found.optimizer_bytes
    row("batch and padding", max(rest.arguments - held, 0))
    row("outputs that replace no argument", rest.outputs - rest.aliased)
    row("temporaries", rest.temporaries)
    row("code", rest.code)
  row("peak", found.needed_bytes)
  console.print(table)
  if not found.hbm_bytes:
    return
  share = found.needed_bytes / found.hbm_bytes
  hbm = amount(found.hbm_bytes, 1024)
  if found.fits:
    console.print(f"[green]Fits[/]: {share:.0%} of {hbm}")
    return
  needed = amount(found.needed_bytes, 1024)
  console.print(
    f"[red]Does not fit[/]: {needed} or more, of {hbm}. Change one of"
  )
  for line in found.advice:
    console.print(f"  {line}", markup=False)


def amount(value: int | float, step: int = 1000) -> str:
  """ "1.52 G": three digits and a prefix; with steps of 1024 "1.52 Gi"."""
  prefixes = ["", "K", "M", "G", "T", "P"]
  while abs(value) >= step and len(prefixes) > 1:
    value /= step
    prefixes.pop(0)
  if not prefixes[0]:
    return f"{value:.0f}"
  digits = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
  return f"{digits} {prefixes[0]}{'i' if step == 1024 else ''}"


def _flops(found: report.Report, console: rich_console.Console) -> None:
  formula = found.formula_flops / math.prod(found.mesh.values())
  console.print(
    f"FLOPs of a step on one device: {amount(formula)} by the 4N formula, "
    f"{amount(found.work.flops)} in the program "
    f"({found.work.flops / formula:.2f}x; loops counted as often as they run)"
  )
  if found.xla_flops:
    console.print(
      f"  cost_analysis() says {amount(found.xla_flops)}: it counts a loop's "
      "body once"
    )
  for name, runs in found.work.unknown.items():
    console.print(f"  not counted: kernel {name!r}, {runs} runs", markup=False)
  console.print(
    f"HBM traffic of a step: {amount(found.work.hbm_bytes)}B"
    + (
      f"; XLA's own estimate: {amount(found.work.cycles)} cycles"
      if found.work.cycles
      else ""
    )
  )


def _collectives(found: report.Report, console: rich_console.Console) -> None:
  if not found.collectives:
    return
  table = rich_table.Table(
    "kind", "along", "loop", "count", "runs", "largest", "bytes sent"
  )
  for one in found.collectives:
    table.add_row(*_row(one))
  table.title = "Collectives of a step, on one device"
  console.print(table)


def _row(one: collectives.Group) -> tuple[str, ...]:
  return (
    one.kind,
    ", ".join(one.axes) or "all",
    " x ".join(map(str, one.loops)) or "none",
    str(one.count),
    str(one.runs),
    amount(one.largest_bytes, 1024),
    amount(one.wire_bytes),
  )
