"""SGLang server processes that the run starts, and what is asked of servers before they are used."""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from megatron_dgpo import jsontext, platform, torchrun
from megatron_dgpo.config import LaunchConfig
from megatron_dgpo.progress import progress
from megatron_dgpo.rollout.sglang.launcher import WITHOUT_GPU

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_END_SECONDS = 10.0
_TAIL_LINES = 15
_PORT_TRIES = 3
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Servers are asked directly, as samples are: a proxy of the environment does not lead to them."""
_TORCHRUN = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "TORCHELASTIC_",
    "PYTHON",
    "VIRTUAL_ENV",
)
"""Variables of the trainer's processes that would mislead a server's."""

_CPU_ARGS: dict[str, Any] = dict(
    device="cpu",
    attention_backend="torch_native",
    sampling_backend="pytorch",
    grammar_backend="none",
    disable_cuda_graph=True,
    disable_overlap_schedule=True,
    disable_radix_cache=True,
    max_total_tokens=32768,  # SGLang's own choice is all of the machine's memory
    max_running_requests=64,
    sleep_on_idle=True,  # a server that waits would otherwise keep a core busy, which the trainer needs
)
_CPU_ENVIRONMENT = {
    WITHOUT_GPU: "1",
    "SGLANG_USE_CPU_ENGINE": "1",
    # Buckets arrive in memory that is kept, in huge pages: getting it from the system anew takes as long
    # as the transfer.
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}


_OWNER = "MEGATRON_DGPO_SERVER_OWNER"
"""Environment variable of every process of a server: its log file, and the process that started it."""


class ServerFailed(RuntimeError):
    """A server did not come up, or is not what the run needs."""


class ServerProcess:
    """One managed server; its process starts at once, in a session of its own.

    It serves random weights of the right shapes until the first sync. It ends with `stop`, and with the
    process that made it, however that ends.

    Args:
        model_path: Hugging Face folder; only its config is read.
        number: of the server on this machine, from 0; chooses its devices.
        dtype: of weights and activations.
        log_file: the server's output is appended to it.
        colocate: on the trainer's GPUs, with memory that can be given up.
        host: the address that it listens on.

    Raises:
        ServerFailed: where the interpreter is missing, or the port that is asked for is taken.
    """

    def __init__(
        self,
        model_path: Path,
        launch: LaunchConfig,
        *,
        number: int,
        dtype: str,
        log_file: Path,
        colocate: bool = False,
        host: str = "127.0.0.1",
    ) -> None:
        if not launch.python.is_file():
            raise ServerFailed(
                f"rollout.sglang.launch.python: {launch.python} is not there; `make sglang` makes it for "
                "machines without a GPU, or name the interpreter of an environment that has SGLang"
            )
        self._model_path = model_path
        self._launch = launch
        self._number = number
        self._dtype = dtype
        self._colocate = colocate
        self._host = host
        self.log_file = log_file
        self._tries = 0
        self._started = time.monotonic()
        end_left_over(log_file)
        self._start()

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def _start(self) -> None:
        self._tries += 1
        self._reserved = _reserve(self._host, int(self._launch.args.get("port", 0)))
        self._port = int(self._reserved.getsockname()[1])
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        command = [str(self._launch.python.absolute()), str(Path(__file__).with_name("launcher.py"))]
        command += command_line(self._arguments())
        with self.log_file.open("ab") as output:
            output.write(f"\n== {' '.join(command)}\n".encode())
            output.flush()
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its end is the sign that this process is gone
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )

    def _arguments(self) -> dict[str, Any]:
        gpu = platform.has_gpu()
        first = self._number * self._launch.tensor_parallel_size
        own: dict[str, Any] = dict(
            model_path=self._model_path,
            host=self._host,
            tp_size=self._launch.tensor_parallel_size,
            dtype=self._dtype,
            load_format="dummy",  # the first sync brings the weights
            skip_tokenizer_init=True,
        )
        if gpu and self._colocate:
            own |= dict(enable_memory_saver=True, base_gpu_id=first)
        return {**({} if gpu else _CPU_ARGS), **own, **self._launch.args, "port": self._port}

    def _environment(self) -> dict[str, str]:
        env = _own_environment()
        env |= dict(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", PYTHONUNBUFFERED="1")
        env[_OWNER] = _owner(self.log_file, os.getpid())
        env["PYTHONSAFEPATH"] = "1"  # the launcher's neighbours are none of the server's modules
        # SGLang compiles kernels with tools of its own environment (ninja).
        own = str(self._launch.python.absolute().parent)
        env["PATH"] = os.pathsep.join([own, env.get("PATH", os.defpath)])
        if not platform.has_gpu():
            return env | _CPU_ENVIRONMENT
        if not self._colocate:
            env["CUDA_VISIBLE_DEVICES"] = visible_devices(
                env.get("CUDA_VISIBLE_DEVICES"),
                self._launch.devices,
                number=self._number,
                size=self._launch.tensor_parallel_size,
                first=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),  # the ranks have those below
            )
        return env

    def wait_ready(self, timeout: float) -> None:
        """Until it answers.

        Raises ServerFailed, with the end of its log, when it ends or takes longer than `timeout` seconds
        from its start: servers that were started side by side have these seconds in common.
        """
        with progress(f"starting SGLang server {self.url} (its log: {self.log_file})", bar=False):
            self._wait_ready(timeout)
        self._reserved.close()

    def _wait_ready(self, timeout: float) -> None:
        while not answers(self.url + "/health"):
            now, taken = time.monotonic(), self._port_was_taken()
            if taken and "port" not in self._launch.args and self._tries < _PORT_TRIES:
                log.info("port %d was taken meanwhile; starting the server on another", self._port)
                self.stop()
                self._start()
                continue
            if taken or not self.is_alive():
                self.stop()
                raise ServerFailed(self.death())
            if now - self._started > timeout:
                self.stop()
                raise ServerFailed(
                    f"SGLang server {self.url} did not answer in {timeout:g} s "
                    f"(rollout.sglang.launch.startup_timeout_seconds){self._tail()}"
                )
            time.sleep(_POLL_SECONDS)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def death(self) -> str:
        """Why it ended, as far as its log says."""
        return f"SGLang server {self.url} ended with status {self._process.poll()}{self._tail()}"

    def terminate(self) -> None:
        """Ask it to end, without waiting: SGLang looks for this every five seconds."""
        if self.is_alive():
            self._process.terminate()

    def stop(self) -> None:
        """End the server and every process that it started, also when the server itself is gone."""
        self._reserved.close()
        family = self._family()
        if self.is_alive():
            self.terminate()
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                log.info("SGLang server %s did not end by itself", self.url)
        family |= self._family()
        for member in family:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                pass
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        psutil.wait_procs(list(family), timeout=_END_SECONDS)

    def _family(self) -> set[psutil.Process]:
        """The server's process and those that came of it, which share its session; children of one that
        has ended have another parent by then."""
        pid, family = self._process.pid, set()
        if self.is_alive():
            family |= {(process := psutil.Process(pid)), *process.children(recursive=True)}
        elif psutil.pid_exists(pid):
            return family  # somebody else's by now, and so is the session
        return family | {p for p in psutil.process_iter() if _session_of(p.pid) == pid}

    def _port_was_taken(self) -> bool:
        """SGLang binds its port last, after the model is loaded, and may stay without one: its threads
        keep the process."""
        return "address already in use" in self._output().lower()

    def _output(self) -> str:
        """What this start has logged."""
        with self.log_file.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def _tail(self) -> str:
        lines = self._output().splitlines()[-_TAIL_LINES:]
        return f"; the end of {self.log_file}:\n" + "\n".join(lines)


def stop_servers(servers: Collection[ServerProcess]) -> None:
    """End them side by side."""
    for server in servers:
        server.terminate()
    for server in servers:
        server.stop()


def end_left_over(log_file: Path) -> None:
    """End what is left of servers with this log file whose trainer has ended, such as one that torchrun has
    started again since: they end by themselves, but not at once, and have ports and the GPUs' memory."""
    left = {p for p in psutil.process_iter() if _is_left_over(p, log_file)}
    if not left:
        return
    log.warning("ending SGLang processes %s of a trainer that is gone", sorted(p.pid for p in left))
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(list(left), timeout=_END_SECONDS)


