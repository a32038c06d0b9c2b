"""One run on two processes: the same result as on one, through kills, signals, poison, and failures of one process alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models import save_tiny_source
from ranks import Ranks, within
from runs import command, contents, metrics, recipe_values, write_text

FIT = {"microbatches": 2, "evaluate_every": 5}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    save_tiny_source(folder / "source", "llama")
    # In fp32 for the bits: bf16 would hide small differences.
    changes = {"prune": {**FIT, "gates": {"calibration_sequences": 6}}, "train": FIT}
    values = recipe_values(folder / "source", write_text(folder), **changes, runtime={"precision": "float32", "save_every": 4})
    values["evaluate"] = {"batch_size": 3, "speed": False}
    (folder / "recipe.yaml").write_text(json.dumps(values))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one process that all others must equal."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert command(run(recipe, out), out.parent / "stderr") == 0, (out.parent / "stderr").read_text()
    return out


def run(recipe: Path, out: Path, *more: str) -> list[str]:
    return ["run", str(recipe), "--out", str(out), *more]


def same_bits(one: Path, other: Path) -> None:
    for name in ("model", "pruned"):
        assert contents(one / name) == contents(other / name), name
    assert (one / "plan.json").read_bytes() == (other / "plan.json").read_bytes()
    assert metrics(one) == metrics(other)


def checkpoints(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out / "checkpoints")) for path in (out / "checkpoints").glob("*/*"))


def at_step(stage_step: int, act: Callable[[], None], microbatch: int | None = None) -> None:
    """In this process, do something just before a step of pruning; counted over the passes of the process' own microbatches."""
    from shearling.train import loop

    original, seen = loop.train_step, [0]

    def train_step(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == stage_step:
            act()
        return original(*args, **kwargs)

    loop.train_step = train_step  # type: ignore[assignment]


def kill_rank_1_at_step_6(rank: int) -> None:
    if rank == 1:
        at_step(6, lambda: os.kill(os.getpid(), signal.SIGKILL))


def stall_rank_1_at_step_3(rank: int) -> None:
    def stalls() -> None:
        time.sleep(3600)

    if rank == 1:
        at_step(3, stalls)


def signal_rank_1_at_step_7(rank: int) -> None:
    if rank == 1:
        at_step(7, lambda: os.kill(os.getpid(), signal.SIGUSR1))


def signal_rank_1_while_preparing(rank: int) -> None:
    """Process 0 waits for the other to have passed its signal on, as it would in hours of preparing."""
    from shearling import stages

    if rank == 1:
        original = stages.prepare_data

        def prepare_data(context: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return original(context)

        stages.prepare_data = prepare_data
    else:
        from shearling.data.pack import Progress

        tokenise = stages.prepare

        def prepare(*args: Any, progress: Callable[[Progress], None], **kwargs: Any) -> Any:
            end = time.monotonic() + 20
            while time.monotonic() < end:
                progress(Progress("a", 0, 0, 0.0, 0.0, None, None))
                time.sleep(0.05)
            return tokenise(*args, progress=progress, **kwargs)

        stages.prepare = prepare  # type: ignore[assignment]


def signal_rank_1_in_an_evaluation(rank: int) -> None:
    """The third of a run: that of the source, that after step 5, that after step 10; once a first batch has been evaluated."""
    from shearling import stages

    if rank == 1:
        original, seen = stages.heldout_losses, [0]

        def heldout_losses(*args: Any, between: Callable[[], None], **kwargs: Any) -> Any:
            seen[0] += 1
            batches = [0]

            def signalled() -> None:
                batches[0] += 1
                if (seen[0], batches[0]) == (3, 2):
                    os.kill(os.getpid(), signal.SIGTERM)
                between()

            return original(*args, between=signalled, **kwargs)

        stages.heldout_losses = heldout_losses  # type: ignore[assignment]


def poison(rank: int, steps: range) -> None:
    """A loss that is not a number in process 1's microbatch of these steps; what was there before and after must be the same bits."""
    from shearling.train import loop

    original, seen = loop.train_step, [0]

    def everything(model: Any, optimizer: Any, gates: Any) -> list[torch.Tensor]:
        state = [value for entry in optimizer.state.values() for value in entry.values()]
        local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in (*model.parameters(), *state)]
        return [tensor.detach().clone() for tensor in (*local, *(gates.tensors().values() if gates else ()))]

    def train_step(model: Any, ids: Any, domains: Any, objective: Any, optimizer: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] not in steps:
            return original(model, ids, domains, objective, optimizer, **kwargs)

        def poisoned(*args: Any) -> torch.Tensor:
            return {name: value * (float("nan") if rank == 1 else 1.0) for name, value in objective(*args).items()}

        before = everything(model, optimizer, kwargs["gates"])
        result = original(model, ids, domains, poisoned, optimizer, **kwargs)
        after = everything(model, optimizer, kwargs["gates"])
        assert result.skipped and all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "poison came through"
        return result

    loop.train_step = train_step  # type: ignore[assignment]


def poison_two_steps(rank: int) -> None:
    poison(rank, range(3, 5))


def poison_three_steps(rank: int) -> None:
    poison(rank, range(6, 9))


def fail_rank_0_when_publishing(rank: int) -> None:
    from shearling import pruning
    from shearling.io.files import storage_errors

    if rank == 0:

        def publish_model(*args: Any, **kwargs: Any) -> Any:
            with storage_errors("pruned"):
                raise OSError(28, "No space left on device")

        pruning.publish_model = publish_model  # type: ignore[assignment]


def fail_rank_1_when_loading(rank: int) -> None:
    from shearling import stages
    from shearling.errors import ArtifactError, Problem

    if rank == 1:

        def parallelize(*args: Any, **kwargs: Any) -> Any:
            raise ArtifactError("source: weights that are not finite", [Problem("w", "NaN", "Get the model again.")])

        stages.parallelize = parallelize


def a_bug_in_rank_1(rank: int) -> None:
    if rank == 1:

        def bug() -> None:
            raise TypeError("a bug")

        at_step(2, bug)


def test_two_processes_give_what_one_gives(recipe: Path, alone: Path, tmp_path: Path) -> None:
    ranks = Ranks(run(recipe, tmp_path / "run"), tmp_path / "output")
    assert ranks.codes() == [0, 0], ranks.text()
    same_bits(tmp_path / "run", alone)
    assert ranks.output(1).read_text().strip() == ""  # what is said is said once
    files = {path.name for path in (tmp_path / "run" / "checkpoints" / "prune" / "step-00000012").iterdir()}
    assert files == {"manifest.json", "state.json", "rank-00000.safetensors", "rank-00001.safetensors"}


def test_one_then_two_then_one(recipe: Path, alone: Path, tmp_path: Path) -> None:
    out, stderr = tmp_path / "run", tmp_path / "stderr"
    assert command(run(recipe, out), stderr, ("prune", 6)) == 75, stderr.read_text()
    ranks = Ranks(run(recipe, out), tmp_path / "output", moments={0: (("train", 3), signal.SIGTERM)})
    assert ranks.codes() == [75, 75], ranks.text()
    assert "train/step-00000003" in checkpoints(out)
    assert command(run(recipe, out), stderr) == 0, stderr.read_text()
    same_bits(out, alone)


def test_what_an_earlier_try_left_on_the_board_is_not_read(tmp_path: Path) -> None:
    """As torchrun leaves it when it starts its processes again: one store, with all that was posted in it."""
    import threading
    from datetime import timedelta

    from torch.distributed import TCPStore

    from shearling.board import session_name

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    names: list[list[str]] = []
    for _ in range(3):
        found = ["", "", ""]

        def join(rank: int, found: list[str] = found) -> None:
            own = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20))
            found[rank] = session_name(own, rank, 3, 20)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        names.append(found)
    assert all(len(set(found)) == 1 and found[0] for found in names) and len({found[0] for found in names}) == 3


