"""The heap of a process shrinks when it is asked to."""

import ctypes
import platform

import pytest

from mole_jax.training import host_memory

NUM_PIECES, PIECE = 4000, 2**15


def resident():
  """Bytes of this process in memory."""
  with open("/proc/self/status") as status:
    (line,) = (line for line in status if line.startswith("VmRSS"))
  return int(line.split()[1]) * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_what_is_free_between_pieces_in_use_goes_back():
  libc = ctypes.CDLL(None)
  libc.malloc.restype = ctypes.c_void_p
  libc.malloc.argtypes = [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]
  pieces = [libc.malloc(PIECE) for _ in range(NUM_PIECES)]
  for piece in pieces:
    ctypes.memset(piece, 1, PIECE)
  # Each sixteenth stays: free at the top of a heap would go by itself.
  for number, piece in enumerate(pieces):
    if number % 16 != 15:
      libc.free(piece)
  before = resident()
  host_memory.give_back()
  assert before - resident() > NUM_PIECES * PIECE / 2
  for piece in pieces[15::16]:
    libc.free(piece)
