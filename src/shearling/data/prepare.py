"""From text to token shards: look at everything, tokenise and pack domain by domain, publish one directory whole.

As in Sheared LLaMA's preparation, a document becomes BOS (where the tokenizer adds it), its ids, EOS; the documents of a domain
follow one another and are cut into rows of T tokens, and the last partial row is dropped. What is different: ids of up to 32 bits,
exact duplicates dropped, and held-out text chosen document by document, so that no document is on both sides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shearling.data.config import DataConfig
from shearling.data.encode import Encoder, tokenizer_fingerprint
from shearling.data.origins import Origin, find_origins, survey
from shearling.data.pack import Progress, pack_domain
from shearling.data.tokens import FORMAT, MANIFEST, dtype_for, open_tokens
from shearling.errors import OutputError
from shearling.io.files import (
    RunLock,
    check_writable,
    publish_directory,
    remove_tree,
    stage_directory,
    storage_errors,
    sweep_temporary,
    write_atomic,
)


def prepare(
    config: DataConfig, tokenizer: Any, vocab_size: int, out: Path, *, seed: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Make the token shards of every domain, or find them made.

    Held out are a domain's `heldout` files, or else documents split off from its text: a document is held out where a hash of seed
    and text falls under a small fraction, whatever other files there are, until `heldout_sequences` are filled; such documents
    beyond that are dropped, never trained on. A domain of fewer than 200 documents is split inside them instead: the last part of
    each, at most a tenth, which the manifest's `notes` say. Documents of held-out files are trained on in no domain. A document
    that is repeated inside a domain is used once.

    Args:
        config: domains and lengths; paths are relative to the working directory unless `config.resolved` made them absolute.
        tokenizer: a Hugging Face fast tokenizer.
        vocab_size: rows of the model's embedding; every id is below it.
        out: directory to publish. Returned from straight away if it holds this data already: the same settings, tokenizer, and
            names and sizes of the files.
        seed: decides which documents are held out.
        progress: called with domain, documents so far, tokens so far.

    Returns:
        The manifest. By domain: documents and heldout_documents (used whole or in part), duplicate_documents and
        overlapping_documents (dropped; the latter are in held-out files), train_sequences, heldout_sequences, tokens and bytes
        (of the text used on both sides; tokens with the marks), sha256 by split, notes.

    Raises:
        DataError: files, text or tokenizer are wrong; what can be found before tokenising is found then, and all at once.
        OutputError: `out` holds something else, or another process is writing it.
        ArtifactError: `out` holds this data, but damaged.
        StorageError: the disk is full or not writable. Nothing is left under a final name.
    """
    out = Path(out)
    encoder = Encoder(tokenizer, vocab_size)
    origins = find_origins(config)
    settings = {
        "format": FORMAT,
        **config.model_dump(include={"sequence_length", "heldout_sequences", "max_train_sequences"}),
        "vocab_size": vocab_size,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "seed": seed,
        "domains": {origin.name: origin.settings() for origin in origins},
    }
    if finished := _finished(out, settings):
        return finished
    check_writable(out)
    with RunLock(out.parent / f".{out.name}.lock"), storage_errors(out):
        if finished := _finished(out, settings):  # by a process that held the lock until now
            return finished
        sweep_temporary(out.parent, out.name)
        staged = stage_directory(out)
        try:
            manifest = _build(config, encoder, origins, settings, staged, seed, progress)
            write_atomic(staged / MANIFEST, json.dumps(manifest, indent=1))
            if out.is_dir() and not out.is_symlink():  # empty, or _finished would have refused it
                out.rmdir()
            publish_directory(staged, out)
        except BaseException:
            remove_tree(staged)
            raise
    return manifest


def _build(
    config: DataConfig,
    encoder: Encoder,
    origins: list[Origin],
    settings: Mapping[str, Any],
    folder: Path,
    seed: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write every shard into `folder` and return the manifest."""
    whole, facts = survey(origins), {}
    # Small domains first: one that is too short for a sequence is found before hours go into a large one.
    for origin in sorted(origins, key=lambda origin: origin.size()):
        facts[origin.name] = pack_domain(origin, whole, config, encoder, folder, seed, progress)
    return {
        "format": FORMAT,
        "fingerprint": _fingerprint(settings),
        "dtype": dtype_for(encoder.vocab_size).str,
        "sequence_length": config.sequence_length,
        "vocab_size": encoder.vocab_size,
        "tokenizer": settings["tokenizer"],
        "settings": settings,
        "domains": {origin.name: facts[origin.name] for origin in origins},
    }


def _finished(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of `out` if it holds data made with these settings, None if nothing is there; `OutputError` for all else."""
    if out.is_dir():
        if not any(out.iterdir()):
            return None
        if not (out / MANIFEST).is_file():
            raise OutputError(f"{out}: exists and holds no prepared data; choose another output")
    elif out.exists() or out.is_symlink():
        raise OutputError(f"{out}: exists and is no directory; choose another output")
    else:
        return None
    manifest = dict(open_tokens(out, verify=False).manifest)
    if manifest.get("fingerprint") == _fingerprint(settings):
        return manifest
    there, asked = _flat(manifest.get("settings", {})), _flat(settings)
    names = sorted(name for name in there.keys() | asked.keys() if there.get(name) != asked.get(name))
    differences = "; ".join(f"{name}: {there.get(name, 'absent')} there, {asked.get(name, 'absent')} asked for" for name in names)
    raise OutputError(f"{out}: holds data prepared otherwise ({differences}); choose another output, or delete it")


def _fingerprint(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
