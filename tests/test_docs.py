"""README, docs/ and PROJECT_FLOW are checked against the code: what they name and quote exists."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main

import etude
from etude import chat, cli, evaluation, train_with_config
from etude.config.loading import check_config, key_paths, load_config, to_yaml, value_at
from etude.config.schema import Config, Dataset
from etude.config.yaml import parse_yaml
from etude.errors import UserError

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "etude"
FLOW = "PROJECT_FLOW.md"
PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
NAMES = ["README.md", *PAGES, FLOW]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
GUIDE = "\n".join(TEXTS[name] for name in NAMES if name != FLOW)  # what a user reads
KEYS = TEXTS["docs/keys.md"]
CODE = {
    path.relative_to(SOURCE).with_suffix("").as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(SOURCE.rglob("*.py"))
}
FILES = {f"{Path(name).name}.py" for name in CODE}
MODULES = {"train_with_config": train_with_config.train, "evaluation": evaluation.evaluate,
           "chat": chat.chat}  # fmt: skip

# What a document may name although it is in no checkout: what a run holds, and a reader's files.
RUN_FILES = {
    "adapter_model.safetensors", "adapter_config.json", "manifest.json", "proof.json", "started.json", "metrics.jsonl",
    ".etude-lock", "loss.png", "checkpoints/", "evaluation/", "report.md", "report.json", "predictions.jsonl",
    "confusion-*.png", "export.json",
}  # fmt: skip
READERS_FILES = {
    "my.yml", "mine.yml", "reviews.csv", "./merged", ".venv/bin/activate", "rows.jsonl",
    "generation_config.json", "chat_template.jinja",
}  # fmt: skip
SUFFIXES = ("py", "yml", "yaml", "md", "json", "jsonl", "csv", "parquet", "png", "safetensors",
            "toml", "lock", "sh", "jinja")  # fmt: skip
DIAGRAMS = ("flowchart ", "sequenceDiagram", "stateDiagram-v2", "classDiagram", "graph ")


def blocks(text, language):
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def prose(text):
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def spans(text):
    """What is in backticks outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def commands(text):
    """Every command line of Etude, in bash blocks and in backticks, as words."""
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()] + spans(text)
    for line in lines:
        line = line.rpartition(" | ")[2]
        if re.match(r"etude [a-z]|python -m etude", line):
            yield shlex.split(line, comments=True)


def options(command):
    """The option names of a click command, and whether each takes a value."""
    return {
        name: not option.is_flag
        for option in command.params
        if option.param_type_name == "option"
        for name in [*option.opts, *option.secondary_opts]
    }


SUBCOMMANDS = typer.main.get_command(cli.app).commands


def module_command(name):
    app = typer.Typer()
    app.command()(MODULES[name])
    return typer.main.get_command(app)


def table(text, head):
    """The rows of the tables whose head is `head`, cells split, one list a table."""
    found = []
    for body in re.findall(rf"^{re.escape(head)}\n\| ?-.*\n((?:\|.*\n)+)", text, re.M):
        found.append(
            [[c.strip() for c in line.strip("|").split(" | ")] for line in body.splitlines()]
        )
    return found


def overrides(text):
    """Every section.key in backticks, with its value if one is given (`a.b=c`, `a.b: c`)."""
    sections = "|".join(Config.model_fields)
    for span in spans(text):
        match = re.fullmatch(rf"'?((?:{sections})\.(\w+))(?:(?:=|: )(.*?))?'?", span)
        if match and match[2] not in SUFFIXES:
            yield match[1], match[3]


def test_the_version_is_the_same_in_both_its_places():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert etude.__version__ == project["version"]


# --- commands --------------------------------------------------------------------------------


def check_command(words):
    """A command line runs a program that exists, with options, presets and settings that exist."""
    if words[:3] == ["python", "-m", "etude"]:
        words = words[2:]
    if words[0] == "python":
        module = words[2].removeprefix("etude.")
        assert module in CODE, words
        if module == "main":
            assert words[3:] == []
            return
        command, rest = module_command(module), words[3:]
    else:
        assert words[1] in SUBCOMMANDS, words
        command, rest = SUBCOMMANDS[words[1]], words[2:]
    known = options(command) | {"--help": False}
    presets, settings, skip = [], [], False
    for at, word in enumerate(rest):
        if skip:
            skip = False
            continue
        if word.startswith("--"):
            assert word in known, f"{word} in {' '.join(words)}"
            skip = known[word] and at + 1 < len(rest)
            if word == "--preset":
                presets.append(rest[at + 1])
        elif "=" in word:
            settings.append(word)
    load_config(None, presets, settings)


