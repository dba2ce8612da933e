"""circuit-tracer: a folder of transcoders, one for each MLP of a model from the first layer on.

``layer_0.safetensors`` and on hold ``W_enc`` and ``W_dec`` (both one latent a row), ``b_enc``, ``b_dec``,
``activation_function.threshold`` and, of a skip connection, ``W_skip``; ``config.yaml`` says where they read and write.
``ReplacementModel.from_pretrained(model, "/absolute/path/of/the/folder")`` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ...errors import FormatError
from ..transcoder import Transcoder
from .files import replace_files
from .portable import export


def save_for_circuit_tracer(transcoders: Sequence[Transcoder], directory: str | Path) -> Path:
    """Write one transcoder for each layer, in any order, to ``directory``; returns it.

    They select by their thresholds, whatever their own mode is.

    Raises:
        FormatError: layers are missing or there twice, the transcoders read or write at places of different names
            or differ in size, or a width changes between them.
    """
    files, places, layers = {}, set(), []
    for transcoder in transcoders:
        name, target = str(transcoder.hook_name), str(transcoder.target_hook_name)
        known = all(re.fullmatch(r"blocks\.\d+\..+", hook) for hook in (name, target))
        if not known or transcoder.d_in != transcoder.d_out:
            raise FormatError(
                f"circuit-tracer replaces MLPs by transcoders of the model's width, and this one maps {name} of "
                f"width {transcoder.d_in} to {target} of width {transcoder.d_out}"
            )
        (_, layer, read), (*_, written) = name.split(".", 2), target.split(".", 2)
        # The MLP's own output, where no norm is behind it, has this name in every model that it knows.
        if str(transcoder.metadata.get("hf_hook_name_out")).endswith(".mlp"):
            written = "mlp.hook_out"
        layers.append(int(layer))
        places.add((transcoder.metadata.get("model_name"), transcoder.d_sae, read, written))
        saved = export(transcoder, "threshold")
        assert saved.threshold is not None
        tensors = {"W_enc": saved.W_enc.T.contiguous(), "W_dec": saved.W_dec}
        tensors |= {"b_enc": saved.b_enc, "b_dec": saved.b_dec}
        threshold = saved.threshold.to(saved.b_enc.dtype).expand_as(saved.b_enc)
        tensors["activation_function.threshold"] = threshold.contiguous()
        if saved.W_skip is not None:
            tensors["W_skip"] = saved.W_skip
        files[f"layer_{layer}.safetensors"] = tensors
    if sorted(layers) != list(range(len(layers))) or len(places) != 1:
        raise FormatError(
            f"circuit-tracer needs one transcoder for each layer from 0 on, all of one model, size and kind of "
            f"place; these are of layers {sorted(layers)}, and {'; '.join(map(str, places))}"
        )
    ((model, _, read, written),) = places
    config = {"model_name": model, "model_kind": "transcoder_set", "feature_input_hook": read}
    config |= {"feature_output_hook": written, "scan": Path(directory).name}
    replace_files(Path(directory), {**files, "config.yaml": config}, last="config.yaml")
    return Path(directory)
