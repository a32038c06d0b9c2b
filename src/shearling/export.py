"""Write a Hugging Face directory that is known to load: staged, reloaded by plain transformers, compared, then renamed into place."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shearling.arch.families import SHEARED, anatomy_of
from shearling.errors import NumericsError
from shearling.io.files import (
    check_writable,
    publish_directory,
    refuse_existing,
    remove_tree,
    replace_directory,
    stage_directory,
    storage_errors,
    sweep_temporary,
    write_atomic,
)
from shearling.io.loading import NOT_OURS, load_stock
from shearling.io.tensors import ShardWriter
from shearling.prune.pad import pad_to_uniform, padded_config, padding_cost
from shearling.prune.verify import Difference, difference_of, logits_of, require_equal, require_same_function
from shearling.sources import Source

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

TOLERANCE = {"float64": 1e-8, "float32": 1e-4}
"""Largest difference of a logit, relative to the range of the logits, between the model in memory and the one reloaded."""
TOLERANCE_ELSE = 2e-2
SHARD_BYTES = 5 * 10**9


@contextlib.contextmanager
def staging(final: Path, replace: bool = False, needed: int = 0) -> Iterator[Path]:
    """An empty directory to fill; on success it gets the name `final` in one rename, on any error it is removed.

    Before any work: `OutputError` where `final` exists (unless `replace`), `StorageError` where it cannot be written or fewer
    than `needed` bytes are free.
    """
    if not replace:
        refuse_existing(final)
    check_writable(final, needed)
    sweep_temporary(final.parent, final.name)
    staged = stage_directory(final)
    try:
        yield staged
        (replace_directory if replace else publish_directory)(staged, final)
    except BaseException:
        if staged.exists():
            remove_tree(staged)
        raise


def stage_model(staged: Path, config: Mapping[str, Any], companions: Callable[[Path], None], dtype: torch.dtype) -> None:
    """Write config.json and what `companions` writes (tokenizer, chat template, generation config) to a directory.

    `config`: the plain values of a config.json, with the sizes of the model being written. `architectures`, `dtype` and
    `transformers_version` are filled in, and where blocks differ the code that loads it is put beside it; what held for the source
    alone (quantisation, custom code) is left out.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    anatomy_of(config)
    values = {key: value for key, value in config.items() if key not in (*NOT_OURS, "torch_dtype")}
    if config["model_type"] == SHEARED:
        from shearling import modeling_sheared

        values |= {"architectures": [modeling_sheared.ShearedForCausalLM.__name__], "auto_map": modeling_sheared.AUTO_MAP}
        shutil.copyfile(modeling_sheared.__file__, staged / "modeling_sheared.py")
    else:
        values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
    values["dtype"] = str(dtype).removeprefix("torch.")
    values["transformers_version"] = transformers.__version__
    companions(staged)
    write_atomic(staged / "config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")


def check_reload(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a directory as any user will, with plain transformers, and return the model (eval mode, CPU).

    Raises `ArtifactError` where a weight is missing, unexpected, of another shape, not finite, or not tied as the config says.
    """
    return load_stock(directory, dtype, str(directory))


def publish_model(
    write: Callable[[ShardWriter], None],
    config: Mapping[str, Any],
    companions: Callable[[Path], None],
    final: Path,
    dtype: torch.dtype,
    verify: Callable[[PreTrainedModel], None],
    replace: bool = False,
) -> Path:
    """Write a model directory tensor by tensor, reload it with plain transformers, `verify` that model, then publish it.

    `write` adds every tensor, in `dtype`, under its full name. Whatever raises on the way, nothing is published.
    """
    needed = anatomy_of(config).parameters() * dtype.itemsize
    with staging(final, replace, needed) as staged:
        with ShardWriter(staged, SHARD_BYTES) as writer:
            write(writer)
        with storage_errors(final, needed):
            stage_model(staged, config, companions, dtype)
        verify(check_reload(staged, dtype))
    return final


def save_weights(
    weights: Mapping[str, Tensor],
    expected_BTV: Tensor,
    sample_ids: Tensor,
    config: Mapping[str, Any],
    companions: Callable[[Path], None],
    final: Path,
    dtype: torch.dtype,
    replace: bool = False,
    document_end: int | None = None,
) -> Path:
    """Publish a model given by its weights (name -> whole tensor), cast to `dtype`; a tied `lm_head` is not written.

    `expected_BTV` are the model's logits for `sample_ids` [batch, position]; the reloaded model's, computed in the same dtype, are
    compared with them. `document_end` as for `shearling.inputs.model_inputs`. Raises `NumericsError`, with nothing published, where a
    weight or the logits differ. Memory: one shard and the reloaded model.
    """
    names = anatomy_of(config).tensors()

    def write(writer: ShardWriter) -> None:
        for name in names:
            writer.add(name, weights[name].detach().to(dtype))

    def verify(reloaded: PreTrainedModel) -> None:
        _compare_weights({name: weights[name] for name in names}, reloaded, dtype)
        found = logits_of(reloaded.to(sample_ids.device, expected_BTV.dtype), sample_ids, document_end)
        compare_logits(expected_BTV, found, dtype)

    return publish_model(write, config, companions, final, dtype, verify, replace)


def save_padded(source: Source, final: Path) -> dict[str, float]:
    """Publish a model whose blocks differ as a stock checkpoint that computes the same: every block as large as the largest.

    Replaces what is at `final`. The weights keep their dtype; logits are compared in fp32 and, where rounding may be seen, in fp64.

    Returns:
        `before` and `after`: parameters; `ratio`: what that costs; `relative_difference`: of the logits.
    """
    import torch

    reader = source.reader()
    uniform, tensors = pad_to_uniform(source.anatomy, reader)
    ids_BT = torch.arange(64).reshape(2, 32) % source.anatomy.sizes["vocab"]
    original, dtype = source.load_model(), reader.get(next(iter(source.anatomy.tensors()))).dtype
    expected_BTV, found = logits_of(original, ids_BT), padding_cost(source.anatomy)

    def write(writer: ShardWriter) -> None:
        for name, tensor in tensors:
            writer.add(name, tensor)

    def verify(padded: PreTrainedModel) -> None:
        def exact() -> Difference:
            return difference_of(logits_of(original.double(), ids_BT), logits_of(padded.double(), ids_BT))

        difference = difference_of(expected_BTV, logits_of(padded.float(), ids_BT))
        decided = require_same_function(difference, exact, "the model and the padded one")
        found["relative_difference"] = decided.relative_difference

    publish_model(write, padded_config(source.config, uniform), source.save_companions, final, dtype, verify, replace=final.exists())
    return found


def compare_logits(expected: Tensor, found: Tensor, dtype: torch.dtype) -> float:
    """Largest difference relative to the range of `expected` (both [batch, position, vocab]); `NumericsError` beyond tolerance."""
    difference = difference_of(expected, found)
    tolerance = TOLERANCE.get(str(dtype).removeprefix("torch."), TOLERANCE_ELSE)
    require_equal(difference, tolerance, "the model and what was written of it")
    return difference.relative_difference


def _compare_weights(weights: Mapping[str, Tensor], reloaded: PreTrainedModel, dtype: torch.dtype) -> None:
    import torch

    found = reloaded.state_dict()
    for name, value in weights.items():
        if name not in found or not torch.equal(value.detach().to(dtype).cpu(), found[name].cpu()):
            raise NumericsError(f"weight {name} differs between the model and what was written; nothing was published. This is a bug")
