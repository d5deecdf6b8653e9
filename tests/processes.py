"Processes of their own, which start at once: they fork from one that has imported what takes long."
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "torch._dynamo", "flare.experiments"])
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher of several leaves in the environment


def begin(environment: dict[str, str], threads: int, said: Path | None, work: Callable, arguments: tuple):
    "The life of a process."
    for name in LAUNCHED: os.environ.pop(name, None)
    os.environ.update(environment)
    if said: os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(threads)
    work(*arguments)


def start(work: Callable, *arguments, environment: dict[str, str] | None = None, said: Path | None = None) -> BaseProcess:
    "A process that does some work, a function of a test module; `said` is a file for its standard error."
    process = FORKS.Process(target=begin, args=(environment or {}, torch.get_num_threads(), said, work, arguments), daemon=True)  # one that hangs ends with the tests
    process.start()
    return process


def ended(process: BaseProcess) -> int:
    "Its exit code, once it has ended; minus the signal that killed it."
    process.join(120)
    return process.exitcode
