"""Models and tokenizers from elsewhere: opened, or refused in one line, and nothing of them run."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from sparktrain.errors import ModelError


def pretrained(source: str | Path, **options: Any) -> PreTrainedModel:
    """The causal language model in directory ``source`` or of that hub id, weights and all, from safetensors.

    Raises :class:`ModelError` where it cannot be loaded, or lacks some of its weights, which transformers would draw
    by chance.
    """
    quieten()
    try:
        check_config(source, options.get("revision"))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except ModelError:
        raise
    except Exception as error:  # transformers, torch and safetensors have no common type
        raise unusable(str(source), error) from None
    model: PreTrainedModel
    model, found = loaded
    for name, here, there in found["mismatched_keys"]:
        raise ModelError(
            f"model {source} has {name} of shape {list(here)}, by its config.json {list(there)}: they are of two models"
        )
    if lost := sorted(found["missing_keys"]):
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ModelError(f"model {source} lacks the weights of {lost[0]}{more}: it was not copied whole")
    return model


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in directory ``path``; raises :class:`ModelError` where there is none that can be used."""
    if not path.is_dir():
        raise ModelError(f"tokenizer {path} is no directory: give a Hugging Face directory with a tokenizer")
    quieten()
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the tokenizers library raises nothing more special
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"tokenizer {path} cannot be loaded: {reason}; save it again") from None


def check_config(source: str | Path, revision: str | None) -> None:
    """Raises :class:`ModelError` for a config.json that has code fetched and run whatever ``trust_remote_code`` says,
    or is of weights that cannot be trained."""
    values, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    sections = [values, *(value for value in values.values() if isinstance(value, dict))]
    for key, value in ((k, v) for section in sections for k, v in section.items()):
        if "attn_implementation" in key and "/" in str(value):
            raise ModelError(
                f"model {source} asks in its config.json for the code of {value} by {key}, which would be fetched and "
                "run: take that out"
            )
    if method := values.get("quantization_config"):
        kind = method.get("quant_method", "?") if isinstance(method, dict) else method
        raise ModelError(f"model {source} is quantised ({kind}): give the model that it was made from")


def unusable(source: str, error: Exception) -> ModelError:
    """What is wrong with model ``source``, in one line, as the library that loads it says."""
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
    if "trust_remote_code" in str(error):
        said = "it brings Python code of its own, which is run in training only where model.trust_remote_code is set: "
        said += "set that if you trust its author"
    return ModelError(f"model {source} cannot be loaded: {said}")


def quieten() -> None:
    """What is wrong is our line to say; transformers says it first, in several."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
