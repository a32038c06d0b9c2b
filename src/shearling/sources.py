"""Open a source model: a Hugging Face directory, a hub id, or a GGUF file.

Opening reads the config alone. Weights, tokenizer and everything of torch and transformers come when they are asked for. No code
of a model's runs (`trust_remote_code` is off everywhere), and pickled weights are never opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from shearling.arch.families import Anatomy, anatomy_of
from shearling.errors import ArtifactError, Problem
from shearling.io.files import read_json, storage_errors
from shearling.io.loading import HEAD, NOT_OURS, UNTIED, artifact_errors, load_stock
from shearling.io.tensors import MemoryReader, Reader, TensorReader, check_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt")
HUB_NOT = ("*/*", "consolidated*")
"""Not downloaded from a hub: folders with other formats, and Mistral's second copy of the weights."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")

PROBE = "Hello wörld, it's 2024:\n\n  def f(x): return [x]"
"""Text on which two tokenizers are told apart."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Source:
    """The model that we start from. Make one with `open_source`."""

    name: str
    """What was asked for: a path or a hub id."""
    config: dict[str, Any]
    """The plain values of its config.json."""
    anatomy: Anatomy
    find_directory: Callable[[], Path]
    """Gives the directory that holds the weights; downloads them first, for a hub id."""
    gguf_file: str | None = None
    """Name of the GGUF file in that directory, where the source is one."""

    @cached_property
    def directory(self) -> Path:
        """The directory that holds the weights; downloads them first, for a hub id."""
        return self.find_directory()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer; `ArtifactError` where there is none or the model has no embedding for some of its tokens."""
        from transformers import AutoTokenizer

        with artifact_errors(self.name, "tokenizer", "Put the tokenizer's files of this model beside its weights."):
            options = {"trust_remote_code": False, "local_files_only": True, **self._gguf()}
            tokenizer = _as_written(AutoTokenizer.from_pretrained(self.directory, **options), self.directory, self.name)
        for key in ("local_files_only", "is_local"):  # how it was loaded; transformers would save it as part of the tokenizer
            tokenizer.init_kwargs.pop(key, None)
        vocab = self.anatomy.sizes["vocab"]
        if len(tokenizer) > vocab:
            remedy = f"The model has embeddings for {vocab}; take the tokenizer that belongs to it, or resize its embedding."
            raise ArtifactError(f"{self.name}: the tokenizer does not fit", [Problem("vocab_size", f"{len(tokenizer)} tokens", remedy)])
        return tokenizer

    def reader(self) -> Reader:
        """Its tensors, checked against the config by name and shape. A GGUF is dequantised to fp32 in memory for this."""
        if self.gguf_file is None:
            reader: Reader = self._files()
        else:
            state = self.load_model().state_dict()
            reader = MemoryReader({name: state[name] for name in self.anatomy.tensors()})
        check_tensors(reader, self.anatomy, self.name)
        if HEAD in reader.names() and HEAD not in self.anatomy.tensors():
            embedding = f"{self.anatomy.family.anchors.embedding}.weight"
            if not reader.get(HEAD).equal(reader.get(embedding)):
                raise ArtifactError(f"{self.name}: the files do not hold exactly this model", [UNTIED])
        return reader

    def check(self) -> None:
        """Raise `ArtifactError` where its weights, by their headers alone, are not those of its config; a GGUF is checked on loading."""
        if self.gguf_file is None:
            self._files()

    def load_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The stock transformers model, in eval mode on the CPU; `dtype` None means fp32.

        Raises `ArtifactError`, before any weight is read, where names or shapes are not what the config says, and after it
        where a weight is not finite, or was not found by transformers (which would fill it at random).
        """
        import torch

        self.check()
        return load_stock(self.directory, dtype or torch.float32, self.name, **self._gguf())

    def save_companions(self, directory: Path) -> None:
        """Write what belongs to a model besides config and weights: tokenizer, chat template, generation config."""
        with storage_errors(directory):
            if self.gguf_file is not None:
                from transformers import AutoConfig, GenerationConfig

                plain = {key: value for key, value in self.config.items() if key not in NOT_OURS}
                GenerationConfig.from_model_config(AutoConfig.for_model(**plain)).save_pretrained(directory)
            elif (self.directory / "generation_config.json").is_file():
                shutil.copyfile(self.directory / "generation_config.json", directory / "generation_config.json")
            if self.gguf_file is not None or any((self.directory / name).is_file() for name in TOKENIZER_FILES):
                self.tokenizer().save_pretrained(directory)
            sentencepiece = self.directory / "tokenizer.model"  # transformers may leave it out; llama.cpp converts from it
            if sentencepiece.is_file() and not (directory / "tokenizer.model").exists():
                shutil.copyfile(sentencepiece, directory / "tokenizer.model")

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what tells this source from another, from headers alone: sizes, tensors, file sizes."""
        if self.gguf_file is None:
            files = self._files()
            dtypes, paths = files.dtypes(), files.files
            tensors = [[name, list(shape), dtypes[name]] for name, shape in sorted(files.shapes().items())]
        else:
            paths = [self.directory / self.gguf_file]
            tensors = _gguf_tensors(paths[0])
        what = {
            "family": self.anatomy.family.model_type,
            "sizes": dict(self.anatomy.sizes),
            "flags": dict(self.anatomy.flags),
            "tensors": tensors,
            "files": [[path.name, path.stat().st_size] for path in paths],
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def _files(self) -> TensorReader:
        method = self.config.get("quantization_config")
        if method is not None:
            found = str(method.get("quant_method", method))[:80] if isinstance(method, dict) else str(method)[:80]
            remedy = "Quantised weights cannot be sheared; take the unquantised model."
            raise ArtifactError(f"{self.name}: a quantised model", [Problem("quantization_config", found, remedy)])
        return TensorReader(self.directory, anatomy=self.anatomy)

    def _gguf(self) -> dict[str, str]:
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def open_source(spec: str | Path) -> Source:
    """Open a Hugging Face directory (or its config.json), a hub id (`owner/name`), or a `.gguf` file.

    A config alone is enough to open; weights are looked for when they are needed. Raises `ArtifactError` for what cannot be
    found, read or understood.
    """
    name, path = str(spec), Path(spec).expanduser()
    if path.is_dir():
        return _from_config(name, path / "config.json")
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(name, path)
    if path.is_file() and path.suffix == ".json":
        return _from_config(name, path)
    if not path.exists() and _HUB_ID.fullmatch(name):
        return _from_hub(name)
    found = "a file of another kind" if path.exists() else "nothing there"
    remedy = "Give a Hugging Face model directory, a hub id such as Qwen/Qwen3-0.6B, or a .gguf file."
    raise ArtifactError(f"{name}: not a model", [Problem("source", found, remedy)])


def _from_config(name: str, path: Path) -> Source:
    config = read_json(path)
    if not isinstance(config, dict):
        raise ArtifactError(f"{path}: not a config", [Problem("config", type(config).__name__, "A config is a JSON object.")])

    def directory() -> Path:
        if path.name != "config.json":  # transformers would read the config.json beside it instead
            remedy = "Give its directory, where the config is named config.json."
            raise ArtifactError(f"{path}: only a config, without weights", [Problem("source", path.name, remedy)])
        return path.parent

    return Source(name, config, anatomy_of(config, str(path)), directory)


def _from_gguf(name: str, path: Path) -> Source:
    from transformers import AutoConfig

    with artifact_errors(name, "GGUF", "Get the file again; only the llama, mistral, qwen2 and qwen3 architectures are read."):
        loaded = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False, local_files_only=True)
    config = {key: value for key, value in json.loads(loaded.to_json_string()).items() if key not in NOT_OURS}
    return Source(name, config, anatomy_of(config, name), lambda: path.parent, path.name)


