"""Prepared text from elsewhere: the same rows from a folder and from a URL, checked against the recipe before anything is fetched."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import tiny_tokenizer
from prepared import Served, rows_of_files, serving, write_prepared
from shearling.config import parse
from shearling.data import elsewhere
from shearling.data import remote as remote_module
from shearling.data import rows as rows_module
from shearling.data.cache import SHARD
from shearling.data.config import DataConfig
from shearling.data.elsewhere import check_prepared, fetch_heldout, open_prepared, read_prepared, too_small_for
from shearling.data.loader import Loader
from shearling.data.remote import Remote, shown_place, shown_url
from shearling.data.tokens import MANIFEST, SPLITS, fingerprint
from shearling.errors import ArtifactError, ConfigError, StorageError

SIZES = {"web": (50, 9), "code": (20, 4)}
T, EACH = 16, 8
SHARD_BYTES = EACH * T * 2


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def served(tmp_path: Path, tokenizer: Any) -> Iterator[Served]:
    write_prepared(tmp_path / "prepared", SIZES, tokenizer, length=T, each=EACH)
    with serving(tmp_path / "prepared") as found:
        yield found


def config(**values: Any) -> DataConfig:
    return parse(DataConfig, {"prepared": "/prepared", "sequence_length": T, **values})


def reseal(folder: Path, **changes: Any) -> dict[str, Any]:
    """Change a manifest and its settings, with a fingerprint that fits."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest |= changes
    manifest["settings"] |= {key: value for key, value in changes.items() if key in manifest["settings"] and key != "domains"}
    manifest["fingerprint"] = fingerprint(manifest["settings"])
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return manifest


def test_rows_are_those_of_the_files_wherever_they_lie(served: Served, tmp_path: Path) -> None:
    folder = served.folder
    for where in (str(folder), served.url, f"file://{folder}"):
        manifest = read_prepared(where)
        tokens = open_prepared(where, manifest, tmp_path / "cache", 2**20)
        assert tokens.domains == tuple(SIZES) and tokens.document_end == 1
        for domain, counts in SIZES.items():
            for split, count in zip(("train", "heldout"), counts, strict=True):
                rows, wanted = tokens.sequences(domain, split), rows_of_files(folder, manifest, domain, split)
                assert rows.shape == (count, T)
                assert np.array_equal(rows[:], wanted) and np.array_equal(rows[[count - 1, 0, 3]], wanted[[count - 1, 0, 3]])
                assert np.array_equal(rows[count - 1], wanted[count - 1])
                with pytest.raises(ValueError, match="read-only"):
                    rows[0][0] = 5


