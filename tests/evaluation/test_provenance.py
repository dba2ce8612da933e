"""An SAE is not evaluated on other activations than it was trained on without a word."""

from __future__ import annotations

import logging
import re

import models
import pytest
from small_saes import small_sae

from fastsae import ConfigError, HeldOutText, SplicedModel
from fastsae.evaluation.contrast import pool
from fastsae.evaluation.evaluate import evaluate

TEXTS = ["Some words to read. " * 4] * 12


@pytest.fixture(scope="module")
def model() -> SplicedModel:
    return SplicedModel.load(models.llama(), 2)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"model_from_pretrained_kwargs": {"center_writing_weights": True}},
            "center_writing_weights",
        ),
        ({"hook_head_index": 3}, "attention head 3"),
    ],
)
def test_activations_that_cannot_be_had_are_refused(model, metadata: dict, message: str) -> None:
    sae = small_sae(64, 64, 4, metadata=metadata)
    with pytest.raises(ConfigError, match=message):
        evaluate(sae, HeldOutText.tokenize(TEXTS, model.tokenizer, 32), model=model)
    with pytest.raises(ConfigError, match=message):
        pool(sae, model, TEXTS, 32)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"prepend_bos": False}, "without BOS.*prepend_bos=False"),
        ({"seqpos_slice": [5, -5]}, "positions 5:-5 of each row alone"),
        ({"seqpos_slice": [None, None, 2]}, "positions ::2 of"),
        ({"prepend_bos": True, "seqpos_slice": [None], "hook_head_index": None}, None),
        ({"model_from_pretrained_kwargs": {"center_writing_weights": False}}, None),
        ({}, None),
    ],
)
def test_what_differs_is_told(model, metadata: dict, message: str | None, caplog) -> None:
    caplog.set_level(logging.WARNING, logger="fastsae")
    sae = small_sae(64, 64, 4, metadata=metadata)
    text = HeldOutText.tokenize(TEXTS, model.tokenizer, 32)
    evaluate(sae, text, model=model, losses=False)
    if message is None:
        assert not caplog.records
    else:
        assert re.search(message, caplog.text)


def test_rows_may_begin_without_bos(model, caplog) -> None:
    caplog.set_level(logging.WARNING, logger="fastsae")
    plain = HeldOutText.tokenize(TEXTS, model.tokenizer, 32, prepend_bos=False)
    with_bos = HeldOutText.tokenize(TEXTS, model.tokenizer, 32)
    assert plain.tokens == with_bos.tokens and int(plain.rows[0][0]) != model.tokenizer.bos_token_id
    sae = small_sae(64, 64, 4, metadata={"prepend_bos": False})
    evaluate(sae, plain, model=model, losses=False)
    pool(sae, model, TEXTS, 32)  # tokenizes as the SAE asks for
    assert not caplog.records
    sae = small_sae(64, 64, 4, metadata={"prepend_bos": True})
    evaluate(sae, plain, model=model, losses=False)
    assert "with BOS in front" in caplog.text and "prepend_bos=True" in caplog.text
