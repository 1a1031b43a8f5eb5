"""Public packages as folders: the only door through which source files come.

Every package is pinned to one version and every licence is written down in
LICENSES with the place where it was read inside the package, so that a reader
can check both without trusting this file.
"""

import dataclasses
import functools
import hashlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from mole_jax.data.builders.embedded.sample import Provenance

# Licences that allow shipping derived pictures inside an Apache-2.0 package.
PERMISSIVE = frozenset(
  (
    "Apache-2.0",
    "BSD-3-Clause",
    "CC0-1.0",
    "LicenseRef-Public-Domain",
    "MIT",
    "OFL-1.1",
    "Unicode-DFS-2016",
  )
)


@dataclasses.dataclass(frozen=True)
class License:
  """Licence of the files of one package below `prefix`.

  `read_in` is the text inside the unpacked package that says so; `note` is
  what that text says about these files where it is not the plain licence.
  """

  package: str
  version: str
  prefix: str
  license: str
  read_in: str
  note: str = ""


# Published with the templates themselves, not in the packages.
_MNI_NOTICE = (
  "Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, "
  "Montreal Neurological Institute, McGill University. Permission to use, "
  "copy, modify, and distribute this software and its documentation for any "
  "purpose and without fee is hereby granted, provided that the above "
  "copyright notice appear in all copies. The authors and McGill University "
  "make no representations about the suitability of this software for any "
  'purpose. It is provided "as is" without express or implied warranty.'
)

# First matching row wins, so exceptions stand before their package's last row.
LICENSES = (
  License(
    "fonts-noto-color-emoji",
    "2.042-0+deb12u1",
    "usr/share/fonts/",
    "OFL-1.1",
    "usr/share/doc/fonts-noto-color-emoji/copyright",
  ),
  License(
    "unicode-data",
    "15.0.0-1",
    "usr/share/unicode/",
    "Unicode-DFS-2016",
    "usr/share/doc/unicode-data/copyright",
  ),
  License(
    "openclipart-png",
    "1:0.18+dfsg-19",
    "usr/share/openclipart/",
    "LicenseRef-Public-Domain",
    "usr/share/doc/openclipart-png/copyright",
  ),
  License(
    "openclipart-svg",
    "1:0.18+dfsg-19",
    "usr/share/openclipart/",
    "LicenseRef-Public-Domain",
    "usr/share/doc/openclipart-svg/copyright",
  ),
  License(
    "mricron-data",
    "1.2.20211006+dfsg-4",
    "usr/share/mricron/templates/ch2",
    "BSD-3-Clause",
    "usr/share/doc/mricron-data/copyright",
    "BSD-3-Clause for every file without a section of its own. ch2 and ch2bet "
    f"show the Colin27 brain, whose own terms are: {_MNI_NOTICE}",
  ),
  License(
    "python3-skimage",
    "0.19.3-8",
    "usr/lib/python3/dist-packages/skimage/data/retina.jpg",
    "CC0-1.0",
    "usr/lib/python3/dist-packages/skimage/data/_fetchers.py",
    "retina(): made available under CC0 1.0. Mikael Haggstrom 2014.",
  ),
  License(
    "python3-skimage",
    "0.19.3-8",
    "usr/lib/python3/dist-packages/skimage/data/microaneurysms.png",
    "CC0-1.0",
    "usr/lib/python3/dist-packages/skimage/data/_fetchers.py",
    "microaneurysms(): CC0 given by the owner, Andreas Maier.",
  ),
  License(
    "python3-skimage",
    "0.19.3-8",
    "usr/lib/python3/dist-packages/skimage/data/cell.png",
    "CC0-1.0",
    "usr/lib/python3/dist-packages/skimage/data/_fetchers.py",
    "cell(): CC0, dedicated to the public domain.",
  ),
  License(
    "python3-skimage",
    "0.19.3-8",
    "usr/lib/python3/dist-packages/skimage/data/ihc.png",
    "BSD-3-Clause",
    "usr/share/doc/python3-skimage/copyright",
    "immunohistochemistry(): no known copyright restrictions, so the "
    "package's own licence holds. Acquired at the CMMI.",
  ),
  License(
    "vega-datasets",
    "0.9.0",
    "vega_datasets/",
    "MIT",
    "vega_datasets-0.9.0.dist-info/LICENSE",
  ),
  License(
    "scikit-learn",
    "1.7.2",
    "sklearn/datasets/",
    "BSD-3-Clause",
    "scikit_learn-1.7.2.dist-info/licenses/COPYING",
  ),
  License(
    "nilearn",
    "0.14.1",
    "nilearn/datasets/data/mni_icbm152_",
    "BSD-3-Clause",
    "nilearn-0.14.1.dist-info/licenses/LICENSE",
    "The licence of the wheel, which ships these converted maps. They show the "
    f"ICBM152 2009a average brain, whose own terms are: {_MNI_NOTICE}",
  ),
)


