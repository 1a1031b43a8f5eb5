"""Writes run directories with made-up numbers in the format of a run."""

import json
import pathlib

import numpy as np
import PIL.Image

DOMAINS = ("general", "document", "biomedical")


def write_run(
  directory: pathlib.Path,
  name: str = "mole3",
  seed: int = 0,
  num_experts: int = 3,
  num_layers: int = 4,
  patches: tuple[int, int] = (6, 6),
  question: str = "Which side is the marked object on?",
  is_evaluated: bool = True,
  num_samples: int = 12,
) -> pathlib.Path:
  """Writes a run of two stages; the numbers follow from the arguments."""
  rng = np.random.default_rng(seed + 100 * num_experts)
  directory.mkdir(parents=True)
  _dump(
    directory / "config.json",
    {
      "name": name,
      "seed": seed,
      "model": {"mole": {"num_experts": num_experts}},
    },
  )
  _dump(
    directory / "run.json",
    {
      "name": name,
      "stages": ["base", "mole"],
      "seed": seed,
      "parameters": {
        "base": {"decoder": {"trainable": 7654321, "frozen": 0}},
        "mole": {"lora": {"trainable": 1234567, "frozen": 7654321}},
      },
    },
  )
  _write_stage(directory / "base", rng, 600, 0, num_layers, 6.5)
  _write_stage(directory / "mole", rng, 300, num_experts, num_layers, 2.0)
  if is_evaluated:
    _write_evaluation(
      directory,
      rng,
      name,
      seed,
      num_experts,
      num_layers,
      patches,
      question,
      num_samples,
    )
  return directory


def write_moe_run(
  directory: pathlib.Path,
  experts: dict[int, int],
  decoder_layers: int,
  name: str = "moe_llava",
  patches: tuple[int, int] = (6, 6),
  num_samples: int = 3,
) -> pathlib.Path:
  """Writes a run with full-FFN experts, top-2, in four stages.

  `experts` are the experts of each layer that has some.
  """
  rng = np.random.default_rng(len(experts))
  num_layers, num_experts = len(experts), max(experts.values())
  write_run(
    directory,
    name,
    num_experts=num_experts,
    num_layers=num_layers,
    patches=patches,
    num_samples=num_samples,
  )
  moe = {"layers": "sparse", "num_experts": num_experts, "top_k": 2}
  moe |= {"capacity_factor": 1.5, "eval_capacity_factor": 2.0}
  config = {"name": name, "seed": 0, "model": {"moe": moe}}
  _dump(directory / "config.json", config)
  stages = ["base", "projector", "tuning", "experts"]
  _dump(directory / "run.json", {"name": name, "stages": stages, "seed": 0})
  _write_stage(directory / "projector", rng, 20, 0, num_layers, 2.0)
  _write_stage(directory / "tuning", rng, 150, 0, num_layers, 1.5)
  (directory / "mole").rename(directory / "experts")
  path = directory / "experts" / "metrics.jsonl"
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  for row in rows:
    row["dropped_share"] = rng.uniform(0, 0.1, num_layers).tolist()
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))

  folder = directory / "evaluation"
  metrics = json.loads((folder / "metrics.json").read_text())
  _dump(folder / "metrics.json", metrics | {"num_layers": decoder_layers})
  routing = json.loads((folder / "routing.json").read_text())
  for entry in routing["counts"].values():
    for counts in entry.values():
      for row, number in zip(counts, experts.values(), strict=True):
        row[number:] = [0] * (num_experts - number)
  routing |= {"layers": list(experts), "experts": list(experts.values())}
  routing["pathways"] = {
    modality: _make_pathways(rng, list(experts.values()))
    for modality in ("image", "text")
  }
  _dump(folder / "routing.json", routing)
  samples = json.loads((folder / "samples.json").read_text())
  for sample in samples:
    for token in sample["tokens"]:
      token["choices"] = [[e, (e + 1) % num_experts] for e in token["experts"]]
  _dump(folder / "samples.json", samples)
  return directory


def _make_pathways(rng, experts):
  counts = np.sort(rng.geometric(0.02, 30))[::-1]
  return {
    "num_tokens": int(3 * counts.sum()),
    "num_distinct": 1234,
    "commonest": [
      [[int(rng.integers(number)) for number in experts], int(count)]
      for count in counts
    ],
  }


