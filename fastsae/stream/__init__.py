"""The stream: text, tokens, language model, buffer. One room a stage, each with its own state."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import TrainConfig
    from ..evaluation import HeldOutText
    from .buffer import ActivationBuffer, Chunk
    from .language_model import LanguageModel
    from .tokens import TokenPacker

__all__ = ["Stream", "open_stream"]


class Stream:
    """Activations of a language model on a text: what ``Trainer`` draws from.

    Attributes: ``model``; ``buffer``; ``held_out_rows``: the first rows of the text, which are kept
    for evaluation and never trained on.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: LanguageModel,
        packer: TokenPacker,
        buffer: ActivationBuffer,
        held_out_rows: Chunk,
    ) -> None:
        self.model = model
        self.buffer = buffer
        self.held_out_rows = held_out_rows
        self._packer = packer
        self._config = config

    def next_batch(self) -> tuple[Tensor, ...] | None:
        """``[batch_size, D]`` float32 on the model's device, for each hooked layer, rows of all layers
        belonging to the same tokens; the last batch may be shorter; then None."""
        return self.buffer.next_batch()

    def held_out(self) -> tuple[Tensor, ...]:
        """``[eval_tokens, D]`` float32 on the model's device, for each hooked layer; tokens whose
        activation is not finite in some layer are left out."""
        from .buffer import activations

        config = self._config
        return activations(self.model, self.held_out_rows, config.harvest_batch, config.eval_tokens)

    def held_out_text(self) -> HeldOutText:
        """The held-out rows as text to evaluate on; rows stand for documents there."""
        from ..evaluation import HeldOutText

        held = self.held_out_rows
        rows = [row[:n] for row, n in zip(held.tokens, held.lengths.tolist(), strict=True)]
        special = self.model.special_ids.tolist()
        return HeldOutText(rows, range(len(rows)), special, self._packer.text.name, "rows")

    @property
    def metadata(self) -> tuple[dict[str, Any], ...]:
        """Where each layer's activations come from, under the names SAELens has for it."""
        return tuple(self._metadata(hook_name) for hook_name in self.model.hook_names)

    def _metadata(self, hook_name: str) -> dict[str, Any]:
        return {
            "model_name": self.model.name,
            "model_class_name": self.model.model_class_name,
            "hook_name": hook_name,
            "hook_head_index": None,
            "context_size": self._config.context_length,
            "prepend_bos": self.model.tokenizer.bos_token_id is not None,
            "seqpos_slice": [None],
            "exclude_special_tokens": True,
            "sequence_separator_token": self._packer.separator,
            "disable_concat_sequences": False,
            "dataset_path": self._packer.text.name,
            "model_layers": self.model.num_layers,
            "quantization": self.model.quantization,
        }

    @property
    def counts(self) -> dict[str, int]:
        """Activations kept, and dropped as special or non-finite, since the start of the run."""
        return asdict(self.buffer.counts)

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent in each stage since this process opened the stream."""
        return {"tokenise": self._packer.seconds, "harvest": self.buffer.harvest_seconds}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """All that the next batches depend on: ``tensors`` for safetensors, ``meta`` for JSON."""
        state = self.buffer.state_dict()
        state["tensors"] |= {
            "held_out.tokens": self.held_out_rows.tokens,
            "held_out.lengths": self.held_out_rows.lengths,
        }
        return state

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Go on where ``state`` was taken. Raises CheckpointError if text or model do not fit."""
        from .buffer import Chunk

        tensors = dict(state["tensors"])
        self.held_out_rows = Chunk(tensors.pop("held_out.tokens"), tensors.pop("held_out.lengths"))
        self.buffer.load_state_dict({"tensors": tensors, "meta": state["meta"]})


def open_stream(config: TrainConfig) -> Stream:
    """Open model and text, and take the held-out rows. What is quick to check is checked first.

    Raises ConfigError and StreamError for everything a user can get wrong about device, model and
    text; nothing is written.
    """
    from .. import demo
    from ..device import resolve_device
    from .buffer import ActivationBuffer, hold_out
    from .language_model import LanguageModel
    from .loading import load_config
    from .text import open_dataset, open_files
    from .tokens import TokenPacker

    device = resolve_device(config.device)
    seed = config.resolved_stream_seed
    load_config(config.model, config.layers, config.context_length)

    if config.text_files:
        text = open_files(config.text_files, text_column=config.text_column, seed=seed)
    elif config.demo and config.dataset == demo.TEXT:
        text = demo.open_text(seed)
    else:
        text = open_dataset(
            config.dataset,
            config.dataset_config,
            config.dataset_split,
            text_column=config.text_column,
            seed=seed,
        )

    model = LanguageModel.load(
        config.model, config.layers, quantization=config.quantization, device=device
    )

    packer = TokenPacker(text, model.tokenizer, config.context_length)
    held_out_rows = hold_out(packer, model, config.eval_tokens)
    buffer = ActivationBuffer(
        packer,
        model,
        batch_size=config.batch_size,
        pool_tokens=config.pool_tokens,
        harvest_batch=config.harvest_batch,
        seed=seed,
    )
    return Stream(config, model, packer, buffer, held_out_rows)
