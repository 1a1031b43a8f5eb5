r"""Writes requirements with hashes: what a worker installs, and nothing else.

python -m launch.lock --extra tpu --out launch/tpu.lock

Asks pip what it would install for this project, on this Python and machine:
run it on Linux x86_64 with the workers' Python. Files, versions and SHA-256 go
into the lock; where they came from does not.
"""

import argparse
import json
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
# What packages without a wheel, and this one, are built with.
BUILD = ("setuptools>=68", "wheel")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m launch.lock", description=__doc__.splitlines()[0]
  )
  parser.add_argument("--extra", default="tpu", help="tpu, cuda12")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--python", default=sys.executable, help="with pip")
  args = parser.parse_args(argv)
  try:
    report = ask_pip(args.python, args.extra)
    args.out.write_text(format_lock(report, args.extra))
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(f"{len(report['install']) - 1} packages locked in {args.out}")
  return 0


def ask_pip(python: str, extra: str) -> dict[str, Any]:
  """pip's report of what it would install. ValueError if it cannot."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "report.json"
    done = subprocess.run(
      [python, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
      + ["--quiet", "--report", str(path), f"{ROOT}[{extra}]", *BUILD],
      capture_output=True,
      text=True,
      check=False,
    )
    if done.returncode:
      raise ValueError(f"pip failed: {done.stderr.strip()[-1000:]}")
    return json.loads(path.read_text())


def format_lock(report: Mapping[str, Any], extra: str) -> str:
  """One line a package, by name. ValueError where a hash is missing."""
  about = report["environment"]
  if (about["sys_platform"], about["platform_machine"]) != ("linux", "x86_64"):
    raise ValueError(
      f"this is {platform.system()} {platform.machine()}; the workers are "
      "Linux x86_64 and install other files: run this there, or in a container."
    )
  lines = []
  for item in report["install"]:
    name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
    info = item["download_info"]
    if "dir_info" in info:
      continue  # This project.
    try:
      sha256 = info["archive_info"]["hashes"]["sha256"]
    except KeyError:
      raise ValueError(
        f"pip gives no SHA-256 for {name}; use pip 23 or newer and no package "
        "from a version control system."
      ) from None
    version = item["metadata"]["version"]
    lines.append(f"{name}=={version} --hash=sha256:{sha256}")
  head = [
    f"# Python {about['python_version']}, Linux x86_64, mole_jax[{extra}].",
    f"# Made by: python -m launch.lock --extra {extra}",
  ]
  return "\n".join([*head, *sorted(lines)]) + "\n"


if __name__ == "__main__":
  sys.exit(main())
