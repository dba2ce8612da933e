"""An SAE for an instruct model from a base model's: chats, one role of them, from the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import models
import pytest
import torch
from small_saes import small_sae

import fastsae
from fastsae.cli import main
from fastsae.config import Site, TrainConfig
from fastsae.data.opening import open_text_chunks
from fastsae.lm.held_out import is_text
from fastsae.lm.hooked import SplicedModel
from fastsae.reporting.run_folder import RunFolder

CHATS = [
    [
        {"role": "user", "content": f"What is the number {i}?"},
        {
            "role": "assistant",
            "content": f"It is {i}, which follows {i - 1} and precedes {i + 1}. " * 3,
        },
    ]
    for i in range(120)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, with a chat template, and ``chats.jsonl``."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(models.llama(), folder / "model")
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    )
    (folder / "model/chat_template.jinja").write_text(template)
    lines = [json.dumps({"messages": chat}) for chat in CHATS]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def config(folder: Path, **changes) -> TrainConfig:
    settings = {
        "model": folder / "model", "text_files": (folder / "chats.jsonl",), "text_column": "messages",
        "layer": 1, "quantization": "none", "context_length": 64, "harvest_batch": 4, "eval_tokens": 200,
        "device": "cpu", "outlier_norm": float("inf"),
    }  # fmt: skip
    return TrainConfig(**settings | changes)


def test_activations_are_those_of_the_role_in_the_whole_chat(folder: Path) -> None:
    device = torch.device("cpu")
    chunks = open_text_chunks(config(folder, train_on="assistant"), (Site(1),), device)
    every = open_text_chunks(config(folder, eval_tokens=1), (Site(1),), device)
    model = SplicedModel.load(str(folder / "model"), 1)
    chunk = chunks.draw()
    assert chunk is not None and (chunk.tokens < 0).any()
    harvest = chunks.harvest(chunk)
    tokens = torch.where(chunk.tokens < 0, ~chunk.tokens, chunk.tokens).long()
    # The same rows of the same text, of which everything is read.
    whole = next(c for c in iter(every.draw, None) if (c.tokens[0] == tokens[0]).all())
    assert len(every.harvest(whole).verdict) > len(harvest.verdict) > 0
    rows = torch.arange(tokens.shape[1]) < chunk.lengths[:, None]
    read = rows & is_text(chunk.tokens, every.model.special_ids)
    torch.testing.assert_close(harvest.layers[0], model.residual(tokens)[read])
    said = model.tokenizer.decode(tokens[read])
    assert "which follows" in said and not any(
        word in said for word in ("What", "<user>", "<assis")
    )
    text = chunks.held_out_text()
    assert text.tokens >= 200 and text.tokens < sum(map(len, text.rows))
    assert sum(int(batch.text.sum()) for batch in text.batches(3)) == text.tokens
    assert all((batch.tokens >= 0).all() for batch in text.part(50).batches(3))


@pytest.mark.slow
def test_from_a_base_sae_to_an_instruct_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = small_sae(64, 128, 6, metadata={"model_name": "base", "hook_name": "model.layers.1"})
    with torch.no_grad():
        base.b_dec += 100  # another mean than the instruct model's
    fastsae.save(base, folder / "base")
    flags = {
        "init-from": folder / "base", "model": folder / "model", "text-files": folder / "chats.jsonl",
        "text-column": "messages", "train-on": "assistant", "layer": 1, "k": 6, "tokens": 2048,
        "batch-size": 128, "pool-tokens": 512, "context-length": 64, "harvest-batch": 4, "eval-tokens": 256,
        "quantization": "none", "out": folder / "runs", "name": "chat", "wandb": "disabled",
        "report": "quick", "device": "cpu",
    }  # fmt: skip
    assert main(["train", *(word for n, v in flags.items() for word in (f"--{n}", str(v)))]) == 0
    run = folder / "runs/chat"
    metadata = fastsae.load(run).metadata
    assert metadata["train_on"] == "assistant"
    told = metadata["warm_start"]
    assert told["refitted_explained_variance"] > told["explained_variance"] + 1
    summary = json.loads((run / "summary.json").read_text())
    assert summary["other_roles"] > 0 and summary["tokens_seen"] >= 2048
    held = RunFolder.read(run).held_out()
    assert isinstance(held, fastsae.HeldOutText) and held.tokens < sum(map(len, held.rows))
    assert json.loads((run / "evaluation.json").read_text())["tokens"] <= held.tokens


def test_a_role_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--train-on", "asistant"]) == 2
    assert "assistant" in capsys.readouterr().err
