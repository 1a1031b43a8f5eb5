"""Jinja scripts of chat templates, run in a sandbox.

They come with downloaded weights: what they may do is what Transformers lets
them do (`transformers/utils/chat_template_utils.py`).
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

Message = dict[str, Any]  # {"role": ..., "content": ...}.


class Script:
  """A compiled template.

  name: the file it stands in, for messages.
  source: what stands there.

  Raises ValueError where it is no Jinja.
  """

  name: str
  source: str

  def __init__(self, source: str, name: str):
    self.name = f"the chat template in {name!r}"
    self.source = source
    self._file = name
    try:
      self._template = _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
      raise ValueError(
        f"{self.name} is not Jinja: line {error.lineno}: {error}"
      ) from error

  def __reduce__(self):
    return Script, (self.source, self._file)  # Compiled code cannot travel.

  def render(
    self,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    names: Mapping[str, str],
  ) -> str:
    """The text of a chat.

    Args:
      messages: role and content of each.
      add_generation_prompt: whether the beginning of an answer follows.
      names: further variables, such as bos_token.

    Raises:
      ValueError: where the template raises, whatever it raises.
    """
    try:
      return self._template.render(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        tools=None,
        documents=None,
        **names,
      )
    except Exception as error:
      roles = ", ".join(message["role"] for message in messages)
      raise ValueError(
        f"{self.name} cannot write a chat of {roles}: {error}"
      ) from error


class _Generation(jinja2.ext.Extension):
  """{% generation %} ... {% endgeneration %}, which marks answers: as is."""

  tags = {"generation"}

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
  """Jinja's, without the names that lead into Python's own objects."""

  def __init__(*args: Any, **kwargs: Any):  # A template may set `self`.
    self, *rest = args
    jinja2.utils.Namespace.__init__(self)
    for name, value in dict(*rest, **kwargs).items():
      self[name] = value

  def __setitem__(self, name: str, value: Any) -> None:
    if name.startswith("_"):
      raise jinja2.TemplateError(f"a namespace has no name {name!r}.")
    super().__setitem__(name, value)


def _environment() -> jinja2.Environment:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[jinja2.ext.loopcontrols, _Generation],
  )
  environment.filters["tojson"] = _to_json
  environment.globals.update(
    namespace=_Namespace,
    dict=lambda *args, **kwargs: dict(*args, **kwargs),
    raise_exception=_raise,
    strftime_now=lambda form: datetime.datetime.now().strftime(form),
  )
  return environment


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """Jinja's own escapes what HTML does not allow, and sorts."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _raise(message: str) -> None:
  raise jinja2.TemplateError(message)