def _is_left_over(process: psutil.Process, log_file: Path) -> bool:
    try:
        owner = process.environ().get(_OWNER, "")
    except (psutil.Error, OSError):  # it has ended, or is somebody else's
        return False
    file, _, trainer = owner.rpartition(" ")
    if file != str(log_file.absolute()):
        return False
    return owner != _owner(log_file, int(trainer.partition("-")[0]))


def _owner(log_file: Path, trainer: int) -> str:
    """The number of a process may be another's by now, and the time of its start tells."""
    return f"{log_file.absolute()} {trainer}-{torchrun.start_time(trainer)}"


def _own_environment() -> dict[str, str]:
    """This process's, without what would mislead another interpreter."""
    return {k: v for k, v in os.environ.items() if not k.startswith(_TORCHRUN)}


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def visible_devices(
    inherited: str | None, devices: Sequence[int], *, number: int, size: int, first: int
) -> str:
    """CUDA_VISIBLE_DEVICES of server `number`, which has `size` GPUs.

    Args:
        inherited: the run's own; a cluster's scheduler sets it, and then names only what is the run's.
        devices: of all servers in turn, as places in that list; none: from `first` up.

    Raises ServerFailed for a place that the list does not have.
    """
    start = number * size
    places = list(devices[start : start + size] or range(first + start, first + start + size))
    if inherited is None:
        return ",".join(map(str, places))
    names = [name.strip() for name in inherited.split(",") if name.strip()]
    if beyond := [place for place in places if place >= len(names)]:
        raise ServerFailed(
            f"rollout.sglang.launch.devices: server {number} is to have GPU {beyond[0]}, and "
            f"CUDA_VISIBLE_DEVICES={inherited} leaves the run {len(names)}, counted from 0"
        )
    return ",".join(names[place] for place in places)


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """{"tp_size": 2, "disable_radix_cache": True, "cuda_graph_bs": [1, 2]} as SGLang's options."""
    words: list[str] = []
    for name, value in arguments.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            words += [option, *map(str, value)]
        elif value is not False and value is not None:
            words += [option, str(value)]
    return words


