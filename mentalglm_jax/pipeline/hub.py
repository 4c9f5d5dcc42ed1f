"""Uploads to the Hugging Face Hub: private unless said otherwise, and exactly the files that were listed."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mentalglm_jax.checkpoints.model_card import CARD, Licence, licence_of
from mentalglm_jax.errors import InputError, MentalGLMError, RunError
from mentalglm_jax.foreign import first_line


class Pushed(NamedTuple):
    """Where an upload went, and who may see it."""

    url: str
    private: bool


def prepare(repository: str, public: bool) -> None:
    """What can be known before the work: is there a token, and is the repository one that may be written to.

    Raises:
        InputError: nobody is logged in, or the repository is public and ``public`` is false.
        RunError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with _asked(repository), contextlib.suppress(RepositoryNotFoundError):
        api = HfApi()
        api.whoami()
        _refuse_public(repository, bool(api.repo_info(repository).private), public)


def push(directory: Path, names: Sequence[str], repository: str, public: bool) -> Pushed:
    """Uploads the files ``names`` of ``directory`` in one commit; makes the repository, private unless ``public``.

    Raises:
        InputError: the repository is public and ``public`` is false; nothing is uploaded then.
        RunError: the Hub refused, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with _asked(repository):
        api = HfApi()
        url = api.create_repo(repository, exist_ok=True, private=not public)
        private = bool(api.repo_info(repository).private)
        _refuse_public(repository, private, public)
        files = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=directory / name) for name in names]
        api.create_commit(repository, operations=files, commit_message="Upload with mentalglm-jax")
        return Pushed(str(url), private)


def licence_on_hub(base: str) -> Licence | None:
    """What the card of a Hub model says of its licence; None where it cannot be read."""
    from huggingface_hub import HfApi, hf_hub_download

    there = False
    with contextlib.suppress(Exception):  # a download tries for half a minute, and says so on stderr
        there = HfApi().model_info(base, timeout=10).id is not None
    try:
        return licence_of(Path(hf_hub_download(base, CARD, local_files_only=not there)).parent, base)
    except Exception:  # offline, gated, no such model, no card: the client and its transport raise many types
        return None


def _refuse_public(repository: str, private: bool, public: bool) -> None:
    if not private and not public:
        raise InputError(f"{repository}: is a public repository, nothing was uploaded; say --public if that is meant")


@contextlib.contextmanager
def _asked(repository: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except MentalGLMError:
        raise
    except LocalTokenNotFoundError:
        raise InputError("--push: nobody is logged in to the Hub; `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = error.server_message or first_line(error)
        if status == 401:
            raise InputError(f"--push: the Hub does not take the token ({reason}); `hf auth login`") from None
        raise RunError(f"{repository}: the Hub refused with status {status} ({reason.splitlines()[0][:200]})") from None
    except OfflineModeIsEnabled:
        raise InputError(f"{repository}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it") from None
    except Exception as error:  # of the client and its transport, which raise many unrelated types
        raise RunError(f"{repository}: the Hub cannot be reached ({first_line(error)}); the same command tries "
                       "again") from None  # fmt: skip
