"""docs/scaling.md and the cluster examples say nothing that is not so: flags, fields, commands, schemas, numbers, what slurm.sh does."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer.main
import yaml
from pydantic import BaseModel
from torch.distributed.run import get_args_parser

from shearling import cli
from shearling.arch.families import Anatomy, anatomy_of
from shearling.config import parse
from shearling.planning import training_memory
from shearling.recipe import Recipe, load_recipe
from shearling.shapes import Target, target_anatomy
from shearling.train.config import RuntimeConfig, TrainConfig
from test_recipes import LLAMA2_7B

ROOT = Path(__file__).parents[1]
DOC, SLURM, KUBERNETES = ROOT / "docs" / "scaling.md", ROOT / "examples" / "slurm.sh", ROOT / "examples" / "kubernetes.yaml"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", DOC.read_text(), re.MULTILINE | re.DOTALL)
SLURM_FLAGS = {"--nodes", "--signal"}
"""Flags of sbatch that the document names."""


def blocks(kind: str) -> list[str]:
    return [text for found, text in BLOCKS if found == kind]


def manifests() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(KUBERNETES.read_text())}


def container() -> dict[str, Any]:
    found: dict[str, Any] = manifests()["Job"]["spec"]["template"]["spec"]["containers"][0]
    return found


def scripts() -> dict[str, str]:
    shell = {f"{DOC.name}, block {number}": text for number, text in enumerate(blocks("bash"))}
    return {**shell, SLURM.name: SLURM.read_text(), KUBERNETES.name: container()["args"][0]}


def commands(name: str) -> Iterator[list[str]]:
    """The words of every command `name` in the scripts."""
    for text in scripts().values():
        for line in text.replace("\\\n", " ").splitlines():
            if not line.lstrip().startswith("#"):
                words = shlex.split(line, comments=True)
                if name in words:
                    yield words[words.index(name) + 1 :]


@pytest.mark.parametrize("name", scripts())
def test_the_shell_can_read_it(name: str) -> None:
    subprocess.run(["bash", "-n"], input=scripts()[name], text=True, check=True)


def test_torchrun_knows_every_flag() -> None:
    parser, found = get_args_parser(), list(commands("torchrun"))
    assert len(found) == 4
    for words in found:
        arguments = parser.parse_args(words)
        assert arguments.module and arguments.training_script == "shearling", words
        assert all(word in parser._option_string_actions for word in words[: words.index("shearling")] if word.startswith("-"))
    assert parser.get_default("signals_to_handle") == "SIGTERM,SIGINT,SIGHUP,SIGQUIT"


def test_every_flag_named_in_passing_exists() -> None:
    known = set(get_args_parser()._option_string_actions) | SLURM_FLAGS
    for command in typer.main.get_command(cli.app).commands.values():  # type: ignore[attr-defined]
        known.update(option for parameter in command.params for option in parameter.opts)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", DOC.read_text()))
    assert named - known == set()


def test_shearling_knows_every_command() -> None:
    group: Any = typer.main.get_command(cli.app)
    found = [words for words in commands("shearling") if words]
    assert len(found) == 6
    for name, *words in found:
        group.commands[name].make_context(name, [word.rstrip("&") for word in words if word != "&"])


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")


def test_every_field_named_exists() -> None:
    known = set(fields(Recipe))
    sections = "|".join(name for name in known if f"{name}.steps" in known or name in ("runtime", "data", "evaluate", "mixture", "export"))
    for path in (DOC, SLURM, KUBERNETES):
        named = set(re.findall(rf"(?<![\w./])((?:{sections})\.[a-z_]+(?:\.[a-z_]+)*)", path.read_text()))
        assert named, path
        assert named - known == set(), path


def test_defaults_of_the_runtime() -> None:
    rows = re.findall(r"^\| `runtime\.(\w+)` \| (\S+) \|", DOC.read_text(), re.MULTILINE)
    plain = [(name, value) for name, value in rows if f"`runtime.{name}` | {value} |" in DOC.read_text()]
    assert len(plain) == 5
    for name, value in plain:
        assert RuntimeConfig.model_fields[name].default == json.loads(value), name
    assert RuntimeConfig.model_fields["reshard_after_forward"].default is None


def test_recipes_in_the_document() -> None:
    for text in blocks("yaml"):
        recipe = parse(Recipe, yaml.safe_load(text), DOC.name)
        assert recipe.prune.microbatches % 32 == recipe.train.microbatches % 32 == 0
    assert len(blocks("yaml")) == 1


def test_python_in_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(LLAMA2_7B))
    values = {"source": "./source", "target": {"num_hidden_layers": 24}, "data": {"domains": {"a": "a.jsonl"}}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    monkeypatch.chdir(tmp_path)
    (text,) = blocks("python")
    exec(text, {})
    assert "'low_precision_copy'" in capsys.readouterr().out


def test_what_the_document_points_to() -> None:
    text = DOC.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (DOC.parent / target).exists(), target
    for path in re.findall(r"(?:src|examples|benchmarks)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(shearling(?:\.\w+)+)`", text):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def table(name: str) -> list[list[str]]:
    rows = DOC.read_text().partition(f"<!-- {name} -->\n")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_table_of_memory() -> None:
    """Against what a run itself computes before it begins."""
    source = anatomy_of(LLAMA2_7B)
    rows = {(row[0], row[1]): row[2:] for row in table("memory table")}
    seen = set()
    for size in ("1.3b", "2.7b"):
        recipe = load_recipe(ROOT / "recipes" / f"llama2-7b-to-{size}.yaml", ["prune.microbatches=32", "train.microbatches=256"])
        cut = target_anatomy(source, recipe.target or Target())
        stages = {"prune, to 1.3b or 2.7b": (source, recipe.prune, cut), f"train, {size}": (cut, recipe.train, None)}
        for stage, (anatomy, config, target) in stages.items():
            for again in ("no", "yes"):
                needed = [
                    training_memory(
                        anatomy,
                        config,
                        recipe.data.sequence_length,
                        world_size=processes,
                        activation_checkpointing=again == "yes",
                        target=target,
                    )["total"]
                    for processes in (1, 8, 16, 32)
                ]
                assert rows[stage, again] == [f"{bytes_ / 2**30:.1f}" for bytes_ in needed], (stage, again)
                seen.add((stage, again))
    assert set(rows) == seen


def test_the_table_of_peaks() -> None:
    """Its estimates are what benchmarks/memory.py prints beside its measurements, and its ratios are theirs."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1408}
    source = anatomy_of({**LLAMA2_7B, **sizes, "vocab_size": 8000})
    cut = target_anatomy(source, Target(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6))
    of: dict[str, tuple[Anatomy, Anatomy | None]] = {"prune": (source, cut), "train": (cut, None)}
    config = TrainConfig(steps=3, batch_size=8, microbatches=2, evaluate_every=3)
    rows = table("measured table")
    assert len(rows) == 8
    for stage, again, processes, measured, estimated, ratio in rows:
        anatomy, target = of[stage]
        needed = training_memory(
            anatomy,
            config,
            256,
            world_size=int(processes),
            activation_checkpointing=again == "yes",
            keeps_gathered=int(processes) > 1,
            target=target,
        )["total"]
        assert estimated == f"{needed / 1e6:.0f}", (stage, again, processes)
        of_each = zip(measured.split(", "), ratio.split(", "), strict=True)
        assert all(abs(int(peak) * 1e6 / needed - float(of_it)) < 0.01 for peak, of_it in of_each)


