"""`convert verify` without a process of PyTorch's own."""

import subprocess
import sys

from mole_jax.interop import verify
from mole_jax.interop.with_torch import run_model


def patch(monkeypatch):
  """Runs that program here: five seconds of imports less, all else alike."""

  def run(command, **_):
    assert command[1:3] == ["-m", verify.PROGRAM]
    monkeypatch.setattr(sys, "argv", command[2:])
    return subprocess.CompletedProcess(command, run_model.main())

  monkeypatch.setattr(verify.subprocess, "run", run)
