"""An index or a store as one file: for another machine, for another place, for later.

A plain tar of the folder's own files, the databases as consistent copies: other programs may go on
reading and writing the folder meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvlink_rag.engine.choice import FILE as TUNED
from kvlink_rag.errors import InputError, StoreError
from kvlink_rag.index.catalog import CACHES, FILE, IndexCatalog
from kvlink_rag.index.check import is_index, verify_index
from kvlink_rag.store import FolderStore, StoreCheck
from kvlink_rag.store.folder import catalog as sql
from kvlink_rag.store.folder.database import explained
from kvlink_rag.store.folder.files import sync_folder

Progress = Callable[[int, int], None]

STORE_FILES = (
    rf"catalog\.sqlite|store\.json|{re.escape(TUNED)}|"
    r"chunks/([0-9a-f]{2})/\1[0-9a-f]{62}\.(?:safetensors|sealed)"
)
MEMBER = re.compile(rf"index\.sqlite|(?:{CACHES}/)?(?:{STORE_FILES})")
"""Names in an archive; anything else is refused."""


def write_archive(
    folder: str | os.PathLike[str],
    archive: str | os.PathLike[str],
    progress: Progress | None = None,
) -> int:
    """Write an index or a bare store into a tar file, which appears when it is whole.

    Caches of an encrypted store stay as they are; the texts of an index are in the clear.

    Args:
        folder: the index or store.
        archive: the file; made with mode 0600. One that is there is replaced.
        progress: called with (files written, files in all).

    Returns:
        the number of files in it.

    Raises:
        InputError: the folder is neither an index nor a store.
        StoreError: the folder cannot be read, or the file not written.
    """
    source, target = Path(folder).expanduser(), Path(archive).expanduser()
    if not is_index(source) and not (source / "catalog.sqlite").is_file():
        raise InputError(f"{source} is neither an index nor a store of chunk caches")
    with (
        _appearing(target) as new,
        tempfile.TemporaryDirectory() as scratch,
        contextlib.ExitStack() as stack,
    ):
        path, within = source, ""
        names: list[Path] = []
        with contextlib.ExitStack() as writing:  # only until rows and caches are copied as they fit
            if is_index(source):
                catalog = IndexCatalog(source)
                stack.callback(catalog.close)
                if not catalog.readonly:
                    writing.enter_context(catalog.only_writer())
                catalog.copy_to(Path(scratch, FILE))
                names.append(Path(scratch, FILE))
                path, within = source / CACHES, f"{CACHES}/"
            store = FolderStore(path)
            stack.callback(store.close)
            copy = store.copy_catalog(Path(scratch))
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
            count = _add_caches(tar, store, copy, within, progress)
            beside = (path / "store.json", path / TUNED)
            names += [each for each in beside if each.exists()]
            for name in [*names, copy]:
                tar.add(name, name.name if name.name == FILE else within + name.name)
        return count + len(names) + 1


def _add_caches(
    tar: tarfile.TarFile, store: FolderStore, copy: Path, within: str, progress: Progress | None
) -> int:
    """Add the caches that a copied catalog has; those removed meanwhile leave it."""
    with contextlib.closing(sqlite3.connect(copy)) as tx:
        keys = sorted(sql.keys(tx))
        gone = []
        for done, key in enumerate(keys, 1):
            path = store.path_of(key)
            try:
                tar.add(path, f"{within}{path.relative_to(store.path).as_posix()}")
            except FileNotFoundError:
                gone.append(key)
            if progress is not None:
                progress(done, len(keys))
        for key in gone:
            sql.drop(tx, key)
        tx.commit()
    return len(keys) - len(gone)


def read_archive(
    archive: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    progress: Progress | None = None,
) -> StoreCheck:
    """Make a folder from what :func:`write_archive` wrote; it appears when all of it is verified.

    Nothing in the archive is trusted: names, kinds and checksums are looked at first.

    Args:
        folder: a new folder, or an empty one.
        progress: called with (caches verified, caches in all).

    Returns:
        what was verified.

    Raises:
        InputError: the archive is damaged or something else, or there is something in the folder.
        StoreError: the folder cannot be written.
    """
    source, target = Path(archive).expanduser(), Path(folder).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is there already: import into a new folder")
    with explained("read", source):
        file = source.open("rb")
    with file, explained("import into", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_name(f".{target.name}.importing-{secrets.token_hex(8)}")
        new.mkdir(mode=0o700)
        try:
            _extract(file, source, new)
            _check_one(new, source)
            check = _verified(new, source, progress)
            os.replace(new, target)  # an empty folder gives way
            sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
    return check


def _extract(file: object, source: Path, folder: Path) -> None:
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
            for member in tar:
                # a sparse one takes as much disk as it says, from an archive of any size
                if not member.isreg() or member.issparse() or not MEMBER.fullmatch(member.name):
                    raise InputError(f"{source} is no archive of kvlink: it has {member.name!r}")
                path = folder / member.name
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                contents = tar.extractfile(member)
                assert contents is not None  # a regular file
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with open(descriptor, "wb") as out:
                    shutil.copyfileobj(contents, out)
                    out.flush()
                    os.fsync(descriptor)
                if path.stat().st_size != member.size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
    except InputError:
        raise  # which is a ValueError, too
    except (tarfile.TarError, EOFError, ValueError) as error:  # of a number that makes no sense
        raise InputError(f"{source} is no whole archive of kvlink ({error}): copy it again") from (
            error
        )
    except FileExistsError as error:
        raise InputError(f"{source} has a file twice: {error.filename}") from error


def _check_one(folder: Path, source: Path) -> None:
    """Refuse what would stay without having been verified: a store beside an index, or in one."""
    names = {path.name for path in folder.iterdir()}
    if names & {FILE, CACHES} and names - {FILE, CACHES}:
        raise InputError(f"{source} is no archive of kvlink: it is both an index and a store")


def _verified(folder: Path, source: Path, progress: Progress | None) -> StoreCheck:
    """Check what was extracted.

    Raises:
        InputError: something of it is damaged or missing.
    """
    try:
        if is_index(folder):
            check = verify_index(folder, progress)
        elif (folder / "catalog.sqlite").is_file():
            store = FolderStore(folder)
            try:
                check = store.verify(progress)
            finally:
                store.close()
        else:
            raise InputError(f"{source} holds neither an index nor a store of chunk caches")
    except StoreError as error:
        raise InputError(f"{source} cannot be used: {error}") from error
    found = [*check.corrupt, *check.missing, *check.orphans]
    if found:
        raise InputError(
            f"{source} is damaged: {len(found)} of its caches or rows, among them {found[0]}; "
            "export it again"
        )
    return check


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A new file beside the place that it gets when the block ends well."""
    new = path.with_name(f".{path.name}.writing-{secrets.token_hex(8)}")
    with explained("write", path):
        try:
            yield new
            with new.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(new, path)
            sync_folder(path.absolute().parent)
        finally:
            new.unlink(missing_ok=True)
