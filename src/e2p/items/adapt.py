"""`e2p adapt`: teach a language model to speak semantic ids, before it is frozen. No user vector takes part.

A model that was never trained on codes cannot name an item. It is trained on histories alone; phi is then trained in
front of the frozen result, and what E2P gains is what it gains over this model.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
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
from e2p.items.vocabulary import ADAPTED, CODES, CodeVocabulary, add_code_tokens, open_codes
from e2p.provenance import provenance

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
    long_prompt: Literal["error", "truncate"] = "error",
    chat: Literal["auto", "always", "never"] = "auto",
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
        examples: example table: prompts with items as codes, completions of one item each; its column split says what
            is for training and for validation, and test examples are left alone.
        output: folder for the checkpoint. It carries the tokenizer and the codes.
        method: full: all weights; lora: low-rank updates by PEFT, merged at the end, and the codes' embeddings.
        epochs: passes over the training examples.
        batch_size: examples in a step.
        learning_rate: peak of AdamW's.
        weight_decay: AdamW's.
        warmup_ratio: share of the steps with a rising learning rate; it falls as a cosine afterwards.
        patience: stop after this many epochs without a better validation loss; 0: never. The best epoch is kept.
        history: learn from the items within the prompt too, each from those before it, and not from the last alone;
            but not behind a profile, which may tell of them.
        profile_share: share of the examples that are shown with their text profile, where there is one, so that the
            frozen model can read both.
        lora_rank: of the low-rank updates.
        max_prompt_tokens: longest prompt in tokens.
        long_prompt: what to do with a longer one, as in data.long_prompt.
        chat: as data.chat of the runs to come.
        profile_template: as data.profile_template of the runs to come.
        precision: of the training: bfloat16 autocast where the hardware has it, or float32.
        seed: of the new embeddings, the order of the examples, and who is shown with a profile.
        resume: go on with an interrupted adaptation.
        overwrite: replace an earlier output.

    Raises:
        DataError: an example that is no item of the codes, with its row; no column split; an empty part.
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
    _open_folder(folder, asked, resume, overwrite, (backbone, codes, examples))
    console = Console(stderr=True)
    with console.status("reading the backbone and the examples"):
        model, tokenizer, fresh = speaking(backbone, ids, settings.seed)
        window = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        rows = read_rows(examples, tokenizer, ids, settings, window)
    cut = sum(row.cut for part in rows.values() for row in part)
    console.print(
        f"{fresh:,} new code tokens; examples: train {len(rows['train']):,}, validation {len(rows['validation']):,}"
        f"{f', {cut:,} prompts cut' if cut else ''}; labelled tokens: {sum(row.labelled for row in rows['train']):,}",
        highlight=False,
    )
    if overwrite and folder.exists():  # only now: what is wrong with the new one must not cost the old one
        shutil.rmtree(replaced(folder), ignore_errors=True)
        folder.rename(replaced(folder))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _SETTINGS).write_text(json.dumps(asked, indent=1), encoding="utf-8")
    with quiet():
        model, record = train(model, tokenizer, ids, rows, settings, folder / _CHECKPOINTS, console, resume)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids.save(folder / CODES)
    record = {**record, "settings": asked, "codes": ids.report(), "provenance": provenance()}
    # The record last: where it is, the checkpoint is whole.
    (folder / ADAPTED).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)
    (folder / _SETTINGS).unlink()
    if overwrite:
        shutil.rmtree(replaced(folder), ignore_errors=True)
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
    words = len(tokenizer)  # beyond them a table may hold padding, which is no measure of anything
    fresh = add_code_tokens(tokenizer, ids)
    if fresh:
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        new = [token for token in tokenizer.convert_tokens_to_ids(ids.token_names()) if token >= words]
        generator = torch.Generator().manual_seed(seed)
        tables = {id(t.weight): t.weight for t in (model.get_input_embeddings(), model.get_output_embeddings())}
        with torch.no_grad():
            for weight in tables.values():  # one, if the head is tied to the embeddings
                noise = torch.randn(weight[new].shape, generator=generator).to(weight.device)
                weight[new] = weight[:words].mean(0) + weight[:words].std(0) * noise
    return model, tokenizer, fresh


def read_rows(
    source: str, tokenizer: Any, ids: SemanticIds, settings: AdaptSettings, window: int | None
) -> dict[str, list[CodeRow]]:
    """The training and validation examples as ids and labels.

    Labels are the completion, its end included, and with ``history`` the items in the prompt, but for the first one:
    nothing comes before it. Of an example that is shown with its profile, the completion alone: the profile tells of
    those items already. Rows that are labelled as not engaged show nothing to learn and are left out.

    Raises:
        DataError: no column split; a completion that is not one item's codes; a prompt that is too long; a part without
            examples; with the row.
    """
    vocabulary = CodeVocabulary.of(ids, tokenizer)
    known = {tuple(codes) for codes in ids.codes.tolist()}
    place_of = {int(t): (level, c) for level, tokens in enumerate(vocabulary.tokens) for c, t in enumerate(tokens)}
    encoder = TextEncoder(
        tokenizer,
        chat=settings.chat,
        profile_template=settings.profile_template,
        max_prompt_tokens=min(settings.max_prompt_tokens, (window or 1 << 30) - vocabulary.levels - 1),
        max_completion_tokens=vocabulary.levels + 1,
        long_prompt=settings.long_prompt,
    )
    keys = example_keys(source)
    if keys["split"].null_count() == len(keys):  # a split of its own might teach what a run tests
        raise DataError(f"{source}: expected a column split with train and validation, got none; add it")
    split = resolve_splits(keys, SplitConfig())
    shown = np.random.default_rng([settings.seed, 11]).random(len(split)) < settings.profile_share
    rows: dict[str, list[CodeRow]] = {"train": [], "validation": []}
    for frame in example_batches(source):
        for row in frame.iter_rows(named=True):
            part = SPLITS[split[row["row"]]]
            if part not in rows or row["label"] is False:
                continue
            where = f"{source}: row {row['row']} (user {row['user_id']})"
            prompt = row["messages"] if row["messages"] is not None else row["prompt"]
            profile = row["profile"] if shown[row["row"]] else None
            try:
                head = encoder.prompt(prompt, profile)
                tail = encoder.completion(prompt, head, row["completion"], cut=False)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            items = _whole_items(tail, place_of, vocabulary.levels)
            if len(items) != 1 or items[0][1] not in known:
                raise DataError(
                    f"{where}: expected a completion of {vocabulary.levels} codes of one item in {ids.source}, got "
                    f"{row['completion']!r}; prepare the examples with these codes"
                )
            if items[0][0] != 0:
                raise DataError(
                    f"{where}: expected codes at the start of the answer, but the chat template puts "
                    f"{tokenizer.decode(tail[: items[0][0]])!r} before them; adapt, and later train, with chat never"
                )
            labels = [-100] * len(head.ids)
            if settings.history and not profile:
                for start, _ in _whole_items(head.ids, place_of, vocabulary.levels)[1:]:
                    labels[start : start + vocabulary.levels] = head.ids[start : start + vocabulary.levels]
            rows[part].append(CodeRow([*head.ids, *tail], [*labels, *tail], bool(head.cut)))
    for part, found in rows.items():
        if not found:
            raise DataError(f"{source}: the {part} part is empty; fill the column 'split' or give more groups")
    return rows


def _whole_items(
    tokens: Sequence[int], place_of: Mapping[int, tuple[int, int]], levels: int
) -> list[tuple[int, tuple[int, ...]]]:
    """Where an item's codes stand, all levels in order, and what they are; what a cut has left of one is none."""
    places = [place_of.get(token, (-1, -1)) for token in tokens]
    found, at = [], 0
    while at + levels <= len(places):
        here = places[at : at + levels]
        if [level for level, _ in here] == list(range(levels)):
            found.append((at, tuple(code for _, code in here)))
            at += levels
        else:
            at += 1
    return found


