"""From text to ids: what is asked of a tokenizer, how it is recognised again, and how documents are marked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shearling.errors import DataError, Problem


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Sha256 over all that decides which ids a text gets: the serialised backend, the length, the BOS and EOS ids.

    Padding and truncation are left out: they are settings of the last call, and change under a tokenizer that is in use.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    facts = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    text = json.dumps([facts, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Encoder:
    """Turns texts into ids of a vocabulary of known size.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        vocab_size: rows of the model's embedding.

    Raises:
        DataError: the tokenizer is not a fast one, has more tokens than the model, or no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        headline = "this tokenizer cannot prepare data for this model"
        if not getattr(tokenizer, "is_fast", False):
            remedy = "A fast tokenizer (tokenizer.json) is needed; convert it, or use the model's own."
            raise DataError(headline, [Problem("tokenizer", type(tokenizer).__name__, remedy)])
        problems = []
        if len(tokenizer) > vocab_size:
            found = f"{len(tokenizer)} tokens where the model has {vocab_size}"
            problems.append(Problem("tokenizer", found, "The tokenizer belongs to another model; use the model's own."))
        elif (largest := max(tokenizer.bos_token_id or 0, tokenizer.eos_token_id or 0)) >= vocab_size:
            found = f"the id {largest} where the model has {vocab_size} tokens"
            problems.append(Problem("tokenizer", found, "The tokenizer belongs to another model; use the model's own."))
        if tokenizer.eos_token_id is None:
            problems.append(Problem("tokenizer.eos_token", "none", "Documents are separated by it; set the tokenizer's eos_token."))
        if problems:
            raise DataError(headline, problems)
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        bos = tokenizer.bos_token_id
        # Many tokenizers name a BOS token that their model never saw; only what the tokenizer adds by itself is added here.
        adds_bos = bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]
        self._head = np.array([bos] if adds_bos else [], dtype=np.int64)
        self._tail = np.array([tokenizer.eos_token_id], dtype=np.int64)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """The ids of each text, without marks; raise `DataError` for an id that the model does not have."""
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        arrays = [np.array(ids, dtype=np.int64) for ids in encoded["input_ids"]]
        largest = max((int(ids.max()) for ids in arrays if len(ids)), default=0)
        if largest >= self.vocab_size:
            found = f"the id {largest} where the model has {self.vocab_size} tokens"
            remedy = "The tokenizer belongs to another model; use the model's own."
            raise DataError("this tokenizer cannot prepare data for this model", [Problem("tokenizer", found, remedy)])
        return arrays

    def mark(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """A document as the model sees it: BOS, if the tokenizer adds it, the ids, EOS."""
        return np.concatenate([self._head, ids, self._tail])