def _write_stage(directory, rng, num_steps, num_experts, num_layers, top):
  directory.mkdir()
  lines = []
  for step in range(10, num_steps + 1, 10):
    loss = 0.3 + top * np.exp(-3 * step / num_steps) * rng.uniform(0.8, 1.2)
    row = {
      "step": step,
      "loss": loss + 0.01,
      "lm_loss": loss,
      "balance_loss": 0.4,
      "accuracy": 1 / (1 + loss),
      "grad_norm": 1.0,
      "learning_rate": 1e-3,
      "domain_loss": {d: loss + 0.1 * i for i, d in enumerate(DOMAINS)},
      "domain_accuracy": {d: 1 / (1 + loss) for d in DOMAINS},
      "step_seconds": 0.5,
      "tokens_per_second": 9000.0,
      "padding_share": 0.07,
    }
    if step % 70 == 0:  # A window without a document, a number that was NaN.
      row["domain_loss"]["document"] = row["domain_accuracy"]["document"] = None
      row["grad_norm"] = None
    if num_experts:
      load = rng.dirichlet([4.0] * num_experts, num_layers)
      row["expert_load"] = load.tolist()
      row["router_entropy"] = (-(load * np.log(load + 1e-9)).sum(-1)).tolist()
    lines.append(json.dumps(row))
  (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def _write_evaluation(
  directory,
  rng,
  name,
  seed,
  num_experts,
  num_layers,
  patches,
  question,
  num_samples,
):
  folder = directory / "evaluation"
  (folder / "samples").mkdir(parents=True)
  domains, counts = {}, {}
  for domain in DOMAINS:
    types = {
      kind: _accuracies(rng, 60)
      for kind in ("side", "count", "shown", "category", "larger")
    }
    domains[domain] = _accuracies(rng, 300) | {"types": types}
    counts[domain] = {
      modality: rng.multinomial(
        5000, rng.dirichlet([1.5] * num_experts), num_layers
      ).tolist()
      for modality in ("image", "text")
    }
  domains["general"]["types"]["larger"]["accuracy"] = None
  average = {
    key: float(np.mean([entry[key] for entry in domains.values()]))
    for key in ("accuracy", "majority", "blank")
  }
  _dump(
    folder / "metrics.json",
    {
      "name": name,
      "seed": seed,
      "stage": "mole",
      "step": 300,
      "num_experts": num_experts,
      "num_layers": num_layers,
      "domains": domains,
      "average": average,
    },
  )
  _dump(
    folder / "routing.json",
    {"num_layers": num_layers, "num_experts": num_experts, "counts": counts},
  )
  samples, lines = [], []
  for number in range(num_samples):
    has_image = number != 11  # One sample is text only.
    if has_image:
      pixels = rng.integers(0, 255, (48, 48, 3), np.uint8)
      pixels[8:40, 8:40] = (40 * (number % 6), 180, 90)
      path = folder / "samples" / f"{number}.png"
      PIL.Image.fromarray(pixels).save(path)
    asked = f"{question} ({number})"
    answer = "on the left" if number % 2 else "three"
    row = {
      "id": f"{DOMAINS[number % 3]}-{number:04}",
      "domain": DOMAINS[number % 3],
      "kind": "side",
      "question": asked,
      "answer": answer,
      "prediction": answer if number % 3 else "five",
      "is_correct": bool(number % 3),
    }
    lines.append(json.dumps(row | {"blank_prediction": "two"}))
    words = ["USER", ":", *(f" {word}" for word in asked.split()), answer]
    samples.append(
      row
      | {
        "image": f"samples/{number}.png" if has_image else None,
        "patches": list(patches),
        "tokens": [
          {"text": word, "experts": experts}
          for word, experts in zip(
            words,
            rng.integers(num_experts, size=(len(words), num_layers)).tolist(),
            strict=True,
          )
        ],
        "image_experts": rng.integers(
          num_experts, size=(num_layers, patches[0] * patches[1])
        ).tolist()
        if has_image
        else None,
      }
    )
  _dump(folder / "samples.json", samples)
  (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")


def _accuracies(rng, count):
  return {
    "num_questions": count,
    "accuracy": float(rng.uniform(0.5, 0.9)),
    "majority": float(rng.uniform(0.2, 0.4)),
    "blank": float(rng.uniform(0.2, 0.5)),
  }


def _dump(path, value):
  path.write_text(json.dumps(value))
