"""A process that has imported torch already, and forks: so a run of the script begins in
milliseconds, not in seconds, and so do its ranks under torchrun.

Pytest's own process is no such server, as a fork loses autograd's threads. The server is Python's
own, of multiprocessing; it imports this module, which imports what a run would."""

import atexit
import contextlib
import gc
import importlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from multiprocessing import forkserver, get_context
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
MODULES = "sentencepiece", "triton", "torch.distributed.run", "torch._dynamo", "torch.testing"
# of a new Python: the server's without those by which it or pytest finds this repository
PATHS = [path for path in sys.path if path not in ("", str(TESTS), str(ROOT))]


class Run:
    """`python *arguments` in `cwd`, in a fork; to its caller a subprocess.Popen."""

    def __init__(
        self, arguments: list[str], cwd: Path, env: dict[str, str], has_runs: bool = False
    ):
        """`has_runs`: it may make a Run itself, but is not ended with this process."""
        start_server()
        self.args = [sys.executable, *arguments]
        self.said = [tempfile.NamedTemporaryFile("r") for _ in ("stdout", "stderr")]
        paths = [file.name for file in self.said]
        self.process = get_context("forkserver").Process(
            target=begin, args=(arguments, str(cwd), env, paths), daemon=not has_runs
        )
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (file.read() for file in self.said)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_server() -> None:
    """Unless it runs. Its environment is what torch reads when it is loaded; each run gets its
    own."""
    env = {
        "PRELOAD": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    forkserver.set_forkserver_preload([__name__])
    with mock.patch.dict(os.environ, env):
        forkserver.ensure_running()


def preload() -> None:
    for name in MODULES:
        with contextlib.suppress(ImportError):  # Triton is not everywhere
            importlib.import_module(name)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = ForkedPopen
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads: all but one would be lost in a fork"
    gc.freeze()  # else a collection would write to pages that forks share
    atexit.register(os._exit, 0)  # quietly: Triton's bindings would list what is never freed


def begin(arguments: list[str], cwd: str, env: dict[str, str], paths: list[str]) -> None:
    for number, path in enumerate(paths, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(cwd)
    be_python(arguments, env)


class ForkedPopen(subprocess.Popen):
    """torchrun's, of its ranks: the same process, which forks but does not start a Python anew."""

    def __init__(self, args, env: dict[str, str], **options):
        def instead_of_starting():
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # as starting would; Popen waits for it
            be_python([str(argument) for argument in args[1:]], env)

        super().__init__(args, env=env, preexec_fn=instead_of_starting, **options)


def be_python(arguments: list[str], env: dict[str, str]) -> None:
    """What `python *arguments` does, a script or -m module, then the end of this process."""
    gc.freeze()  # what a collection closed would have another owner here
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "tools")]:
        del sys.modules[name]  # this repository's: the working folder may be a copy with its own
    if "RANK" in env:  # for `workers`, as /proc/self/environ stays the server's
        Path("/proc/self/comm").write_text(f"rank {env['RANK']}")
    status = 1
    try:
        run_main([argument for argument in arguments if argument != "-u"])
        status = 0
    except SystemExit as leaving:
        status = leaving.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_main(arguments: list[str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # this package: a run may have tests of its own
    if arguments[0] == "-m":
        module = arguments[1]
        sys.argv = arguments[1:]
        sys.path[:] = [os.getcwd(), *PATHS]
        sys.modules.pop(module, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path[:] = [os.path.dirname(os.path.abspath(arguments[0])), *PATHS]
        runpy.run_path(arguments[0], run_name="__main__")


if os.environ.get("PRELOAD") == "1":  # this is the server
    preload()
