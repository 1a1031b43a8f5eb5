"""No path leaves the image folder."""

import os
import pathlib

import hypothesis
import pytest
from hypothesis import strategies as st

from mole_jax.data.builders.llava_json.paths import ImageFolder
from mole_jax.data.builders.llava_json.problems import EntryError


@pytest.fixture
def tree(tmp_path):
  """A folder "in" with pictures and links, and one "in-out" beside it."""
  for name in ("in/sub/a.jpg", "in-out/secret.jpg"):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(b"x")
  inside = tmp_path / "in"
  (inside / "good.jpg").symlink_to("sub/a.jpg")
  (inside / "goodfolder").symlink_to("sub")
  (inside / "bad.jpg").symlink_to("../in-out/secret.jpg")
  (inside / "badfolder").symlink_to(tmp_path / "in-out")
  (inside / "chain.jpg").symlink_to("bad.jpg")
  (inside / "loop.jpg").symlink_to("loop.jpg")
  (inside / "dangling.jpg").symlink_to("nothing")
  os.mkfifo(inside / "pipe.jpg")
  return inside


@pytest.mark.parametrize(
  "name",
  ["sub/a.jpg", "./sub//a.jpg", "good.jpg", "goodfolder/a.jpg"],
)
def test_files_inside_are_found_also_by_links(tree, name):
  assert ImageFolder(tree).find(name) == tree / pathlib.Path(name)


def test_the_folder_itself_may_be_a_link(tree):
  link = tree.parent / "link"
  link.symlink_to(tree)
  for name in ("sub/a.jpg", "good.jpg"):
    assert ImageFolder(link).find(name).read_bytes() == b"x"


BAD = {
  "": "image_path",
  "a\0.jpg": "image_path",
  "/etc/passwd": "image_path",
  "C:\\a.jpg": "image_path",
  "\\\\host\\a.jpg": "image_path",
  "../in-out/secret.jpg": "image_outside",
  "sub/../sub/a.jpg": "image_outside",
  "sub\\..\\..\\secret.jpg": "image_outside",
  "..": "image_outside",
  "bad.jpg": "image_outside",
  "badfolder/secret.jpg": "image_outside",
  "chain.jpg": "image_outside",
  "loop.jpg": "image_unreadable",
  "pipe.jpg": "image_unreadable",
  "x" * 5000: "image_unreadable",
  "dangling.jpg": "image_missing",
  "no.jpg": "image_missing",
  "http://host/a.jpg": "image_missing",
  "sub\\a.jpg": "image_missing",
  "sub": "image_is_folder",
  "sub/": "image_is_folder",
  "goodfolder": "image_is_folder",
  ".": "image_is_folder",
}


@pytest.mark.parametrize("name", BAD, ids=lambda name: ascii(name)[:30])
def test_every_other_path_is_refused_with_its_reason(tree, name):
  with pytest.raises(EntryError) as caught:
    ImageFolder(tree).find(name)
  assert caught.value.reason == BAD[name]
  assert str(caught.value).isprintable()


def test_a_file_in_place_of_a_folder_is_no_crash(tree):
  with pytest.raises(EntryError) as caught:
    ImageFolder(tree).find("sub/a.jpg/b.jpg")
  assert caught.value.reason == "image_unreadable"


def test_a_file_without_permission_is_told(tree, monkeypatch):
  # As root every file can be read, so the answer is played.
  monkeypatch.setattr(os, "access", lambda path, mode: False)
  with pytest.raises(EntryError, match="permission denied") as caught:
    ImageFolder(tree).find("sub/a.jpg")
  assert caught.value.reason == "image_unreadable"


_PARTS = st.sampled_from(
  ["..", ".", "sub", "a.jpg", "bad.jpg", "badfolder", "secret.jpg", "chain.jpg"]
  + ["goodfolder", "in-out", "", "\\", "good.jpg"]
)


@hypothesis.given(parts=st.lists(_PARTS, max_size=6))
@hypothesis.settings(
  max_examples=500,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_whatever_is_found_lies_inside(tree, parts):
  try:
    path = ImageFolder(tree).find("/".join(parts))
  except EntryError:
    return
  assert path.resolve().is_relative_to(tree.resolve())
  assert path.is_file()
