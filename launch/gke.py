r"""TPUs on Google Kubernetes Engine: a JobSet manifest, or xpk's command.

python -m launch.gke jobset NAME --type v5p:4x4x4 --image IMAGE --claim DISK \
    -- python -m mole_jax.main --config=configs/mole3.py --workdir=runs/mole3 \
    | kubectl apply -f -
python -m launch.gke xpk NAME --type v5p:4x4x4 --image IMAGE --cluster CLUSTER \
    -- python -m mole_jax.main --config=configs/mole3.py --workdir=runs/mole3

Both are printed, not run. IMAGE has this repository installed in its working
directory; --claim is a PersistentVolumeClaim that many nodes may write
(Filestore, say), where runs/, data/ and weights/ are. Exit codes: 0 or 2.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from launch import decisions, guard
from mole_jax.parallel import accelerators

# Seconds between SIGTERM and SIGKILL: time to save a checkpoint.
GRACE_SECONDS = 120
CONTAINER = "train"
FOLDERS = ("runs", "data", "weights")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  argv = list(sys.argv[1:] if argv is None else argv)
  cut = argv.index("--") if "--" in argv else len(argv)
  args = _parser().parse_args(argv[:cut])
  command = argv[cut + 1 :]
  try:
    accelerator = _check(args, command)
    if args.verb == "jobset":
      print(json.dumps(make_jobset(args, accelerator, command), indent=2))
    else:
      print(shlex.join(make_xpk(args, accelerator, command)))
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(accelerator.describe(), file=sys.stderr)
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m launch.gke", description=__doc__.splitlines()[0]
  )
  verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
  for verb in ("jobset", "xpk"):
    sub = verbs.add_parser(verb)
    sub.add_argument("name")
    sub.add_argument("--type", required=True, help="v5p-128 or v5p:4x4x4")
    sub.add_argument("--image", required=True)
    sub.add_argument("--slices", type=int, default=1)
    sub.add_argument(
      "--max-restarts",
      type=int,
      default=5,
      help="after failures; being interrupted (130, 143) does not count in a "
      "JobSet",
    )
    if verb == "jobset":
      sub.add_argument("--namespace", default="default")
      sub.add_argument("--claim", default="", help="disk of runs/, data/ ...")
      sub.add_argument(
        "--workdir", default="/app", help="the image's working directory"
      )
      sub.add_argument(
        "--secret", default="", help="a Secret whose keys become variables"
      )
      sub.add_argument("--spot", action="store_true")
    else:
      sub.add_argument("--cluster", required=True)
      sub.add_argument("--zone", default="")
      sub.add_argument("--project", default="")
  return parser


def _check(
  args: argparse.Namespace, command: Sequence[str]
) -> accelerators.Accelerator:
  accelerator = accelerators.find(args.type)
  if accelerator.chip.platform != "tpu":
    raise ValueError(
      f"{accelerator.name} is no TPU; for GPUs see launch/train.sbatch and "
      "launch/sky.yaml."
    )
  if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", args.name):
    raise ValueError(
      f"name {args.name!r}: wanted 1 to 40 of a-z, 0-9 and -, beginning with a "
      "letter and not ending with -."
    )
  if not command:
    raise ValueError("give the command after --")
  if args.slices < 1 or args.max_restarts < 0:
    raise ValueError("--slices is 1 or more, --max-restarts 0 or more.")
  guard.refuse_secrets(command, "the command")
  return accelerator


def make_jobset(
  args: argparse.Namespace,
  accelerator: accelerators.Accelerator,
  command: Sequence[str],
) -> dict[str, Any]:
  """A JobSet with a job for each slice and a pod for each host.

  A pod that fails takes its job with it, and the JobSet starts all again: one
  process of a mesh cannot go on without the others.
  """
  volumes, mounts = [], []
  if args.claim:
    claim = {"claimName": args.claim}
    volumes = [{"name": "disk", "persistentVolumeClaim": claim}]
    mounts = [
      {"name": "disk", "mountPath": f"{args.workdir}/{f}", "subPath": f}
      for f in FOLDERS
    ]
  chips = str(accelerator.chips_per_host)
  container = {
    "name": CONTAINER,
    "image": args.image,
    "workingDir": args.workdir,
    "command": list(command),
    "resources": {
      "requests": {"google.com/tpu": chips},
      "limits": {"google.com/tpu": chips},
    },
    "volumeMounts": mounts,
  }
  if args.secret:
    container["envFrom"] = [{"secretRef": {"name": args.secret}}]
  selector = {
    "cloud.google.com/gke-tpu-accelerator": accelerator.chip.gke_label,
    "cloud.google.com/gke-tpu-topology": accelerator.topology,
  }
  if args.spot:
    selector["cloud.google.com/gke-spot"] = "true"
  pod = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": GRACE_SECONDS,
    "nodeSelector": selector,
    "containers": [container],
    "volumes": volumes,
  }
  resumed = sorted(decisions.RESUME_CODES)
  job = {
    "parallelism": accelerator.hosts,
    "completions": accelerator.hosts,
    "backoffLimit": 0,
    "podFailurePolicy": {"rules": [_fail_job_on(resumed)]},
    "template": {"spec": pod},
  }
  annotation = "alpha.jobset.sigs.k8s.io/exclusive-topology"
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {
      "name": args.name,
      "namespace": args.namespace,
      "annotations": {annotation: "cloud.google.com/gke-nodepool"},
    },
    "spec": {
      "failurePolicy": {
        "maxRestarts": args.max_restarts,
        "rules": [
          {
            "name": "interrupted",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
          }
        ],
      },
      "replicatedJobs": [
        {
          "name": "slice",
          "replicas": args.slices,
          "template": {"spec": job},
        }
      ],
    },
  }


def _fail_job_on(codes: Sequence[int]) -> dict[str, Any]:
  return {
    "action": "FailJob",
    "onExitCodes": {
      "containerName": CONTAINER,
      "operator": "In",
      "values": list(codes),
    },
  }


def make_xpk(
  args: argparse.Namespace,
  accelerator: accelerators.Accelerator,
  command: Sequence[str],
) -> list[str]:
  """xpk's command line; it restarts on codes from 127 up by itself."""
  where = [f"--{k}={v}" for k in ("zone", "project") if (v := getattr(args, k))]
  return [
    "xpk",
    "workload",
    "create",
    f"--workload={args.name}",
    f"--cluster={args.cluster}",
    *where,
    f"--tpu-type={accelerator.cores_name}",
    f"--num-slices={args.slices}",
    f"--docker-image={args.image}",
    f"--max-restarts={args.max_restarts}",
    "--restart-on-exit-codes=1",
    f"--termination-grace-period-seconds={GRACE_SECONDS}",
    f"--command={shlex.join(command)}",
  ]


if __name__ == "__main__":
  sys.exit(main())