def test_commands_exist_with_their_options_presets_and_settings():
    found = list(commands(GUIDE)) + list(commands(TEXTS[FLOW]))
    assert len(found) > 40
    for words in found:
        check_command(words)


def test_the_guide_shows_every_program():
    lines = commands(GUIDE)
    shown = {tuple(words[::2][:2] if words[0] == "python" else words[:2]) for words in lines}
    assert {("etude", name) for name in SUBCOMMANDS} - {("etude", "version")} <= shown
    assert {("python", f"etude.{name}") for name in [*MODULES, "main"]} <= shown


def test_options_by_themselves_exist():
    known = {option for command in SUBCOMMANDS.values() for option in options(command)}
    found = {span.split()[0] for span in spans(GUIDE + TEXTS[FLOW]) if span.startswith("--")}
    assert len(found) > 5
    assert found <= known


def test_presets_exist_and_all_are_named():
    there = {path.stem for path in (SOURCE / "config" / "presets").glob("*.yml")}
    assert len(there) >= 4
    (rows,) = table(KEYS, "| preset | what it is for |")
    assert {name.strip("`") for name, _ in rows} == there
    named = re.findall(r"--preset (\w+)", GUIDE)
    assert named
    assert set(named) <= there


@pytest.mark.parametrize("line", ["etude tune", "etude train --fast", "python -m etude.tune",
                                  "etude train --preset no", "etude train lora.rank=1"])  # fmt: skip
def test_a_wrong_command_is_seen(line):
    with pytest.raises((AssertionError, UserError)):
        check_command(shlex.split(line))


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"train", "test"} <= targets
    lines = "\n".join(blocks(GUIDE, "bash")).splitlines() + spans(GUIDE)
    named = {m[1] for line in lines if (m := re.match(r"make ([a-z]+)", line))}
    assert {"train", "test", "install"} <= named <= targets


# --- keys and values -------------------------------------------------------------------------


def test_keys_exist_and_take_the_values_shown():
    found = list(overrides(GUIDE))
    assert len(found) > 100
    assert any(value for _, value in found)
    for key, value in found + list(overrides(TEXTS[FLOW])):
        assert key in set(key_paths())
        if value:
            load_config(None, overrides=[f"{key}={value}"])
    (block,) = blocks(GUIDE, "yaml")
    check_config(parse_yaml(block, "README.md").values, {})


def of_key(cell):
    (key,) = re.findall(r"^`([\w.]+)`$", cell)
    return key


def meant(key, text):
    """The value that a text means for a key, read as the command line reads it, line breaks escaped."""
    text = text.replace(r"\n", "\n").strip('"')
    return value_at(load_config(None, overrides=[f"{key}={text}"]), key)


def test_the_tables_of_keys_have_every_key_in_order_with_the_schemas_default():
    rows = [row for rows in table(KEYS, "| key | default | impact |") for row in rows]
    assert [of_key(cell) for cell, _, _ in rows] == list(key_paths())
    for cell, default, impact in rows:
        key = of_key(cell)
        assert meant(key, default.strip("`")) == value_at(Config(), key), key
        assert impact


def test_the_machine_tables_say_what_the_presets_set():
    tables = table(KEYS, "| key | value | why |")
    assert len(tables) == 2
    for preset, rows in zip(("cpu", "gpu"), tables, strict=True):
        settings = load_config(None, [preset])
        assert len(rows) == 4
        for cell, value, reason in rows:
            key, shown = of_key(cell), re.findall(r"`([^`]+)`", value)
            values = [meant(key, text) for text in shown]
            assert min(values) <= value_at(settings, key) <= max(values), key
            assert reason


def test_config_yml_is_what_the_schema_writes():
    written = (ROOT / "config.yml").read_text(encoding="utf-8")
    assert written == cli.MODELINE + to_yaml(Config())
    assert written.count("\n") > 50


def test_the_share_of_trained_parameters_is_right():
    # Qwen2-1.5B: 28 layers, hidden 1536, keys and values 256 wide, 1,543,714,304 parameters.
    lora = Config().lora
    assert lora.target_modules == ["q_proj", "v_proj"]
    trained = 28 * lora.r * ((1536 + 1536) + (1536 + 256))
    total = 1_543_714_304 + trained
    sentence = (
        f"With r={lora.r} on q_proj and v_proj, {trained:,} of {total:,} parameters of Qwen2-1.5B "
        f"train: {trained / total:.2%}".replace("%", " %")
    )
    assert sentence in KEYS


