"""A causal language model and its tokenizer from a folder or a hub, with LoRA merged or weights quantised if asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from e2p.config import BackboneConfig
from e2p.device import resolve_device
from e2p.errors import BackboneError, MissingExtraError


def load_causal_lm(config: BackboneConfig) -> tuple[Any, Any]:
    """Model, on its device, and fast tokenizer.

    Raises:
        BackboneError: one line on what could not be loaded.
        MissingExtraError: LoRA or quantisation is asked for and its package is missing.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not config.model:
        raise BackboneError("backbone.model: expected a folder or a hub id, got nothing; set it")
    device = resolve_device(config.device, "backbone.device")
    dtype: Any = config.dtype
    if dtype == "auto":
        dtype = torch.float32 if device == "cpu" else "auto"
    common: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    options = {**common, "dtype": dtype}
    if config.attn != "auto":  # transformers knows which families a fused kernel would get wrong
        options["attn_implementation"] = config.attn
    if config.quantization != "none":
        options["quantization_config"] = _quantization(config.quantization)
        options["device_map"] = {"": device}
    try:
        with quiet_if_small(config.model):
            tokenizer = AutoTokenizer.from_pretrained(config.model, **common)
            model = AutoModelForCausalLM.from_pretrained(config.model, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise BackboneError(
            f"backbone.model: expected a causal language model at '{config.model}', got: {reason_of(config, error)}"
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise BackboneError(f"backbone.model: '{config.model}' has no fast tokenizer; add a tokenizer.json")
    if config.lora:
        model = _merged(model, config.lora)
    if config.quantization == "none":
        model = model.to(device)
    return model, tokenizer


def reason_of(config: BackboneConfig, error: Exception) -> str:
    """One line of a library's complaint; what it says of a hub is beside the point where a folder was meant."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return text if Path(config.model).exists() else f"no such folder here, and of a hub: {text}"


@contextlib.contextmanager
def quiet_if_small(model: str) -> Iterator[None]:
    """Hide transformers' loading bar for a folder of less than a gigabyte, which loads at once."""
    from transformers.utils import logging

    files = Path(model).glob("*.safetensors") if Path(model).is_dir() else []
    sizes = [file.stat().st_size for file in files]
    if not sizes or sum(sizes) > 2**30 or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _quantization(kind: str) -> Any:
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise BackboneError("backbone.quantization needs the package 'bitsandbytes': pip install bitsandbytes")
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)


def _merged(model: Any, lora: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise MissingExtraError("peft", "peft", "backbone.lora") from None
    try:
        return PeftModel.from_pretrained(model, lora).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BackboneError(f"backbone.lora: expected a PEFT adapter at '{lora}', got: {reason}") from None
