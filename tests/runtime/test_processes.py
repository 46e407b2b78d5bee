"""Several processes: the numbers of one; who is gone, stuck or broken is named, and all end."""

import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import toy
from several import LIMIT, ROOT, finish, start

from vdit.config import default
from vdit.data.latents import Latents, write_cache
from vdit.data.loader import batches
from vdit.errors import UserError
from vdit.runtime.checkpoint import Checkpoints, newest_good_step, restore_ema
from vdit.runtime.mesh import data_process, make_mesh
from vdit.runtime.metrics import Metrics, read
from vdit.runtime.preemption import Preemption
from vdit.runtime.processes import Member, member, newest_checkpoint, several
from vdit.train import Runtime, abstract_state

STEPS = 10
TOY = [str(ROOT / "tests" / "toy.py")]
CONFIG = ("--config=experiments/base.py", "--config.run.dtype=float32", "--config.run.log_every=1")
# Gloo's threads write to standard output in pieces, so that other lines can come between them.
GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. "
    r"|Expected number of connected peer ranks is : |\d+|\s+"
)


def begin(workdir: Path, count: int, *args: str, **options: Any) -> Any:
    more = (f"--workdir={workdir}", f"--config.vae.train.steps={STEPS}", *args)
    return start(TOY, count, *CONFIG, *more, **options)


def wait_for(what: Callable[[], Any]) -> None:
    """Until `what` is true, for as long as a busy machine may need."""
    until = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


def losses(workdir: Path) -> list[float]:
    rows = [row for row in read(workdir) if row["stage"] == "toy"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def test_stopped_by_one_signal_and_gone_on_with_by_more_they_are_one_process(
    tmp_path: Path,
) -> None:
    """Four devices as two processes, then as four, beside one device of this one."""
    workdir = tmp_path / "several"
    fsdp = "--config.mesh.fsdp=2"
    two = begin(workdir, 2, fsdp, "--config.vae.train.steps=1000", devices=2, toy="slow:0.05")
    wait_for(lambda: len(read(workdir)) > 2 or two[0].poll() is not None)
    two[1].send_signal(signal.SIGTERM)  # one of them: both stop, at the same step
    ended = finish(two)
    assert [status for status, _, _ in ended] == [143, 143], ended
    stopped = newest_good_step(workdir / "checkpoints" / "toy")
    assert stopped is not None
    assert all(f"stopped and saved at step {stopped}; run again" in err for _, _, err in ended)
    rest, count = re.subn(r"process 1 of 2 \(.*\): 2 of 4 devices\n", "", ended[1][1])
    assert count == 1 and not GLOO.sub("", rest), ended[1]  # all else is said by process 0
    assert "process 0 of 2" in ended[0][1] and "loss" in ended[0][1]

    steps = stopped + 3
    four = finish(begin(workdir, 4, fsdp, f"--config.vae.train.steps={steps}"))
    assert [status for status, _, _ in four] == [0] * 4, four

    run = default().run
    run.log_every, run.dtype = 1, "float32"
    alone = tmp_path / "alone"
    with Metrics(alone) as metrics:
        mesh = make_mesh({}, jax.devices()[:1])
        toy.train(Runtime(alone, mesh, metrics, Preemption(), run), steps)
    np.testing.assert_allclose(losses(workdir), losses(alone), rtol=1e-5)

    # What four processes saved, on one, two, four and eight devices here.
    folder = workdir / "checkpoints" / "toy"
    options = default().vae.train
    batch = {"x": jax.ShapeDtypeStruct((8, toy.WIDTH), np.float32)}
    found = []
    for count in (1, 2, 4, 8):
        mesh = make_mesh({"fsdp": -1}, jax.devices()[:count])
        options.optimizer = "adamw"
        abstract = abstract_state(toy.objective(), options, batch, mesh, 1)
        restored = Checkpoints(folder).restore(*abstract, batches(toy.Points(), 8, 3, ("x",)))
        assert restored is not None and restored.step == steps
        found.append(jax.tree.map(np.asarray, (restored.state, restored.ema)))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], other)
    jax.tree.map(np.testing.assert_array_equal, found[0][1], restore_ema(folder, steps))


