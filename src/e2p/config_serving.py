"""Every setting of a server, as frozen dataclasses: units, allowed values, checks, YAML in. Loads no torch."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from e2p.config import BackboneConfig, Precision
from e2p.config_evaluation import require
from e2p.config_io import refuse_nothing
from e2p.errors import ConfigError

Policy = Literal["null", "none", "error"]
_POLICIES = ("null", "none", "error")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


@dataclass(frozen=True)
class LimitsConfig:
    """What one request may cost; beyond it is an error that says so.

    Args:
        body_bytes: largest body of a request, and largest row of a bulk upload.
        upload_bytes: largest bulk upload.
        uploads: bulk uploads at once.
        prompt_chars: characters of a prompt, all messages together, or its tokens where it is token ids.
        prompts: prompts of one request to completions; ``prompt_chars`` is for all of them.
        default_max_tokens: longest answer where a request does not say, or as long as the window has room for.
        max_tokens: longest answer that a request may ask for.
        n: answers to one prompt.
        running: requests that the engine is given at once.
        waiting: requests that may wait for it; more get 429 with Retry-After.
        seconds: for a request's body to arrive, and from then to the end of its answer, waiting included; then 504.
        read_seconds: longest pause while a body arrives, and how far it may be behind 1 KiB a second; then 408.
        ahead_seconds: how far ahead of this clock a vector's timestamp may be. One that is far ahead by mistake would
            keep out all later ones.
    """

    body_bytes: int = 1 << 20
    upload_bytes: int = 1 << 30
    uploads: int = 2
    prompt_chars: int = 100_000
    prompts: int = 64
    default_max_tokens: int = 256
    max_tokens: int = 2048
    n: int = 8
    running: int = 32
    waiting: int = 128
    seconds: float = 120.0
    read_seconds: float = 30.0
    ahead_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), 0 if f.name in ("waiting", "ahead_seconds") else 1
            if f.name.endswith("seconds") and least:
                require(value > 0, f"limits.{f.name}", "a number > 0", value)
            else:
                require(value >= least, f"limits.{f.name}", f"a number >= {least}", value)
        fits = self.default_max_tokens <= self.max_tokens
        require(
            fits, "limits.default_max_tokens", f"at most limits.max_tokens {self.max_tokens}", self.default_max_tokens
        )


@dataclass(frozen=True)
class PoliciesConfig:
    """Who answers where a user's vector cannot: the learned null user, the bare backbone (none), or an error.

    An adapter without a null user takes the bare backbone in its place; every response says so.

    Args:
        no_user: the request names no user and has no vector.
        unknown_user: the store holds no vector of the user.
        max_age_seconds: a stored vector older than this is old; not given: none is.
        old_vector: the vector is old; ``use`` takes it nevertheless.
        other_version: the vector's version is none of those that the adapter was trained with, or it has another
            dimension. An adapter that names no versions takes all. ``use`` takes it where the dimension is right.
        store_unavailable: the store cannot be read.
    """

    no_user: Policy = "null"
    unknown_user: Policy = "null"
    max_age_seconds: float | None = None
    old_vector: Literal["use", "null", "none", "error"] = "null"
    other_version: Literal["use", "null", "none", "error"] = "error"
    store_unavailable: Policy = "error"

    def __post_init__(self) -> None:
        for name in ("no_user", "unknown_user", "old_vector", "other_version", "store_unavailable"):
            allowed = ("use", *_POLICIES) if name in ("old_vector", "other_version") else _POLICIES
            require(
                getattr(self, name) in allowed, f"policies.{name}", f"one of {', '.join(allowed)}", getattr(self, name)
            )
        age = self.max_age_seconds
        require(age is None or age > 0, "policies.max_age_seconds", "a number > 0", age)


@dataclass(frozen=True)
class EngineConfig:
    """How much the engine in this process does at once; memory bounds it.

    Args:
        rows: answers that are continued together.
        cache_tokens: rows times the longest of them, prompt and answer: what keys and values are kept for, at most.
        prefill_tokens: of prompts that are read between two steps.
        precision: of the backbone's forward pass; ``auto`` is bfloat16 where the hardware has it.
    """

    rows: int = 32
    cache_tokens: int = 65_536
    prefill_tokens: int = 2048
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        for name in ("rows", "cache_tokens", "prefill_tokens"):
            require(getattr(self, name) >= 1, f"hf.{name}", "a whole number >= 1", getattr(self, name))


@dataclass(frozen=True)
class VLLMConfig:
    """How vLLM servers are asked that hold the backbone (``--engine vllm``).

    Args:
        fallbacks: addresses of more servers, which are asked while none of the upstreams can be.
        model: its name there; empty: the only one that they serve. A server's key is the environment variable
            E2P_VLLM_KEY.
        transport: how soft tokens travel. ``embeddings``: the whole prompt as embeddings, always right. ``chat``: the
            soft tokens alone, within a chat's messages, where tokens stand exactly as in training, else an error.
            ``auto``: chat where that can be, else embeddings.
        dtype: of prompts as embeddings. A server in bfloat16 rounds them so itself, and then bfloat16 halves them.
        cache: who shares what a server keeps of prompts. ``prompts``: users share what stands before their soft tokens,
            on servers that are found to tell embeddings apart. ``users``: nobody shares anything with another user.
        n: most answers to one prompt.
        attempts: servers that a request is given to, one after the other, while none has answered anything. One that
            cannot be reached was not given it.
        check_seconds: between two looks at a server; one that is away is looked at with growing pauses.
        connect_seconds: longest wait for a connection, and for the answer to such a look.
        pause_seconds: longest pause before the first token and between two; then the server is given up.
    """

    fallbacks: list[str] = field(default_factory=list)
    model: str = ""
    transport: Literal["auto", "embeddings", "chat"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    cache: Literal["prompts", "users"] = "prompts"
    n: int = 32
    attempts: int = 2
    check_seconds: float = 5.0
    connect_seconds: float = 2.0
    pause_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("n", "attempts"):
            require(getattr(self, name) >= 1, f"vllm.{name}", "a whole number >= 1", getattr(self, name))
        for name in ("check_seconds", "connect_seconds", "pause_seconds"):
            require(getattr(self, name) > 0, f"vllm.{name}", "a number > 0", getattr(self, name))
        _require_addresses("vllm.fallbacks", self.fallbacks)


@dataclass(frozen=True)
class ServingConfig:
    """One server: adapters on one backbone, the store of user vectors, who may ask, how much, and what then.

    Args:
        adapters: several on one backbone, each as name=folder (of a run, or of an adapter alone), named one by one;
            requests pick one by ``model``.
        backbone: what shall be otherwise than in the run, such as where the backbone lies now.
        store: users' vectors: a folder, redis://host:6379/0 or memory://; empty: only vectors in requests.
        host: address to listen on; beyond this machine it needs keys.
        port: port to listen on; 0: a free one, which is said.
        keys: YAML file of keys; empty: those in the environment variable E2P_KEYS, if there are any.
        insecure: listen beyond this machine without keys: everyone who reaches the port may read and write all users.
        log_users: write user ids into the log; they stand nowhere otherwise.
        grace_seconds: how long running answers are waited for on SIGTERM.
        engine: who generates: ``hf``, the backbone within this process, or ``vllm``, servers that hold it.
        upstreams: these vLLM servers' addresses, such as http://10.0.0.5:8000, started with --enable-prompt-embeds.
        hf: how much the engine in this process does at once.
        vllm: how vLLM servers are asked.
        limits: what one request may cost.
        policies: who answers where a user's vector cannot.
    """

    adapters: list[str] = field(default_factory=list)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    store: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    keys: str = ""
    insecure: bool = False
    log_users: bool = False
    grace_seconds: float = 30.0
    engine: Literal["hf", "vllm"] = "hf"
    upstreams: list[str] = field(default_factory=list)
    hf: EngineConfig = field(default_factory=EngineConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    policies: PoliciesConfig = field(default_factory=PoliciesConfig)

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, "port", "a number from 0 to 65535", self.port)
        require(bool(self.host), "host", "an address such as 127.0.0.1", self.host)
        require(self.grace_seconds >= 0, "grace_seconds", "a number >= 0", self.grace_seconds)
        names = []
        for pair in self.adapters:
            name, equals, folder = pair.partition("=")
            ok = equals and folder and NAME.fullmatch(name)
            require(bool(ok), "adapters", "name=folder, the name of letters, digits and . _ / -", pair)
            names.append(name)
        require(len(set(names)) == len(names), "adapters", "every name once", ", ".join(names))
        _require_addresses("upstreams", self.upstreams)
        if self.engine == "vllm":
            require(
                bool(self.upstreams), "upstreams", "the address of a vLLM server with --engine vllm", self.upstreams
            )
        else:
            require(not self.upstreams, "upstreams", "none without --engine vllm", self.upstreams)

    def folders(self, run: str = "") -> dict[str, str]:
        """Folder of every adapter by the name that requests call it, that of ``run`` first.

        Raises:
            ConfigError: there is none, or a name stands twice.
        """
        found = {name_of(run): run} if run else {}
        for pair in self.adapters:
            name, _, folder = pair.partition("=")
            require(name not in found, "adapters", f"another name than the run's {name!r}", pair)
            found[name] = folder
        if not found:
            raise ConfigError("run: expected a run folder, an adapter's folder or --adapters name=folder, got nothing")
        return found


def _require_addresses(name: str, addresses: list[str]) -> None:
    for address in addresses:
        parts = urlsplit(address)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.query or parts.fragment)
        require(ok and "@" not in parts.netloc, name, "an address such as http://10.0.0.5:8000", address)


def name_of(run: str) -> str:
    """What requests call a run: its folder's name; that of the run for an adapter inside one."""
    path = Path(run).expanduser().resolve()
    name = path.parent.name if path.name == "adapter" else path.name
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:128] or "adapter"


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def serving_values(path: str | Path) -> dict[str, Any]:
    """A server's YAML as the parser takes it: adapters may be a mapping, and the arm null needs no quotes.

    Raises:
        ConfigError: with the file, for what is unreadable, unknown or out of range.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    plain = dict(values)
    if isinstance(plain.get("adapters"), Mapping):
        plain["adapters"] = [f"{name}={folder}" for name, folder in plain["adapters"].items()]
    if isinstance(plain.get("policies"), Mapping):
        # YAML reads the arm null as nothing.
        words = {k: "null" if v is None and k != "max_age_seconds" else v for k, v in plain["policies"].items()}
        plain["policies"] = words
    try:
        serving_from_dict(plain)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return plain


def load_serving(path: str | Path) -> ServingConfig:
    """Read a server's YAML. Raises ConfigError, with the file, for what is unreadable or unknown."""
    return serving_from_dict(serving_values(path))


def serving_from_dict(values: Mapping[str, Any]) -> ServingConfig:
    """A server's settings from plain values; unknown keys and wrong types raise ConfigError with their name."""
    refuse_nothing(ServingConfig, values)
    parser = serving_parser()
    try:
        return serving_from_namespace(parser, parser.parse_object(dict(values)))
    except ConfigError:
        raise
    except Exception as error:  # jsonargparse raises ArgumentError, TypeError and its own kinds for a bad value
        raise ConfigError(" ".join(str(error).split())) from None


def serving_parser(prog: str | None = None) -> Any:
    """jsonargparse parser whose keys are those of :class:`ServingConfig`."""
    from jsonargparse import ArgumentParser  # here: half of the start-up time of `e2p --help`

    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(ServingConfig)
    return parser


def serving_from_namespace(parser: Any, namespace: Any) -> ServingConfig:
    """The frozen settings out of what :func:`serving_parser`'s parser has read."""
    built = parser.instantiate(namespace)
    return ServingConfig(**{f.name: built[f.name] for f in dataclasses.fields(ServingConfig)})
