"""Evaluate an SAE on text it was not trained on.

    python -m fastsae.evaluate SAE                                     text and model of the demo, or the recipe's
    python -m fastsae.evaluate SAE --model DIR --text-files a.txt b.jsonl
    python -m fastsae.evaluate owner/name --model owner/model --dataset owner/text

This module is the command alone, and never imported: ``fastsae.evaluate`` is the function.
"""

if __name__ != "__main__":
    raise ImportError(
        "fastsae.evaluate is a function: `from fastsae import evaluate`; its parts are in fastsae.evaluation"
    )

from fastsae.evaluation.command import main

raise SystemExit(main(description=__doc__))
