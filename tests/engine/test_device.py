"""Device settings: freed memory is kept for the next tensors."""

import os
import resource
import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is one of glibc's")
def test_freed_memory_stays_with_the_process():
    """Tensors of sizes seen before cost no new pages; by default each tensor does."""
    program = """
import resource, sys, torch
from dmjd.engine.device import keep_freed_memory
if sys.argv[1] != "default":
    assert keep_freed_memory("cpu")
    assert not keep_freed_memory("cuda")
if sys.argv[1] == "keep small":
    assert keep_freed_memory("cpu", up_to=1 << 21)
def make():
    for i in range(6):
        torch.ones((40 << 20) + i % 3 * 1000, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = make()
print(make() - before)
"""
    small_pages = os.environ | {"THP_MEM_ALLOC_ENABLE": "0"}
    found = {}
    for word in ("keep", "keep small", "default"):
        command = [sys.executable, "-c", program, word]
        found[word] = int(subprocess.run(command, capture_output=True, check=True, env=small_pages).stdout)
    pages = 6 * (40 << 20) / resource.getpagesize()
    assert found["keep"] < pages / 4 < pages / 2 < min(found["default"], found["keep small"])