def test_a_folder_is_read_where_it_is_and_a_url_only_as_far_as_it_is_asked_for(served: Served, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    open_prepared(str(served.folder), read_prepared(str(served.folder)), cache, 2**20)
    assert not cache.exists()
    tokens = open_prepared(served.url, read_prepared(served.url), cache, 2**20)
    assert served.asked == ["/data/manifest.json"] and not cache.exists()
    seen: list[tuple[int, int]] = []
    fetch_heldout(tokens, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert sorted(served.asked[1:]) == [f"/data/{name}.bin" for name in ("code.heldout.00000", "web.heldout.00000", "web.heldout.00001")]
    _ = tokens.sequences("web", "train")[[17, 18, 49]]
    assert served.asked[4:] == ["/data/web.train.00002.bin", "/data/web.train.00006.bin"]


def test_batches_are_the_same_from_a_url_whose_shards_are_removed_all_the_time(served: Served, tmp_path: Path) -> None:
    """The cache has room for two of thirteen shards, and every batch reads from many."""
    manifest = read_prepared(served.url)
    limit = 2 * SHARD_BYTES + 100
    sets = (open_prepared(str(served.folder), manifest, tmp_path, 0), open_prepared(served.url, manifest, tmp_path / "cache", limit))
    weights = np.array([0.7, 0.3])
    loaders = [Loader(tokens, 8, seed=3) for tokens in sets]
    cursors = [loader.start() for loader in loaders]
    for step in range(12):
        batches = [loader.batch(step, weights, cursor) for loader, cursor in zip(loaders, cursors, strict=True)]
        assert np.array_equal(batches[0].ids, batches[1].ids)
        cursors = [batch.cursors for batch in batches]
        there = list((tmp_path / "cache").rglob(SHARD))
        assert sum(path.stat().st_size for path in there) <= limit
    assert len(served.asked) > 20


def test_removed_shards_are_let_go_so_that_their_room_is_free(served: Served, tmp_path: Path) -> None:
    """By the table of open maps of the system, where there is one."""
    tokens = open_prepared(served.url, read_prepared(served.url), tmp_path / "cache", 2 * SHARD_BYTES + 100)
    rows = tokens.sequences("web", "train")
    for index in (*range(0, 50, EACH), 0):
        first = rows[index]
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line for line in maps if str(tmp_path / "cache") in line]
    assert 1 <= len(mapped) <= 3 and sum("(deleted)" in line for line in mapped) <= 1
    assert np.array_equal(first, rows_of_files(served.folder, tokens.manifest, "web", "train")[0])


def test_no_more_shards_are_mapped_than_may_be_over_all_splits(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps a file open, and the system's bound is on all of them together."""
    monkeypatch.setattr(rows_module, "_MOST_OPEN", 3)
    tokens = open_prepared(served.url, read_prepared(served.url), tmp_path / "cache", 2**20)
    for domain in tokens.domains:
        for split in SPLITS:
            assert np.array_equal(tokens.sequences(domain, split)[:], rows_of_files(served.folder, tokens.manifest, domain, split))
            mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path / "cache") in line]
            assert len(mapped) <= 3


def test_a_shard_that_others_remove_before_it_is_mapped_is_asked_for_again(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = open_prepared(served.url, read_prepared(served.url), tmp_path / "cache", 2**20)
    rows = tokens.sequences("code", "train")
    removals, locate = [3], rows._locate

    def raced(shard: Any) -> Path:
        path = locate(shard)
        if removals[0]:
            removals[0] -= 1
            path.unlink()
        return path

    monkeypatch.setattr(rows, "_locate", raced)
    assert np.array_equal(rows[:8], rows_of_files(served.folder, tokens.manifest, "code", "train")[:8])
    removals[0] = 10**6
    with pytest.raises(StorageError, match=r"code\.train\.00001\.bin.*raise data\.cache_gib"):
        _ = rows[8]


def test_a_damaged_shard_is_not_trained_on(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "WAITS", ())
    manifest = read_prepared(served.url)
    damaged = served.folder / "web.train.00001.bin"
    data = bytearray(damaged.read_bytes())
    data[9] ^= 4
    damaged.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"web\.train\.00001\.bin: found sha256"):
        open_prepared(str(served.folder), manifest, tmp_path, 0)
    rows = open_prepared(served.url, manifest, tmp_path / "cache", 2**20).sequences("web", "train")
    assert len(rows[:8]) == 8
    for _ in range(2):
        with pytest.raises(ArtifactError, match=rf"{served.url}/web\.train\.00001\.bin: cannot be used"):
            _ = rows[8]
    damaged.unlink()
    with pytest.raises(ArtifactError, match=rf"{served.url}/web\.train\.00001\.bin: is missing"):
        _ = rows[8]
    served.faults += ["500"] * 2
    with pytest.raises(StorageError, match=rf"{served.url}/web\.train\.00002\.bin: cannot be read"):
        _ = rows[16]


def test_all_that_differs_is_told_at_once(served: Served, tokenizer: Any) -> None:
    manifest = read_prepared(str(served.folder))
    check_prepared(manifest, config(), tokenizer, 96)
    check_prepared(manifest, config(domains={"code": {"weight": 1.0}, "web": {"weight": 3.0}}), tokenizer, 100)
    domains = {"webb": {"weight": 1.0}, "code": {"weight": 1.0}}
    with pytest.raises(ConfigError, match="do not go together") as caught:
        check_prepared(manifest, config(domains=domains, sequence_length=32), tiny_tokenizer(90), 90)
    fields = [problem.field for problem in caught.value.problems]
    assert fields == ["data.sequence_length", "source", "source", "data.domains.webb", "data.domains.web"]
    for part in ("32 where the prepared text has 16", "fingerprint", "90 where the text was prepared for 96", "Its domains are web, code"):
        assert part in str(caught.value)


