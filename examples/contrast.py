"""Which latents tell questions from statements?

    python examples/contrast.py SAE      the folder of a run, runs/example for instance

The same as `fastsae contrast SAE --positive ... --negative ...`, with the two sets made here.
"""

import sys
from itertools import product

import fastsae
from fastsae.evaluation.contrast import contrast, describe, pool
from fastsae.lm.hooks import site_of

SUBJECTS = ("the parser", "the old server", "this function", "a new model", "the second test")
VERBS = ("read", "write", "copy", "delete", "ignore", "open")
OBJECTS = ("the file", "every line", "its own input")


def main(folder: str) -> dict:
    sae = fastsae.load(folder)
    model = fastsae.SplicedModel.load(sae.metadata["model_name"], site_of(sae.hook_name))
    facts = list(product(SUBJECTS, VERBS, OBJECTS))
    questions = [f"Does {subject} {verb} {thing}?" for subject, verb, thing in facts]
    statements = [f"Now {subject} will {verb} {thing}." for subject, verb, thing in facts]
    positive, negative = (pool(sae, model, texts, 128) for texts in (questions, statements))
    result = contrast(positive, negative, fdr=0.01)
    print(describe(result, rows=5))
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
