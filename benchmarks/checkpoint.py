"""What a checkpoint costs: how long the step loop waits, and bytes per second, against torch.save and against the disk itself.

    python benchmarks/checkpoint.py [--parameters 134515008] [--folder DIR] [--repeats 3]

The state is that of training: fp32 weights and Adam's two moments, of random numbers. All ways take turns; medians count. Every way
ends with the bytes on the disk (fsync), and old files are removed before the next.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from shearling.io.files import remove_tree
from shearling.train.saver import Saver

Tensors = dict[str, torch.Tensor]


def make_state(parameters: int, tensors: int = 100) -> Tensors:
    each = parameters // tensors
    return {f"{kind}/{i}": torch.randn(each) for kind in ("model", "exp_avg", "exp_avg_sq") for i in range(tensors)}


def raw_write(folder: Path, state: Tensors) -> float:
    """The disk itself: the same bytes, written one after the other."""
    began = time.perf_counter()
    with open(folder / "raw", "wb") as file:
        for tensor in state.values():
            file.write(tensor.numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def torch_save(folder: Path, state: Tensors) -> float:
    began = time.perf_counter()
    with open(folder / "state.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def saved_at_once(folder: Path, state: Tensors) -> float:
    with Saver(folder / "steps") as saver:
        saver.save(1, state, {})
    return saver.stall_seconds


def saved_in_background(folder: Path, state: Tensors) -> tuple[float, float]:
    """(seconds until the step loop goes on, seconds until it is published)."""
    began = time.perf_counter()
    with Saver(folder / "steps") as saver:
        saver.save(1, state, {}, background=True)
        stall = saver.stall_seconds
    return stall, time.perf_counter() - began


def step_seconds(seconds: float, work: Callable[[], object]) -> float:
    """Seconds of one turn of `work`, over about `seconds`."""
    began, turns = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        work()
        turns += 1
    return (time.perf_counter() - began) / turns


def slowdown(folder: Path, state: Tensors) -> float:
    """Of matrix products while a checkpoint is written in the background, as a ratio."""
    a = torch.randn(512, 512)

    def work() -> torch.Tensor:
        return a @ a

    alone = step_seconds(2.0, work)
    with Saver(folder / "steps") as saver:
        saver.save(1, state, {}, background=True)
        beside = step_seconds(2.0, work)
    return beside / alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=134_515_008)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if left out")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    state = make_state(options.parameters)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    ways: dict[str, list[float]] = {name: [] for name in ("disk", "torch.save", "shearling", "background", "stall", "slowdown")}
    try:
        for _ in range(options.repeats):
            for name, way in (("disk", raw_write), ("torch.save", torch_save), ("shearling", saved_at_once)):
                ways[name].append(way(folder, state))
                for path in folder.iterdir():
                    remove_tree(path)
            stall, published = saved_in_background(folder, state)
            ways["stall"].append(stall)
            ways["background"].append(published)
            remove_tree(folder / "steps")
            ways["slowdown"].append(slowdown(folder, state))
            remove_tree(folder / "steps")
    finally:
        shutil.rmtree(folder)
    middle = {name: median(values) for name, values in ways.items()}
    print(f"{size:,} bytes: fp32 weights and two moments of {options.parameters:,} parameters; medians of {options.repeats} turns\n")
    print(f"{'way':34s}{'seconds':>10s}{'MB/s':>10s}{'of the disk':>13s}")
    for name, text in (
        ("disk", "the disk itself"),
        ("torch.save", "torch.save, fsync"),
        ("shearling", "checkpoint, hashed and published"),
        ("background", "the same in the background"),
    ):
        print(f"{text:34s}{middle[name]:10.2f}{size / middle[name] / 1e6:10.0f}{middle['disk'] / middle[name]:13.2f}")
    print(f"{'the step loop waits for':34s}{middle['stall']:10.2f}{size / middle['stall'] / 1e6:10.0f}")
    print(f"matrix products beside the writing take {middle['slowdown']:.2f} times as long")
    print(json.dumps({"bytes": size, "seconds": ways}))


if __name__ == "__main__":
    main()
