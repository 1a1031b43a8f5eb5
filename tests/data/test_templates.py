"""The oracle is Transformers' apply_chat_template on the same files."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mole_jax.data import jinja, templates
from mole_jax.data.conversation import (
  IGNORE_LABEL,
  SkippedSample,
  encode_caption,
  encode_chat,
  encode_prompt,
)
from mole_jax.data.tokenizer import Tokenizer
from tests.data import chat_files

N = IGNORE_LABEL
ROLES = ("user", "assistant")
MARK = '\x1f"\ue0a7Content 1\ue0a7"\x1f'
# What somebody may write who wants to be taken for a template.
NASTY = st.one_of(
  st.text(max_size=6),
  st.text("a <|>\n{%", max_size=6),
  st.sampled_from(
    [
      "<|im_end|>", "</s>", "<|eot|>", "<|end|>\n", "<s>", "{{ 7 * 7 }}",
      "{% raw %}", "[/INST]", "</think>", " a ", "\n\n", MARK, "\ue0a7", "",
    ]
  ),
)  # fmt: skip
PLAIN = st.from_regex(
  r"[a-e.?]{1,3}( {1,2}[a-eé]{1,4}|\n[a-c]){0,3}", fullmatch=True
)
few = settings(max_examples=20)  # For each of 20 tokenizers and templates.


class Chat:
  """A tokenizer with a template, ours and theirs, of the same files."""

  def __init__(self, folder, kind, source, is_list=False):
    path = chat_files.write(folder, kind, source)
    self.text = Tokenizer(path)
    self.template = templates.read_template("tokenizer", self.text)
    self.is_list = is_list
    self.theirs = PreTrainedTokenizerFast(
      tokenizer_file=str(path),
      bos_token="<s>",
      eos_token="</s>",
      chat_template=source,
    )

  def reference(self, values, system="", is_prompt=False):
    """Their ids; a question that starts with <image>\\n has an image."""
    messages = [("system", system)] * bool(system)
    messages += [(ROLES[i % 2], value) for i, value in enumerate(values)]
    if self.is_list:
      split = lambda v: (
        [{"type": "image"}] * v.count("<image>")
        + [{"type": "text", "text": v.replace("<image>\n", "")}]
      )
      messages = [(role, split(value)) for role, value in messages]
    return self.theirs.apply_chat_template(
      [{"role": role, "content": content} for role, content in messages],
      tokenize=True,
      add_generation_prompt=is_prompt,
      return_dict=False,
    )

  def encode(self, values, system="", max_length=9999, num_image_tokens=1):
    return encode_chat(
      self.text,
      turns(values),
      num_images=sum(value.count("<image>") for value in values),
      num_image_tokens=num_image_tokens,
      max_length=max_length,
      system=system,
      use_bos=False,
      template=self.template,
    )

  def prompt(self, values, system="", num_image_tokens=1):
    return encode_prompt(
      self.text,
      turns(values),
      num_image_tokens=num_image_tokens,
      system=system,
      use_bos=False,
      template=self.template,
    ).tolist()


def turns(values):
  roles = ("human", "gpt")
  return [{"from": roles[i % 2], "value": v} for i, v in enumerate(values)]


def learnt(encoded):
  """Ids of each stretch that is learnt."""
  is_learnt = encoded.labels != N
  starts = np.flatnonzero(np.diff(is_learnt, prepend=False) & is_learnt)
  stops = np.flatnonzero(np.diff(is_learnt, append=False) & is_learnt) + 1
  return [
    encoded.input_ids[start:stop].tolist()
    for start, stop in zip(starts, stops, strict=True)
  ]


@pytest.fixture(scope="module", params=chat_files.KINDS)
def kind(request):
  return request.param


@pytest.fixture(scope="module", params=list(chat_files.TEMPLATES))
def chat(request, kind, tmp_path_factory):
  source, end, is_list = chat_files.TEMPLATES[request.param]
  made = Chat(tmp_path_factory.mktemp("chat"), kind, source, is_list)
  made.end = made.text.special_tokens[end].id
  return made


@pytest.fixture
def make_chat(tmp_path):
  return lambda source, kind="byte-level": Chat(tmp_path, kind, source)


@few
@given(
  values=st.lists(PLAIN, min_size=1, max_size=5),
  system=st.sampled_from(["", "Be brief."]),
  has_image=st.booleans(),
)
def test_ids_are_those_of_transformers(chat, values, system, has_image):
  if has_image:
    values[0] = f"<image>\n{values[0]}"
  if chat.is_list:
    values = values[:1]  # The answers of that one have no end of their own.
  if len(values) % 2:
    theirs = chat.reference(values, system, is_prompt=True)
    assert chat.prompt(values, system) == theirs
  else:
    theirs = chat.reference(values, system)
    assert chat.encode(values, system).input_ids.tolist() == theirs


@few
@given(
  values=st.lists(NASTY, min_size=2, max_size=6),
  images=st.lists(st.integers(0, 2), min_size=3, max_size=3),
  system=st.sampled_from(["", "Be brief.", "<|im_end|>{{ 1 }}"]),
)
def test_training_ids_are_prompt_ids_then_answer_ids(
  chat, values, images, system
):
  values = values[: len(values) // 2 * 2]
  for i in range(0, len(values), 2):
    values[i] = "<image>" * images[i // 2] + values[i]
  whole = chat.encode(values, system, num_image_tokens=2)
  ids = whole.input_ids.tolist()
  spans = learnt(whole)
  assert len(spans) == len(values) // 2
  for i, span in zip(range(1, len(values), 2), spans, strict=True):
    prompt = chat.prompt(values[:i], system, num_image_tokens=2)
    assert ids[: len(prompt)] == prompt
    assert ids[len(prompt) : len(prompt) + len(span)] == span
    assert span == templates.answer_ids(chat.template, chat.text, values[i])
    assert span[-1] == chat.end and chat.end not in span[:-1]


@few
@given(said=NASTY, asked=NASTY)
def test_no_text_becomes_a_special_token(chat, said, asked):
  special = {token.id for token in chat.text.special_tokens.values()}
  special -= {chat.text.pad_id}  # <unk>, for characters it does not know.
  only = lambda values: [
    i for i in chat.encode(values).input_ids.tolist() if i in special
  ]
  assert only([asked, said]) == only(["a", "a"])


@few
@given(text=NASTY)
def test_text_comes_back_as_it_was_written(chat, text):
  if "Ġ" not in chat.text._tokenizer.get_vocab():
    return  # Only bytes hold every text.
  ids = chat.encode(["q", text]).input_ids
  again = chat.text.decode(ids)
  assert text.strip() in again


def test_exactly_the_answers_and_their_ends_are_learnt(chat):
  encoded = chat.encode(["<image>\na cat?", "yes, two", "and", "no more"])
  first, second = learnt(encoded)
  assert (
    first[-1]
    == second[-1]
    == chat.end
    == templates.end_id(chat.template, chat.text)
  )
  assert chat.text.decode(first).strip() == "yes, two"
  assert chat.text.decode(second).strip() == "no more"
  assert encoded.kinds == ("", "")


def test_a_cut_keeps_whole_images_only(chat):
  values = ["<image>\na", "b", "<image>\n<image>\nc", "d"]
  whole = chat.encode(values, num_image_tokens=3)
  for max_length in range(len(whole.input_ids)):
    try:
      cut = chat.encode(values, max_length=max_length, num_image_tokens=3)
    except SkippedSample as error:
      assert error.reason == "no_supervision"
      continue
    count = len(cut.input_ids)
    assert cut.input_ids.tolist() == whole.input_ids[:count].tolist()
    assert (cut.input_ids == chat.text.image_id).sum() == 3 * cut.num_images
    assert count <= max_length < count + 9


@pytest.mark.parametrize("kind", chat_files.KINDS)
def test_a_template_that_strips_contents_is_followed(tmp_path, kind):
  chat = Chat(tmp_path, kind, chat_files.LLAMA3)
  values = ["  a cat \n", " b\n", "\n", "c "]
  theirs = chat.reference(values, "  be kind ")
  assert chat.encode(values, "  be kind ").input_ids.tolist() == theirs


def test_a_chat_is_rendered_once_for_each_shape(make_chat, monkeypatch):
  chat = make_chat(chat_files.CHATML)
  chat.encode(["a", "b"])
  chat.prompt(["a", "b", "c"])
  monkeypatch.setattr(jinja.Script, "render", None)
  for i in range(5):
    chat.encode([f"<image>\na{i}", f"b{i}"])
    chat.prompt([f"a{i}", f"b{i}", f"c{i}"])


THINKING = """\
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n<think>\\n' }}
{% endif %}"""


def test_a_generation_prompt_outside_of_the_chat_is_left_out(make_chat):
  chat = make_chat(THINKING)
  prompt = chat.prompt(["a"])
  assert chat.text.decode(prompt) == "user\na\nassistant\n"
  assert chat.encode(["a", "b"]).input_ids.tolist()[: len(prompt)] == prompt
  assert learnt(chat.encode(["a", "b"])) == [
    [*chat.text.encode("b"), chat.text.special_tokens["<|im_end|>"].id]
  ]


SYSTEMLESS = "{% if messages[0]['role'] == 'system' %}"
SYSTEMLESS += "{{ raise_exception('no system role') }}{% endif %}"
SYSTEMLESS += chat_files.CHATML
IGNORING = "{% set messages = messages | selectattr('role', 'ne', 'system')"
IGNORING += " | list %}" + chat_files.CHATML


@pytest.mark.parametrize("source", [SYSTEMLESS, IGNORING])
def test_a_system_text_without_a_place_is_refused(make_chat, source):
  chat = make_chat(source)
  chat.encode(["a", "b"])
  wanted = 'config.data.system is not empty, .* set config.data.system="".'
  with pytest.raises(ValueError, match=wanted):
    chat.encode(["a", "b"], system="Be kind.")
  with pytest.raises(ValueError, match=wanted):
    chat.prompt(["a"], system="Be kind.")


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("{{ raise_exception('not like this') }}", "user, assistant: not like"),
    ("{% if %}", "is not Jinja: line 1"),
    ("{{ messages[0]['content'] }}", "does not write each of 2 messages once"),
    ("{{ messages[0].content[0].content.x }}", "cannot write a chat of user"),
    (
      "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
      "does not write each of 2 messages once and as it stands",
    ),
    ("{% set n = namespace(__class__=1) %}", "a namespace has no name"),
    ("{% set n = namespace() %}{% set n._x = 1 %}", "a namespace has no name"),
    ("{{ messages.append(1) }}", "cannot write a chat"),
    ("{{ ''.__class__.__mro__ }}{{ x.y }}", "cannot write a chat"),
  ],
)
def test_a_template_that_fails_is_named(make_chat, source, message):
  with pytest.raises(ValueError, match=f"chat_template.jinja' .*{message}"):
    make_chat(source)


def test_an_image_that_the_template_leaves_out_is_refused(tmp_path):
  source = chat_files.LLAVA.replace("<image>", "<picture>")
  chat = Chat(tmp_path, "byte-level", source, is_list=True)
  assert len(learnt(chat.encode(["a", "b"]))) == 1
  with pytest.raises(ValueError, match="writes 0 <image> for 1 images"):
    chat.encode(["<image>\na", "b"])


def test_what_templates_rely_on_is_there():
  source = """\
{%- set found = namespace(role='') %}
{%- for message in messages %}
  {%- if message.role == 'x' %}{% continue %}{% endif %}
  {%- set found.role = message.role %}
  {%- generation %}{{ found.role }}{% endgeneration %}
  {%- break %}
{%- endfor %}
{{ dict(a='<é>') | tojson }} {{ bos_token }}{{ nothing }}
    {% if tools is none %}
{{ strftime_now('%Y') | length }}
    {% endif %}