def test_processes_that_do_not_divide_the_microbatches(recipe: Path, tmp_path: Path) -> None:
    """Refused before anything is loaded or made."""
    with within(30):
        ranks = Ranks(run(recipe, tmp_path / "run", "--set", "train.microbatches=1"), tmp_path / "output", inject="test_ranks:no_model")
        assert ranks.codes() == [2, 2], ranks.text()
    assert "train.microbatches: found 1" in ranks.output(0).read_text()
    assert not (tmp_path / "run").exists()


def no_model(rank: int) -> None:
    from shearling.sources import Source

    def load_model(self: Source, *args: Any) -> Any:
        raise AssertionError("a model was loaded")

    Source.load_model = load_model  # type: ignore[method-assign]


def test_a_killed_process_ends_the_other(recipe: Path, alone: Path, tmp_path: Path) -> None:
    with within(60):
        ranks = Ranks(run(recipe, tmp_path / "run"), tmp_path / "output", inject="test_ranks:kill_rank_1_at_step_6")
        first, second = ranks.codes(60)
    assert second == -signal.SIGKILL and first == 1, ranks.text()
    assert "another process of this run" in ranks.output(0).read_text() and "same command" in ranks.output(0).read_text()
    assert checkpoints(tmp_path / "run") == ["prune/step-00000004"]
    ranks = Ranks(run(recipe, tmp_path / "run"), tmp_path / "output")
    assert ranks.codes() == [0, 0], ranks.text()
    same_bits(tmp_path / "run", alone)


