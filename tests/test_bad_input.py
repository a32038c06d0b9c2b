"""Bad input through the command line: one clear message, the documented exit code, and nothing under a final name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import save_tiny_source, tiny_tokenizer
from runs import contents, forked, recipe_values
from shearling import cli
from shearling.io.files import RunLock
from shearling.train import loop

FINAL = ("data", "pruned", "model", "plan.json", "report.json", "report.html", "metrics.jsonl")


@pytest.fixture(scope="module")
def good(good_source: Path, domains: dict[str, str]) -> dict[str, Any]:
    """Plain values of a recipe with nothing wrong."""
    return recipe_values(good_source, domains)


class Command:
    """Runs the command line in this process and looks at how it ended."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.out, self._monkeypatch, self._capsys = folder, folder / "out", monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """Exit code, and standard error as one line of words."""
        self._monkeypatch.setattr("sys.argv", ["shearling", *arguments])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return code if isinstance(code, int) else 0, " ".join(self._capsys.readouterr().err.split())

    def refused(self, recipe: Path | dict[str, Any], code: int, *words: str, leaves: tuple[str, ...] = ()) -> None:
        """`run` ends with `code` and one message that has all `words`; of what a run publishes there is only `leaves`."""
        path = recipe if isinstance(recipe, Path) else self.folder / "recipe.yaml"
        if isinstance(recipe, dict):
            path.write_text(json.dumps(recipe))
        found, message = self("run", str(path), "--out", str(self.out))
        assert found == code, message
        assert message.count("error:") == 1 and "Traceback" not in message
        for word in words:
            assert word in message, message
        published = {path.name for path in self.out.iterdir()} if self.out.is_dir() else set()
        assert published & set(FINAL) == set(leaves)
        assert not list(self.folder.rglob(".tmp-*"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


@pytest.fixture
def broken(good: dict[str, Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A recipe whose source is a copy with changed tensors or config."""

    def make(change: Callable[[dict[str, torch.Tensor]], Any] | None = None, **config: Any) -> dict[str, Any]:
        copy = Path(shutil.copytree(good["source"], tmp_path / "source"))
        if change is not None:
            tensors = {name: tensor.clone() for name, tensor in load_file(copy / "model.safetensors").items()}
            change(tensors)
            save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        if config:
            (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | config))
        return good | {"source": str(copy)}

    return make


NORM = "model.layers.1.input_layernorm.weight"


def test_a_missing_tensor(run: Command, broken: Callable[..., dict[str, Any]]) -> None:
    run.refused(broken(lambda tensors: tensors.pop(NORM)), 3, NORM)


def test_a_misshapen_tensor(run: Command, broken: Callable[..., dict[str, Any]]) -> None:
    run.refused(broken(lambda tensors: tensors.update({NORM: torch.ones(47)})), 3, NORM, "47", "48")


def test_a_tensor_too_many(run: Command, broken: Callable[..., dict[str, Any]]) -> None:
    run.refused(broken(lambda tensors: tensors.update({"model.extra": torch.ones(3)})), 3, "model.extra")


def test_a_weight_that_is_not_finite(run: Command, broken: Callable[..., dict[str, Any]]) -> None:
    run.refused(broken(lambda tensors: tensors[NORM].fill_(float("nan"))), 3, NORM, leaves=("data",))


def test_a_config_that_is_not_the_weights(run: Command, broken: Callable[..., dict[str, Any]]) -> None:
    run.refused(broken(intermediate_size=44), 3, "mlp", "44")


def test_a_family_that_is_not_known(run: Command, broken: Callable[..., dict[str, Any]]) -> None:
    run.refused(broken(model_type="gpt2"), 3, "gpt2", "qwen3")


def test_no_source(run: Command, good: dict[str, Any]) -> None:
    run.refused(good | {"source": "/nowhere/model"}, 3, "/nowhere/model")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"hidden_size": 96}, ("target.hidden_size", "96", "48")),
        ({"num_hidden_layers": 4, "intermediate_size": 41}, ("num_hidden_layers", "intermediate_size")),
        ({"num_attention_heads": 5, "num_key_value_heads": 2}, ("num_attention_heads", "5", "multiple of 2", "nearest")),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, ("num_attention_heads", "at most 4")),
        ({"hidden_size": 40}, ("hidden_size", "40", "multiple of num_attention_heads (6)", "nearest")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers", "0", "at least 1")),
    ],
)
def test_a_target_that_cannot_be_cut(run: Command, good: dict[str, Any], target: dict[str, int], words: tuple[str, ...]) -> None:
    run.refused(good | {"target": target}, 2, *words)
    assert not run.out.exists()
    code, _ = run("plan", good["source"], "--target", ",".join(f"{field}={size}" for field, size in target.items()))
    assert code == 2


def test_a_tokenizer_with_more_tokens_than_the_model(run: Command, broken: Callable[..., dict[str, Any]]) -> None:
    recipe = broken()
    tiny_tokenizer(97).save_pretrained(recipe["source"])
    run.refused(recipe, 3, "tokenizer", "97", "96")


def test_no_tokenizer(run: Command, broken: Callable[..., dict[str, Any]]) -> None:
    recipe = broken()
    for path in Path(recipe["source"]).glob("tokenizer*"):
        path.unlink()
    run.refused(recipe, 3, "tokenizer")


@pytest.mark.parametrize(("text", "words"), [(None, ("domains.b", "gone.jsonl")), ("", ("domains.b", "no text"))])
def test_a_domain_without_text(run: Command, good: dict[str, Any], tmp_path: Path, text: str | None, words: tuple[str, ...]) -> None:
    path = tmp_path / "gone.jsonl"
    if text is not None:
        path.write_text(text)
    domains = good["data"]["domains"] | {"b": str(path)}
    run.refused(good | {"data": good["data"] | {"domains": domains}}, 3, *words)