def test_every_data_format_has_an_example_that_is_read(tmp_path):
    from etude.data import dataset, formats

    (rows,) = table(TEXTS["docs/data.md"], "| format | one row |")
    assert {of_key(cell) for cell, _ in rows} == set(formats.FORMATS)
    for cell, row in rows:
        file = tmp_path / f"{of_key(cell)}.jsonl"
        # A second label, for a classification needs two.
        other = row.strip("`").replace("positive", "negative")
        file.write_text(f"{row.strip('`')}\n{other}\n", encoding="utf-8")
        assert dataset.read(str(file), Dataset()).format == of_key(cell)


# --- files and functions ---------------------------------------------------------------------


def exists(name):
    """Whether a name is a file or folder here, in src/etude or its presets, or in a run."""
    if name in READERS_FILES or name.startswith(("runs/", "exports/", "./exports/")):
        return True
    if name in RUN_FILES:
        # Files of a run: the code names each of them.
        return any(name.rstrip("/").partition("*")[0] in text for text in CODE.values())
    folders = (ROOT, SOURCE, SOURCE / "config" / "presets")
    return any((folder / name).exists() for folder in folders) or name in FILES


def file_names(text):
    """Words in backticks that look like a file or a folder of ours."""
    for span in spans(text):
        for word in span.split():
            word = word.strip("'\"(),;").partition("=")[2] or word.strip("'\"(),;")
            hub_or_home = re.fullmatch(r"(Qwen|owner)/.*|~.*|/\w+|\.\w+|https?:.*|p/d", word)
            looks = "/" in word or re.search(rf"\w\.({'|'.join(SUFFIXES)})$", word)
            if looks and not hub_or_home and not re.search(r"[<>{}|]", word):
                yield word


@pytest.mark.parametrize("name", NAMES)
def test_files_named_exist(name):
    found = set(file_names(TEXTS[name]))
    assert found or name in PAGES
    assert [word for word in found if not exists(word)] == []
    assert not exists("src/etude/tune.py") and not exists("tune.yml")


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", [*NAMES, "CONTRIBUTING.md"])
def test_relative_links_lead_somewhere(name):
    page = ROOT / name
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8")))
    assert links or name == "CONTRIBUTING.md" or name in PAGES
    for link in links:
        if not link.startswith(("http:", "https:")):
            target, _, anchor = link.partition("#")
            target = page.parent / target if target else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_readme_links_every_page():
    assert len(PAGES) >= 8
    assert set(PAGES) <= set(re.findall(r"\]\((docs/[^)#\s]+)\)", TEXTS["README.md"]))


def defined(module):
    """Top-level names of a module, and Class.method of its classes."""
    names = set()
    for node in ast.parse(CODE[module]).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
    return names


# A function is named with its file, or with the file's package too where two files have one name.
FUNCTIONS = {
    f"{path}.{name}"
    for module in CODE
    for name in defined(module)
    for path in (Path(module).name, module.replace("/", "."))
}
METHODS = {name for module in CODE for name in defined(module)}


@pytest.mark.parametrize("name", NAMES)
def test_functions_named_exist(name):
    text = TEXTS[name]
    code = spans(text) + blocks(text, "mermaid")
    call = re.compile(r"([A-Za-z_][\w.]*)\(\)|\betude\.([\w.]+)\(")
    called = {name or ours for part in code for name, ours in call.findall(part)}
    classes = {m for part in code for m in re.findall(r"\b([a-z_]+\.[A-Z]\w+)\b", part)}
    assert len(called) >= (30 if name == FLOW else 0)
    named = {name.removeprefix("etude.") for name in called | classes}
    unknown = named - FUNCTIONS - METHODS
    assert unknown - {"transformers.Trainer"} == set()


