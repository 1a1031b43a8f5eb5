"""Keeps secrets off command lines and out of metadata."""

import re
from collections.abc import Iterable

# The name of a setting that holds a secret, in an assignment or a flag.
_NAME = re.compile(
  r"(?i)(?:.*[._-])?(?:token|secret|password|passwd|api[_-]?key|credentials?)"
)
_VALUES = (
  r"hf_[A-Za-z0-9]{20,}",
  r"gh[pousr]_[A-Za-z0-9]{20,}",
  r"github_pat_\w{20,}",
  r"glpat-[\w-]{20,}",
  r"sk-[\w-]{20,}",
  r"AKIA[0-9A-Z]{16}",
  r"AIza[\w-]{30,}",
  r"ya29\.[\w-]{20,}",
  r"-----BEGIN [A-Z ]*PRIVATE KEY",
  r"[a-z+]+://[^/\s@]*@",  # A name or token in front of a host.
)
_VALUE = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(_VALUES)})")
# git@host:path names a user, no secret.
_USER = re.compile(r"(?:git\+)?ssh://git@")


def refuse_secrets(words: Iterable[str], where: str) -> None:
  """Raises ValueError, without the secret, where a word looks like one."""
  words = list(words)
  for index, word in enumerate(words):
    name, is_pair, value = word.partition("=")
    name = name.lstrip("-")
    if not is_pair and word.startswith("--") and index + 1 < len(words):
      value = words[index + 1]
    if value and _NAME.fullmatch(name):
      raise ValueError(_message(where, f"{name!r} looks like a secret"))
    if _VALUE.search(_USER.sub("", word)):
      raise ValueError(
        _message(where, f"word {index + 1} looks like a token or has a name")
      )


def _message(where: str, what: str) -> str:
  return (
    f"{where}: {what}, and would be seen by everybody who can list processes "
    "or read metadata. Put it into Secret Manager and give its name: --secret "
    "HF_TOKEN=NAME_OF_THE_SECRET."
  )
