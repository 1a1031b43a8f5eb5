"""Scores by hand-made examples; an evaluation's files, key by key."""

import io
import json

import numpy as np
import pytest
import rich.console
from PIL import Image

from mole_jax.inference import answering, scoring
from tests.inference import tiny


def make_question(domain, kind, answer, number=0):
  pixels = np.zeros((0, 8, 8, 3), np.uint8)
  return answering.Question(
    f"{domain}-{number}", domain, kind, "What?", answer, pixels
  )


def make_prediction(text, blank_text):
  none = np.zeros(0, np.int32)
  experts = np.zeros((2, 0, 1), np.int32)
  return answering.Prediction(text, blank_text, none, none, experts)


@pytest.mark.parametrize(
  ("prediction", "answer", "wanted"),
  [
    ("Left.", "left", True),
    (" left ", "Left.", True),
    ("left", "right", False),
    ("on the left", "left", False),
    ("3.5", "3.5", True),
    ("", "left", False),
    ("no. 3", "no 3", False),
  ],
)
def test_match_is_exact_but_for_case_space_and_final_period(
  prediction, answer, wanted
):
  assert scoring.is_match(prediction, answer) is wanted


def test_scores_of_a_hand_made_example():
  rows = [
    # domain, kind, answer, seen, blank
    ("a", "side", "left", "Left.", "left"),
    ("a", "side", "Left", "right", "left"),
    ("a", "side", "right", "right", "left"),
    ("a", "count", "two", "two", ""),
    ("b", "side", "right", "right", "right"),
  ]
  questions = [make_question(*row[:3]) for row in rows]
  predictions = [make_prediction(*row[3:]) for row in rows]
  score = scoring.score(questions, predictions)
  two_thirds = pytest.approx(2 / 3)
  assert score == {
    "domains": {
      "a": {
        "num_questions": 4,
        "accuracy": pytest.approx(3 / 4),
        # The commonest answer of each kind: "left" twice of 3, "two" of 1.
        "majority": pytest.approx(3 / 4),
        "blank": pytest.approx(2 / 4),
        "types": {
          "count": {
            "num_questions": 1,
            "accuracy": 1,
            "majority": 1,
            "blank": 0,
          },
          "side": {
            "num_questions": 3,
            "accuracy": two_thirds,
            "majority": two_thirds,
            "blank": two_thirds,
          },
        },
      },
      "b": {
        "num_questions": 1,
        "accuracy": 1,
        "majority": 1,
        "blank": 1,
        "types": {
          "side": {"num_questions": 1, "accuracy": 1, "majority": 1, "blank": 1}
        },
      },
    },
    "average": {
      "accuracy": pytest.approx(7 / 8),
      "majority": pytest.approx(7 / 8),
      "blank": pytest.approx(3 / 4),
    },
  }


def test_samples_take_domains_and_kinds_in_turn():
  questions = [
    make_question(domain, kind, "x", i)
    for domain in ("a", "b")
    for kind in ("side", "count", "shown")
    for i in range(10)
  ]
  chosen = [questions[i] for i in scoring.choose_samples(questions, 12)]
  assert len({(q.domain, q.kind, q.id) for q in chosen}) == 12
  for domain in ("a", "b"):
    for kind in ("side", "count", "shown"):
      found = [q for q in chosen if (q.domain, q.kind) == (domain, kind)]
      assert len(found) == 2
  assert scoring.choose_samples(questions[:5], 12) == [0, 1, 2, 3, 4]


DOMAINS = ("general", "document")
ASKED = [("Which side?", "left", "side"), ("How many?", "two", "count")]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
  """A model, its evaluation's folder, and what `evaluate` returned."""
  folder = tmp_path_factory.mktemp("evaluation")
  model = tiny.make_model(folder)
  datasets = {
    domain: [
      *(tiny.make_record(i, domain, ASKED) for i in range(4)),
      tiny.make_record(4, domain, ASKED[1:], has_image=False),
    ]
    for domain in DOMAINS
  }
  console = rich.console.Console(file=io.StringIO())
  metrics = scoring.evaluate(
    model,
    datasets,
    folder / "out",
    batch_size=16,
    max_new_tokens=4,
    console=console,
  )
  return model, datasets, folder / "out", metrics


def read(folder, name):
  return json.loads((folder / name).read_text())


