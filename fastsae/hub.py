"""Sharing a finished SAE on the Hugging Face hub."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)

_SHARED = ("cfg.json", "sae_weights.safetensors", "sae_weights.pt", "summary.json", "*.png")


def push(directory: Path, repo: str, name: str) -> bool:
    """Upload the SAE in ``directory`` to ``repo`` (owner/name), creating it if need be.

    A failure is logged with the command that completes the upload, and costs the run nothing.
    Returns whether the upload succeeded.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            folder_path=directory,
            repo_id=repo,
            allow_patterns=list(_SHARED),
            commit_message=f"Add {name}",
        )
    except Exception as error:  # whatever the network or the service does, the run is on the disk
        include = " ".join(f"--include '{pattern}'" for pattern in _SHARED)
        log.warning(
            "could not push to %s (%s). The SAE is safe in %s; push it with\n  hf upload %s %s . %s",
            repo, error, directory, repo, directory, include,
        )  # fmt: skip
        return False
    log.info("pushed to https://huggingface.co/%s", repo)
    return True
