r"""Your own data: three LoRA experts on sets that `prepare build` made.

python -m mole_jax.main --config=configs/own.py:data/mine --workdir=runs/mine

After the colon: the folders of one or several data sets, with commas between
them, each as often as it has records; then, after an @, the directory of a
base that `python -m mole_jax.convert from-hf` wrote
(configs/own.py:data/mine,data/more@weights/llava). Without one a small base is
trained on the embedded data first, as configs/mole3.py does. Adapters are
trained for about three epochs.
"""

import json
import pathlib
import runpy

import ml_collections as mlc

MOLE3 = pathlib.Path(__file__).with_name("mole3.py")
EPOCHS = 3
SAMPLES_PER_ROW = 4  # A guess; `prepare mixture` counts, and says the epochs.


def get_config(arg: str = "") -> mlc.ConfigDict:
  """configs/mole3.py with a mixture of your data sets.

  Raises ValueError for a folder that holds no built data set.
  """
  paths, _, base = arg.partition("@")
  if not paths:
    raise ValueError(
      "which data? Name the folders that `python -m mole_jax.prepare build` "
      "made: --config=configs/own.py:data/mine"
    )
  c = runpy.run_path(str(MOLE3))["get_config"](base or "tiny")
  c.name = "own"
  c.variant = arg
  abouts = {path: _about(path) for path in paths.split(",")}
  domains = [d for about in abouts.values() for d in about["domains"]]
  if not base:
    domains += c.data.domains
  c.data.domains = tuple(dict.fromkeys(domains))
  stage = c.stages.mole
  stage.mixture = {
    f"set{index}_{about['wanted']['name']}": dict(
      name=path, split="train", format="chat", weight=about["used"]
    )
    for index, (path, about) in enumerate(abouts.items())
  }
  if not base:  # Answers may be long, and samples with several images.
    stage.update(dict(max_length=1024, max_images=16, batch_size=4))
  num_records = sum(about["used"] for about in abouts.values())
  samples = stage.batch_size * SAMPLES_PER_ROW
  stage.num_steps = max(20, EPOCHS * num_records // samples)
  # A built set has no test split: build one of other records, and name it in
  # a config of your own.
  c.evaluation.datasets = {}
  return c


def _about(path: str) -> dict:
  """What prepared.json says of a data set."""
  folder = pathlib.Path(path)
  found = [folder / "prepared.json", *folder.glob("*/prepared.json")]
  found = [file for file in found if file.is_file()]
  if len(found) != 1:
    raise ValueError(
      f"{path!r} holds no data set that `python -m mole_jax.prepare build` "
      "made; wanted its OUT/NAME (data/mine, say)."
    )
  return json.loads(found[0].read_text())