def test_a_place_without_prepared_text(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "WAITS", ())
    with pytest.raises(ArtifactError, match="no prepared data"):
        read_prepared(str(tmp_path / "nothing"))
    (served.folder / MANIFEST).rename(served.folder / "other")
    for where in (served.url, f"file://{served.folder}"):
        with pytest.raises(ArtifactError, match=rf"{where}/manifest\.json: is missing"):
            read_prepared(where)
    for text, said in (
        ("{", "not valid JSON"),
        ("[]", "format: found list"),
        (json.dumps({"format": 99}), "99"),
        ("[" * 4 * 2**20, "more than"),
    ):
        (served.folder / MANIFEST).write_text(text)
        with pytest.raises(ArtifactError, match=said):
            read_prepared(served.url)


def test_a_preparation_that_was_not_finished(served: Served) -> None:
    manifest = json.loads((served.folder / MANIFEST).read_text())
    reseal(served.folder, domains={"web": manifest["domains"]["web"]})
    for where in (served.url, str(served.folder)):
        with pytest.raises(ArtifactError, match=r"did not come to its end\n  - domains\.code"):
            read_prepared(where)


def test_names_in_a_manifest_lead_nowhere_else(served: Served) -> None:
    manifest = json.loads((served.folder / MANIFEST).read_text())
    for name in ("../../etc/passwd", "/etc/passwd", "sub/web.train.00000.bin", "web.train.00001.bin"):
        manifest["domains"]["web"]["shards"]["train"][0]["file"] = name
        reseal(served.folder, domains=manifest["domains"])
        with pytest.raises(ArtifactError, match="no sound train_sequences and shards"):
            read_prepared(served.url)


def test_a_cache_that_is_too_small(served: Served, tmp_path: Path) -> None:
    manifest = read_prepared(served.url)
    total = sum(sum(counts) for counts in SIZES.values()) * T * 2
    assert too_small_for(manifest, total) is None
    note = too_small_for(manifest, total - 1)
    assert note is not None and "data.cache_gib" in note
    with pytest.raises(ConfigError, match=r"data\.cache_gib: found a limit of 255 bytes where web\.train\.00000\.bin alone has 256"):
        open_prepared(served.url, manifest, tmp_path / "cache", SHARD_BYTES - 1)
    assert served.asked == ["/data/manifest.json"]


def test_secrets_of_a_url_are_not_shown() -> None:
    for user in ("me:word@", "word@", "me:w@rd@", ""):
        assert shown_place(f"https://{user}host/data/?key=secret") == str(Remote(f"https://{user}host/data")) == "https://host/data"
        assert shown_url(f"https://{user}host/a.jsonl?key=secret") == "https://host/a.jsonl"
        assert shown_url(f"ftp://{user}host/a?.jsonl") == "ftp://host/a?.jsonl"  # which is a glob
    assert shown_place("/data?x") == "/data?x"


@pytest.mark.parametrize("url", ["https://[host/data", "memory://[host/data"])
def test_what_only_looks_like_a_url(url: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Remote(url)


def test_a_folder_that_is_not_ours_to_write_is_read_all_the_same(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hashes are compared at every start, since nothing can be remembered there."""
    manifest = read_prepared(str(served.folder))
    monkeypatch.setattr(elsewhere.open_tokens.__globals__["Verified"], "__exit__", lambda *_: None)
    tokens = open_prepared(str(served.folder), manifest, tmp_path / "cache", 0)
    assert len(tokens.sequences("web", "train")[:]) == 50 and not os.path.exists(served.folder / ".verified.json")