def _pinned(package: str) -> License:
  """The table's last row of a package, which carries the pinned version."""
  rows = [row for row in LICENSES if row.package == package]
  if not rows:
    known = ", ".join(sorted({row.package for row in LICENSES}))
    raise ValueError(
      f"package: {package!r} has no row in LICENSES (known: {known}); read "
      "its licence and add one"
    )
  return rows[-1]


def _run(command: list[str], folder: pathlib.Path) -> None:
  if shutil.which(command[0]) is None:
    raise RuntimeError(
      f"{command[0]} is not on this machine; build the set on Debian or "
      "Ubuntu (apt-get and dpkg-deb), or use the built one in the package"
    )
  done = subprocess.run(
    command, cwd=folder, capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise RuntimeError(
      f"{' '.join(command)} failed with {done.returncode}:\n"
      f"{done.stderr.strip()[-2000:]}"
    )


class Packages:
  """Unpacked packages under `cache_dir`; nothing is installed.

  Debian packages need `apt-get` and `dpkg-deb` (a `apt-get update` first where
  the package lists are old), PyPI packages need pip.
  """

  def __init__(self, cache_dir: str | pathlib.Path):
    self._cache = pathlib.Path(cache_dir).expanduser()

  def debian(self, name: str) -> pathlib.Path:
    """Folder of an unpacked Debian package, as in `usr/share/...`."""
    version = _pinned(name).version

    def unpack(work: pathlib.Path, into: pathlib.Path) -> None:
      _run(["apt-get", "download", f"{name}={version}"], work)
      (archive,) = work.glob("*.deb")
      _run(["dpkg-deb", "-x", str(archive), str(into)], work)

    return self._once(f"{name}-{version.replace(':', '_')}", unpack)

  def pypi(self, requirement: str) -> pathlib.Path:
    """Folder of an unpacked wheel; `requirement` is `name==version`."""
    name, _, version = requirement.partition("==")
    if version != _pinned(name).version:
      raise ValueError(
        f"requirement: {requirement!r} is not the version whose licence was "
        f"read; want '{name}=={_pinned(name).version}'"
      )

    def unpack(work: pathlib.Path, into: pathlib.Path) -> None:
      pip = [sys.executable, "-m", "pip", "download", "--quiet"]
      _run([*pip, "--no-deps", "--only-binary=:all:", requirement], work)
      (archive,) = work.glob("*.whl")
      with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(into)

    return self._once(f"{name}-{version}", unpack)

  def provenance(self, package: str, path: str | pathlib.Path) -> Provenance:
    """Origin of one file; `path` is relative to the package's folder.

    An absolute path inside that folder is taken too. `package` is the bare
    name. Raises ValueError where LICENSES has no row for the file.
    """
    return self._provenance(package, str(path))

  @functools.cache  # noqa: B019  One object lives a build.
  def _provenance(self, package: str, path: str) -> Provenance:
    version = _pinned(package).version
    folder = self._folder(package)
    file = folder / path  # An absolute path stays as it is.
    member = file.relative_to(folder).as_posix()
    for row in LICENSES:
      if row.package == package and member.startswith(row.prefix):
        break
    else:
      raise ValueError(
        f"path: no licence is recorded for {member!r} of {package}; read "
        f"{_pinned(package).read_in} and add a row to LICENSES"
      )
    if row.license not in PERMISSIVE:
      raise ValueError(
        f"path: {member!r} of {package} is under {row.license}, which is not "
        f"among the permissive {', '.join(sorted(PERMISSIVE))}; leave it out"
      )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Provenance(package, version, member, row.license, digest)

  def license_text(self, row: License) -> str:
    """The text that a row of LICENSES was read from."""
    return (self._folder(row.package) / row.read_in).read_text()

  def _folder(self, package: str) -> pathlib.Path:
    version = _pinned(package).version.replace(":", "_")
    return self._cache / f"{package}-{version}"

  def _once(self, folder_name: str, unpack) -> pathlib.Path:
    """Unpacks into a fresh folder and renames it, so a half one never stays."""
    folder = self._cache / folder_name
    if folder.exists():
      return folder
    self._cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=self._cache) as scratch:
      work, into = pathlib.Path(scratch, "get"), pathlib.Path(scratch, "new")
      work.mkdir()
      into.mkdir()
      unpack(work, into)
      if not folder.exists():  # Another build may have been faster.
        into.rename(folder)
    return folder
