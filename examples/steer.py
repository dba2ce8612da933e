"""Does a latent that tells a topic make a model write of it?

    python examples/steer.py SAE      the folder of a run, runs/example for instance

Clamps the latent that tells texts about plots from texts about files best, and prints how probable words
of the topic are in what the model writes then; beside ten random latents, clamped to the same value.
"""

import sys
from itertools import product

import torch

import fastsae
from fastsae.evaluation.contrast import contrast, pool
from fastsae.lm.hooks import site_of
from fastsae.lm.loading import load_pretrained

TOPIC = "plot figure axis axes line color colors image graph curve label legend"
PLOTS = ("the axes of a plot", "a line in the figure", "the color of a curve", "a legend")
FILES = ("the name of a file", "a socket in the server", "the encoding of a text", "a group")
VERBS = ("Change ", "Add ", "Remove ", "Return ", "Copy ", "Set ")
ENDS = (".", " in place.", " if there is one.", " and return it.")
PROMPTS = ["The first thing to do is to", "This function returns", "It is used to set the"]


def main(folder: str, strength: float = 8.0) -> dict[str, float]:
    sae = fastsae.load(folder)
    model, tokenizer = load_pretrained(sae.metadata["model_name"])
    spliced = fastsae.SplicedModel(model, tokenizer, site_of(sae.hook_name))
    plots = pool(sae, spliced, map("".join, product(VERBS, PLOTS, ENDS)), 128)
    files = pool(sae, spliced, map("".join, product(VERBS, FILES, ENDS)), 128)
    found = contrast(plots, files)["latents"]
    latent = next(f["latent"] for f in found if f["mean_positive"] > f["mean_negative"])
    value = strength * float(plots.mean[:, latent].max())
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    topic = [
        tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in TOPIC.split()
    ]
    sampling = {"max_new_tokens": 20, "do_sample": False, "output_logits": True}

    def probability(clamped: list[int]) -> float:
        with fastsae.attach(model, sae) as lens:
            lens.clamp(clamped, value)
            written = model.generate(**inputs, **sampling, return_dict_in_generate=True)
        return float(torch.stack(written.logits).softmax(-1)[..., sorted({*topic})].sum(-1).mean())

    others = plots.active.any(0).index_fill(0, torch.tensor(latent), False).nonzero()
    drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:10]
    random = torch.tensor([probability([int(other)]) for other in others[drawn]])
    result = {"clean": probability([]), "clamped": probability([latent])}
    result |= {"random": float(random.mean()), "largest_random": float(random.max())}
    print(f"latent {latent} at {value:.3g}: probability of plot, figure, axis, ... {result}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
