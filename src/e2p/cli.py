"""The command line: a table of commands. Each is a function in the module that does the work, imported when called."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from e2p.config import RunConfig
from e2p.config_io import PRESETS, config_parser, from_namespace, load_yaml, preset_path
from e2p.config_serving import ServingConfig, serving_from_namespace, serving_parser, serving_values
from e2p.errors import ConfigError, E2PError


class Command(NamedTuple):
    """Where a command's function lives, and one line on what it does."""

    module: str
    function: str
    summary: str


COMMANDS = {
    "demo": Command("e2p.tasks.demo", "demo", "watch a frozen model become personal, offline, in five minutes"),
    "prepare table": Command("e2p.tasks.table", "prepare", "your own data, whatever its columns are called"),
    "prepare personachat": Command("e2p.tasks.personachat", "prepare", "Persona-Chat dialogues to tables"),
    "prepare music": Command("e2p.tasks.music", "prepare", "Last.fm listening to playlists and vectors"),
    "prepare nextitem": Command("e2p.tasks.nextitem", "prepare", "MovieLens or Amazon histories to semantic ids"),
    "prepare lamp": Command("e2p.tasks.lamp", "prepare", "LaMP's generation tasks to texts and vectors"),
    "prepare news": Command("e2p.tasks.news", "prepare", "PENS or MIND click histories to headlines and vectors"),
    "embed": Command("e2p.users.extract", "embed", "texts to user vectors"),
    "behaviour": Command("e2p.users.behaviour", "behaviour", "plays, clicks or ratings to user vectors"),
    "users import": Command("e2p.users.commands", "import_table", "put the vectors of a table into the online store"),
    "users export": Command("e2p.users.commands", "export_table", "write the online store's vectors as a table"),
    "users get": Command("e2p.users.commands", "get_users", "show users' vectors: time, version, age, numbers"),
    "users delete": Command("e2p.users.commands", "delete_users", "remove users' vectors, so that they stay away"),
    "users stats": Command("e2p.users.commands", "store_stats", "what the online store holds"),
    "adapt": Command("e2p.items.adapt", "adapt", "teach a backbone a catalogue's codes, before phi is trained"),
    "train": Command("e2p.training.run", "train", "learn the projection from your tables"),
    "evaluate": Command("e2p.evaluation.evaluate", "evaluate", "judge runs against their controls"),
    "report": Command("e2p.evaluation.report", "report", "write a run's report again; loads no model"),
    "sweep": Command("e2p.evaluation.sweep", "sweep", "train and judge many settings, one at a time"),
    "serve": Command("e2p.serving.serve", "serve", "answer by OpenAI's API, personal by user id"),
    "generate": Command("e2p.model.answer", "generate", "answer a prompt for a user"),
    "recommend": Command("e2p.items.recommend", "recommend", "next items for users, by codes"),
    "bench train": Command("e2p.bench.train", "bench", "training speed and memory against PEFT prompt tuning"),
    "bench kto": Command("e2p.bench.kto", "bench", "the same of training on yes/no labels against TRL's KTOTrainer"),
    "bench sample": Command("e2p.bench.sample", "bench", "speed and memory of generating items against generate"),
    "bench answers": Command("e2p.bench.answers", "bench", "answers of many users in batches, and one at a time"),
    "bench scale": Command(
        "e2p.bench.scale", "bench", "a large catalogue's trie, and the join of many vectors by time"
    ),
    "bench serve": Command("e2p.bench.serve", "bench", "many users answered at once, and one after the other"),
    "bench vllm": Command("e2p.bench.vllm", "bench", "a gateway over vLLM, and vLLM asked directly"),
    "bench soak": Command("e2p.bench.soak", "bench", "a server under steady load for minutes: memory and latencies"),
    "bench store": Command("e2p.bench.store", "bench", "import, reads and writes of the online store at many users"),
}
BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. A domain error is one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"e2p {version('e2p')}")
        return 0
    name = next((n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS), None)
    if name is None:
        group = [n for n in COMMANDS if n.split()[0] == words[0]]
        if group and words[1:] in (["-h"], ["--help"]):
            print("\n".join(f"e2p {n}: {COMMANDS[n].summary}" for n in group))
            return 0
        known = ", ".join(group) if group else ", ".join(COMMANDS)
        return _fail(f"expected a command ({known}), got '{' '.join(words[:2])}'; see e2p --help")
    command, rest = COMMANDS[name], words[len(name.split()) :]
    try:
        function = getattr(import_module(command.module), command.function)
        keywords = _parse(f"e2p {name}", function, rest)
        function(**keywords)
    except E2PError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        go_on = "; go on with the same command and --resume" if name == "train" else ""
        print(f"\ninterrupted{go_on}", file=sys.stderr)
        return 130
    return 0


