"""Flags that several commands share, declared once, and the parser of all."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from ..config import Site, TrainConfig
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..data.text import TextSource
    from ..lm.hooked import SplicedModel
    from ..sae.module import SAE

Options = TypeVar("Options")

_RECIPE = TrainConfig()


@dataclass(frozen=True)
class SaeFlags:
    """The SAE, and the language model whose activations it reads."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SAE")]
    """Folder of an SAE in any format fastsae reads, or owner/name on the Hugging Face hub."""
    model: str | None = None
    """The language model: an id on the hub or a directory. [what the SAE says]"""
    layer: int | None = None
    """Decoder layer that the SAE reads at (0 is the first). [what the SAE says]"""
    hook: str | None = None
    """What it reads there, as in fastsae train. [what the SAE says; with --layer, resid_post]"""
    quantization: Literal["nf4", "nf4-dequantized", "nf4-bf16", "none"] | None = None
    """Weights of the language model. [what the SAE says, or none]"""
    context_length: int | None = None
    """Tokens per row given to the language model. [what the SAE says, or 128]"""
    batch_rows: int = 32
    """Rows per forward pass, at most."""
    outlier_norm: float | None = None
    """Leave out tokens whose activation has more than so many times the median norm of its forward
    pass; inf keeps all. [what the SAE was trained with]"""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or cuda:N."""
    revision: str | None = None
    """Branch, tag or commit of the language model on the hub. [what the SAE says, or the main branch]"""

    def load(self) -> SAE:
        """The SAE, on the device. Raises FormatError or ConfigError."""
        from ..device import resolve_device
        from ..sae.io import load

        return load(self.source, resolve_device(self.device))

    def model_name(self, sae: SAE) -> str:
        name = self.model or sae.metadata.get("model_name")
        if name is None:
            raise ConfigError(
                f"the SAE in {self.source} does not say which language model it is of; give --model"
            )
        return name

    def load_model(self, sae: SAE) -> SplicedModel:
        """The language model, on the SAE's device. Raises ConfigError or StreamError."""
        from ..lm.hooked import SplicedModel
        from ..lm.hooks import site_of
        from ..sae.transcoder import Transcoder

        quantization = self.quantization or sae.metadata.get("quantization") or "none"
        own = self.model in (None, sae.metadata.get("model_name"))
        return SplicedModel.load(
            self.model_name(sae),
            self.site(sae),
            quantization=quantization,
            device=sae.W_dec.device,
            revision=self.revision or (sae.metadata.get("model_revision") if own else None),
            context_length=self.context(sae),
            target=site_of(sae.target_hook_name) if isinstance(sae, Transcoder) else None,
        )

    def site(self, sae: SAE) -> Site:
        """Where the SAE reads. Raises ConfigError if that is not known."""
        from ..lm.hooks import site_of

        if self.layer is None and self.hook is None:
            return site_of(sae.hook_name)
        layer = site_of(sae.hook_name).layer if self.layer is None else self.layer
        return Site.parse(self.hook or TrainConfig.hook, layer)

    def outliers(self, sae: SAE) -> float | None:
        given = sae.metadata.get("outlier_norm") if self.outlier_norm is None else self.outlier_norm
        if given is not None and not given > 1:
            raise ConfigError(f"outlier_norm must be greater than 1, got {given}")
        return given

    def context(self, sae: SAE) -> int:
        context = self.context_length or sae.metadata.get("context_size") or 128
        if context < 2:
            raise ConfigError(f"context_length must be at least 2, got {context}")
        return context


@dataclass(frozen=True)
class TextFlags:
    """The text to read: by default the one that training reads, whose first tokens it holds out."""

    text_files: tuple[str, ...] = ()
    """Local .txt, .jsonl or .parquet files, or folders of them, instead of the data set."""
    dataset: str | None = None
    """Data set on the hub, streamed; or a local folder. [the recipe's; of the demo's model, the demo's]"""
    dataset_config: str | None = None
    """Configuration (subset) of the data set. [the recipe's, for the recipe's data set]"""
    dataset_split: str = _RECIPE.dataset_split
    """Split of the data set."""
    text_column: str = _RECIPE.text_column
    """Column that holds the text; or chats, for the tokenizer's chat template; or token ids."""
    dataset_revision: str | None = None
    """Branch, tag or commit of the data set on the hub. [its main branch]"""
    skip_bad_lines: bool = False
    """Leave out records that hold no text, and count them, instead of stopping at the first."""
    seed: int = _RECIPE.seed
    """Order of the text. With the text and the seed of a training run, its first tokens are held out."""

    def open(self, preset: TrainConfig) -> TextSource:
        """The text, by default that of ``preset``. Raises ConfigError or StreamError."""
        from ..data.opening import open_text

        text = vars(self) | {"dataset": self.dataset or preset.dataset}
        if self.dataset is None:
            text["dataset_config"] = self.dataset_config or preset.dataset_config
        return open_text(replace(preset, **text))


def output_folder(out: str | None, source: str) -> Path | None:
    """The folder that results go to: ``out``, else that of the SAE ``source``, None if it is on the hub.

    It is created when there are results; whether it can be written is checked now, before the work.
    Raises ConfigError if it cannot.
    """
    from ..files import require_writable

    folder = Path(source if out is None else out).expanduser()
    if out is None and not folder.is_dir():
        return None
    require_writable(folder)
    return folder


def parse(
    options: type[Options], arguments: Sequence[str], prog: str, about: str | None, **default: Any
) -> Options:
    """The ``options`` that ``arguments`` ask for, on top of a ``default=``, if there is one.

    Raises:
        ConfigError: an unknown flag, a missing argument, or an impossible value.
        SystemExit: ``--help`` (0).
    """
    flat = (tyro.conf.OmitArgPrefixes,)
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(
                options, prog=prog, description=about, args=arguments, config=flat, **default
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise ConfigError(f"{_in_a_line(shown.getvalue())}; see {prog} --help") from None


def _in_a_line(box: str) -> str:
    """What tyro shows in a box of several parts: the first part, and the flags that were perhaps meant."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", box)  # colours
    lines = [line.strip("│ ") for line in plain.splitlines() if line[:1] not in "╭╰"]
    is_rule = lambda line: set(line) in ({"─"}, {"-"})
    parts = [list(part) for rule, part in groupby(lines, is_rule) if not rule]
    if "╭" not in plain:  # in ASCII, the box has no frame, and its title is a part of its own
        parts = parts[1:]
    # Of a flag the name is kept; that of the class which checks all of them says nothing.
    said = re.sub(r"^Error parsing (\w+: )?", "", " ".join(parts[0])).strip()
    if len(parts) > 1 and parts[1][0].startswith("Perhaps"):
        flags = [line.split()[0].rstrip(",") for line in parts[1] if line.startswith("--")]
        said += f"; perhaps {' or '.join(flags)}"
    return said[:1].lower() + said[1:]
