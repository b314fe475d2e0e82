"""An export on its way to the hub.

In: the folder of an export, which is compared with its seal first, and the name of a repository. Out: the files that
were sealed, in one commit there, and none of a former export beside them. Only the model card may have been changed
since, as cards are there to be written on.
"""

import glob
import json
import pathlib
from collections.abc import Callable
from typing import Any

from etils import epath

from jaxsft.config import ConfigError
from jaxsft.disk.seal import SEAL, checksum, problem_of, read_seal
from jaxsft.disk.writing import at_home
from jaxsft.folders.export import CARD
from jaxsft.folders.peft.settings import CONFIG_FILE

OF_EXPORTS = [
    *(SEAL, "config.json", "generation_config.json", CONFIG_FILE, "adapter_model.safetensors"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
]
"""What exports may hold, each in place of another."""


class PushError(RuntimeError):
    """The hub did not take an export. Its text is shown as it is."""

    exit_code = 74


def push(path: str, repo: str, *, private: bool = False, say: Callable[[str], None] = lambda text: None) -> str:
    """Uploads an export; returns its address. What else is in its folder stays here.

    Args:
        path: the folder.
        repo: `ORG/NAME` on the hub; made where there is none.
        private: nobody else may see it.
        say: is told what those who load it should know.

    Raises:
        ConfigError: no export, or one that was changed; no such name; no token; a repository that all can see, though
            `private` was asked for.
        PushError: the hub refuses, or is not reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    folder = at_home(path)
    names = _checked(folder, path)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{repo}: no name of a repository: {error}") from None
    if "/" not in repo:
        raise ConfigError(f"{repo}: expected ORG/NAME, or your own name and that of the model")
    if huggingface_hub.get_token() is None:
        raise ConfigError("the hub wants a token: run `hf auth login`, or set HF_TOKEN")
    for note in _notes(folder):
        say(note)
    api = huggingface_hub.HfApi(library_name="jaxsft")
    try:
        address = str(api.create_repo(repo, private=private or None, exist_ok=True))
        is_private = api.model_info(repo).private
        if is_private or not private:
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                allow_patterns=[glob.escape(name) for name in names],
                # Left beside these, files of a former export would be loaded in their place, or beside them.
                delete_patterns=OF_EXPORTS,
                commit_message="Export of jaxsft",
            )
    except Exception as error:  # the client raises many kinds, of three libraries
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PushError(f"{repo}: the hub did not take it: {reason}") from error
    if private and not is_private:
        raise ConfigError(f"{repo}: is there already, and all can see it; make it private on the hub first")
    return address


def _checked(folder: pathlib.Path, path: str) -> list[str]:
    """The files to upload.

    Raises:
        ConfigError: it is no export, or not as it was sealed.
    """
    if not any((folder / name).exists() for name in ("config.json", CONFIG_FILE)):
        raise ConfigError(f"{path}: no export: there is neither config.json nor {CONFIG_FILE}")
    if not (folder / SEAL).exists():
        raise ConfigError(f"{path}: no export of jaxsft: without {SEAL}, nothing says what it should hold")
    if (problem := problem_of(epath.Path(folder), free=(CARD,))) is not None:
        raise ConfigError(f"{path}: {problem}; nothing was sent")
    sealed = read_seal(epath.Path(folder) / SEAL)
    has_card = (folder / CARD).exists()
    # A seal that does not fit the card would be taken for damage by whoever verifies what they have got.
    fits = CARD not in sealed or (has_card and checksum(epath.Path(folder) / CARD) == sealed[CARD])
    return [name for name in sealed if name != CARD] + [CARD] * has_card + [SEAL] * fits


def _notes(folder: pathlib.Path) -> list[str]:
    """What does not reach those who load it."""
    if not (folder / CONFIG_FILE).exists():
        return []
    settings: Any = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not pathlib.Path(base).is_absolute():
        return []
    return [f"its base is {base}, which is on this machine alone; others need `run.py export RUN --merge-lora`"]