@pytest.mark.parametrize("version", ["1.33", kubernetes_validate.latest_version()])
def test_the_manifest_is_what_kubernetes_takes(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)  # the schemas are in the package
    assert set(manifests()) == {"Service", "PersistentVolumeClaim", "Job"}
    for manifest in manifests().values():
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_wrong_manifest_is_found() -> None:
    job = manifests()["Job"]
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 600
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(job, "1.33", strict=True)


def test_the_parts_of_the_manifest_go_together() -> None:
    service, claim, job = (manifests()[kind] for kind in ("Service", "PersistentVolumeClaim", "Job"))
    spec, pod, shear = job["spec"], job["spec"]["template"]["spec"], container()
    (words,) = [words for words in commands("torchrun") if "$NODES" in words]
    flags = get_args_parser().parse_args(words)
    environment = {entry["name"]: entry["value"] for entry in shear["env"]}
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == service["metadata"]["name"]
    port = service["spec"]["ports"][0]["port"]
    assert flags.rdzv_endpoint == f"{job['metadata']['name']}-0.{service['metadata']['name']}:{port}"
    assert spec["completions"] == spec["parallelism"] == int(environment["NODES"])
    assert int(flags.nproc_per_node) == shear["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["terminationGracePeriodSeconds"] > flags.shutdown_timeout
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in shear["volumeMounts"]}
    assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"


STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node-1\\nnode-2\\n"; else echo "scontrol $*" >> "$LOG"; fi',
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "torchrun": 'echo "torchrun $*" >> "$LOG"; trap \'echo signal >> "$LOG"; sleep 0.3; [ "$CODE" = 137 ] && kill -9 $$; exit 1\' USR1; '
    'echo started >> "$LOG"; for i in $(seq "$TENTHS"); do sleep 0.1; done; exit "$CODE"',
}


@pytest.mark.parametrize(
    ("tenths", "code", "signals", "expected", "requeued"),
    [(0, 0, 0, 0, False), (0, 1, 0, 1, False), (200, 0, 1, 1, True), (200, 0, 2, 1, True), (200, 137, 1, 137, True)],
    ids=["done", "crashed", "stopped", "told to stop twice", "killed while stopping"],
)
def test_slurm_script(tenths: int, code: int, signals: int, expected: int, requeued: bool, tmp_path: Path) -> None:
    """With stand-ins for Slurm and torchrun: it passes one signal on, waits for the end, and asks for a requeue only then."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "TENTHS": str(tenths), "CODE": str(code)}
    environment |= {"SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_JOB_ID": "4242", "SLURM_JOB_NUM_NODES": "2"}
    process = subprocess.Popen(["bash", SLURM, "recipe.yaml", "out"], env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(signals):
            while process.poll() is None and not (log.exists() and "started" in log.read_text()):
                time.sleep(0.02)
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.1)
        assert process.wait(20) == expected
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    lines = log.read_text().splitlines()
    assert "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node-1:24242 --rdzv-id 4242-0" in lines[0]
    assert lines[0].endswith("-m shearling run recipe.yaml --out out")
    assert lines.count("signal") == min(signals, 1)
    assert (lines[-1] == "scontrol requeue 4242") is requeued


def test_slurm_leaves_time_to_save() -> None:
    (words,) = [words for words in commands("torchrun") if "$SLURM_JOB_NUM_NODES" in words]
    flags = get_args_parser().parse_args(words)
    margin = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", SLURM.read_text(), re.MULTILINE)
    assert margin and int(margin[1]) > flags.shutdown_timeout
    assert "SIGUSR1" in flags.signals_to_handle.split(",")
    assert {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"} < set(flags.signals_to_handle.split(","))