def _open_folder(
    folder: Path, asked: Mapping[str, Any], resume: bool, overwrite: bool, sources: Sequence[str] = ()
) -> None:
    """Make sure that the output may be written, over an earlier one only if that is one of ours; nothing is touched."""
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
    ours = folder.is_dir() and (settings.is_file() or (folder / ADAPTED).is_file())
    if not ours or not overwrite:
        go_on = "go on with --resume, or pass" if settings.is_file() else "pass"
        way = f"{go_on} --overwrite or another output" if ours else "it is no adapted backbone: name another output"
        raise RunError(f"{folder}: expected a new folder, found one; {way}")
    foreign = sorted(path.name for path in folder.iterdir() if not _is_ours(path))
    if foreign:
        raise RunError(f"{folder}: holds {foreign[0]!r}, so it will not be overwritten; name another output")
    inside = next((path for path in sources if Path(path).resolve().is_relative_to(folder.resolve())), None)
    if inside is not None:
        raise RunError(f"{folder}: expected an output beside what it is made of, got {inside} in it; name another")


def replaced(folder: Path) -> Path:
    """Where an overwritten backbone is kept until the one in its place is whole."""
    return folder.with_name(f"{folder.name}.replaced")


def _is_ours(path: Path) -> bool:
    """Whether a file is such as an adaptation writes: a checkpoint's, a tokenizer's, codes."""
    return path.name in (CODES, _CHECKPOINTS, _SETTINGS) or path.suffix in (
        ".json",
        ".safetensors",
        ".jinja",
        ".model",
        ".txt",
    )
