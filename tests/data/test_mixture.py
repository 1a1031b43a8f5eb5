import numpy as np
import pytest

from mole_jax.data import jinja, records
from mole_jax.data.conversation import encode_caption, encode_chat
from mole_jax.data.encoding import Encoder
from mole_jax.data.mixture import Source, TooManySkipped, load_mixture
from mole_jax.data.templates import VICUNA, JinjaTemplate, RoleTemplate
from mole_jax.data.tokenizer import Tokenizer
from tests.data import in_memory

OPTIONS = {
  "format": "chat",
  "num_image_tokens": 3,
  "max_length": 64,
  "max_images": 1,
  "system": "",
  "use_bos": True,
  "template": VICUNA,
}
DOMAINS = ("general", "document")


@pytest.fixture
def make_dataset(toy_tokenizer):
  def make(rows, domains=DOMAINS, **kwargs):
    encoder = Encoder(toy_tokenizer, **{**OPTIONS, **kwargs})
    return in_memory.make_dataset(rows, encoder, name="toy", domains=domains)

  return make


def load(sources, tokenizer, domains=DOMAINS, max_skipped=1.0, **kwargs):
  def make_encoder(format):
    return Encoder(tokenizer, **{**OPTIONS, **kwargs, "format": format})

  return load_mixture(
    sources, make_encoder, domains=domains, max_skipped=max_skipped
  )


def test_chat_records_are_encoded_as_conversations(
  make_dataset, make_records, toy_tokenizer
):
  rows = make_records(6)
  dataset = make_dataset(rows)
  assert len(dataset) == 6
  for i, row in enumerate(rows):
    expected = encode_chat(
      toy_tokenizer, row["turns"], num_images=len(row["images"]),
      num_image_tokens=3, max_length=64, system="",
    )  # fmt: skip
    ids, labels, images = dataset.sample(i)
    np.testing.assert_array_equal(ids, expected.input_ids)
    np.testing.assert_array_equal(labels, expected.labels)
    assert dataset.lengths[i] == len(ids)
    assert dataset.image_counts[i] == len(row["images"])
    assert dataset.answer_tokens[i] == (labels != -100).sum()
    assert images == row["images"]


def test_chats_are_written_with_the_template(
  make_dataset, make_records, toy_tokenizer
):
  template = RoleTemplate(user="Q: ", assistant=" A:")
  rows = make_records(3)
  dataset = make_dataset(rows, template=template)
  for i, row in enumerate(rows):
    expected = encode_chat(
      toy_tokenizer, row["turns"], num_images=len(row["images"]),
      num_image_tokens=3, max_length=64, system="", template=template,
    )  # fmt: skip
    np.testing.assert_array_equal(
      dataset.sample(i).input_ids, expected.input_ids
    )
    assert "USER" not in toy_tokenizer.decode(expected.input_ids)


def test_plain_records_are_captions_and_others_are_counted(
  make_dataset, make_records, toy_tokenizer
):
  rows = make_records(7)  # Records 2 and 5 have no caption.
  dataset = make_dataset(rows, format="plain")
  assert [dataset.record(i)["id"] for i in range(5)] == [
    f"general-{i}" for i in (0, 1, 3, 4, 6)
  ]
  expected = encode_caption(
    toy_tokenizer, "caption 3", num_images=1, num_image_tokens=3,
    max_length=64,
  )  # fmt: skip
  np.testing.assert_array_equal(dataset.sample(2).input_ids, expected.input_ids)
  assert dataset.sample(2).images == rows[3]["images"]
  assert dataset.accounting() == {
    "read": 7, "used": 5, "skipped": {"no_caption": 2}, "failed": 0,
  }  # fmt: skip


def test_domains_become_indices(make_dataset, make_records):
  rows = make_records(3, domain="document") + make_records(2)
  assert make_dataset(rows).domains.tolist() == [1, 1, 1, 0, 0]


def test_every_skipped_record_is_counted_by_reason(make_dataset, make_records):
  rows = make_records(9)
  rows[0]["images"] = []  # One marker, no image.
  rows[1]["images"] *= 2  # More than max_images.
  rows[2]["turns"][1]["from"] = "human"
  rows[3]["turns"][0]["value"] += "long " * 20  # The answer is cut off.
  rows[4]["turns"][1]["value"] = "see <image>"
  rows[5]["turns"] = rows[5]["turns"][:1]
  accounting = make_dataset(rows).accounting()
  assert accounting == {
    "read": 9,
    "used": 3,
    "skipped": {
      "image_count": 1,
      "image_in_answer": 1,
      "no_supervision": 1,
      "too_many_images": 1,
      "turn_order": 2,
    },
    "failed": 0,
  }


