"""Where serving finds users' vectors: one protocol, kept on this machine (LMDB), in Redis, or in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from e2p.errors import ConfigError
from e2p.users.records import Outcome, PutCounts, StoredVector, VectorBatch

__all__ = ["Outcome", "PutCounts", "StoreStats", "StoredVector", "VectorBatch", "VectorStore", "open_store"]


@dataclass(frozen=True)
class StoreStats:
    """What a store holds.

    Args:
        address: where it is, without a password.
        users: users with a vector.
        dim: numbers in a vector; None before the first one.
        versions: users by version of their vectors; two versions may stand side by side while one replaces the other.
        deletions: users that were deleted and not put again since.
        nbytes: on disk or in Redis, roughly; None where it is not known.
    """

    address: str
    users: int
    dim: int | None
    versions: Mapping[str, int]
    deletions: int
    nbytes: int | None


class VectorStore(Protocol):
    """The newest vector of every user. Threads may share one; processes open one each.

    A store holds vectors of one dimension, that of the first one. An older timestamp never replaces a newer one,
    whatever the order in which they come; of two vectors of the same time the one written last stays, so that writing
    again what is there changes nothing. A deleted user stays deleted: what is not newer than the deletion, such as
    yesterday's table imported again, does not bring him back.

    Every method raises StoreError when the store cannot be reached, read or written, and DataError for a user id that
    is blank.
    """

    @property
    @abstractmethod
    def address(self) -> str:
        """Where the store is, as :func:`open_store` takes it, without a password."""

    @property
    @abstractmethod
    def dim(self) -> int | None:
        """D, the numbers in a vector; None before the first one."""

    @abstractmethod
    def get(self, user_id: str) -> StoredVector | None:
        """The user's vector, or None."""

    @abstractmethod
    def get_many(self, user_ids: Sequence[str]) -> list[StoredVector | None]:
        """The users' vectors in the order asked, None where there is none."""

    @abstractmethod
    def put(self, vector: StoredVector) -> Outcome:
        """Keep a vector if none newer is there and its user was not deleted since.

        Returns:
            stored; unchanged: the same is there; older: a newer one is there; deleted: not newer than the deletion.

        Raises:
            DataError: the store holds another dimension.
        """

    @abstractmethod
    def put_many(self, batch: VectorBatch) -> PutCounts:
        """Put the rows of a batch, in order. When this returns they are as safe as after :meth:`put`.

        Raises:
            DataError: the store holds another dimension; nothing is written.
        """

    @abstractmethod
    def delete(self, user_id: str, *, forget: bool = False) -> bool:
        """Remove the user's vector, whatever its time.

        A hash of the id and the time of the deletion (now, or the vector's time if that is later) stay, also for a
        user without a vector, so that only a newer vector brings him back.

        Args:
            user_id: whose.
            forget: keep no trace, not even that; an old table will then bring him back.

        Returns:
            Whether there was a vector.
        """

    @abstractmethod
    def count(self) -> int:
        """Users with a vector."""

    @abstractmethod
    def iterate(self) -> Iterator[StoredVector]:
        """All vectors in the order of the ids' UTF-8, in constant memory, every user at most once.

        Writing may go on meanwhile: what is written behind the place reached is not seen, what is written ahead is.
        """

    @abstractmethod
    def stats(self) -> StoreStats:
        """What is there. Takes no longer the more there is."""

    @abstractmethod
    def close(self) -> None:
        """Give back files and connections; closing again does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_store(address: str, *, create: bool = True, durable: bool = True) -> VectorStore:
    """Open a store, or make one.

    Args:
        address: a folder; ``redis://host:6379/0?prefix=e2p`` (also rediss:// and unix://); or ``memory://`` for a new
            store that ends with the process.
        create: make the store if it is not there.
        durable: of a folder: what was put survives a power cut. Without, it survives the process alone: a power cut
            may lose the last writes or the whole store. How durable Redis is, Redis's configuration says.

    Raises:
        StoreError: there is no store and none is to be made, it is something else, damaged, of a newer format, or
            cannot be reached.
        ConfigError: the address is of no known kind.
        MissingExtraError: redis is not installed.
    """
    kind = address.partition("://")[0] if "://" in address else ""
    if kind == "memory":
        from e2p.users.store_memory import MemoryStore

        return MemoryStore()
    if kind in ("redis", "rediss", "unix"):
        from e2p.users.store_redis import RedisStore

        return RedisStore(address, create=create)
    if kind or not address.strip():
        raise ConfigError(f"store: expected a folder, redis://host:6379/0 or memory://, got {address!r}")
    from e2p.users.store_lmdb import LmdbStore

    return LmdbStore(address, create=create, durable=durable)
