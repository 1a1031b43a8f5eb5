"""Memory of this process that its C library keeps to itself."""

import ctypes


def give_back() -> None:
  """Returns what is free in this process's heap to the system.

  A compilation leaves hundreds of MiB there, in small pieces. glibc keeps them,
  and arrays, which it maps one by one, cannot use them. Of other C libraries
  nothing is asked.
  """
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
  if trim is not None:
    trim(0)
