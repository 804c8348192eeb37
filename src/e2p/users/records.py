"""A user's vector as it is kept: its fields, how they are checked, and the bytes that they become.

The bytes of one vector, format 1, the same in every store:

    offset  size   what
    0       1      format, 1
    1       1      flags: 1 when the user id follows the version, as it does where a key cannot hold it
    2       2      bytes of the version, big-endian
    4       4      D, big-endian
    8       8      timestamp: microseconds since 1970 UTC plus 2^63, big-endian, so that bytes compare as times do
    16      4      CRC-32 of all other bytes, big-endian
    20      4 D    the vector, float32, little-endian
    20+4D   ...    the version and, with the flag, the user id, UTF-8

The key of a user is his id in UTF-8 where that has at most 478 bytes, else its first 478 bytes, a byte 255 (which UTF-8
never holds) and the BLAKE2b-256 of the whole id.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from e2p.errors import DataError, StoreError

Floats = npt.NDArray[np.float32]
Outcome = Literal["stored", "unchanged", "older", "deleted"]
OUTCOMES: tuple[Outcome, ...] = ("stored", "unchanged", "older", "deleted")

FORMAT = 1
TIMESTAMP = slice(8, 16)  # of a record: bytes that compare as times do
_HEAD, _CRC = struct.Struct(">BBHIQ"), struct.Struct(">I")
_START = _HEAD.size + _CRC.size
_HAS_ID = 1
_KEY_BYTES, _VERSION_BYTES = 478, 255
_EPOCH, _MICROSECOND, _OFFSET = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1), 1 << 63


@dataclass(frozen=True, eq=False)
class StoredVector:
    """One user's vector.

    Args:
        user_id: any text that is not blank.
        embedding: float32 [D], finite; kept as a read-only copy.
        timestamp: when the vector was known, with a time zone; kept in UTC.
        version: name of the space that it lives in; empty: not named.

    Raises:
        DataError: one of them is something else.
    """

    user_id: str
    embedding: Floats
    timestamp: datetime
    version: str = ""

    def __post_init__(self) -> None:
        utf8(self.user_id)
        with np.errstate(over="ignore"):  # what overflows float32 becomes infinite and is refused below
            embedding = np.array(self.embedding, dtype=np.float32)
        if embedding.ndim != 1 or not embedding.size:
            raise DataError(f"user {self.user_id!r}: expected an embedding [D], got shape {list(embedding.shape)}")
        if not np.isfinite(embedding).all():
            raise _not_finite(self.user_id, embedding)
        embedding.setflags(write=False)
        _check_version(self.user_id, self.version)
        object.__setattr__(self, "embedding", embedding)
        object.__setattr__(self, "timestamp", in_utc(self.timestamp, f"user {self.user_id!r}"))


@dataclass(frozen=True, eq=False)
class VectorBatch:
    """Vectors to be written together.

    Args:
        user_ids: n texts, none blank; a user may be there more than once.
        embeddings: float32 [n, D], finite.
        timestamps: int64 [n], microseconds since 1970 UTC.
        versions: n names of spaces; empty: not named.

    Raises:
        DataError: lengths differ, or a row is not what a StoredVector may be.
    """

    user_ids: Sequence[str]
    embeddings: Floats
    timestamps: npt.NDArray[np.int64]
    versions: Sequence[str]

    def __post_init__(self) -> None:
        rows, shape = len(self.user_ids), self.embeddings.shape
        if self.embeddings.dtype != np.float32 or len(shape) != 2 or not shape[1]:
            raise DataError(f"expected embeddings float32 [n, D], got {self.embeddings.dtype} {list(shape)}")
        if not rows == shape[0] == len(self.timestamps) == len(self.versions):
            given = (rows, shape[0], len(self.timestamps), len(self.versions))
            raise DataError(f"expected as many users as embeddings, timestamps and versions, got {given}")
        _check_ids(self.user_ids)
        if not np.isfinite(self.embeddings).all():
            row = int(np.isfinite(self.embeddings).all(1).argmin())
            raise _not_finite(self.user_ids[row], self.embeddings[row])
        wrong = (self.timestamps < _FIRST) | (self.timestamps > _LAST)
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(
                f"user {self.user_ids[row]!r}: expected a timestamp in the years 1 to 9999, got "
                f"{self.timestamps[row]} microseconds since 1970; check the unit"
            )
        for version in set(self.versions):
            _check_version(self.user_ids[self.versions.index(version)], version)

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def dim(self) -> int:
        """D, the numbers in a vector."""
        return int(self.embeddings.shape[1])

    @classmethod
    def of(cls, vectors: Sequence[StoredVector]) -> VectorBatch:
        """The batch of these vectors, in their order. Raises DataError where they differ in D."""
        dim = len(vectors[0].embedding) if vectors else 1
        for vector in vectors:
            if len(vector.embedding) != dim:
                raise DataError(f"user {vector.user_id!r}: {wrong_dim(dim, len(vector.embedding))}")
        block = np.stack([v.embedding for v in vectors]) if vectors else np.empty((0, dim), np.float32)
        times = np.array([microseconds(v.timestamp) for v in vectors], dtype=np.int64)
        return cls([v.user_id for v in vectors], block, times, [v.version for v in vectors])


@dataclass(frozen=True)
class PutCounts:
    """What became of a batch's rows: stored, there already with the same content, older than what is there, or not
    newer than their user's deletion."""

    stored: int = 0
    unchanged: int = 0
    older: int = 0
    deleted: int = 0

    def __add__(self, other: PutCounts) -> PutCounts:
        return PutCounts(*(getattr(self, name) + getattr(other, name) for name in OUTCOMES))


