"""Files from others: no pickle is opened, in any directory that is read; and prepared text of earlier versions is read.

Every payload makes a directory, the sentinel, when it is unpickled; a child process shows first that it would.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shearling
from faults import Bomb
from shearling.config import override, parse
from shearling.data.config import DataConfig
from shearling.data.origins import find_origins, survey
from shearling.data.reference import read_points
from shearling.data.tokens import open_tokens
from shearling.errors import ArtifactError, ConfigError, DataError, ProblemsError
from shearling.io.loading import load_stock
from shearling.io.tensors import TensorReader
from shearling.prune.plan import load_plan
from shearling.recipe import load_recipe
from shearling.sources import Source, open_source
from shearling.train import checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
STEP = 4
"""Of the checkpoint among the fixtures."""


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Path]:
    """The path that no test may find after it."""
    path = tmp_path / "sentinel"
    yield path
    assert not path.exists(), "a payload was run"


@pytest.fixture
def payloads(sentinel: Path, tmp_path: Path) -> dict[str, bytes]:
    """One payload for every kind of file that can hold a pickle: by kind, the bytes."""
    bomb, folder = Bomb(sentinel), tmp_path / "payloads"
    folder.mkdir()
    torch.save({"weight": bomb}, folder / "zip.pt")
    torch.save({"weight": bomb}, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    np.save(folder / "array.npy", np.array([bomb], dtype=object), allow_pickle=True)
    np.savez(folder / "arrays.npz", a=np.array([bomb], dtype=object))
    found = {path.suffix[1:]: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    return found | {"metadata": pickle.dumps(bomb), "pkl": pickle.dumps(bomb, protocol=0)}


def dcp_directory(folder: Path, payloads: dict[str, bytes]) -> Path:
    """Laid out as torch's distributed checkpoints are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".metadata").write_bytes(payloads["metadata"])
    (folder / "__0_0.distcp").write_bytes(payloads["pt"])
    return folder


def litter(folder: Path, payloads: dict[str, bytes]) -> list[Path]:
    """Leave a payload under every name that some program would open."""
    names = {
        "bin": ("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "tf_model.bin"),
        "pt": ("model.pt", "optimizer.pt", "scheduler.pt", "consolidated.00.pth", "rng_state.pth", "last.ckpt", "__0_0.distcp"),
        "metadata": (".metadata", "tokenizer.pickle", "vocab.pkl"),
        "npy": ("rope.npy", "tokens.npy"),
        "npz": ("arrays.npz",),
    }
    paths = [folder / name for name in (name for group in names.values() for name in group)]
    for kind, group in names.items():
        for name in group:
            (folder / name).write_bytes(payloads[kind])
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return paths


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "data-2", tmp_path / "data"))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "checkpoint-1", tmp_path / "checkpoints"))


