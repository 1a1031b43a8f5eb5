"""Folders in Hugging Face's layout, read and written by hand."""

import json

import numpy as np
from safetensors import numpy as safetensors_numpy

from mole_jax.interop import names, tensors


def read_all(folder):
  held = tensors.Folder(folder)
  return {name: held.read(name) for name in held.infos}


def canonical(folder):
  """The tensors of a folder by canonical name."""
  arrays = read_all(folder)
  return {
    name: arrays[on_disk]
    for name, on_disk in names.canonical(arrays)[0].items()
  }


def save(folder, arrays, config):
  folder.mkdir(parents=True)
  arrays = {n: np.ascontiguousarray(a) for n, a in arrays.items()}
  safetensors_numpy.save_file(arrays, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(config))
  return folder
