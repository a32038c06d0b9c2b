"""Names that files give for other files: whichever reader meets them, nothing outside the directory is opened, nor an archive."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import tiny_tokenizer
from shearling.config import parse
from shearling.data.config import DataConfig
from shearling.data.origins import find_origins, survey
from shearling.data.tokens import open_tokens
from shearling.errors import ArtifactError, ConfigError, ProblemsError
from shearling.io.loading import load_stock
from shearling.io.tensors import TensorReader
from shearling.prune.plan import load_plan
from shearling.recipe import load_recipe
from shearling.sources import open_source
from shearling.train import checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"
STEP = "step-00000004"

EVIL: dict[str, str] = {
    "the parent": "../{}",
    "the parent in the middle": "sub/../../{}",
    "the parent alone": "..",
    "the grandparent": "../../{folder}/{}",
    "absolute": "{root}/{}",
    "absolute, doubled": "/{root}/{}",
    "a URL": "file://{root}/{}",
    "itself": "./../{}",
    "a NUL": "../{}\0.safetensors",
    "a backslash": "..\\{}",
    "a drive": "C:{}",
    "a drive and a path": "C:\\{}",
    "a share": "\\\\host\\share\\{}",
    "a full-width slash": "..／{}",
    "full-width dots": "．．/{}",
    "leaders for dots": "․․/{}",
    "two dots in one": "‥/{}",
    "a full-width drive": "Ｃ：{}",
    "a full-width backslash": "..＼{}",
    "a link": "link.safetensors",
    "a link to a folder": "up/{}",
    "a link in a folder": "sub/link.safetensors",
    "a link to nowhere": "dangling.safetensors",
    "a link to itself": "loop.safetensors",
    "no name": "",
    "a folder": "sub/",
    "too long": "n" * 5000 + "{}",
}
"""What a file may say where the name of a file beside it is due; {} is a sound file outside, {root} its folder."""

_opened: set[str] = set()
_watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watching:
        _opened.add(str(arguments[0]))


sys.addaudithook(_watch)


@pytest.fixture
def outside(good_source: Path, tmp_path: Path) -> Iterator[Path]:
    """A sound safetensors file, which a reader would be glad of; opened by none."""
    global _watching
    path = Path(shutil.copyfile(good_source / "model.safetensors", tmp_path / "secret.safetensors"))
    _watching = True
    _opened.clear()
    yield path
    _watching = False
    assert not {name for name in _opened if name.endswith(path.name)}


def evil_name(case: str, outside: Path) -> str:
    return EVIL[case].replace("{}", outside.name).replace("{root}", str(outside.parent)).replace("{folder}", outside.parent.name)


def with_links(folder: Path, outside: Path) -> Path:
    """The links that the names of `EVIL` speak of."""
    (folder / "sub").mkdir()
    for place in (folder, folder / "sub"):
        (place / "link.safetensors").symlink_to(outside)
    (folder / "up").symlink_to("..")
    (folder / "dangling.safetensors").symlink_to("../nowhere.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    return folder


def refused(error: type[ProblemsError], use: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(error) as caught:
        use(*arguments)
    assert caught.value.exit_code == (2 if error is ConfigError else 3)
    return str(caught.value)


@pytest.mark.parametrize("case", EVIL)
def test_the_index_of_the_weights(source: Path, outside: Path, case: str) -> None:
    """For our reader, for a source, and where plain transformers would follow it (5.23 does)."""
    with_links(source, outside)
    names = list(load_file(source / "model.safetensors"))
    (source / "model.safetensors").unlink()
    weight_map = dict.fromkeys(names, evil_name(case, outside))
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for use in (TensorReader, lambda path: load_stock(path, torch.float32, "pruned"), lambda path: open_source(path).load_model()):
        message = refused(ArtifactError, use, source)
        assert "refuses to open" in message or "not safetensors" in message


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_weights_that_are_a_link_outside(source: Path, outside: Path, name: str) -> None:
    (source / "model.safetensors").unlink()
    (source / name).symlink_to(outside)
    for use in (TensorReader, lambda path: load_stock(path, torch.float32, "pruned"), lambda path: open_source(path).check()):
        assert "refuses to open" in refused(ArtifactError, use, source)


@pytest.mark.parametrize("case", EVIL)
def test_the_weights_that_a_config_names(source: Path, outside: Path, case: str) -> None:
    """`transformers_weights`, which transformers would take in place of the file that we check."""
    with_links(source, outside)
    config = json.loads((source / "config.json").read_text()) | {"transformers_weights": evil_name(case, outside)}
    (source / "config.json").write_text(json.dumps(config))
    for use in (lambda path: load_stock(path, torch.float32, "pruned"), lambda path: open_source(path).load_model()):
        assert "transformers_weights" in refused(ArtifactError, use, source)


def test_the_files_that_a_tokenizer_names(source: Path, tmp_path: Path) -> None:
    """What a tokenizer_config.json says of files is let be: the tokenizer is that of the directory."""
    tiny_tokenizer(60).save_pretrained(tmp_path / "elsewhere")
    path = source / "tokenizer_config.json"
    other = str(tmp_path / "elsewhere" / "tokenizer.json")
    names = dict.fromkeys(("tokenizer_file", "vocab_file", "merges_file", "chat_template_file", "tokenizer_config_file"), other)
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    assert len(open_source(source).tokenizer()) == 96


@pytest.mark.parametrize("case", EVIL)
def test_the_manifest_of_a_checkpoint(tmp_path: Path, outside: Path, case: str) -> None:
    """Signed again, with the right size and hash of the file outside."""
    step = with_links(Path(shutil.copytree(FIXTURES / "checkpoint-1" / STEP, tmp_path / "run" / STEP)), outside)
    _opened.clear()
    values = json.loads((step / "manifest.json").read_text().partition("\n")[2])
    values["files"][evil_name(case, outside)] = {"bytes": outside.stat().st_size, "sha256": "0" * 64}
    body = json.dumps(values)
    (step / "manifest.json").write_text(hashlib.sha256(body.encode()).hexdigest() + "\n" + body)
    refused(ArtifactError, checkpoint.load, step.parent, 4)


@pytest.mark.parametrize("case", EVIL)
def test_the_domains_of_prepared_text(tmp_path: Path, outside: Path, case: str) -> None:
    """Names of shards are made of them: in a manifest, and in the recipe that leads to one."""
    data, name = Path(shutil.copytree(FIXTURES / "data-2", tmp_path / "data")), evil_name(case, outside)
    manifest = json.loads((data / "manifest.json").read_text())
    name = name.removesuffix(".safetensors") + "/"  # "link" would be a sound name
    for split in ("train", "heldout"):
        shutil.copyfile(data / f"web.{split}.00000.bin", tmp_path / f"secret.{split}.00000.bin")
    manifest["domains"] = {name: manifest["domains"]["web"]}
    (data / "manifest.json").write_text(json.dumps(manifest))
    _opened.clear()
    assert "an unsafe name" in refused(ArtifactError, open_tokens, data)
    assert not {name for name in _opened if name.endswith(".bin")}
    assert "letters, digits" in refused(ConfigError, parse, DataConfig, {"domains": {name: "a.jsonl"}})


@pytest.mark.parametrize(
    "spec", ["../a/b", "a/../b", "/a/b", "a/..", "..", "a\\b", "C:a/b", "a/b\0", "a／b", "~/a", "file:///a", ".hidden/a", ""]
)
def test_what_is_no_hub_id_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: str) -> None:
    def asked(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", asked)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    refused(ArtifactError, lambda: open_source(spec).check())


def test_archives_are_refused(good_source: Path, tmp_path: Path) -> None:
    """Of a source, prepared text and a checkpoint, and of plans and text: by their names, and under the names of other files."""
    packed = {}
    for ending, mode in (("tar", "w"), ("tar.gz", "w:gz")):
        with tarfile.open(tmp_path / f"x.{ending}", mode) as archive:  # type: ignore[call-overload]
            archive.add(good_source, "../source")
        packed[ending] = (tmp_path / f"x.{ending}").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped:
        for path in good_source.iterdir():
            zipped.write(path, f"../source/{path.name}")
    packed["zip"] = (tmp_path / "x.zip").read_bytes()
    before = {path.name for path in tmp_path.parent.iterdir()}
    for ending, content in packed.items():
        path = tmp_path / f"x.{ending}"
        refused(ArtifactError, open_source, path)
        refused(ArtifactError, load_stock, path, torch.float32, "pruned")
        refused(ArtifactError, TensorReader, path)
        refused(ArtifactError, open_tokens, path)
        refused(ArtifactError, load_plan, path)
        refused(ConfigError, load_recipe, path)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / STEP).write_bytes(content)
        refused(ArtifactError, checkpoint.load, tmp_path / "run", 4)
        for name in (path.name, "x.gguf", "model.json", "x.jsonl", "x.jsonl.gz", "x.parquet.tar"):
            if name in ("x.gguf", "model.json"):
                (tmp_path / name).write_bytes(content)
                refused(ArtifactError, open_source, tmp_path / name)
            else:
                (tmp_path / name).write_bytes(content)
                with pytest.raises(ProblemsError) as caught:
                    survey(find_origins(parse(DataConfig, {"domains": {"a": str(tmp_path / name)}})))
                assert caught.value.exit_code == 3
    assert {path.name for path in tmp_path.parent.iterdir()} == before and not (tmp_path / "source").exists()


def test_a_tensor_may_have_any_name(tmp_path: Path) -> None:
    """It names no file; but a message must not steer a terminal, nor be endless."""
    save_file({"../x": torch.zeros(1), "\x1b[2J": torch.zeros(1), "n" * 10**5: torch.zeros(1)}, tmp_path / "model.safetensors")

    class Anatomy:
        def shapes(self) -> dict[str, tuple[int, ...]]:
            return {"model.norm.weight": (4,)}

    with pytest.raises(ArtifactError) as caught:
        TensorReader(tmp_path, anatomy=Anatomy())
    assert len(caught.value.problems) == 4 and "\x1b" not in str(caught.value) and len(str(caught.value)) < 1500
