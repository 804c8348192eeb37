"""`e2p adapt`: teach a language model to speak semantic ids, before it is frozen. No user vector takes part.

A model that was never trained on codes cannot name an item. It is trained on histories alone; phi is then trained in
front of the frozen result, and what E2P gains is what it gains over this model.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from e2p.config import BackboneConfig, Precision, SplitConfig
from e2p.data.splits import SPLITS, resolve_splits
from e2p.data.tables import content_key, example_batches, example_keys
from e2p.data.templates import TextEncoder
from e2p.errors import DataError, RunError
from e2p.items.adapt_training import AdaptSettings, CodeRow, quiet, train
from e2p.items.semantic_ids import SemanticIds
from e2p.items.vocabulary import CodeVocabulary, add_code_tokens, open_codes
from e2p.provenance import provenance

RECORD = "adapt.json"
CODES = "codes"  # the checkpoint carries the codes that it speaks
_CHECKPOINTS = "checkpoints"
_SETTINGS = ".settings.json"


def adapt(
    backbone: str,
    codes: str,
    examples: str,
    output: str,
    method: Literal["full", "lora"] = "full",
    epochs: int = 10,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    warmup_ratio: float = 0.05,
    patience: int = 2,
    history: bool = True,
    profile_share: float = 0.5,
    lora_rank: int = 16,
    max_prompt_tokens: int = 512,
    profile_template: str = "About the user: {profile}",
    precision: Precision = "auto",
    seed: int = 42,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Train a language model to continue a history with the next item's codes, and save it as an ordinary checkpoint.

    Args:
        backbone: folder or hub id of a causal language model.
        codes: folder with codes, as e2p prepare nextitem writes it, or a JSON file of ready ones.
        examples: example table: prompts with items as codes, completions of one item each; a column split or group
            says what is for validation, and test examples are left alone.
        output: folder for the checkpoint. It carries the tokenizer and the codes.
        method: full: all weights; lora: low-rank updates by PEFT, merged at the end, and the codes' embeddings.
        epochs: passes over the training examples.
        batch_size: examples in a step.
        learning_rate: peak of AdamW's.
        weight_decay: AdamW's.
        warmup_ratio: share of the steps with a rising learning rate; it falls as a cosine afterwards.
        patience: stop after this many epochs without a better validation loss; 0: never. The best epoch is kept.
        history: learn from the items within the prompt too, each from those before it, and not from the last alone.
        profile_share: share of the examples that are shown with their text profile, where there is one, so that the
            frozen model can read both.
        lora_rank: of the low-rank updates.
        max_prompt_tokens: longest prompt in tokens; longer ones lose their oldest.
        profile_template: as data.profile_template of the runs to come.
        precision: of the training: bfloat16 autocast where the hardware has it, or float32.
        seed: of the new embeddings, the order of the examples, and who is shown with a profile.
        resume: go on with an interrupted adaptation.
        overwrite: replace an earlier output.

    Raises:
        DataError: an example that is no item of the codes, with its row; no training or validation examples.
        RunError: the output is there already, or there is nothing to resume.
        BackboneError: the model cannot be loaded.
        MissingExtraError: lora without PEFT.
    """
    given = locals()
    settings = AdaptSettings(**{field.name: given[field.name] for field in dataclasses.fields(AdaptSettings)})
    folder = Path(output)
    ids = open_codes(codes)
    asked = {"backbone": backbone, "codes": ids.version, "examples": content_key(examples)}
    asked |= dataclasses.asdict(settings)
    _open_folder(folder, asked, resume, overwrite)
    console = Console(stderr=True)
    with console.status("reading the backbone and the examples"):
        model, tokenizer, fresh = speaking(backbone, ids, settings.seed)
        rows = read_rows(examples, tokenizer, ids, settings, model.config.max_position_embeddings)
    console.print(
        f"{fresh:,} new code tokens; examples: train {len(rows['train']):,}, validation {len(rows['validation']):,}; "
        f"labelled tokens: {sum(row.labelled for row in rows['train']):,}",
        highlight=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _SETTINGS).write_text(json.dumps(asked, indent=1), encoding="utf-8")
    with quiet():
        model, record = train(model, tokenizer, ids, rows, settings, folder / _CHECKPOINTS, console, resume)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids.save(folder / CODES)
    record = {**record, "settings": asked, "codes": ids.report(), "provenance": provenance()}
    # The record last: where it is, the checkpoint is whole.
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)
    (folder / _SETTINGS).unlink()
    console.print(
        f"{folder}: {record['validation']['before']:.4f} nats a token before, {record['validation']['after']:.4f} "
        f"after epoch {record['best_epoch']:g}   next: e2p train with --backbone.model {folder}",
        highlight=False,
    )


