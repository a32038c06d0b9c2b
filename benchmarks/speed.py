"""Time pruning and distillation against training, dynamic against static loading, and the sheared model against its source, side by side.

    python benchmarks/speed.py --source MODEL [--sequences 8] [--length 128] [--rounds 9]

Every pair is measured in turn, A B A B ..., and the median of the ratios is printed, since machines drift. Peak memory is that of
one process for each kind of step. On a GPU, steps are compiled and model FLOPs utilisation is printed (--peak-flops).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from shearling.data import mixture
from shearling.data.loader import Loader
from shearling.evaluate.speed import measure_speed
from shearling.io.tensors import MemoryReader
from shearling.objectives.config import DistillConfig
from shearling.objectives.distill import Distillation
from shearling.objectives.lm import in_training, token_losses
from shearling.objectives.states import States, add_projectors, start_projectors
from shearling.objectives.teacher import Teacher, take_off_head
from shearling.prune.attach import Attachment
from shearling.prune.config import GateConfig
from shearling.prune.gates import Gates, gate_specs
from shearling.prune.learn import GateLearner
from shearling.prune.plan import plan_from_masks
from shearling.prune.scores import compute
from shearling.prune.transform import transform
from shearling.shapes import Target, target_anatomy, target_config
from shearling.sources import Source, open_source
from shearling.train.config import RuntimeConfig, TrainConfig
from shearling.train.optim import build_optimizer, choose_device, in_precision
from shearling.train.parallel import parallelize
from shearling.train.step import train_step
from shearling.world import World

TARGET = Target(hidden_size=432, num_hidden_layers=24, num_attention_heads=6, num_key_value_heads=3, intermediate_size=1024)
H100_BF16 = 989e12
DISTILLED = {
    "logits": DistillConfig(),
    "64 likeliest logits": DistillConfig(top_k=64),
    "logits and states": DistillConfig(hidden=0.1, blocks=0.1),
}
"""What is learnt from the source in the measurements of distillation."""


class Steps:
    """A source model in training, with and without gates."""

    def __init__(self, source: Source, args: argparse.Namespace) -> None:
        self.device = choose_device(RuntimeConfig())
        gpu = self.device.type == "cuda"
        self.anatomy = source.anatomy
        blocks = self.anatomy.family.anchors.layers
        runtime = RuntimeConfig(compile=gpu)
        model = add_projectors(
            source.load_model(), ("hidden", "blocks"), self.anatomy.sizes["hidden"]
        )  # idle but where states are compared
        self.model = parallelize(model, blocks, runtime, self.device, None).train()
        self.config = TrainConfig(batch_size=args.sequences, microbatches=1, learning_rate=1e-5)
        self.losses = in_precision(token_losses, self.device, RuntimeConfig())
        self.objective = in_training(self.losses)
        self.optimizer = build_optimizer(self.model, self.config)
        self.args, self.number = args, 0

    def ids(self) -> torch.Tensor:
        """Random tokens [R, T]."""
        shape = (self.args.sequences, self.args.length)
        return torch.randint(0, self.anatomy.sizes["vocab"], shape, device=self.device)

    def step(self, gates: GateLearner | None) -> float:
        """Seconds of one step."""
        ids = self.ids()
        self._wait()
        began = time.perf_counter()
        self.number += 1
        train_step(
            self.model,
            ids,
            np.zeros(len(ids), dtype=np.int64),
            self.objective,
            self.optimizer,
            step=self.number,
            microbatches=1,
            clip=1.0,
            rate=1e-5,
            gates=gates,
        )
        self._wait()
        return time.perf_counter() - began

    def learn(self, config: DistillConfig, source: Source) -> None:
        """From the next step on learn from the source."""
        layers, count = self.anatomy.family.anchors.layers, self.anatomy.sizes["layer"]
        teacher = source.load_model(torch.bfloat16).requires_grad_(False)
        head = take_off_head(teacher).to(self.device)
        teacher = parallelize(teacher, layers, RuntimeConfig(compile=self.device.type == "cuda"), self.device, None).eval()
        watched = [States(model, layers, True, range(count)) if config.states else None for model in (self.model, teacher)]
        taught = Teacher(teacher, head, temperature=config.temperature, top_k=config.top_k, states=watched[1])
        start_projectors(self.model, teacher, World())
        self.objective = in_precision(Distillation(config, taught, watched[0], 1), self.device, RuntimeConfig())

    def learner(self) -> tuple[GateLearner, Attachment]:
        """Gates on the model, as the recipes have them."""
        attachment = Attachment(self.model, self.anatomy)
        gates = Gates(gate_specs(self.anatomy, target_anatomy(self.anatomy, TARGET))).to(self.device)
        learner = GateLearner(gates, attachment, GateConfig(), steps=1000, warmup=10, seed=0)
        learner.start_from(compute(dict.fromkeys(gates.specs, "random"), self.model, self.anatomy, gates.specs, self.losses, []))
        return learner, attachment

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def step_times(source: Source, args: argparse.Namespace) -> None:
    """Time of a pruning step over that of a plain one."""
    steps = Steps(source, args)
    plain, gated = [], []
    learner, attachment = steps.learner()
    attachment.remove()
    for round_ in range(args.rounds + 2):
        spent = {}
        for kind in ("plain", "gated") if round_ % 2 else ("gated", "plain"):  # by turns, since a step may leave work to the next
            if kind == "plain":
                spent[kind] = steps.step(None)
                continue
            with Attachment(steps.model, steps.anatomy) as learner.attachment:
                spent[kind] = steps.step(learner)
        if round_ >= 2:  # the first two warm up
            plain.append(spent["plain"])
            gated.append(spent["gated"])
    tokens = args.sequences * args.length
    ratio = statistics.median(b / a for a, b in zip(plain, gated, strict=True))
    print(f"pruning step / training step, time:   {ratio:.3f}   ({tokens} tokens a step)")
    for name, times in (("training", plain), ("pruning", gated)):
        rate = tokens / statistics.median(times)
        line = f"  {name:9s} {rate:10,.0f} tokens/s"
        if steps.device.type == "cuda":
            line += f"   model FLOPs utilisation {6 * source.anatomy.parameters() * rate / args.peak_flops:.1%}"
        print(line)


def distilling_times(source: Source, args: argparse.Namespace) -> None:
    """Time of a step of the source that learns from the source, over one that learns from the text. A forward pass is a third of a step."""
    steps = Steps(source, args)
    objectives = {"training": steps.objective}
    for kind, config in DISTILLED.items():
        steps.learn(config, source)
        objectives[kind] = steps.objective
    times: dict[str, list[float]] = {kind: [] for kind in objectives}
    for round_ in range(args.rounds + 2):
        kinds = list(objectives) if round_ % 2 else list(reversed(objectives))
        for kind in kinds:
            steps.objective = objectives[kind]
            spent = steps.step(None)
            if round_ >= 2:
                times[kind].append(spent)
    for kind in DISTILLED:
        ratio = statistics.median(b / a for a, b in zip(times["training"], times[kind], strict=True))
        print(f"distilling step / training step, time, {kind + ':':24s} {ratio:.3f}")


def peak_memory(args: argparse.Namespace, source: Source) -> None:
    """Peak memory of a process that prunes, or distils, over that of a plain one; of the source's weights only the fp32 ones count."""
    peaks = {}
    for kind in ("training", "pruning", *DISTILLED):
        command = [sys.executable, __file__, "--only", kind, "--source", args.source]
        command += ["--sequences", str(args.sequences), "--length", str(args.length)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[kind] = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
    print(f"pruning step / training step, memory: {peaks['pruning'] / peaks['training']:.3f}")
    weights = 4 * source.anatomy.parameters()
    for kind in DISTILLED:
        ratio = (peaks[kind] - weights) / peaks["training"]
        print(f"(distilling step less the source's weights) / training step, memory, {kind + ':':24s} {ratio:.3f}")
    for kind, peak in peaks.items():
        print(f"  {kind:24s} {peak / 2**30:10.2f} GiB at its peak")


def only(kind: str, source: Source, args: argparse.Namespace) -> None:
    """Three steps of one kind in this process, and its peak memory."""
    steps = Steps(source, args)
    if kind == "pruning":
        learner, _ = steps.learner()
    if kind in DISTILLED:
        steps.learn(DISTILLED[kind], source)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    for _ in range(3):
        steps.step(learner if kind == "pruning" else None)
    gpu = steps.device.type == "cuda"
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = torch.cuda.max_memory_allocated() if gpu else int(status["VmHWM"].split()[0]) * 1024
    print(json.dumps({"peak_bytes": peak}))


def loading_times(source: Source, args: argparse.Namespace) -> None:
    """Time of a training step that loads dynamically over one that loads statically."""
    domains = tuple(f"domain{i}" for i in range(7))
    with tempfile.TemporaryDirectory() as folder:
        shape = (20_000, args.length)
        file = np.lib.format.open_memmap(Path(folder) / "ids.npy", mode="w+", dtype=np.uint16, shape=shape)
        file[:] = np.random.default_rng(0).integers(0, source.anatomy.sizes["vocab"], shape)
        tokens: Any = SimpleNamespace(domains=domains, sequence_length=args.length, sequences=lambda domain, split: file)
        loader = Loader(tokens, args.sequences, 0)
        steps = Steps(source, args)
        rng = np.random.default_rng(0)

        def load(dynamic: bool, state: list[np.ndarray]) -> torch.Tensor:
            weights, cursors = state
            if dynamic:  # an update at every step, where recipes have one in 50 to 400
                losses = rng.random(len(domains))
                weights = mixture.update("paper", weights, losses, losses - 0.1)
            batch = loader.batch(steps.number, weights, cursors)
            state[:] = [weights, batch.cursors]
            return torch.from_numpy(batch.ids).to(steps.device)

        states = {kind: [np.full(7, 1 / 7), loader.start()] for kind in (False, True)}
        times: dict[bool, list[float]] = {False: [], True: []}
        loads: dict[bool, list[float]] = {False: [], True: []}
        for round_ in range(args.rounds + 2):
            for dynamic in (False, True):
                loaded: list[float] = []
                steps.ids = _timed(lambda d=dynamic: load(d, states[d]), loaded)  # type: ignore[method-assign]
                spent = steps.step(None)
                if round_ >= 2:
                    times[dynamic].append(spent + loaded[0])
                    loads[dynamic].append(loaded[0])
    static, dynamic_ = (statistics.median(loads[kind]) for kind in (False, True))
    step = statistics.median(times[False])
    print(f"dynamic / static loading, time of a step: {(step - static + dynamic_) / step:.4f}")
    with_update = f"dynamic with an update at every step {dynamic_ * 1e3:.2f} ms"
    print(f"  loading a batch: static {static * 1e3:.2f} ms, {with_update}, of {step * 1e3:.0f} ms")


def _timed(work: Callable[[], torch.Tensor], seconds: list[float]) -> Callable[[], torch.Tensor]:
    def timed() -> torch.Tensor:
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
        return result

    return timed


def serving_speed(source: Source, args: argparse.Namespace) -> None:
    """Generation and prefill of the target shape against the source. Which units are kept does not bear on speed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    device = choose_device(RuntimeConfig())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = source.load_model(dtype)
    target = target_anatomy(source.anatomy, TARGET)
    gates = Gates(gate_specs(source.anatomy, target))
    plan = plan_from_masks(source.anatomy, target, gates.hardened())
    values = target_config(source.config, source.anatomy, target, plan.layers)
    small = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=dtype)
    reader = MemoryReader(model.state_dict())
    small.load_state_dict(dict(transform(plan, source.anatomy, target, reader)), strict=False)
    small.tie_weights()
    found = measure_speed({"source": model.to(device), "sheared": small.eval().to(device)}, repeats=args.rounds)
    ratio = source.anatomy.parameters() / target.parameters()
    print(f"source / sheared, parameters:         {ratio:.2f}")
    for kind in ("generation", "prefill"):
        a, b = found["source"][kind], found["sheared"][kind]
        print(f"sheared / source, {kind:10s} speed:    {b / a:.2f}   ({b:,.1f} against {a:,.1f} tokens/s)")


def main() -> None:
    """Run every measurement, or one in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak-flops", type=float, default=H100_BF16)
    parser.add_argument("--only", choices=["training", "pruning", *DISTILLED])
    args = parser.parse_args()
    source = open_source(args.source)
    if args.only:
        only(args.only, source, args)
        return
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {choose_device(RuntimeConfig())}")
    step_times(source, args)
    distilling_times(source, args)
    peak_memory(args, source)
    loading_times(source, args)
    serving_speed(source, args)


if __name__ == "__main__":
    main()
