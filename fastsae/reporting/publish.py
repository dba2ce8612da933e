"""Sharing an SAE on the Hugging Face hub while it trains, without the training waiting for it."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..sae.formats.files import first_line
from .background import Background

log = logging.getLogger(__name__)

ATTEMPTS = 5
RETRY_SECONDS = 2.0
"""Before the second attempt; twice as long before each further one."""

STAGED = "hub"
"""The folder of a run that holds what its repository is to hold."""

_PASSING = (408, 409, 412, 425, 429)  # refusals that pass; other 4xx will be the same next time


class Publisher:
    """Keeps the repository of one run up to date.

    The repository holds the SAE at its root (``cfg.json``, ``sae_weights.safetensors``,
    ``sae_weights.pt``), the model card, the metrics so far and, once finished, the summary and the
    picture; and the SAE again in a folder named as the run, which is where SAELens looks for one.

    All of that is put into ``directory/hub`` first. A push is one commit of that folder, so whatever
    goes wrong, the repository holds one whole state, and the next push, or the command that is logged,
    brings it up to date. A push that comes while an older one waits takes its place.

    Args:
        directory: the run's folder.
        repository: ``owner/name``; created if absent.
        private: create it as a private one.
        background: makes the calls.
    """

    def __init__(
        self, directory: Path, repository: str, private: bool, background: Background
    ) -> None:
        self.directory, self.repository, self.private = directory, repository, private
        self._background = background
        self._newest = 0
        self._superseded = threading.Event()
        for leftover in directory.glob(".hub-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        background.submit(self._try_access)

    def publish(self, source: Path, card: str, message: str) -> None:
        """Push the SAE in ``source`` with its model card, soon; returns when it is safe to delete.

        Args:
            source: a folder with ``cfg.json`` and ``sae_weights.safetensors``: a checkpoint, or the
                run's own folder, whose summary and picture then go along.
            card: content of ``README.md``.
            message: of the commit.
        """
        self._newest += 1
        self._superseded.set()
        aside = self.directory / f".hub-{self._newest}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            for name in ("cfg.json", "sae_weights.safetensors"):
                _link(source / name, aside / name)
            shutil.copyfile(self.directory / "metrics.jsonl", aside / "metrics.jsonl")
            if source == self.directory:
                for file in (source / "summary.json", *source.glob("*.png")):
                    shutil.copyfile(file, aside / file.name)
            (aside / "README.md").write_text(card, encoding="utf-8")
        except OSError as error:  # the disk is full, say; the run itself is saved
            log.warning("could not prepare a push to %s: %s", self.repository, error)
            return
        number = self._newest
        self._background.submit(lambda: self._push(number, aside, message))

    @property
    def command(self) -> str:
        """What completes the push by hand."""
        folder = shlex.quote(str(self.directory / STAGED))
        return f"hf upload {self.repository} {folder} .{' --private' if self.private else ''}"

    # --- in the background ---

    def _push(self, number: int, aside: Path, message: str) -> None:
        if number != self._newest:
            shutil.rmtree(aside)
            return
        staged = self._stage(aside)
        self._superseded.clear()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._upload(staged, message)
            except Exception as error:  # whatever the network or the service does
                if number != self._newest:
                    return  # the newer push, which is waiting, holds all that this one does
                if attempt == ATTEMPTS or _is_refused(error):
                    log.warning(
                        "could not push to %s (%s: %s). Nothing is lost: the next checkpoint is pushed "
                        "with all this one holds, or push it yourself with\n  %s",
                        self.repository, type(error).__name__, first_line(error), self.command,
                    )  # fmt: skip
                    return
                self._superseded.wait(RETRY_SECONDS * 2 ** (attempt - 1))
            else:
                log.info("pushed to %s: %s", self.repository, message)
                return

    def _stage(self, aside: Path) -> Path:
        """Complete ``aside`` and put it in the place of what was staged before."""
        weights = aside / "sae_weights.safetensors"
        torch.save(load_file(weights), aside / "sae_weights.pt")
        folder = aside / self.directory.name
        folder.mkdir()
        for name in ("cfg.json", "sae_weights.safetensors"):
            _link(aside / name, folder / name)
        staged = self.directory / STAGED
        shutil.rmtree(staged, ignore_errors=True)
        return aside.rename(staged)

    def _try_access(self) -> None:
        """Say now, not at the first push hours later, that there is no login or no permission."""
        try:
            self._create()
        except Exception as error:  # as in _push
            log.warning(
                "%s cannot be pushed to as things are (%s: %s); it is tried again at each checkpoint",
                self.repository, type(error).__name__, first_line(error),
            )  # fmt: skip

    def _create(self) -> None:
        from huggingface_hub import HfApi

        HfApi().create_repo(self.repository, private=self.private, exist_ok=True)

    def _upload(self, staged: Path, message: str) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # the terminal is the training's
        self._create()
        HfApi().upload_folder(repo_id=self.repository, folder_path=staged, commit_message=message)


def _link(source: Path, target: Path) -> None:
    """The same file under another name: it stays when the first name is deleted, and costs nothing."""
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _is_refused(error: Exception) -> bool:
    """Whether the hub said no in a way that will be the same next time: no login, no permission."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return 400 <= status < 500 and status not in _PASSING