"""
  script = jinja.Script(source, "here")
  messages = [{"role": "x"}, {"role": "y"}, {"role": "z"}]
  names = {"bos_token": "<s>"}
  assert script.render(messages, False, names) == 'y{"a": "<é>"} <s>\n4\n'


def store(folder, **files):
  """The template's text in one of the files it may stand in."""
  path = chat_files.write(folder, "byte-level", chat_files.CHATML)
  (folder / "chat_template.jinja").unlink()
  for name, value in files.items():
    target = (
      folder
      / {
        "jinja": "chat_template.jinja",
        "config": "tokenizer_config.json",
        "json": "chat_template.json",
      }[name]
    )
    if name != "jinja":
      value = json.dumps({"eos_token": "</s>", "chat_template": value})
    target.write_text(value)
  return Tokenizer(path)


ONE, TWO = (
  "{% for m in messages %}" + word + "{{ m.content }}{% endfor %}"
  for word in ("one", "two")
)


@pytest.mark.parametrize(
  "files",
  [
    {"jinja": ONE, "config": TWO, "json": TWO},
    {"config": ONE, "json": TWO},
    {"config": [dict(name="default", template=ONE), dict(name="tool_use",
                                                        template=TWO)]},
    {"json": ONE},
  ],
)  # fmt: skip
def test_the_template_is_found_in_each_of_its_files(tmp_path, files):
  text = store(tmp_path, **files)
  template = templates.read_template("tokenizer", text)
  assert text.decode(templates.answer_ids(template, text, "x")) == "onex"


