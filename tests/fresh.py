"""Code in an interpreter that has imported nothing yet, and in copies of this process."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Nothing looks for cycles in all that is imported and ends. Keras imports these packages where they
# are installed; here they seem not to be, as after a plain install, which is half of the time.
_START = """
import gc, sys
gc.disable()
sys.modules.update(dict.fromkeys(("jax", "matplotlib", "pandas", "scipy", "sklearn")))
"""


def run(code, *options, cwd=ROOT, arguments=(), **environment):
    """Run code in an interpreter that has only what vggtorch needs."""
    kept = {k: v for k, v in os.environ.items() if k not in ("KERAS_BACKEND", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *options, "-c", _START + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=kept | environment,
        cwd=cwd,
    )


def fork(work, *arguments, **environment):
    """Call `work` in a copy of this process, which then ends; the copy's id.

    Neither threads nor CUDA survive a fork, so the copy has one thread and no GPU.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        import keras
        import torch

        torch.set_num_threads(1)
        torch.cuda.is_available = lambda: False
        if "accelerate.state" in sys.modules:  # which remembers how many processes there were
            sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.update(environment)
        with keras.device("cpu"):
            work(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait_for(*children, seconds=300):
    """See that all end well; the first that doesn't ends the others, which would wait for it."""
    left, end = set(children), time.monotonic() + seconds
    try:
        while left:
            for child in tuple(left):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    left.remove(child)
                    assert status == 0, f"what it printed says why it ended with status {status}"
            assert time.monotonic() < end, f"still at work after {seconds} s"
            time.sleep(0.01)
    finally:
        for child in left:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def as_two(work, *arguments):
    """Call `work` in two copies of this process, each told who it is as torchrun tells it.

    So nothing is imported again; torchrun would start three interpreters.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    together["MASTER_PORT"] = str(port)
    wait_for(
        *(
            fork(work, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **together)
            for rank in (0, 1)
        )
    )
