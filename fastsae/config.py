"""Settings of a training run: these fields are the command line, its help text and the documentation.

Imports the standard library alone, so that ``fastsae train --help`` is instant.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args, get_origin, get_type_hints

from .errors import ConfigError

TRANSFORMER_LENS = {
    "resid_post": "hook_resid_post", "resid_pre": "hook_resid_pre", "attn_out": "hook_attn_out",
    "mlp_in": "mlp.hook_in", "mlp_out": "hook_mlp_out",
}  # fmt: skip
"""The hooks that have a name, by that name, and what TransformerLens calls them in a block."""
_NAMES = {theirs: own for own, theirs in TRANSFORMER_LENS.items()}
_NAMES |= {"input": "resid_pre", "output": "resid_post"}
_IN_A_LAYER = re.compile(
    r"(?:(?:[A-Za-z_]\w*\.)*?(?:layers|h|blocks)\.|resid_post_layer_)(\d+)(?:\.(.+))?"
)


class Site(NamedTuple):
    """A place in a language model where activations are read: a hook, mostly of a decoder layer.

    ``hook``: a name of ``TRANSFORMER_LENS``; or the path of a submodule, in the layer (``mlp.down_proj``) or
    else in the model, for its output, or with ``.input`` behind it for its input.
    """

    layer: int
    hook: str = "resid_post"

    @classmethod
    def of(cls, place: int | Site) -> Site:
        """A place as it is, and a number as the residual stream after the layer."""
        return place if isinstance(place, Site) else cls(place)

    @classmethod
    def parse(cls, hook: str, layer: int | None = None) -> Site:
        """The place that a hook name or a path means: in the layer that it names, else in ``layer``.

        Paths may be those of any model, ``transformer.h.17.mlp`` or ``model.layers.17.mlp``, and names
        TransformerLens's, ``blocks.17.hook_mlp_out``. Raises ConfigError if it is none, or in no layer.
        """
        if found := _IN_A_LAYER.fullmatch(hook):
            layer, hook = int(found[1]), found[2] or "resid_post"
        hook = _NAMES.get(hook, hook).removesuffix(".output")
        if layer is None or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", hook) or "hook_" in hook:
            raise ConfigError(
                f"{hook!r} is not a place in a decoder layer by any name known here; one is "
                f"{', '.join(TRANSFORMER_LENS)}, or the path of a submodule (mlp.down_proj, or "
                f"model.layers.17.mlp.down_proj.input), with --hook and --layer"
            )
        return cls(layer, hook)

    @property
    def key(self) -> str:
        """``17``, or ``17.mlp_out``: what the place is called where its activations are kept."""
        return str(self.layer) if self.hook == "resid_post" else f"{self.layer}.{self.hook}"

    @property
    def transformer_lens(self) -> str | None:
        """TransformerLens's name of the place, where it has one."""
        theirs = TRANSFORMER_LENS.get(self.hook)
        return theirs and f"blocks.{self.layer}.{theirs}"

    @classmethod
    def of_key(cls, key: str) -> Site:
        """The place of that :attr:`key`."""
        layer, _, hook = key.partition(".")
        return cls(int(layer), hook or "resid_post")

    def __str__(self) -> str:
        return f"layer {self.layer}" + (f", {self.hook}" if self.hook != "resid_post" else "")


