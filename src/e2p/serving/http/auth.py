"""Keys: who may do what, for which users. A key itself is kept nowhere, only its SHA-256."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from e2p.config_serving import ServingConfig, is_loopback
from e2p.errors import ConfigError
from e2p.serving.http.errors import ApiError

Scope = str
SCOPES = ("generate", "users:read", "users:write", "metrics", "admin")
VARIABLE = "E2P_KEYS"
_LEAST = 16
_FIELDS = {"name", "key", "sha256", "scopes", "user_prefix"}


@dataclass(frozen=True)
class Key:
    """One key.

    Args:
        name: what logs call it.
        digest: SHA-256 of the key.
        scopes: what it may do.
        user_prefix: it may only name users whose id begins so; empty: all users.
    """

    name: str
    digest: bytes = field(repr=False)
    scopes: frozenset[Scope]
    user_prefix: str = ""

    def require_user(self, user_id: str) -> None:
        """Raise ApiError 403 for a user beyond the key's prefix."""
        if not user_id.startswith(self.user_prefix):
            raise ApiError(403, "user_not_allowed", "this key is bound to other user ids; use the key for this user")


# Without keys, whoever reaches the server may do everything.
ANYONE = Key("", b"", frozenset(SCOPES))


def read_keys(config: ServingConfig) -> tuple[Key, ...]:
    """The keys of the file, or else of the environment variable E2P_KEYS.

    A list of mappings in YAML (JSON is YAML): name, key or sha256 (64 hex digits), scopes, and optionally user_prefix.

    Raises:
        ConfigError: they cannot be read, or there are none and the host is not this machine alone. No message holds
            a key.
    """
    if config.keys:
        where = config.keys
        try:
            text = Path(where).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"keys: {where}: cannot be read: {getattr(error, 'strerror', error)}") from None
    else:
        where, text = VARIABLE, os.environ.get(VARIABLE, "")
    keys = parse_keys(text, where) if config.keys or text.strip() else ()
    if not keys and not is_loopback(config.host) and not config.insecure:
        raise ConfigError(
            f"host: expected keys for {config.host}, which is reached from other machines, got none; name a file by "
            f"--keys, set {VARIABLE}, or pass --insecure if nobody else can reach it"
        )
    return keys


def parse_keys(text: str, where: str) -> tuple[Key, ...]:
    """Keys out of YAML. Raises ConfigError with the place, never with a key."""
    try:
        rows = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # the error itself quotes the text
        at = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}: expected YAML, got something else{at}; check it") from None
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise ConfigError(f"{where}: expected a list of keys, each with name, key or sha256, and scopes")
    keys = tuple(_key(row, f"{where}: key {number}") for number, row in enumerate(rows, 1))
    for values, what in (([key.name for key in keys], "name"), ([key.digest for key in keys], "key")):
        if len(set(values)) < len(values):
            raise ConfigError(f"{where}: expected every {what} once, got one twice")
    return keys


def _key(row: Any, where: str) -> Key:
    if not isinstance(row, Mapping) or not set(row) <= _FIELDS:
        got = ", ".join(sorted(map(str, set(row) - _FIELDS))) if isinstance(row, Mapping) else "no mapping"
        raise ConfigError(f"{where}: expected {', '.join(sorted(_FIELDS))}, got {got}")
    name, scopes, prefix = row.get("name"), row.get("scopes"), row.get("user_prefix", "")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: name: expected a text, got none")
    if not isinstance(scopes, list) or not scopes or not all(scope in SCOPES for scope in scopes):
        raise ConfigError(f"{where}: scopes: expected some of {', '.join(SCOPES)}, got {scopes!r}")
    if not isinstance(prefix, str):
        raise ConfigError(f"{where}: user_prefix: expected a text; put it in quotes")
    if ("key" in row) == ("sha256" in row):
        raise ConfigError(f"{where}: expected one of key and sha256, got {'both' if 'key' in row else 'neither'}")
    secret = row.get("key", row.get("sha256"))
    if "sha256" in row:
        if not isinstance(secret, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", secret):
            raise ConfigError(f"{where}: sha256: expected 64 hex digits in quotes")
        return Key(name, bytes.fromhex(secret), frozenset(scopes), prefix)
    if not isinstance(secret, str) or len(secret) < _LEAST or not re.fullmatch(r"[!-~]+", secret):
        raise ConfigError(f"{where}: key: expected a text of at least {_LEAST} characters without spaces, in quotes")
    return Key(name, digest_of(secret), frozenset(scopes), prefix)


def digest_of(secret: str) -> bytes:
    """SHA-256 of a key. A plain hash is enough: keys are long and drawn, not passwords."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def authenticate(keys: Sequence[Key], authorization: str | None, scope: Scope | None) -> Key:
    """The key that a request carries.

    Every key is compared, in constant time, so that time tells neither a part of a key nor which one it is.

    Args:
        keys: all there are; without any, everyone may do everything.
        authorization: the header: ``Bearer KEY``.
        scope: what the request needs; None: any key will do.

    Raises:
        ApiError: 401 without a valid key, 403 for one without the scope.
    """
    if not keys:
        return ANYONE
    kind, _, secret = (authorization or "").partition(" ")
    given = digest_of(secret.strip())
    found = None
    for key in keys:
        if hmac.compare_digest(key.digest, given):
            found = key
    if found is None or kind.lower() != "bearer":
        message = "expected a valid key as 'Authorization: Bearer KEY', got " + ("another" if secret else "none")
        raise ApiError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
    if scope is not None and scope not in found.scopes:
        raise ApiError(403, "missing_scope", f"this key lacks the scope {scope}; use one that has it", param=None)
    return found
