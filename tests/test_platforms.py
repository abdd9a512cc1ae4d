"""A run without POSIX, as far as Linux can show: Windows' semantics of files, locks and signals."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from support.tiny_runs import write_corpus

ROOT = Path(__file__).parents[1]

# Runs first in a process: third-party packages are imported as they are, then what Windows lacks is removed.
WINDOWS = '''
import os, sys, signal, threading, types, warnings
import accelerate, numpy, psutil, rich.console, tokenizers, torch, torch.distributed.tensor, typer
import safetensors.torch, sysconfig
import psutil._psposix
psutil._psposix.os = types.SimpleNamespace(**vars(os))  # it has another implementation there
sysconfig.get_config_vars()  # kept, for libraries that ask later
import fcntl

locked = {}
def locking(handle, mode, size):
    """Lock a byte of a file, which fails where any handle has locked it."""
    key = os.fstat(handle).st_ino
    if locked.get(key, handle) != handle:
        raise OSError(36, "Resource deadlock avoided")
    locked[key] = handle
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)

close = os.close
def unlock_and_close(handle):
    for key in [key for key, holder in locked.items() if holder == handle]:
        del locked[key]
    close(handle)
os.close = unlock_and_close

fsync, replace, rename, getfl = os.fsync, os.replace, os.rename, fcntl.fcntl
def fsync_of_windows(handle):
    if getfl(handle, fcntl_getfl) & 3 == os.O_RDONLY:
        raise PermissionError(13, "Permission denied")  # FlushFileBuffers needs a handle that can write
    fsync(handle)
fcntl_getfl = fcntl.F_GETFL
os.fsync = fsync_of_windows
def rename_of_windows(source, target, **options):
    if os.path.exists(target):
        raise FileExistsError(17, "File exists", target)
    rename(source, target, **options)
os.rename = rename_of_windows
def replace_of_windows(source, target, **options):
    if os.path.isdir(target):
        raise PermissionError(5, "Access is denied", target)
    replace(source, target, **options)
os.replace = replace_of_windows
def kill(pid, number):
    raise AssertionError("os.kill ends a process of Windows, whatever the signal")
os.kill = kill
open_of_posix = os.open
def open_of_windows(path, flags, *rest, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return open_of_posix(path, flags, *rest, **options)
os.open = open_of_windows
sys.modules["fcntl"] = sys.modules["resource"] = sys.modules["pwd"] = sys.modules["termios"] = None
for name in (
    "fork getpgid setpgid killpg getuid geteuid uname mkfifo chown sched_getaffinity register_at_fork "
    "posix_fadvise pread O_NOFOLLOW O_NONBLOCK O_DIRECTORY O_CLOEXEC"
).split():
    delattr(os, name)
for name in "SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGALRM SIGCHLD pthread_kill alarm setitimer".split():
    delattr(signal, name)
import mmap, shutil
shutil._use_fd_functions = False  # as there
for name in [name for name in dir(mmap) if name.startswith("MADV_")]:
    delattr(mmap, name)
sys.platform = "win32"
# Files in another encoding than UTF-8 are the default there.
warnings.filterwarnings("error", category=EncodingWarning, module=r"minimind(_cli)?\\.")
import minimind.io.atomic
minimind.io.atomic.os = types.SimpleNamespace(**{**vars(os), "name": "nt"})
'''
RUN = """
import importlib, pkgutil
import minimind, minimind_cli
for package in (minimind, minimind_cli):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if "kernels" not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
from minimind_cli.app import main
def command(*words):
    try:
        main(list(words))
    except SystemExit as end:
        if end.code:
            raise
options = ["--data", "corpus.jsonl", "--cache-dir", "cache", "--output-dir", "run", "--preset", "tiny"]
options += ["--hidden-size", "32", "--num-hidden-layers", "1", "--max-seq-len", "32", "--batch-size", "2"]
options += ["--tracker", "none"]
options += ["--save-interval", "2", "--log-interval", "1", "--val-fraction", "0.1", "--eval-interval", "2"]
command("pretrain", *options, "--max-steps", "3", "--keep-checkpoints", "1")
command("pretrain", "--resume", "--output-dir", "run", "--max-steps", "5")
command("info", "run")
command("checkpoints", "run")
command("export", "run", "--output", "exported")
assert not locked, locked
from minimind.data.cache import open_or_build
def build(folder):
    (folder / "a").write_bytes(b"x")
    return {}
import socket
draft = minimind.run_folder.Path("cache", f"other.building-{socket.gethostname()}-999999999")
draft.mkdir()
assert open_or_build(minimind.run_folder.Path("cache"), "key", build).built
assert not draft.exists()  # left by a process that has ended
assert not open_or_build(minimind.run_folder.Path("cache"), "key", build).built
print("all is well")
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("windows") / "corpus.jsonl")


@pytest.mark.slow
def test_a_run_needs_nothing_that_windows_lacks(corpus: Path) -> None:
    command = [sys.executable, "-X", "warn_default_encoding", "-c", WINDOWS + RUN]
    done = subprocess.run(command, cwd=corpus.parent, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["all is well"], done.stdout[-1000:] + done.stderr[-3000:]


def test_every_text_file_names_its_encoding() -> None:
    """Without one, Python uses the code page of Windows."""
    wrong = []
    for path in [*(ROOT / "minimind").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            keywords = {keyword.arg for keyword in node.keywords}
            positional = {"read_text": 0, "write_text": 1}
            limit = positional.get(node.func.attr)
            if limit is not None and "encoding" not in keywords and len(node.args) <= limit:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []
