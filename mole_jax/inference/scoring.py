"""A model over a benchmark: every question by itself, exact match.

Accuracy stands beside two answers that see nothing: the majority answer, and
the same model given blank images.
"""

import collections
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
from PIL import Image

from mole_jax.data import records
from mole_jax.inference import answering, inputs, pretrained, routing_counts

NUM_SAMPLES = 12


def evaluate_run(
  model: pretrained.Model,
  config: Mapping[str, Any],
  directory: pathlib.Path,
  console: rich.console.Console,
  *,
  split: str | None = None,
  max_questions: int | None = None,
) -> dict[str, Any]:
  """Evaluates on the data sets that the run's config names.

  `split` replaces the config's. Returns what metrics.json holds; the other
  arguments are as for `evaluate`.
  """
  settings = config["evaluation"]
  # In the order of data.domains; JSON and ConfigDict sort their keys.
  names = settings["datasets"]
  if not names:
    raise ValueError(
      "config.evaluation.datasets of the run is empty: it was trained without "
      "a data set to be evaluated on."
    )
  order = [d for d in config["data"]["domains"] if d in names]
  order += [d for d in names if d not in order]
  datasets = {
    domain: records.open_records(names[domain], split or settings["split"])
    for domain in order
  }
  return evaluate(
    model,
    datasets,
    directory,
    batch_size=settings["batch_size"],
    max_new_tokens=settings["max_new_tokens"],
    max_questions=max_questions,
    console=console,
  )


def evaluate(
  model: pretrained.Model,
  datasets: Mapping[str, Iterable[records.Record]],
  directory: pathlib.Path,
  *,
  batch_size: int = 128,
  max_new_tokens: int = 12,
  max_questions: int | None = None,
  console: rich.console.Console | None = None,
) -> dict[str, Any]:
  """Asks every question, scores the answers and writes what it found.

  Writes metrics.json, predictions.jsonl, routing.json, samples.json and the
  samples' images. metrics.json is removed first and written last, so where it
  stands the others are of the same evaluation.

  Args:
    model: the model.
    datasets: domain -> its records.
    directory: where to write.
    batch_size: questions answered at a time.
    max_new_tokens: longest answer.
    max_questions: at most so many questions a domain, spread evenly over it.
    console: where progress goes; None shows none.

  Returns:
    what metrics.json holds.
  """
  questions: list[answering.Question] = []
  for domain, rows in datasets.items():
    found = answering.read_questions(domain, rows, model.preparation)
    if not found:
      raise ValueError(f"the data set of {domain!r} holds no question.")
    questions += _spread(found, max_questions)
  directory.mkdir(parents=True, exist_ok=True)
  (directory / "metrics.json").unlink(missing_ok=True)
  predictions = answering.answer(
    model, questions, batch_size, max_new_tokens, console
  )
  metrics = {
    "name": model.config["name"],
    "seed": model.config["seed"],
    "stage": model.stage,
    "step": model.step,
    "num_experts": model.num_experts,
    "num_layers": model.num_layers,
    **score(questions, predictions),
  }
  lines = [
    json.dumps(_row(q, p) | {"blank_prediction": p.blank_text})
    for q, p in zip(questions, predictions, strict=True)
  ]
  _write(directory / "predictions.jsonl", "\n".join(lines) + "\n")
  _write_json(
    directory / "routing.json",
    routing_counts.count_routing(model, questions, predictions),
  )
  samples = write_samples(model, questions, predictions, directory)
  _write_json(directory / "samples.json", samples)
  _write_json(directory / "metrics.json", metrics)
  return metrics


def normalise(text: str) -> str:
  """GQA's rule: lower case, stripped, without a final period."""
  return text.strip().lower().removesuffix(".").strip()


def is_match(prediction: str, answer: str) -> bool:
  """Whether the normalised texts are the same."""
  return normalise(prediction) == normalise(answer)


def score(
  questions: Sequence[answering.Question],
  predictions: Sequence[answering.Prediction],
) -> dict[str, Any]:
  """Accuracy by domain and kind, and the mean over domains; fractions.

  `majority` is the commonest answer of each domain and kind among the very
  answers that are scored: no constant answer does better.
  """
  groups = collections.defaultdict(lambda: collections.defaultdict(list))
  for pair in zip(questions, predictions, strict=True):
    groups[pair[0].domain][pair[0].kind].append(pair)
  domains = {}
  for domain, kinds in groups.items():
    types = {kind: _score_type(pairs) for kind, pairs in sorted(kinds.items())}
    count = sum(entry["num_questions"] for entry in types.values())
    domains[domain] = {"num_questions": count} | {
      key: sum(e[key] * e["num_questions"] for e in types.values()) / count
      for key in ("accuracy", "majority", "blank")
    }
    domains[domain]["types"] = types
  average = {
    key: sum(entry[key] for entry in domains.values()) / len(domains)
    for key in ("accuracy", "majority", "blank")
  }
  return {"domains": domains, "average": average}


