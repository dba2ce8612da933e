"""Every page says what is so: its snippets run, its commands exist, its links lead somewhere.

Python blocks of a page run in order in one namespace, bash blocks of all pages in order in one folder,
with small stand-ins for what a page takes for granted (``batches``, ``my-model``, ``text.txt``). A block
after ``<!-- not run: reason -->`` is not run; its commands are still read by the real parser.
"""

import json
import re
import shutil
import tomllib
from fnmatch import fnmatch
from itertools import pairwise, takewhile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import models
import pages
import pytest
import torch
import tyro
from pages import PAGES, ROOT, Block
from torch.distributed.run import get_args_parser

import fastsae
import fastsae_kernels
from fastsae.cli import main

IDS = [str(page.relative_to(ROOT)) for page in PAGES]
TOOLS = {"git", "pre-commit", "pyright", "ruff", ".ci/run"}
SMALL = {
    "train": (
        "--d-sae", "128", "--tokens", "512", "--batch-size", "64", "--context-length", "32",
        "--harvest-batch", "4", "--pool-tokens", "512", "--eval-tokens", "128",
        "--log-every-tokens", "256",
        "--device", "cpu", "--wandb", "disabled",
    ),
    "evaluate": ("--device", "cpu"),
    "contrast": ("--device", "cpu"),
    "export": ("--device", "cpu", "--tokens", "256"),
}  # fmt: skip
"""Flags given after those of a page, so that its command runs in seconds."""


# --- what the pages take for granted ---


