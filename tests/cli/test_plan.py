"""The planner: its memory is what a step really allocates, and its times are what the arithmetic says."""

import json
import re
import statistics
from pathlib import Path

import pytest
import torch

import fastsae
from fastsae.cli import main, plan
from fastsae.team import Team
from fastsae.training.sharded import ShardedUpdate
from fastsae.training.traffic import received_bytes
from fastsae.training.update import UPDATES
from fastsae_kernels import MatrixState

RECIPE = (1024, 1536, 24576, 64)
RATES = plan.Rates(flops=790e12, bandwidth=4.3e12)
EIGHT = ("--gpus", "8", "--batch-size", "8192")


def step_seconds(*shape: float) -> float:
    return sum(plan.stage_seconds(*shape, RATES).values())


def held_bytes(step) -> int:
    """Bytes of the tensors that a fused step keeps, each storage once."""
    tensors = [t for name, t in step.state_dict().items() if t.ndim and "W_" not in name]
    tensors += [part for rows in step._rows.values() for part in rows if part is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_state_is_what_a_step_allocates(precision):
    D, F = 48, 320
    sae = fastsae.SAE(D, F, 4)
    sae.precision = precision
    step = UPDATES["fused"](
        sae, fastsae.TrainConfig(d_sae=F, k=4, precision=precision, device="cpu")
    )
    step(torch.randn(16, D))
    assert held_bytes(step) == plan.state_bytes(D, F)


def test_quantized_moments_are_counted():
    D, F = 48, 320
    rows = MatrixState.start(torch.randn(F, D), split=True, quantized_moments=True)
    one = sum(t.numel() * t.element_size() for t in rows if t is not None)
    assert plan.state_bytes(D, F, quantized=True) == 2 * one + 12 * (F + D) + 8 * F


def test_levels_are_counted(capsys):
    B, D, F, k = RECIPE
    more = plan.step_bytes(B, D, F, k, levels=3) - plan.step_bytes(B, D, F, k)
    assert more == 2 * 4 * 4 * B * D
    plain, nested = (
        printed(capsys, *flags) for flags in ((), ("--matryoshka", "2048", "8192", "24576"))
    )
    assert plain != nested and len(plain) == len(nested)
    assert main(["plan", "--matryoshka", "2048", "8192"]) == 2


def test_the_largest_dictionary_fits_and_the_next_does_not():
    B, D, _, k = RECIPE
    options = {"pool_tokens": 262_144, "dead_share": 0.38}
    largest = plan.largest_F(20, B, D, k, **options)
    assert largest % 1024 == 0
    assert plan.run_bytes(B, D, largest, k, **options) <= 20 * plan.GIB
    assert plan.run_bytes(B, D, largest + 1024, k, **options) > 20 * plan.GIB
    assert plan.largest_F(0.1, B, D, k, **options) == 0


def test_the_roofline_at_the_recipes_shape():
    """By hand: 77.3 GFLOP at 790 TFLOP/s; 75.5M weights of 24 bytes and 403 MB gathered at 4.3 TB/s."""
    stages = plan.stage_seconds(*RECIPE, RATES)
    assert stages["encode"] == pytest.approx(98e-6, rel=0.01)
    assert stages["decode"] == pytest.approx(46.8e-6 + 4.4e-6, rel=0.01)
    assert stages["update"] == pytest.approx(421.4e-6 + 93.6e-6, rel=0.01)
    assert stages["selection"] == pytest.approx(39.6e-6, rel=0.02)
    assert plan.stage_seconds(*RECIPE, RATES, quantized=True)["update"] < 0.7 * stages["update"]


@pytest.mark.parametrize("gpu", plan.ASSUMED)
def test_the_modelled_step_is_near_the_model_of_its_kernels(gpu, capsys):
    path = Path(__file__).parents[2] / "benchmarks/results/gpu_model.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    assumed = results["assumed"]
    rates = plan.Rates(assumed["products, FLOP/s"], assumed["copy, bytes/s"][gpu])
    assert plan.ASSUMED[gpu] == rates and assumed["between kernels of a graph, s"] == plan.GAP
    rows = results.get("after", results["before"])["steps"]["plain"]
    expected = 1e-6 * sum(row[f"{gpu} us"] for row in rows)
    assert plan.modelled_seconds(*RECIPE, gpu) == pytest.approx(expected, rel=0.15)
    (line,) = (line for line in printed(capsys).splitlines() if f"step on an {gpu}" in line)
    assert f"{1e3 * plan.modelled_seconds(*RECIPE, gpu):.2f} ms" in line


def test_what_was_measured_is_said_beside_the_model(capsys):
    assert plan.RECIPE == RECIPE
    path = Path(__file__).parents[2] / "benchmarks/results/performance.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    rows = [row for run in runs if "H200" in run["about"]["hardware"] for row in run["rows"]]
    group = "training step | B=1024 D=1536 F=24576 k=64 bf16, 0% dead"
    (row,) = (row for row in rows if (row["group"], row["trainer"]) == (group, "fastsae"))
    assert statistics.median(row["seconds"]) == plan.MEASURED
    assert f"on an H200, {1e3 * plan.MEASURED:.2f} ms" in printed(capsys)


def test_nothing_else_is_modelled(capsys):
    others = (("--precision", "fp32"), ("--moments", "8bit"))
    for flags in (("--tflops", "790", "--bandwidth", "4.3"), EIGHT, *others):
        assert "modelled" not in printed(capsys, *flags)


def test_a_larger_size_never_takes_less():
    for position in range(4):
        larger = list(RECIPE)
        larger[position] *= 2
        assert step_seconds(*larger) > step_seconds(*RECIPE)


def test_the_defaults_are_the_recipes():
    options, recipe = plan.PlanOptions(), fastsae.TrainConfig()
    assert (options.batch_size, options.d_in, options.d_sae, options.k) == RECIPE
    assert options.tokens == recipe.tokens and options.pool_tokens == recipe.pool_tokens


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_state_of_a_gpu_is_what_its_process_allocates(precision):
    """The first of 3 processes has 3 of 7 shards."""
    D, F, team = 48, 323, Team(0, 3)
    assert team.hosted(7) == range(3)
    here = 3 * F // 7
    assert plan.Split(3, 7, 7).latents_here(F) in (here, here + 1)
    sae = fastsae.SAE(D, here, 4)
    sae.precision = precision
    config = fastsae.TrainConfig(
        d_sae=F, k=4, precision=precision, latent_shards=7, lanes=7, device="cpu"
    )
    state = ShardedUpdate(sae, config, team, F).state_dict()
    held = sum(t.nbytes for t in state.values() if t.ndim)
    assert held == plan.state_bytes(D, here)


def test_a_gpu_of_several_takes_its_share():
    B, D, F, k = 8192, *RECIPE[1:]
    alone, eight, half = plan.Split(), plan.Split(8, 8, 8), plan.Split(4, 8, 8)
    need = lambda split: plan.run_bytes(B, D, F, k, pool_tokens=524_288, split=split)
    assert need(eight) < need(half) < need(alone) / 2
    assert [each.latents_here(F) for each in (alone, eight, half)] == [F, F // 8, F // 4]
    assert [each.tokens_here(B) for each in (alone, eight, half)] == [B, B // 8, B // 4]
    # A small pool is not cut below four forward passes a lane.
    assert [each.pool_tokens_here(65_536) for each in (alone, eight)] == [65_536, 4 * 8 * 1024]
    largest = plan.largest_F(20, B, D, k, pool_tokens=524_288, split=eight)
    assert largest > 4 * plan.largest_F(20, B, D, k, pool_tokens=524_288)
    # The whole dictionary in one place, and only the text dealt.
    whole = plan.Split(8, 8, 1)
    assert whole.latents_here(F) == F and whole.tokens_here(B) == B // 8


def test_shards_divide_the_time_but_for_what_each_lists():
    alone, eight = (
        plan.stage_seconds(*RECIPE, RATES, split=split)
        for split in (plan.Split(), plan.Split(8, 8, 8))
    )
    assert eight["update"] == pytest.approx(alone["update"] / 8)
    assert alone["encode"] / 8 == pytest.approx(eight["encode"], rel=0.3)
    assert alone["selection"] / 8 < eight["selection"] < alone["selection"]


def received(said: str) -> dict[str, float]:
    """The megabytes of each purpose."""
    _, _, table = said.partition("received (counted)")
    rows = re.findall(r"^  (\S.*?) +([\d.]+)( |$)", table.partition("\n\n")[0], re.M)
    return {purpose: float(count) for purpose, count, _ in rows}


def printed(capsys, *flags: str) -> str:
    assert main(["plan", *flags]) == 0
    return capsys.readouterr().out


def test_no_time_is_said_without_rates(capsys):
    said = printed(capsys, "--d-sae", "131072", "--k", "128", "--gib", "22")
    assert "131,072 latents" in said and "counted" in said
    assert "fits in 22 GiB" in said and "the largest dictionary there is" in said
    assert "predicted at" not in said and "USD" not in said
    assert " ms" not in said.split("modelled, not measured")[0]
    assert "does not fit in 22 GiB" in printed(capsys, "--d-sae", "524288", "--gib", "22")


def test_times_follow_from_the_rates_given(capsys):
    rates = ("--tflops", "790", "--bandwidth", "4.3")
    alone = printed(capsys, *rates)
    assert "predicted at 790 TFLOP/s and 4.3 TB/s" in alone and "the SAE alone" in alone
    step = step_seconds(*RECIPE)
    assert f"{1e3 * step:.3f} ms" in alone and "USD" not in alone
    both = printed(capsys, *rates, "--harvest-tokens-per-second", "5e4", "--usd-per-hour", "2")
    hours = 97_657 * (step + 1024 / 5e4) / 3600  # steps of 1,024 tokens for 100M
    assert f"{hours:.2f} h" in both and f"{2 * hours:.2f} USD" in both
    assert "the SAE alone" not in both
    again = printed(capsys, *rates, "--harvest-tokens-per-second", "5e4", "--reuse", "4")
    assert f"{97_657 * (step + 1024 / 4 / 5e4) / 3600:.2f} h" in again, "a quarter is harvested"


def test_bytes_received_are_those_that_training_counts(capsys):
    found = received(printed(capsys, *EIGHT))
    expected = received_bytes(
        rank=0, size=8, d_in=1536, d_sae=24576, shards=8, lanes=8, tokens=8192, budget=64 * 8192,
        quota=0.4, k_aux=128, aux_runs=False,
    )  # fmt: skip
    assert {n: round(count / 1e6, 2) for n, count in expected.items()} == {
        n: count for n, count in found.items() if n != "together"
    }
    # By hand: of 8,192 tokens of width 1,536, seven eighths in bf16; twice as many bytes in float32.
    assert found["activations"] == 22.02 and found["gradients"] == 44.04
    dead = received(printed(capsys, *EIGHT, "--dead-share", "0.1"))
    assert dead["aux-k"] > 88 > found["aux-k"] and dead["partial sums"] == found["partial sums"]
    one_place = received(printed(capsys, *EIGHT, "--latent-shards", "1"))
    assert one_place.keys() == {"activations", "agreement", "together"}
    assert one_place == received(printed(capsys, *EIGHT, "--matryoshka", "2048", "24576"))
    assert one_place["activations"] == found["activations"]


def test_what_comes_from_other_nodes(capsys):
    """By hand: of partial sums what 8 of 15 send; of the rest, what 8 GPUs share."""
    flags = ("--gpus", "16", "--nodes", "2", "--batch-size", "16384")
    found = received(printed(capsys, *flags))
    sums = found["partial sums"]
    direct, shared = sums * 8 / 15, (found["together"] - sums) / 8
    assert found["from other nodes"] == pytest.approx(direct + shared, abs=0.01)
    each_alone = received(printed(capsys, "--gpus", "4", "--nodes", "4", "--batch-size", "4096"))
    assert each_alone["from other nodes"] == each_alone["together"]
    assert "from other nodes" not in received(printed(capsys, *EIGHT))


def test_nothing_is_received_by_one_gpu(capsys):
    assert printed(capsys) == printed(capsys, "--gpus", "1", "--lanes", "1", "--latent-shards", "1")
    cut = printed(capsys, "--lanes", "8", "--latent-shards", "8")
    assert "8 lanes, 8 latent shards" in cut and "received" not in cut


def test_the_time_of_several_gpus_follows_from_all_rates(capsys):
    flags = ("--gpus", "16", "--nodes", "2", "--batch-size", "16384")
    assert " ms" not in printed(capsys, *flags)
    rates = (
        "--tflops",
        "790",
        "--bandwidth",
        "4.3",
        "--nvlink-gbyte",
        "350",
        "--network-gbit",
        "400",
    )
    rest = ("--harvest-tokens-per-second", "5e4", "--usd-per-hour", "2")
    said = printed(capsys, *flags, *rates, *rest)
    split = plan.Split(16, 16, 16)
    computed = sum(plan.stage_seconds(16384, *RECIPE[1:], RATES, split=split).values())
    megabytes = received(said)
    inside = (megabytes["together"] - megabytes["from other nodes"]) / 350e3
    outside = megabytes["from other nodes"] / 50e3
    times = {n: float(ms) for n, ms in re.findall(r"^  (\S.*?) +([\d.]+) ms", said, re.M)}
    assert times["receive, in the node"] == pytest.approx(1e3 * inside, abs=1e-3)
    assert times["receive, from other nodes"] == pytest.approx(1e3 * outside, abs=1e-3)
    step = computed + inside + outside
    assert times["step"] == pytest.approx(1e3 * step, abs=2e-3)
    hours = 6_104 * (step + 1024 / 5e4) / 3600  # a GPU harvests 1,024 tokens of a step
    assert f"{hours:.2f} h" in said and f"{2 * 2 * hours:.2f} USD" in said, "two machines are paid"


def test_the_table_of_the_page_is_what_it_prints(capsys):
    page = Path(__file__).parents[2] / "docs/distributed.md"
    rows = re.findall(
        r"^\| ([\d,]+) \| (\d+) \| (\d+) \| ([\d,]+) \|(.*)\|$", page.read_text(), re.M
    )
    assert len(rows) > 5
    for F, gpus, nodes, B, told in rows:
        F, B = F.replace(",", ""), B.replace(",", "")
        said = printed(capsys, "--d-sae", F, "--gpus", gpus, "--nodes", nodes, "--batch-size", B)
        state, together = (
            re.search(rf"{name} +([\d.]+)", said)[1] for name in ("training state", "together")
        )
        found = received(said)
        megabytes = [found.get(name, 0.0) for name in ("together", "from other nodes")]
        columns = [state, together, *(f"{each:.1f}" for each in megabytes)]
        assert [cell.strip() for cell in told.split("|")] == columns, (F, gpus, B)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--gpus", "0"), "gpus must be"),
        (("--gpus", "8", "--nodes", "3"), "not as many in each of nodes = 3"),
        (("--gpus", "8", "--lanes", "4"), "lanes = 4 are fewer than gpus = 8"),
        (("--gpus", "2048"), "lanes = 2048 is more than the 1024 tokens"),
        (("--latent-shards", "40000"), "more than the dictionary's 24576 latents"),
        (("--matryoshka", "2048", "24576", "--latent-shards", "2"), "--matryoshka"),
        (("--nvlink-gbyte", "400"), "--nvlink-gbyte is a rate between GPUs"),
        (("--gpus", "8", "--nvlink-gbyte", "400"), "give --gpus"),
        (("--gpus", "8", "--network-gbit", "400"), "--network-gbit is a rate between GPUs"),
        (("--gpus", "8", "--tflops", "1", "--bandwidth", "1"), "predicted from --nvlink-gbyte"),
        (("--k", "0"), "k must be"),
        (("--k", "inf"), "k must be"),
        (("--d-in", "0"), "d_in must be"),
        (("--gib", "-1"), "gib must be"),
        (("--dead-share", "2"), "dead_share"),
        (("--tflops", "100"), "both --tflops and --bandwidth"),
        (("--usd-per-hour", "2"), "give --tflops and --bandwidth too"),
        (("--precision", "fp8"), "fp8"),
    ],
)
def test_impossible_plans(capsys, flags, said):
    assert main(["plan", *flags]) == 2
    told = capsys.readouterr().err
    assert said in told and "planoptions" not in told.lower() and "----" not in told
