r"""TPU pods through queued resources, from a laptop with gcloud.

python -m launch.tpu create NAME --type v5litepod-16 --zone ZONE \
    --git URL@COMMIT [-- COMMAND]
python -m launch.tpu status|logs|ssh|delete NAME --zone ZONE
python -m launch.tpu run NAME --zone ZONE -- COMMAND
python -m launch.tpu babysit NAME ... -- COMMAND     create, run, resume, delete
python -m launch.tpu types                           what there is

--dry-run prints the gcloud commands and runs none; `create` and `babysit` write
the startup script that these name, runs/launch/NAME.sh, either way. Needs
Python and gcloud (logged in, with a project), nothing else. Exit codes: 0 done;
1 gcloud failed, or the run could not be finished; 2 wrong usage; 130 or 143
stopped: the TPU stays, and costs.
"""

import argparse
import datetime
import pathlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence

from launch import babysit, gcloud, guard, worker
from mole_jax.parallel import accelerators

HERE = pathlib.Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  argv = list(sys.argv[1:] if argv is None else argv)
  # What comes after -- is the workers' command, whatever it looks like.
  cut = argv.index("--") if "--" in argv else len(argv)
  args = _parser().parse_args(argv[:cut])
  args.command = tuple(argv[cut + 1 :])
  try:
    if args.command and args.run not in (_create, _run, _babysit):
      raise ValueError(
        f"{args.verb} takes no command after --; `run` starts one."
      )
    return args.run(args)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except (gcloud.GcloudError, babysit.GaveUpError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m launch.tpu", description=__doc__.splitlines()[0]
  )
  verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

  def verb(name, run, text, has_name=True):
    sub = verbs.add_parser(name, help=text, description=text)
    sub.set_defaults(run=run)
    if has_name:
      sub.add_argument("name", help="of the queued resource")
      sub.add_argument("--zone", required=True)
      sub.add_argument("--project", default="", help="default: gcloud's own")
      sub.add_argument("--slices", type=int, default=1, metavar="N")
      sub.add_argument("--dry-run", action="store_true")
    return sub

  _add_machine(verb("create", _create, "Asks for a TPU; install at its boot."))
  verb("status", _status, "State of the resource and of every worker.")
  logs = verb("logs", _logs, "The workers' log.")
  logs.add_argument("--worker", default="0", help="0, 1-3 or all")
  logs.add_argument("--lines", type=int, default=100)
  logs.add_argument("--follow", action="store_true")
  ssh = verb("ssh", _ssh, "A shell on one worker.")
  ssh.add_argument("--worker", default="0")
  ssh.add_argument("--slice", type=int, default=0, help="of several slices")
  verb("run", _run, "Starts the command after -- on all workers.")
  sub = verb("babysit", _babysit, "Create, run, resume until it is done.")
  _add_machine(sub)
  sub.add_argument(
    "--max-failures",
    type=int,
    default=5,
    help="give up after so many alike (default 5); being preempted does not "
    "count once the command ran for 10 minutes",
  )
  sub.add_argument("--poll", type=float, default=60.0, help="seconds")
  sub.add_argument(
    "--keep", action="store_true", help="do not delete the TPU when done"
  )
  verb("delete", _delete, "Deletes the resource with its machines.")
  verb("types", _types, "Accelerators that can be asked for.", has_name=False)
  return parser


def _add_machine(sub: argparse.ArgumentParser) -> None:
  sub.add_argument("--type", required=True, help="v5litepod-16 or v5e:4x4")
  source = sub.add_mutually_exclusive_group(required=True)
  source.add_argument("--git", default="", metavar="URL@COMMIT")
  source.add_argument("--wheel", default="", metavar="gs://B/F.whl#sha256=HEX")
  sub.add_argument("--lock", type=pathlib.Path, default=HERE / "tpu.lock")
  sub.add_argument(
    "--configs",
    type=pathlib.Path,
    default=pathlib.Path("configs"),
    help="goes along with a wheel",
  )
  sub.add_argument(
    "--mount",
    default="",
    metavar="DISK",
    help="nfs:HOST:/EXPORT or gcs:BUCKET, where runs/, data/ and weights/ are",
  )
  sub.add_argument(
    "--secret",
    action="append",
    default=[],
    metavar="VARIABLE=NAME",
    help="environment variable from a secret of Secret Manager",
  )
  kind = sub.add_mutually_exclusive_group()
  kind.add_argument("--spot", action="store_true")
  kind.add_argument("--reserved", action="store_true")
  sub.add_argument("--runtime-version", default="", help="default: by type")
  for name in ("service-account", "network", "subnetwork"):
    sub.add_argument(f"--{name}", default="")
  sub.add_argument("--valid-until-duration", default="", metavar="6h")
  sub.add_argument("--labels", default="", metavar="KEY=VALUE,...")
  sub.add_argument("--internal-ips", action="store_true")