def decide(old: bytes | None, new: bytes, deleted: bytes | None) -> Outcome:
    """The rule of every store, on records and on the time of a deletion, as in a record.

    An older time never replaces a newer one. Of two vectors of one time, the one written last stays.
    """
    if old is not None:
        if old[TIMESTAMP] > new[TIMESTAMP]:
            return "older"
        return "unchanged" if old == new else "stored"
    return "deleted" if deleted is not None and deleted >= new[TIMESTAMP] else "stored"


def encode(batch: VectorBatch) -> tuple[list[bytes], list[bytes]]:
    """The key and the record of every row. An import is mostly this: what can be, is done for all rows at once."""
    names = {version: version.encode() for version in set(batch.versions)}
    keys = [user_id.encode() for user_id in batch.user_ids]
    heads = np.empty(
        len(batch), dtype=[("format", "u1"), ("flags", "u1"), ("named", ">u2"), ("dim", ">u4"), ("time", ">u8")]
    )
    heads["format"], heads["dim"] = FORMAT, batch.dim
    heads["flags"] = [_HAS_ID * (len(key) > _KEY_BYTES) for key in keys]
    heads["named"] = [len(names[version]) for version in batch.versions]
    heads["time"] = batch.timestamps.astype(np.uint64) + np.uint64(_OFFSET)  # a time before 1970 wraps, and back again
    heads_bytes, size = heads.tobytes(), _HEAD.size
    numbers, width = np.ascontiguousarray(batch.embeddings, dtype="<f4").tobytes(), 4 * batch.dim
    records, crc32, pack = [], zlib.crc32, _CRC.pack
    for at, (key, version) in enumerate(zip(keys, batch.versions, strict=True)):
        head = heads_bytes[at * size : at * size + size]
        body = numbers[at * width : at * width + width] + names[version]
        if len(key) > _KEY_BYTES:
            body, keys[at] = body + key, key_of(batch.user_ids[at])
        records.append(head + pack(crc32(body, crc32(head))) + body)
    return keys, records


def decode(record: bytes, key: bytes, where: str) -> StoredVector:
    """The vector of a record. Raises StoreError if the record is damaged or of a newer format."""
    if record[:1] and record[0] > FORMAT:
        raise newer_format(where, record[0])
    try:
        _, flags, named, dim, time = _HEAD.unpack_from(record)
        (checksum,) = _CRC.unpack_from(record, _HEAD.size)
        body = memoryview(record)[_START:]
        if zlib.crc32(body, zlib.crc32(record[: _HEAD.size])) != checksum:
            raise ValueError
        texts = bytes(body[4 * dim :])
        user_id = (texts[named:] if flags & _HAS_ID else key).decode()
        embedding = np.frombuffer(body, dtype="<f4", count=dim)
        return StoredVector(user_id, embedding, from_microseconds(time - _OFFSET), texts[:named].decode())
    except (struct.error, ValueError, OverflowError, DataError):
        raise StoreError(f"{where}: the record of {key[:60]!r} is damaged; put the user's vector again") from None


