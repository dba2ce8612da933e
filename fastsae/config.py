"""Settings of a training run: these fields are the command line, its help text and the documentation.

Imports the standard library alone, so that ``python train.py --help`` is instant.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Defaults are the recipe: Gemma 4 E2B, layer 17, 16x, k 64, 100M tokens."""

    # --- language model ---
    model: str = "google/gemma-4-E2B"
    """Decoder language model: an id on the Hugging Face hub, or a local directory."""
    layer: int | tuple[int, ...] = 17
    """Train on the residual stream after this decoder layer (0 is the first)."""
    quantization: Literal["nf4", "none"] = "nf4"
    """Weights of the language model: nf4 through bitsandbytes with fp16 compute, or as stored."""
    context_length: int = 1024
    """Tokens per row given to the language model."""
    harvest_batch: int = 8
    """Rows per forward pass of the language model."""

    # --- text ---
    dataset: str = "HuggingFaceFW/fineweb-edu"
    """Data set on the hub, streamed."""
    dataset_config: str | None = "sample-10BT"
    """Configuration (subset) of the data set."""
    dataset_split: str = "train"
    """Split of the data set."""
    text_column: str = "text"
    """Column that holds the text."""
    text_files: tuple[str, ...] = ()
    """Local .txt, .jsonl or .parquet files to train on instead of the data set."""

    # --- sparse autoencoder ---
    k: float | tuple[float, ...] = 64
    """Mean active latents per token; may be fractional."""
    d_sae: int | None = None
    """Dictionary size (latents)."""
    expansion: float | None = None
    """Dictionary size as a multiple of the model's width, instead of --d-sae. [16 if neither is given]"""
    normalize: Literal["scalar", "none", "layer_norm"] = "scalar"
    """Input scaling: one constant that gives mean norm 1, nothing, or per token."""

    # --- training ---
    tokens: int = 100_000_000
    """Activations to train on; rounded up to whole batches."""
    batch_size: int = 1024
    """Tokens per step."""
    lr: float = 3e-4
    """Adam's learning rate."""
    lr_warmup_tokens: int = 0
    """Raise the learning rate linearly over this many tokens at the start."""
    lr_decay_tokens: int = 0
    """Lower the learning rate linearly to 0 over this many tokens at the end."""
    k_initial: float | None = None
    """Begin with this many active latents per token and go linearly to --k. [no annealing]"""
    k_anneal_tokens: int = 1_000_000
    """Tokens over which --k-initial becomes --k."""
    clip_norm: float | None = None
    """Clip the norm of all gradients together, exactly. [no clipping]"""
    moments: Literal["fp32", "8bit"] = "fp32"
    """Adam's moments of the weights: fp32, or 8 bits with a scale per latent (fused step)."""
    objective: Literal["log", "plain"] = "log"
    """What is minimised: log(error) + 1000 aux, whose gradient keeps its size as the error falls, or error + aux."""
    aux_coefficient: float = 0.0625
    """Weight of the aux-k loss, which revives dead latents."""
    aux_normalization: Literal["residual_variance", "total_variance", "none"] = "residual_variance"
    """What the aux-k error is divided by."""
    k_aux: int | None = None
    """Dead latents per token in the aux-k loss. [2 k]"""
    dead_after_tokens: int = 10_000_000
    """A latent is dead when it was not active for this many tokens."""
    seed: int = 17
    """Seed of the initial weights, the order of the text and the mixing of activations."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Matrix products of the SAE; weights stay fp32. [bf16 on CUDA, fp32 on a CPU]"""
    step: Literal["fused", "autograd"] = "fused"
    """How a step is computed: on the sparse kernels, or by plain autograd; same result."""
    cuda_graph: bool = False
    """Replay the fused step as one CUDA graph (CUDA only)."""
    pool_tokens: int = 262_144
    """Activations mixed with each other before they are trained on."""
    eval_tokens: int = 65_536
    """Activations held out at the start of the text for the final evaluation."""

    # --- output ---
    out: str | None = None
    """Folder of runs. [runs]"""
    name: str | None = None
    """Name of the run. [made from model, layer, k and seed]"""
    checkpoint_every_tokens: int = 8_000_000
    """Write a resumable checkpoint each time this many tokens were seen."""
    keep_checkpoints: int = 3
    """Checkpoints to keep; older ones are deleted."""
    log_every_tokens: int = 102_400
    """Write metrics each time this many tokens were seen."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues an unfinished run of the same name; never refuses to touch an existing one."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto logs online when a key is configured."""
    wandb_project: str = "fastsae"
    """W&B project."""
    wandb_entity: str | None = None
    """W&B user or team."""
    hub_repo: str | None = None
    """Push the trained SAE to this repository (owner/name) on the Hugging Face hub."""
    demo: bool = False
    """Train a small SAE on a small embedded language model, on any machine, in about a minute."""

    def __post_init__(self) -> None:
        for field in ("layer", "k", "seed"):
            value = getattr(self, field)
            if isinstance(value, (tuple, list)):
                if len(value) != 1:
                    raise ConfigError(
                        f"{field} has {len(value)} values {value!r}; this version trains one SAE at a "
                        f"time: give one value"
                    )
                object.__setattr__(self, field, value[0])
        for field in ("layer", "seed"):
            self._require_int(field, 0)
        for field in _AT_LEAST_ONE:
            if getattr(self, field) is not None:
                self._require_int(field, 1)
        for field in ("k", "lr"):
            self._require_number(field, above=0)
        self._require_number("aux_coefficient", at_least=0)
        for field in ("expansion", "k_initial", "clip_norm"):
            if getattr(self, field) is not None:
                self._require_number(field, above=0)
        for field in ("lr_warmup_tokens", "lr_decay_tokens"):
            self._require_int(field, 0)
        if self.moments == "8bit" and self.step == "autograd":
            raise ConfigError(
                "moments = '8bit' belongs to the fused step; use --step fused, or --moments fp32"
            )
        if self.d_sae is not None and self.expansion is not None:
            raise ConfigError(
                f"d_sae = {self.d_sae} and expansion = {self.expansion} both set the dictionary size; "
                f"give one of them"
            )
        if self.d_sae is not None and self.mean_active > self.d_sae:
            raise ConfigError(
                f"k = {self.mean_active:g} is more than d_sae = {self.d_sae}: a token cannot activate more latents "
                f"than there are; lower k or raise d_sae"
            )
        if self.context_length < 2:
            raise ConfigError(f"context_length must be at least 2, got {self.context_length}")
        if isinstance(self.text_files, str):
            object.__setattr__(self, "text_files", (self.text_files,))
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ConfigError(
                    f"{field} = {getattr(self, field)!r} is not one of {', '.join(map(repr, choices))}"
                )
        if self.device not in ("auto", "cpu", "cuda") and not (
            self.device.startswith("cuda:") and self.device[5:].isdigit()
        ):
            raise ConfigError(f"device = {self.device!r} is not auto, cpu, cuda or cuda:N")
        if self.name is not None and ("/" in self.name or self.name in ("", ".", "..")):
            raise ConfigError(f"name = {self.name!r} must be a plain folder name, without '/'")

    def _require_int(self, field: str, minimum: int) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ConfigError(
                f"{field} must be a whole number of at least {minimum}, got {value!r}"
            )

    def _require_number(
        self, field: str, above: float | None = None, at_least: float | None = None
    ) -> None:
        value = getattr(self, field)
        ok = (
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        )
        if (
            not ok
            or (above is not None and value <= above)
            or (at_least is not None and value < at_least)
        ):
            bound = f"above {above}" if above is not None else f"of at least {at_least}"
            raise ConfigError(f"{field} must be a finite number {bound}, got {value!r}")

    @property
    def mean_active(self) -> float:
        """``k`` as the one number it is after validation."""
        assert not isinstance(self.k, tuple)
        return self.k

    @property
    def hooked_layer(self) -> int:
        """``layer`` as the one number it is after validation."""
        assert not isinstance(self.layer, tuple)
        return self.layer

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run: ``ceil(tokens / batch_size)``."""
        return -(-self.tokens // self.batch_size)

    @property
    def run_name(self) -> str:
        """``name``, or one made from the settings; the same settings give the same name."""
        if self.name is not None:
            return self.name
        model = "demo" if self.demo else self.model.rstrip("/").rsplit("/", 1)[-1].lower()
        return f"{model}-scope-v1-L{self.layer}-batchtopk-k{self.k:g}-seed{self.seed}"

    def resolve_d_sae(self, d_in: int) -> int:
        """The dictionary size for a model of width ``d_in``; raises ConfigError if k exceeds it."""
        d_sae = self.d_sae or round((self.expansion or 16) * d_in)
        if self.mean_active > d_sae:
            raise ConfigError(
                f"k = {self.mean_active:g} is more than the dictionary's {d_sae} latents "
                f"({self.expansion or 16:g} x {d_in}); lower k or raise d_sae"
            )
        return d_sae

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_AT_LEAST_ONE = (
    "context_length", "harvest_batch", "d_sae", "tokens", "batch_size", "k_aux", "dead_after_tokens",
    "k_anneal_tokens", "pool_tokens", "eval_tokens", "checkpoint_every_tokens", "keep_checkpoints", "log_every_tokens",
)  # fmt: skip
_CHOICES = {
    "quantization": ("nf4", "none"),
    "normalize": ("scalar", "none", "layer_norm"),
    "moments": ("fp32", "8bit"),
    "objective": ("log", "plain"),
    "aux_normalization": ("residual_variance", "total_variance", "none"),
    "precision": ("auto", "fp32", "tf32", "bf16"),
    "step": ("fused", "autograd"),
    "resume": ("auto", "never"),
    "wandb": ("auto", "online", "offline", "disabled"),
}

MAY_CHANGE_ON_RESUME = frozenset({
    "tokens", "out", "checkpoint_every_tokens", "keep_checkpoints", "resume", "wandb", "wandb_project",
    "wandb_entity", "hub_repo",
})  # fmt: skip
"""Fields that do not touch what a step computes; any other difference makes a resumed run inconsistent."""
