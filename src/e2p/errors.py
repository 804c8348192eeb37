"""Everything that e2p raises on purpose.

    E2PError
    ├── ConfigError        a setting is unknown, missing or out of range
    ├── DataError          an example table, an embedding table or a join is not usable
    ├── BackboneError      the language model cannot be loaded or does not fit the task
    ├── AdapterError       a saved adapter is broken or belongs to another backbone
    ├── RunError           a run folder exists already, or lacks what a command needs
    ├── StoreError         a store of user vectors cannot be opened, reached, read or written
    └── MissingExtraError  an optional package is not installed

A message says what was expected, what came and what to do, with the file, row or key. At the command line each of
these is one line and exit code 2.
"""

from __future__ import annotations


class E2PError(Exception):
    """Base of all errors that a user can cause and mend."""


class ConfigError(E2PError):
    """A setting is unknown, missing or out of range."""


class DataError(E2PError):
    """A table, a vector or a join is not usable; the message names file and row or user."""


class BackboneError(E2PError):
    """The language model cannot be loaded, or lacks something that the setting asks for."""


class AdapterError(E2PError):
    """A saved adapter is incomplete, corrupt, or was trained for something else."""


class RunError(E2PError):
    """A run folder would be overwritten, or does not hold what the command needs."""


class StoreError(E2PError):
    """A store of user vectors is not there, is no store, is damaged, full or out of reach; nothing half is in it."""


class MissingExtraError(E2PError):
    """An optional package is missing; the message is the line that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}': pip install 'e2p[{extra}]'")
