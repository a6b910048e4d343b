"""What is typed on a command line arrives as it was typed, and a printed command can be typed again."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import etude
from etude import console, train_with_config
from etude.chat import changed
from etude.cli import app
from etude.config.loading import (
    check_config,
    key_paths,
    load_config,
    parse_override,
    to_yaml,
    value_at,
)
from etude.config.schema import Config
from etude.config.yaml import parse_yaml
from etude.errors import UserError, command
from etude.runs import opening
from etude.runs.card import model_card
from etude.runs.folder import CONFIG, begin_run, how_to_continue

ROOT = Path(__file__).parent.parent


def invoke(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result


TEXT_KEYS = (
    "model.name", "model.revision", "model.chat_template", "dataset.train", "dataset.validation",
    "dataset.test", "dataset.instruction", "dataset.system_prompt", "output.dir",
)  # fmt: skip


def test_the_keys_that_take_text_are_those_of_the_schema():
    values = {key: next(iter(parse_override(f"{key}=[1]").values.values())) for key in key_paths()}
    text = {key for key, value in values.items() if "[1]" in value.values()}
    assert text == set(TEXT_KEYS)  # numbers, lists, mappings and choices stay YAML


@settings(max_examples=150)
@given(st.sampled_from(TEXT_KEYS), st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@example("dataset.system_prompt", "You are agent #1")
@example("dataset.system_prompt", "Note: be brief")
@example("dataset.system_prompt", "\"quoted\" and 'quoted'")
@example("dataset.system_prompt", " spaces \n\n around, and lines\t")
@example("dataset.system_prompt", "[1, 2")
@example("dataset.system_prompt", "~")
@example("dataset.train", "/tmp/x: y#1.csv")
@example("output.dir", "runs/a#b=c")
@example("model.revision", "1e5")
@example("model.name", "null")
@example("dataset.system_prompt", "\x85\u2028\ufeff\x1b")
def test_text_arrives_unchanged_and_survives_the_runs_own_config(key, text):
    text = text.replace("\0", "")
    if key == "dataset.instruction":
        text += "{labels}{text}"
    if not text or (text == "null" and key not in ("model.name", "output.dir")):
        return
    loaded = load_config(None, overrides=[f"{key}={text}"])
    assert value_at(loaded, key) == text
    layer = parse_yaml(to_yaml(loaded), "config.yml")
    assert check_config(layer.values, layer.origin) == loaded


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("dataset.system_prompt=null", None),
        ("dataset.system_prompt=", None),
        ("dataset.system_prompt=Null", "Null"),
        ("model.quantization=null", None),
        ("model.quantization=int8", "int8"),
        ("output.dir=null", "null"),  # it cannot be null, so null is a name
        ("lora.r=16", 16),
        ("training.max_steps=null", None),
        ("training.compile=true", True),
        ("training.compile=auto", "auto"),
        ("lora.target_modules=[q_proj, 'k # proj']", ["q_proj", "k # proj"]),
        ("dataset.labels=[yes, no]", ["yes", "no"]),
        ("dataset.columns={text: review}", {"text": "review"}),
    ],
)
def test_null_and_what_is_no_text(setting, value):
    loaded = load_config(None, overrides=[setting])
    assert value_at(loaded, setting.partition("=")[0]) == value


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("dataset.system_promt=Note: be brief", "did you mean dataset.system_prompt?"),
        ("lora.r=16\n w: 3", "not valid YAML"),
        ("lora.r=16\nmodel: {name: x}", "not valid YAML"),
        ("lora.target_modules=[a", "not valid YAML"),
        ("dataset.train=a\ud800.csv", "half a character"),
    ],
)
def test_what_is_no_value_is_refused(setting, words):
    with pytest.raises(UserError, match=words):
        load_config(None, overrides=[setting])


def test_set_in_a_chat_takes_numbers_as_before():
    generation = Config().generation
    assert changed(generation, "temperature", "0.5").temperature == 0.5
    assert changed(generation, "seed", "null").seed is None
    for value in ("warm", "0.5\n v: 2", "0.5: 1"):
        with pytest.raises(UserError):
            changed(generation, "temperature", value)


# --- names -----------------------------------------------------------------------------------


def test_a_name_with_an_equals_sign_is_no_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("lr=1e-3", "v1.0=x", "runs/lr=1e-3", "runs/r=8", "lora.r=16"):
        Path(name).mkdir(parents=True)
    split = console.split_arguments
    for name in (
        "lr=1e-3", "v1.0=x", "runs/lr=1e-3", "runs/not/there=1", "./lora.r=16", "~/a=b",
        str(tmp_path / "lr=1e-3"), "plain", "my run",
    ):  # fmt: skip
        # ~ stands for the home as in a shell that leaves it alone.
        assert split([name, "lora.r=8"]) == (os.path.expanduser(name), ["lora.r=8"])
    # A key of the schema is a setting, whatever there is of that name, and so is a slip in one.
    for setting in (
        "lora.r=16",
        "lora.rr=16",
        "dataset.train=/tmp/a=b",
        "lorra.r=16",
        " lora.r =1",
    ):
        assert split([setting, "plain"]) == ("plain", [setting])
    for argument, words in (
        ("r=8", r"neither a file or folder here nor a setting.*did you mean lora\.r\?"),
        ("seed=7", r"training\.seed or generation\.seed"),
        ("dataset=x", "section.key=value"),
        ("x" * 5000 + "=1", "neither"),
    ):
        with pytest.raises(UserError, match=words):
            parse_override(split([argument])[1][0])
    with pytest.raises(UserError, match=r"one name is expected, not 2 \(runs/r=8, plain\)"):
        split(["runs/r=8", "plain"])
    # Too long for any file system, and a setting all the same.
    assert split(["dataset.system_prompt=" + "x" * 100_000])[0] is None


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=150)
@given(st.lists(NAMES, min_size=1, max_size=2))
@example(["my run lr=1e-3 'x'"])
@example(["a;b $(c) `d` #e"])
@example(["runs", "lr=1e-3"])
@example(["plain"])
@example(["."])
def test_a_printed_command_is_read_as_what_was_meant(parts):
    assume(not parts[0].startswith("-") and "=" not in parts[0])  # would be an option, a setting
    folder = Path(*parts)
    program, verb, name, option = shlex.split(command("etude", "evaluate", folder, "--base"))
    assert (program, verb, option) == ("etude", "evaluate", "--base")
    found, overrides = console.split_arguments([name])
    assert Path(str(found)) == folder and overrides == [] and not name.startswith("-")


def test_every_printed_command_of_a_run_with_an_awkward_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = Path("lr=1e-3 'x' #2")
    config = Config().model_copy(
        update={"output": Config().output.model_copy(update={"dir": str(folder)})}
    )
    (folder / "checkpoints").mkdir(parents=True)
    begin_run(folder, {})
    (folder / CONFIG).write_text(to_yaml(config))

    def taken(line):
        program, verb, *words = shlex.split(line)
        assert program == "etude"
        words = [word for word in words if not word.startswith("--")]
        name, overrides = console.split_arguments(words)
        for setting in overrides:
            assert load_config(None, overrides=[setting]).output.dir in (str(folder), "runs/again")
        return verb, Path(str(name))

    without = how_to_continue(folder)
    assert "--resume" not in without
    assert taken(without.partition(": ")[2]) == ("train", folder / "config.yml")
    (folder / "checkpoints" / "checkpoint-3").mkdir()
    with_one = how_to_continue(folder)
    assert "--resume" in with_one
    assert taken(with_one.partition(": ")[2]) == ("train", folder / "config.yml")
    with pytest.raises(UserError, match="has no adapter yet") as refusal:
        opening.open_config(str(folder), [])
    assert with_one in str(refusal.value)

    train_with_config.show_end(config, {"steps": 1, "seconds": 1.0, "eval_loss": None})
    printed = [line[10:] for line in capsys.readouterr().out.splitlines()[1:]]
    assert [taken(line) for line in printed] == [("evaluate", folder), ("chat", folder)]

    manifest = {
        "results": {"steps": 1},
        "data": {"train": {"kept": 1, "format": "text"}},
        "base": {"identity": "sha256:0"},
        "environment": {"etude": "0"},
    }
    card = model_card(config, manifest, "1 parameter")
    commands = [part for part in card.split("`") if part.startswith("etude ")]
    assert [taken(line)[0] for line in commands] == ["chat", "evaluate", "train"]


def test_text_with_colons_is_printed_as_it_is(capsys):
    console.say("response", "a :smile: [bold] b")  # Rich would make a picture of it
    assert ":smile: [bold] b" in capsys.readouterr().out


# --- version, help, schema --------------------------------------------------------------------


def test_the_version_is_printed():
    assert invoke("--version").stdout == f"etude {etude.__version__}\n"


def test_every_command_shows_examples():
    names = [info.callback.__name__ for info in app.registered_commands]
    assert len(names) == 10
    for name in ["", *names]:
        shown = invoke(*filter(None, [name]), "--help").stdout
        assert "Examples:" in shown or name == "schema", name


def test_a_shell_completes_the_commands():
    command = [str(Path(sys.executable).parent / "etude")]
    words = {"_ETUDE_COMPLETE": "complete_bash", "COMP_WORDS": "etude va", "COMP_CWORD": "1"}
    done = subprocess.run(command, env={**os.environ, **words}, capture_output=True, text=True)
    assert done.stdout.split() == ["validate"]


def test_the_schema_is_that_of_config_yml():
    text = invoke("schema").stdout
    assert (ROOT / "config.schema.json").read_text() == text
    schema = json.loads(text)
    sections = {
        name: schema["$defs"][part["$ref"].rsplit("/", 1)[1]]
        for name, part in schema["properties"].items()
    }
    keys = [f"{name}.{key}" for name, section in sections.items() for key in section["properties"]]
    assert keys == list(key_paths())
    for name, section in sections.items():
        assert section["additionalProperties"] is False
        for key, field in section["properties"].items():
            assert field["default"] == json.loads(json.dumps(value_at(Config(), f"{name}.{key}")))
            assert field["description"]
    assert sections["training"]["properties"]["lr_scheduler"]["enum"] == [
        "linear",
        "cosine",
        "constant",
    ]


def test_init_writes_the_repositorys_files_and_replaces_neither(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invoke("init")
    for name in ("config.yml", "config.schema.json"):
        assert Path(name).read_text() == (ROOT / name).read_text()
    assert (
        Path("config.yml")
        .read_text()
        .startswith("# yaml-language-server: $schema=config.schema.json\n")
    )
    Path("config.schema.json").write_text("mine")
    invoke("init", "other.yml")
    assert Path("config.schema.json").read_text() == "mine"
