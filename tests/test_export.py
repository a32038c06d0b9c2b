"""Export: what is published loads with plain transformers and computes the same, or nothing is published."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from faults import in_child_killed_at
from models import FAMILIES, save_tiny_source, tiny_tokenizer
from shearling.errors import ArtifactError, NumericsError, OutputError, StorageError
from shearling.export import check_reload, compare_logits, publish_model, save_weights, staging
from shearling.io.files import sha256_file
from shearling.io.tensors import ShardWriter
from shearling.prune.verify import logits_of
from shearling.sources import Source, open_source

IDS = torch.arange(3, 23).reshape(2, 10)


def nothing(directory: Path) -> None:
    """No companions."""


def save_model(
    model: Any, config: Any, companions: Callable[[Path], None], final: Path, dtype: torch.dtype, ids: torch.Tensor, replace: bool = False
) -> Path:
    """A whole model in memory, as a stage publishes it."""
    return save_weights(dict(model.named_parameters()), logits_of(model, ids), ids, config, companions, final, dtype, replace)


def forbidden(*args: Any) -> None:
    raise AssertionError("no work should be done")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = tmp_path_factory.mktemp("source")
    save_tiny_source(path, "llama")
    return open_source(path)


@pytest.fixture(scope="module")
def model(source: Source) -> Any:
    return source.load_model()


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(tmp_path: Path, family: str, tied: bool, dtype: torch.dtype) -> None:
    model = save_tiny_source(tmp_path / "in", family, tied=tied)
    source = open_source(tmp_path / "in")
    out = save_model(model, source.config, source.save_companions, tmp_path / "new" / "out", dtype, IDS)
    assert model.dtype == torch.float32 and torch.equal(model(IDS).logits, source.load_model()(IDS).logits)  # left as it was
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.") and config["architectures"] == [type(model).__name__]
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in set(file.keys())) != tied and file.metadata() == {"format": "pt"}
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == dtype and (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(dtype))
    if dtype == torch.float32:
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    again = open_source(out)
    tokenizer = again.tokenizer()
    assert tokenizer("w3 w95 x")["input_ids"] == [3, 95, 2] and tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert again.anatomy == source.anatomy and tokenizer.eos_token_id == 1 and again.load_model()


def test_sharded(source: Source, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shearling.export.SHARD_BYTES", 40_000)
    out = save_model(model, source.config, nothing, tmp_path / "out", torch.float32, IDS)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2 and open_source(out).load_model()
    monkeypatch.undo()
    save_model(model, source.config, nothing, out, torch.float32, IDS, replace=True)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]  # no stale index


def test_what_held_for_the_source_alone_is_left_out(source: Source, model: Any, tmp_path: Path) -> None:
    old = {"torch_dtype": "float16", "auto_map": {"AutoConfig": "evil.C"}, "_name_or_path": "/home/someone", "architectures": ["Other"]}
    out = save_model(model, {**source.config, **old}, nothing, tmp_path / "out", torch.float32, IDS)
    config = json.loads((out / "config.json").read_text())
    assert not {"torch_dtype", "auto_map", "_name_or_path"} & config.keys() and config["architectures"] == ["LlamaForCausalLM"]


def test_existing_output_is_refused_before_any_work(source: Source, model: Any, tmp_path: Path) -> None:
    final = tmp_path / "out"
    save_model(model, source.config, nothing, final, torch.float32, IDS)
    before = tree(tmp_path)
    for target in (final, tmp_path / "dangling"):
        if target.name == "dangling":
            target.symlink_to("nowhere")
        with pytest.raises(OutputError, match="exists already"):
            publish_model(forbidden, source.config, forbidden, target, torch.float32, forbidden)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("limit", [100_000, 200_000])
def test_disk_full_publishes_nothing(source: Source, model: Any, tmp_path: Path, limit: int) -> None:
    """Weights have 190 272 bytes: at the lower limit they do not fit; at the higher they do, and a large companion does not."""

    def companions(directory: Path) -> None:
        (directory / "large").write_bytes(b"x" * 300_000)

    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save_model(model, source.config, companions, tmp_path / "out", torch.float32, IDS)
        except StorageError as error:
            os._exit(error.exit_code if "bytes are needed" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 6
    assert list(tmp_path.iterdir()) == []


def test_unwritable_output_is_refused_before_any_work(source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file" / "out", Path("/proc/x/out")):
        with pytest.raises(StorageError, match="cannot write here"):
            publish_model(forbidden, source.config, forbidden, target, torch.float32, forbidden)


def wrong_logits(writer: ShardWriter, model: Any, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    for name, value in model.state_dict().items():
        changed = change(name, value.clone())
        if changed is not None:
            writer.add(name, changed)


NORM = "model.norm.weight"
WRONG: dict[str, tuple[Callable[[str, torch.Tensor], torch.Tensor | None], type[Exception], str]] = {
    "missing": (lambda name, value: None if name == NORM else value, ArtifactError, "missing_keys: found model.norm.weight"),
    "shape": (lambda name, value: value[:-1].clone() if name == NORM else value, ArtifactError, "mismatched_keys"),
    "not finite": (lambda name, value: value.fill_(float("nan")) if name == NORM else value, ArtifactError, "not finite"),
    "another value": (lambda name, value: value * 1.01 if name == NORM else value, NumericsError, "logits differ"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("replace", [False, True])
def test_wrong_output_is_never_published(source: Source, model: Any, tmp_path: Path, case: str, replace: bool) -> None:
    change, error, message = WRONG[case]
    if replace:
        save_model(model, source.config, nothing, tmp_path / "out", torch.float32, IDS)
    before = tree(tmp_path)

    def verify(reloaded: Any) -> None:
        with torch.no_grad():
            compare_logits(model(IDS).logits, reloaded(IDS).logits, torch.float32)

    def write(writer: ShardWriter) -> None:
        wrong_logits(writer, model, change)

    with pytest.raises(error, match=message):
        publish_model(write, source.config, nothing, tmp_path / "out", torch.float32, verify, replace)
    assert tree(tmp_path) == before and len(list(tmp_path.iterdir())) == len(before and ["out"])


def test_extra_tensor_is_never_published(source: Source, model: Any, tmp_path: Path) -> None:
    def write(writer: ShardWriter) -> None:
        wrong_logits(writer, model, lambda name, value: value)
        writer.add("model.layers.9.extra.weight", torch.zeros(3))

    with pytest.raises(ArtifactError, match=r"unexpected_keys: found model\.layers\.9\.extra"):
        publish_model(write, source.config, nothing, tmp_path / "out", torch.float32, forbidden)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_differ_are_named(source: Source, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ShardWriter.add
    unused_row = torch.zeros(96, 1)
    unused_row[95] = 1e-3  # a token that the sample does not have, so that no logit of the sample would tell

    def add(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        original(self, name, tensor + unused_row if name == "model.embed_tokens.weight" else tensor)

    monkeypatch.setattr(ShardWriter, "add", add)
    with pytest.raises(NumericsError, match=r"weight model\.embed_tokens\.weight differs"):
        save_model(model, source.config, nothing, tmp_path / "out", torch.float32, IDS)
    assert list(tmp_path.iterdir()) == []


def test_compare_logits() -> None:
    logits = torch.linspace(-5, 5, 60).reshape(1, 6, 10)
    assert compare_logits(logits, logits.clone(), torch.float32) == 0
    assert compare_logits(logits, logits + 5e-4, torch.float32) == pytest.approx(5e-5, rel=1e-2)
    compare_logits(logits, logits + 0.1, torch.bfloat16)
    for wrong, dtype in ((logits + 2e-3, torch.float32), (logits + 0.3, torch.bfloat16), (logits * float("nan"), torch.float32)):
        with pytest.raises(NumericsError, match="differ"):
            compare_logits(logits, wrong, dtype)


def test_check_reload_refuses_pickled_weights(source: Source, model: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(source.config))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="cannot read its weights"):
        check_reload(tmp_path, torch.float32)


@pytest.mark.parametrize("replace", [False, True])
def test_killed_at_any_filesystem_call(tmp_path: Path, replace: bool) -> None:
    """Whatever was the last call, the next export goes well and leaves its output alone in the folder."""
    k, killed = 0, True

    def export(final: Path, text: str) -> None:
        with staging(final, replace) as staged:
            (staged / "a").write_text(text)

    while killed:
        k += 1
        final = tmp_path / str(k) / "out"
        final.parent.mkdir()
        if replace:
            export(final, "old")
        killed = in_child_killed_at(k, lambda final=final: export(final, "new"))
        if final.exists():
            assert (final / "a").read_text() in ("old", "new")
        if replace or not final.exists():
            export(final, "next")
        assert [path.name for path in final.parent.iterdir()] == ["out"]
    assert k > 8
