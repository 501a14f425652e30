"""Servers in processes of their own: ours, and ``transformers serve`` on the same model folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving_cpu import CpuMeter, pinned
from benchmarks.serving_in_process import ManagerSizes
from benchmarks.serving_load import Body

START_S = 180.0


class ServerFailed(Exception):
    """A server didn't start, or refused what the benchmark needs; says what it said."""


@dataclass(frozen=True, slots=True)
class ServerOrder:
    """Which model a server is to serve, how, and on which cores."""

    model: str
    device: str
    dtype: str
    cores: Collection[int]
    folder: Path


@dataclass(frozen=True, slots=True)
class RunningServer:
    url: str
    meter: CpuMeter


@contextmanager
def run_palimpsest(order: ServerOrder, rows: int) -> Iterator[RunningServer]:
    """Raises ServerFailed."""
    port = find_port()
    command = [
        *(sys.executable, "-m", "benchmarks.serving_threads", "serve"),
        *("--model", order.model, "--device", order.device, "--dtype", order.dtype),
        *("--data", str(order.folder / "data"), "--threads", str(len(order.cores))),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    environment = {"PALIMPSEST_MAX_BATCH_ROWS": str(rows)}
    with run_server(command, environment, order, "palimpsest", port) as process:
        url = f"http://127.0.0.1:{port}"
        await_answer(process, f"{url}/readyz", order.folder / "palimpsest.log")
        yield RunningServer(url, CpuMeter(process.pid, order.cores, edits=True))


@contextmanager
def run_transformers(order: ServerOrder, sizes: ManagerSizes) -> Iterator[RunningServer]:
    """Its continuous batching in the sizes that are best for the manager: those it would choose
    for itself take all of a CPU's memory. Raises ServerFailed."""
    program = Path(sys.executable).with_name("transformers")
    if not program.exists():
        raise ServerFailed(f"there is no {program}")
    port = find_port()
    command = [
        *(str(program), "serve", order.model, "--continuous-batching"),
        *("--device", order.device, "--dtype", order.dtype),
        *("--host", "127.0.0.1", "--port", str(port), "--log-level", "error"),
        *("--cb-block-size", str(sizes.page_size), "--cb-num-blocks", str(sizes.num_blocks)),
        *("--cb-max-batch-tokens", str(sizes.max_batch_tokens)),
    ]
    with run_server(command, {}, order, "transformers", port) as process:
        url = f"http://127.0.0.1:{port}"
        await_answer(process, f"{url}/health", order.folder / "transformers.log")
        yield RunningServer(url, CpuMeter(process.pid, order.cores))


@contextmanager
def run_server(
    command: Sequence[str],
    environment: Mapping[str, str],
    order: ServerOrder,
    name: str,
    port: int,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process on the order's cores, ended with the context; what it says goes to a file."""
    with (order.folder / f"{name}.log").open("wb") as log, pinned(order.cores):
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=order.folder,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(len(order.cores)),
                "HF_HUB_OFFLINE": "1",
                **environment,
            },
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def await_answer(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Raises ServerFailed: it ends, or says nothing for minutes."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    said = log.read_text("utf-8", "replace").strip().splitlines()
    raise ServerFailed(said[-1] if said else "it said nothing")


def ask_palimpsest(view: str) -> Body:
    """What ``/v1/completions`` is asked: greedy, past the end of the text."""

    def body(prompt: str, new_tokens: int) -> Mapping[str, Any]:
        return {
            "model": view,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    return body


def ask_transformers(model: str) -> Body:
    """The same of ``transformers serve``, which always tells the usage."""

    def body(prompt: str, new_tokens: int) -> Mapping[str, Any]:
        greedy = json.dumps({"do_sample": False, "eos_token_id": -1, "max_new_tokens": new_tokens})
        return {"model": model, "prompt": prompt, "stream": True, "generation_config": greedy}

    return body


def find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
