"""JobSet manifests and xpk's command.

The schema below is our own and short: the fields that we write, with their
types and bounds, and no others. Manifests were also checked against the custom
resource definition of JobSet (August 2026), which is not ours to copy.
"""

import json
import shlex

import jsonschema
import pytest

from launch import gke
from mole_jax.parallel import accelerators

NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}


def closed(required=(), **properties):
  return {
    "type": "object",
    "properties": properties,
    "required": list(required),
    "additionalProperties": False,
  }


def listed(item):
  return {"type": "array", "items": item}


CONTAINER = closed(
  ["name", "image", "command", "resources"],
  name=NAME,
  image={"type": "string"},
  workingDir={"type": "string", "pattern": "^/"},
  command=listed({"type": "string"}),
  resources=closed(requests=STRINGS, limits=STRINGS),
  envFrom=listed(closed(["secretRef"], secretRef=closed(["name"], name=NAME))),
  volumeMounts=listed(
    closed(
      ["name", "mountPath"],
      name=NAME,
      mountPath={"type": "string"},
      subPath={"type": "string"},
    )
  ),
)
POD = closed(
  ["restartPolicy", "containers"],
  restartPolicy={"const": "Never"},  # What podFailurePolicy asks for.
  terminationGracePeriodSeconds=COUNT,
  nodeSelector=STRINGS,
  containers={"minItems": 1, **listed(CONTAINER)},
  volumes=listed(
    closed(
      ["name", "persistentVolumeClaim"],
      name=NAME,
      persistentVolumeClaim=closed(["claimName"], claimName=NAME),
    )
  ),
)
FAIL = closed(
  ["action", "onExitCodes"],
  action={"enum": ["FailJob", "Ignore", "Count"]},
  onExitCodes=closed(
    ["operator", "values"],
    containerName=NAME,
    operator={"enum": ["In", "NotIn"]},
    values=listed({"type": "integer", "minimum": 1, "maximum": 255}),
  ),
)
JOB = closed(
  ["template"],
  parallelism=COUNT,
  completions=COUNT,
  backoffLimit=COUNT,
  podFailurePolicy=closed(["rules"], rules=listed(FAIL)),
  template=closed(["spec"], spec=POD),
)
SCHEMA = closed(
  ["apiVersion", "kind", "metadata", "spec"],
  apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
  kind={"const": "JobSet"},
  metadata=closed(["name"], name=NAME, namespace=NAME, annotations=STRINGS),
  spec=closed(
    ["replicatedJobs"],
    failurePolicy=closed(
      maxRestarts=COUNT,
      rules=listed(
        closed(
          ["name", "action"],
          name={"type": "string", "pattern": "^[A-Za-z]"},
          action={
            "enum": [
              "FailJobSet",
              "RestartJobSet",
              "RestartJobSetAndIgnoreMaxRestarts",
            ]
          },
          onJobFailureReasons=listed({"type": "string"}),
        )
      ),
    ),
    replicatedJobs=listed(
      closed(
        ["name", "template"],
        name=NAME,
        replicas=COUNT,
        template=closed(["spec"], spec=JOB),
      )
    ),
  ),
)
COMMAND = ["--", "python", "-m", "mole_jax.main", "--workdir=runs/it's mine"]


def make(capsys, verb, *argv):
  assert gke.main([verb, "mole3", "--image=image", *argv, *COMMAND]) == 0
  return capsys.readouterr().out


@pytest.mark.parametrize(
  "row",
  [r for r in accelerators.ACCELERATORS if r.chip.platform == "tpu"],
  ids=lambda r: r.name,
)
def test_a_jobset_for_every_tpu_fits_the_schema_and_the_slice(capsys, row):
  text = make(
    capsys, "jobset", f"--type={row.name}", "--slices=2", "--claim=disk",
    "--secret=tokens", "--spot",
  )  # fmt: skip
  manifest = json.loads(text)
  jsonschema.validate(manifest, SCHEMA)
  (slices,) = manifest["spec"]["replicatedJobs"]
  job = slices["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  assert slices["replicas"] == 2
  assert job["parallelism"] == job["completions"] == row.hosts
  chips = int(container["resources"]["limits"]["google.com/tpu"])
  assert chips * job["parallelism"] == row.chips
  labels = pod["nodeSelector"]
  assert labels["cloud.google.com/gke-tpu-topology"] == row.topology
  assert container["command"] == COMMAND[1:]
  mounted = {m["mountPath"]: m["subPath"] for m in container["volumeMounts"]}
  assert mounted["/app/runs"] == "runs"


def test_the_schema_refuses_a_wrong_word(capsys):
  manifest = json.loads(make(capsys, "jobset", "--type=v5e:4x4"))
  manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 0
  with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
    jsonschema.validate(manifest, SCHEMA)


def test_being_interrupted_restarts_all_without_counting(capsys):
  spec = json.loads(make(capsys, "jobset", "--type=v5e:4x4"))["spec"]
  (rule,) = spec["failurePolicy"]["rules"]
  assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
  job = spec["replicatedJobs"][0]["template"]["spec"]
  (fail,) = job["podFailurePolicy"]["rules"]
  assert fail["onExitCodes"]["values"] == [130, 143]
  assert job["backoffLimit"] == 0
  assert spec["failurePolicy"]["maxRestarts"] == 5


def test_xpk_gets_flat_words_and_the_command_as_one(capsys):
  text = make(
    capsys, "xpk", "--type=v5p:4x4x4", "--cluster=c", "--zone=us-east5-a"
  )
  argv = shlex.split(text)
  assert argv[:-1] == [
    *["xpk", "workload", "create", "--workload=mole3", "--cluster=c"],
    *["--zone=us-east5-a", "--tpu-type=v5p-128", "--num-slices=1"],
    *["--docker-image=image", "--max-restarts=5", "--restart-on-exit-codes=1"],
    "--termination-grace-period-seconds=120",
  ]
  assert shlex.split(argv[-1].removeprefix("--command=")) == COMMAND[1:]


@pytest.mark.parametrize(
  "argv, message",
  [
    (["--type=h100:8", *COMMAND], "train.sbatch"),
    (["--type=v5e:4x4"], "give the command after --"),
    (["--type=v5e:4x4", "--", "env", "HF_TOKEN=x"], "looks like a secret"),
    (["--type=v5e:4x4", "--slices=0", *COMMAND], "--slices is 1 or more"),
  ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, argv, message):
  assert gke.main(["jobset", "mole3", "--image=image", *argv]) == 2
  error = capsys.readouterr().err
  assert message in error and len(error.splitlines()) == 1


def test_names_with_spaces_are_refused(capsys):
  argv = ["jobset", "my run", "--image=i", "--type=v5e:4x4", *COMMAND]
  assert gke.main(argv) == 2
