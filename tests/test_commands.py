"""Every command that a README, a page, a usage text or the head of a config shows can be typed from the root."""

from __future__ import annotations

import argparse
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import pytest

from common import entry
from common.cli import Parser
from common.errors import UserError
from common.paths import REPOSITORY
from common.training import RunFolder
from tests.programs import TOPS, call, options_of, programs, trainers
from tests.test_workflows import made

PLACE = re.compile(r"^[A-Z][A-Z_0-9]*([./].*)?$|^\.\.\.$")  # FOLDER, WEIGHTS.pth, OUT/x: what the reader puts in
# What programs say of the reader's own files, earlier runs and machine: errors that name what is missing.
LACKING = re.compile(
    "no such (file|folder|stage)|does not exist|file or folder that exists|which is not finished in|"
    "no config.yaml there|datasets cannot open it|does not come with its|this machine has|run `make data-"
)
# What makes a shown command quick, where its program has such an option.
SHRUNK = {"--steps": "2", "--count": "1", "--tokens": "4", "--batch_size": "2", "--images": "24"}
SLOW = (
    "reproduce",
    "fetch_text",
    "build_",
    "benchmarks.",
    "report.",
    "campaign",
    "publish",
    "photos",
    "fashion_mnist",
    "alignment",
    "transfer",
)
TRAINING = (*trainers(), "scenesplat.pretrain", "scenesplat.finetune")


class Parsed(BaseException):
    """Raised in place of what a program does after it has read its command line."""


@functools.cache
def documented() -> tuple[tuple[str, str], ...]:
    """(place, command) of every shown command, each once."""
    found: dict[str, str] = {}
    pages = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")]
    files = [file for top in TOPS for file in (REPOSITORY / top).rglob("*") if "template" not in file.parts]
    for file in sorted({*pages, *(file for file in files if file.suffix in (".md", ".py", ".yaml"))}):
        for command in shown(file.suffix, file.read_text(encoding="utf-8")):
            found.setdefault(command, str(file.relative_to(REPOSITORY)))
    return tuple((place, command) for command, place in sorted(found.items(), key=lambda entry: entry[1]))


def shown(suffix: str, text: str) -> Iterator[str]:
    """The commands in a file: blocks of `bash` in a page, indented lines in a usage text, the head of a config."""
    text = re.sub(r" *\\{1,2}\n\s*", " ", text)
    if suffix == ".md":
        lines = [
            line for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
        ]
    elif suffix == ".yaml":
        head = re.match(r"(#[^\n]*\n)*", text)
        lines = [re.sub(r"(: |, | \().*", "", line.lstrip("# ")) for line in head[0].splitlines()] if head else []
    else:
        usage = re.match(r'"""(.*?)"""', text, re.DOTALL)
        lines = [line for line in usage[1].splitlines() if line.startswith("    ")] if usage else []
    for line in lines:
        command = re.sub(r"\s+#.*", "", line).strip()
        command = command.replace(".venv/bin/", "")
        if re.match(r"(\w+=\S+ )*(python|torchrun|make|less-compute) ", command):
            yield command


def of_program(command: str) -> tuple[str, list[str]] | None:
    """The program that a command starts, with its arguments; None for `make` and for other people's programs."""
    words = shlex.split(command)
    while "=" in words[0]:
        words = words[1:]
    if words[0] == "less-compute":
        found = entry.chosen(words[1:])
        return None if isinstance(found, str) else found
    if words[0] == "python" and words[1] == "-m":
        module = words[2] if (REPOSITORY / f"{words[2].replace('.', '/')}.py").is_file() else f"{words[2]}.__main__"
        return (module, words[3:]) if words[2].split(".")[0] in TOPS else None
    scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
    if words[0] not in ("python", "torchrun") or not scripts:
        return None
    script, given = Path(words[scripts[0]]), words[scripts[0] + 1 :]
    return ".".join(script.with_suffix("").parts), given[:-1] if given[-1:] == ["..."] else given  # and so on


