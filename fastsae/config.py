"""Settings of a training run: these fields are the command line, its help text and the documentation.

Imports the standard library alone, so that ``python train.py --help`` is instant.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
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
    """Residual stream after this decoder layer (0 is the first); several share one forward pass."""
    quantization: Literal["nf4", "nf4-dequantized", "nf4-bf16", "none"] = "nf4"
    """Weights of the language model: nf4 through bitsandbytes with fp16 compute; the same values
    dequantized once (faster, more memory); nf4 with bf16 compute, for models that overflow fp16; or as
    stored."""
    compile_model: bool = False
    """Compile the language model with torch.compile: its activations change by rounding alone."""
    context_length: int = 1024
    """Tokens per row given to the language model."""
    harvest_batch: int = 8
    """Rows per forward pass of the language model."""
    separate_documents: bool = False
    """Attend within a document alone, though several are packed into one row."""
    outlier_norm: float | None = None
    """Drop activations whose norm exceeds this many times the median of their forward pass."""
    activation_dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision in which activations wait to be trained on."""
    cache_dir: str | None = None
    """Write the activations to this folder once, and read them there in this and later runs."""
    revision: str | None = None
    """Branch, tag or commit of the language model on the hub. [its main branch]"""

    # --- text ---
    dataset: str = "HuggingFaceFW/fineweb-edu"
    """Data set on the hub, streamed; or a local folder, also one that ``save_to_disk`` wrote."""
    dataset_config: str | None = None
    """Configuration (subset) of the data set. [sample-10BT of the recipe's, the only one of others]"""
    dataset_split: str = "train"
    """Split of the data set."""
    text_column: str = "text"
    """Column that holds the text; or chats, for the tokenizer's chat template; or token ids."""
    text_files: tuple[str, ...] = ()
    """Local .txt, .jsonl (also .gz) or .parquet files, or folders of them, instead of the data set."""
    dataset_revision: str | None = None
    """Branch, tag or commit of the data set on the hub. [its main branch, as it is at the start]"""
    skip_bad_lines: bool = False
    """Leave out records that hold no text, and count them, instead of stopping at the first."""

    # --- sparse autoencoder ---
    k: float | tuple[float, ...] = 64
    """Mean active latents per token; may be fractional; several train one SAE each."""
    d_sae: int | None = None
    """Dictionary size (latents)."""
    expansion: float | None = None
    """Dictionary size as a multiple of the model's width, instead of --d-sae. [16 if neither is given]"""
    normalize: Literal["scalar", "none", "layer_norm"] = "scalar"
    """Input scaling: one constant that gives mean norm 1, nothing, or per token."""
    init_from: str | None = None
    """Begin with the latents of this SAE: a folder or hub repository, anything fastsae.load reads."""

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
    """What is minimised: log(error) + 300 aux, whose gradient keeps its size as the error falls, or error + aux."""
    aux_coefficient: float = 0.0625
    """Weight of the aux-k loss, which revives dead latents."""
    aux_normalization: Literal["residual_variance", "total_variance", "none"] = "residual_variance"
    """What the aux-k error is divided by."""
    k_aux: int | None = None
    """Dead latents per token in the aux-k loss. [2 k]"""
    dead_after_tokens: int = 10_000_000
    """A latent is dead when it was not active for this many tokens."""
    seed: int | tuple[int, ...] = 17
    """Seed of the initial weights (several train one SAE each) and, without --stream-seed, of the stream."""
    stream_seed: int | None = None
    """Seed of the order of the text and the mixing of activations. [the first --seed]"""
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
    """Name of the run; of several, what each name begins with. [made from model, layer, k and seed]"""
    checkpoint_every_tokens: int = 8_000_000
    """Write a resumable checkpoint each time this many tokens were seen."""
    keep_checkpoints: int = 3
    """Checkpoints to keep; older ones are deleted."""
    log_every_tokens: int = 102_400
    """Write metrics each time this many tokens were seen."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues an unfinished run of the same name; never refuses to touch an existing one."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto does what WANDB_MODE says, or logs online when a key is configured."""
    wandb_project: str = "fastsae"
    """W&B project."""
    wandb_entity: str | None = None
    """W&B user or team."""
    hub_repo: str | None = None
    """Push to this repository of the hub at each checkpoint: owner/name, or owner, named as the run."""
    hub_private: bool = False
    """Make the hub repository private when it is created."""
    demo: bool = False
    """Train a small SAE on a small embedded language model, on any machine, in about a minute."""

    def __post_init__(self) -> None:
        if self.dataset_config is None and self.dataset == TrainConfig.dataset:
            object.__setattr__(self, "dataset_config", "sample-10BT")  # of this data set alone
        self._require_each("layer", _is_int, "a whole number of at least 0")
        self._require_each("seed", _is_int, "a whole number of at least 0")
        self._require_each("k", _is_positive, "a finite number above 0")
        if self.stream_seed is not None:
            self._require_int("stream_seed", 0)
        for field in _AT_LEAST_ONE:
            if getattr(self, field) is not None:
                self._require_int(field, 1)
        self._require_number("lr", above=0)
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
        if self.outlier_norm is not None:
            self._require_number("outlier_norm", above=1)
        if self.d_sae is not None and self.expansion is not None:
            raise ConfigError(
                f"d_sae = {self.d_sae} and expansion = {self.expansion} both set the dictionary size; "
                f"give one of them"
            )
        if self.d_sae is not None and max(self.ks) > self.d_sae:
            raise ConfigError(
                f"k = {max(self.ks):g} is more than d_sae = {self.d_sae}: a token cannot activate more latents "
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
        self._validate_hub_repo()

    def _validate_hub_repo(self) -> None:
        if self.hub_repo is None:
            return
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", self.hub_repo):
            raise ConfigError(
                f"hub_repo = {self.hub_repo!r} is not owner/name, nor an owner alone (the repository is "
                f"then called as the run)"
            )
        count = len(self.layers) * len(self.ks) * len(self.seeds)
        if "/" in self.hub_repo and count > 1:
            owner = self.hub_repo.partition("/")[0]
            raise ConfigError(
                f"hub_repo = {self.hub_repo!r} is one repository for {count} SAEs; give the "
                f"owner alone, --hub-repo {owner}: each SAE gets a repository called as its run"
            )

    def _require_int(self, field: str, minimum: int) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ConfigError(
                f"{field} must be a whole number of at least {minimum}, got {value!r}"
            )

    def _require_each(self, field: str, is_valid: Callable[[Any], bool], expected: str) -> None:
        """Check one value or several, different ones; one alone is kept without its tuple."""
        value = getattr(self, field)
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        for one in values:
            if not is_valid(one):
                raise ConfigError(f"{field} must be {expected}, got {one!r}")
        if not values or len(set(values)) < len(values):
            raise ConfigError(
                f"{field} = {values!r}: expected at least one {field}, and each of them once"
            )
        object.__setattr__(self, field, values[0] if len(values) == 1 else values)

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

    # --- one SAE, or several ---

    @property
    def layers(self) -> tuple[int, ...]:
        """The hooked layers, in the order given."""
        return self.layer if isinstance(self.layer, tuple) else (self.layer,)

    @property
    def ks(self) -> tuple[float, ...]:
        """Every ``k``, in the order given."""
        return self.k if isinstance(self.k, tuple) else (self.k,)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Every ``seed``, in the order given."""
        return self.seed if isinstance(self.seed, tuple) else (self.seed,)

    @property
    def mean_active(self) -> float:
        """``k`` of a single SAE as the number it is."""
        (k,) = self.ks
        return k

    @property
    def initial_seed(self) -> int:
        """``seed`` of a single SAE as the number it is."""
        (seed,) = self.seeds
        return seed

    @property
    def resolved_stream_seed(self) -> int:
        """``stream_seed``, or the first ``seed``."""
        return self.seeds[0] if self.stream_seed is None else self.stream_seed

    @property
    def runs(self) -> tuple[TrainConfig, ...]:
        """The settings of each SAE alone: every layer with every k with every seed, on one stream."""
        grid = tuple(itertools.product(self.layers, self.ks, self.seeds))
        several = len(grid) > 1
        return tuple(
            dataclasses.replace(
                self,
                layer=layer,
                k=k,
                seed=seed,
                stream_seed=self.resolved_stream_seed,
                name=f"{self.name}-L{layer}-k{k:g}-seed{seed}"
                if self.name and several
                else self.name,
            )
            for layer, k, seed in grid
        )

    @property
    def hub_repository(self) -> str | None:
        """``owner/name`` of a single SAE's repository on the hub, if there is to be one."""
        if self.hub_repo is None or "/" in self.hub_repo:
            return self.hub_repo
        return f"{self.hub_repo}/{self.run_name}"

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run: ``ceil(tokens / batch_size)``."""
        return -(-self.tokens // self.batch_size)

    @property
    def run_name(self) -> str:
        """Of a single SAE: ``name``, or one made from the settings; the same settings give the same."""
        if self.name is not None:
            return self.name
        model = "demo" if self.demo else self.model.rstrip("/").rsplit("/", 1)[-1].lower()
        (layer,) = self.layers
        return f"{model}-scope-v1-L{layer}-batchtopk-k{self.mean_active:g}-seed{self.initial_seed}"

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
    "k_anneal_tokens", "pool_tokens", "eval_tokens", "checkpoint_every_tokens", "keep_checkpoints",
    "log_every_tokens",
)  # fmt: skip
_CHOICES = {
    "quantization": ("nf4", "nf4-dequantized", "nf4-bf16", "none"),
    "activation_dtype": ("bf16", "fp32"),
    "normalize": ("scalar", "none", "layer_norm"),
    "moments": ("fp32", "8bit"),
    "objective": ("log", "plain"),
    "aux_normalization": ("residual_variance", "total_variance", "none"),
    "precision": ("auto", "fp32", "tf32", "bf16"),
    "step": ("fused", "autograd"),
    "resume": ("auto", "never"),
    "wandb": ("auto", "online", "offline", "disabled"),
}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0


MAY_CHANGE_ON_RESUME = frozenset({
    "tokens", "out", "checkpoint_every_tokens", "keep_checkpoints", "resume", "wandb", "wandb_project",
    "wandb_entity", "hub_repo", "hub_private", "revision", "dataset_revision", "skip_bad_lines",
})  # fmt: skip
"""Fields that do not touch what a step computes, or whose effect is looked at in another way, as the
commit of a revision is; any other difference makes a resumed run inconsistent."""
