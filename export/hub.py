"""Packages on the Hugging Face Hub: pushed with a card, pulled by a commit or a sha256, and checked before all else.

Files travel by `huggingface_hub`: through its cache, so that no file is fetched twice; a connection that is cut is
taken up again at the last 10 MB; progress bars on stderr. Only a package that passed its checks leaves the cache.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm

from export.card import MARK, card
from export.checks import refusal
from export.manifest import Beside, Manifest, parse_beside
from export.store import Entry, PackageStore, sha256
from recipes.recipe import Recipe
from utils.errors import UsageError, UserError, one_line
from utils.files import check_target, permitted

_PACKAGE = re.compile(r"\w[\w.-]*\.pt2", re.ASCII)  # at a repository's top, and not hidden
_CARD = "README.md"
NATIVE_CODE = "a package is native code, which runs with all your rights"


@dataclass(frozen=True)
class Pin:
    """What says which bytes are wanted: a commit of the Hub's repository, the .pt2 file's sha256, or both."""

    commit: str | None
    sha256: str | None

    def __post_init__(self) -> None:
        if self.commit is None and self.sha256 is None:
            raise UsageError(
                f"{NATIVE_CODE}: pin it with --revision and a commit's 40 hex digits (the repository's page lists its "
                "commits), or with --sha256"
            )
        if self.commit is not None and not re.fullmatch(r"[0-9a-f]{40}", self.commit):
            raise UsageError(
                f"--revision {self.commit}: a package is native code, and what a branch or a tag names can change: "
                "give a commit's 40 hex digits"
            )
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise UsageError(f"--sha256 {self.sha256}: give 64 hex digits")


@dataclass(frozen=True)
class Pushed:
    """Where a package lies on the Hub: the file's page, the commit that holds it, and whether it was there before."""

    url: str
    commit: str
    was_there: bool


def push(entry: Entry, repo: str, private: bool = False) -> Pushed:
    """Put a package, which was checked, into the Hub's `repo` in one commit with its manifest and the card of all.

    Of packages there whose manifests can't be read, the card has the names, and stderr why.

    Raises:
        UsageError: `repo` is no owner/name, or you may not write there.
        UserError: it holds another package of this name or a card of someone else's; the Hub can't be reached; ...
    """
    _check_repo(repo)
    api = HfApi()
    name = entry.path.name
    with _hub_errors(api, repo):
        api.create_repo(repo, private=private or None, exist_ok=True)
    there = _Contents.of(api, repo, None)
    if name in there.packages:
        digest = there.packages[name] or sha256(there.fetch(name))
        if digest != entry.beside.sha256:
            raise UserError(
                f"{repo} has a {name} with sha256 {digest[:16]}, this one has {entry.beside.sha256[:16]}: push it to "
                "another repository, or delete the one there first"
            )
        return Pushed(f"{api.endpoint}/{repo}/blob/{there.commit}/{name}", there.commit, True)
    if _CARD in there.files and MARK.encode() not in there.fetch(_CARD).read_bytes():
        raise UserError(f"{repo} has a {_CARD} that isn't push's: push to another repository, or delete it first")
    besides, unread = there.besides(there.packages)
    _tell(unread, "the card has its name alone")
    listed = {name: entry.beside, **besides}
    text = card(repo, [Entry(Path(name), beside) for name, beside in listed.items()], unread)
    manifest = entry.path.with_suffix(".json")
    files: dict[str, Path | bytes] = {name: entry.path, manifest.name: manifest, _CARD: text.encode()}
    with _hub_errors(api, repo):
        done = api.create_commit(
            repo,
            [CommitOperationAdd(path, content) for path, content in files.items()],
            commit_message=f"Add {name}",
            parent_commit=there.commit,  # so that two pushes at one time can't drop each other from the card
        )
    return Pushed(f"{api.endpoint}/{repo}/blob/{done.oid}/{name}", done.oid, False)


def pull(source: str, pin: Pin, folder: Path) -> Iterator[tuple[Entry, bool]]:
    """The package owner/name/FILE, or all those of owner/name that `pin` fits, one by one, and whether it was there.

    A package is put into `folder` whole and checked, or not at all; what is there is left as it is. Of all those of
    owner/name, those whose manifests can't be read are left out, and stderr has why.

    Raises:
        UsageError: `source` or `folder` is none, the Hub's repository, the commit or the file is missing, ...
        UserError: what came isn't what was pinned, or is damaged; no manifest of what is wanted can be read; `folder`
            has another package of that name; ...
    """
    parts = source.split("/")
    repo, file = "/".join(parts[:2]), "/".join(parts[2:])
    _check_repo(repo)
    if file and not _PACKAGE.fullmatch(file):
        raise UsageError(f"{source} names no package: give owner/name/FILE.pt2, or owner/name alone")
    check_target(folder)
    there = _Contents.of(HfApi(), repo, pin.commit)
    besides, unread = there.besides(_wanted(there, file, pin))
    if not besides:
        raise UserError("; ".join(unread.values()))
    _tell(unread, "left out")
    for name, beside in besides.items():
        yield _pull(there, name, beside, pin, folder)


def _tell(unread: dict[str, str], what_follows: str) -> None:
    for reason in unread.values():
        tqdm.write(f"{reason}: {what_follows}", file=sys.stderr)  # between progress bars


class _UnreadError(Exception):
    """There is no manifest beside a package that this program reads."""