def _score_type(
  pairs: Sequence[tuple[answering.Question, answering.Prediction]],
) -> dict[str, float | int]:
  count = len(pairs)
  answers = collections.Counter(normalise(q.answer) for q, _ in pairs)
  share = lambda matches: sum(matches) / count
  return {
    "num_questions": count,
    "accuracy": share(is_match(p.text, q.answer) for q, p in pairs),
    "majority": answers.most_common(1)[0][1] / count,
    "blank": share(is_match(p.blank_text, q.answer) for q, p in pairs),
  }


def write_samples(
  model: pretrained.Model,
  questions: Sequence[answering.Question],
  predictions: Sequence[answering.Prediction],
  directory: pathlib.Path,
) -> list[dict[str, Any]]:
  """Writes the images of twelve questions; returns what the report shows."""
  folder = directory / "samples"
  folder.mkdir(exist_ok=True)
  side = model.model_config.vision.patches_per_side
  samples = []
  for number, index in enumerate(choose_samples(questions, NUM_SAMPLES)):
    q, p = questions[index], predictions[index]
    ids = np.concatenate([p.prompt_ids, p.answer_ids])
    texts = inputs.token_texts(model.tokenizer, ids)
    is_image = ids == model.image_token_id
    experts = p.experts[..., 0]
    choices = routing_counts.distinct(p.experts, max(1, model.num_experts))
    is_shown = ~is_image & (experts[0] >= 0)
    image = image_experts = None
    if len(q.pixels):
      image = f"samples/{number}.png"
      Image.fromarray(q.pixels[0]).save(directory / image)
      positions = np.flatnonzero(is_image)[: model.num_image_tokens]
      if model.model_config.use_visual_tokens:
        positions = positions[1:-1]
      image_experts = experts[:, positions].tolist()
    samples.append(
      _row(q, p)
      | {
        "image": image,
        "patches": [side, side],
        "tokens": [
          {
            "text": texts[i],
            "experts": experts[:, i].tolist(),
            # By layer, the likeliest first; a layer may choose fewer.
            "choices": [
              [e for e in layer if e >= 0] for layer in choices[:, i].tolist()
            ],
          }
          for i in np.flatnonzero(is_shown)
        ],
        "image_experts": image_experts,
      }
    )
  return samples


def choose_samples(
  questions: Sequence[answering.Question], count: int
) -> list[int]:
  """Questions to show: domains and kinds in turn, blind to the answers.

  Within a kind the order is a fixed shuffle.
  """
  order = np.random.default_rng(0).permutation(len(questions))
  groups = collections.defaultdict(lambda: collections.defaultdict(list))
  for index in order.tolist():
    q = questions[index]
    groups[q.domain][q.kind].append(index)
  queues = [
    _in_turn([kinds[kind] for kind in sorted(kinds)])
    for kinds in groups.values()
  ]
  return sorted(_in_turn(queues)[:count])


def _in_turn(queues: Sequence[Sequence[int]]) -> list[int]:
  """First of each, then second of each, and so on."""
  longest = max((len(queue) for queue in queues), default=0)
  return [q[i] for i in range(longest) for q in queues if i < len(q)]


def _row(q: answering.Question, p: answering.Prediction) -> dict[str, Any]:
  return {
    "id": q.id,
    "domain": q.domain,
    "kind": q.kind,
    "question": q.text,
    "answer": q.answer,
    "prediction": p.text,
    "is_correct": is_match(p.text, q.answer),
  }


def _spread(
  questions: Sequence[answering.Question], count: int | None
) -> Sequence[answering.Question]:
  if count is None or count >= len(questions):
    return questions
  picked = np.linspace(0, len(questions) - 1, count).round().astype(int)
  return [questions[i] for i in picked]


def _write_json(path: pathlib.Path, value: Any) -> None:
  _write(path, json.dumps(value, indent=2) + "\n")


def _write(path: pathlib.Path, text: str) -> None:
  """Writes a file that is whole or absent."""
  temporary = path.with_name(path.name + ".partial")
  temporary.write_text(text)
  os.replace(temporary, path)