def test_images_behind_a_cut_are_not_handed_out(make_dataset, make_records):
  rows = make_records(1)
  rows[0]["images"] *= 2
  rows[0]["turns"] += [
    {"from": "human", "value": "<image>\nmore", "kind": "x"},
    {"from": "gpt", "value": "yes", "kind": "x"},
  ]
  whole = make_dataset(rows, max_images=2, max_length=99)
  assert len(whole.sample(0).images) == 2
  cut = make_dataset(rows, max_images=2, max_length=44)
  assert cut.image_counts.tolist() == [1]
  assert cut.sample(0).images == rows[0]["images"][:1]


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"format": "caption"}, r"format='caption'.*\['chat', 'plain'\]"),
    ({"domains": ("document",)}, r"'general-0' is of domain 'general'"),
    ({"max_length": 4}, r"none of 3 records can be used.*'no_supervision': 3"),
  ],
)
def test_mistakes_are_named(make_dataset, make_records, kwargs, message):
  with pytest.raises(ValueError, match=message):
    make_dataset(make_records(3), **kwargs)


def test_a_system_turn_takes_the_place_of_the_system_text(
  make_dataset, make_records, toy_tokenizer
):
  rows = make_records(2)
  rows[0]["turns"].insert(0, {"from": "system", "value": "Be.", "kind": ""})
  dataset = make_dataset(rows, system="Do.")
  for index, system in enumerate(["Be.", "Do."]):
    text = toy_tokenizer.decode(dataset.sample(index).input_ids)
    assert text.startswith(f"{system} USER:")


def test_a_system_turn_that_a_template_forbids_is_skipped(
  make_dataset, make_records, toy_tokenizer
):
  script = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}"
    "{% endif %}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
  )
  template = JinjaTemplate(jinja.Script(script, "made up"))
  rows = make_records(2)
  rows[0]["turns"].insert(0, {"from": "system", "value": "Be.", "kind": ""})
  dataset = make_dataset(rows, template=template)
  assert dataset.accounting()["skipped"] == {"system_turn": 1}
  with pytest.raises(ValueError, match="config.data.system is not empty"):
    make_dataset(rows, template=template, system="Do.")


def test_a_record_that_changed_since_it_was_measured_is_an_error(
  make_dataset, make_records
):
  rows = make_records(3)
  dataset = make_dataset(rows)
  rows[1]["turns"][1]["value"] += " and more"
  with pytest.raises(ValueError, match="'general-1' has .* that were measured"):
    dataset.sample(1)
  dataset.sample(2)


def test_too_many_skipped_records_stop_the_run(make_dataset, make_records):
  rows = make_records(10)
  rows[3]["turns"][1]["from"] = "human"
  dataset = make_dataset(rows)
  dataset.check_skipped(0.1)
  with pytest.raises(TooManySkipped, match=r"1 of 10 .* --config.data.max_sk"):
    dataset.check_skipped(0.09)
  with pytest.raises(TooManySkipped, match=r"'turn_order': 1, 'failed': 2"):
    dataset.check_skipped(0.2, num_failed=2)
  # To have no caption is no fault.
  make_dataset(make_records(9), format="plain").check_skipped(0)


def test_an_empty_mixture_is_refused(toy_tokenizer):
  with pytest.raises(ValueError, match="the mixture is empty"):
    load([], toy_tokenizer)


def test_a_mixture_names_the_unknown_data_set(toy_tokenizer):
  source = Source("embedded/generel", "train", "chat", 1.0)
  with pytest.raises(ValueError, match="Did you mean 'embedded/general'"):
    load([source], toy_tokenizer)


def test_a_mixture_names_all_the_sets_that_are_missing(toy_tokenizer):
  names = ("no/where", "embedded/general", "not/there")
  sources = [Source(name, "train", "chat", 1.0) for name in names]
  with pytest.raises(ValueError, match="2 of 3 data sets") as error:
    load(sources, toy_tokenizer)
  assert "no/where" in str(error.value) and "not/there" in str(error.value)


def test_a_mixture_names_the_data_set_of_a_wrong_format(toy_tokenizer):
  source = Source("embedded/general", "train", "caption", 1.0)
  with pytest.raises(ValueError, match="embedded/general: format='caption'"):
    load([source], toy_tokenizer)


def test_the_embedded_set_is_used_whole():
  sources = [Source(name, "train", "chat", 1.0) for name in records.EMBEDDED]
  datasets = load(
    sources, Tokenizer(), domains=("general", "document", "biomedical"),
    max_skipped=0, num_image_tokens=36, max_length=256,
  )  # fmt: skip
  for dataset in datasets:
    assert dataset.accounting()["skipped"] == {}
