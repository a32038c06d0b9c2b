"""A tiny word-level tokenizer, text to go with it, and a preparation of two domains that takes milliseconds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shearling.config import parse
from shearling.data import prepare as prepare_module
from shearling.data.config import DataConfig
from shearling.data.prepare import prepare

WORDS = [f"w{number}" for number in range(60)]
EOS, BOS = 0, 1


def make_tokenizer(*, bos: bool = False, eos: bool = True, words: Iterable[str] = WORDS) -> Any:
    """Words -> ids from 3 on; 0 is </s>, 1 is <s> (added to a text only if `bos`), 2 is <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": EOS, "<s>": BOS, "<unk>": 2, **{word: number for number, word in enumerate(words, start=3)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    marks = {"bos_token": "<s>", **({"eos_token": "</s>"} if eos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **marks)


def make_texts(number: int, seed: int, length: int = 30) -> list[str]:
    """Distinct documents of about `length` words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(length // 2, length * 3 // 2))) + f" {seed}-{n}" for n in range(number)]


def write_lines(path: Path, texts: Iterable[str]) -> Path:
    """A JSON lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_factory() -> Callable[..., Any]:
    return make_tokenizer


@pytest.fixture(scope="session")
def texts() -> Callable[..., list[str]]:
    return make_texts


@pytest.fixture(scope="session")
def jsonl() -> Callable[[Path, Iterable[str]], Path]:
    return write_lines


@dataclass(frozen=True)
class Preparation:
    """A small domain and a larger one, in a folder of their own."""

    folder: Path
    config: DataConfig
    tokenizer: Any
    packed: list[str]
    """The domains that were tokenised, in order, since the fixture was made."""

    def __call__(self, out: Path, **arguments: Any) -> dict[str, Any]:
        return prepare(self.config, self.tokenizer, 100, out, **{"seed": 1, **arguments})


@pytest.fixture
def preparation(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Preparation:
    folder = tmp_path / "text"
    domains = {
        "web": str(write_lines(folder / "web.jsonl", make_texts(100, 1))),
        "code": str(write_lines(folder / "code.jsonl", make_texts(20, 2))),
    }
    config = parse(DataConfig, {"sequence_length": 16, "heldout_sequences": 4, "domains": domains})
    packed: list[str] = []
    original = prepare_module.pack_domain

    def pack_domain(origin: Any, *arguments: Any) -> Any:
        packed.append(origin.name)
        return original(origin, *arguments)

    monkeypatch.setattr(prepare_module, "pack_domain", pack_domain)
    return Preparation(folder, config, tokenizer, packed)
