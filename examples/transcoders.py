"""Train a transcoder for every MLP of a language model on one pass, and write them for circuit-tracer.

    python examples/transcoders.py MODEL LAYERS TEXT FOLDER

MODEL is a local directory or an id on the hub, LAYERS how many of its MLPs, from the first on.
"""

import sys

import fastsae


def main(model: str, layers: str, text: str, folder: str) -> list[fastsae.SAE]:
    base = fastsae.TrainConfig(
        model=model,
        quantization="none",
        hook="mlp_in",
        target="mlp_out",
        skip=True,  # an affine map beside the latents; without it, they explain everything
        text_files=(text,),
        context_length=128,
        d_sae=512,
        k=16,
        tokens=50_000,
        batch_size=256,
        pool_tokens=16_384,
        eval_tokens=2_048,
        report="quick",  # the loss of the model with each MLP replaced, without a page
        out="runs",
        name="transcoder",
        wandb="disabled",
    )
    trainer = fastsae.Trainer(fastsae.Sweep(base, layers=range(int(layers))))
    transcoders = trainer.fit()
    for transcoder in transcoders:
        print(f"{transcoder.hook_name} to {transcoder.metadata['hook_name_out']}")
    # ReplacementModel.from_pretrained(model, "/absolute/path/of/the/folder") reads it.
    print("wrote", fastsae.save_for_circuit_tracer(transcoders, folder))
    return transcoders


if __name__ == "__main__":
    main(*sys.argv[1:])