def put_stand_ins(folder: Path) -> None:
    """A language model of 20 layers, and text of the kinds that the pages name."""
    shutil.copytree(models.llama(20), folder / "my-model")
    shutil.copytree(models.llama(20), folder / "my-chat-model")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
    (folder / "my-chat-model/chat_template.jinja").write_text(template)
    documents = [page for _, page in sorted(topics.items())]
    chats = [
        [{"role": "user", "content": page[:80]}, {"role": "assistant", "content": page[80:2000]}]
        for page in documents[:20]
    ]
    lines = [json.dumps({"messages": chat}) for chat in chats]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "text.txt").write_text("\n".join(documents[:30]), encoding="utf-8")
    for name, part in {
        "more.jsonl": documents[30:40],
        "held-out.jsonl": documents[40:50],
        "a.jsonl": [f"Is this the question number {i}?" for i in range(12)],
        "b.jsonl": [f"Statement {i} comes here." for i in range(12)],
    }.items():
        lines = [json.dumps({"text": document}) for document in part]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def namespace() -> dict[str, object]:
    """``batches`` of activations, ``x`` that was not trained on, and an ``sae`` of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2816, 16, generator=generator) @ torch.randn(16, 64, generator=generator) + 1
    batches = list(x[:2560].split(256))
    config = fastsae.TrainConfig(d_sae=256, k=8, lr=1e-3, tokens=2560)
    sae = fastsae.train(batches, config)
    sae.metadata["hook_name"] = "model.layers.10"
    return {"batches": batches, "x": x[2560:], "sae": sae}


# --- snippets ---


WITH_PYTHON = [page for page in PAGES if pages.blocks(page, "python")]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=page.name,
            marks=[pytest.mark.slow] if page.name in ("guide.md", "sharing.md") else [],
        )
        for page in WITH_PYTHON
    ],
)
def test_the_snippets_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put_stand_ins(tmp_path)
    names = namespace()
    for block in pages.blocks(page, "python"):
        # Padded, so that a traceback names the line of the page.
        code = compile("\n" * block.line + block.body, str(page), "exec")
        if block.reason is None:
            exec(code, names)


def test_the_snippets_of_the_kernels_page_run() -> None:
    """One step: the first block encodes and selects, the second, on optimizer states, updates."""
    page = ROOT / "kernels/README.md"
    first, second = pages.blocks(page, "python")
    B, D, F, k = 32, 64, 256, 8
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(F, D, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    names: dict[str, Any] = {
        "B": B, "D": D, "F": F, "k": k, "x": torch.randn(B, D, generator=generator),
        "W_enc": rows.T, "b_enc": torch.zeros(F), "b_dec": torch.zeros(D),
    }  # fmt: skip
    exec(compile(first.body, str(page), "exec"), names)
    assert (names["z"] > 0).sum() == k * B
    exec("from fastsae_kernels import *", names)
    names |= {
        "W_enc": fastsae_kernels.MatrixState.start(rows.clone()),
        "W_dec": fastsae_kernels.MatrixState.start(rows.clone()),
        "b_enc": fastsae_kernels.BiasState.start(names["b_enc"]),
        "b_dec": fastsae_kernels.BiasState.start(names["b_dec"]),
        "lr": torch.tensor(1e-3), "step": torch.tensor(1),
    }  # fmt: skip
    exec(compile(second.body, str(page), "exec"), names)
    updated = names["W_dec"].weight
    assert not torch.equal(updated, rows)
    assert (updated.norm(dim=1) - 1).abs().max() < 1e-5


def test_the_front_page_is_six_lines_of_python() -> None:
    (block,) = pages.blocks(ROOT / "README.md", "python")
    assert len([line for line in block.body.splitlines() if line.strip()]) <= 6


# --- commands ---


class Parsed(BaseException):
    """Raised in the place of running a command that was understood."""


def fastsae_arguments(words: list[str]) -> list[str] | None:
    """What a command gives to ``fastsae``, in each process of torchrun's too; None if it is another program's."""
    if "torchrun" in words:  # behind variables and a launcher
        given = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
        words = ["python", given.training_script, *given.training_script_args]
    if words[0] == "fastsae":
        return words[1:]
    if words[0].startswith("python") or words[0].endswith("/python"):
        if words[1] == "train.py":
            return ["train", *words[2:]]
        if words[1:3] == ["-m", "fastsae"]:
            return words[3:]
    return None


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless the command is one that exists, with arguments that it takes."""
    arguments = fastsae_arguments(words)
    if arguments is not None:
        cli = tyro.cli

        def parse_alone(*args, **kwargs):
            raise Parsed(cli(*args, **kwargs))

        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(tyro, "cli", parse_alone)
            code = main(["--help"] if arguments[0] == "COMMAND" else arguments)
            pytest.fail(f"{' '.join(words)}: exit code {code}")
        return
    program = words[0].removeprefix(".venv/bin/")
    if program.startswith("python") and words[1] == "-m":
        program, words = words[2], words[2:]
    if program == "venv":
        return
    if program == "pip":
        check_install(words)
    elif program == "pytest":
        source = (ROOT / "benchmarks/conftest.py").read_text(encoding="utf-8")
        known = {"-q", "-n", "-m"} | pages.flags(source)
        assert {word for word in words if word.startswith("-")} <= known, words
        paths = takewhile(lambda word: not word.startswith("-"), words[1:])
        assert all((ROOT / path).exists() for path in paths), words
    elif program.startswith("python"):
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        assert pages.flags(" ".join(words)) <= pages.flags(source), words
    else:
        assert program in TOOLS, f"{' '.join(words)}: no test knows how to check this"


def check_install(words: list[str]) -> None:
    """``pip install`` of what pyproject.toml and constraints.txt have; never of ``fastsae``."""
    assert words[1] == "install" and "fastsae" not in words, words
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for before, word in pairwise(words):
        if before == "-c":
            assert (ROOT / word).is_file(), word
        if before == "-e":
            extras = re.fullmatch(r"\.\[([\w,]+)\]", word)
            assert extras and set(extras[1].split(",")) <= set(optional), word


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_the_commands_of_a_page_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in pages.blocks(page):
        assert block.language in ("python", "bash"), f"{page.name}:{block.line}"
        if block.language == "bash":
            for words in block.commands:
                check(words, monkeypatch)


def test_a_command_that_does_not_exist_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (
        "fastsae train --layers 3",
        "fastsae train --k many",
        "fastsae export runs/first --sae-vis elsewhere",
        "python -m fastsae evaluate",
        "python benchmarks/quality.py --sizes 3",
        "pip install -c constraints.txt fastsae",
        'pip install -e ".[gpu]"',
        "pytest tests/no_such_file.py",
        "make",
        "torchrun --standalone train.py --layers 3",
        "srun torchrun --processes 2 train.py --demo",
    ):
        (words,) = Block("bash", wrong, None, 1).commands
        with pytest.raises((AssertionError, pytest.fail.Exception, OSError, SystemExit)):
            check(words, monkeypatch)