def grounds_up():
    """Modules and packages in the order in which they may import, as import-linter enforces it."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    (contract,) = tools["importlinter"]["contracts"]
    return [set(layer.split(" | ")) for layer in reversed(contract["layers"])]


@pytest.mark.parametrize("name", [FLOW, "CONTRIBUTING.md"])
def test_trees_are_in_the_order_of_imports(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    (tree,) = [block for block in blocks(text, "") if "src/etude/" in block]
    lines = "\n".join(re.findall(r"^  \S.*$", tree, re.M))
    found = re.findall(r"(?<![\w/])(\w+)(?:\.py|/)", lines)
    order = [name for name in dict.fromkeys(found) if name not in ("main", "__init__")]
    layers = grounds_up()
    assert {*order, "main"} == set().union(*layers)
    assert order == sorted(order, key=lambda name: [name in layer for layer in layers].index(True))


def test_project_flow_lists_every_file_of_ours():
    tree = re.findall(r"^  ([\w/]+\.py) +\S.*$", "\n".join(blocks(TEXTS[FLOW], "")), re.M)
    assert len(tree) > 15
    assert len(tree) == len(set(tree))
    packages = {f"{name}.py" for name in CODE if name.endswith("/__init__")}
    assert set(tree) == {f"{name}.py" for name in CODE} - packages


# --- quotations and pictures -----------------------------------------------------------------


def said():
    """Every text that the code holds, the literal parts of one string joined."""
    texts = [(ROOT / "Makefile").read_text()]
    for code in CODE.values():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def unsaid(quotation, texts):
    """The parts of a quotation, between numbers and dots, that the code says nowhere."""
    parts = re.split(
        r"\d[\d,]*(?!\.\d)|\bnan\b|smollm2-135m| \.\.\. ?", " ".join(quotation.split())
    )
    return [part for part in parts if part.strip() and part.strip() not in texts]


@pytest.mark.parametrize("name", ["docs/troubleshooting.md", FLOW])
def test_quoted_messages_are_what_the_code_says(name):
    texts = said()
    text = prose(TEXTS[name])
    quotations = re.findall(r'"([^"]{8,})"', re.sub(r"`[^`\n]*`", "", text))
    assert len(quotations) >= 8
    assert {q: unsaid(q, texts) for q in quotations if unsaid(q, texts)} == {}
    assert unsaid("the loss is nan, so all went well", texts)


def unbalanced(text):
    """Brackets that do not pair up, outside of quoted labels; and quotes that do not close."""
    if text.count('"') % 2:
        return ["quote"]
    pairs, stack = {")": "(", "]": "[", "}": "{"}, []
    for sign in re.sub(r'"[^"]*"', "", text):
        if sign in pairs.values():
            stack.append(sign)
        elif sign in pairs and (not stack or stack.pop() != pairs[sign]):
            return [sign]
    return stack


def test_mermaid_diagrams_are_well_formed():
    found = blocks(TEXTS[FLOW], "mermaid")
    assert len(found) >= 3
    node = r'\w+(?:\(\["[^"]+"\]\)|\["[^"]+"\])?'  # name, name["box"] or name(["rounded box"])
    for block in found:
        assert block.startswith(DIAGRAMS)
        lines = block.splitlines()[1:]
        assert 5 <= len(lines) <= 20
        for line in lines:
            assert unbalanced(line) == [], line
            assert re.fullmatch(rf"    {node} --> {node}", line), line
        # Every box has a text of its own: an arrow to a bare name that is nowhere spelled out
        # would be drawn as that name.
        nodes = set(re.findall(r"(?:^    |--> )(\w+)", block, re.M))
        assert nodes == set(re.findall(r"(?:^    |--> )(\w+)(?=[(\[])", block, re.M))
    assert unbalanced('a["x" --> b') and unbalanced("a(]") and not unbalanced('a["f("] --> b')


def test_readme_has_its_measured_table():
    text = TEXTS["README.md"]
    assert text.startswith("# Etude\n")
    assert (
        text.count("\n<!-- measured:quickstart -->\n") == text.count("\n<!-- /measured -->\n") == 1
    )
    part = text.partition("<!-- measured:quickstart -->")[2].partition("<!-- /measured -->")[0]
    (rows,) = table(part, "| | base | tuned |")
    names = [row[0].strip("| ").partition(" [")[0] for row in rows]
    assert names == ["accuracy", "macro F1"]
    assert all(cell.strip() for row in rows for cell in row)
    first = text.split("\n\n")[1].replace("\n", " ").split(":")[0]
    assert "Qwen2-1.5B fine-tuning with LoRA from one YAML file" in first
    # The speeds are those of the record in the benchmarks.
    record = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    (rows,) = table(text, "| number format of the base | TRL | Etude |")
    speeds = [cell for row in rows for cell in row[1:] if cell.strip() != "-"]
    assert len(speeds) == 5
    assert all(f" {speed.strip()} | " in record for speed in speeds)
