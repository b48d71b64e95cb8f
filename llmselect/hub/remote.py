"""Sending files to a Hub repository so that what is there already is not sent again and failures can be repeated.

Large files are stored by their content first and named in one commit after that. A push that fails halfway has changed
nothing that anybody sees, and the next one finds the stored files; a push of the same content finds nothing to commit.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmselect.errors import LlmselectError, UsageError

log = logging.getLogger("llmselect")
T = TypeVar("T")
WAITS = (1, 2, 4, 8, 16)  # seconds between tries
COMMIT_FILES = 1000  # the Hub times out on commits of many more
LAST = ("llmselect.json", "README.md")  # committed last: what they tell of is there by then


@dataclass(frozen=True)
class Target:
    """A repository: its full id, whether it holds a dataset or a model, and how to write to it."""

    repo: str
    kind: str
    private: bool = False
    create_pr: bool = False


@dataclass(frozen=True)
class Pushed:
    """What a push did: where it is, and whether anything was new."""

    repo: str
    kind: str
    url: str
    commit: str
    changed: bool


def connect(repo: str) -> tuple[Any, str, str]:
    """The Hub's client, the user's name, and `repo` with its owner.

    Errors: `UsageError` without a token that the Hub accepts, and offline; `LlmselectError` when the Hub stays silent.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api: Any = HfApi(library_name="llmselect")
    try:
        name: str = patiently(api.whoami, "log in")["name"]
    except LocalTokenNotFoundError:
        raise UsageError("pushing needs a token of the Hub; type: hf auth login, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise UsageError(f"the Hub does not accept the token ({_status(error)}); type: hf auth login, "
                             "or set HF_TOKEN") from None  # fmt: skip
        raise LlmselectError(f"the Hub answered {_status(error)}; type the same command later") from error
    except (_transport(), OSError) as error:
        raise LlmselectError(f"the Hub is out of reach: {error}; type the same command later") from error
    return api, name, repo if "/" in repo else f"{name}/{repo}"


def send(api: Any, user: str, target: Target, files: Mapping[str, Path]) -> Pushed:
    """Make the repository if it is not there, and bring its files to those given; others in it stay as they are.

    Errors: `LlmselectError` when the Hub refuses or stays unreachable, and when a repository that should be private is
    public; nothing is lost by typing the command again.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        private = True if target.private else None
        patiently(lambda: api.create_repo(target.repo, repo_type=target.kind, private=private, exist_ok=True), "create the repo")
        before = patiently(lambda: api.repo_info(target.repo, repo_type=target.kind), "read the repo")
        if target.private and not before.private:
            raise LlmselectError(f"{target.repo} is there already and public, so --private cannot hold; make it private on "
                                 "its settings page, or push to another name")  # fmt: skip
        return _commit(api, user, target, files)
    except HfHubHTTPError as error:
        raise LlmselectError(f"push to {target.repo}: the Hub answered {_status(error)}. Type the same command to continue; "
                             "for 401 and 403 log in with a token that may write there: hf auth login") from error  # fmt: skip
    except (_transport(), OSError, RuntimeError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        why = f" ({_status(error.__cause__)})" if isinstance(error.__cause__, HfHubHTTPError) else ""
        raise LlmselectError(f"push to {target.repo} failed: {first}{why}. Type the same command to continue") from error


def _commit(api: Any, user: str, target: Target, files: Mapping[str, Path]) -> Pushed:
    from huggingface_hub import CommitOperationAdd

    title = f"llmselect: content {digest(files)[:16]}"
    names = sorted(files, key=lambda name: (name in LAST, name))
    changed, info, pull = False, None, None

    def attempt(part: list[str]) -> tuple[bool, Any, str | None]:
        # Looked up every time: the answer to the commit that opened it may have been lost.
        pull = _open_pull(api, user, target, title) if target.create_pr else None
        revision = None if pull is None else f"refs/pr/{pull.num}"
        head = api.repo_info(target.repo, repo_type=target.kind, revision=revision).sha
        operations = [CommitOperationAdd(name, files[name]) for name in part]  # a client changes them, so new ones each time
        info = api.create_commit(target.repo, operations, commit_message=title, repo_type=target.kind, revision=revision,
                                 create_pr=target.create_pr and pull is None)  # fmt: skip
        return info.oid != head, info, info.pr_url or (None if pull is None else pull.url)

    for start in range(0, len(names), COMMIT_FILES):
        part = names[start : start + COMMIT_FILES]
        new, info, url = patiently(lambda part=part: attempt(part), f"commit {len(part)} files")
        changed, pull = changed or new, url or pull
    assert info is not None, "a push has files"
    return Pushed(target.repo, target.kind, pull or str(info.commit_url), info.oid, changed)


def _open_pull(api: Any, user: str, target: Target, title: str) -> Any:
    """The user's open pull request of this very content, if there is one."""
    found = api.get_repo_discussions(target.repo, repo_type=target.kind, author=user, discussion_type="pull_request",
                                     discussion_status="open")  # fmt: skip
    return next((one for one in found if one.title == title), None)


def digest(files: Mapping[str, Path]) -> str:
    """Identity of a push: of the manifest and the card, which between them pin every file."""
    total = hashlib.sha256()
    for name in LAST:
        if name in files:
            total.update(files[name].read_bytes())
    return total.hexdigest()


def patiently(work: Callable[[], T], what: str) -> T:
    """`work()`, tried again with growing waits while the Hub is overloaded, broken or out of reach.

    Errors: the last error after six tries; any other at once. `UsageError` when the client is set to work offline.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for wait in WAITS:
        try:
            return work()
        except OfflineModeIsEnabled:
            raise UsageError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or use --dry-run") from None
        except HfHubHTTPError as error:
            code = error.response.status_code
            if code != 429 and code < 500:
                raise
            after = error.response.headers.get("retry-after", "")
            wait, why = max(wait, min(int(after), 300) if after.isdigit() else 0), _status(error)
        except (_transport(), json.JSONDecodeError) as error:  # a broken answer is no JSON
            why = str(error) or type(error).__name__
        log.warning("could not %s (%s); trying again in %d s", what, why, wait)
        time.sleep(wait)
    return work()


def _status(error: Any) -> str:
    return f"{error.response.status_code} {error.response.reason_phrase}".strip()


def _transport() -> type[Exception]:
    """What the HTTP client inside huggingface_hub raises without an answer; which client that is depends on its release."""
    from huggingface_hub.utils import get_session

    return importlib.import_module(type(get_session()).__module__.partition(".")[0]).TransportError
