"""Folders and files behind a URL (`s3://`, `gs://`, `hf://`, `memory://`, ...), by way of a copy on this machine.

All work is done in a local folder, the mirror of the URL: a file is fetched when it is asked for, and sent when it is
whole. Everything else in the package knows paths only; `local` makes one of a URL. Which protocols there are, and how
they find their credentials, is fsspec's business. No function here goes to the network for a path without a URL.
"""

import hashlib
import os
import posixpath
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from ..errors import AnatomyError

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")  # two letters at least: one may be the name of a Windows drive
_UNSENT = ".unsent"
_VERSION = ".version"
# The mirrors of this process: folder or file on this machine -> the URL that it stands for.
_MIRRORS: dict[Path, str] = {}


def is_url(path: str | Path) -> bool:
    """Whether this is written as a URL.

    >>> is_url("s3://bucket/audits/run1"), is_url("audits/run1")
    (True, False)
    """
    return _URL.match(str(path)) is not None


def local(path: str | Path) -> Path:
    """The path to work with: `path` itself, or the mirror of a URL, in `trl_anatomy` under `HF_HOME`.

    `file://` is no mirror but the file itself. Nothing is fetched yet, and nothing is made.

    Raises:
        AnatomyError: a protocol that fsspec does not know or lacks a package for; a URL that names no place, or holds
            a password (it would be written into what is stored), `..` or `::`.
    """
    if not is_url(path):
        return Path(path)
    url = str(path).rstrip("/")
    if re.search(r"://[^/]*:[^/]*@", url):
        shown_url = re.sub(r"://[^/]*@", "://...@", url)
        raise AnatomyError(f"{shown_url}: holds a password; leave it out, and set it where fsspec looks for it.")
    if not is_url(url) or "::" in url or ".." in url.split("/"):
        problem = "found '..' or '::'" if is_url(url) else "names no place"
        raise AnatomyError(f"{path}: {problem}, allowed: PROTOCOL://FOLDER/NAME.")
    fs, inside = _reached(url)
    if isinstance(fs, LocalFileSystem):
        return Path(inside)
    from huggingface_hub import constants

    # One folder for each URL, named by its hash, since not every URL is a path that a disk can hold.
    name = re.sub(r"[^\w.-]", "_", url.rpartition("/")[2])[-100:]
    mirror = Path(constants.HF_HOME) / "trl_anatomy" / hashlib.sha256(url.encode()).hexdigest()[:16] / (name or "_")
    _MIRRORS[mirror] = url
    return mirror


def url_of(path: Path) -> str | None:
    """The URL that a path of a mirror stands for; None for any other path."""
    for folder in (path, *path.parents) if _MIRRORS else ():
        if folder in _MIRRORS:
            return "/".join([_MIRRORS[folder], *path.relative_to(folder).parts])
    return None


def shown(what: object) -> str:
    """A path, or a text with paths in it, as the user knows them: URLs instead of their mirrors."""
    text = str(what)
    for mirror, url in _MIRRORS.items():
        text = text.replace(str(mirror), url)
    return text


def joined(folder: str | Path, path: str) -> str:
    """A path seen from a folder; either may be a URL. `~` is the home of the user.

    >>> joined("s3://bucket/policies", "../concepts/a"), joined("s3://bucket", "gs://other/a"), joined("here", "a")
    ('s3://bucket/concepts/a', 'gs://other/a', 'here/a')
    """
    if is_url(path):
        return path
    path = os.path.expanduser(path)
    if not is_url(folder) or os.path.isabs(path):
        return str(folder / Path(path))
    protocol, _, inside = str(folder).partition("://")
    return f"{protocol}://{posixpath.normpath(posixpath.join(inside, path))}"


def exists(path: str | Path) -> bool:
    """Whether a file or folder is there: at the URL, for a URL or its mirror.

    Raises:
        AnatomyError: as `local`; the place cannot be reached.
    """
    path = local(path)
    url = url_of(path)
    if url is None:
        return os.path.exists(path)
    return bool(_about(url))


