"""Trains, evaluates and reports: the stages of a config, in order.

python -m mole_jax.main --config=configs/mole3.py --workdir=runs/mole3

Any setting can be overridden: --config.stages.mole.optim.lr=3e-4. The same
command again skips what stands in the workdir and resumes what does not.
Exit codes: 0 done; 1 training failed; 2 wrong usage or configuration; 130 or
143 interrupted, everything saved, run the command again. Of several processes
those that are left end with 1 or 134 when one has died, and all with 1 when one
hangs longer than MOLE_HANG_SECONDS (1800).
"""

import collections
import contextlib
import functools
import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags
from rich import console as rich_console
from rich import progress as rich_progress
from rich import table as rich_table

from mole_jax.data import mixture, progress, workers
from mole_jax.inference import pretrained, scoring
from mole_jax.parallel import mesh as mesh_lib
from mole_jax.parallel import processes
from mole_jax.reporting import page
from mole_jax.training import base as base_lib
from mole_jax.training import (
  checkpoint,
  command_line,
  features,
  feed,
  files,
  loop,
  metrics,
  rundir,
)
from mole_jax.training import stage as stage_lib

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration file, with :variant.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory to write.")

_ACCEPT_DATA_CHANGE = flags.DEFINE_bool(
  "accept_data_change",
  False,
  "Go on with data, or weights of a mixture, that are not those of the steps "
  "that stand; data_changes.jsonl in the workdir keeps a record.",
)

console = rich_console.Console(soft_wrap=True, highlight=False)