@dataclass(frozen=True)
class _Contents:
    """A commit of the Hub's `repo`. packages: the .pt2 files, with the sha256 that the Hub says, if it says one."""

    api: HfApi
    repo: str
    commit: str
    files: frozenset[str]
    packages: dict[str, str | None]

    @classmethod
    def of(cls, api: HfApi, repo: str, commit: str | None) -> _Contents:
        """commit: None for the newest."""
        with _hub_errors(api, repo, commit):
            info: ModelInfo = api.model_info(repo, revision=commit, files_metadata=True)
        if info.sha is None or commit not in (None, info.sha):
            raise UserError(f"{repo}: {commit} names the commit {info.sha} there: give that one's digits")
        files = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        packages = {name: file.lfs.sha256 if file.lfs else None for name, file in files.items()}
        packages = {name: packages[name] for name in sorted(packages) if _PACKAGE.fullmatch(name)}
        return cls(api, repo, info.sha, frozenset(files), packages)

    def fetch(self, file: str) -> Path:
        """The file in the Hub's cache, downloaded where it isn't there."""
        with _hub_errors(self.api, self.repo, self.commit):
            return Path(self.api.hf_hub_download(self.repo, file, revision=self.commit))

    def besides(self, names: Iterable[str]) -> tuple[dict[str, Beside], dict[str, str]]:
        """The manifests beside packages, and of those that can't be read why, by the packages' names."""
        found, unread = {}, {}
        for name in names:
            try:
                found[name] = self._beside(name)
            except _UnreadError as error:
                unread[name] = str(error)
        return found, unread

    def _beside(self, name: str) -> Beside:
        file = name.removesuffix(".pt2") + ".json"
        if file not in self.files:
            raise _UnreadError(f"{self.repo} has no {file} beside {name} at {self.commit}: it is no whole package")
        fetched = self.fetch(file)
        try:
            beside = parse_beside(fetched.read_text())
            Recipe.from_dict(beside.manifest.identity.recipe)
        except (ValueError, UsageError) as error:
            raise _UnreadError(
                f"{self.repo}/{file} is damaged, or of another version of this program ({error})"
            ) from None
        return beside


def _wanted(there: _Contents, file: str, pin: Pin) -> list[str]:
    """The names of the packages to pull."""
    held = ", ".join(there.packages) or "no package"
    if file:
        found = [file] if file in there.packages else []
    else:
        found = [name for name, digest in there.packages.items() if pin.sha256 in (None, digest)]
    if not found:
        wanted = file or (f"package with sha256 {pin.sha256}" if pin.sha256 else "package")
        raise UsageError(f"{there.repo} has no {wanted} at {there.commit}: it holds {held}")
    return found


def _pull(there: _Contents, name: str, beside: Beside, pin: Pin, folder: Path) -> tuple[Entry, bool]:
    of_hub = f"{there.repo}/{name}"
    if pin.sha256 not in (None, beside.sha256):
        raise UserError(f"{of_hub} has sha256 {beside.sha256} by its manifest, --sha256 says {pin.sha256}")
    path = folder / name

    def make(temporary: Path) -> Manifest:
        _check_same(path, beside)
        downloaded = there.fetch(name)
        shutil.copyfile(downloaded, temporary)
        reason = refusal(Entry(temporary, beside))
        if reason is not None:
            for copy in (downloaded.resolve(), downloaded):  # the cache's file and its link: nobody is to load it
                copy.unlink(missing_ok=True)
            raise UserError(f"{of_hub} {reason}: it was deleted again, and nothing put into {folder}")
        return beside.manifest

    try:
        entry, was_there = PackageStore(folder).write(path.stem, make)
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror or one_line(error)}") from None
    _check_same(path, beside)
    return entry, was_there


@permitted("read")
def _check_same(path: Path, beside: Beside) -> None:
    """Raises UserError: the package's file or its manifest is there already, and isn't this one's, or can't be read."""
    manifest = path.with_suffix(".json")
    other = [path] if path.exists() and sha256(path) != beside.sha256 else []
    if manifest.exists():
        try:
            other += [] if parse_beside(manifest.read_text()) == beside else [manifest]
        except ValueError:
            other.append(manifest)
    if other:
        raise UserError(
            f"{other[0]} is there, and isn't what was to be pulled (sha256 {beside.sha256[:16]}): it is left as it is; "
            "move it away, or choose another folder with --out"
        )


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UsageError(f"{repo} names no repository of the Hub: give owner/name")


@contextmanager
def _hub_errors(api: HfApi, repo: str, commit: str | None = None) -> Iterator[None]:
    """What the Hub's client raises, as errors that say what to do.

    Raises:
        UsageError: the repository, the commit or the right to it is missing.
        UserError: the Hub can't be reached or failed.
    """
    try:
        yield
    except GatedRepoError:
        page = f"{api.endpoint}/{repo}"
        raise UsageError(f"{repo} is gated: accept its terms on {page}, then `hf auth login` or set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise UsageError(f"{repo} has no commit {commit}: its commits are at {api.endpoint}/{repo}/commits") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401 or isinstance(error, RepositoryNotFoundError):
            raise UsageError(
                f"there is no {repo} on the Hub that is open to you: check its name, and `hf auth login` (or set "
                "HF_TOKEN) if it is private or to be written"
            ) from None
        if status == 403:
            raise UsageError(
                f"your token may not do this with {repo}: `hf auth login` (or set HF_TOKEN) with one that may"
            ) from None
        if status == 412:
            raise UserError(f"{repo} was changed by someone else meanwhile: push again") from None
        raise UserError(f"the Hub failed on {repo}: {one_line(error)}") from error
    except OfflineModeIsEnabled:
        raise UsageError("HF_HUB_OFFLINE is set: unset it to reach the Hub") from None
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"could not reach the Hub at {api.endpoint} ({one_line(error.__cause__ or error)}): check the connection, "
            "and try again"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # a file that came short, a full disk, an upload that failed
        cause = one_line(error.__cause__ or error)
        raise UserError(f"could not transfer all of {repo}: {cause}; try again") from error