def listed(folder: Path) -> dict[str, int]:
    """Names of the files in a folder and their bytes, in order; at the URL, for a mirror. Empty where there is none.

    Raises:
        AnatomyError: the place cannot be reached.
    """
    url = url_of(folder)
    if url is None:
        files = [file for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
        return {file.name: file.stat().st_size for file in sorted(files)}
    fs, inside = _reached(url)
    try:
        entries = [entry for entry in fs.ls(inside, detail=True) if entry["type"] == "file"]
    except FileNotFoundError:
        return {}
    except Exception as error:
        raise _unreached(url, error) from error
    return dict(sorted((posixpath.basename(entry["name"]), int(entry["size"])) for entry in entries))


def fetch(
    file: Path,
    sha256: str | None = None,
    *,
    into: Path | None = None,
    own: bool = False,
    versioned: bool = False,
) -> bool:
    """Whether a file is there; one of a mirror is first brought from its URL.

    Processes of one machine fetch one after another, and those that find a copy with the right hash leave it.

    Args:
        file: the file.
        sha256: its hash, where it is known: a copy that has it is not fetched again. What is fetched is not checked,
            its reader does that.
        into: where to put it, instead of `file`.
        own: a copy that could not be sent before is work of this machine: it is sent now, instead of being replaced.
        versioned: for a large file of which no hash is known: a copy of the version (ETag) that is there is not
            fetched again. Where the store has no ETags it always is.

    Raises:
        AnatomyError: the place cannot be reached, the copy cannot be written, or a versioned file was replaced while it
            was fetched, so that the copy may hold parts of both.
    """
    url = url_of(file)
    if url is None:
        return os.path.isfile(file)  # unlike Path.is_file, false for names that no file can have
    if own and file.is_file() and _mark(file).exists():
        send(file)
        return True
    copy = into or file
    partial = copy.with_name(f"{copy.name}.{os.getpid()}.partial")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(_root(file).parent / "lock"):
            if sha256 is not None and file.is_file() and _hash(file) == sha256:
                return True
            about = _about(url)
            if about.get("type") != "file":
                return False
            version, noted = _version(about), copy.with_name(copy.name + _VERSION)
            if versioned and version and copy.is_file() and noted.is_file() and noted.read_text() == version:
                return True
            noted.unlink(missing_ok=True)
            fs, inside = _reached(url)
            fs.get_file(inside, str(partial))
            if versioned and version != _version(_about(url)):
                raise AnatomyError(f"{url}: was replaced while it was read; start again.")
            partial.replace(copy)
            if versioned and version:
                noted.write_text(version)
            return True
    except AnatomyError:
        raise
    except Exception as error:
        raise _unreached(url, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def mark(file: Path) -> None:
    """Note that a file of a mirror is about to change and is not yet sent; nothing for any other file."""
    if url_of(file) is not None:
        _mark(file).touch()


def send(file: Path) -> None:
    """Send a whole file of a mirror to its URL; nothing for any other file.

    Raises:
        AnatomyError: it cannot be written there.
    """
    url = url_of(file)
    if url is None:
        return
    fs, inside = _reached(url)
    try:
        fs.put_file(str(file), inside)
    except Exception as error:
        raise AnatomyError(
            f"{url}: cannot be written ({_reason(error)}). The finished files lie in {_root(file)}: see to the "
            "network, the credentials, the permissions and the room there, and start the same command again, which "
            "sends them."
        ) from error
    _mark(file).unlink(missing_ok=True)


def remove(file: Path) -> None:
    """Remove a file, at the URL too if it is one of a mirror.

    Raises:
        AnatomyError: it cannot be removed there.
    """
    url = url_of(file)
    if url is not None:
        fs, inside = _reached(url)
        try:
            if _about(url):
                fs.rm_file(inside)
        except AnatomyError:
            raise
        except Exception as error:
            raise AnatomyError(f"{url}: cannot be removed ({_reason(error)}); see to the permissions there.") from error
        _mark(file).unlink(missing_ok=True)
    file.unlink(missing_ok=True)


def _reached(url: str) -> tuple[Any, str]:
    """The filesystem of a URL, and the path in it."""
    try:
        fs, inside = fsspec.url_to_fs(url)
        fs.invalidate_cache()  # of listings: others write there too
    except ImportError as error:
        raise AnatomyError(f"{url}: {_reason(error)}") from error  # names the package to install
    except ValueError as error:
        raise AnatomyError(
            f"{url}: {_reason(error)}; allowed: a path, or a URL of a protocol that fsspec knows, such as s3://, "
            "gs://, hf:// or file://."
        ) from error
    except Exception as error:
        raise _unreached(url, error) from error
    return fs, inside


def _about(url: str) -> dict[str, Any]:
    """What the store tells of a file or folder, or {}. Not `fs.exists`, which takes any failure for nothing there."""
    fs, inside = _reached(url)
    try:
        return dict(fs.info(inside))
    except FileNotFoundError:
        return {}
    except Exception as error:
        raise _unreached(url, error) from error


def _version(about: dict[str, Any]) -> str | None:
    return about.get("ETag") or about.get("etag")


def _unreached(url: str, error: Exception) -> AnatomyError:
    return AnatomyError(
        f"{url}: cannot be read ({_reason(error)}). See to the network, the credentials and the permissions there, and "
        "start again."
    )


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0]


def _root(file: Path) -> Path:
    """The mirror that a file belongs to."""
    return next(folder for folder in (file, *file.parents) if folder in _MIRRORS)


def _mark(file: Path) -> Path:
    return file.with_name(file.name + _UNSENT)


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
