"""A worker that dies with a job in its hands."""

import os
import signal

from mole_jax.data import workers


def kill_at(patch, is_fatal):
  """Workers get each job, and SIGKILL with those that are fatal."""
  give = workers._Worker.give

  def give_and_kill(self, job):
    if not is_fatal(job):
      return give(self, job)
    # Stopped first, so that it cannot answer before it dies.
    os.kill(self._process.pid, signal.SIGSTOP)
    give(self, job)
    self._process.kill()

  patch.setattr(workers._Worker, "give", give_and_kill)
