"""Small tokenizers and chat templates in the ways of well-known ones."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

SPECIALS = (
  "<unk>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>",
  "<|start|>", "<|end_header|>", "<|end_header|>\n", "<|eot|>",
)  # fmt: skip
EATING = ("<|turn|>", "<|end|>")  # They eat the white space around them.
TEXT = [
  "What is shown in this image? A cat and a dog, and the other cat.",
  "USER: how many ASSISTANT: two or three system user assistant",
  "[INST] are there some [/INST] yes there are\n\nsome more of them é",
] * 4

CHATML = """\
{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}
{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}
{{- '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start|>' + message['role'] + '<|end_header|>\\n\\n' }}
{{- message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start|>assistant<|end_header|>\\n\\n' }}
{%- endif %}"""
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] + '\\n\\n' %}
{%- set turns = messages[1:] %}
{%- else %}
{%- set system = '' %}
{%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}
{%- endif %}
{%- if message['role'] == 'user' %}
{{- ' [INST] ' + (system if loop.first else '') + message['content'] }}
{{- ' [/INST]' }}
{%- else %}
{{- ' ' + message['content'] + eos_token }}
{%- endif %}
{%- endfor %}"""
PHI = """\
{% for message in messages %}
{{- '<|turn|>\\n' + message['role'] + ':\\n' + message['content'] }}
{{- ' <|end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|turn|>\\nassistant:\\n' }}{% endif %}"""
OPENCHAT = """\
{{- bos_token }}
{%- for message in messages %}
{{- 'GPT4 Correct ' + message['role'].title() + ': ' + message['content'] }}
{{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"""
LLAVA = """\
{%- for message in messages %}
{%- if message['role'] != 'system' %}
{{- message['role'].upper() + ': ' }}
{%- endif %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') %}
{{- '<image>\\n' }}
{%- endfor %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ part['text'] + ' ' }}{% endgeneration %}
{%- else %}
{{- part['text'] + ' ' }}
{%- endif %}
{%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
# Template, the token that ends its answers, whether contents are lists.
TEMPLATES = {
  "chatml": (CHATML, "<|im_end|>", False),
  "llama3": (LLAMA3, "<|eot|>", False),
  "mistral": (MISTRAL, "</s>", False),
  "phi": (PHI, "<|end|>", False),
  "openchat": (OPENCHAT, "<|eot|>", False),
  "llava": (LLAVA, "</s>", True),
}
KINDS = ("byte-level", "once", "always", "prepend")


def make_tokenizer(kind, specials=SPECIALS):
  """BPE of a few hundred tokens; `kind` is where it puts a space by itself.

  "byte-level": nowhere; "once": before the first text, Llama's newer way;
  "always": before each text, after special tokens too; "prepend": the same,
  by a normalizer, Llama's older way.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
  alphabet = [chr(code) for code in range(33, 127)] + ["\n"]
  if kind == "byte-level":
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
  elif kind == "prepend":
    tokenizer.normalizer = normalizers.Sequence(
      [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Replace("▁", " ")
  else:
    scheme = {"once": "first", "always": "always"}[kind]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
  trainer = trainers.BpeTrainer(
    vocab_size=450,
    special_tokens=[
      *specials,
      *(tokenizers.AddedToken(t, lstrip=True, rstrip=True) for t in EATING),
    ],
    initial_alphabet=alphabet,
    show_progress=False,
  )
  tokenizer.train_from_iterator(TEXT, trainer)
  return tokenizer


def write(folder, kind, source):
  """The files of a checkpoint with this kind of tokenizer and template."""
  make_tokenizer(kind).save(str(folder / "tokenizer.json"))
  config = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "special": True},
    "pad_token": None,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  (folder / "chat_template.jinja").write_text(source)
  return folder / "tokenizer.json"
