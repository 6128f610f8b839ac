"""Fresh interpreters at the price of a fork: half of what a process takes here is the import of torch."""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import sys
import types
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

ROOT = Path(__file__).parents[1]
OUTPUTS = TemporaryDirectory(prefix="fresh_")

CONTEXT = multiprocessing.get_context("forkserver")
# Nothing of ours, and nothing that reads Hugging Face's variables of the environment when it is imported.
CONTEXT.set_forkserver_preload(
    [
        "numpy", "pandas", "pyarrow.dataset", "scipy.optimize", "scipy.spatial.transform", "sklearn.metrics",
        "torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor",
        "torch.nn.attention.flex_attention", "torchao.quantization", "torchao.prototype.mx_formats",
        "aiohttp", "dill", "fsspec", "jinja2", "matplotlib.pyplot", "multiprocess", "PIL.Image", "psutil", "requests",
        "rich", "safetensors.torch", "tokenizers", "yaml",
    ]
)  # fmt: skip


class Interpreter(CONTEXT.Process):
    """`python SCRIPT ARGUMENTS`, or `python -c CODE ARGUMENTS`, started at once."""

    def __init__(self, *arguments, env: dict[str, str] | None = None, cwd: Path | None = None):
        self.folder = Path(mkdtemp(dir=OUTPUTS.name))
        environment = {**(env or os.environ), "OMP_NUM_THREADS": "1"}
        super().__init__(
            target=execute, args=([*map(str, arguments)], environment, str(cwd or Path.cwd()), str(self.folder))
        )
        self.start()

    @property
    def stdout(self) -> str:
        return self.read("stdout")

    @property
    def stderr(self) -> str:
        return self.read("stderr")

    def read(self, name: str) -> str:
        file = self.folder / name
        return file.read_text(errors="replace") if file.exists() else ""

    def interrupt(self) -> None:
        os.kill(self.pid, signal.SIGINT)

    def wait(self) -> int:
        self.join()
        return self.exitcode


def execute(arguments: list[str], environment: dict[str, str], cwd: str, outputs: str) -> None:
    # What pytest and transformers have put there in the process that asks for this one.
    foreign = {"", *(str(ROOT / name) for name in (".", "tests", "training")), os.environ.get("HF_MODULES_CACHE")}
    sys.path[:] = [place for place in sys.path if place not in foreign]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(f"{outputs}/{name}", "wb") as file:
            os.dup2(file.fileno(), number)
        getattr(sys, name).reconfigure(encoding="utf-8", line_buffering=True)
    script, *_ = sys.argv[:] = arguments
    if script == "-c":
        sys.argv[:] = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), vars(main))
    else:
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")


def run_fresh(*arguments, **kwargs) -> str:
    """What an interpreter prints that ends well."""
    process = Interpreter(*arguments, **kwargs)
    assert process.wait() == 0, process.stdout + process.stderr
    return process.stdout


def run_fresh_ranks(config: str, script: Path, *arguments) -> str:
    """The processes that `accelerate launch --config_file training/CONFIG SCRIPT ARGUMENTS` would start; what the first
    one prints."""
    # It reads Hugging Face's variables when it is imported, and an interpreter that begins imports this file.
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    given = launch_command_parser().parse_args(["--config_file", str(ROOT / "training" / config), str(script)])
    given, *_ = _validate_launch_command(given)
    shared = {**os.environ, **prepare_multi_gpu_env(given), **place, "WORLD_SIZE": str(given.num_processes)}
    ranks = [
        Interpreter(script, *arguments, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(given.num_processes)
    ]
    try:
        while running := [rank.sentinel for rank in ranks if rank.is_alive()]:
            multiprocessing.connection.wait(running)
            for rank in ranks:
                assert rank.exitcode in (None, 0), rank.stdout + rank.stderr
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.wait() for rank in ranks] == [0] * len(ranks), [rank.stderr for rank in ranks]
    return ranks[0].stdout
