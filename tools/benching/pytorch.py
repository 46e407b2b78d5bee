"""Client of the PyTorch process (tools/benching/torch_process.py)."""

import contextlib
import json
import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vdit.errors import UserError

from .cases import DTYPES, Case, Run
from .report import say
from .runs import LEARNING_RATE

AGREE = 1e-3  # largest relative difference that counts as equal

# The settings of `keep_freed_memory`, for a new process.
KEPT = {
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31), "MALLOC_TOP_PAD_": str(2**26),
}  # fmt: skip


class Torch:
    """The process; `missing` is the reason if there is none."""

    def __init__(self, python: str) -> None:
        self.python, self.missing = python, ""
        self.errors = tempfile.TemporaryFile("w+")
        self.threads: dict[str, int] = {}  # the faster number, by network, task and dtype
        try:
            self.process = subprocess.Popen(
                [python, str(Path(__file__).with_name("torch_process.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
                env={**os.environ, **KEPT},
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"--torch-python={python}: {error.strerror}") from error
        self.version = self.ask(version=True).get("version", "")

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and returns the answer; {"error": reason} on failure."""
        if not self.missing:
            try:
                assert self.process.stdin is not None and self.process.stdout is not None
                print(json.dumps(request), file=self.process.stdin, flush=True)
                line = self.process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if line:
                return json.loads(line)
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines()
            self.missing = f"{self.python}: {said[-1] if said else 'it ended'}"
        return {"error": self.missing}

    def load(self, case: Case, losses: list[float]) -> str:
        """Builds the network of a case; returns a line on whether both sides agree."""
        if self.missing:
            return f"no PyTorch: {self.missing}"
        expected = jax.jit(case.output("float32"))(case.params, case.inputs)
        flat = {
            "params/" + "/".join(str(key.key) for key in path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(case.tensors or case.params)
        }
        flat |= {f"inputs/{name}": value for name, value in case.inputs.items()}
        flat |= {"expected/output": np.asarray(expected), "expected/losses": np.asarray(losses)}
        said = {**case.options, "network": case.name, "learning_rate": LEARNING_RATE}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.npz"
            np.savez(path, options=json.dumps(said), **flat)  # type: ignore[arg-type]
            answer = self.ask(load=str(path))
        if "error" in answer or not max(answer["output"], answer["losses"]) < AGREE:
            self.missing = f"its network is not the same: {answer}"
            return f"no PyTorch: {self.missing}"
        return (
            f"the same network in PyTorch {self.version}: outputs differ by at most"
            f" {answer['output']:.0e}, {len(losses)} train steps' losses by {answer['losses']:.0e}"
        )

    def run(self, task: str, dtype: str, compiled: bool, threads: int) -> Run:
        """Times one variant; NaN seconds on failure."""

        def run() -> float:
            answer = self.ask(task=task, dtype=dtype, compiled=compiled, threads=threads)
            if "error" in answer:
                say(f"PyTorch {task} {dtype} compiled={compiled}: {answer['error']}")
            return answer.get("seconds", math.nan)

        return run

    def runs(self, case: Case, task: str) -> dict[str, Run]:
        """Warm runs, eager and compiled, float32 and bfloat16, with the faster thread count."""
        made: dict[str, Run] = {}
        if self.missing:
            return made
        counts = sorted({1, os.cpu_count() or 1})
        for dtype in DTYPES:
            known = self.threads
            if (name := f"{case.name} {task} {dtype}") not in known:
                probes = {n: self.run(task, dtype, False, n)() for n in counts}
                known[name] = min(probes, key=lambda n: (math.isnan(probes[n]), probes[n]))
            n = known[name]
            kind = "float32" if dtype == "float32" else "bfloat16 autocast"
            for compiled in (False, True):
                how = "torch.compile" if compiled else "eager"
                run = self.run(task, dtype, compiled, n)
                if not math.isnan(run()):
                    made[f"PyTorch {kind}, {how}, {n} thread{'s' * (n > 1)}"] = run
        return made

    def close(self) -> None:
        """Stops the process."""
        with contextlib.suppress(BrokenPipeError):  # of a request to a process that has ended
            assert self.process.stdin is not None
            self.process.stdin.close()
        self.process.wait()
