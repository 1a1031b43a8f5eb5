"""The direction of imports, top to bottom, and what is never imported."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "mole_jax"
# Folder -> folders it may import from; files directly in the package are
# commands and may import from every folder, but not from each other.
ALLOWED = {
  "reporting": {"reporting"},
  "interop": {"interop", "training", "models", "data"},
  "compiled": {"compiled", "training", "models", "parallel"},
  "training": {"training", "models", "parallel", "data"},
  "timing": {
    "timing",
    "compiled",
    "inference",
    "training",
    "models",
    "parallel",
    "data",
  },
  "inference": {"inference", "training", "models", "parallel", "data"},
  "models": {"models", "parallel"},
  "parallel": {"parallel"},
  "data": {"data"},
}
FORBIDDEN = {
  "reporting": {"jax", "flax", "optax", "orbax"},
  "data": {"jax", "flax", "optax", "orbax"},
  "models": {"optax", "orbax", "grain"},
}
# Written beside exported weights, for PyTorch, and programs that run in a
# process of their own. These may import it; the package imports none of them.
EXPORTED = PACKAGE / "interop" / "torch_files"
WITH_TORCH = (
  PACKAGE / "interop" / "with_torch",
  PACKAGE / "timing" / "with_torch",
)
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != EXPORTED)


def imported(path):
  """Absolute names of the modules that a file imports."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


@pytest.mark.parametrize(
  "path", FILES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_downwards(path):
  parts = path.relative_to(PACKAGE).parts
  for name in imported(path):
    top, *rest = name.split(".")
    assert top != "tensorflow", name
    assert top != "torch" or path.parent in WITH_TORCH, name
    for folder in (EXPORTED, *WITH_TORCH):
      if path.parent == folder:
        continue  # They share what they have.
      package = f"mole_jax.{'.'.join(folder.relative_to(PACKAGE).parts)}"
      assert not f"{name}.".startswith(f"{package}."), name
    if len(parts) > 1:
      assert top not in FORBIDDEN.get(parts[0], ()), name
    if top != "mole_jax" or not rest:
      continue
    if len(parts) == 1:
      assert (PACKAGE / rest[0]).is_dir() or path.name == "__init__.py", name
    else:
      assert rest[0] in ALLOWED[parts[0]], name


def test_no_file_hides_a_default_in_a_config_lookup():
  for path in [*FILES, *(PACKAGE.parent / "configs").glob("*.py")]:
    text = path.read_text()
    assert "config.get(" not in text and "c.get(" not in text, path


def test_importing_the_package_imports_nothing_heavy():
  code = "import mole_jax, sys; print('jax' in sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "False"
