"""Kill whole runs at random moments, run them again until they are done, and compare the results: `make soak`.

    python tests/soak.py [--kills 100] [--minutes 30] [--seed N] [--processes 1]

Every trial is one run of a small recipe, from text to the report, whose process group is killed (SIGKILL) at a uniformly random time, and
again and again when the same command is run; after a few kills it is left to end. Its result must have the SHA-256 of the uninterrupted
run's: `model/`, `pruned/`, `plan.json`, and the log without its times. Seeds are printed, so that a failure can be had again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from models import save_tiny_source
from runs import contents, metrics, recipe_values, write_text

KILLS_OF_A_TRIAL = 5


def digest(out: Path) -> str:
    hashed = hashlib.sha256()
    for name in ("model", "pruned"):
        for file, data in contents(out / name).items():
            hashed.update(f"{name}/{file}".encode() + data)
    hashed.update((out / "plan.json").read_bytes())
    hashed.update(json.dumps(metrics(out), sort_keys=True).encode())
    return hashed.hexdigest()


class Runs:
    """Starts one recipe again and again."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder = folder
        save_tiny_source(folder / "source", "llama")
        fit = {"microbatches": 2, "steps": 20}
        values = recipe_values(folder / "source", write_text(folder, 2000), prune={**fit, "gates": {"calibration_sequences": 4}}, train=fit)
        values["runtime"] |= {"save_every": 2}
        (folder / "recipe.json").write_text(json.dumps(values))
        launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        self._command = [sys.executable, *launcher, "-m", "shearling", "run", str(folder / "recipe.json"), "--out"]

    def start(self, out: Path) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.folder / "output.txt").open("wb") as output:
            return subprocess.Popen(
                [*self._command, str(out)], stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def finish(self, out: Path) -> float:
        """Run to the end; returns the seconds it took."""
        began = time.monotonic()
        code = self.start(out).wait()
        assert code == 0, f"exit code {code}\n{(self.folder / 'output.txt').read_text()}"
        return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    rng, end = random.Random(options.seed), time.monotonic() + 60 * options.minutes
    print(f"seed {options.seed}, {options.processes} processes", flush=True)
    runs = Runs(folder, options.processes)
    whole = runs.finish(folder / "whole")
    expected = digest(folder / "whole")
    print(f"uninterrupted: {whole:.1f} s, sha256 {expected}", flush=True)
    kills = trials = 0
    while kills < options.kills and time.monotonic() < end:
        out, moments = folder / f"trial-{trials}", []
        for _ in range(KILLS_OF_A_TRIAL):
            process, moment = runs.start(out), rng.uniform(0.0, whole)
            try:
                code = process.wait(moment)
                assert code == 0, f"exit code {code}\n{(folder / 'output.txt').read_text()}"
                break  # done before its time
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
                moments.append(round(moment, 2))
        runs.finish(out)
        found = digest(out)
        print(f"trial {trials}: killed after {moments} s; {kills} kills so far; {'same' if found == expected else found}", flush=True)
        assert found == expected, f"seed {options.seed}, trial {trials}: another result; see {out}"
        leftovers = [str(path) for path in out.rglob("*") if path.name.startswith((".tmp-", ".aside-"))]
        assert not leftovers, leftovers
        shutil.rmtree(out)
        trials += 1
    shutil.rmtree(folder)
    print(f"{kills} kills in {trials} trials, every result the same")
    if kills < options.kills:
        sys.exit(f"only {kills} of {options.kills} kills in {options.minutes} minutes")


if __name__ == "__main__":
    main()
