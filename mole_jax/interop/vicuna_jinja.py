"""Vicuna's chat template in the form that Transformers reads, both ways."""

import ast
import re

# As data/templates.py writes it: content may be text or a list of parts,
# images come first. BOS and SYSTEM are filled in.
_JINJA = (
  "{{ BOS }}{{ SYSTEM }}"
  "{%- for message in messages -%}"
  "{%- if message['role'] == 'user' -%}{{ 'USER: ' }}"
  "{%- if message['content'] is string -%}{{ message['content'] }}"
  "{%- else -%}"
  "{%- for part in message['content'] if part['type'] == 'image' -%}"
  "{{ '<image>\\n' }}{%- endfor -%}"
  "{%- for part in message['content'] if part['type'] == 'text' -%}"
  "{{ part['text'] }}{%- endfor -%}"
  "{%- endif -%}{{ ' ' }}"
  "{%- else -%}{{ 'ASSISTANT: ' }}"
  "{%- if message['content'] is string -%}{{ message['content'] }}"
  "{%- else -%}"
  "{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}"
  "{%- endif -%}{{ eos_token }}"
  "{%- endif -%}"
  "{%- endfor -%}"
  "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
_PATTERN = re.compile(
  re.escape(_JINJA)
  .replace("BOS", "(bos_token|'')")
  .replace("SYSTEM", r"((?:'.*'|\".*\"))"),
  re.DOTALL,
)


def write(system: str, use_bos: bool) -> str:
  """The template for a system text (may be empty)."""
  bos = "bos_token" if use_bos else "''"
  text = repr(f"{system} " if system else "")
  return _JINJA.replace("BOS", bos).replace("SYSTEM", text)


def read(source: str) -> tuple[str, bool] | None:
  """System text and use_bos of a template that `write` made; None of others."""
  match = _PATTERN.fullmatch(source)
  if match is None:
    return None
  system = ast.literal_eval(match[2])
  return system.removesuffix(" "), match[1] == "bos_token"