def _reserve(host: str, wanted: int) -> socket.socket:
    """A socket that holds that port, or with 0 one that is free, for the server until it listens.

    Loading takes a minute in which any connection could get the port as its own end. While this socket is
    open the system gives the port to nobody; only who asks for it by number and shares it (SO_REUSEADDR),
    as SGLang does, gets it. SGLang itself waits for minutes for a port that is taken.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        holder.bind((host, wanted))
    except OSError as error:
        holder.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise ServerFailed(f"rollout.sglang.address: {host} is no address of this machine") from error
        raise ServerFailed(
            f"rollout.sglang.launch.args.port: {host}:{wanted} is in use; choose another, or none"
        ) from error
    return holder


def check_nccl(python: Path, ours: str) -> None:
    """Raises ServerFailed where this interpreter's NCCL is not the trainer's: the two form no group."""
    code = "import torch; print('.'.join(map(str, torch.cuda.nccl.version())))"
    key = "rollout.sglang.launch.python"
    try:
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=120, env=_own_environment()
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerFailed(f"{key}: {error}") from error
    if done.returncode:
        raise ServerFailed(f"{key}: {python} has no torch with NCCL: {done.stderr[-500:]}")
    if (theirs := done.stdout.strip()) != ours:
        raise ServerFailed(
            f"{key}: its torch has NCCL {theirs}, the trainer's {ours}, and processes with different ones "
            "form no group: install the same torch in both"
        )


# --- what is asked of any server --------------------------------------------------------------------


def check_server(url: str, model_path: Path, timeout: float = 30.0) -> int:
    """The tensor-parallel size of a server that serves the model of this folder.

    Raises ServerFailed where it does not answer, serves another model, or replicates it.
    """
    served = _get(url, "/model_info", "/get_model_info", timeout=timeout)
    info = _get(url, "/server_info", "/get_server_info", timeout=timeout)
    wanted = jsontext.loads((model_path / "config.json").read_bytes())
    for key in ("model_type", "architectures"):
        if served.get(key) is not None and served[key] != wanted.get(key):
            raise ServerFailed(
                f"{url} serves {served.get('model_path')}, whose {key} is {served[key]!r}; "
                f"the run's model, {model_path}, has {wanted.get(key)!r}"
            )
    if info.get("dp_size", 1) != 1:
        raise ServerFailed(f"{url} has dp_size {info['dp_size']}: weights can be sent to servers with 1 only")
    return int(info.get("tp_size", 1))


def weight_version(url: str) -> str:
    """What a server calls the weights it has: what the last update named, or its own `--weight-version`."""
    return str(_get(url, "/model_info", "/get_model_info").get("weight_version"))


def workers_of_router(url: str) -> list[str]:
    """The servers behind an sglang-router. Raises ServerFailed where there are none."""
    found = _get(url, "/workers", "/list_workers")
    workers = [w["url"] for w in found["workers"]] if "workers" in found else found.get("urls", [])
    if not workers:
        raise ServerFailed(f"rollout.sglang.router: {url} has no workers")
    return [w.rstrip("/") for w in workers]


def answers(url: str, timeout: float = 25.0) -> bool:
    """Whether a path of a server answers 200. SGLang gives /health up by itself after 20 s."""
    try:
        with _OPENER.open(url, timeout=timeout) as response:
            return response.status == 200
    except OSError:
        return False


def _get(url: str, *paths: str, timeout: float = 30.0) -> dict[str, Any]:
    """The answer of the first of the paths that the server knows."""
    for path in paths:
        try:
            with _OPENER.open(url + path, timeout=timeout) as response:
                value = jsontext.loads(response.read())
                return value if isinstance(value, dict) else {}
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise ServerFailed(f"{url}{path} answered {error.code}") from error
        except (OSError, ValueError) as error:
            raise ServerFailed(f"{url} does not answer as an SGLang server does: {error}") from error
    raise ServerFailed(f"{url} has none of {', '.join(paths)}: is it an SGLang server?")
