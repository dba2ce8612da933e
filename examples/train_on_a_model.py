"""Train an SAE on a language model of Hugging Face, and evaluate it on text it has not seen.

    python examples/train_on_a_model.py MODEL LAYER TRAINING_TEXT HELD_OUT_TEXT

MODEL is a local directory or an id on the hub; the texts are .txt, .jsonl or .parquet files.
"""

import sys
from pathlib import Path

import fastsae


def main(model: str, layer: str, training_text: str, held_out_text: str) -> Path:
    config = fastsae.TrainConfig(
        model=model,
        quantization="none",  # nf4, the default, is for large models
        layer=int(layer),
        text_files=(training_text,),
        context_length=128,
        d_sae=512,
        k=16,
        lr=1e-3,
        tokens=100_000,
        batch_size=256,
        pool_tokens=16_384,
        eval_tokens=2_048,
        log_every_tokens=10_240,
        out="runs",
        name="example",
        wandb="disabled",
    )
    (sae,) = fastsae.Trainer(config).fit()  # given again after a kill, this goes on

    whole = fastsae.SplicedModel.load(model, config.layer)
    document = Path(held_out_text).read_text(encoding="utf-8")
    text = fastsae.HeldOutText.tokenize([document], whole.tokenizer, context_length=128)
    scores = fastsae.evaluate(sae, text, "topk", model=whole)["topk"]
    print(f"explained variance  {scores.explained_variance:.3f}")
    print(f"active per token    {scores.l0:.1f} of {sae.d_sae} latents")
    print(f"loss recovered      {scores.loss_recovered:.1%}")
    print(f"the SAE             {Path('runs/example').resolve()}")
    return Path("runs/example")


if __name__ == "__main__":
    main(*sys.argv[1:])
