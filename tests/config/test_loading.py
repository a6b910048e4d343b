from importlib import resources
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from etude.config.loading import key_paths, load_config, parse_override, preset_path, to_yaml
from etude.config.schema import Config, normal_label
from etude.config.yaml import parse_yaml
from etude.errors import UserError


@pytest.fixture
def write(tmp_path):
    """Writes a config file and gives its path."""

    def _write(text, name="config.yml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return _write


def refusal(path, **options):
    with pytest.raises(UserError) as caught:
        load_config(path, **options)
    return str(caught.value)


# --- written and read back -----------------------------------------------------------------------


def test_defaults_written_out_read_back_as_the_defaults(write):
    assert load_config(write(to_yaml(Config()))) == Config()
    assert load_config(None) == Config()
    assert load_config(write("")) == Config()


def test_every_key_is_written_with_its_comment():
    lines = to_yaml(Config()).splitlines()
    keys = list(key_paths())
    assert len(keys) > 50
    for path in keys:
        section, key = path.split(".")
        begin = lines.index(f"{section}:")
        at = next(n for n in range(begin, len(lines)) if lines[n].startswith(f"  {key}: "))
        comment = type(getattr(Config(), section)).model_fields[key].description
        assert comment and f"  # {comment}" in (lines[at][-len(comment) - 4 :], lines[at - 1]), path


# Everything but NUL, which the reader refuses.
CHARACTERS = st.characters(codec="utf-8", exclude_characters="\0")
NAMES = st.one_of(
    st.text(CHARACTERS, min_size=1, max_size=20),
    st.sampled_from(["no", "yes", "null", "~", "1e-5", "1e5", "010", "0x1F", "1_000", "12:30", "true"]),
    st.sampled_from(["#x", "a # b", "a: b", "- a", "[a", "{a", "'", '"', "a\nb", "\u2028", "\x85", "=", "<<"]),
)  # fmt: skip
FLOATS = st.floats(1e-300, 1e300)


LABELS = NAMES.map(normal_label).filter(bool)


@st.composite
def configs(draw):
    """Valid configurations that differ from the defaults in awkward places."""
    values = {
        "model": {"name": draw(NAMES), "revision": draw(st.none() | NAMES)},
        "lora": {
            "r": draw(st.integers(1, 10**30)),
            "alpha": draw(FLOATS),
            "target_modules": draw(st.lists(NAMES, min_size=1, max_size=3)),
            "use_dora": draw(st.booleans()),
        },
        "dataset": {
            "columns": draw(st.dictionaries(NAMES, NAMES, max_size=2)),
            "labels": draw(st.none() | st.lists(LABELS, min_size=2, max_size=4, unique=True)),
            "instruction": draw(NAMES) + "{labels}" + draw(NAMES) + "{text}" + draw(NAMES),
            "system_prompt": draw(st.none() | st.text(CHARACTERS, max_size=30)),
        },
        "training": {"learning_rate": draw(FLOATS), "warmup_steps": draw(st.floats(0, 1))},
        "generation": {"seed": draw(st.none() | st.integers(0, 2**32 - 1))},
        "output": {"report_to": draw(st.lists(st.sampled_from(["tensorboard", "wandb"])))},
    }
    return Config.model_validate(values)


@given(config=configs())
def test_any_config_written_out_reads_back_as_itself(config):
    text = to_yaml(config)
    assert Config.model_validate(parse_yaml(text, "x").values) == config


# --- layers --------------------------------------------------------------------------------------


def test_later_layers_win_key_by_key(write):
    base = write("lora: {r: 8, alpha: 16}\ntraining:\n  seed: 1\n")
    over = write("lora:\n  r: 4\n", "over.yml")

    config = load_config(
        base, [str(over)], ["lora.alpha=3", "dataset.labels=[no, yes]", "model.revision="]
    )

    assert (config.lora.r, config.lora.alpha, config.training.seed) == (4, 3, 1)
    assert config.dataset.labels == ["no", "yes"]
    assert config.model.revision is None
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    # And in the other order the override still comes last, the preset over the file.
    assert load_config(over, [str(base)]).lora.r == 8


def test_a_fault_is_placed_in_the_layer_that_brought_it(write):
    base = write("lora:\n  r: 8\n  alpha: 0\n")
    over = write("# note\nlora:\n  r: 0\n", "over.yml")
    text = refusal(base, presets=[str(over)], overrides=["training.seed=-1"])
    assert f"{over}:3: lora.r: 0 should be" in text
    assert f"{base}:3: lora.alpha: 0 should be" in text
    assert "command line: training.seed: -1 should be" in text
    assert "has 3 faults" in text


def test_presets_that_ship_with_etude_load():
    folder = Path(str(resources.files("etude.config") / "presets"))
    names = sorted(path.stem for path in folder.glob("*.yml"))
    assert {"quickstart", "cpu", "gpu"} <= set(names)
    for name in names:
        assert load_config(None, [name]) != Config(), f"{name} changes nothing"
        assert preset_path(name).parent == folder


def test_an_unknown_preset_is_refused_with_those_there_are():
    text = refusal(None, presets=["quikstart"])
    assert "--preset quikstart" in text and "there are: cpu," in text and "quickstart" in text


@pytest.mark.parametrize("text", ["lora.r", "r=8", "=8", "lora.=8", ".r=8", ""])
def test_overrides_of_another_form_are_refused(text):
    with pytest.raises(UserError, match=r"command line: .*section\.key=value"):
        parse_override(text)


def test_overrides_may_hold_any_text():
    assert parse_override("a.b=x=y").values == {"a": {"b": "x=y"}}
    assert parse_override("a.b=[1").values == {"a": {"b": "[1"}}
    assert parse_override("lora.r=").values == {"lora": {"r": None}}
    with pytest.raises(UserError, match=r"command line \(lora\.r=\[1\):1: not valid YAML"):
        parse_override("lora.r=[1")


# --- scalars -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("2E+3", 2e3), (".5", 0.5), ("1.", 1.0), ("-3", -3), ("+7", 7),
        ("010", 10), ("08", 8), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("no", "no"), ("Yes", "Yes"), ("on", "on"), ("y", "y"), ("0x1F", "0x1F"), ("1_000", "1_000"),
        ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), (".inf", ".inf"), (".nan", ".nan"),
        ("'1'", "1"), ("=", "="), ("<<", "<<"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    got = parse_yaml(f"a: {text}", "x").values["a"] if value is not None else None
    if value is None:
        assert parse_yaml(f"a: {{b: {text}}}", "x").values == {"a": {"b": None}}
    else:
        assert (got, type(got)) == (value, type(value))


def test_the_yaml_library_alone_would_read_them_otherwise():
    # The negative control: this is why there is a loader of our own.
    assert yaml.safe_load("[no, 1e-5, 010]") == [False, "1e-5", 8]


def test_no_is_a_label_but_not_a_truth_value(write):
    config = load_config(write("dataset:\n  labels: [yes, no]\n"))
    assert config.dataset.labels == ["yes", "no"]
    text = refusal(write("training:\n  use_cpu: yes\n  bf16: no\n"))
    assert "config.yml:2: training.use_cpu: 'yes'" in text
    assert "config.yml:3: training.bf16: 'no'" in text
    assert text.count("should be a valid boolean") == 2


# --- what is refused -----------------------------------------------------------------------------

BROKEN = {
    "unknown-key": ("lora:\n  rank: 8\n  alhpa: 3\n", 3, "lora.alhpa: unknown key; did you mean lora.alpha?"),
    "wrong-section": ("model:\n  name: x\n  learning_rate: 1\n", 3, "did you mean training.learning_rate?"),
    "no-section": ("\nlearning_rate: 1e-4\n", 2, "learning_rate: unknown key; did you mean training.learning_rate?"),
    "section-typo": ("# a\n# b\ntrainig:\n  seed: 1\n", 3, "trainig: unknown key; did you mean training?"),
    "twice": ("lora:\n  r: 8\n  alpha: 16\n  r: 16\n", 4, "lora.r: duplicate key (first at "),
    "section-twice": ("lora:\n  r: 8\nlora:\n  alpha: 1\n", 3, "lora: duplicate key (first at "),
    "switch": (
        "generation:\n  thinking: flase\n",
        2,
        "generation.thinking: 'flase' should be 'auto', True or False",
    ),
    "quoted-number": ("lora:\n  r: '8'\n", 2, "lora.r: '8' should be a valid integer"),
    "fraction": ("lora:\n  r: 8.5\n", 2, "lora.r: 8.5 should be a valid integer"),
    "range": (
        "training:\n  seed: 1\n\n  batch_size: 0\n", 4,
        "training.batch_size: 0 should be greater than or equal to 1",
    ),
    "choice": (
        "dataset:\n  format: jsonl_messages\n", 2,
        "dataset.format: 'jsonl_messages' should be 'auto', 'messages'",
    ),
    "near-choice": ("training:\n  lr_scheduler: cosin\n", 2, "did you mean cosine?"),
    "item": (
        "lora:\n  target_modules:\n    - q_proj\n    - 7\n", 2,
        "lora.target_modules.1: 7 should be a valid string",
    ),
    "scalar-section": ("lora: 8\n", 1, "lora: 8 should be a valid dictionary"),
    "tag": (
        "model:\n  name: !!python/object/apply:os.system ['touch HACKED']\n", 2,
        "tags (!name) and aliases (*name) are not supported",
    ),
    "usual-tag": ("training:\n  use_cpu: !!bool maybe\n", 2, "tags (!name) and aliases (*name) are not supported"),
    "alias": ("model: &m\n  name: x\nlora: *m\n", 3, "aliases (*name) are not supported"),
    "tab": ("lora:\n\tr: 8\n", 2, "not valid YAML: found character '\\t' that cannot start any token"),
    "open-quote": ("model:\n  name: 'x\n", 3, "not valid YAML"),
    "indent": ("lora:\n  r: 8\n alpha: 1\n", 3, "not valid YAML"),
    "list-on-top": ("- lora\n- model\n", None, "sections with keys are expected, not a list"),
    "text-on-top": ("hello\n", None, "sections with keys are expected, not a str"),
    "two-documents": ("lora:\n  r: 8\n---\nlora:\n  r: 9\n", 3, "not valid YAML"),
    "number-as-key": ("lora:\n  8: r\n", 1, "lora.8: 8 Keys should be strings"),
    "list-as-key": ("lora:\n  [a]: r\n", 2, "not valid YAML: found unhashable key"),
    "zero-byte": ("lora:\n  r: 8\n# \x00\n", None, "not valid YAML"),
    "infinite": ("training:\n  learning_rate: 1e999\n", 2, "training.learning_rate: inf should be a finite number"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "line", "phrase"), BROKEN.values(), ids=BROKEN)
def test_broken_configs(write, tmp_path, monkeypatch, text, line, phrase):
    monkeypatch.chdir(tmp_path)
    path = write(text)
    message = refusal(path)
    assert phrase in message
    if line is not None:
        # The same line of the message holds the place and the phrase.
        assert any(f"{path}:{line}: " in part and phrase in part for part in message.splitlines())
    assert not Path("HACKED").exists()


def test_a_tag_would_have_run_under_an_unsafe_loader(tmp_path, monkeypatch):
    # The negative control of the case "tag".
    monkeypatch.chdir(tmp_path)
    yaml.unsafe_load(BROKEN["tag"][0])
    assert Path("HACKED").exists()


CONTRADICTIONS = {
    "fp16-bf16": (["training.fp16=true", "training.bf16=true"], "training.fp16", "exclude each other"),
    "warmup": (
        ["training.max_steps=5", "training.warmup_steps=5"], "training.warmup_steps",
        "warm-up of 5 steps is not shorter",
    ),
    "patience": (
        ["training.early_stopping_patience=2", "dataset.validation=null", "dataset.validation_split=0"],
        "training.early_stopping_patience",
        "early stopping needs validation data",
    ),
    "thresholds": (["evaluation.fair_threshold=0.8"], "evaluation.fair_threshold", "0.8 is above good_threshold 0.7"),
    "no-text": (["dataset.instruction='{labels}'"], "dataset.instruction", "lacks {text}"),
    "no-labels": (["dataset.instruction='{text}'"], "dataset.instruction", "lacks {labels}"),
    "label-twice": (["dataset.labels=[a, b, a]"], "dataset.labels", "duplicate label"),
    "labels-format": (
        ["dataset.labels=[a, b]", "dataset.format=text"], "dataset.labels",
        "labels belong to format classification",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "key", "phrase"), CONTRADICTIONS.values(), ids=CONTRADICTIONS
)
def test_contradictions(overrides, key, phrase):
    message = refusal(None, overrides=overrides)
    assert f"command line: {key}: " in message and phrase in message
    assert "has 1 fault:" in message


def test_the_keys_of_a_contradiction_stand_well_alone():
    # The negative control: a contradiction needs both of its sides.
    for overrides, *_ in CONTRADICTIONS.values():
        if len(overrides) == 2:
            load_config(None, overrides=overrides[:1])
            load_config(None, overrides=overrides[1:])


def test_all_faults_are_reported_together(write):
    contradictory = "training:\n  fp16: true\n  bf16: true\nevaluation:\n  fair_threshold: 0.9\n"
    path = write(contradictory + "model:\n  nme: x\nlora:\n  r: 0\n  dropout: 2\n")
    message = refusal(path)
    assert "has 3 faults" in message and "etude init" in message
    for line, key in [(7, "model.nme"), (9, "lora.r"), (10, "lora.dropout")]:
        assert f"  {path}:{line}: {key}: " in message
    # What contradicts each other is known of values that are each right.
    message = refusal(write(contradictory))
    assert "has 2 faults" in message
    for line, key in [(2, "training.fp16"), (5, "evaluation.fair_threshold")]:
        assert f"  {path}:{line}: {key}: " in message


def test_files_that_are_no_text(write, tmp_path):
    assert "cannot be read as UTF-8 text" in refusal(write(b"lora:\n  r: \xff\xfe\x00\n"))
    assert "no such file; `etude init`" in refusal(tmp_path / "none.yml")
    assert "cannot be read" in refusal(tmp_path)


def test_a_byte_order_mark_and_windows_lines_do_no_harm(write):
    assert load_config(write(b"\xef\xbb\xbflora:\r\n  r: 8\r\n")).lora.r == 8


def test_a_section_without_keys_means_its_defaults(write):
    assert load_config(write("lora:\n  # r: 8\ntraining:\n  seed: 7\n")).lora == Config().lora


def test_deep_nesting_is_an_error_not_a_crash(write):
    assert "recursion" in refusal(write("a: " + "[" * 5000))
    for depth in range(50, 1000, 50):
        refusal(write("a: " + "[" * depth + "]" * depth))


YAMLISH = st.text(alphabet="ab:-[]{},#&*!|>'\"%@`? \n\t0.~<=", max_size=60)


@given(text=st.one_of(st.text(), YAMLISH))
def test_any_text_is_read_or_refused_in_words(text):
    try:
        layer = parse_yaml(text, "x.yml")
    except UserError as error:
        assert "x.yml" in str(error)
    else:
        assert isinstance(layer.values, dict)