@dataclass(frozen=True)
class TrainConfig:
    """One training run, of one SAE; :class:`Sweep` is several. Defaults are the recipe: Gemma 4 E2B, layer 17, 16x, k 64, 100M tokens.

    In Python, folders and files may also be any ``os.PathLike``, ``device`` a ``torch.device``, numbers
    scalars of numpy or torch, and whole ones floats without a fraction, as ``1e6`` is.
    """

    # --- language model ---
    model: str = "google/gemma-4-E2B"
    """Decoder language model: an id on the Hugging Face hub, or a local directory."""
    layer: int = 17
    """Decoder layer (0 is the first)."""
    hook: str = "resid_post"
    """What is read there: resid_post (the residual stream after the layer), resid_pre, attn_out, mlp_in, mlp_out; or
    the path of a submodule, of the layer or of the model, for its output, or with .input behind it its input."""
    target: str | None = None
    """Train a transcoder: what it reconstructs of the same tokens in the same layer, named as --hook is."""
    skip: bool = False
    """Give the transcoder a skip connection: an affine map from its input, which begins at zero."""
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
    """Drop tokens whose activation has more than this many times the median norm of its forward pass;
    inf keeps all. [10; inf for batches of your own]"""
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
    train_on: Literal["all", "assistant", "user"] = "all"
    """Of chats, train on what this role says alone; the model reads all of it."""
    text_files: tuple[str, ...] = ()
    """Local .txt, .jsonl (also .gz) or .parquet files, or folders of them, instead of the data set."""
    dataset_revision: str | None = None
    """Branch, tag or commit of the data set on the hub. [its main branch, as it is at the start]"""
    skip_bad_lines: bool = False
    """Leave out records that hold no text, and count them, instead of stopping at the first."""

    # --- sparse autoencoder ---
    k: float = 64
    """Mean active latents per token; may be fractional."""
    d_sae: int | None = None
    """Dictionary size (latents)."""
    expansion: float | None = None
    """Dictionary size as a multiple of the model's width, instead of --d-sae. [16 if neither is given]"""
    normalize: Literal["scalar", "none", "layer_norm"] = "scalar"
    """Input scaling: one constant that gives a mean distance of 1 from the mean, nothing, or per token."""
    matryoshka: tuple[int, ...] = ()
    """Train prefixes of the dictionary, as these many latents, to reconstruct without the latents after
    them; ascending, the last is the dictionary's size."""
    init_from: str | None = None
    """Begin with the latents of this SAE: a folder or hub repository, anything fastsae.load reads."""

    # --- training ---
    tokens: int = 100_000_000
    """Activations to train on; rounded up to whole batches."""
    batch_size: int = 1024
    """Tokens per step."""
    lr: float | None = None
    """Adam's learning rate. [3e-4 for 100M tokens and a width of 1536; more as the 0.28th power of fewer
    tokens and the square root of a smaller width, at most 3.6e-3, and as much less as a latent is active
    less than 7 times a batch: --k times --batch-size / latents; 3e-4 at least]"""
    decoder_lr_ratio: float = 2.0
    """The learning rate of the decoder's rows, as a multiple of --lr."""
    adam_betas: tuple[float, float] = (0.7, 0.95)
    """How much of Adam's mean gradient, and of its mean square, a step keeps."""
    lr_warmup_tokens: int | None = None
    """Raise the learning rate linearly over this many tokens at the start. [a fiftieth of --tokens, 1M at most]"""
    lr_decay_tokens: int | None = None
    """Lower the learning rate linearly to 0 over this many tokens at the end. [a third of --tokens]"""
    k_initial: float | None = None
    """Begin with this many active latents per token and go linearly to --k. [no annealing]"""
    k_anneal_tokens: int = 1_000_000
    """Tokens over which --k-initial becomes --k."""
    latent_quota: float = 0.4
    """Share of the batch's K that goes first to each latent's largest pre-activation, so that every
    latent is used."""
    latent_quota_until: float = 0.9
    """Share of the run after which selection is plain again."""
    clip_norm: float | None = None
    """Clip the norm of all gradients together, exactly. [no clipping]"""
    moments: Literal["fp32", "8bit"] = "fp32"
    """Adam's moments of the weights: fp32, or 8 bits with a scale per latent (fused step)."""
    objective: Literal["log", "plain"] = "log"
    """What is minimised: log(error) + w aux, whose gradient keeps its size as the error falls, or error + w aux."""
    aux_coefficient: float | None = None
    """The weight w of the aux-k loss, which revives dead latents. [log: 18.75, plain: 0.0625]"""
    aux_normalization: Literal["residual_variance", "total_variance", "none"] = "residual_variance"
    """What the aux-k error is divided by."""
    k_aux: int | None = None
    """Dead latents per token in the aux-k loss. [2 k]"""
    dead_after_tokens: int | None = None
    """A latent is dead when it was not active for this many tokens. [a tenth of --tokens, 10M at most]"""
    seed: int = 17
    """Seed of the initial weights and, without --stream-seed, of the stream."""
    stream_seed: int | None = None
    """Seed of the order of the text and the mixing of activations. [--seed]"""
    device: str = "auto"
    """Where to train: auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Matrix products of the SAE; weights stay fp32. [bf16 on CUDA, fp32 on a CPU]"""
    step: Literal["fused", "autograd"] = "fused"
    """How a step is computed: on the sparse kernels, or by plain autograd; same result."""
    cuda_graph: bool = True
    """Replay the fused step as one CUDA graph: on CUDA, of a dictionary that is in one place; with the same bits."""
    pool_tokens: int = 262_144
    """Activations mixed with each other before they are trained on."""
    reuse: int = 1
    """Train on every activation this many times, each time among others; --tokens counts every time."""
    eval_tokens: int = 65_536
    """Activations held out at the start of the text; of a short run, the final evaluation takes fewer."""

    # --- several processes ---
    lanes: int | None = None
    """Streams that the text is dealt to, each with its share of every batch. Any number of processes up to
    this one may host them, now and after a resume; the result does not depend on it. [as many as processes]"""
    latent_shards: int | None = None
    """Pieces of the dictionary, which the processes host. [as many as processes; 1 of several SAEs, or where a
    setting needs the whole dictionary]"""

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
    report: Literal["full", "quick", "none"] = "full"
    """What follows the training: evaluation and report.html, the evaluation alone, or nothing; fastsae
    evaluate makes it later."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto does what wandb is set to, or logs online when a key is configured."""
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
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        files = (self.text_files,) if isinstance(self.text_files, str) else self.text_files
        object.__setattr__(self, "text_files", tuple(map(_plain, files or ())))
        object.__setattr__(self, "device", str(self.device))
        if self.outlier_norm == "inf":  # as to_dict has it
            object.__setattr__(self, "outlier_norm", math.inf)
        for name, least in _WHOLE_NUMBERS.items():
            if isinstance(value := getattr(self, name), float) and value.is_integer():
                object.__setattr__(self, name, int(value))  # 1e6
            valid = lambda value, least=least: isinstance(value, int) and value >= least
            self._require(name, valid, f"a whole number of at least {least}")
        object.__setattr__(self, "matryoshka", checked_levels(self.matryoshka, self.d_sae))
        object.__setattr__(self, "adam_betas", _checked_betas(self.adam_betas))
        site = Site.parse(self.hook, self.layer)
        for name in site._fields:
            object.__setattr__(self, name, getattr(site, name))
        self._check_target()
        for name, bound in _ABOVE.items():
            valid = lambda value, bound=bound: _is_finite(value) and value > bound
            self._require(name, valid, f"a finite number above {bound}")
        valid = lambda value: _is_finite(value) and value >= 0
        self._require("aux_coefficient", valid, "a finite number of at least 0")
        valid = lambda value: value == math.inf or (_is_finite(value) and value > 1)
        self._require("outlier_norm", valid, "a number above 1, or inf to keep all tokens")
        for name in ("latent_quota", "latent_quota_until"):
            valid = lambda value: _is_finite(value) and 0 <= value <= 1
            self._require(name, valid, "a share between 0 and 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} = {getattr(self, name)!r} is not one of {', '.join(map(repr, choices))}"
                )
        if self.moments == "8bit" and self.step == "autograd":
            raise ConfigError(
                "moments = '8bit' belongs to the fused step; use --step fused, or --moments fp32"
            )
        if (self.latent_shards or 1) > 1 and (whole := self.needs_whole_dictionary):
            raise ConfigError(
                f"latent_shards = {self.latent_shards}, but {whole} needs the whole dictionary in one place; "
                f"use --latent-shards 1, or leave it out"
            )
        if (self.lanes or 1) > self.batch_size:
            raise ConfigError(
                f"lanes = {self.lanes} is more than the {self.batch_size} tokens of a batch: every lane gives "
                f"at least one; raise --batch-size"
            )
        if self.d_sae is not None and self.expansion is not None:
            raise ConfigError(
                f"d_sae = {self.d_sae} and expansion = {self.expansion} both set the dictionary size; "
                f"give one of them"
            )
        if self.d_sae is not None and self.k > self.d_sae:
            raise ConfigError(
                f"k = {self.k:g} is more than d_sae = {self.d_sae}: a token cannot activate more latents "
                f"than there are; lower k or raise d_sae"
            )
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device = {self.device!r} is not auto, cpu, cuda or cuda:N")
        if self.name is not None and ("/" in self.name or self.name in ("", ".", "..")):
            raise ConfigError(f"name = {self.name!r} must be a plain folder name, without '/'")
        if self.hub_repo is not None and not re.fullmatch(
            r"[\w-][\w.-]*(/[\w-][\w.-]*)?", self.hub_repo
        ):
            raise ConfigError(
                f"hub_repo = {self.hub_repo!r} is not owner/name, nor an owner alone (the repository is "
                f"then called as the run)"
            )

    @property
    def needs_whole_dictionary(self) -> str | None:
        """The setting, as a flag, that a dictionary in several shards cannot be trained with, if there is one."""
        wholes = {
            "--step autograd": self.step == "autograd",
            "--clip-norm": self.clip_norm is not None,
            "--matryoshka": bool(self.matryoshka),
            "--target": self.target is not None,
        }
        return next((flag for flag, given in wholes.items() if given), None)

    def _check_target(self) -> None:
        if self.target is None:
            if self.skip:
                raise ConfigError(
                    "skip belongs to a transcoder; give what it reconstructs, --target"
                )
            return
        target = Site.parse(self.target, self.layer)
        if target == self.site or target.layer != self.layer:
            raise ConfigError(
                f"target = {self.target!r} is {target}, and the hook {self.site}: a transcoder reconstructs "
                f"another place of the same layer, as with --hook mlp_in --target mlp_out"
            )
        object.__setattr__(self, "target", target.hook)
        for name, wrong in (("normalize", "layer_norm"), ("init_from", self.init_from)):
            if getattr(self, name) == wrong is not None:
                raise ConfigError(
                    f"{name} = {wrong!r} belongs to autoencoders; leave it out, or --target"
                )

    def _require(self, name: str, is_valid: Callable[[Any], bool], expected: str) -> None:
        value, optional = getattr(self, name), getattr(TrainConfig, name) is None
        if (value is None and optional) or (not isinstance(value, bool) and is_valid(value)):
            return
        raise ConfigError(f"{name} must be {expected}, got {value!r}")

    @property
    def resolved_stream_seed(self) -> int:
        """``stream_seed``, or ``seed``."""
        return self.seed if self.stream_seed is None else self.stream_seed

    @property
    def hub_repository(self) -> str | None:
        """``owner/name`` of the repository on the hub, if there is to be one."""
        if self.hub_repo is None or "/" in self.hub_repo:
            return self.hub_repo
        return f"{self.hub_repo}/{self.run_name}"

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run: ``ceil(tokens / batch_size)``."""
        return -(-self.tokens // self.batch_size)

    @property
    def site(self) -> Site:
        """Where the activations are read."""
        return Site(self.layer, self.hook)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the activations are read, and of a transcoder, what it reconstructs behind it."""
        return (self.site,) if self.target is None else (self.site, Site(self.layer, self.target))

    @property
    def place(self) -> str:
        """``L17``, ``L17-mlp_out``, or ``L17-mlp_in-to-mlp_out-skip``, in the names of runs."""
        own = "" if self.target is None else f"-to-{self.target}" + "-skip" * self.skip
        return f"L{self.site.key.replace('.', '-', 1)}{own}"

    @property
    def run_name(self) -> str:
        """``name``, or one made from the settings; the same settings give the same."""
        if self.name is not None:
            return self.name
        model = "demo" if self.demo else self.model.rstrip("/").rsplit("/", 1)[-1].lower()
        kind = "matryoshka" if self.matryoshka else "batchtopk"
        return f"{model}-scope-v1-{self.place}-{kind}-k{self.k:g}-seed{self.seed}"

    @property
    def stream_outlier_norm(self) -> float | None:
        """``outlier_norm`` of activations that a language model gives; None if all tokens are kept."""
        given = 10.0 if self.outlier_norm is None else self.outlier_norm
        return given if math.isfinite(given) else None

    # What follows the length of the run, and once the dictionary's size, where it is not given: see docs/quality.md.

    def peak_lr(self, d_sae: int, d_out: int) -> float:
        """``lr``, or that of the run's length, of how far a step may turn a decoder row ``[d_out]``, whose norm
        is 1, and of how often a latent is active."""
        most = 3.6e-3 * min(1.0, self.k * self.batch_size / d_sae / ACTIVE_ENOUGH)
        own = 3e-4 * (100_000_000 / self.tokens) ** 0.28 * (1536 / d_out) ** 0.5
        return max(3e-4, min(most, own)) if self.lr is None else self.lr

    @property
    def warmup_tokens(self) -> int:
        """``lr_warmup_tokens``, or a fiftieth of the run, 1M at most."""
        own = min(1_000_000, self.tokens // 50)
        return own if self.lr_warmup_tokens is None else self.lr_warmup_tokens

    @property
    def decay_tokens(self) -> int:
        """``lr_decay_tokens``, or a third of the run."""
        return self.tokens // 3 if self.lr_decay_tokens is None else self.lr_decay_tokens

    @property
    def dead_after(self) -> int:
        """``dead_after_tokens``, or a tenth of the run, 10M at most."""
        own = max(1, min(10_000_000, self.tokens // 10))
        return own if self.dead_after_tokens is None else self.dead_after_tokens

    @property
    def aux_weight(self) -> float:
        """What aux-k weighs in the objective: ``aux_coefficient``, or the objective's own."""
        return AUX_WEIGHTS[self.objective] if self.aux_coefficient is None else self.aux_coefficient

    def resolve_d_sae(self, d_in: int) -> int:
        """The dictionary size for a model of width ``d_in``; raises ConfigError if k exceeds it, or if it is
        not where ``matryoshka`` ends."""
        d_sae = self.d_sae or round((self.expansion or 16) * d_in)
        if self.k > d_sae:
            raise ConfigError(
                f"k = {self.k:g} is more than the dictionary's {d_sae} latents "
                f"({self.expansion or 16:g} x {d_in}); lower k or raise d_sae"
            )
        checked_levels(self.matryoshka, d_sae)
        if (self.latent_shards or 1) > d_sae:
            raise ConfigError(
                f"latent_shards = {self.latent_shards} is more than the dictionary's {d_sae} latents; lower it"
            )
        return d_sae

    def to_dict(self) -> dict[str, Any]:
        """Every setting by its name, for JSON; ``aux_coefficient`` as it is used."""
        outlier_norm = "inf" if self.outlier_norm == math.inf else self.outlier_norm
        own = {"aux_coefficient": self.aux_weight, "outlier_norm": outlier_norm}
        settings = dataclasses.asdict(self) | own
        return {n: list(v) if isinstance(v, tuple) else v for n, v in settings.items()}


ACTIVE_ENOUGH = 32 * 1024 / 4608
"""So often a batch a latent must be active, on average, to be trained at 3.6e-3: the fewest at which rates of
3e-3 to 4e-3 were tried."""

AUX_WEIGHTS = {"log": 18.75, "plain": 0.0625}
"""What aux-k weighs in each objective where no ``aux_coefficient`` is given.

While a dead latent's second moment still holds the gradients of its life, those of aux-k must not be
small beside them, or they do not move it; the logarithm's gradients of the error are large. More weight
revives more latents, and costs explained variance where many die.
"""

_WHOLE_NUMBERS = {
    "layer": 0, "seed": 0, "stream_seed": 0, "lr_warmup_tokens": 0, "lr_decay_tokens": 0,
    "harvest_batch": 1, "d_sae": 1, "tokens": 1, "batch_size": 1, "k_aux": 1, "dead_after_tokens": 1,
    "k_anneal_tokens": 1, "pool_tokens": 1, "reuse": 1, "eval_tokens": 1, "checkpoint_every_tokens": 1,
    "keep_checkpoints": 1, "log_every_tokens": 1, "context_length": 2, "lanes": 1, "latent_shards": 1,
}  # fmt: skip
"""The smallest value of each."""
_ABOVE = {"k": 0, "lr": 0, "decoder_lr_ratio": 0, "expansion": 0, "k_initial": 0, "clip_norm": 0}
_CHOICES = {
    name: get_args(hint)
    for name, hint in get_type_hints(TrainConfig).items()
    if get_origin(hint) is Literal
}


def checked_levels(levels: Iterable[Any], d_sae: int | None) -> tuple[int, ...]:
    """The levels of a Matryoshka SAE of ``d_sae`` latents, if there are any and that is known.

    Raises ConfigError if they are not whole numbers, ascending, the last of them ``d_sae``.
    """
    values = tuple(map(_plain, levels if isinstance(levels, Iterable) else (levels,)))
    whole = all(isinstance(v, (int, float)) and v == v // 1 for v in values)
    if not whole or any(b <= a for a, b in itertools.pairwise((0, *values))):
        raise ConfigError(
            f"matryoshka = {values!r}: expected numbers of latents that ascend, as 2048 8192 24576"
        )
    if values and d_sae is not None and values[-1] != d_sae:
        raise ConfigError(
            f"matryoshka ends with {values[-1]:,}, but the dictionary has {d_sae:,} latents: the last level is "
            f"the whole dictionary; add {d_sae}, or give --d-sae {values[-1]}"
        )
    return tuple(map(int, values))


def _checked_betas(betas: Iterable[Any]) -> tuple[float, float]:
    """Adam's; raises ConfigError if they are not two numbers above 0 and below 1."""
    values = tuple(map(_plain, betas if isinstance(betas, Iterable) else (betas,)))
    if len(values) != 2 or not all(_is_finite(value) and 0 < value < 1 for value in values):
        raise ConfigError(
            f"adam_betas must be two numbers above 0 and below 1, as 0.9 0.999, got {values!r}"
        )
    return values


def _plain(value: Any) -> Any:
    """A path as a string, ``~`` expanded, and a scalar of numpy or torch as a number; all else as it is."""
    if isinstance(value, (str, os.PathLike)):
        return os.path.expanduser(value)
    return value.item() if getattr(value, "shape", None) == () else value


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


BEFORE: dict[str, Any] = {
    "hook": TrainConfig.hook, "target": None, "skip": False, "lanes": 1, "latent_shards": 1,
    "adam_betas": [0.9, 0.999], "decoder_lr_ratio": 1.0,
}  # fmt: skip
"""What runs had that were saved before there were these settings."""

MAY_CHANGE_ON_RESUME = frozenset({
    "tokens", "out", "checkpoint_every_tokens", "keep_checkpoints", "resume", "wandb", "wandb_project",
    "wandb_entity", "hub_repo", "hub_private", "revision", "dataset_revision", "skip_bad_lines", "report",
    "cuda_graph",
})  # fmt: skip
"""Fields that do not touch what a step computes, or whose effect is looked at in another way, as the
commit of a revision is; any other difference makes a resumed run inconsistent."""


class Sweep:
    """Several SAEs on one pass of the stream: every layer with every hook with every k with every seed.

    Args:
        base: all that the SAEs have in common; its ``name`` is what their names begin with.
        layers, ks, seeds, hooks: the values of ``layer``, ``k``, ``seed`` and ``hook``; that of ``base`` if
            absent. A hook that names its layer is taken there alone.

    Attributes:
        sites: where activations are read, targets of transcoders too, each once.
        runs: the settings of each SAE. It is the one that is trained on them alone.

    Raises:
        ConfigError: no value or the same one twice, an impossible one, or one repository for several SAEs.
    """

    def __init__(
        self,
        base: TrainConfig,
        layers: Iterable[int] | int | None = None,
        ks: Iterable[float] | float | None = None,
        seeds: Iterable[int] | int | None = None,
        hooks: Iterable[str] | str | None = None,
    ) -> None:
        self.base = base
        self.layers = _values("layer", base.layer, layers)
        self.ks = _values("k", base.k, ks)
        self.seeds = _values("seed", base.seed, seeds)
        self.hooks = _values("hook", base.hook, hooks)
        stream_seed = self.seeds[0] if base.stream_seed is None else base.stream_seed
        base = dataclasses.replace(base, stream_seed=stream_seed)
        places = itertools.product(self.layers, self.hooks)
        inputs = dict.fromkeys(Site.parse(hook, layer) for layer, hook in places)
        grid = list(itertools.product(inputs, self.ks, self.seeds))
        runs = [
            dataclasses.replace(base, layer=layer, hook=hook, k=k, seed=seed)
            for (layer, hook), k, seed in grid
        ]
        if base.name is not None and len(runs) > 1:
            runs = [
                dataclasses.replace(run, name=f"{base.name}-{run.place}-k{run.k:g}-seed{run.seed}")
                for run in runs
            ]
        self.runs = tuple(runs)
        self.sites = tuple(dict.fromkeys(site for run in runs for site in run.sites))
        owner, _, repository = (base.hub_repo or "").partition("/")
        if repository and len(runs) > 1:
            raise ConfigError(
                f"hub_repo = {base.hub_repo!r} is one repository for {len(runs)} SAEs; give the "
                f"owner alone, --hub-repo {owner}: each SAE gets a repository called as its run"
            )


T = TypeVar("T")


def _values(name: str, default: T, given: Iterable[T] | T | None) -> tuple[T, ...]:
    given = (default,) if given is None else _plain(given)
    many = isinstance(given, Iterable) and not isinstance(given, str)
    values = tuple(map(_plain, cast("Iterable[T]", given if many else (given,))))
    if not values or len(set(values)) < len(values):
        raise ConfigError(
            f"{name} = {values!r}: expected at least one {name}, and each of them once"
        )
    return values
