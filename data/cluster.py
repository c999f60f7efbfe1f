"""The workers of prepare.py on many machines, by Ray, instead of in processes of one machine.

Ray (Moritz et al. 2018) is a service that runs on each machine of a cluster. A program gives it
tasks, each a function with its arguments. Ray finds a free core, sends the arguments there and
brings the result back. If a process or a whole machine is lost, it runs the lost tasks again
elsewhere. It was chosen because it runs the functions that we have. Hugging Face's datatrove, the
other engine for text, has its own readers, filters and files between its steps, so there would be
two of everything, and another result on many machines than on one.

The result of a task depends on its arguments alone (cleaning.py, shards.encode_group), and the
results arrive in the order of the input. So it does not matter where a task ran, nor how often. The
files are read and written by one process, the one that connects to the cluster, and it alone knows
which documents were seen before. The other machines need no access to the corpus. They need the
code: this repository and its environment lie in a folder that all machines see under one path.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

from data.jobs import in_order
from data.report import counted

ROOT = Path(__file__).parents[1]
RETRIES = 3  # of a task whose process or machine was lost


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Inside, `in_tasks` may be used. address: HOST:PORT, or "auto" for the cluster started here.

    Raises ValueError if Ray is missing, or there is no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("--cluster needs Ray on every machine, run: pip install ray") from error
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"env_vars": {"PYTHONPATH": path}}
    try:
        if address != "auto":  # Ray tries for a quarter of an hour where nobody answers
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, runtime_env=environment, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--cluster {address}: no cluster answers ({error}), start one: ray start --head"
        ) from error
    try:
        machines = sum(node["Alive"] for node in ray.nodes())
        print(f"cluster: {counted(machines, 'machines')}, {counted(cores(), 'cores')}")
        yield
    finally:
        ray.shutdown()


def cores() -> int:
    """The cores of the cluster at present: machines may join and leave."""
    import ray

    return int(ray.cluster_resources().get("CPU", 0))


def in_tasks(work: Callable, items: Iterable) -> Iterator:
    """Yield work(item) for each item, in the order of the items, from the machines of the cluster.

    At most two items per core are read in advance. Raises ValueError if the worker of an item was
    lost more than RETRIES times.
    """
    import ray

    # Each worker fetches `task` once, and with it `work`, which may hold a tokenizer.
    @ray.remote(max_retries=RETRIES)
    def task(item: object) -> object:
        return work(item)

    def submit(item: object) -> Future:
        return task.remote(item).future()

    try:
        yield from in_order(submit, items, lambda: 2 * max(1, cores()))
    except ray.exceptions.RayTaskError as error:  # `work` raised an error
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise ValueError(
            f"the cluster lost the workers of a task {RETRIES + 1} times: run the same command "
            "again to continue, on machines with more memory for each core if there was too little"
        ) from error
