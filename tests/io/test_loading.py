"""Stock loading: what transformers would load in place of the weights that we check, or fetch and run, is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shearling.errors import ArtifactError
from shearling.io.loading import NOT_OURS, load_stock
from shearling.sources import open_source


def configure(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def shard(directory: Path) -> None:
    """Other weights under the name of a distributed checkpoint's shard: transformers takes it first."""
    tensors = {name: tensor * 2 for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "shard-00001-model-00001-of-00001.safetensors")


DETOURS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a distributed checkpoint": (shard, "shard-00001-model-00001-of-00001.safetensors"),
    "weights of another name": (lambda folder: configure(folder, transformers_weights="other.safetensors"), "transformers_weights"),
    "weights of no name": (lambda folder: configure(folder, transformers_weights=["x"] * 1000), "transformers_weights"),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter_config.json"),
    "a kernel": (lambda folder: configure(folder, attn_implementation="someone/kernel"), "attn_implementation"),
    "a kernel, set inside": (lambda folder: configure(folder, _attn_implementation="someone/kernel:fn"), "_attn_implementation"),
    "kernels by part": (lambda folder: configure(folder, _attn_implementation={"": "someone/kernel"}), "_attn_implementation"),
    "a kernel for want of a package": (lambda folder: configure(folder, attn_implementation="flash_attention_2"), "flash_attention_2"),
}


@pytest.mark.parametrize("case", DETOURS)
def test_detours_are_refused(source: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    change, named = DETOURS[case]
    change(source)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    for load in (lambda: load_stock(source, torch.float32, "pruned"), lambda: open_source(source).load_model()):
        with pytest.raises(ArtifactError, match="would not load as it stands") as refused:
            load()
        assert named in str(refused.value) and refused.value.exit_code == 3 and len(str(refused.value)) < 1000


def test_all_detours_are_listed(source: Path) -> None:
    for change, _ in DETOURS.values():
        change(source)
    with pytest.raises(ArtifactError) as refused:
        load_stock(source, torch.float32, "pruned")
    fields = [problem.field for problem in refused.value.problems]
    assert fields == ["files", "transformers_weights", "attn_implementation", "_attn_implementation", "files"]


def test_what_a_config_may_say_of_attention(source: Path) -> None:
    for attention in (None, "eager", "sdpa"):
        configure(source, attn_implementation=attention)
        assert load_stock(source, torch.float32, "pruned").config._attn_implementation == (attention or "sdpa")


def test_what_is_refused_is_not_passed_on() -> None:
    """A model that we write has none of these fields."""
    assert {"transformers_weights", "attn_implementation", "_attn_implementation", "auto_map", "quantization_config"} <= set(NOT_OURS)


def test_a_directory_without_a_config(source: Path) -> None:
    (source / "config.json").unlink()
    with pytest.raises(ArtifactError, match="cannot read its weights"):
        load_stock(source, torch.float32, "pruned")
    with pytest.raises(ArtifactError):
        load_stock(source / "nowhere", torch.float32, "pruned")
