"""The README's table of dry runs: 7B and 13B on TPU slices and H200s.

python -m tests.benchmarks.dry_run_table --out runs/dry_run

Each row is one `python -m mole_jax.dry_run ... --json`, kept in the folder and
not made again. 2 to 10 minutes for a row on two cores, two hours for all; rows
whose compiler is not installed are left out, so that two environments, one
with the extra `tpu` and one with `cuda12`, can fill one folder.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import NamedTuple

GIB = 2**30


class Row(NamedTuple):
  """`rows` of the batch on each of `devices`."""

  name: str
  topology: str
  devices: int
  rows: int
  remat: str


# Names as in the design: they count chips.
ROWS = {
  "7b": (
    Row("v5e-16", "v5e:4x4", 16, 1, "named"),
    Row("v5e-256", "v5e:16x16", 256, 1, "named"),
    Row("v5p-64", "v5p:4x4x4", 64, 1, "named"),
    Row("v5p-512", "v5p:8x8x8", 512, 1, "named"),
    Row("v6e-16", "v6e:4x4", 16, 1, "named"),
    Row("H200", "h200:1", 1, 4, "named"),
    Row("8 H200", "h200:8", 8, 4, "named"),
  ),
  "13b": (
    Row("v5e-16", "v5e:4x4", 16, 1, "attention"),
    Row("v5e-256", "v5e:16x16", 256, 1, "attention"),
    Row("v5p-64", "v5p:4x4x4", 64, 1, "named"),
    Row("v5p-512", "v5p:8x8x8", 512, 1, "named"),
    Row("v6e-16", "v6e:4x4", 16, 1, "named"),
    Row("H200", "h200:1", 1, 2, "named"),
    Row("8 H200", "h200:8", 8, 4, "named"),
  ),
}


def run(variant: str, row: Row, folder: pathlib.Path) -> dict | None:
  """The JSON of a row; None, with the reason said, where there is none."""
  file = folder / f"{variant}-{row.topology.replace(':', '-')}.json"
  if not file.exists():
    command = [
      sys.executable,
      "-m",
      "mole_jax.dry_run",
      f"--config=configs/mole3.py:{variant}",
      f"--topology={row.topology}",
      f"--config.stages.mole.batch_size={row.devices * row.rows}",
      f"--config.model.remat={row.remat}",
      "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout.strip():
      last = (done.stderr.strip().splitlines() or ["no output"])[-1]
      print(f"{variant} on {row.name}: {last}", file=sys.stderr)
      return None
    file.write_text(done.stdout)
  return json.loads(file.read_text())


def cells(variant: str, row: Row, found: dict) -> list[str]:
  """One row of the table."""
  held = found["trainable_bytes"] + found["frozen_bytes"]
  held += found["optimizer_bytes"]
  mesh = found["mesh"]
  first = [
    variant.upper(),
    row.name,
    f"{mesh['data']} x {mesh['fsdp']}",
    f"{row.rows} x {found['max_length']}",
    row.remat,
    f"{held / GIB:.1f}",
    f"{found['needed_bytes'] / GIB:.1f} of {found['hbm_bytes'] / GIB:.0f}",
  ]
  if "memory" not in found:
    return [*first, *["does not fit"], *[""] * 5]
  formula = found["formula_flops"] / row.devices
  sent = sum(one["wire_bytes"] for one in found["collectives"])
  return [
    *first,
    f"{formula / 1e12:.0f}",
    f"{found['compiled_flops'] / formula:.2f}",
    f"{sent / 1e9:.1f}",
    f"{found['step_seconds']:.2f}",
    f"{found['tokens_per_second'] / row.devices:,.0f}",
    f"{found['mfu']:.0%} to {found['most_mfu']:.0%}"
    + (" !" if found["findings"] else ""),
  ]


HEAD = (
  "model",
  "machine",
  "data x fsdp",
  "rows a device",
  "remat",
  "held, GiB",
  "peak, GiB",
  "TFLOP by 4N",
  "compiled",
  "GB sent",
  "step, s",
  "tokens/s a device",
  "MFU by cycles to roofline",
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--variants", nargs="*", default=list(ROWS))
  parser.add_argument("--machines", nargs="*", default=None)
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  lines = [HEAD, ["---"] * len(HEAD)]
  for variant in args.variants:
    for row in ROWS[variant]:
      if args.machines and row.name not in args.machines:
        continue
      found = run(variant, row, args.out)
      if found is not None:
        lines.append(cells(variant, row, found))
  for line in lines:
    print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
  main()
