"""An LMDB environment that grows by itself, is opened once a process, and says in one line what is wrong with it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeAlias, TypeVar

import lmdb

from e2p.errors import StoreError
from e2p.users.records import FORMAT

T = TypeVar("T")
Txn: TypeAlias = "lmdb.Transaction[bytes]"  # generic for type checkers alone
MAP_BYTES = 1 << 28  # of address space at first, not of disk; doubled whenever it is full
DATABASES = ("about", "vectors", "deleted", "versions")
_READERS = 1024  # threads that read at once, over all processes
_OPEN: dict[tuple[int, int], Environment] = {}  # LMDB forbids opening a file twice in a process
_OPENING = threading.Lock()


class Environment:
    """A folder's LMDB files, shared by all who open the folder in this process; made by :func:`acquire`."""

    def __init__(self, folder: Path, durable: bool) -> None:
        self.folder, self.durable, self.pid, self.holders = folder, durable, os.getpid(), 0
        self._active, self._closed, self._gate = 0, False, threading.Condition()
        self._resizing = 0  # threads that wait for all others to be outside
        with self.faults("opened"):
            self.env = lmdb.open(
                str(folder),
                map_size=max(MAP_BYTES, 2 * _size(folder)),
                max_dbs=len(DATABASES),
                max_readers=_READERS,
                sync=durable,
                readahead=False,  # reads are of single users: reading ahead would fill memory with others
                meminit=False,
            )
        try:
            self.databases = self._first_look()
        except BaseException:
            self.env.close()
            raise

    def read(self, work: Callable[[Txn], T]) -> T:
        """What ``work`` returns of a snapshot."""
        while True:
            try:
                with self.faults("read"), self._inside(), self.env.begin() as txn:
                    return work(txn)
            except lmdb.MapResizedError:  # another process has made it larger
                self._resize(0, 0)

    def write(self, work: Callable[[Txn], T]) -> T:
        """What ``work`` returns, when all that it wrote is kept; it may be called again, after nothing was."""
        seen = 0
        while True:
            try:
                with self.faults("written"), self._inside():
                    seen = self.env.info()["map_size"]
                    with self.env.begin(write=True) as txn:
                        return work(txn)
            except lmdb.MapResizedError:
                self._resize(0, 0)
            except lmdb.MapFullError:
                self._resize(2 * seen, seen)

    def release_pages(self) -> None:
        """Let go of the file's pages that this process has looked at; the system keeps them as it sees fit."""
        size = self.env.info()["map_size"]
        self._resize(size, size)

    def close(self) -> None:
        """Wait for other threads' transactions, whose memory and file LMDB would take away, and close."""
        if self.pid != os.getpid():
            self.env.close()
            return
        with self._gate:
            self._closed = True
            self._gate.notify_all()
            self._gate.wait_for(lambda: not self._active)
        try:
            if not self.durable:
                with self.faults("written"):
                    self.env.sync(True)
        finally:
            self.env.close()

    @contextlib.contextmanager
    def faults(self, what: str) -> Iterator[None]:
        """LMDB's errors as a StoreError, except the two after which one tries again."""
        try:
            yield
        except (lmdb.MapResizedError, lmdb.MapFullError):
            raise
        except lmdb.Error as error:
            advice = "free some room" if "space" in str(error) else "check the folder, or import into a new one"
            raise StoreError(f"{self.folder}: the store cannot be {what}: {error}; {advice}") from None

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """LMDB must not be resized while a transaction of this process is open."""
        if self.pid != os.getpid():
            raise StoreError(f"{self.folder}: this store was opened before the process forked; open it after that")
        with self._gate:
            # Nobody comes in before one who waits to resize, whom readers without a pause would keep out for ever.
            self._gate.wait_for(lambda: self._closed or not self._resizing)
            if self._closed:
                raise StoreError(f"{self.folder}: this store was closed; open it again")
            self._active += 1
        try:
            yield
        finally:
            with self._gate:
                self._active -= 1
                if not self._active:
                    self._gate.notify_all()

    def _resize(self, size: int, seen: int) -> None:
        """Make the map ``size`` bytes unless it is no longer ``seen``; 0 takes on what another process has made it."""
        with self._gate:
            self._resizing += 1
            try:
                self._gate.wait_for(lambda: not self._active)
                if self._closed:
                    raise StoreError(f"{self.folder}: this store was closed; open it again")
                if not size or self.env.info()["map_size"] == seen:
                    with self.faults("enlarged"):
                        self.env.set_mapsize(size)
            finally:
                self._resizing -= 1
                self._gate.notify_all()

    def _first_look(self) -> dict[str, lmdb._Database]:
        while True:
            size = self.env.info()["map_size"]
            try:
                with self.faults("read"):
                    self.env.reader_check()  # forgets readers that were killed, whose pages could not be used again
                    self._require_whole()
                    return self._databases()
            except lmdb.MapResizedError:  # in this very moment
                self._resize(0, 0)
            except lmdb.MapFullError:
                self._resize(2 * size, size)

    def _require_whole(self) -> None:
        """A file that was cut short would end the process where a page is missing, so it is looked through first.

        Its last pages may be missing rightly, if they were taken and freed in one transaction.
        """
        needed = (self.env.info()["last_pgno"] + 1) * self.env.stat()["psize"]
        if _size(self.folder) >= needed or not hasattr(os, "posix_fallocate"):
            return
        with open(self.folder / "data.mdb", "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, needed)  # zeros where pages are missing; never changes what is there
        with self.env.begin() as txn:
            names = [bytes(name) for name, _ in txn.cursor()]
        for name in names:
            database = self.env.open_db(name, create=False)
            with self.env.begin() as txn:
                for _ in txn.cursor(database):
                    pass

    def _databases(self) -> dict[str, lmdb._Database]:
        with self.env.begin() as txn:
            names = {bytes(name).decode(errors="replace") for name, _ in islice(txn.cursor(), len(DATABASES) + 1)}
        if not names:
            with self.env.begin(write=True) as txn:  # if two processes do this at once, the second finds it done
                made = {name: self.env.open_db(name.encode(), txn=txn) for name in DATABASES}
                txn.put(b"format", b"%d" % FORMAT, overwrite=False, db=made["about"])
            return made
        if names != set(DATABASES):
            raise StoreError(
                f"{self.folder}: expected a store of user vectors, found another LMDB database; name another folder"
            )
        return {name: self.env.open_db(name.encode(), create=False) for name in DATABASES}


def acquire(folder: Path, *, create: bool, durable: bool) -> Environment:
    """The environment of a folder; whoever has it gives it back by :func:`release`.

    Raises:
        StoreError: there is none and none is to be made, the folder holds something else, or it cannot be opened.
    """
    files = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if "data.mdb" not in files:
        if not create:
            raise StoreError(f"{folder}: no store of user vectors is there; e2p users import TABLE {folder} makes one")
        if files - {"lock.mdb"} or (folder.exists() and not folder.is_dir()):
            found = min(files) if files else "a file"
            raise StoreError(f"{folder}: expected a store or an empty folder, found {found}; name another folder")
    with _OPENING:
        absent = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            status = folder.stat()
        except OSError as error:
            raise StoreError(f"{folder}: no store can be made there: {error.strerror}; name another folder") from None
        key = (status.st_dev, status.st_ino)
        found_env = _OPEN.get(key)
        if found_env is not None and found_env.pid != os.getpid():  # of the process that this one was forked from
            found_env.env.close()
            found_env = None
        if found_env is None:
            found_env = _OPEN[key] = Environment(folder, durable)
            if durable and "data.mdb" not in files:
                _sync_names([folder, *(path.parent for path in absent)])
        elif durable and not found_env.durable:
            raise StoreError(f"{folder}: is open in this process with durable=False; close it first")
        found_env.holders += 1
        return found_env


def release(environment: Environment) -> None:
    """Close it when nobody in this process has it any more."""
    with _OPENING:
        environment.holders -= 1
        if not environment.holders:
            for key in [key for key, value in _OPEN.items() if value is environment]:
                del _OPEN[key]
            environment.close()


def _sync_names(folders: Iterable[Path]) -> None:
    """A file's name is safe when its folder is: LMDB syncs what is in the file alone."""
    for folder in folders if hasattr(os, "O_DIRECTORY") else ():
        with contextlib.suppress(OSError):  # some file systems cannot, and some folders may not be read
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _size(folder: Path) -> int:
    file = folder / "data.mdb"
    return file.stat().st_size if file.exists() else 0