def test_an_absent_template_is_named(tmp_path):
  with pytest.raises(ValueError, match="there is no chat template in"):
    templates.read_template("tokenizer", store(tmp_path))
  text = store(tmp_path, config=[dict(name="rag", template=ONE)])
  with pytest.raises(ValueError, match=r"has the chat templates \['rag'\]"):
    templates.read_template("tokenizer", text)


def test_an_unknown_name_is_refused(toy_tokenizer):
  wanted = r"config.data.template='llama3'; wanted one of \['vicuna', 'tok"
  with pytest.raises(ValueError, match=wanted):
    templates.read_template("llama3", toy_tokenizer)
  assert templates.read_template("vicuna", toy_tokenizer) is templates.VICUNA


def test_bos_that_the_tokenizer_lacks_is_refused(tmp_path):
  path = chat_files.write(tmp_path, "byte-level", chat_files.CHATML)
  config = {"bos_token": None, "eos_token": "<|im_end|>"}
  path.with_name("tokenizer_config.json").write_text(json.dumps(config))
  text = Tokenizer(path)
  options = dict(num_images=0, num_image_tokens=1, max_length=999)
  wanted = re.escape("config.data.use_bos=True, but the tokenizer has no bos")
  with pytest.raises(ValueError, match=wanted):
    encode_chat(text, turns(["a", "b"]), **options)
  with pytest.raises(ValueError, match=wanted):
    encode_caption(text, "a", **options)
  ids = encode_chat(text, turns(["a", "b"]), use_bos=False, **options).input_ids
  assert ids[-1] == text.special_tokens["<|im_end|>"].id
  template = templates.read_template("tokenizer", text)
  with pytest.raises(ValueError, match=wanted):
    encode_chat(text, turns(["a", "b"]), template=template, **options)


def test_bos_is_put_before_a_template_that_does_not_begin_with_it(chat):
  values = ["a <image>", "b", "c", "d"]
  plain = chat.encode(values).input_ids.tolist()
  bos = [chat.text.bos_id]
  with_bos = encode_chat(
    chat.text,
    turns(values),
    num_images=1,
    num_image_tokens=1,
    max_length=9999,
    system="",
    use_bos=True,
    template=chat.template,
  )
  wanted = plain if plain[:1] == bos else bos + plain
  assert with_bos.input_ids.tolist() == wanted