def _target(args: argparse.Namespace) -> gcloud.Target:
  return gcloud.Target(args.name, args.zone, args.project, args.slices)


def _make_create(
  args: argparse.Namespace, command: tuple[str, ...]
) -> tuple[list[str], accelerators.Accelerator]:
  """Writes the startup script; the command that asks for the machines."""
  target = _target(args)
  accelerator = accelerators.find(args.type)
  print(accelerator.describe())
  if not args.lock.is_file():
    raise ValueError(
      f"--lock {args.lock} is missing; write it with python -m launch.lock "
      f"--extra tpu --out {args.lock}"
    )
  text = worker.render(
    worker.Worker(
      lock=args.lock.read_text(),
      git=args.git,
      wheel=args.wheel,
      configs=args.configs,
      mount=args.mount,
      secrets=_pairs(args.secret, "--secret"),
      project=args.project,
      command=command,
    )
  )
  path = pathlib.Path("runs") / "launch" / f"{target.name}.sh"
  argv = gcloud.create(target, accelerator, str(path), options=_options(args))
  if args.runtime_version:
    argv = [
      f"--runtime-version={args.runtime_version}"
      if word.startswith("--runtime-version=")
      else word
      for word in argv
    ]
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  return argv, accelerator


def _options(args: argparse.Namespace) -> list[str]:
  options = [
    f"--{name}"
    for name in ("spot", "reserved", "internal-ips")
    if getattr(args, name.replace("-", "_"))
  ]
  for name in (
    "service-account",
    "network",
    "subnetwork",
    "valid-until-duration",
    "labels",
  ):
    value = getattr(args, name.replace("-", "_"))
    if value:
      options.append(f"--{name}={value}")
  guard.refuse_secrets(
    [*options, *args.labels.split(",")], "the options of create"
  )
  return options


def _pairs(words: Sequence[str], flag: str) -> dict[str, str]:
  pairs = {}
  for word in words:
    name, is_pair, value = word.partition("=")
    if not is_pair:
      raise ValueError(f"{flag} {word}: wanted VARIABLE=NAME.")
    pairs[name] = value
  return pairs


def _call(args: argparse.Namespace, *commands: Sequence[str]) -> int:
  """Runs commands with the terminal as it is, or prints them."""
  for argv in commands:
    if args.dry_run:
      print(shlex.join(argv))
      continue
    try:
      code = subprocess.call(argv)
    except FileNotFoundError:
      raise ValueError("gcloud is not installed, or not on PATH.") from None
    if code:
      return 1
  return 0


def _create(args: argparse.Namespace) -> int:
  argv, _ = _make_create(args, args.command)
  code = _call(args, argv)
  if code == 0 and not args.dry_run:
    print(f"Look: {_again('status', args)}\nEnd it: {_again('delete', args)}")
  return code


def _status(args: argparse.Namespace) -> int:
  target = _target(args)
  states = [gcloud.on_workers(target, node, ["state"]) for node in target.nodes]
  if args.dry_run:
    return _call(args, gcloud.describe(target), *states)
  state, reason = gcloud.read_state(target)
  print(f"{target.name}: {state}" + (f" ({reason})" if reason else ""))
  if state == "ACTIVE":
    for argv in states:
      print(gcloud.run(argv).strip())
  return 0


def _logs(args: argparse.Namespace) -> int:
  target = _target(args)
  words = ["log", str(args.lines), *(["follow"] if args.follow else [])]
  return _call(
    args,
    *(
      gcloud.on_workers(target, node, words, args.worker)
      for node in target.nodes
    ),
  )