SAVES = ("--config.run.lost=12", "--config.run.save_every=2", "--config.vae.train.steps=100000")


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Pairs of processes that come to bad ends, all at one time: folders, and what is left.

    Process 0 keeps the others' signs of life, and none is left to do so when it is gone.
    """
    folders = {name: tmp_path_factory.mktemp(name) for name in ("killed-0", "killed-1", "stuck")}
    folders |= {name: tmp_path_factory.mktemp(name) for name in ("broken", "refused")}
    pairs = {
        "killed-0": begin(folders["killed-0"], 2, *SAVES, toy="slow:0.05"),
        "killed-1": begin(folders["killed-1"], 2, *SAVES, toy="slow:0.05"),
        "stuck": begin(folders["stuck"], 2, "--config.run.stuck=8", toy="stuck:1:33"),
        "broken": begin(folders["broken"], 2, "--config.run.lost=12", toy="broken:1:33"),
        "refused": begin(folders["refused"], 2, "--config.run.lost=12", toy="refused:1:33"),
    }
    for victim in (0, 1):
        pair, folder = pairs[f"killed-{victim}"], folders[f"killed-{victim}"]

        def saved(folder: Path = folder) -> bool:
            return len(list(folder.glob("checkpoints/*/*/digests.json"))) > 1

        wait_for(lambda pair=pair, saved=saved: saved() or pair[0].poll() is not None)
        pair[victim].kill()
    return {name: (folders[name], finish(pair)) for name, pair in pairs.items()}


@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed_and_the_other_names_it(victim: int, ends: Any) -> None:
    workdir, ended = ends[f"killed-{victim}"]
    status, _, err = ended[1 - victim]
    assert ended[victim][0] == -signal.SIGKILL and status not in (0, None), ended
    line = err.splitlines()[-1]
    assert line.startswith("vdit: ") and f"process {victim} of 2" in line, err
    assert ("gave no sign of life for 12 s" if victim else "is gone") in line
    folder = workdir / "checkpoints" / "toy"
    assert f"the newest checkpoint is {folder / str(newest_good_step(folder))}" in line


def test_one_is_stuck_and_its_stack_is_shown(ends: Any) -> None:
    workdir, ended = ends["stuck"]
    assert [status for status, _, _ in ended] == [1, 1], ended
    for _, _, err in ended:  # whoever came to say it first
        last = err.splitlines()[-1]
        assert "made no step for 8 s: stage toy, step" in last and "process 1 of 2" in last, err
    assert "toy.py" in ended[1][2] and "__getitem__" in ended[1][2]  # where it is stuck
    assert "vdit/main.py" in ended[0][2] and "__getitem__" not in ended[0][2]
    assert f"no checkpoint is saved in {workdir}" in ended[1][2]


def test_one_has_a_mistake_and_the_other_tells_of_it(ends: Any) -> None:
    _, ended = ends["broken"]
    assert [status for status, _, _ in ended] == [1, 1], ended
    assert "KeyError" in ended[1][2] and "Traceback" in ended[1][2]
    assert "ended by KeyError: 'a mistake'" in ended[0][2] and "process 1 of 2" in ended[0][2]


def test_what_one_refuses_all_refuse(ends: Any) -> None:
    _, ended = ends["refused"]
    assert [status for status, _, _ in ended] == [2, 2], ended
    assert ended[1][2].splitlines()[-1] == "vdit: that is wrong"
    line = ended[0][2].splitlines()[-1]
    assert "process 1 of 2" in line and line.endswith("refused what it was given: that is wrong")


# --------------------------------------------------------------------------------------------------
# Without processes


class Numbers:
    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: Any) -> dict[str, int]:
        return {"x": int(index)}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shares_are_disjoint_and_complete_and_go_on_in_any_number(count: int) -> None:
    whole = batches(Numbers(), 8, 3, ("x",))
    want = [next(whole) for _ in range(9)]
    shares = [batches(Numbers(), 8, 3, ("x",), process=(i, count)) for i in range(count)]

    def check(batch: int) -> None:
        parts = [next(share) for share in shares]
        assert all(len(part["x"]) == 8 // count for part in parts)
        got = [np.concatenate([part[name] for part in parts]) for name in ("ordinal", "x")]
        order = np.argsort(got[0])
        np.testing.assert_array_equal(got[0][order], want[batch]["ordinal"])
        np.testing.assert_array_equal(got[1][order], want[batch]["x"])

    for batch in range(5):
        check(batch)
    state = shares[-1].get_state()
    assert state == {"next_index": 40} and all(share.get_state() == state for share in shares)
    other = {1: 4, 2: 1, 4: 2}[count]
    shares = [batches(Numbers(), 8, 3, ("x",), process=(i, other)) for i in range(other)]
    for share in shares:
        next(share)
        share.set_state(state)
    count = other
    for batch in range(5, 9):
        check(batch)


def test_a_batch_that_the_processes_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match="batch of 6 on 4 processes; allowed: a multiple of 4"):
        batches(Numbers(), 6, 3, ("x",), process=(0, 4))


@pytest.mark.parametrize(
    "sizes, local, shares",
    [
        ((4, 1, 1, 1), 1, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((2, 2, 2, 1), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((1, 1, 4, 1), 1, [(0, 1)] * 4),
        ((2, 1, 1, 4), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((1, 4, 2, 1), 4, [(0, 2), (1, 2)]),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else None,
)
def test_who_loads_which_rows(
    sizes: tuple[int, ...], local: int, shares: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = int(np.prod(sizes))
    devices = np.empty(count, object)
    devices[:] = [SimpleNamespace(process_index=i // local) for i in range(count)]
    shape = dict(zip(("data", "fsdp", "tensor", "sequence"), sizes, strict=True))
    mesh: Any = SimpleNamespace(devices=devices.reshape(sizes), shape=shape)
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert data_process(mesh) == share


def test_processes_that_share_some_rows_are_refused() -> None:
    owners = np.array([0, 0, 0, 1, 1, 1]).reshape(3, 1, 2, 1)
    devices = np.vectorize(lambda i: SimpleNamespace(process_index=i), otypes=[object])(owners)
    mesh: Any = SimpleNamespace(
        devices=devices, shape={"data": 3, "fsdp": 1, "tensor": 2, "sequence": 1}
    )
    with pytest.raises(UserError, match="the rows of a batch"):
        data_process(mesh)


def test_a_cache_is_the_same_from_one_process_and_from_three(tmp_path: Path) -> None:
    def encode(indices: range) -> Any:
        for index in indices:
            yield {"latent": np.full((1, 2, 2, 3), index, np.float16), "mask": np.ones(4, bool)}

    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert write_cache(whole, "d" * 64, 21, 4, encode)
    wall = threading.Barrier(3)
    asked, written = [0, 0, 0], []

    def one(process: int) -> None:
        def stop() -> bool:
            asked[process] += 1
            return False

        def mine(indices: range) -> Any:
            written.append((process, indices.start))
            return encode(indices)

        def together(what: str) -> None:
            wall.wait()

        write_cache(
            shared, "d" * 64, 21, 4, mine, stop=stop, process=(process, 3), together=together
        )

    threads = [threading.Thread(target=one, args=(process,)) for process in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [2, 2, 2]
    assert sorted(written) == [(0, 0), (0, 12), (1, 4), (1, 16), (2, 8), (2, 20)]
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in shared.iterdir())
    for name in names:
        assert (whole / name).read_bytes() == (shared / name).read_bytes()
    assert [int(Latents(shared)[i]["latent"].max()) for i in range(21)] == list(range(21))


@pytest.mark.parametrize(
    "given, words",
    [
        (("10.0.0.1:1234", None, None), "give all three"),
        ((None, 2, 0), "give all three"),
        (("10.0.0.1", 2, 0), "HOST:PORT"),
        (("10.0.0.1:99999", 2, 0), "HOST:PORT"),
        (("10.0.0.1:1234", 2, 2), "--process=2 --processes=2: 0 to"),
        (("10.0.0.1:1234", 0, 0), "0 to"),
    ],
    ids=str,
)
def test_wrong_flags(given: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        member(*given, {})


def test_what_flags_and_environment_say(tmp_path: Path) -> None:
    assert member("h:1", 2, 1, {}) == Member("h:1", 2, 1)
    assert member(None, None, None, {"JAX_PLATFORMS": "cpu"}) is None
    slurm = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "3"}
    assert member(None, None, None, slurm) == Member()
    assert member(None, 1, None, slurm) is None  # alone, whatever is found
    assert not several({"SLURM_NTASKS": "4", "JAX_PLATFORMS": "cpu"}, tmp_path)  # no srun
    assert several({"OMPI_COMM_WORLD_SIZE": "2"}, tmp_path)
    assert several({"TPU_WORKER_HOSTNAMES": "a,b"}, tmp_path)  # GKE
    assert not several({"TPU_WORKER_HOSTNAMES": "localhost"}, tmp_path)
    assert not several({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, tmp_path)
    assert not several({}, tmp_path)
    (tmp_path / "accel0").touch()  # a TPU VM: JAX asks the machine's metadata
    assert several({}, tmp_path) and not several({"TPU_SKIP_MDS_QUERY": "1"}, tmp_path)
    assert newest_checkpoint(tmp_path) == f"no checkpoint is saved in {tmp_path}"


@pytest.mark.parametrize("heard", [(0, 1), (1,)], ids=["by both", "by one"])
def test_ctrl_c_where_nothing_is_to_be_saved_ends_all_at_once(
    heard: tuple[int, ...], tmp_path: Path
) -> None:
    """Here before the first step: one waits for its batch, the other for the first one."""
    two = begin(tmp_path / "w", 2, "--config.run.lost=12", toy="stuck:1:5")
    signs = tmp_path / "w" / ".processes"
    wait_for(lambda: len(list(signs.glob("*/sign-*"))) == 2 or two[0].poll() is not None)
    for process in heard:
        two[process].send_signal(signal.SIGINT)
    ended = finish(two)
    for process, (status, _, err) in enumerate(ended):
        line = "vdit: stopped; the same command goes on"
        if process not in heard:
            line = "process 1 of 2 .* ended with status 130"
        assert status == (130 if process in heard else 1), ended
        ours = [text for text in err.splitlines() if "vdit: " in text]
        assert len(ours) == 1 and re.search(line, ours[0]), err
        assert "Traceback" not in err and "saving" not in err
    assert not signs.exists() or not list(signs.iterdir())
