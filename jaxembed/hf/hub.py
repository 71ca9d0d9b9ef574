"""Where the folder of a checkpoint is: on this machine, or fetched from an object store or the Hugging Face hub."""

import pathlib
import re

from jaxembed.errors import UserError
from jaxembed.storage import StorePath, local, path_of

REPOSITORY = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
# Neither pickles nor code: what is not here cannot be read by mistake.
ALLOWED = ("*.safetensors", "*.json", "*.txt", "*.model")
NOT_NEEDED = ("onnx/*", "openvino/*", "original/*", "consolidated*.safetensors")


def resolve(spec: str) -> pathlib.Path:
    """Returns the folder of a checkpoint.

    A repository is taken from huggingface_hub's cache without a look at the network where its revision is named and
    cached, or where HF_HUB_OFFLINE is set; else it is fetched there.

    Args:
      spec: what stands behind 'hf:': a folder, also one in a store, or ORG/NAME or ORG/NAME@REVISION on the hub.

    Raises:
      UserError: there is no such folder, and the hub cannot give it.
    """
    folder = path_of(spec)
    if folder.is_dir():
        return local(folder, ALLOWED)
    if isinstance(folder, StorePath):
        raise UserError(f"hf:{spec}: no such folder")
    match = REPOSITORY.fullmatch(spec)
    if not match:
        raise UserError(f"hf:{spec}: no such folder, and not of the form ORG/NAME or ORG/NAME@REVISION")
    return _snapshot(spec, match["name"], match["revision"])


def _snapshot(spec: str, name: str, revision: str | None) -> pathlib.Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    def fetch(local: bool) -> pathlib.Path:
        return pathlib.Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(ALLOWED),
                ignore_patterns=list(NOT_NEEDED),
                local_files_only=local,
            )
        )

    offline = constants.HF_HUB_OFFLINE
    failed = f"hf:{spec}: no such folder here"
    try:
        if offline or revision:
            try:
                folder = fetch(local=True)
                if any(folder.rglob("*.safetensors")):  # else another program cached a part of it
                    return folder
            except OSError:
                pass
        if not offline:
            return fetch(local=False)
    except GatedRepoError as error:
        raise UserError(
            f"{failed}: the repository is gated: accept its terms on the hub, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{failed}: no such repository on the hub, or it is private") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{failed}: the repository {name} has no revision {revision!r}") from error
    except (OSError, ValueError) as error:  # network, disk; a name that the hub does not allow
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(f"{failed}: not cached, and the hub cannot be read: {reason[0]}") from error
    raise UserError(f"{failed}: not in the hub's cache, and HF_HUB_OFFLINE is set")
