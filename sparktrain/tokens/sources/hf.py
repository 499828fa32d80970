"""Files of a dataset repository of the Hugging Face Hub: ``hf://datasets/OWNER/NAME[@REVISION]/path``.

huggingface_hub knows repositories, their addresses and the token (``HF_TOKEN``, or what ``hf auth login`` left); the
bytes come by :class:`HttpSource`, with the same retries and ranges as any other. Listing names the commit in every
URI, so that all ranks and every restart read the same bytes whatever is pushed meanwhile.
"""

from collections.abc import Callable
from typing import TypeVar

import huggingface_hub
import huggingface_hub.errors

from sparktrain.errors import DataError
from sparktrain.tokens.sources.http import HttpSource, Token
from sparktrain.tokens.sources.patience import Passing, Patience, persist

T = TypeVar("T")

_VARIABLE = "HF_TOKEN"


def open_if_there(uri: str, patience: Patience | None = None) -> HttpSource | None:
    """See :data:`sparktrain.tokens.source.Opener`."""
    place = _parse(uri)
    url = huggingface_hub.hf_hub_url(place.id, place.path_in_repo, repo_type="dataset", revision=place.revision)
    try:
        return HttpSource(uri, url, Token(_VARIABLE, huggingface_hub.get_token()), patience or Patience())
    except FileNotFoundError:
        return None


def files_in(uri: str, patience: Patience | None = None) -> list[str] | None:
    """See :data:`sparktrain.tokens.source.Lister`."""
    place, hub, patience = _parse(uri), huggingface_hub.HfApi(), patience or Patience()
    path = place.path_in_repo.rstrip("/")
    info = _asked(uri, patience, lambda: hub.dataset_info(place.id, revision=place.revision, timeout=patience.read))
    try:
        entries = _asked(
            uri,
            patience,
            lambda: list(hub.list_repo_tree(place.id, path or None, revision=info.sha, repo_type="dataset")),
        )
    except FileNotFoundError:
        return None
    files = [entry.path for entry in entries if isinstance(entry, huggingface_hub.hf_api.RepoFile)]
    return None if files == [path] else [f"hf://datasets/{place.id}@{info.sha}/{file}" for file in files]


def _parse(uri: str) -> huggingface_hub.HfUri:
    try:
        place = huggingface_hub.parse_hf_uri(uri)
    except huggingface_hub.errors.HfUriError:
        place = None
    if place is None or place.type != "dataset":
        raise DataError(f"{uri} is no dataset of the Hub: expected hf://datasets/OWNER/NAME[@REVISION]/path")
    if huggingface_hub.constants.is_offline_mode():
        raise DataError(f"{uri} is on the Hub, and HF_HUB_OFFLINE is set: unset it on driver and executors")
    return place


def _asked(uri: str, patience: Patience, ask: Callable[[], T]) -> T:
    """What the Hub answers. Raises FileNotFoundError where there is no such path in the repository."""

    def once() -> T:
        try:
            return ask()
        except huggingface_hub.errors.EntryNotFoundError:
            raise FileNotFoundError(uri) from None
        except huggingface_hub.errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status < 500 and status not in (408, 429):
                raise DataError(
                    f"{uri} may not be read or is not there (HTTP {status}): check owner, name and revision; "
                    f"for a private or gated dataset set {_VARIABLE} on driver and executors"
                ) from None
            raise Passing(f"the Hub answers {status}") from None
        except Exception as error:
            raise Passing(f"the Hub cannot be reached, {type(error).__name__}") from None

    try:
        return persist(patience, once)
    except Passing as failure:
        raise DataError(f"{uri} cannot be listed: {failure} ({patience.attempts} attempts); try later") from None