def speaking(backbone: str, ids: SemanticIds, seed: int) -> tuple[Any, Any, int]:
    """A language model and its tokenizer with a token for every code; and how many of them are new.

    The new embeddings are drawn around the mean of the old ones, as far from it as those are, seeded.
    """
    import torch

    from e2p.model.loading import load_causal_lm

    model, tokenizer = load_causal_lm(BackboneConfig(model=backbone, dtype="float32"))
    fresh = add_code_tokens(tokenizer, ids)
    old = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > old:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        generator = torch.Generator().manual_seed(seed)
        tables = {id(t.weight): t.weight for t in (model.get_input_embeddings(), model.get_output_embeddings())}
        with torch.no_grad():
            for weight in tables.values():  # one, if the head is tied to the embeddings
                noise = torch.randn(weight[old:].shape, generator=generator).to(weight.device)
                weight[old:] = weight[:old].mean(0) + weight[:old].std(0) * noise
    return model, tokenizer, fresh


def read_rows(
    source: str, tokenizer: Any, ids: SemanticIds, settings: AdaptSettings, window: int | None
) -> dict[str, list[CodeRow]]:
    """The training and validation examples as ids and labels.

    Labels are the completion, its end token included, and with ``history`` the codes in the prompt, but for the first
    item's: nothing comes before it.

    Raises:
        DataError: a completion that is not one item's codes, or a part without examples; with the row.
    """
    vocabulary = CodeVocabulary.of(ids, tokenizer)
    levels = vocabulary.levels
    known = {tuple(codes) for codes in ids.codes.tolist()}
    level_of = {int(token): level for level, tokens in enumerate(vocabulary.tokens) for token in tokens}
    code_of = {int(token): code for tokens in vocabulary.tokens for code, token in enumerate(tokens.tolist())}
    longest = min(settings.max_prompt_tokens, (window or 1 << 30) - levels - 1)
    encoder = TextEncoder(
        tokenizer,
        profile_template=settings.profile_template,
        max_prompt_tokens=longest,
        max_completion_tokens=levels + 1,
        long_prompt="truncate",
    )
    split = resolve_splits(example_keys(source), SplitConfig(seed=settings.seed))
    profiled = np.random.default_rng([settings.seed, 11]).random(len(split)) < settings.profile_share
    rows: dict[str, list[CodeRow]] = {"train": [], "validation": []}
    for frame in example_batches(source):
        for row in frame.iter_rows(named=True):
            part = SPLITS[split[row["row"]]]
            if part not in rows:
                continue
            where = f"{source}: row {row['row']} (user {row['user_id']})"
            prompt = row["messages"] if row["messages"] is not None else row["prompt"]
            try:
                head = encoder.prompt(prompt, row["profile"] if profiled[row["row"]] else None)
                tail = encoder.completion(prompt, head, row["completion"], cut=False)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            body = tail[:-1] if tail and tail[-1] == tokenizer.eos_token_id else tail
            if [level_of.get(token) for token in body] != list(range(levels)) or (
                tuple(code_of[token] for token in body) not in known
            ):
                raise DataError(
                    f"{where}: expected a completion of {levels} codes of an item in {ids.source}, got "
                    f"{row['completion']!r}; prepare the examples with these codes"
                )
            labels = [-100] * len(head.ids)
            if settings.history:
                at = [place for place, token in enumerate(head.ids) if token in level_of]
                for place in at[levels:]:
                    labels[place] = head.ids[place]
            rows[part].append(CodeRow([*head.ids, *tail], [*labels, *tail]))
    for part, found in rows.items():
        if not found:
            raise DataError(f"{source}: the {part} part is empty; fill the column 'split' or give more groups")
    return rows


def _open_folder(folder: Path, asked: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Make sure that the output may be written; an earlier one is removed only if it is one of ours."""
    if resume and overwrite:
        raise RunError("--resume goes on with an adaptation and --overwrite deletes it; choose one")
    settings = folder / _SETTINGS
    if resume:
        if not settings.is_file():
            raise RunError(f"{folder}: expected an interrupted adaptation to resume, found none; leave out --resume")
        earlier = json.loads(settings.read_text(encoding="utf-8"))
        other = sorted(name for name in asked if earlier.get(name) != asked[name])
        if other:
            raise RunError(f"{folder}: the settings differ from those it was begun with ({', '.join(other)})")
        return
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    ours = settings.is_file() or (folder / RECORD).is_file()
    if not ours or not overwrite:
        go_on = "go on with --resume, or pass" if settings.is_file() else "pass"
        way = f"{go_on} --overwrite or another output" if ours else "it is no adapted backbone: name another output"
        raise RunError(f"{folder}: expected a new folder, found one; {way}")
    shutil.rmtree(folder)
