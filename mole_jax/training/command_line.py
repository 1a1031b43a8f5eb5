"""Mistakes in --config and its overrides, told in one line."""

import itertools
import re
import runpy
from collections.abc import Sequence
from typing import Any

import ml_collections as mlc
from absl import flags
from ml_collections import config_flags

from mole_jax.training import rundir

# What a wrong path, key, value, variant or syntax raises in a config file,
# which is code, or in ml_collections. Other errors of the file keep their
# traceback: its author needs it.
ERRORS = (
  AttributeError,
  KeyError,
  OSError,
  SyntaxError,
  TypeError,
  ValueError,
)


class UsageError(ValueError):
  """What the user typed cannot be run; the message says why."""


def read_config(argv: Sequence[str]) -> dict[str, Any]:
  """The config of --config=FILE[:variant] and overrides, as JSON holds it.

  Raises UsageError for what cannot be read, and for any other argument.
  """
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file(
    "config",
    None,
    "",
    flag_values=values,
    lock_config=True,
    sys_argv=list(argv),
  )
  found = parse(values, config, argv)
  if found is None:
    raise UsageError(
      "--config=FILE[:variant] is needed, for example --config=configs/mole3.py"
    )
  return found


def parse(
  values: flags.FlagValues, config: flags.FlagHolder, argv: Sequence[str]
) -> dict[str, Any] | None:
  """Parses flags; the config among them as JSON holds it, None without one.

  Raises UsageError as `read_config`.
  """
  try:
    rest = values(list(argv))
    # A file that cannot be read fails only here.
    found = None if config.value is None else rundir.plain(config.value)
  except (flags.Error, *ERRORS) as error:
    raise UsageError(explain(error, argv)) from None
  if len(rest) > 1:
    raise UsageError(
      f"unexpected argument {rest[1]!r}; settings look like --config.seed=1"
    )
  return found


def explain(error: Exception, argv: Sequence[str]) -> str:
  """One line for an error of ERRORS or of absl that parsing `argv` raised."""
  if isinstance(error, (KeyError, AttributeError)):
    while isinstance(error.args[0], Exception):  # One raised from another.
      error = error.args[0]
    return _explain_key(str(error.args[0]), argv)
  text = str(error).strip()
  if isinstance(error, SyntaxError):
    text = f"{error.filename} is no Python file: {error}"
  elif isinstance(error, OSError):
    # The lines before it tell how ml_collections tried to open the file.
    text = f"--config: {text.splitlines()[-1].strip()}"
  elif "Traceback (most recent call last)" in text:
    # Its last line is the error that the config file raised.
    text = re.split(r"^[\w.]+(?:Error|Exception): ", text, flags=re.M)[-1]
  return " ".join(text.split())


def _explain_key(message: str, argv: Sequence[str]) -> str:
  """ml_collections says the key, and a likely one where it sees one."""
  key, _, hint = message.partition("\n")
  key = key.strip("'\"")
  pattern = re.compile(rf"--?config\.((?:\w+\.)*){re.escape(key)}(?=[.=]|$)")
  found = [match for argument in argv if (match := pattern.match(argument))]
  if not found:
    return " ".join(message.split())
  section = found[0][1]
  hint = hint or f"Its settings are {', '.join(_keys(section, argv))}."
  where = f"config.{section}".rstrip(".")
  return f"{found[0][0]}: {where} has no setting {key!r}. {hint}"


def _keys(section: str, argv: Sequence[str]) -> list[str]:
  """The settings in a section, "stages.mole.", of the config in `argv`."""
  values = [a.split("=", 1)[1] for a in argv if re.match(r"--?config=", a)]
  values += [
    b for a, b in itertools.pairwise(argv) if re.fullmatch(r"--?config", a)
  ]
  path, *variant = values[-1].split(":", 1)
  node = runpy.run_path(path)["get_config"](*variant)
  for key in section.split(".")[:-1]:
    node = node[key]
  return sorted(node) if isinstance(node, mlc.ConfigDict) else []
