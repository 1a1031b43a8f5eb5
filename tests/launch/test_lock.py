"""Locks: what pip reports becomes hashes, and those that stand are right."""

import configparser
import copy
import pathlib

import pytest
from packaging import requirements, utils

from launch import lock, worker

ROOT = pathlib.Path(__file__).parents[2]
REPORT = {
  "environment": {
    "python_version": "3.11",
    "sys_platform": "linux",
    "platform_machine": "x86_64",
  },
  "install": [
    {
      "metadata": {"name": "Some_Thing", "version": "1.0"},
      "download_info": {
        "url": "https://registry.example/x.whl",
        "archive_info": {"hashes": {"sha256": "b" * 64}},
      },
    },
    {
      "metadata": {"name": "mole_jax", "version": "0.1.0"},
      "download_info": {"url": "file:///home/me/mole_jax", "dir_info": {}},
    },
    {
      "metadata": {"name": "absl-py", "version": "2.5.1"},
      "download_info": {
        "url": "file:///somewhere/absl.whl",
        "archive_info": {"hashes": {"sha256": "a" * 64}},
      },
    },
  ],
}


def test_names_versions_and_hashes_and_no_addresses():
  text = lock.format_lock(REPORT, "tpu")
  assert text.splitlines()[2:] == [
    f"absl-py==2.5.1 --hash=sha256:{'a' * 64}",
    f"some-thing==1.0 --hash=sha256:{'b' * 64}",
  ]
  assert "://" not in text
  assert worker.python_of(text) == "python3.11"


def test_another_machine_or_a_missing_hash_is_refused():
  other = copy.deepcopy(REPORT)
  other["environment"]["platform_machine"] = "arm64"
  with pytest.raises(ValueError, match="Linux x86_64"):
    lock.format_lock(other, "tpu")
  del REPORT["install"][2]["download_info"]["archive_info"]["hashes"]
  with pytest.raises(ValueError, match="no SHA-256 for absl-py"):
    lock.format_lock(REPORT, "tpu")


@pytest.mark.parametrize("extra", ["tpu", "cuda12"])
def test_the_locks_that_stand_satisfy_setup_cfg(extra):
  text = (ROOT / "launch" / f"{extra}.lock").read_text()
  lines = [x for x in text.splitlines() if not x.startswith("#")]
  locked = {}
  for line in lines:
    pin, digest = line.split(" --hash=sha256:")
    name, version = pin.split("==")
    assert len(digest) == 64 and name not in locked
    locked[name] = version
  assert {"packaging", "setuptools", "wheel"} <= set(locked)
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  wanted = setup["options"]["install_requires"].split("\n")
  wanted += setup["options.extras_require"][extra].split("\n")
  for line in filter(None, wanted):
    need = requirements.Requirement(line)
    version = locked[utils.canonicalize_name(need.name)]
    assert version in need.specifier, f"{need}: {version}; write the lock anew"