def commands() -> list[Any]:
    return [pytest.param(command, id=f"{place}: {command[:80]}") for place, command in documented()]


def test_commands_are_found_in_pages_usage_texts_and_configs() -> None:
    places = {Path(place).suffix for place, _ in documented()}
    assert places == {".md", ".py", ".yaml"} and len(documented()) > 60
    assert [*shown(".md", "x\n```bash\nmake a  # b\npython x.py \\\n  --y\n```\n")] == ["make a", "python x.py --y"]
    assert of_program("A=1 python ldm/plan.py --json") == ("ldm.plan", ["--json"])
    assert of_program("less-compute ldm plan --json") == ("ldm.plan", ["--json"])
    assert [*shown(".md", "```bash\n.venv/bin/python ldm/plan.py\n```")] == ["python ldm/plan.py"]
    assert of_program("torchrun --nnodes 2 ... ldm/train.py --seed 1") == ("ldm.train", ["--seed", "1"])
    assert of_program("python -m benchmarks.acceleration --list") == ("benchmarks.acceleration.__main__", ["--list"])


@pytest.mark.parametrize("command", commands())
def test_a_shown_command_can_be_typed_from_the_root(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    if command.startswith("make "):
        paper = re.sub(r"<paper>|my_paper|PAPER", "ldm", command)
        assert made(paper), command
        return
    if (found := of_program(command)) is None:
        return
    program, arguments = found
    assert program in programs(), f"{command}: no such program below the root"
    for word in arguments:
        path = word.partition("=")[2] or word
        if path.split("/")[0] in TOPS and "/" in path:
            assert Path(path).exists(), f"{command}: {path} does not exist"

    def parse(parser: Parser, *given: Any, **more: Any) -> Any:
        if rest := (found := argparse.ArgumentParser.parse_known_args(parser, *given, **more))[1]:
            return found if program == "pc_darts.evaluate" else parser.error(f"unrecognized arguments: {rest[0]}")
        raise Parsed

    def stop(*_: Any, **__: Any) -> None:
        raise Parsed

    monkeypatch.setattr(Parser, "parse_known_args", parse)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr(jsonargparse.ArgumentParser, "instantiate_classes", stop)
    own = str(REPOSITORY / program.partition(".")[0] / "configs" / "smoke.yaml")
    given = [own if word == "my.yaml" else word for word in arguments]
    with pytest.raises(Parsed):
        call(program, given)


def shrinking(program: str, folder: Path) -> Iterator[str]:
    """Options that make a program quick, and what it writes land in `folder`."""
    names = {name: action for action, _ in options_of(program) for name in action.option_strings}
    made_in = {"--out": "x.png", "--output": "x.json", "--save": "model", "--save_latents": "x.safetensors"}
    wanted = SHRUNK | {name: str(folder / file) for name, file in made_in.items()}
    for name, value in wanted.items():
        if name in names and names[name].nargs != 0:
            yield from (name, value)


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_a_shown_command_runs_when_it_is_shrunk(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = None if command.startswith("make ") else of_program(command)
    if found is None or any(PLACE.match(word.strip("[]'")) for word in found[1]) or "runs/" in command:
        pytest.skip("it names what only the reader has")
    program, arguments = found
    if any(part in program for part in SLOW):
        pytest.skip("its shrunk form is a test of its own")
    monkeypatch.chdir(REPOSITORY)
    try:
        if program in TRAINING:
            monkeypatch.setattr(RunFolder, "begin", lambda *_: (_ for _ in ()).throw(Parsed()))
            with pytest.raises(Parsed):
                call(program, [*arguments, "--run_dir", str(tmp_path / "run")])
            assert not (tmp_path / "run").exists()
        else:
            call(program, [*arguments, *shrinking(program, tmp_path)])
    except UserError as error:
        if not LACKING.search(str(error)):
            raise
        pytest.skip(f"only the reader has it: {error}")
