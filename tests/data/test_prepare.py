"""Preparing data: what comes out, what stays the same, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shearling.config import parse
from shearling.data import pack
from shearling.data import prepare as prepare_module
from shearling.data.config import DataConfig
from shearling.data.pack import Progress
from shearling.data.prepare import prepare
from shearling.data.tokens import open_tokens
from shearling.errors import DataError, OutputError

T = 16
Texts = Callable[..., list[str]]
Jsonl = Callable[[Path, Iterable[str]], Path]


def config(domains: dict[str, Any], **fields: Any) -> DataConfig:
    return parse(DataConfig, {"sequence_length": T, "heldout_sequences": 20, "domains": domains, **fields})


def documents_of(rows: np.ndarray) -> set[tuple[int, ...]]:
    """The whole documents in the rows of a split."""
    flat, documents = rows[:].reshape(-1).tolist(), set()
    while 0 in flat:
        end = flat.index(0)
        documents.add(tuple(flat[:end]))
        flat = flat[end + 1 :]
    return documents


@pytest.fixture
def web(tmp_path: Path, texts: Texts, jsonl: Jsonl) -> Path:
    return jsonl(tmp_path / "web.jsonl", texts(600, seed=1))


def test_end_to_end(tmp_path: Path, web: Path, texts: Texts, tokenizer: Any) -> None:
    calls: list[Progress] = []
    manifest = prepare(
        config({"web": str(web)}, heldout_sequences=100), tokenizer, len(tokenizer), tmp_path / "out", seed=1,
        progress=calls.append,
    )  # fmt: skip
    facts = manifest["domains"]["web"]
    assert manifest["dtype"] == "<u2"
    assert facts["documents"] + facts["heldout_documents"] == 600
    assert facts["notes"] == [f"web: {facts['heldout_sequences']} of 100 held-out sequences could be filled."]
    tokens = open_tokens(tmp_path / "out")
    assert tokens.domains == ("web",)
    assert (tokens.sequence_length, tokens.vocab_size) == (T, len(tokenizer))
    train, heldout = (tokens.sequences("web", split) for split in ("train", "heldout"))
    assert train.shape == (facts["train_sequences"], T)
    assert heldout.shape == (facts["heldout_sequences"], T)
    whole = [tuple(tokenizer(text)["input_ids"]) for text in texts(600, seed=1)]
    assert documents_of(train) | documents_of(heldout) <= set(whole)
    assert not documents_of(train) & documents_of(heldout)
    assert facts["tokens"] == sum(map(len, whole)) + 600  # one </s> each; nothing was over the limit
    assert facts["bytes"] == sum(len(text.encode()) for text in texts(600, seed=1))
    in_order = [document for document in whole if document not in documents_of(heldout)]
    assert train[:-2].reshape(-1).tolist() == [id_ for document in in_order for id_ in (*document, 0)][: train[:-2].size]
    last = calls[-1]
    assert (last.domain, last.documents, last.tokens, last.share, last.seconds_left) == ("web", 600, facts["tokens"], 1, 0)
    assert last.documents_per_second == 600 / last.seconds


def test_bos_only_where_the_tokenizer_adds_it(tmp_path: Path, web: Path, tokenizer_factory: Callable[..., Any]) -> None:
    for bos in (False, True):
        tokenizer = tokenizer_factory(bos=bos)
        prepare(config({"web": str(web)}), tokenizer, len(tokenizer), tmp_path / f"out{bos}", seed=1)
        flat = open_tokens(tmp_path / f"out{bos}").sequences("web", "train")[:].reshape(-1)
        after = flat[1:][flat[:-1] == 0]
        assert (flat[0] == 1) == bos
        assert (after == 1).all() if bos else (flat != 1).all()


def test_wide_vocabularies_take_32_bits(tmp_path: Path, web: Path, tokenizer: Any) -> None:
    manifests = {size: prepare(config({"web": str(web)}), tokenizer, size, tmp_path / str(size), seed=1) for size in (65536, 65537)}
    assert [manifest["dtype"] for manifest in manifests.values()] == ["<u2", "<u4"]
    small, large = (open_tokens(tmp_path / str(size)).sequences("web", "train") for size in manifests)
    assert (small.dtype, large.dtype) == (np.dtype("<u2"), np.dtype("<u4"))
    assert np.array_equal(small, large)


def test_two_runs_give_the_same_bytes_wherever_the_text_lies(
    tmp_path: Path, web: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(config({"web": str(web)}), tokenizer, 100, tmp_path / "one", seed=1)
    (tmp_path / "moved").mkdir()
    shutil.copy(web, tmp_path / "moved")
    tokenizer(["w1 w2", "w3"], padding=False, truncation=True, max_length=1)  # leaves its traces in the backend
    monkeypatch.setattr(pack, "_BATCH_DOCUMENTS", 7)
    prepare(config({"web": "moved/web.jsonl"}).resolved(tmp_path), tokenizer, 100, tmp_path / "two", seed=1)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["manifest.json", "web.heldout.00000.bin", "web.train.00000.bin"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


def test_complete_output_is_returned_and_another_refused(tmp_path: Path, web: Path, tokenizer: Any, texts: Texts, jsonl: Jsonl) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty directory is as good as none
    first = prepare(config({"web": str(web)}), tokenizer, 100, out, seed=1)
    before = (out / "web.train.00000.bin").stat().st_mtime_ns
    assert prepare(config({"web": {"train": str(web), "weight": 2.0}}), tokenizer, 100, out, seed=1) == first
    assert (out / "web.train.00000.bin").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="sequence_length: 16 there, 32 asked for"):
        prepare(config({"web": str(web)}, sequence_length=32), tokenizer, 100, out, seed=1)
    with pytest.raises(OutputError, match="seed: 1 there, 2 asked for; vocab_size: 100 there, 101 asked for"):
        prepare(config({"web": str(web)}), tokenizer, 101, out, seed=2)
    jsonl(web, texts(601, seed=1))
    with pytest.raises(OutputError, match=r"domains\.web\.train_files\.bytes"):
        prepare(config({"web": str(web)}), tokenizer, 100, out, seed=1)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("sequence_length", lambda values: values.update(sequence_length=17)),
        ("heldout_sequences", lambda values: values.update(heldout_sequences=3)),
        ("max_train_sequences", lambda values: values.update(max_train_sequences=5)),
        ("domains.web.text_field", lambda values: values["domains"]["web"].update(text_field="body")),
        ("domains.web.train_files.count", lambda values: values["domains"]["web"].update(train=["web.jsonl", "more.jsonl"])),
        ("domains.web.train_files.names_and_sizes", lambda values: values["domains"]["web"].update(train="other.jsonl")),
        ("domains.web.heldout_files.count", lambda values: values["domains"]["web"].update(heldout="more.jsonl")),
        ("domains.web.dataset", lambda values: values["domains"]["web"].update(train=None, dataset="org/name")),
        ("domains.code.train_files.count", lambda values: values["domains"].update(code={"train": "more.jsonl"})),
        ("vocab_size", lambda values: values.update(vocab_size=101)),
        ("tokenizer", lambda values: values.update(bos=True)),
        ("seed", lambda values: values.update(seed=2)),
    ],
)
def test_every_changed_setting_is_named(
    tmp_path: Path, texts: Texts, jsonl: Jsonl, tokenizer_factory: Callable[..., Any], field: str, change: Callable[[Any], None]
) -> None:
    """Field by field, with both values, before anything is read or written."""
    for name, number in (("web", 30), ("other", 30), ("more", 9)):
        jsonl(tmp_path / f"{name}.jsonl", texts(number, seed=number))
    values: dict[str, Any] = {"sequence_length": T, "domains": {"web": {"train": "web.jsonl"}}}

    def prepare_with(values: dict[str, Any]) -> None:
        rest = {"vocab_size": 100, "seed": 1, "bos": False} | values
        vocab_size, seed, bos = (rest.pop(name) for name in ("vocab_size", "seed", "bos"))
        data = parse(DataConfig, rest).resolved(tmp_path)
        prepare(data, tokenizer_factory(bos=bos), vocab_size, tmp_path / "out", seed=seed)

    prepare_with(values)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    change(values)
    with pytest.raises(OutputError) as caught:
        prepare_with(values)
    difference = next(part for part in str(caught.value).partition("(")[2].split("; ") if part.startswith(f"{field}: "))
    there, asked = difference.removeprefix(f"{field}: ").split(" there, ")
    assert there != asked.removesuffix(" asked for")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_foreign_outputs_are_refused(tmp_path: Path, web: Path, tokenizer: Any) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="holds no prepared data"):
        prepare(config({"web": str(web)}), tokenizer, 100, tmp_path / "mine", seed=1)
    with pytest.raises(OutputError, match="no directory"):
        prepare(config({"web": str(web)}), tokenizer, 100, web, seed=1)


def test_duplicates_are_used_once(tmp_path: Path, texts: Texts, jsonl: Jsonl, tokenizer: Any) -> None:
    unique = texts(300, seed=2)
    path = jsonl(tmp_path / "a.jsonl", [*unique, "  \n", *unique[:50]])
    facts = prepare(config({"web": str(path)}), tokenizer, 100, tmp_path / "out", seed=1)["domains"]["web"]
    assert facts["duplicate_documents"] == 50
    assert facts["documents"] + facts["heldout_documents"] == 300


def test_what_is_held_out_stays_so_when_files_are_added(tmp_path: Path, texts: Texts, jsonl: Jsonl, tokenizer: Any) -> None:
    jsonl(tmp_path / "b" / "b.jsonl", texts(400, seed=3))
    fields = {"heldout_sequences": 1000}
    prepare(config({"web": str(tmp_path / "b")}, **fields), tokenizer, 100, tmp_path / "one", seed=1)
    jsonl(tmp_path / "b" / "a.jsonl", texts(400, seed=4))
    prepare(config({"web": str(tmp_path / "b")}, **fields), tokenizer, 100, tmp_path / "two", seed=1)
    heldout = [documents_of(open_tokens(tmp_path / name).sequences("web", "heldout")) for name in ("one", "two")]
    train = [documents_of(open_tokens(tmp_path / name).sequences("web", "train")) for name in ("one", "two")]
    assert not heldout[0] & train[1]
    assert not train[0] & heldout[1]


def test_heldout_documents_beyond_the_limit_are_not_trained_on(tmp_path: Path, web: Path, texts: Texts, tokenizer: Any) -> None:
    prepare(config({"web": str(web)}, heldout_sequences=2), tokenizer, 100, tmp_path / "out", seed=1)
    tokens = open_tokens(tmp_path / "out")
    assert len(tokens.sequences("web", "heldout")) == 2
    train = documents_of(tokens.sequences("web", "train"))
    aside = []
    for text in texts(600, seed=1):
        digest = hashlib.sha256(text.encode()).digest()[:16]
        if pack.is_heldout(digest, 1, pack.LEAST_PART):
            aside.append(tuple(tokenizer(text)["input_ids"]))
    assert len(aside) > 3
    assert not train & set(aside)


def test_heldout_files_of_its_own(tmp_path: Path, texts: Texts, jsonl: Jsonl, tokenizer: Any) -> None:
    train, heldout = texts(40, seed=5), texts(10, seed=6)
    jsonl(tmp_path / "text" / "train.jsonl", [*train, *heldout[:3]])
    own = jsonl(tmp_path / "text" / "heldout.jsonl", heldout)
    other = jsonl(tmp_path / "other.jsonl", [*texts(40, seed=7), heldout[9]])
    domains = {"web": {"train": str(tmp_path / "text"), "heldout": str(own)}, "code": str(other)}
    manifest = prepare(config(domains, heldout_sequences=5), tokenizer, 100, tmp_path / "out", seed=1)
    web, code = manifest["domains"]["web"], manifest["domains"]["code"]
    assert (web["documents"], web["overlapping_documents"], code["overlapping_documents"]) == (40, 3, 1)
    tokens = open_tokens(tmp_path / "out")
    wanted = [id_ for text in heldout for id_ in [*tokenizer(text)["input_ids"], 0]]
    assert tokens.sequences("web", "heldout")[:].reshape(-1).tolist() == wanted[: 5 * T]
    for domain in tokens.domains:
        assert not documents_of(tokens.sequences(domain, "train")) & {tuple(tokenizer(text)["input_ids"]) for text in heldout}


def test_few_documents_are_split_inside(tmp_path: Path, texts: Texts, tokenizer: Any) -> None:
    for name, seed in (("a", 8), ("b", 9)):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"w{n % 60}" for n in range(seed, seed + 2000)))
    manifest = prepare(config({"books": str(tmp_path / "*.txt")}, heldout_sequences=8), tokenizer, 100, tmp_path / "out", seed=1)
    facts = manifest["domains"]["books"]
    assert facts["heldout_sequences"] == 8
    assert "2 documents are too few to hold out whole ones" in facts["notes"][0]
    tokens = open_tokens(tmp_path / "out")
    whole = [tokenizer((tmp_path / f"{name}.txt").read_text())["input_ids"] for name in "ab"]
    tail = 8 * T // 2  # as much of each as fills the rows together
    heldout = [*whole[0][-tail:], 0, *whole[1][-tail:], 0]
    train = [*whole[0][:-tail], 0, *whole[1][:-tail], 0]
    assert tokens.sequences("books", "heldout")[:].reshape(-1).tolist() == heldout[: 8 * T]
    assert tokens.sequences("books", "train")[:].reshape(-1).tolist() == train[: len(train) // T * T]
    most = prepare(config({"books": str(tmp_path / "*.txt")}, heldout_sequences=500), tokenizer, 100, tmp_path / "most", seed=1)
    assert most["domains"]["books"]["heldout_sequences"] == 2 * (200 + 1) // T
    assert "25 of 500 held-out sequences could be filled" in most["domains"]["books"]["notes"][1]


def test_many_documents_too_short_to_hold_out_whole(tmp_path: Path, jsonl: Jsonl, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [f"{n} " + "w1 " * 10 for n in range(300)])
    facts = prepare(config({"web": str(path)}, sequence_length=128), tokenizer, 100, tmp_path / "out", seed=1)["domains"]["web"]
    assert "300 documents are too short" in facts["notes"][0]
    assert facts["heldout_sequences"] > 0


def test_reading_stops_when_both_sides_are_filled(tmp_path: Path, texts: Texts, jsonl: Jsonl, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", texts(2000, seed=1))
    with path.open("a") as file:
        file.write("this line is never reached")
    facts = prepare(config({"web": str(path)}, heldout_sequences=3, max_train_sequences=11), tokenizer, 100, tmp_path / "out", seed=1)[
        "domains"
    ]["web"]
    assert (facts["train_sequences"], facts["heldout_sequences"]) == (11, 3)
    assert facts["tokens"] == 14 * T


def test_all_missing_files_are_reported_before_anything_else(tmp_path: Path, web: Path, tokenizer: Any) -> None:
    domains = {
        "web": str(web),
        "a": "no.jsonl",
        "b": {"train": str(web), "heldout": ["x.txt", "y.txt"]},
        "c": {"train": str(web), "heldout": str(web)},
    }
    with pytest.raises(DataError) as caught:
        prepare(config(domains).resolved(tmp_path), tokenizer, 100, tmp_path / "out", seed=1)
    assert [problem.field for problem in caught.value.problems] == [
        "domains.a.train", "domains.b.heldout", "domains.b.heldout", "domains.c.train",
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_domains_without_text_are_reported_together_before_tokenising(
    tmp_path: Path, web: Path, jsonl: Jsonl, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "pack_domain", None)
    empty, blank = jsonl(tmp_path / "a.jsonl", []), jsonl(tmp_path / "b.jsonl", [" \n"])
    held = jsonl(tmp_path / "c.jsonl", ["w1"])
    copy = jsonl(tmp_path / "d.jsonl", ["w1"])
    domains = {"web": str(web), "a": str(empty), "b": str(blank), "c": {"train": str(copy), "heldout": [str(held)]}}
    with pytest.raises(DataError) as caught:
        prepare(config(domains), tokenizer, 100, tmp_path / "out", seed=1)
    assert [(problem.field, problem.found) for problem in caught.value.problems] == [
        ("domains.a", "no text"),
        ("domains.b", "no text"),
        ("domains.c", "1 documents, all of them held out"),
    ]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


@pytest.mark.parametrize(("words", "heldout", "remedy"), [(10, 0, "about 176 tokens"), (100, 0, "about 176"), (100, 3, "held-out text")])
def test_text_shorter_than_a_sequence(tmp_path: Path, jsonl: Jsonl, tokenizer: Any, words: int, heldout: int, remedy: str) -> None:
    domain: dict[str, Any] = {"train": str(jsonl(tmp_path / "a.jsonl", ["w1 " * words]))}
    if heldout:
        domain["heldout"] = str(jsonl(tmp_path / "b.jsonl", ["w2 " * heldout]))
    with pytest.raises(DataError) as caught:
        prepare(config({"web": domain}), tokenizer, 100, tmp_path / "out", seed=1)
    (problem,) = caught.value.problems
    assert problem.field == "domains.web"
    assert "tokens, with sequence_length 16" in problem.found
    assert remedy in problem.remedy
    assert not (tmp_path / "out").exists()


def test_short_domains_are_found_before_long_ones_are_tokenised(tmp_path: Path, web: Path, jsonl: Jsonl, tokenizer: Any) -> None:
    seen: list[str] = []
    domains = {"web": str(web), "short": str(jsonl(tmp_path / "a.jsonl", ["w1"]))}
    with pytest.raises(DataError, match="domain short is too short"):
        prepare(config(domains), tokenizer, 100, tmp_path / "out", seed=1, progress=lambda now: seen.append(now.domain))
    assert set(seen) == {"short"}


def test_tokenizers_that_do_not_fit(tmp_path: Path, web: Path, tokenizer: Any, tokenizer_factory: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="63 tokens where the model has 62"):
        prepare(config({"web": str(web)}), tokenizer, 62, tmp_path / "out", seed=1)
    with pytest.raises(DataError, match="eos_token"):
        prepare(config({"web": str(web)}), tokenizer_factory(eos=False), 100, tmp_path / "out", seed=1)
    with pytest.raises(DataError, match="fast tokenizer"):
        prepare(config({"web": str(web)}), "abc", 100, tmp_path / "out", seed=1)


def test_ids_beyond_the_vocabulary(tmp_path: Path, web: Path, tokenizer_factory: Callable[..., Any]) -> None:
    sparse = tokenizer_factory()
    backend = json.loads(sparse.backend_tokenizer.to_str())
    backend["model"]["vocab"]["w7"] = 900  # as many tokens as before, with a hole
    from transformers import PreTrainedTokenizerFast

    holed = PreTrainedTokenizerFast(
        tokenizer_object=sparse.backend_tokenizer.__class__.from_str(json.dumps(backend)), unk_token="<unk>", eos_token="</s>"
    )
    with pytest.raises(DataError, match="the id 900 where the model has 100 tokens"):
        prepare(config({"web": str(web)}), holed, 100, tmp_path / "out", seed=1)


@pytest.mark.parametrize("limit", [None, 40])
def test_batches_and_threads_leave_no_trace(
    tmp_path: Path, texts: Texts, jsonl: Jsonl, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """Nor in the counts of what was dropped, though more is read ahead than is used."""
    unique = texts(400, seed=3)
    lines = [*unique[:100], *unique[:30], "", *unique[100:300], *unique[90:120], *unique[300:], *unique[:5]]
    data = config({"web": str(jsonl(tmp_path / "a.jsonl", lines))}, heldout_sequences=3, max_train_sequences=limit)
    found = []
    for number, (documents, characters, ahead) in enumerate([(1, 1, 1), (7, 2**20, 2), (10**6, 900, 5), (10**6, 2**20, 2)]):
        monkeypatch.setattr(pack, "_BATCH_DOCUMENTS", documents)
        monkeypatch.setattr(pack, "_BATCH_CHARACTERS", characters)
        monkeypatch.setattr(pack, "_AHEAD", ahead)
        prepare(data, tokenizer, 100, tmp_path / str(number), seed=1)
        found.append({path.name: path.read_bytes() for path in (tmp_path / str(number)).iterdir() if path.suffix in (".json", ".bin")})
    assert all(files == found[0] for files in found)
    facts = json.loads(found[0]["manifest.json"])["domains"]["web"]
    assert facts["duplicate_documents"] == (65 if limit is None else 0)
    assert len(found[0]) == 3


def test_what_reading_drops_is_counted(tmp_path: Path, texts: Texts, jsonl: Jsonl, tokenizer: Any) -> None:
    """On both sides, and the first broken documents are named."""
    train, own = jsonl(tmp_path / "train.jsonl", texts(300, seed=1)), jsonl(tmp_path / "own.jsonl", texts(30, seed=2))
    for path, broken in ((train, ["{", '{"other": 1}']), (own, ['{"text": 3}'])):
        path.write_text("\n".join([*broken, path.read_text()]))
    data = config({"web": {"train": str(train), "heldout": str(own)}}, bad_documents="skip")
    facts = prepare(data, tokenizer, 100, tmp_path / "out", seed=1)["domains"]["web"]
    assert (facts["skipped_documents"], facts["filtered_documents"], facts["documents"]) == (3, 0, 300)
    (note,) = [note for note in facts["notes"] if "broken" in note]
    assert note.startswith("web: 3 broken documents were left out, the first at ")
    assert [f"{path}: line {line}" in note for path, line in ((own, 1), (train, 1), (train, 2))] == [True] * 3


def test_a_long_domain_is_cut_into_shards(tmp_path: Path, web: Path, tokenizer: Any) -> None:
    """The rows are those of one shard, and one damaged shard is made anew with its domain."""
    one = prepare(config({"web": str(web)}), tokenizer, 100, tmp_path / "one", seed=1)
    facts = prepare(config({"web": str(web)}), tokenizer, 100, tmp_path / "many", seed=1, shard_tokens=2048)["domains"]["web"]
    shards = facts["shards"]["train"]
    assert len(shards) > 5 and [shard["sequences"] for shard in shards[:-1]] == [128] * (len(shards) - 1)
    rows = [open_tokens(tmp_path / name).sequences("web", "train")[:] for name in ("one", "many")]
    assert np.array_equal(*rows) and len(rows[0]) == one["domains"]["web"]["train_sequences"]
    file = tmp_path / "many" / "web.train.00003.bin"
    sound = file.read_bytes()
    file.write_bytes(sound[:-1])
    prepare(config({"web": str(web)}), tokenizer, 100, tmp_path / "many", seed=1, shard_tokens=2048)
    assert file.read_bytes() == sound
    with pytest.raises(OutputError, match="shard_sequences: 128 there, 4194304 asked for"):
        prepare(config({"web": str(web)}), tokenizer, 100, tmp_path / "many", seed=1)