def _ssh(args: argparse.Namespace) -> int:
  target = _target(args)
  if not 0 <= args.slice < target.slices:
    raise ValueError(f"--slice {args.slice}: there are {target.slices}.")
  return _call(
    args, gcloud.log_in(target, target.nodes[args.slice], args.worker)
  )


def _run(args: argparse.Namespace) -> int:
  target = _target(args)
  _need_command(args)
  return _call(
    args,
    *(
      gcloud.on_workers(target, node, ["start", *args.command])
      for node in target.nodes
    ),
  )


def _delete(args: argparse.Namespace) -> int:
  return _call(args, gcloud.delete(_target(args)))


def _types(args: argparse.Namespace) -> int:
  del args
  for row in accelerators.ACCELERATORS:
    runtime = row.chip.runtime_version if row.gcloud_name else "not here"
    print(f"{row.describe()}; runtime {runtime}")
  return 0


def _babysit(args: argparse.Namespace) -> int:
  target = _target(args)
  _need_command(args)
  worker.check_survives(args.command, args.mount)
  # The command is started over ssh once all workers are ready, not at boot.
  create, accelerator = _make_create(args, ())
  if args.dry_run:
    return _print_plan(args, target, create)
  plan = babysit.Plan(
    target,
    tuple(create),
    args.command,
    hosts=accelerator.hosts * target.slices,
    max_failures=args.max_failures,
    poll_seconds=args.poll,
  )
  began = datetime.datetime.now()
  previous = signal.signal(signal.SIGTERM, _interrupt)
  try:
    babysit.Babysitter(plan, say=_say).watch()
  except KeyboardInterrupt as error:
    number = error.args[0] if error.args else signal.SIGINT
    _say(f"Stopped watching; {target.name} is as it was, and costs.")
    _say_what_stays(args)
    return 128 + number
  except (gcloud.GcloudError, babysit.GaveUpError):
    _say(f"Given up; {target.name} is left as it is, and may cost.")
    _say_what_stays(args)
    raise
  finally:
    signal.signal(signal.SIGTERM, previous)
  _say(f"Done after {str(datetime.datetime.now() - began).split('.')[0]}.")
  if args.keep or args.mount in ("", "none"):
    _say(f"{target.name} is kept. To delete it: {_again('delete', args)}")
    return 0
  return _call(args, gcloud.delete(target))


def _print_plan(
  args: argparse.Namespace, target: gcloud.Target, create: Sequence[str]
) -> int:
  """What babysit would run, by occasion."""
  start = ["start", *args.command]
  plan = (
    ("where there is none", [create]),
    (f"each {args.poll:g} s", [gcloud.describe(target)]),
    (
      "ACTIVE",
      [gcloud.on_workers(target, n, ["state"]) for n in target.nodes],
    ),
    (
      "all workers ready, or all ended with a code other than 0 and 2",
      [gcloud.on_workers(target, n, start) for n in target.nodes],
    ),
    (
      "SUSPENDED, FAILED or preempted; then from the top, same workdir",
      [gcloud.delete(target, is_async=True)],
    ),
  )
  for occasion, commands in plan:
    print(f"# {occasion}:")
    _call(args, *commands)
  return 0


def _need_command(args: argparse.Namespace) -> None:
  if not args.command:
    raise ValueError(
      "give the command after --, for example -- python -m mole_jax.main "
      "--config=configs/mole3.py --workdir=runs/mole3"
    )
  guard.refuse_secrets(args.command, "the command")


def _interrupt(number: int, frame: object) -> None:
  del frame
  raise KeyboardInterrupt(number)


def _say(text: str) -> None:
  print(text, flush=True)


def _say_what_stays(args: argparse.Namespace) -> None:
  _say(f"Look at it: {_again('status', args)}")
  _say("Go on watching: the same command again.")
  _say(f"Delete it: {_again('delete', args)}")


def _again(verb: str, args: argparse.Namespace) -> str:
  """The command line of another verb for the same resource."""
  words = ["python", "-m", "launch.tpu", verb, args.name, "--zone", args.zone]
  if args.project:
    words += ["--project", args.project]
  if args.slices > 1:
    words += ["--slices", str(args.slices)]
  return shlex.join(words)


if __name__ == "__main__":
  sys.exit(main())