def refused(error: type[ProblemsError], use: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        use(*arguments, **options)
    assert caught.value.exit_code == (2 if error is ConfigError else 3)
    return str(caught.value)


def every_way_to_the_weights(directory: Path) -> list[str]:
    """The messages with which sources and stock loading refuse a directory."""
    uses = (Source.check, Source.load_model, Source.reader)
    messages = [refused(ArtifactError, lambda use=use: use(open_source(directory))) for use in uses]
    return [*messages, refused(ArtifactError, load_stock, directory, torch.float32, "pruned")]


def test_the_payloads_work(payloads: dict[str, bytes], sentinel: Path, tmp_path: Path) -> None:
    """Opened as their kind is opened by those who trust it, each makes the sentinel."""
    for kind, data in payloads.items():
        (tmp_path / f"x.{kind}").write_bytes(data)
    directory = dcp_directory(tmp_path / "dcp", payloads)

    def read_metadata() -> None:
        from torch.distributed.checkpoint import FileSystemReader

        FileSystemReader(directory).read_metadata()

    openers: dict[str, Callable[[], Any]] = {
        "pt": lambda: torch.load(tmp_path / "x.pt", weights_only=False),
        "bin": lambda: torch.load(tmp_path / "x.bin", weights_only=False),
        "npy": lambda: np.load(tmp_path / "x.npy", allow_pickle=True),
        "npz": lambda: np.load(tmp_path / "x.npz", allow_pickle=True)["a"],
        "metadata": read_metadata,
        "pkl": lambda: pickle.loads((tmp_path / "x.pkl").read_bytes()),
    }
    assert openers.keys() == payloads.keys()
    for kind, opener in openers.items():
        pid = os.fork()
        if pid == 0:
            try:
                opener()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert sentinel.is_dir(), kind
        sentinel.rmdir()


def test_pickled_weights_are_no_weights(source: Path, payloads: dict[str, bytes], sentinel: Path) -> None:
    """Alone in a directory, under any name, and as a distributed checkpoint."""
    (source / "model.safetensors").unlink()
    assert all("no model.safetensors" in message for message in every_way_to_the_weights(source)[:3])
    for kind, name in (("bin", "pytorch_model.bin"), ("pt", "model.pt"), ("pt", "consolidated.00.pth"), ("npz", "weights.npz")):
        (source / name).write_bytes(payloads[kind])
        messages = every_way_to_the_weights(source)
        assert all(name in message and "pickled" in message for message in messages[:3])
        (source / name).unlink()
    messages = every_way_to_the_weights(dcp_directory(source, payloads))
    assert all(".metadata" in message and "DCP" in message for message in messages[:3])
    litter(source, payloads)
    every_way_to_the_weights(source)


def test_an_index_of_pickles(source: Path, good_source: Path, payloads: dict[str, bytes], sentinel: Path) -> None:
    """Which transformers would follow."""
    (source / "model.safetensors").unlink()
    for name, kind in (("pytorch_model.bin", "bin"), ("model.pt", "pt"), ("a.safetensors", "bin"), ("b.safetensors", "pt")):
        (source / name).write_bytes(payloads[kind])
        weight_map = dict.fromkeys(TensorReader(good_source).names(), name)
        (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        assert all(name in message for message in every_way_to_the_weights(source))


def test_pickles_beside_sound_files_are_let_be(
    source: Path, data: Path, checkpoints: Path, payloads: dict[str, bytes], sentinel: Path, tmp_path: Path
) -> None:
    """In every directory that is read; and they are not copied on."""
    for folder in (source, data, checkpoints, checkpoints / f"step-{STEP:08d}"):
        litter(folder, payloads)
    (source / "adapter_model.bin").unlink()
    opened, out = open_source(source), tmp_path / "out"
    out.mkdir()
    opened.save_companions(out)
    assert opened.load_model() and opened.reader() and len(opened.tokenizer()) == 96 and load_stock(source, torch.float32, "pruned")
    assert not [path.name for path in out.iterdir() if path.suffix not in (".json", ".jinja")]
    assert open_tokens(data).domains == ("web", "code")
    assert checkpoint.load(checkpoints) and checkpoint.load(checkpoints, STEP)


@pytest.mark.parametrize("kind", ["bin", "pt", "npy", "npz", "metadata", "pkl"])
def test_pickles_under_the_names_of_sound_files(
    source: Path, data: Path, checkpoints: Path, payloads: dict[str, bytes], sentinel: Path, tmp_path: Path, kind: str
) -> None:
    payload, step = payloads[kind], checkpoints / f"step-{STEP:08d}"

    def replaced(path: Path, error: type[ProblemsError], use: Callable[..., Any], *arguments: Any) -> None:
        whole = path.read_bytes() if path.exists() else None
        path.write_bytes(payload)
        refused(error, use, *arguments)
        if whole is None:
            path.unlink()
        else:
            path.write_bytes(whole)

    for name in ("config.json", "model.safetensors"):
        replaced(source / name, ArtifactError, lambda: open_source(source).load_model())
        replaced(source / name, ArtifactError, load_stock, source, torch.float32, "pruned")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        replaced(source / name, ArtifactError, lambda: open_source(source).tokenizer())
    for name in ("manifest.json", "web.train.00000.bin", "code.heldout.00000.bin"):
        replaced(data / name, ArtifactError, open_tokens, data)
    open_tokens(data)  # enters what it verified in a file of its own
    for path in data.glob(".*"):
        path.write_bytes(payload)
    assert open_tokens(data).domains == ("web", "code")
    for path in sorted(step.iterdir()):
        replaced(path, ArtifactError, checkpoint.load, checkpoints, STEP)
    for name in ("plan.json", "model.json", "model.gguf"):
        use: Callable[..., Any] = load_plan if name == "plan.json" else open_source
        replaced(tmp_path / name, ArtifactError, use, tmp_path / name)
    replaced(tmp_path / "recipe.yaml", ConfigError, load_recipe, tmp_path / "recipe.yaml")
    replaced(tmp_path / "points.csv", DataError, read_points, tmp_path / "points.csv")
    for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", f"a.{kind}"):
        domains = {"a": str(tmp_path / name)}
        replaced(tmp_path / name, DataError, lambda domains=domains: survey(find_origins(parse(DataConfig, {"domains": domains}))))


def test_a_distributed_checkpoint_is_no_checkpoint(checkpoints: Path, payloads: dict[str, bytes], sentinel: Path, tmp_path: Path) -> None:
    """Newer than a whole one it is passed over, alone or asked for it is refused."""
    dcp_directory(checkpoints / "step-00000009", payloads)
    assert "manifest.json" in refused(ArtifactError, checkpoint.load, checkpoints, 9)
    with pytest.warns(UserWarning, match="passed over"):
        found = checkpoint.load(checkpoints)
    assert found is not None and found.step == STEP
    dcp_directory(tmp_path / "alone" / "step-00000009", payloads)
    with pytest.warns(UserWarning, match="passed over"):
        assert "no checkpoint is whole" in refused(ArtifactError, checkpoint.load, tmp_path / "alone")


def signed(step: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a checkpoint's manifest and sign it again, as one who wants to deceive would."""
    path = step / "manifest.json"
    values = json.loads(path.read_text().partition("\n")[2])
    change(values["files"])
    body = json.dumps(values)
    path.write_text(hashlib.sha256(body.encode()).hexdigest() + "\n" + body)


def told(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("kind", ["pt", "npy", "metadata"])
def test_pickles_that_a_manifest_vouches_for(data: Path, checkpoints: Path, payloads: dict[str, bytes], sentinel: Path, kind: str) -> None:
    """With the right size and hash: token shards are read as plain numbers, and of a checkpoint only tensors and JSON are."""
    rows = payloads[kind] + b"\0" * (-len(payloads[kind]) % 16)
    (data / "web.train.00000.bin").write_bytes(rows)
    manifest = json.loads((data / "manifest.json").read_text())
    facts, number = manifest["domains"]["web"], len(rows) // 16
    facts["shards"]["train"][0] |= {"sha256": hashlib.sha256(rows).hexdigest(), "sequences": number}
    facts["train_sequences"] = number
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert open_tokens(data).sequences("web", "train")[:].tobytes() == rows
    (data / "manifest.json").write_text(json.dumps(manifest | {"dtype": "|O"}))
    refused(ArtifactError, open_tokens, data)
    step = checkpoints / f"step-{STEP:08d}"
    (step / "optimizer.pt").write_bytes(payloads[kind])
    signed(step, lambda files: files.update({"optimizer.pt": told(payloads[kind])}))
    assert checkpoint.load(checkpoints, STEP) is not None
    (step / "state.json").write_bytes(payloads[kind])
    signed(step, lambda files: files.update({"state.json": told(payloads[kind])}))
    refused(ArtifactError, checkpoint.load, checkpoints, STEP)


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "object:os.mkdir", "name:os.mkdir", "module:os"])
def test_yaml_that_would_call_something(tag: str, sentinel: Path, tmp_path: Path) -> None:
    path, text = tmp_path / "recipe.yaml", f"!!python/{tag} [{sentinel}]"
    for recipe in (text, f"source: {text}\n", f"? {text}\n: 1\n"):
        path.write_text(recipe)
        refused(ConfigError, load_recipe, path)
    refused(ConfigError, override, {}, [f"source={text}"])


PICKLING = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile", "zipfile")
UNSAFE = ("torch.load", "np.load", "numpy.load", "pd.read_pickle", "shutil.unpack_archive", "eval", "exec")
OBJECTS = ("gather_object", "all_gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list", "recv_object_list")


def test_nothing_in_the_package_unpickles_or_unpacks() -> None:
    """Nor sends objects between processes, which torch does by pickle."""
    for path in Path(shearling.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {name.partition(".")[0] for name in names} & set(PICKLING), path
                assert not any(name.startswith("torch.distributed.checkpoint") for name in names), path
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in UNSAFE and called.rpartition(".")[2] not in OBJECTS, f"{path}: {called}"
                if called == "yaml.load":
                    assert any(keyword.arg == "Loader" and "UniqueKeyLoader" in ast.unparse(keyword.value) for keyword in node.keywords)


def test_prepared_text_of_format_1(tmp_path: Path) -> None:
    """The folder that the first version wrote is refused: its shards are not those of today."""
    message = refused(ArtifactError, open_tokens, Path(shutil.copytree(FIXTURES / "data-1", tmp_path / "old")))
    assert "format: found 1" in message and "reads format 2" in message and "prepare the data again" in message


def test_prepared_text_of_format_2(data: Path) -> None:
    """The folder that the first version of this format wrote is read, every row of it."""
    tokens = open_tokens(data)
    rows = {(domain, split): tokens.sequences(domain, split)[:].tolist() for domain in tokens.domains for split in ("train", "heldout")}
    assert rows == {
        ("web", "train"): [[0, 3, 4, 5, 6, 7, 8, 9], [10, 1, 0, 10, 11, 12, 13, 14], [15, 16, 17, 18, 1, 0, 17, 18]],
        ("web", "heldout"): [[11, 1, 19, 1, 27, 1, 35, 1]],
        ("code", "train"): [[0, 40, 41, 42, 43, 44, 45, 46], [47, 1, 0, 47, 48, 49, 50, 51], [52, 53, 54, 55, 1, 0, 54, 55]],
        ("code", "heldout"): [[48, 1, 56, 1, 64, 1, 72, 1]],
    }
    assert tokens.domains == ("web", "code") and (tokens.sequence_length, tokens.vocab_size, tokens.document_end) == (8, 96, 1)
    facts = tokens.manifest["domains"]["web"]
    counts = {"documents": 3, "heldout_documents": 4, "duplicate_documents": 0, "overlapping_documents": 0, "tokens": 32, "bytes": 181}
    assert facts.items() >= counts.items()
    (note,) = facts["notes"]
    assert note == "web: 24 documents are too few to hold out whole ones, so the last part of each, at most a tenth, is held out."
    assert tokens.manifest["fingerprint"] == "d8b13477e6b34965e05dad6e6dbe7767fa575f32c0258e6a22a626eefb629fa0"
    assert tokens.manifest["settings"]["seed"] == 17


@pytest.mark.parametrize("version", [3, 17])
def test_prepared_text_of_a_newer_version_is_refused_naming_both(data: Path, version: int) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"format": version}))
    message = refused(ArtifactError, open_tokens, data)
    assert str(version) in message and "reads format 2" in message
