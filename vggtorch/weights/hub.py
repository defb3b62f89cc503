"""The Hugging Face hub, by its own client: files, and whole repositories in and out.

The client keeps what it has fetched, knows the token (`hf auth login`, HF_TOKEN) and the endpoint
(HF_ENDPOINT). What it raises becomes a message that says what to do.
"""

from __future__ import annotations

import http.client
import re
import urllib.error
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from vggtorch import files
from vggtorch.paths import HUB
from vggtorch.telling import tell
from vggtorch.text import visible
from vggtorch.weights.downloads import offline, opened

PATIENCE = 10.0  # seconds until the hub must have answered


class Repository(NamedTuple):
    """What an address names: a repository, a file in it (empty for all), and a revision."""

    name: str
    file: str = ""
    revision: str | None = None


def repository_of(address: str) -> Repository:
    """What an address names: `hf://owner/name`, with `@revision` and `/file` where they are meant.

    >>> from vggtorch.weights.hub import repository_of
    >>> repository_of("hf://ann/cats@v2/model.keras")
    Repository(name='ann/cats', file='model.keras', revision='v2')

    Raises:
        ValueError: no owner, no name, or what can't be a name.
    """
    part = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
    form = rf"(?:{HUB})?({part}/{part})(?:@([^/@]+))?(?:/(.+))?"
    found = re.fullmatch(form, address, re.ASCII)
    if found is None or "--" in found[1] or ".." in address:
        raise ValueError(
            f"Received {visible(address)!r}; expected hf://owner/name of a repository on the "
            f"Hugging Face hub, with @revision behind it where one is meant."
        )
    return Repository(found[1], found[3] or "", found[2])


def from_hub(address: str) -> Path:
    """`owner/name/file` of the hub whose hash is known: in its client's cache, else fetched.

    Raises:
        OSError: it can't be had.
    """
    from huggingface_hub import hf_hub_download

    name, _, file = address.rpartition("/")
    with suppress(OSError):  # not in its cache
        return Path(hf_hub_download(name, file, local_files_only=True))
    _knock()
    with _client(Repository(name, file)):
        return Path(hf_hub_download(name, file))


def file_from_hub(address: str) -> Path:
    """The file `hf://owner/name/file` as it is there now; raises as `folder_from_hub` does."""
    wanted = repository_of(address)
    if not wanted.file:
        raise ValueError(
            f"Received {visible(address)!r}, a whole repository; expected one file in it, such as "
            f"{visible(address)}/model.safetensors."
        )
    folder = folder_from_hub(address.removesuffix(f"/{wanted.file}"), [wanted.file])
    if not (folder / wanted.file).is_file():
        raise OSError(f"{HUB}{wanted.name} has no file {visible(wanted.file)!r}.")
    return folder / wanted.file


def folder_from_hub(address: str, patterns: Sequence[str]) -> Path:
    """The files of a repository that match, in the client's cache; only changed ones are fetched.

    Where the hub can't be reached, what was fetched before is taken, with a warning.

    Raises:
        ValueError: no address of a repository.
        OSError: it can't be had.
    """
    from huggingface_hub import constants, snapshot_download

    wanted = repository_of(address)
    if wanted.file:
        raise ValueError(
            f"Received {visible(address)!r}; expected a repository without a file behind it, "
            f"{HUB}{wanted.name}."
        )
    ask: dict[str, Any] = {"revision": wanted.revision, "allow_patterns": list(patterns)}
    try:
        _knock()
    except OSError as error:
        try:
            kept = Path(snapshot_download(wanted.name, **ask, local_files_only=True))
        except Exception:
            raise OSError(
                f"Could not get {address}: {files.first_line(error)}. Nothing of it is in the "
                f"cache, {constants.HF_HUB_CACHE}."
            ) from error
        if not offline():
            tell(
                f"{constants.ENDPOINT} can't be reached, so {address} is what was fetched before, "
                f"commit {kept.name[:12]}."
            )
        return kept
    with _client(wanted):
        return Path(snapshot_download(wanted.name, **ask))


def folder_to_hub(
    folder: Path, name: str, *, private: bool | None, revision: str | None, message: str
) -> str:
    """Upload a folder into a repository, which is made where there is none; returns its address.

    Args:
        folder: all of it goes up.
        name: `owner/name`.
        private: None leaves a repository as it is, and makes a new one as the account is set.
        revision: a branch, made where there is none; None for the main one.
        message: of the commit.

    Raises:
        ValueError: a name that can't be one, or a repository that is public and wanted private.
        OSError: the hub can't be reached or refuses.
    """
    from huggingface_hub import HfApi, constants

    wanted = repository_of(name)
    if wanted.file or (wanted.revision and revision):
        raise ValueError(f"Received {visible(name)!r}; expected owner/name of a repository.")
    revision = wanted.revision or revision
    try:
        _knock()
    except OSError as error:
        raise OSError(f"Could not push to {wanted.name}: {error}.") from error
    api = HfApi(endpoint=constants.ENDPOINT, library_name="vggtorch")
    with _client(wanted, "push to"):
        api.create_repo(wanted.name, private=private, exist_ok=True)
        if private is not None and bool(api.repo_info(wanted.name).private) != private:
            raise ValueError(
                f"Received private={private}, and {wanted.name} is there and is "
                f"{'public' if private else 'private'}. Nothing was pushed. Change it on its page, "
                f"or choose another name."
            )
        if revision:
            api.create_branch(wanted.name, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=wanted.name, folder_path=folder, revision=revision, commit_message=message
        )
    return f"{constants.ENDPOINT}/{wanted.name}"


def _knock() -> None:
    """See that there is a way to the hub: where there is none its client tries for half a minute.

    Raises:
        OSError: there is none, or it is forbidden.
    """
    from huggingface_hub import constants

    if offline():
        raise OSError("VGGTORCH_OFFLINE is set")
    try:
        opened(constants.ENDPOINT, PATIENCE).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = files.first_line(getattr(error, "reason", None) or error)
        raise OSError(f"{constants.ENDPOINT} can't be reached ({reason})") from error


@contextmanager
def _client(wanted: Repository, doing: str = "get") -> Iterator[None]:
    """Inside, what the hub's client raises becomes an OSError that says what to do."""
    from huggingface_hub import constants, errors

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    start = f"Could not {doing} {HUB}{wanted.name}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise OSError(
            f"{start}: access is given on its page; ask for it there, and {log_in}."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise OSError(
            f"{start}: {constants.ENDPOINT} has no such repository, or a private one that this "
            f"token may not see. See to the spelling, or {log_in}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise OSError(f"{start}: it has no revision {visible(wanted.revision)!r}.") from error
    except errors.LocalEntryNotFoundError as error:  # the connection broke
        raise OSError(f"{start}: {files.first_line(error)}") from error
    except errors.EntryNotFoundError as error:
        raise OSError(f"{start}: it has no file {visible(wanted.file)!r}.") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise OSError(
                f"{start}: the hub refuses ({status}). For that, {log_in} with a token that may "
                f"{'write there' if doing == 'push to' else 'read it'}."
            ) from error
        raise OSError(f"{start}: {files.first_line(error)}") from error
    except (ValueError, OSError) as error:
        if isinstance(error, errors.HFValidationError):
            raise ValueError(f"{start}: {files.first_line(error)}") from error
        raise
    except Exception as error:  # the client raises whatever its HTTP library does
        raise OSError(f"{start}: {files.first_line(error)}") from error
