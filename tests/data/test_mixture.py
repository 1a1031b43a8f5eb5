import numpy as np
import pytest

from mole_jax.data import records
from mole_jax.data.conversation import encode_caption, encode_chat
from mole_jax.data.mixture import Dataset, Source, load_mixture
from mole_jax.data.schedule import padding_share, plan_rows
from mole_jax.data.templates import VICUNA, RoleTemplate
from mole_jax.data.tokenizer import Tokenizer

OPTIONS = {
  "name": "toy",
  "format": "chat",
  "domains": ("general", "document"),
  "num_image_tokens": 3,
  "max_length": 64,
  "max_images": 1,
  "system": "",
  "use_bos": True,
  "template": VICUNA,
}


@pytest.fixture
def make_dataset(toy_tokenizer):
  def make(rows, **kwargs):
    return Dataset(rows, toy_tokenizer, **{**OPTIONS, **kwargs})

  return make


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
    ids, labels = dataset.tokens(i)
    np.testing.assert_array_equal(ids, expected.input_ids)
    np.testing.assert_array_equal(labels, expected.labels)
    assert dataset.lengths[i] == len(ids)
    assert dataset.image_counts[i] == len(row["images"])
    assert dataset.encoded_images(i) == row["images"]


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
    np.testing.assert_array_equal(dataset.tokens(i)[0], expected.input_ids)
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
  np.testing.assert_array_equal(dataset.tokens(2)[0], expected.input_ids)
  assert dataset.encoded_images(2) == rows[3]["images"]
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
  assert len(whole.encoded_images(0)) == 2
  cut = make_dataset(rows, max_images=2, max_length=44)
  assert cut.image_counts.tolist() == [1]
  assert cut.encoded_images(0) == rows[0]["images"][:1]


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"format": "caption"}, r"toy: format='caption'.*\['chat', 'plain'\]"),
    ({"domains": ("document",)}, r"'general-0' is of domain 'general'"),
    ({"max_length": 4}, r"none of 3 records can be used.*'no_supervision': 3"),
  ],
)
def test_mistakes_are_named(make_dataset, make_records, kwargs, message):
  with pytest.raises(ValueError, match=message):
    make_dataset(make_records(3), **kwargs)


def test_an_empty_mixture_is_refused(toy_tokenizer):
  options = {k: v for k, v in OPTIONS.items() if k not in ("name", "format")}
  with pytest.raises(ValueError, match="the mixture is empty"):
    load_mixture([], toy_tokenizer, **options)


def test_a_mixture_names_the_unknown_data_set(toy_tokenizer):
  options = {k: v for k, v in OPTIONS.items() if k not in ("name", "format")}
  source = Source("embedded/generel", "train", "chat", 1.0)
  with pytest.raises(ValueError, match="Did you mean 'embedded/general'"):
    load_mixture([source], toy_tokenizer, **options)


def test_the_embedded_set_is_used_whole_and_packs_tightly():
  sources = [Source(name, "train", "chat", 1.0) for name in records.EMBEDDED]
  datasets = load_mixture(
    sources, Tokenizer(), domains=("general", "document", "biomedical"),
    num_image_tokens=36, max_length=256, max_images=1, system="",
    use_bos=True, template=VICUNA,
  )  # fmt: skip
  for dataset in datasets:
    assert dataset.accounting()["skipped"] == {}
  lengths = [dataset.lengths for dataset in datasets]
  plan = plan_rows(
    lengths, [dataset.image_counts for dataset in datasets],
    [1.0] * len(datasets), seed=0, num_rows=2000, max_length=256,
    max_images=6, max_segments=6,
  )  # fmt: skip
  share = padding_share(plan, lengths, 256)
  print(f"padding share of the embedded mixture: {share:.1%}")
  assert share < 0.1