def main(argv: Sequence[str]) -> int:
  """Runs the command line; returns the exit code."""
  try:
    config, run = _parse(argv)
    processes.start()
  except (command_line.UsageError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  console.quiet = not processes.is_first()
  try:
    with contextlib.ExitStack() as stack:
      _in_first(stack.enter_context, rundir.Lock(run))
      return _run(config, run)
  except processes.FirstFailedError:
    return 2
  except rundir.LockedError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except loop.StoppedError as error:
    console.print(
      f"\n[bold]Stopped[/] in stage {error.stage!r}; saved step "
      f"{error.saved_step}. To resume, run the same command:"
    )
    console.print(f"  {_command(argv)}")
    return 128 + error.signal_number
  except KeyboardInterrupt:
    console.print(
      "\n[bold]Interrupted.[/] What is finished is kept. To "
      "resume, run the same command:"
    )
    console.print(f"  {_command(argv)}")
    return 128 + signal.SIGINT
  except (
    metrics.NonFiniteLossError,
    mixture.TooManySkipped,
    workers.WorkerError,
  ) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    processes.end_after(error)


def _command(argv: Sequence[str]) -> str:
  return shlex.join(["python", "-m", "mole_jax.main", *argv[1:]])


def _parse(argv: Sequence[str]) -> tuple[dict[str, Any], pathlib.Path]:
  """The resolved config and the run directory."""
  config = command_line.parse(flags.FLAGS, _CONFIG, argv)
  if config is None or _WORKDIR.value is None:
    raise command_line.UsageError(
      "--config=FILE[:variant] and --workdir=DIR are needed, for example "
      "--config=configs/mole3.py --workdir=runs/mole3"
    )
  return config, pathlib.Path(_WORKDIR.value)


def _run(config: dict[str, Any], run: pathlib.Path) -> int:
  began = time.perf_counter()
  try:
    _in_first(
      rundir.claim,
      run,
      config,
      is_data_change_accepted=_ACCEPT_DATA_CHANGE.value,
    )
    mesh = mesh_lib.make_mesh(config["mesh"])
    stages = [
      stage_lib.Stage(config, name, mesh) for name in config["stage_names"]
    ]
    features.check_useful(config, {s.name: s.trainable_shapes for s in stages})
    text = feed.read_tokenizer(config)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  devices = mesh.devices.flatten()
  count = jax.process_count()
  of_processes = f" of {count} processes" if count > 1 else ""
  console.print(
    f"[bold]{config['name']}:{config['variant']}[/] seed {config['seed']} on "
    f"{len(devices)} {devices[0].device_kind} device(s){of_processes}, "
    f"workdir {run}"
  )
  _in_first(_write_run, config, run, stages)
  reference = None
  for stage in stages:
    # A stage without adapters makes a whole model, which the next starts from.
    makes_base = not stage.settings["use_adapters"]
    base = None
    try:
      reference = reference or _given_base(config)
      stands = reference if stage.name == "base" else None
      if makes_base and stands is None:
        stands = _made_base(run, stage.name)
      if stands is not None:
        console.print(f"[green]stage {stage.name} stands[/] in {stands.path}")
        reference = stands
        continue
      if stage.name != "base" and reference is None:
        raise ValueError(
          f"stage {stage.name!r} needs a base: set config.base.path to one, "
          "or put the stage that makes it into config.stage_names."
        )
      _in_first(_set_damaged_aside, run, stage.name)
      if not makes_base and _is_done(config, run, stage.name):
        console.print(
          f"[green]stage {stage.name} stands[/] in {run / stage.name}"
        )
        continue
      if reference is not None:
        path = run / reference.path
        base = stage_lib.load_base(stage, config, path, reference.sha256)
      tower = stage.frozen_tower(config, base)
      lines = stage.settings["mixture"].values()
      stores = None if tower is None else tower.stores(lines, run)
      image_tokens = stage.model_config.num_image_tokens
      with progress.Progress(console) as bar:
        make_loader = functools.partial(
          feed.make_loader,
          config,
          stage.name,
          text,
          image_tokens,
          bar.count_tokens,
          stores,
        )
        loader = processes.first_then_all(make_loader)
      steps = checkpoint.list_steps(run, stage.name)
      _in_first(
        feed.check_unchanged,
        run / stage.name,
        feed.describe(config, stage.name, text),
        steps[-1] if steps else 0,
        is_change_accepted=_ACCEPT_DATA_CHANGE.value,
      )
      if stores is not None:
        with progress.Progress(console) as bar:
          # One process after the other: on a disk that they share the first
          # makes them all, and no two write.
          make = functools.partial(
            tower.make, stores, console.print, bar.see_images
          )
          processes.first_then_all(make)
    except ValueError as error:
      print(f"error: {error}", file=sys.stderr)
      return 2
    _print_counts(stage.name, stage.counts)
    _print_quantised(stage)
    _print_data(loader)
    _print_features(config, stage)
    trained = _train(config, stage, loader, run, base, reference)
    if makes_base:
      reference = _write_base(run, stage.name, trained)
    del trained, base  # The next stage, whose layers may be others, reads it.
  processes.leave()
  if not processes.is_first():
    return 0
  _evaluate(config, run)
  path = page.write_report([run], run / "report")
  page.print_accuracy([run], console)
  minutes = (time.perf_counter() - began) / 60
  console.print(f"Done in {minutes:.1f} min. Report: [bold]{path}[/]")
  return 0


def _in_first(function: Callable[..., object], *args: Any, **kwargs) -> None:
  """Calls it in the first process; the others wait, and fail if it fails."""
  call = functools.partial(function, *args, **kwargs)
  processes.first_then_all(lambda: call() if processes.is_first() else None)


def _write_base(
  run: pathlib.Path, stage: str, base: Any
) -> base_lib.BaseReference:
  """The first process writes; every one sends what it holds, one by one."""
  pairs = ((name, processes.on_host(leaf)) for name, leaf in base.items())
  if processes.is_first():
    base_lib.write_base(run / stage, pairs)
  else:
    collections.deque(pairs, maxlen=0)
  processes.wait_for_all(f"{stage} written")
  return _made_base(run, stage)


def _made_base(run: pathlib.Path, stage: str) -> base_lib.BaseReference | None:
  """What a stage made, by a path relative to the run; None if not yet."""
  reference = base_lib.read_reference(run / stage)
  if reference is None:
    return None
  return base_lib.BaseReference(stage, reference.sha256)


def _given_base(config: Mapping[str, Any]) -> base_lib.BaseReference | None:
  """The base that the config names, in place of a stage "base"."""
  given = config["base"]["path"]
  if not given:
    return None
  path = pathlib.Path(given).absolute()
  reference = base_lib.read_reference(path)
  if reference is None:
    raise ValueError(
      f"config.base.path={given!r} holds no complete base "
      f"({base_lib.BASE_FILE} is missing); name a finished RUN/base."
    )
  sha256 = config["base"]["sha256"] or reference.sha256
  return base_lib.BaseReference(str(path), sha256)


def _set_damaged_aside(run: pathlib.Path, stage: str) -> None:
  for line in checkpoint.set_damaged_aside(run, stage):
    console.print(line, style="yellow", markup=False)


def _is_done(config: Mapping[str, Any], run: pathlib.Path, stage: str) -> bool:
  steps = checkpoint.list_steps(run, stage)
  return bool(steps) and steps[-1] >= config["stages"][stage]["num_steps"]


def _print_counts(stage: str, counts: Mapping[str, tuple[int, int]]) -> None:
  table = rich_table.Table(title=f"stage {stage}: parameters")
  table.add_column("group")
  table.add_column("trainable", justify="right")
  table.add_column("frozen", justify="right")
  for group, (trainable, frozen) in counts.items():
    table.add_row(group, f"{trainable:,}", f"{frozen:,}")
  table.add_section()
  totals = [sum(pair[i] for pair in counts.values()) for i in (0, 1)]
  table.add_row("all", f"{totals[0]:,}", f"{totals[1]:,}")
  console.print(table)


def _print_quantised(stage: stage_lib.Stage) -> None:
  if stage.quantised:
    count = sum(stage.frozen_shapes[name].size for name in stage.quantised)
    console.print(
      f"stage {stage.name}: {count:,} of the frozen ones lie on the devices in "
      "8 bits"
    )


def _print_data(loader: Any) -> None:
  accounts = loader.accounting()
  for dataset, account in zip(loader.datasets, accounts, strict=True):
    skipped = sum(account["skipped"].values())
    reasons = f" {account['skipped']}" if skipped else ""
    console.print(
      f"data {dataset.name}: read {account['read']:,}, used "
      f"{account['used']:,}, skipped {skipped:,}{reasons}"
    )
  padding = loader.padding
  console.print(
    f"padding: {padding.share:.1%} of tokens in {padding.num_rows:,} rows"
  )


def _print_features(config: Mapping[str, Any], stage: stage_lib.Stage) -> None:
  if stage.uses_features:
    console.print(f"stage {stage.name} reads cached features")
  elif config["data"]["features"] == "cached":
    why = features.why_pixels(config, stage.name, stage.trainable_shapes)
    console.print(f"stage {stage.name} reads pixels: {why}")


def _train(
  config: Mapping[str, Any],
  stage: stage_lib.Stage,
  loader: Any,
  run: pathlib.Path,
  base: Any,
  reference: base_lib.BaseReference | None,
) -> Any:
  """Runs a stage behind a progress bar (or log lines, without a terminal)."""
  num_steps = stage.settings["num_steps"]
  bar = rich_progress.Progress(
    rich_progress.TextColumn(f"stage {stage.name}"),
    rich_progress.BarColumn(),
    rich_progress.MofNCompleteColumn(),
    rich_progress.TimeElapsedColumn(),
    rich_progress.TextColumn("left"),
    rich_progress.TimeRemainingColumn(),
    rich_progress.TextColumn("{task.fields[status]}"),
    console=console,
    disable=not console.is_terminal,
  )
  with bar:
    task = bar.add_task("", total=num_steps, status="compiling")
    last_line = time.perf_counter()

    def on_step(number: int) -> None:
      bar.update(task, completed=number)

    def on_log(number: int, row: Mapping[str, Any]) -> None:
      nonlocal last_line
      status = (
        f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s"
      )
      bar.update(task, status=status)
      now = time.perf_counter()
      if not console.is_terminal and (
        now - last_line > 15 or number == num_steps
      ):
        last_line = now
        left = (num_steps - number) * row["step_seconds"]
        console.print(
          f"stage {stage.name} step {number}/{num_steps}  {status}  "
          f"{left:.0f} s left"
        )

    return loop.run_stage(
      config, stage, loader, run, base, reference, on_log, on_step
    )


def _write_run(
  config: Mapping[str, Any],
  run: pathlib.Path,
  stages: Sequence[stage_lib.Stage],
) -> None:
  """What the report says of a run besides its metrics.

  A base that was given is another run's: this one has no curves of it.
  """
  stages = [s for s in stages if s.name != "base" or not config["base"]["path"]]
  counts = {
    stage.name: {
      group: {"trainable": trainable, "frozen": frozen}
      for group, (trainable, frozen) in stage.counts.items()
    }
    for stage in stages
  }
  files.write_json(
    run / "run.json",
    {
      "name": config["name"],
      "variant": config["variant"],
      "seed": config["seed"],
      "stages": [stage.name for stage in stages],
      "num_steps": {s.name: s.settings["num_steps"] for s in stages},
      "parameters": counts,
    },
  )


def _evaluate(config: Mapping[str, Any], run: pathlib.Path) -> None:
  """Evaluates the last stage unless its evaluation stands."""
  if not config["evaluation"]["datasets"]:
    console.print("config.evaluation.datasets is empty: nothing to evaluate")
    return
  if jax.process_count() > 1:
    console.print(
      "a run of several processes is evaluated on one machine: "
      f"python -m mole_jax.evaluate --ckpt {run}"
    )
    return
  path = run / "evaluation" / "metrics.json"
  stage = config["stage_names"][-1]
  done = config["stages"][stage]["num_steps"]
  if path.exists():
    stored = files.read_json(path)
    if (stored["stage"], stored["step"]) == (stage, done):
      console.print(f"[green]evaluation stands[/] in {path.parent}")
      return
  model = pretrained.load(run)
  scoring.evaluate_run(
    model,
    config,
    run / "evaluation",
    console,
    max_questions=config["evaluation"]["max_questions"] or None,
  )


if __name__ == "__main__":
  sys.exit(main(sys.argv))
