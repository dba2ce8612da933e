"""Sharing an SAE on the Hugging Face hub while it trains, without the training waiting for it."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from ..files import write_text
from ..lm.hub_access import is_refused
from ..progress import QUIET_SECONDS
from ..sae.formats.files import first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

ATTEMPTS = 5
RETRY_SECONDS = 2.0
"""Before the second attempt; twice as long before each further one."""

PATIENCE_SECONDS, HURRIED_SECONDS = 3600.0, 5.0
"""How long after the last push was handed in the end of a run, or of one that was interrupted, waits."""

STAGED = "hub"
"""The folder of a run that holds what its repository is to hold."""


class Publisher:
    """Keeps the repository of one run up to date; a context manager, whose end waits for the last push.

    The repository holds the SAE at its root (``cfg.json``, ``sae_weights.safetensors``,
    ``sae_weights.pt``), the model card, the metrics so far and, once finished, the summary and the
    picture; and the SAE again in a folder named as the run, which is where SAELens looks for one.

    All of that is put into ``directory/hub`` first. A push is one commit of that folder, so whatever
    goes wrong, the repository holds one whole state, and the next push, or the command that is logged,
    brings it up to date. A push that comes while an older one waits takes its place. The thread is a
    daemon, which those of ``HfApi.run_as_future`` are not: a connection that hangs must not keep a
    finished program from ending.

    Args:
        directory: the run's folder.
        repository: ``owner/name``; created if absent.
        private: create it as a private one.
    """

    def __init__(self, directory: Path, repository: str, private: bool) -> None:
        self.directory, self.repository, self.private = directory, repository, private
        self._failed = 0  # pushes since the last one that arrived
        self._newest = 0
        self._superseded = threading.Event()
        self._pushes: SimpleQueue[tuple[int, Path, str] | None] = SimpleQueue()
        self._handed_in = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="fastsae hub", daemon=True)
        for leftover in directory.glob(".hub-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._thread.start()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pushes.put(None)
        deadline = self._handed_in + (PATIENCE_SECONDS if kind is None else HURRIED_SECONDS)
        try:
            if self._is_pushing(min(deadline, time.monotonic() + QUIET_SECONDS)):
                log.info("waiting for the push to %s", self.repository)
                self._is_pushing(deadline)
        finally:
            if self._is_pushing(0):
                log.warning(
                    "the push to %s is not finished: give the same command again, or complete it with\n  %s",
                    self.repository, self.command,
                )  # fmt: skip
            elif self._failed > 1:  # the first was told
                log.warning(
                    "the last %d pushes to %s failed; complete them with\n  %s",
                    self._failed, self.repository, self.command,
                )  # fmt: skip

    def _is_pushing(self, deadline: float) -> bool:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return self._thread.is_alive()

    def publish(self, source: Path, card: str, message: str) -> None:
        """Push the SAE in ``source`` with its model card, soon; returns when it is safe to delete.

        Args:
            source: a folder with ``cfg.json`` and ``sae_weights.safetensors``: a checkpoint, or the
                run's own folder, whose summary and picture then go along.
            card: content of ``README.md``.
            message: of the commit.
        """
        number = self._newest + 1
        aside = self.directory / f".hub-{number}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            _link_sae(source, aside)
            shutil.copyfile(self.directory / "metrics.jsonl", aside / "metrics.jsonl")
            if source == self.directory:
                for file in (source / "summary.json", *source.glob("*.png")):
                    shutil.copyfile(file, aside / file.name)
            write_text(aside / "README.md", card)
        except OSError as error:  # the disk is full, say; the run itself is saved
            log.warning("could not prepare a push to %s: %s", self.repository, error)
            return
        self._newest = number
        self._superseded.set()
        self._handed_in = time.monotonic()
        self._pushes.put((number, aside, message))

    @property
    def command(self) -> str:
        """What completes the push by hand."""
        folder = shlex.quote(str(self.directory / STAGED))
        return f"hf upload {self.repository} {folder} .{' --private' if self.private else ''}"

    # --- in the background ---

    def _work(self) -> None:
        self._try_access()
        for push in iter(self._pushes.get, None):
            try:
                self._push(*push)
            except Exception as error:  # whatever the network, the service or the disk does
                self._failed += 1
                if self._failed == 1:
                    log.warning(
                        "could not push to %s (%s: %s). Nothing is lost: the next checkpoint is pushed "
                        "with all this one holds, or push it yourself with\n  %s",
                        self.repository, type(error).__name__, first_line(error), self.command,
                    )  # fmt: skip

    def _push(self, number: int, aside: Path, message: str) -> None:
        if number != self._newest:
            shutil.rmtree(aside, ignore_errors=True)
            return
        self._superseded.clear()
        staged = self._stage(aside)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._hub().upload_folder(
                    repo_id=self.repository, folder_path=staged, commit_message=message
                )
            except Exception as error:
                if number != self._newest:
                    return  # the newer push, which is waiting, holds all that this one does
                if attempt == ATTEMPTS or is_refused(error):
                    raise
                self._superseded.wait(RETRY_SECONDS * 2 ** (attempt - 1))
            else:
                log.info("pushed to %s: %s", self.repository, message)
                self._failed = 0
                return

    def _stage(self, aside: Path) -> Path:
        """Complete ``aside`` and put it in the place of what was staged before."""
        weights = aside / "sae_weights.safetensors"
        torch.save(load_file(weights), aside / "sae_weights.pt")
        folder = aside / self.directory.name
        folder.mkdir()
        _link_sae(aside, folder)
        staged = self.directory / STAGED
        shutil.rmtree(staged, ignore_errors=True)
        return aside.rename(staged)

    def _try_access(self) -> None:
        """Say now, not at the first push hours later, that there is no login or no permission."""
        try:
            self._hub()
        except Exception as error:
            log.warning(
                "%s cannot be pushed to as things are (%s: %s); it is tried again at each checkpoint",
                self.repository, type(error).__name__, first_line(error),
            )  # fmt: skip

    def _hub(self) -> HfApi:
        """The hub, where the repository now exists."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # the terminal is the training's
        api = HfApi()
        api.create_repo(self.repository, private=self.private, exist_ok=True)
        return api


def _link_sae(source: Path, target: Path) -> None:
    """The files of an SAE in another folder too: they stay when the first is deleted, and cost nothing."""
    for name in ("cfg.json", "sae_weights.safetensors"):
        try:
            os.link(source / name, target / name)
        except OSError:  # a file system without links
            shutil.copyfile(source / name, target / name)
