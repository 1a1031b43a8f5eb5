"""What `bench` prints of what it measured."""

from collections.abc import Mapping
from typing import Any

import rich.console
import rich.table

Found = Mapping[str, Any]


def print_about(found: Found, console: rich.console.Console) -> None:
  """What runs, and where."""
  about, where = found["step"], found["machine"]
  console.print(
    f"[bold]{found['config']}:{found['variant']}[/] stage {about['stage']} on "
    f"{where['num_devices']} {where['device_kind']} ({where['cpu']}, "
    f"{where['num_cores']} cores), jax {found['versions']['jax']}"
  )
  experts = f"{about['num_experts']} experts of rank {about['rank']}"
  if about["full_experts"]:
    by_layer = about["full_experts"]["by_layer"]
    routed = [number for number in by_layer if number]
    experts = (
      f"{max(routed)} whole FFNs in {len(routed)} of {len(by_layer)} layers, "
      f"top {about['full_experts']['top_k']}"
    )
  console.print(
    f"{about['batch_size']} rows of {about['max_length']} tokens, "
    f"{about['max_images']} images a row, {about['dtype']}, remat "
    f"{about['remat']}, {experts}; "
    f"{about['flops']['total'] / 1e12:.3g} TFLOP a step"
  )


def print_compiled(found: Found, console: rich.console.Console) -> None:
  """Seconds and predicted memory."""
  times = found["compile_seconds"].items()
  console.print("compiled in " + ", ".join(f"{s:.1f} s {k}" for k, s in times))
  memory = found["predicted_memory"]
  if memory:
    console.print(
      f"the compiler predicts {memory['total_gib']:.2f} GiB on a device: "
      f"{memory['arguments_gib']:.2f} of arguments, "
      f"{memory['temporaries_gib']:.2f} of temporaries"
    )


def print_first_steps(found: Found, console: rich.console.Console) -> None:
  """Seconds from the start of a process to the end of its first step."""
  times = ", ".join(f"{s:.1f} s {kind}" for kind, s in found.items())
  console.print(f"from a start to the end of its first step: {times}")


def print_timing(
  title: str, timing: Found, console: rich.console.Console
) -> None:
  """A step's seconds, and what they come to."""
  mfu = timing["mfu"]
  console.print(f"[bold]{title}[/]: {_spread(timing['step_seconds'])} a step")
  console.print(
    f"  {timing['tokens_per_second']:,.0f} tokens/s, "
    f"{timing['text_tokens_per_second']:,.0f} without padding, "
    f"{timing['samples_per_second']:,.2f} samples/s"
  )
  console.print(
    f"  {timing['tflops_per_second_per_device']:,.3g} TFLOP/s a device, MFU "
    f"{'unknown' if mfu is None else f'{mfu:.1%}'}; waiting for data "
    f"{timing['stall_share']:.2%} of the time"
  )


def print_memory(memory: Found, console: rich.console.Console) -> None:
  """The peak so far."""
  console.print(
    f"peak memory of the {memory['of']}: {memory['peak_gib']:.2f} GiB"
  )


def print_profile(found: Found, console: rich.console.Console) -> None:
  """The 25 places of the model that take longest."""
  total = found["busy_seconds"]
  console.print(f"[bold]profile[/]: busy for {total:.4f} s a step")
  for place, seconds in list(found["by_place"].items())[:25]:
    console.print(
      f"  {seconds:.4f} s {seconds / total:6.1%}  {place}", markup=False
    )


def print_comparison(found: Found, console: rich.console.Console) -> None:
  """Both sides and their ratio."""
  for side, values in found["sides"].items():
    console.print(
      f"[bold]{side}[/]: {_spread(values['step_seconds'])} a step, "
      f"{values['tokens_per_second']:,.0f} tokens/s, "
      f"{values['tflops_per_second']:,.3g} TFLOP/s"
    )
    print_memory(values["memory"], console)
  if "peer_over_ours" in found:
    _print_ratio("peft / mole_jax", found["peer_over_ours"], console)


def print_dispatch(found: Found, console: rich.console.Console) -> None:
  """A table of ratios: strategies by number of experts."""
  rows = found["rows"]
  table = rich.table.Table(
    title="seconds of a forward and backward pass, over plain LoRA, over the "
    "frozen base (medians; * what dispatch=auto takes)"
  )
  for name in ("experts", "dispatch", "seconds", "/ LoRA", "/ base", "GiB"):
    table.add_column(name, justify="left" if name == "dispatch" else "right")
  for row in rows:
    memory = row["predicted_memory"]
    table.add_row(
      str(row["num_experts"]),
      row["strategy"] + "*" * row["is_auto"],
      f"{row['seconds']['median']:.4f}",
      f"{row['over_lora']['median']:.2f}",
      f"{row['over_base']['median']:.2f}",
      f"{memory['temporaries_gib']:.2f}" if memory else "",
    )
  console.print(table)


