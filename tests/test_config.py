"""The settings and the command line that is made of them."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsae
from fastsae.cli import train as cli
from fastsae.config import MAY_CHANGE_ON_RESUME, Sweep, TrainConfig

ROOT = Path(__file__).parents[1]


def test_defaults_are_the_recipe() -> None:
    c = TrainConfig()
    assert (c.model, c.layer, c.quantization) == ("google/gemma-4-E2B", 17, "nf4")
    assert (c.dataset, c.dataset_config) == ("HuggingFaceFW/fineweb-edu", "sample-10BT")
    assert (c.resolve_d_sae(1536), c.k, c.batch_size, c.tokens) == (24576, 64, 1024, 100_000_000)
    assert (c.peak_lr(24_576, 1536), c.aux_weight, c.seed, c.checkpoint_every_tokens) == (
        3e-4,
        18.75,
        17,
        8_000_000,
    )
    assert c.run_name == "gemma-4-e2b-scope-v1-L17-batchtopk-k64-seed17"
    assert dataclasses.replace(c, tokens=16_000_000).steps == 15_625
    assert dataclasses.replace(c, tokens=16_000_001).steps == 15_626


def test_the_weight_of_aux_k_is_the_flags_or_the_objectives() -> None:
    assert TrainConfig(objective="plain").aux_weight == 0.0625
    for objective in ("log", "plain"):
        given = TrainConfig(objective=objective, aux_coefficient=0.03125)
        assert given.aux_weight == given.to_dict()["aux_coefficient"] == 0.03125
    assert TrainConfig().to_dict() == TrainConfig(aux_coefficient=18.75).to_dict()


def test_not_too_many_flags() -> None:
    assert len(dataclasses.fields(TrainConfig)) <= 70
    assert {field.name for field in dataclasses.fields(TrainConfig)} > MAY_CHANGE_ON_RESUME


def test_settings_survive_a_way_through_json() -> None:
    for outlier_norm in (None, 10, float("inf")):
        c = TrainConfig(
            layer=3, k=8.5, text_files=("a.txt", "b.txt"), outlier_norm=outlier_norm, matryoshka=(9, 99),
            adam_betas=(0.9, 0.999),
        )  # fmt: skip
        found = TrainConfig(**json.loads(json.dumps(c.to_dict(), allow_nan=False)))
        assert found == dataclasses.replace(c, aux_coefficient=18.75)


def test_outliers_of_a_language_model_are_dropped_unless_all_are_kept() -> None:
    given = [None, 3.5, float("inf")]
    found = [TrainConfig(outlier_norm=value).stream_outlier_norm for value in given]
    assert found == [10.0, 3.5, None]


def test_the_dead_window_follows_the_run() -> None:
    assert TrainConfig().dead_after == TrainConfig(tokens=10**9).dead_after == 10_000_000
    assert TrainConfig(tokens=400_000).dead_after == 40_000
    assert TrainConfig(tokens=5, batch_size=1).dead_after == 1
    assert TrainConfig(tokens=400_000, dead_after_tokens=7).dead_after == 7


def test_paths_devices_and_scalars_are_plain_in_the_settings() -> None:
    given = TrainConfig(
        out=Path("runs"), cache_dir=Path("cache"), model=Path("model"), dataset=Path("data"),
        init_from=Path("sae"), text_files=[Path("a.txt"), "b.txt"], device=torch.device("cuda", 1),
        tokens=1e6, k=np.int64(16), layer=torch.tensor(3), eval_tokens=np.float64(64),
    )  # fmt: skip
    assert given == TrainConfig(
        out="runs", cache_dir="cache", model="model", dataset="data", init_from="sae",
        text_files=("a.txt", "b.txt"), device="cuda:1", tokens=1_000_000, k=16, layer=3, eval_tokens=64,
    )  # fmt: skip
    json.dumps(given.to_dict())
    assert {type(value) for value in (given.tokens, given.layer, given.k, given.eval_tokens)} == {
        int
    }
    assert TrainConfig(text_files=Path("a.txt")).text_files == ("a.txt",)
    home = str(Path.home() / "runs")
    assert TrainConfig(out="~/runs").out == TrainConfig(out=Path("~/runs")).out == home
    with pytest.raises(fastsae.ConfigError, match=r"tokens must be a whole number .* got 10\.5"):
        TrainConfig(tokens=10.5)


def test_a_sweep_of_an_array_or_of_one_number() -> None:
    c = Sweep(TrainConfig(), layers=8, ks=np.array([16, 32]), seeds=torch.arange(2))
    assert (c.layers, c.ks, c.seeds) == ((8,), (16, 32), (0, 1))
    assert c.runs[1].run_name.endswith("-L8-batchtopk-k16-seed1")


def test_a_sweep_of_nothing_is_the_one_sae() -> None:
    c = Sweep(TrainConfig(layer=3, k=8, seed=1))
    assert (c.layers, c.ks, c.seeds) == ((3,), (8,), (1,))
    assert c.runs == (TrainConfig(layer=3, k=8, seed=1, stream_seed=1),)


def test_several_values_are_a_grid_on_one_stream() -> None:
    c = Sweep(TrainConfig(), layers=[9, 4], ks=(8, 2.5), seeds=(1, 2))
    assert c.layers == (9, 4)
    assert [(r.layer, r.k, r.seed) for r in c.runs] == [
        (9, 8, 1), (9, 8, 2), (9, 2.5, 1), (9, 2.5, 2), (4, 8, 1), (4, 8, 2), (4, 2.5, 1), (4, 2.5, 2),
    ]  # fmt: skip
    assert {r.stream_seed for r in c.runs} == {1}
    assert c.runs[3].run_name == "gemma-4-e2b-scope-v1-L9-batchtopk-k2.5-seed2"
    # Each one is the run that its own settings describe, stream seed and all.
    alone = TrainConfig(layer=4, k=2.5, seed=2, stream_seed=1)
    assert Sweep(alone).runs == (alone,) == (c.runs[7],)
    named = Sweep(TrainConfig(name="mine"), c.layers, c.ks, c.seeds)
    assert named.runs[0].run_name == "mine-L9-k8-seed1"
    assert len({r.run_name for r in named.runs}) == 8
    assert Sweep(TrainConfig(name="mine")).runs[0].run_name == "mine"
    for wrong, message in (((3, 3), "each of them once"), ((), "one layer"), ((3, -1), "got -1")):
        with pytest.raises(fastsae.ConfigError, match=message):
            Sweep(TrainConfig(), layers=wrong)
    with pytest.raises(fastsae.ConfigError, match="k must be a finite number above 0, got 0"):
        Sweep(TrainConfig(), ks=(4, 0))
    with pytest.raises(fastsae.ConfigError, match="k = 99 is more than d_sae = 50"):
        Sweep(TrainConfig(k=4, d_sae=50), ks=(4, 99))


def test_repositories_on_the_hub() -> None:
    assert TrainConfig(hub_repo="me/mine").hub_repository == "me/mine"
    several = Sweep(TrainConfig(hub_repo="me"), ks=(4, 8)).runs
    assert several[1].hub_repository == "me/gemma-4-e2b-scope-v1-L17-batchtopk-k8-seed17"
    with pytest.raises(fastsae.ConfigError, match="one repository for 2 SAEs.*--hub-repo me:"):
        Sweep(TrainConfig(hub_repo="me/mine"), ks=(4, 8))
    for wrong in ("https://huggingface.co/me/mine", "a/b/c", "", "me/"):
        with pytest.raises(fastsae.ConfigError, match="is not owner/name"):
            TrainConfig(hub_repo=wrong)


def test_the_stream_has_its_own_seed_if_wanted() -> None:
    assert TrainConfig(seed=5).resolved_stream_seed == 5
    assert TrainConfig(seed=5, stream_seed=0).resolved_stream_seed == 0
    with pytest.raises(fastsae.ConfigError, match="stream_seed must be"):
        TrainConfig(stream_seed=-1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("k", 0, "k must be a finite number above 0, got 0"),
        ("k", -3.0, "got -3.0"),
        ("k", float("nan"), "got nan"),
        ("lr", 0.0, "lr must be a finite number above 0"),
        ("decoder_lr_ratio", 0.0, "decoder_lr_ratio must be a finite number above 0"),
        (
            "adam_betas",
            (0.9, 1.0),
            "adam_betas must be two numbers above 0 and below 1, as 0.9 0.999, got",
        ),
        ("adam_betas", (0.0, 0.9), "got (0.0, 0.9)"),
        ("adam_betas", 0.9, "got (0.9,)"),
        ("adam_betas", (0.9, 0.99, 0.999), "two numbers"),
        ("adam_betas", ("a", 0.9), "two numbers"),
        ("lr", float("inf"), "got inf"),
        ("aux_coefficient", -1.0, "aux_coefficient must be a finite number of at least 0"),
        ("expansion", 0.0, "expansion must be"),
        ("d_sae", 0, "d_sae must be a whole number of at least 1, got 0"),
        ("d_sae", -5, "got -5"),
        ("d_sae", 2.5, "got 2.5"),
        ("batch_size", 0, "batch_size must be a whole number of at least 1"),
        ("tokens", 0, "tokens must be a whole number of at least 1"),
        ("tokens", -1, "got -1"),
        ("layer", -1, "layer must be a whole number of at least 0, got -1"),
        ("seed", -1, "seed must be"),
        ("context_length", 1, "context_length must be a whole number of at least 2, got 1"),
        ("device", "gpu", "'gpu' is not auto, cpu, cuda or cuda:N"),
        ("normalize", "rms", "'rms' is not one of"),
        ("quantization", "int8", "'int8' is not one of"),
        ("name", "a/b", "plain folder name"),
        ("layer", (3, 5), "layer must be a whole number of at least 0, got (3, 5)"),
        ("k", (4, 8), "got (4, 8)"),
        ("seed", None, "seed must be"),
        (
            "outlier_norm",
            1,
            "outlier_norm must be a number above 1, or inf to keep all tokens, got 1",
        ),
        ("outlier_norm", float("nan"), "or inf to keep all tokens, got nan"),
        ("dead_after_tokens", 0, "dead_after_tokens must be"),
        ("latent_quota", -0.1, "latent_quota must be a share between 0 and 1, got -0.1"),
        ("latent_quota", 1.5, "got 1.5"),
        ("latent_quota_until", float("nan"), "latent_quota_until must be a share"),
        ("matryoshka", (64, 64), "matryoshka = (64, 64): expected numbers of latents that ascend"),
        ("matryoshka", (0, 64), "that ascend"),
        ("matryoshka", (2.5, 64), "that ascend"),
        ("matryoshka", "many", "that ascend"),
    ],
)
def test_impossible_values(field: str, value: object, message: str) -> None:
    with pytest.raises(fastsae.ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        TrainConfig(**{field: value})


def test_k_beyond_the_dictionary() -> None:
    with pytest.raises(fastsae.ConfigError, match="k = 64 is more than d_sae = 32"):
        TrainConfig(d_sae=32)
    with pytest.raises(
        fastsae.ConfigError, match=r"k = 64 is more than the dictionary's 32 latents"
    ):
        TrainConfig(expansion=2).resolve_d_sae(16)
    with pytest.raises(fastsae.ConfigError, match="give one of them"):
        TrainConfig(d_sae=320, expansion=2)
    assert TrainConfig(d_sae=64).resolve_d_sae(16) == 64


def test_the_last_level_is_the_dictionary() -> None:
    with pytest.raises(fastsae.ConfigError, match="ends with 128, but the dictionary has 256"):
        TrainConfig(d_sae=256, matryoshka=(64, 128))
    with pytest.raises(fastsae.ConfigError, match=r"24,576 latents.*add 24576, or give --d-sae 96"):
        TrainConfig(matryoshka=(64, 96)).resolve_d_sae(1536)
    found = TrainConfig(d_sae=np.int64(256), matryoshka=np.array([64, 256.0]))
    assert found.matryoshka == (64, 256) and type(found.matryoshka[1]) is int
    assert "-matryoshka-k64-" in found.run_name
    (flags,) = cli.parse(["--matryoshka", "2048", "8192", "24576"]).runs
    assert flags.matryoshka == (2048, 8192, 24576) and flags.resolve_d_sae(1536) == 24576


class TestCommandLine:
    def test_flags_become_fields(self) -> None:
        c = cli.parse(
            ["--layer", "3", "--k", "32.5", "--text-files", "a.txt", "b.txt", "--d-sae", "99"]
        ).base
        assert (c.layer, c.k, c.text_files, c.d_sae) == (3, 32.5, ("a.txt", "b.txt"), 99)
        assert c.lr is None and c.peak_lr(99, 1536) == 3e-4

    def test_several_values_of_one_flag(self) -> None:
        c = cli.parse(
            [
                "--layer",
                "8",
                "15",
                "--k",
                "16",
                "32.5",
                "--seed",
                "1",
                "2",
                "3",
                "--stream-seed",
                "9",
                "--init-from",
                "a/b",
            ]
        )
        assert (c.layers, c.ks, c.seeds) == ((8, 15), (16, 32.5), (1, 2, 3))
        assert (c.base.stream_seed, c.base.init_from, len(c.runs)) == (9, "a/b", 12)
        with pytest.raises(fastsae.ConfigError, match="expected at least one layer"):
            cli.parse(["--layer"])

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )

    def test_help_is_instant_and_complete(self) -> None:
        code = (
            "import sys; sys.argv = ['train.py', '--help']\n"
            "try:\n    import runpy; runpy.run_path('train.py', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "print('torch' in sys.modules, 'transformers' in sys.modules)"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
        )
        assert result.stdout.strip().endswith("False False"), result.stderr
        for field in dataclasses.fields(TrainConfig):
            assert f"--{field.name.replace('_', '-')}" in result.stdout

    def test_a_typo_is_answered_with_the_nearest_flag(self) -> None:
        result = self.run("--leyer", "3")
        assert result.returncode == 2
        assert "--layer" in result.stderr and "Traceback" not in result.stderr

    @pytest.mark.parametrize(
        "arguments", [("--k", "0"), ("--k", "abc"), ("--lr", "nan"), ("--tokens", "-5")]
    )
    def test_bad_values_end_with_code_2(self, arguments: tuple[str, str]) -> None:
        result = self.run(*arguments)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr and arguments[1].lstrip("-") in result.stderr


def test_the_card_is_one_flag_away() -> None:
    """The published SAE's own settings, and flags on top of them; the shape is the recipe's."""
    for flag in (["--preset", "card"], ["--preset=card"]):
        (card,) = cli.parse([*flag, "--k", "32"]).runs
        assert (card.objective, card.aux_weight, card.peak_lr(24_576, 1536)) == (
            "plain",
            0.0625,
            3e-4,
        )
        assert (card.warmup_tokens, card.decay_tokens, card.latent_quota) == (0, 0, 0)
        assert (card.stream_outlier_norm, card.normalize) == (None, "none")
        (recipe,) = cli.parse(["--k", "32"]).runs
        shape = ("model", "layer", "k", "batch_size", "tokens", "seed", "dataset", "d_sae")
        assert all(getattr(card, name) == getattr(recipe, name) for name in shape)
    (card,) = cli.parse(["--preset", "card", "--objective", "log", "--outlier-norm", "5"]).runs
    assert (card.objective, card.stream_outlier_norm) == ("log", 5)
    with pytest.raises(fastsae.ConfigError, match="--demo and --preset card"):
        cli.parse(["--demo", "--preset", "card"])