def test_metrics_have_the_keys_of_the_contract(evaluation):
  _, _, folder, metrics = evaluation
  assert read(folder, "metrics.json") == metrics
  assert set(metrics) == {
    "name",
    "seed",
    "stage",
    "step",
    "num_experts",
    "num_layers",
    "domains",
    "average",
  }
  assert (metrics["name"], metrics["stage"]) == ("mole3", "mole")
  assert (metrics["num_experts"], metrics["num_layers"]) == (3, 2)
  levels = {"accuracy", "majority", "blank"}
  assert set(metrics["average"]) == levels
  assert tuple(metrics["domains"]) == DOMAINS
  for entry in metrics["domains"].values():
    assert set(entry) == levels | {"num_questions", "types"}
    assert entry["num_questions"] == 9
    assert {k: v["num_questions"] for k, v in entry["types"].items()} == {
      "side": 4,
      "count": 5,
    }
    assert all(
      set(v) == levels | {"num_questions"} for v in entry["types"].values()
    )
  assert not list(folder.rglob("*.partial"))


def test_predictions_are_what_generate_says_with_and_without_sight(evaluation):
  model, _, folder, _ = evaluation
  lines = (folder / "predictions.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert len(rows) == 18
  assert set(rows[0]) == {
    "id",
    "domain",
    "kind",
    "question",
    "answer",
    "prediction",
    "blank_prediction",
    "is_correct",
  }
  colour = [round(255 * x) for x in model.config["data"]["image_mean"]]
  blank = np.full((8, 8, 3), colour, np.uint8)
  for row in rows:
    number = int(row["id"].split("-")[1])
    has_image = number < 4
    seen = tiny.make_pixels(number) if has_image else None
    hidden = blank if has_image else None
    said = model.generate([row["question"]] * 2, [seen, hidden], 4)
    assert [row["prediction"], row["blank_prediction"]] == said
    assert row["is_correct"] == scoring.is_match(said[0], row["answer"])


def test_routing_counts_every_token_once_a_layer(evaluation):
  model, _, folder, _ = evaluation
  routing = read(folder, "routing.json")
  assert set(routing) == {
    *("num_layers", "layers", "num_experts", "experts"),
    *("counts", "pathways"),
  }
  assert (routing["num_layers"], routing["num_experts"]) == (2, 3)
  assert (routing["layers"], routing["experts"]) == ([0, 1], [3, 3])
  assert tuple(routing["counts"]) == DOMAINS
  for domain in DOMAINS:
    counts = routing["counts"][domain]
    assert set(counts) == {"image", "text"}
    assert np.shape(counts["image"]) == np.shape(counts["text"]) == (2, 3)
    assert np.sum(counts["image"], 1).tolist() == [8 * 6] * 2
    # The oracle: each prompt and answer routed anew.
    wanted = np.zeros((2, 3), int)
    for line in (folder / "predictions.jsonl").read_text().splitlines():
      row = json.loads(line)
      if row["domain"] != domain:
        continue
      number = int(row["id"].split("-")[1])
      image = tiny.make_pixels(number) if number < 4 else None
      found = model.routing([row["question"]], [image])[0]
      for layer in range(2):
        chosen = found.chosen[layer, found.is_image, 0]
        wanted[layer] += np.bincount(chosen, minlength=3)
    np.testing.assert_array_equal(counts["image"], wanted)


def test_samples_show_what_the_report_needs(evaluation):
  model, _, folder, _ = evaluation
  samples = read(folder, "samples.json")
  assert len(samples) == scoring.NUM_SAMPLES
  for number, sample in enumerate(samples):
    assert set(sample) == {
      "id",
      "domain",
      "kind",
      "question",
      "answer",
      "prediction",
      "is_correct",
      "image",
      "patches",
      "tokens",
      "image_experts",
    }
    record = int(sample["id"].split("-")[1])
    if record < 4:
      assert sample["image"] == f"samples/{number}.png"
      with Image.open(folder / sample["image"]) as image:
        np.testing.assert_array_equal(image, tiny.make_pixels(record))
      assert np.shape(sample["image_experts"]) == (2, 4)
    else:
      assert sample["image"] is None and sample["image_experts"] is None
    assert sample["patches"] == [2, 2]
    for token in sample["tokens"]:
      assert len(token["experts"]) == 2
      assert token["choices"] == [[expert] for expert in token["experts"]]
    text = "".join(token["text"] for token in sample["tokens"])
    assert sample["question"] in text and "ASSISTANT:" in text


def test_fewer_questions_are_spread_evenly():
  questions = [make_question("a", "side", "x", i) for i in range(10)]
  picked = scoring._spread(questions, 4)
  assert [q.id for q in picked] == ["a-0", "a-3", "a-6", "a-9"]
  assert scoring._spread(questions, None) is questions


def test_a_data_set_without_questions_is_named(evaluation, tmp_path):
  model, *_ = evaluation
  with pytest.raises(ValueError, match="data set of 'general' holds no"):
    scoring.evaluate(model, {"general": []}, tmp_path)