def usage() -> str:
    """The help page: what there is and how to go on."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: e2p COMMAND [options]",
            "",
            "Give it the user vectors you already have and any open-weights language model: one soft token,",
            "learned once, makes every answer personal.",
            "",
            *lines,
            "",
            f"A run takes its settings from a YAML (e2p train run.yaml), from --preset {'|'.join(PRESETS)},",
            "and from options such as --training.learning_rate 3e-3. e2p COMMAND --help lists them all.",
        ]
    )


def _parse(prog: str, function: Any, words: list[str]) -> dict[str, Any]:
    """A function's arguments from the command line; help comes from its signature and docstring."""
    import argparse

    from jsonargparse import ArgumentError, ArgumentParser

    kinds = dict(_kinds(get_type_hints(function)))
    settings = kinds.pop("config", None)
    takes_config = settings is not None
    if settings is ServingConfig:
        kinds |= dict(_kinds(get_type_hints(ServingConfig)))
        parser = serving_parser(prog)
        parser.add_function_arguments(function, skip={"config"}, as_group=False)
        parser.usage = f"{prog} [RUN or ADAPTER] [serving.yaml] [options]"
        words = _serving_words(parser, *_options(words, kinds))
    elif takes_config:
        kinds |= dict(_kinds(get_type_hints(RunConfig)))
        parser = config_parser(prog)
        parser.add_function_arguments(function, skip={"config"}, as_group=False)
        parser.usage = f"{prog} [run.yaml ...] [--preset {'|'.join(PRESETS)}] [options]"
        words = _configs_first(*_options(words, kinds))
    else:
        parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
        parser.add_function_arguments(function, as_group=False, as_positional=True)
        hints, parameters = get_type_hints(function), inspect.signature(function).parameters.values()
        required = [p.name for p in parameters if p.default is p.empty]
        several = required[-1] if required and get_origin(hints[required[-1]]) is list else ""
        # After --, words are what they are, also with a dash.
        end = words.index("--") if several and "--" in words else len(words)
        options, others = _options(words[:end], kinds)
        if several:  # the last positional argument: one word or more
            parser.usage = f"{prog} {' '.join(required)} [{several} ...] [options]"
            named = [word for word in others if not word.startswith("-")] + words[end + 1 :]
            first, rest = named[: len(required) - 1], named[len(required) - 1 :]
            others = [*first, *[json.dumps(rest)] * bool(rest), *(word for word in others if word.startswith("-"))]
        words = others + options
    try:
        namespace = parser.parse_args(words)
    except (ArgumentError, argparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from None
    values = {name: namespace[name] for name in inspect.signature(function).parameters if name != "config"}
    if takes_config:
        read = serving_from_namespace if settings is ServingConfig else from_namespace
        values["config"] = read(parser, namespace)
    return values


def _kinds(hints: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Type of every option: bool, list or tuple (of texts), or another; settings within settings by dotted names."""
    for name, hint in hints.items():
        if name == "config":
            yield name, hint
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _kinds(get_type_hints(hint), f"{above}{name}.")
        else:
            texts = [get_origin(part) for part in (hint, *get_args(hint)) if str in get_args(part)]
            yield above + name, next((kind for kind in texts if kind in (list, tuple)), hint)


def _options(words: list[str], kinds: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Options as --name=value, and all other words. A bare switch means true; a list may be given item by item."""
    options: list[str] = []
    others: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.partition("=")
        kind = kinds.get(name[2:])
        if not word.startswith("--") or word == "--help":
            others.append(word)
            continue
        if not equals and kind is bool and (not queue or queue[0].lower() not in ("true", "false")):
            value = "true"
        elif not equals:
            if not queue:
                options.append(word)  # the parser says what is missing
                continue
            value = queue.pop(0)
        if kind in (list, tuple) and not (value.startswith("[") and set("'\"") & set(value)):
            # Quoted here, since YAML would read 007 as a number and null as nothing.
            several = value.strip("[]").split(",") if value.startswith("[") or kind is tuple else [value]
            name += "" if value.startswith("[") or kind is tuple else "+"
            value = json.dumps([item.strip() for item in several if item.strip()])
        elif get_origin(kind) in (list, tuple) and not value.startswith("["):
            value = f"[{value}]"  # numbers: 42,43
        options.append(f"{name}={value}")
    return options, others


def _serving_words(parser: Any, options: list[str], others: list[str]) -> list[str]:
    """A server's words: YAMLs become defaults, which single settings override; another word is the run."""
    flags = []
    for word in others:
        if word.startswith("-"):
            flags.append(word)
        elif word.endswith((".yaml", ".yml")):
            for name, value in serving_values(word).items():
                inner = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {}
                parser.set_defaults(inner or {name: value})
        else:
            flags.append(f"--run={word}")
    return flags + options


def _configs_first(options: list[str], others: list[str]) -> list[str]:
    """A preset and YAMLs, in this order, come before single settings, which they must not undo."""
    presets, files, settings = [], [word for word in others if not word.startswith("-")], []
    for option in options:
        name, _, value = option.partition("=")
        if name == "--preset":
            presets.append(str(preset_path(value)))
        elif name == "--config" and value:
            files.append(value)
        else:
            settings.append(option)
    for file in files:
        if not Path(file).is_file():
            raise ConfigError(f"{file}: expected a YAML with a run's settings, found no such file")
        load_yaml(file)  # its complaints name the file
    flags = [word for word in others if word.startswith("-")]
    return flags + [f"--config={path}" for path in presets + files] + settings


def _fail(message: str) -> int:
    print(f"e2p: error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