def test_text_shorter_than_one_sequence(run: Command, good: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text(json.dumps({"text": "w3 w4 w5"}) + "\n")
    domains = good["data"]["domains"] | {"b": str(path)}
    run.refused(good | {"data": good["data"] | {"domains": domains}}, 3, "domain b", "32")


def test_text_that_is_not_json(run: Command, good: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "torn.jsonl"
    path.write_text('{"text": "w3 w4"}\n{"text": \n')
    domains = good["data"]["domains"] | {"b": str(path)}
    run.refused(good | {"data": good["data"] | {"domains": domains}}, 3, "torn.jsonl", "2")


def test_an_output_that_is_something_else(run: Command, good: dict[str, Any]) -> None:
    run.out.mkdir()
    (run.out / "notes.txt").write_text("mine")
    run.refused(good, 5, str(run.out), "not a run")
    assert contents(run.out) == {"notes.txt": b"mine"}


def test_an_output_in_use(run: Command, good: dict[str, Any]) -> None:
    with RunLock(run.out / ".lock"):
        run.refused(good, 5, "in use", "process")
    assert not (run.out / "recipe.yaml").exists()


def test_an_output_below_a_file(run: Command, good: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run.out = tmp_path / "file" / "out"
    run.refused(good, 6, "not a directory")


def test_an_output_where_nothing_can_be_written(run: Command, good: dict[str, Any]) -> None:
    run.out = Path("/proc/shearling")
    run.refused(good, 6, "/proc/shearling")


def test_no_recipe(run: Command) -> None:
    run.refused(run.folder / "gone.yaml", 2, "gone.yaml", "no such recipe")
    assert not run.out.exists()


def test_a_recipe_with_several_mistakes(run: Command, good: dict[str, Any]) -> None:
    mistakes = {"sead": 3, "prune": {"steps": "many"}, "train": {"learning_rate": -1.0}}
    run.refused(good | mistakes, 2, "3 problems", "sead", "'seed'", "prune.steps", "train.learning_rate")
    assert not run.out.exists()


@pytest.mark.parametrize("device", ["cuda:7", "abacus"])
def test_a_device_that_is_not_there(run: Command, good: dict[str, Any], device: str) -> None:
    run.refused(good | {"runtime": {"device": device}}, 2, "runtime.device", device)
    assert not run.out.exists()


def test_a_damaged_shard_of_tokens(run: Command, good: dict[str, Any]) -> None:
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(json.dumps(good))
    run._monkeypatch.setattr("sys.argv", ["shearling", "prepare", str(recipe), "--out", str(run.out)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    shard = run.out / "data" / "a.train.00000.bin"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    code, message = run("run", str(recipe), "--out", str(run.out))
    assert code == 3 and "a.train.00000.bin" in message and message.count("error:") == 1
    assert not (run.out / "pruned").exists()


def test_an_evaluation_on_text_of_another_model(run: Command, good: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(good))
    assert run("prepare", str(recipe), "--out", str(run.out))[0] == 0
    save_tiny_source(tmp_path / "other", "llama", vocab=98)
    code, message = run("evaluate", str(tmp_path / "other"), "--data", str(run.out), "--no-speed")
    assert code == 3 and "prepared for another model" in message and "fingerprint" in message
    code, message = run("evaluate", good["source"], "--data", str(tmp_path / "nowhere"))
    assert code == 3 and "nowhere" in message
    code, message = run("report", str(tmp_path / "nowhere"))
    assert code == 3 and "not a run directory" in message


@pytest.mark.parametrize("stage", ["prune", "train"])
def test_numbers_that_go_wrong(run: Command, good: dict[str, Any], stage: str) -> None:
    """A learning rate that blows the weights up: the run ends before a model that is not finite gets a name."""
    recipe = good | {stage: good[stage] | {"learning_rate": 1e30}}
    run.folder.joinpath("recipe.yaml").write_text(json.dumps(recipe))
    code, message = run("run", str(run.folder / "recipe.yaml"), "--out", str(run.out))
    assert code == 4 and "step" in message and "learning rate" in message and message.count("error:") == 1, message
    assert not (run.out / "model").exists() and (run.out / "pruned").exists() is (stage == "train")


@pytest.mark.parametrize(("limit", "leaves"), [(500, set()), (8_000, set()), (60_000, {"data"})])
def test_a_full_disk(good: dict[str, Any], tmp_path: Path, limit: int, leaves: set[str]) -> None:
    """No file may grow beyond `limit` bytes: of the recipe, of the token shards, of the weights."""
    recipe, out, stderr = tmp_path / "recipe.yaml", tmp_path / "out", tmp_path / "stderr"
    recipe.write_text(json.dumps(good | {stage: good[stage] | {"steps": 4} for stage in ("prune", "train")}))
    code = forked(["run", str(recipe), "--out", str(out)], stderr, limit)
    message = stderr.read_text()
    assert code == 6, message
    assert message.count("error:") == 1 and "Traceback" not in message and "ulimit -f" in message
    assert {path.name for path in out.iterdir()} & (set(FINAL) - {"metrics.jsonl"}) == leaves
    assert not list(tmp_path.rglob(".tmp-*"))
    assert forked(["run", str(recipe), "--out", str(out)], stderr) == 0, stderr.read_text()


def test_memory_that_runs_out(run: Command, good: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch says it on a CPU; what was finished stays."""

    def step(*args: Any, **kwargs: Any) -> Any:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(loop, "train_step", step)
    run.refused(good, 2, "out of memory in the stage prune", "microbatches", "activation_checkpointing", leaves=("data", "metrics.jsonl"))