def print_curve(name: str, curve: Found, console: rich.console.Console) -> None:
  """A table: a row a size, and below the powers of the size."""
  points, powers = curve["points"], curve["powers"]
  table = rich.table.Table(
    title=f"{name}: cost by size; power of the size from first to last "
    "(1 linear, 0 flat)"
  )
  keys = [key for key, value in points[0].items() if _is_cost(value)]
  for key in (name, *keys[1:]):
    title = key.replace("_seconds", " s").replace("_gib", " GiB")
    table.add_column(title.replace("_", " "), justify="right")
  for point in points:
    costs = [_number(point[key]) for key in keys[1:]]
    table.add_row(f"{point['size']:,}", *costs)
  if len(points) > 1:
    table.add_section()
    table.add_row(
      "power",
      *(f"{powers[key]:.2f}" if key in powers else "" for key in keys[1:]),
    )
  console.print(table)


def _is_cost(value: Any) -> bool:
  return value is None or isinstance(value, int | float | Mapping)


def _number(cost: Any) -> str:
  """A cost, or the median of several timings, in three digits."""
  if cost is None:
    return ""
  return f"{cost['median'] if isinstance(cost, Mapping) else cost:.3g}"


def print_decode(found: Found, console: rich.console.Console) -> None:
  """Prefill, and a token."""
  console.print(
    f"[bold]prefill[/]: {_spread(found['prefill_seconds'])} for "
    f"{found['batch_size']} x {found['prompt_tokens']} tokens, "
    f"{found['prompt_tokens_per_second']:,.0f} tokens/s"
  )
  rate = found["new_tokens_per_second"]
  console.print(
    f"[bold]decode[/]: {_spread(found['seconds_a_token'])} a token, "
    + (
      "not told from prefill: use more --new-tokens or --rounds"
      if rate is None
      else f"{rate:,.1f} tokens/s"
    )
  )
  print_memory(found["memory"], console)


def print_decode_beside(found: Found, console: rich.console.Console) -> None:
  """Both sides and their ratios."""
  for side, values in found["sides"].items():
    console.print(f"[bold]{side}[/], no adapters")
    print_decode(
      {**{k: found[k] for k in ("batch_size", "prompt_tokens")}, **values},
      console,
    )
  for what, ratio in found.get("peer_over_ours", {}).items():
    _print_ratio(f"transformers / mole_jax, {what}", ratio, console)


def _print_ratio(
  title: str, ratio: Found, console: rich.console.Console
) -> None:
  console.print(
    f"[bold]{title}[/]: {ratio['median']:.3f} (quartiles "
    f"{ratio['quartile_1']:.3f} to {ratio['quartile_3']:.3f}, "
    f"{ratio['count']} rounds); above 1 mole_jax is faster"
  )


def print_data(found: Found, console: rich.console.Console) -> None:
  """How fast batches come."""
  console.print(
    f"[bold]data[/]: {found['rows_per_second']:,.1f} rows/s, "
    f"{found['samples_per_second']:,.1f} samples/s, "
    f"{found['tokens_per_second']:,.0f} tokens/s, padding "
    f"{found['padding_share']:.1%}; {found['num_workers']} workers"
  )
  console.print(
    f"  {found['loader_seconds']:.1f} s to plan, "
    f"{found['first_batch_seconds']:.2f} s to the first batch"
  )


def print_data_beside(found: Found, console: rich.console.Console) -> None:
  """Both sides and their ratio."""
  for side, values in found["sides"].items():
    console.print(
      f"[bold]{side}[/]: {values['samples_per_second']:,.1f} samples/s on one "
      f"core, {values['tokens']:,} tokens and {values['pixels']:,} values of "
      f"pixels in {found['records']} records"
    )
  if "peer_over_ours" in found:
    ratio = found["peer_over_ours"]
    _print_ratio("transformers / mole_jax", ratio, console)


def _spread(seconds: Found) -> str:
  return (
    f"{seconds['median']:.4f} s (quartiles {seconds['quartile_1']:.4f} to "
    f"{seconds['quartile_3']:.4f}, {seconds['count']} timings)"
  )
