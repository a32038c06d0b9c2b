"""Loading a model with plain transformers, and refusing what it would let pass: random weights, leftovers, NaN."""

from __future__ import annotations

import contextlib
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shearling.errors import ArtifactError, Problem, ShearlingError
from shearling.io.files import read_json
from shearling.io.tensors import TensorReader, shortened

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ATTENTION = ("attn_implementation", "_attn_implementation")
NOT_OURS = ("quantization_config", "auto_map", "_name_or_path", "_model_name_or_path", "transformers_weights", *ATTENTION)
"""Config fields that do not hold for the models we write: quantised weights, custom code, where the source lay, how it was run."""

_OWN_ATTENTION = (None, "eager", "sdpa", "flex_attention")
_DISTRIBUTED = re.compile("shard-[0-9]{5}-model-")

HEAD = "lm_head.weight"
UNTIED = Problem(
    "tie_word_embeddings",
    f"true, but {HEAD} in the files differs from the embedding",
    f"Set it to false in config.json, or remove {HEAD} from the files, whichever is true.",
)


def load_stock(directory: Path, dtype: torch.dtype, where: str, **options: Any) -> PreTrainedModel:
    """Load a directory as any user would, with plain transformers; the model is in eval mode on the CPU.

    No code of the model's runs, no pickle is read, nothing is downloaded. Raises `ArtifactError` where a weight is missing,
    unexpected, of another shape, not finite, or not tied as the config says, and for what `check_directory` refuses. `options`
    go to `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if "gguf_file" not in options:
        check_directory(directory, where)

    logging.disable_progress_bar()  # of a second or two, and in the middle of our own
    with artifact_errors(where, "weights", "Get the model again."):
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported then, and refused below by name
            **options,
        )
    check_loading(info, model, where)
    check_finite(model, where)
    return model.eval()


def check_directory(directory: Path, where: str) -> None:
    """Raise `ArtifactError` where transformers would read other weights than those of `TensorReader`, or fetch code for them.

    That is, for what stands above model.safetensors in its eyes: a distributed checkpoint's shards, `transformers_weights` of the
    config, an adapter; and for a config that asks for an attention kernel, which is code from the hub. Headers and the names in an
    index are checked, too; a directory without safetensors is left to transformers to refuse.
    """
    config = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    values = config if isinstance(config, dict) else {}
    problems = []
    shards = sorted(path.name for path in directory.iterdir() if _DISTRIBUTED.match(path.name)) if directory.is_dir() else []
    if shards:
        remedy = "Transformers would read these in place of model.safetensors; consolidate them, or move them away."
        problems.append(Problem("files", ", ".join(shards[:3]), remedy))
    if values.get("transformers_weights") is not None:
        remedy = "Remove this field, and name the weights model.safetensors."
        problems.append(Problem("transformers_weights", reprlib.repr(values["transformers_weights"]), remedy))
    for field in ATTENTION:
        if values.get(field) not in _OWN_ATTENTION:
            remedy = "Remove this field: kernels are code, and a model does not choose what code runs."
            problems.append(Problem(field, reprlib.repr(values[field]), remedy))
    if (directory / "adapter_config.json").exists():
        remedy = "An adapter would change the weights while loading; merge it into the model, or move it away."
        problems.append(Problem("files", "adapter_config.json", remedy))
    if problems:
        raise ArtifactError(f"{where}: would not load as it stands", problems)
    if any((directory / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        TensorReader(directory)


def check_loading(info: Mapping[str, Any], model: PreTrainedModel, where: str) -> None:
    """Raise `ArtifactError` unless transformers found each weight in the files and used each, and tied what the config ties."""
    remedies = {
        "missing_keys": "Transformers filled it at random; get the model again.",
        "unexpected_keys": "The model class has no such weight; weights and config do not belong together.",
        "mismatched_keys": "Its shape differs from the config's; weights and config do not belong together.",
        "error_msgs": "Get the model again.",
    }
    problems = [Problem(key, str(item), remedy) for key, remedy in remedies.items() for item in sorted(map(str, info.get(key) or ()))]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(model.config, "tie_word_embeddings", False) and head.weight is not embedding.weight:
        problems.append(UNTIED)
    if problems:
        raise ArtifactError(f"{where}: the files do not hold exactly this model", shortened(problems))


def check_finite(model: torch.nn.Module, where: str) -> None:
    """Raise `ArtifactError` naming every parameter of `model` that holds NaN or infinity."""
    problems = []
    for name, parameter in model.named_parameters():
        bad = int((~parameter.detach().isfinite()).sum())
        if bad:
            remedy = "A weight must be finite; get the model again, or load it in a wider dtype."
            problems.append(Problem(name, f"{bad} of {parameter.numel()} values NaN or infinite", remedy))
    if problems:
        raise ArtifactError(f"{where}: weights that are not finite", shortened(problems))


@contextlib.contextmanager
def artifact_errors(name: str, field: str, remedy: str) -> Iterator[None]:
    """Turn what transformers raises over files that it cannot read into an `ArtifactError`."""
    try:
        yield
    except (ShearlingError, MemoryError):
        raise
    except Exception as error:  # a damaged file surfaces in transformers as anything from OSError to StrictDataclassError
        found = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ArtifactError(f"{name}: transformers cannot read its {field}", [Problem(field, found, remedy)]) from error