@pytest.mark.parametrize(
    ("inject", "newest"),
    [
        ("signal_rank_1_while_preparing", None),
        ("signal_rank_1_at_step_7", "prune/step-00000007"),
        ("signal_rank_1_in_an_evaluation", "prune/step-00000010"),
    ],
)
def test_a_signal_to_one_process_stops_all(inject: str, newest: str | None, recipe: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ranks = Ranks(run(recipe, out, "--set", "runtime.save_every=100"), tmp_path / "output", inject=f"test_ranks:{inject}")
    assert ranks.codes(60) == [75, 75], ranks.text()
    assert "same command" in ranks.output(0).read_text() and ranks.output(1).read_text().strip() == ""  # said once
    assert checkpoints(out) == ([newest] if newest else [])
    ranks = Ranks(run(recipe, out), tmp_path / "output")
    assert ranks.codes() == [0, 0], ranks.text()
    same_bits(out, alone)


def test_poison_in_one_process_reaches_nothing(recipe: Path, tmp_path: Path) -> None:
    ranks = Ranks(run(recipe, tmp_path / "run"), tmp_path / "output", inject="test_ranks:poison_two_steps")
    assert ranks.codes() == [0, 0], ranks.text()
    skipped = [line for line in metrics(tmp_path / "run") if "skipped" in line]
    assert [(line["stage"], line["step"]) for line in skipped] == [("prune", 3), ("prune", 4)]
    assert all("nan" in line["skipped"] and line["samples"] for line in skipped)


def test_too_much_poison_ends_all(recipe: Path, tmp_path: Path) -> None:
    ranks = Ranks(run(recipe, tmp_path / "run"), tmp_path / "output", inject="test_ranks:poison_three_steps")
    assert ranks.codes() == [4, 4], ranks.text()
    assert "3 steps in a row" in ranks.output(0).read_text() and "step-00000004" in ranks.output(0).read_text()
    assert checkpoints(tmp_path / "run")[0] == "prune/step-00000004"


@pytest.mark.parametrize(("inject", "code"), [("fail_rank_0_when_publishing", 6), ("fail_rank_1_when_loading", 3)])
def test_a_failure_of_one_process_is_that_of_all(inject: str, code: int, recipe: Path, tmp_path: Path) -> None:
    with within(30):
        ranks = Ranks(run(recipe, tmp_path / "run"), tmp_path / "output", inject=f"test_ranks:{inject}")
        assert ranks.codes(30) == [code, code], ranks.text()
    assert ranks.output(0).read_text().count("error:") == 1 and "error:" not in ranks.output(1).read_text()


def test_an_output_in_use_or_of_something_else(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with within(30):
        ranks = Ranks(run(recipe, tmp_path / "run"), tmp_path / "output", inject="test_ranks:no_model")
        assert ranks.codes(30) == [5, 5], ranks.text()
    assert contents(tmp_path / "run") == {"thesis.tex": b"mine"}


def test_a_bug_in_one_process_ends_the_other(recipe: Path, tmp_path: Path) -> None:
    with within(60):
        ranks = Ranks(run(recipe, tmp_path / "run"), tmp_path / "output", inject="test_ranks:a_bug_in_rank_1")
        assert ranks.codes(60) == [1, 1], ranks.text()
    assert "TypeError: a bug" in ranks.output(1).read_text()


def test_a_stalled_process_says_where_it_stands(recipe: Path, tmp_path: Path) -> None:
    with within(60):
        ranks = Ranks(
            run(recipe, tmp_path / "run", "--set", "runtime.timeout=5"), tmp_path / "output", inject="test_ranks:stall_rank_1_at_step_3"
        )
        codes = ranks.codes(60)
    assert all(code not in (0, 75) for code in codes), ranks.text()
    assert re.search(r"^Timeout .*in stalls$", ranks.output(1).read_text(), re.DOTALL | re.MULTILINE), ranks.text()


def torchrun(recipe: Path, out: Path, output: Path, *flags: str) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *flags, "-m", "shearling"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with output.open("wb") as file:
        return subprocess.Popen([*launcher, *run(recipe, out)], stdout=file, stderr=subprocess.STDOUT, env=environment)


def wait_for(found: Callable[[], bool], process: subprocess.Popen[bytes], output: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None and time.monotonic() < end, output.read_text()
        time.sleep(0.02)


def test_torchrun(recipe: Path, alone: Path, tmp_path: Path) -> None:
    """SIGTERM to the launcher, then SIGKILL to one of its processes, then to the end."""
    out, output = tmp_path / "run", tmp_path / "output.txt"
    log = out / "metrics.jsonl"

    def steps(count: int) -> Callable[[], bool]:
        return lambda: log.exists() and len(log.read_text().splitlines()) > count

    process = torchrun(recipe, out, output)
    wait_for(steps(2), process, output)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    assert "same command" in output.read_text(), output.read_text()
    assert len(checkpoints(out)) == 1

    process = torchrun(recipe, out, output)
    wait_for(steps(len(log.read_text().splitlines()) + 2), process, output)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    with within(60):
        assert process.wait(60) != 0
    assert not any(path.name.endswith(".safetensors") for path in (out / "checkpoints").glob("*/.tmp-*/*/*"))

    process = torchrun(recipe, out, output)
    assert process.wait(120) == 0, output.read_text()
    same_bits(out, alone)
    shutil.rmtree(out)
