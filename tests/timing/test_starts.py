"""Starts of new processes: the second finds what the first compiled."""

import contextlib
import types

import pytest

from mole_jax.timing import protocol, starts


def test_starts_share_a_cache_that_is_empty_for_the_first(monkeypatch):
  commands, stopped = [], []

  @contextlib.contextmanager
  def running(side):
    commands.append(side.command)
    yield types.SimpleNamespace(stop=lambda: stopped.append(side.name))

  monkeypatch.setattr(protocol, "running", running)
  found = starts.first_steps("mole", ["--config=a.py"], ("cold", "warm"))
  assert list(found) == ["cold", "warm"]
  assert stopped == ["a cold start", "a warm start"]
  cold, warm = commands
  assert cold == warm
  assert cold[-1] == "--config=a.py"
  starts.first_steps("mole", [], ("cold",))
  at = cold.index("--cache") + 1
  assert commands[-1][at] != cold[at]


def test_a_start_that_fails_is_told():
  wanted = "(?s)a cold start ended.*none of the config's"
  with pytest.raises(protocol.SideError, match=wanted):
    starts.first_steps("nose", ["--config=configs/mole3.py"], ("cold",))