@pytest.mark.slow
def test_the_commands_of_the_pages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put_stand_ins(tmp_path)
    for page in PAGES:
        for block in pages.blocks(page, "bash"):
            for words in block.commands if block.reason is None else []:
                arguments = fastsae_arguments(words)
                where = f"{page.name}:{block.line}: {' '.join(words)}"
                assert arguments is not None, f"{where}: give a reason why it is not run"
                small = SMALL.get(arguments[0], ())
                if arguments[0] == "evaluate" and "--text-files" in arguments:
                    small = ("--tokens", "256", *small)  # a run has few held-out tokens of its own
                if "--matryoshka" in arguments:  # which ends where the dictionary does
                    small = (*small, "--matryoshka", "16", "128")
                assert main([*arguments, *small]) == 0, where
    # What later readers look for is there, and has the names that the pages give it.
    metrics = (tmp_path / "runs/first/metrics.jsonl").read_text().splitlines()
    found = json.loads(metrics[-1])
    _, _, table = (ROOT / "docs/sharing.md").read_text().partition("## What the metrics mean")
    named = [name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in row.split(", ")]
    assert len(named) > 10
    for name in named:
        assert any(fnmatch(key, name.strip("`")) for key in found), f"{name} is no metric"
    _, _, table = (ROOT / "docs/guide.md").read_text().partition("| file | what it is |")
    files = re.findall(r"`([\w.]+/?)`", " ".join(re.findall(r"^\| (`.*?) \|", table, re.M)[:6]))
    assert len(files) > 8
    for name in files:
        assert (tmp_path / "runs/first" / name).exists(), f"{name} is not written"


# --- what is said of flags and links ---


@pytest.fixture(scope="module")
def known_flags() -> dict[str, set[str]]:
    """The flags of each command, read off its own help."""
    found = {}
    for command in ("train", "evaluate", "contrast", "export", "compare", "plan"):
        with pytest.MonkeyPatch.context() as patch:
            lines: list[str] = []
            patch.setattr("sys.stdout.write", lines.append)
            patch.setenv("COLUMNS", "400")
            with pytest.raises(SystemExit):
                main([command, "--help"])
        found[command] = pages.flags("".join(lines)) - {"--help"}
    return found


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_the_flags_that_a_page_names_exist(page: Path, known_flags: dict[str, set[str]]) -> None:
    known = set().union(*known_flags.values()) | {"--help"}
    for code in pages.inline_code(page):
        words = code.split()
        if words[0].startswith("--") or fastsae_arguments([*words, ""]) is not None:
            assert pages.flags(code) <= known, f"`{code}`"


def test_the_guide_names_every_flag_of_training(known_flags: dict[str, set[str]]) -> None:
    named = pages.flags((ROOT / "docs/guide.md").read_text(encoding="utf-8"))
    positive = {flag for flag in known_flags["train"] if not flag.startswith("--no-")}
    assert len(positive) > 40 and positive <= named, sorted(positive - named)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "kernels/README.md"], ids=[*IDS, "kernels"])
def test_links_lead_somewhere(page: Path) -> None:
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in pages.anchors(target), f"{page.name}: {link}"


def test_every_page_is_on_the_front_page_and_tested() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in pages.links(ROOT / "README.md")}
    for page in (ROOT / "docs").glob("*.md"):
        assert page in linked and page in PAGES, page.name


def test_the_front_page_is_short_and_installs_no_stranger() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for page in PAGES:
        assert "pip install fastsae" not in page.read_text(encoding="utf-8"), page.name


def test_the_front_page_gives_the_commands_that_ci_runs() -> None:
    """`.ci/run` installs into the same virtual environment and gives the same two commands."""
    given = " ".join(" ".join(b.body.split()) for b in pages.blocks(ROOT / "README.md", "bash"))
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for part in ('.venv/bin/pip install -q', '-c constraints.txt -e ".[demo,test]"',
                 ".venv/bin/python -m pytest -q -n auto"):  # fmt: skip
        assert part in given and part.replace("-q -c", "-qq -c") in ci.replace("-qq", "-q"), part
    assert "train.py --demo" in given and "train.py --demo" in (ROOT / ".ci/demo").read_text()
