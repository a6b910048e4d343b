"""Hostile input is refused in words: nothing foreign runs, nothing hangs, nothing leads outside."""

import ast
import json
import os
import pickle
import shutil
import signal
import struct
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from etude import files
from etude.cli import app
from etude.config.schema import Dataset, Lora
from etude.config.yaml import read_yaml
from etude.conversation import history
from etude.conversation.renderer import Renderer
from etude.data import dataset, readers
from etude.errors import UserError
from etude.models import loading, lora
from etude.models.device import Device
from etude.runs import opening

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "etude"
CPU = Device("cpu", "float32", "for the test")


@pytest.fixture(autouse=True)
def no_hang():
    """Kill a test that hangs; what is refused takes a second or two, a whole training a minute."""

    def strike(*_):
        raise TimeoutError("this hangs")

    before = signal.signal(signal.SIGALRM, strike)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(action, *arguments):
    with pytest.raises(UserError) as caught:
        action(*arguments)
    return str(caught.value)


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def model(tiny_model, tmp_path):
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="module")
def made_adapter(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    base = loading.load_base(str(tiny_model), CPU)
    lora.save(lora.attach(base.model, Lora(r=4, alpha=8), str(tiny_model)), folder)
    return folder


@pytest.fixture
def adapter(made_adapter, tmp_path):
    return Path(shutil.copytree(made_adapter, tmp_path / "adapter"))


# --- pickles: a canary that would sing -----------------------------------------------------------

SLOTS = (
    "pytorch_model.bin", "model.pt", "model.bin", "adapter_model.bin", "optimizer.pt", "scheduler.pt",
    "training_args.bin", "rng_state.pth", "tokenizer.model", "spiece.model", "vocab.pkl",
)  # fmt: skip


class Trap:
    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def plant(folder, trace, names=SLOTS):
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Trap(trace)))


def test_the_canary_would_sing(tmp_path):
    plant(tmp_path, tmp_path / "one", ["a.pt"])
    pickle.loads((tmp_path / "a.pt").read_bytes())
    assert (tmp_path / "one").is_dir()


def test_no_program_unpickles_anything(model, tmp_path, monkeypatch):
    # Train on a model folder full of pickles, then plant them in the run and its checkpoints too.
    monkeypatch.chdir(tmp_path)
    trace = tmp_path / "HACKED"
    plant(model, trace)
    rows = [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(8)]
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def etude(*arguments):
        result = CliRunner().invoke(app, [*arguments, "training.use_cpu=true"])
        assert result.exit_code == 0, result.output
        return result.output

    settings = ["training.compile=false", "training.warmup_steps=0", "dataset.max_length=64"]
    etude("train", "--preset", "cpu", "dataset.train=d.jsonl", "dataset.validation=null",
          "dataset.test=null", f"model.name={model}", "output.dir=run", *settings)  # fmt: skip
    plant(Path("run"), trace)
    assert "report.md" in etude(
        "evaluate", "run", "--data", "d.jsonl", "generation.max_new_tokens=2"
    )
    etude("chat", "run", "--prompt", "Hi", "generation.max_new_tokens=2")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_model_of_pickled_weights_is_refused(model, tmp_path, name):
    (model / "model.safetensors").unlink()
    plant(model, tmp_path / "HACKED", [name])
    assert "pickled weights (.bin, .pt) can run code" in refusal(loading.load_base, str(model), CPU)
    assert not (tmp_path / "HACKED").exists()


def test_an_adapter_of_pickled_weights_is_refused(adapter, tmp_path):
    (adapter / "adapter_model.safetensors").unlink()
    plant(adapter, tmp_path / "HACKED")
    message = refusal(lora.load_adapter, None, adapter)
    assert "no adapter_model.safetensors" in message and "can run code" in message
    assert not (tmp_path / "HACKED").exists()


# --- the source itself ---------------------------------------------------------------------------

LOADERS = {"torch", "yaml", "pickle", "joblib", "numpy", "np", "marshal", "shelve", "dill"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}


