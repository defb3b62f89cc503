"""Code in an interpreter of its own, which has imported nothing yet, and in two processes."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(code, *options, cwd=ROOT, **environment):
    """Run code in an interpreter that doesn't look for cycles in all that it imports, and ends."""
    kept = {k: v for k, v in os.environ.items() if k not in ("KERAS_BACKEND", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *options, "-c", "import gc\ngc.disable()\n" + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env=kept | environment,
        cwd=cwd,
    )


def run_on_two(script, *arguments):
    """Run a script that is two processes by `as_two`; what it prints."""
    folders = [
        ROOT,
        ROOT / "tests",
        Path(script).parent,
        *os.environ.get("PYTHONPATH", "").split(os.pathsep),
    ]
    result = subprocess.run(
        [sys.executable, script, *arguments],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def as_two(work):
    """Call `work` in two forks of this process, each told who it is as torchrun tells it.

    So everything is imported once; torchrun would start three interpreters. The first that fails
    ends the other, which would wait for it.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}
    children = []
    for rank in (0, 1):
        children.append(os.fork())
        if not children[-1]:
            for name, value in (
                together | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
            ).items():
                os.environ[name] = str(value)
            try:
                work()
                sys.stdout.flush()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)
