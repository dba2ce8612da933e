"""Reaching models and data sets on the Hugging Face hub, and saying why one cannot be had."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator
from pathlib import Path

from ..errors import FastsaeError, StreamError


def hub_is_reachable() -> bool:
    """False in offline mode and without a network: then only what is in the local cache can be had.

    One short request, because the hub's client retries for half a minute before it gives up.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # the client library decides which exceptions a lost network raises
        return False
    return True


def commit_of(dataset: str, revision: str | None) -> str | None:
    """The commit that ``revision`` (by default the main branch) of a data set is at now; None where the hub
    does not say."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(dataset, revision=revision, timeout=10).sha
    except Exception:  # opening it says what is wrong, if anything is
        return None


def cached_commit(model: str, revision: str | None) -> str | None:
    """The commit that ``revision`` of a model stood for when it was last loaded here."""
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:  # not a name of the hub
        return None
    return Path(cached).parent.name if isinstance(cached, str) else None


def access_error(kind: str, name: str, error: Exception) -> StreamError:
    """What ``error``, raised on opening a ``kind`` ("model" or "data set"), means and what to do."""
    from huggingface_hub import constants, errors, get_token

    local = {
        "model": "--model DIR for a local directory",
        "data set": "--text-files FILE ... for local text",
    }[kind]
    chain = list(_chain(error))
    words = " ".join(str(e) for e in chain).lower()

    def raised(*kinds: type[Exception]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    def says(*phrases: str) -> bool:
        return any(phrase in words for phrase in phrases)

    # The hub answers 401 to an unknown name too, and mentions gates then: the order matters.
    gated = raised(errors.GatedRepoError) or says("access a gated repo", "is a gated")
    unknown = raised(errors.RepositoryNotFoundError, errors.HFValidationError) or says(
        "not a valid model identifier", "doesn't exist on the hub"
    )
    status = set(map(_status, chain))
    if gated or (not unknown and status & {401, 403}):
        path = name if kind == "model" else f"datasets/{name}"
        token = (
            "no access token was found: log in with `hf auth login` or set HF_TOKEN"
            if get_token() is None
            else "the access token in use was not granted it"
        )
        return StreamError(
            f"the {kind} {name!r} is gated or private, and {token}; accept its licence at "
            f"{constants.ENDPOINT}/{path} with the account you log in with"
        )
    if unknown:
        return StreamError(
            f"there is no {kind} {name!r} on the Hugging Face hub, nor a local directory of that "
            f"name; check the spelling (owner/name), log in with `hf auth login` if it is private, "
            f"or give {local}"
        )
    if raised(ConnectionError, TimeoutError, errors.LocalEntryNotFoundError) or says(
        "couldn't connect", "offline mode"
    ):
        return StreamError(
            f"the {kind} {name!r} is not in the local cache and {constants.ENDPOINT} cannot be "
            f"reached; check the network, or run offline: {local}, or --demo, which needs nothing"
        )
    return StreamError(f"the {kind} {name!r} cannot be opened: {error}")


_NETWORK_PACKAGES = {"aiohttp", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}
_PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}
"""HTTP statuses of a server that may answer otherwise in a while."""


def is_transient(error: Exception) -> bool:
    """Whether ``error`` comes from a network or a server that may be there again in a while."""
    if isinstance(error, FastsaeError):
        return False
    for e in _chain(error):
        if (status := _status(e)) is not None:
            return status in _PASSING
        kinds = (ConnectionError, TimeoutError, http.client.HTTPException, ssl.SSLError)
        if isinstance(e, kinds) or type(e).__module__.partition(".")[0] in _NETWORK_PACKAGES:
            return True
    return False


def is_refused(error: Exception) -> bool:
    """Whether a server said no in a way that will be the same next time: no login, no permission."""
    status = _status(error)
    return status is not None and 400 <= status < 500 and status not in _PASSING


def _status(e: BaseException) -> int | None:
    """The HTTP status that an error carries, if any."""
    status = getattr(getattr(e, "response", None), "status_code", getattr(e, "status", None))
    return status if isinstance(status, int) else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