def decode_all(keys: Sequence[bytes], records: Sequence[bytes | None], where: str) -> list[StoredVector | None]:
    """The vectors of these records, None where there is none."""
    return [None if row is None else decode(row, key, where) for key, row in zip(keys, records, strict=True)]


def version_of(record: bytes) -> bytes:
    """The version in a record, UTF-8."""
    _, _, named, dim, _ = _HEAD.unpack_from(record)
    return record[_START + 4 * dim :][:named]


def key_of(user_id: str) -> bytes:
    """The key that a user's record has: at most 511 bytes."""
    whole = utf8(user_id)
    if len(whole) <= _KEY_BYTES:
        return whole
    return whole[:_KEY_BYTES] + b"\xff" + hashlib.blake2b(whole, digest_size=32).digest()


def mark_of(key: bytes) -> bytes:
    """What a deletion keeps in place of the key: its hash, so that a deleted user's id is nowhere in a store."""
    return hashlib.blake2b(key, digest_size=16, person=b"e2p deleted").digest()


def mark_time(time: datetime) -> bytes:
    """A time as in a record."""
    return (microseconds(time) + _OFFSET).to_bytes(8, "big")


def in_utc(time: datetime, where: str) -> datetime:
    """The time in UTC. Raises DataError if it has no time zone."""
    if not isinstance(time, datetime) or time.utcoffset() is None:
        got = "no time zone" if isinstance(time, datetime) else repr(time)
        raise DataError(f"{where}: timestamp: expected a datetime with a time zone, got {got}; say which, such as UTC")
    return time.astimezone(UTC)


def microseconds(time: datetime) -> int:
    """Microseconds since 1970 UTC, without the rounding of float seconds."""
    return (time - _EPOCH) // _MICROSECOND


def from_microseconds(time: int) -> datetime:
    return _EPOCH + timedelta(microseconds=time)


def utf8(user_id: str) -> bytes:
    """An id's bytes. Raises DataError if it is no text, blank, or half a surrogate pair."""
    if not isinstance(user_id, str) or not user_id.strip():
        raise DataError(f"expected a user id, a text that is not blank, got {user_id!r}")
    try:
        return user_id.encode()
    except UnicodeEncodeError:
        raise DataError(f"expected a user id in Unicode, got {user_id!r}, which is half a surrogate pair") from None


def wrong_dim(expected: int, got: int) -> str:
    return f"expected an embedding of {expected} numbers, got {got}; a store holds one dimension"


def newer_format(where: str, found: Any) -> StoreError:
    return StoreError(f"{where}: expected format {FORMAT}, found {found}: written by a newer e2p; pip install -U e2p")


def _check_ids(user_ids: Sequence[str]) -> None:
    """As :func:`utf8` of each, in less time where all are well."""
    try:
        "".join(user_ids).encode()
        well = all(map(str.strip, user_ids))
    except (TypeError, UnicodeEncodeError):
        well = False
    if not well:
        for user_id in user_ids:
            utf8(user_id)


def _check_version(user_id: str, version: str) -> None:
    try:
        size = len(version.encode())
    except (AttributeError, UnicodeEncodeError):
        size = -1
    if not 0 <= size <= _VERSION_BYTES:
        raise DataError(f"user {user_id!r}: expected a version of at most {_VERSION_BYTES} bytes, got {version!r:.80}")


def _not_finite(user_id: str, embedding: Floats) -> DataError:
    at = int(np.isfinite(embedding).argmin())
    return DataError(f"user {user_id!r}: expected finite float32 numbers, got {embedding[at]} at {at}; mend the vector")


_FIRST, _LAST = (microseconds(end.replace(tzinfo=UTC)) for end in (datetime.min, datetime.max))