def _from_hub(name: str) -> Source:
    from huggingface_hub import hf_hub_download, snapshot_download

    def download() -> Path:
        with _hub_errors(name):
            return Path(snapshot_download(name, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_NOT)))

    with _hub_errors(name):
        path = Path(hf_hub_download(name, "config.json"))
    config = read_json(path)
    return Source(name, config, anatomy_of(config, name), download)


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # hub, HTTP client and cache each have errors of their own
        found = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        remedy = (
            "No such directory is here, so it was taken for a hub id, and the hub did not give it. Check the name and the network; for"
            " a gated model log in with `hf auth login`; or download it elsewhere and give its directory."
        )
        raise ArtifactError(f"{name}: cannot be fetched from the Hugging Face hub", [Problem("source", found, remedy)]) from error


def _as_written(tokenizer: PreTrainedTokenizerBase, directory: Path, name: str) -> PreTrainedTokenizerBase:
    """`tokenizer`, or where it does not encode as the directory's tokenizer.json does, that one.

    For some families transformers 5 puts a pipeline of its own in the place of the file's (Qwen2Tokenizer for any model of
    type qwen2, whatever its tokenizer). The model was trained with the file's.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = directory / "tokenizer.json"
    if not path.is_file():
        return tokenizer
    written = Tokenizer.from_file(str(path))
    if written.encode(PROBE, add_special_tokens=False).ids == tokenizer.encode(PROBE, add_special_tokens=False):
        return tokenizer
    logging.getLogger(__name__).warning(
        "%s: AutoTokenizer does not encode as tokenizer.json says; Shearling goes by the file. Users of the model must load it with"
        " PreTrainedTokenizerFast.from_pretrained, too.",
        name,
    )
    return cast("PreTrainedTokenizerBase", PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True))


def _gguf_tensors(path: Path) -> list[Any]:
    from gguf import GGUFReader

    with artifact_errors(str(path), "GGUF", "Get the file again."):
        return sorted([t.name, [int(extent) for extent in t.shape], t.tensor_type.name] for t in GGUFReader(path).tensors)