def unsafe(tree):
    """What in the code could run what a file says, with the line of each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name.split(".")[0] for alias in node.names]
            names += [(getattr(node, "module", None) or "").split(".")[0]]
            yield from ((node.lineno, name) for name in names if name in FORBIDDEN_IMPORTS)
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in FORBIDDEN_NAMES:
            yield node.lineno, function.id
        if isinstance(function, ast.Attribute):
            owner = ast.unparse(function.value)
            if owner in LOADERS and function.attr.startswith(("load", "unsafe_load", "full_load")):
                yield node.lineno, f"{owner}.{function.attr}"
            if owner == "os" and function.attr in ("system", "popen"):
                yield node.lineno, f"os.{function.attr}"
        for keyword in node.keywords:
            if keyword.arg in ("allow_pickle", "weights_only", "shell"):
                yield node.lineno, keyword.arg
            if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False":
                yield node.lineno, keyword.arg
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):  # arguments that are handed on as **common
            for key, value in zip(node.keys, node.values, strict=True):
                name = key.value if isinstance(key, ast.Constant) else None
                if name == "weights_only" or (
                    name == "trust_remote_code" and ast.unparse(value) != "False"
                ):
                    yield node.lineno, name


def test_the_package_loads_nothing_that_could_run():
    files = sorted(SOURCE.rglob("*.py"))
    assert {"main.py", "loading.py", "lora.py"} <= {file.name for file in files}
    found = [(file.name, *what) for file in files for what in unsafe(ast.parse(file.read_text()))]
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load('x')", "torch.load('x', weights_only=True)", "import pickle",
        "from pickle import loads", "yaml.load(x, Loader=L)", "yaml.unsafe_load(x)", "eval('1')",
        "exec('1')", "np.load(f, allow_pickle=True)", "A.from_pretrained(x, trust_remote_code=True)",
        "d = {'trust_remote_code': yes}", "import shelve", "os.system('x')", "joblib.load(x)",
        "subprocess.run(x, shell=True)",
    ],
)  # fmt: skip
def test_the_scan_sees_what_it_looks_for(code):
    assert list(unsafe(ast.parse(code)))


def test_the_scan_lets_the_harmless_pass():
    code = (
        "model.eval()\nlora.load(m, f)\nA(trust_remote_code=False)\nre.compile('x')\njson.loads(x)"
    )
    assert not list(unsafe(ast.parse(code)))


# --- model folders -------------------------------------------------------------------------------


def header(value, body=b""):
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensor(*shape, at=(0, 16), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(at)}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"PK\3\4", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2**63) + b"{}",
        header(b"[" * 10**6), header({"a": tensor(2**40)}, bytes(16)),
        header({"a": tensor(2**40, 2**40, at=(0, 0))}), header({"a": tensor(-4)}, bytes(16)),
        header({"a": tensor(4, dtype="PICKLE")}, bytes(16)), header({"a": tensor(4, at=(0, 10**12))}),
        header({"a": tensor(4), "b": tensor(4, at=(8, 24))}, bytes(24)),
    ],
    ids=["empty", "zip", "2^60", "2^63", "bomb", "shape", "overflow", "negative", "dtype", "end", "overlap"],
)  # fmt: skip
def test_absurd_tensor_headers(model, adapter, content):
    (model / "model.safetensors").write_bytes(content)
    message = refusal(loading.load_base, str(model), CPU)
    assert message.startswith(f"model.name {model}: ") and len(message) < 1000
    (adapter / "adapter_model.safetensors").write_bytes(content)
    assert "adapter_model.safetensors is corrupt" in refusal(lora.load_adapter, None, adapter)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5, "\0", "9" * 10**5, '{"a": 1', "[]"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_bombs_in_json_files(model, name, text):
    (model / name).write_text(text)
    assert refusal(loading.load_base, str(model), CPU).startswith("model.name")


def test_an_index_of_pickles_is_refused(model, tmp_path):
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    plant(model, tmp_path / "HACKED", ["evil.bin"])
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "evil.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(loading.load_base, str(model), CPU).startswith("model.name")
    assert not (tmp_path / "HACKED").exists()


@pytest.mark.parametrize("value", ["evil/kernel", {"": "evil/kernel"}])
def test_code_of_the_hub_named_in_a_model_is_refused(model, value):
    edit(model / "config.json", attn_implementation=value)
    assert "names code of the Hub" in refusal(loading.load_base, str(model), CPU)


def test_generation_settings_of_a_model_are_not_its_makers(model):
    edit(model / "generation_config.json", num_beams=10**6, max_length=10**12)
    settings = loading.load_base(str(model), CPU).model.generation_config
    assert settings.num_beams in (None, 1) and settings.eos_token_id == 2


def test_a_model_folder_does_not_name_another_base(model, adapter):
    # With an adapter_config.json transformers would load the base that it names, from anywhere.
    shutil.copy(adapter / "adapter_config.json", model)
    assert "it is an adapter" in refusal(loading.load_base, str(model), CPU)


# --- adapter folders -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "phrase"),
    [
        ({"target_modules": [3]}, "does not load on this base"),
        ({"r": 10**9}, "has rank 1000000000, and no tensor is so large"),
        ({"r": True}, "does not load on this base"),
        ({"rank_pattern": {"q_proj": 10**9}}, "has rank 1000000000, and no tensor is so large"),
        (
            {"layer_replication": [[0, 10**9]]},
            "Etude does not do this: layer_replication [[0, 1000000000]]",
        ),
        (
            {"megatron_config": {"a": 1}, "megatron_core": "megatron.x"},
            "Etude does not do this: megatron_config",
        ),
        ({"init_lora_weights": "pissa"}, "Etude does not do this: init_lora_weights 'pissa'"),
        ({"peft_type": "PROMPT_TUNING"}, "Etude does not do this: peft_type 'PROMPT_TUNING'"),
        ({"target_modules": []}, "does not load on this base"),
        ({"lora_dropout": 5}, "does not load on this base: dropout"),
    ],
)
def test_adapters_that_are_more_than_weights(adapter, tiny_model, values, phrase):
    edit(adapter / "adapter_config.json", **values)
    base = loading.load_base(str(tiny_model), CPU)
    assert phrase in refusal(lora.load_adapter, base.model, adapter)


def test_an_adapter_of_broken_numbers(adapter, tiny_model):
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, file)
    base = loading.load_base(str(tiny_model), CPU)
    assert "1 not finite of" in refusal(lora.load_adapter, base.model, adapter)


def test_a_sound_adapter_passes(adapter):
    assert lora.describe(adapter).r > 0  # the control of all above


@pytest.mark.parametrize(
    "name", ["../../etc", "/etc/passwd", "~root/x", "a\0b", "\ud800", "%2e%2e/x", "x" * 5000, ["x"], None]
)  # fmt: skip
def test_the_base_that_an_adapter_names_is_only_looked_for(adapter, name):
    edit(adapter / "adapter_config.json", base_model_name_or_path=name)
    try:
        opening.open_target(str(adapter), [])
    except (UserError, OSError) as error:  # an OSError is told in one sentence too
        assert str(error)
    else:
        pytest.fail("opened")


@pytest.mark.parametrize(
    "text", ["[" * 10**6, "[]", "{}", '{"base": [], "chat_format": {}}', '{"base": {}}', "\0"]
)
def test_manifests_of_any_kind_are_refused(adapter, tiny_model, text):
    (adapter / "config.yml").write_text(f"model: {{name: {tiny_model}}}")
    (adapter / "manifest.json").write_text(text)
    assert "train the run again" in refusal(opening.open_target, str(adapter), [])


# --- chat templates ------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REFUSED = {
    "range": ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "format": ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('id') }}", "unsafe"),
    "include": ("{% include '/etc/passwd' %}", "no loader"),
    "import": ("{% import '/etc/passwd' as x %}", "no loader"),
    "zero": ("{{ 1 // 0 }}", "division"),
    "syntax": ("{% for %}", "refuses"),
    "parentheses": ("{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}", "refuses"),
}


@pytest.mark.parametrize(("text", "phrase"), REFUSED.values(), ids=REFUSED)
def test_templates_do_nothing_but_write(sample_tokenizer, text, phrase):
    renderer = Renderer(sample_tokenizer, text + CHATML)
    message = refusal(renderer.prompt, [{"role": "user", "content": "Hi"}])
    assert "cannot be used" in message and phrase in message


def test_a_plain_template_passes(sample_tokenizer):
    assert Renderer(sample_tokenizer, CHATML).prompt([{"role": "user", "content": "Hi"}])


# --- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        (
            "model: !!python/object/apply:os.system [id]",
            "tags (!name) and aliases (*name) are not supported",
        ),
        (
            "model: {name: !!python/name:os.system x}",
            "tags (!name) and aliases (*name) are not supported",
        ),
        ("a: &a [x]\nb: [*a, *a]", "aliases"),
        ("model: " + "[" * 10**5, "recursion"),
        ("\n".join(" " * n + "a:" for n in range(600)), "recursion"),
        ("lora: {r: " + "9" * 10**5 + "}", "not valid YAML"),
        ("model: {name: a\0b}", "special characters"),
        (b"model: {name: \xff}", "UTF-8"),
        ("model: {name: x}".encode("utf-16"), "UTF-8"),
    ],
    ids=range(9),
)
def test_hostile_configurations(tmp_path, text, phrase):
    file = tmp_path / "c.yml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(read_yaml, file)
    assert phrase in message and len(message) < 10**4


# --- data ----------------------------------------------------------------------------------------


def rows(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize(
    ("suffix", "content", "phrase"),
    [
        (".jsonl", b'{"text": "a\0b"}\n', ":1: not valid JSON"),
        (".jsonl", rows("fine", "a\0b"), ":2: text holds a NUL character (at 2)"),
        (".jsonl", bytes(10**6), "not valid JSON"),
        (".jsonl", b'{"text": "a"}\n{"text": "\xc3("}\n', ":2: not UTF-8 text"),
        (".jsonl", rows("a").encode("utf-16"), ":1: not UTF-8 text"),
        (".jsonl", "[" * 10**6, ":1: nested too deeply"),
        (".jsonl", '{"a":' * 10**5, ":1: nested too deeply"),
        (".json", "[" * 10**6, ":1: nested too deeply"),
        (".jsonl", '{"text": ' + "9" * 10**5 + "}", ":1: Exceeds the limit"),
        (".jsonl", '{"text": 1e999999}', ":1: text must be text"),
        (".jsonl", '{"text": "a", "text": "b"}', ":1: duplicate key 'text'"),
        (
            ".json",
            '[{"text": "a"},\n{"text": "a", "text": "b"}]',
            ":2: duplicate key 'text'",
        ),
        (".jsonl", '{"text": "\\ud800"}', ":1: text holds half a character"),
        (".csv", "text\na\0b\n", "NUL"),
        (".csv", 'text\n"' + "x\n" * 10**6, "not valid CSV"),
        (".parquet", b"PAR1" + b"\xff" * 1000 + b"PAR1", "not a readable parquet file"),
        (".parquet", b"", "not a readable parquet file"),
    ],
    ids=range(17),
)
def test_hostile_data(tmp_path, suffix, content, phrase):
    file = tmp_path / f"d{suffix}"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(dataset.read, str(file), Dataset(format="auto"))
    assert phrase in message and len(message) < 10**4


SPECIAL = {
    "pipe": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "folder": lambda path: path.mkdir(),
    "sparse": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**40),
}


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_plain_file_is_not_read(tmp_path, make, tiny_model):
    path = tmp_path / "x.jsonl"
    make(path)
    for action in (
        readers.read,
        lambda name: read_yaml(Path(name)),
        lambda name: history.load(Path(name)),
    ):
        assert str(path) in refusal(action, str(path))
    with pytest.raises(ValueError):
        files.read_json(path)
