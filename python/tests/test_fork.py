"""A child of fork() computes, although the parent's OpenMP threads did not survive the fork."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal
import torch
import flashtile

torch.set_num_threads(2)
q, dout = torch.randn(1, 300, 8, 64), torch.randn(1, 300, 8, 64)


def step():
    out, lse = flashtile.attention(q, q, q, causal=True, return_lse=True)
    gradients = torch.ops.flashtile.backward(dout, q, q, q, out, lse, None, None, -1, 0)
    cached = flashtile.attention_with_kvcache(q[:, :1], q, q, cache_seqlens=200)
    return out, lse, *gradients, cached


expected = step()
pid = os.fork()
if pid == 0:
    signal.alarm(60)  # a call that hangs ends the process
    found = step()
    torch.set_num_threads(1)  # torch's own operations would hang from here on, too
    os._exit(0 if all(torch.equal(a, b) for a, b in zip(found, expected)) else 1)
status = os.waitpid(pid, 0)[1]
assert not os.WIFSIGNALED(status), f"the child was ended by signal {os.WTERMSIG(status)}"
assert os.WEXITSTATUS(status) == 0, "the child's results differ"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_child_computes_what_its_parent_computes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
