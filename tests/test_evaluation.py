"""Evaluation: exact label likelihoods, parsing, responses, and what the report says."""

import json
import math
import re
import shutil

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from typer.testing import CliRunner

from etude import evaluation
from etude.cli import app
from etude.config.schema import Config, normal_label
from etude.conversation.encoding import Example
from etude.data import dataset, splits
from etude.engine import generation, packing
from etude.errors import UserError
from etude.measure import labels as class_labels
from etude.measure import likelihood, responses
from etude.model import Model
from etude.models import lora
from etude.runs import opening, plots, report

LABELS = ["good", "good enough", "goodness", "bad"]  # one begins another, several tokens each


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return opening.open_target(str(tiny_model), ["model.dtype=float32", "training.use_cpu=true"])


def brute_force(model, renderer, prompt, label):
    """log P(label and its end token | prompt), one plain forward, nothing of Etude's passes."""
    start = renderer.prompt(prompt)
    ids = renderer.answer([*prompt, {"role": "assistant", "content": label}]).ids
    end = len(start) + ids[len(start) :].index(renderer.end_of_turn) + 1
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    return sum(float(logs[at - 1, ids[at]]) for at in range(len(start), end))


def test_label_likelihoods_equal_brute_force(tiny):
    prompts = [[{"role": "user", "content": f"Judge this: {'very ' * n}nice"}] for n in range(7)]
    got = likelihood.label_log_likelihoods(
        tiny.base.model, tiny.renderer, prompts, LABELS, tiny.config
    )
    for prompt, row in zip(prompts, got, strict=True):
        expected = [brute_force(tiny.base.model, tiny.renderer, prompt, label) for label in LABELS]
        assert row == pytest.approx(expected, abs=1e-4)
    assert len({round(value, 3) for value in got[0]}) == len(LABELS)


@pytest.mark.real
def test_label_likelihoods_of_real_tweets_equal_brute_force(sample):
    settings = Config()
    table = splits.sample(dataset.read("data/tweets_sentiment.test.jsonl", settings.dataset), 12, 0)
    prompts = [dataset.instruct(row.text, table.labels, settings.dataset) for row in table.rows]
    got = likelihood.label_log_likelihoods(
        sample.base.model, sample.renderer, prompts, table.labels, settings
    )
    for prompt, row in zip(prompts, got, strict=True):
        expected = [
            brute_force(sample.base.model, sample.renderer, prompt, label) for label in table.labels
        ]
        assert row == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("positive", "positive"),
        ("Positive.", "positive"),
        (' "NEGATIVE" ', "negative"),
        ("The sentiment is negative.", "negative"),
        ("positive, not negative", None),
        ("positively", None),
        ("", None),
        ("I don't know", None),
    ],
)
def test_parse_label(response, label):
    assert class_labels.parse_label(response, ["negative", "neutral", "positive"]) == label


@pytest.mark.parametrize(
    ("labels", "response", "label"),
    [
        # the longest of labels that contain each other
        (["hate", "not hate"], "not hate", "not hate"),
        (["hate", "not hate"], "This is  Not Hate.", "not hate"),
        (["hate", "not hate"], "hate", "hate"),
        (["hate", "not hate"], "It is hate, not hate speech", None),
        (["neutral", "positive", "very positive"], "Label: very positive", "very positive"),
        # exact before caseless
        (["Bad", "bad"], "bad", "bad"),
        (["Bad", "bad"], "It is Bad.", "Bad"),
        (["Bad", "bad"], "BAD", None),
        (["Bad", "good"], "bad!", "Bad"),
        # a negated label
        (["negative", "positive"], "not positive", None),
        (["negative", "positive"], 'It is not "positive".', None),
        (["negative", "positive"], "not **positive**", None),
        (["negative", "positive"], "not (really) positive", None),
        (["negative", "positive"], "No, positive.", "positive"),
        (["negative", "positive"], "Not sure. Positive!", "positive"),
        (["Bad", "bad"], "Bad badge", "Bad"),
        (["Bad", "bad"], "BAD, a badge", None),
        (["negative", "positive"], "It isn't really positive.", None),
        (["negative", "positive"], "non-positive", None),
        (["negative", "positive"], "No, it is positive.", "positive"),
        (["no", "yes"], "No.", "no"),
        # signs
        (["+", "-"], "-", "-"),
        (["+", "-"], "The answer is: +.", "+"),
        (["+", "-"], "+ or -", None),
        (["c", "c++", "c#"], "It is C++.", "c++"),
        (["c", "java"], "c++", None),
        (["+1", "-1", "1"], "The score is -1.", "-1"),
        (["+1", "-1", "1"], "**+1**", "+1"),
        (["0", "1"], "-1", None),
        (["0", "1"], "the answer is 1.", "1"),
        (["3", "4"], "3.5", None),
        (["A", "A-", "B"], "I give it an A-", "A-"),
        (["A", "B"], "A-", None),
    ],
)
def test_a_label_among_others(labels, response, label):
    assert class_labels.parse_label(response, labels) == label
    assert class_labels.parse_label(response, labels[::-1]) == label


WORDS = st.text("abAB +-#1", min_size=1, max_size=6).map(normal_label).filter(bool)


@hypothesis.given(
    labels=st.lists(WORDS, min_size=2, max_size=6, unique_by=str.casefold),
    around=st.sampled_from(["{}", "{}.", '"{}"', "**{}**", " ({})! ", "`{}`\n"]),
    change=st.sampled_from([str, str.upper, str.lower]),
)
def test_a_label_in_any_case_and_punctuation_is_itself_whatever_the_others(labels, around, change):
    label = labels[0]
    text = around.format(change(label))
    assert class_labels.parse_label(text, labels) == label
    assert class_labels.parse_label(text, labels[::-1]) == label
    assert class_labels.parse_label(label, [*labels, label.swapcase(), f"x {label}"]) == label


def test_softmax():
    assert likelihood.softmax([0.0, math.log(3)]) == pytest.approx([0.25, 0.75])
    assert likelihood.softmax([-5000.0, -5000.0]) == [0.5, 0.5]


# --- the program -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    tweets = [
        {"text": f"{'I love' if n % 3 else 'I hate'} number {n}", "label": "yes" if n % 3 else "no"}
        for n in range(30)
    ]
    pairs = [
        {"prompt": f"Define the word number {n}.", "completion": f"It is | {n}.\nReally."}
        for n in range(6)
    ]
    quality = [
        {**pairs[0], "completion": "It is a thing that counts other things.", "quality": "good"},
        {**pairs[1], "completion": "a a a a a a a a a a a a a a a a a a", "quality": "poor"},
    ]
    texts = [{"text": f"Plain text number {n}."} for n in range(4)]
    for name, rows in (
        ("tweets", tweets),
        ("pairs", pairs),
        ("quality", quality),
        ("texts", texts),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def etude(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(tiny_model, files, data_file, run, *overrides):
    result = etude(
        "train",
        "--preset",
        "cpu",
        f"model.name={tiny_model}",
        f"dataset.train={files}/{data_file}",
        f"dataset.test={files}/{data_file}",
        "dataset.validation=null",
        "training.learning_rate=0.05",
        "training.num_epochs=4",
        f"output.dir={run}",
        *overrides,
    )
    assert result.exit_code == 0, result.output
    return run


@pytest.fixture(scope="module")
def classifier(tiny_model, files, tmp_path_factory):
    return train(tiny_model, files, "tweets.jsonl", tmp_path_factory.mktemp("runs") / "classifier")


@pytest.mark.parametrize("method", ["likelihood", "generate"])
def test_a_report_on_labels_agrees_with_scikit_learn(classifier, files, method):
    result = etude("evaluate", classifier, "--base", f"evaluation.method={method}")
    assert result.exit_code == 0, result.output
    folder = max(classifier.glob("evaluation*"), key=lambda path: path.stat().st_mtime)
    found = json.loads((folder / "report.json").read_text())
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").open()]
    assert len(lines) == 30
    truth = [line["label"] for line in lines]
    assert found["method"] == method
    for name in ("base", "tuned"):
        predicted = [line[name]["predicted"] or "?" for line in lines]
        figures = found["models"][name]
        assert figures["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
        f1 = f1_score(truth, predicted, labels=["no", "yes"], average="macro", zero_division=0)
        assert figures["macro"]["f1"] == pytest.approx(f1)
        matrix = confusion_matrix(truth, predicted, labels=["no", "yes", "?"])[:2]
        assert figures["confusion"] == matrix[:, : len(figures["columns"])].tolist()
        assert figures["unparseable"] == predicted.count("?")
        low, high = figures["intervals"]["accuracy"].values()
        assert low <= figures["accuracy"] <= high
        assert (folder / f"confusion-{name}.png").read_bytes().startswith(b"\x89PNG")
    if method == "likelihood":
        assert found["models"]["tuned"]["accuracy"] > found["models"]["base"]["accuracy"]
    else:  # the random base writes no label, and that is not counted as one of them
        assert found["models"]["base"]["unparseable"] > 0
        assert "unparseable" in (folder / "report.md").read_text()
    assert "McNemar" in result.output
    assert "accuracy [95% interval]" in result.output


def test_an_evaluation_never_overwrites_another(classifier, files):
    etude("evaluate", classifier)
    before = {path: path.read_bytes() for path in classifier.glob("evaluation*/report.json")}
    assert before
    assert etude("evaluate", classifier).exit_code == 0
    after = {path: path.read_bytes() for path in classifier.glob("evaluation*/report.json")}
    assert len(after) == len(before) + 1
    assert all(after[path] == content for path, content in before.items())
    out = next(iter(before)).parent
    refused = etude("evaluate", classifier, "--out", out)
    assert refused.exit_code == 2
    assert "holds a report already" in refused.output


def test_one_text_gets_its_labels(classifier):
    result = etude("evaluate", classifier, "--text", "I love number 4")
    assert result.exit_code == 0, result.output
    lines = re.findall(r"^(yes|no) +([0-9.]+)%$", result.output, re.MULTILINE)
    assert {label for label, _ in lines} == {"yes", "no"}
    shares = [float(share) for _, share in lines]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert shares[0] >= shares[1]


def test_a_report_on_responses(tiny_model, files, tmp_path):
    run = train(tiny_model, files, "pairs.jsonl", tmp_path / "run", "generation.max_new_tokens=12")
    result = etude("evaluate", run, "--base", "evaluation.batch_size=4")
    assert result.exit_code == 0, result.output
    found = json.loads((run / "evaluation" / "report.json").read_text())
    base, tuned = found["models"]["base"], found["models"]["tuned"]
    assert tuned["perplexity"] < base["perplexity"]
    assert sum(tuned["quality_labels"].values()) == 6
    assert found["comparison"]["second_likelier"] == 6
    assert "Wilcoxon" in result.output
    # Perplexity by transformers' own loss, row by row.
    target = opening.open_target(str(run), [])
    model = target.base.model
    total = tokens = 0
    table = dataset.read(f"{files}/pairs.jsonl", target.config.dataset)
    for row in table.rows:
        (example,) = target.renderer.render(row.messages)
        labels = [i if s else -100 for i, s in zip(example.ids, example.supervised, strict=True)]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([example.ids]), labels=torch.tensor([labels])).loss
        total += float(loss) * sum(example.supervised)
        tokens += sum(example.supervised)
    assert base["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    # A bar or a line break in a text must not break the table.
    markdown = (run / "evaluation" / "report.md").read_text()
    rows = [line for line in markdown.splitlines() if line.startswith("| Define")]
    assert len(rows) == 5
    assert all(line.replace("\\|", "").count("|") == 5 for line in rows)
    # Every row keeps its loss, by which two runs are compared.
    text = (run / "evaluation" / "predictions.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    won = sum(line["tuned"]["loss"] < line["base"]["loss"] for line in lines)
    assert won == found["comparison"]["second_likelier"]
    twice = etude("runs", run, run)
    assert "Cannot tell, it may be chance. The reference is" in " ".join(twice.output.split())


def test_one_text_gets_a_response_its_quality_and_perplexity(tiny_model):
    result = etude(
        "evaluate", tiny_model, "--text", "What is tea?", "generation.max_new_tokens=8",
        "generation.seed=1", "training.use_cpu=true",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for word in ("response", "quality", "repetition", "perplexity"):
        assert word in result.output


def test_a_report_counts_the_rows_that_were_skipped(tiny_model, files, tmp_path):
    flawed = tmp_path / "flawed.jsonl"
    flawed.write_text((files / "quality.jsonl").read_text() + '{"prompt": "a", "completion": ""}\n')
    arguments = ["evaluate", tiny_model, "--data", flawed, "--out", tmp_path / "out"]
    result = etude(*arguments)
    assert result.exit_code == 2 and "flawed.jsonl:3: completion is empty" in result.output
    result = etude(*arguments, "dataset.on_bad_row=skip")
    assert result.exit_code == 0, result.output
    assert "test: 1 of 3 rows dropped (skipped: completion is empty): line 3" in result.output
    found = json.loads((tmp_path / "out" / "report.json").read_text())["data"]
    assert found["rows"] == 2 and found["dropped"] == {"skipped: completion is empty": [3]}
    page = (tmp_path / "out" / "report.md").read_text()
    assert "- dropped: 1 (skipped: completion is empty)" in page


def test_given_quality_labels_are_compared_with_the_heuristics(tiny_model, files, tmp_path):
    result = etude(
        "evaluate", tiny_model, "--data", files / "quality.jsonl", "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "report.json").read_text())["models"]["heuristics"]
    assert found["labels"] == ["good", "fair", "poor"]
    assert found["accuracy"] == 1.0
    assert "method heuristics)." in (tmp_path / "out" / "report.md").read_text()
    again = etude(
        "evaluate", tiny_model, "--data", files / "quality.jsonl", "--out", tmp_path / "out"
    )
    assert again.exit_code == 2 and "holds a report already" in again.output


@pytest.mark.parametrize("method", ["likelihood", "generate"])
def test_rows_beyond_the_window_are_named(tiny_model, tmp_path, method):
    rows = tmp_path / "rows.jsonl"
    texts = ["fine", "so " * 5000, "dull"]
    rows.write_text("".join(json.dumps({"text": t, "label": "a"}) + "\n" for t in texts))
    result = etude("evaluate", tiny_model, "--data", rows, "--out", tmp_path / "out",
                   f"evaluation.method={method}", "dataset.labels=[a, b]")  # fmt: skip
    assert result.exit_code == 2, result.output
    assert "1 row too long for the model's window of 512 tokens" in result.output
    assert "rows.jsonl:2: " in result.output and "rows.jsonl:1" not in result.output


def test_the_perplexity_of_a_cut_response_leaves_its_missing_end_out(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(
        responses, "sequence_losses", lambda model, examples, *_: (seen.extend(examples), [1.0])[1]
    )
    for finished in (True, False):
        said = generation.Response("Well then.", 3, finished)
        monkeypatch.setattr(generation, "generate", lambda *_, said=said, **__: [said])
        evaluation.show_text(Model(tiny, tiny.base.model), "Well?")
    whole, cut = seen
    assert whole.ids == cut.ids and sum(whole.supervised) == sum(cut.supervised) + 1
    last = len(whole) - 1 - whole.supervised[::-1].index(True)
    assert whole.ids[last] == tiny.renderer.end_of_turn and not cut.supervised[last]


def test_raw_text_gets_a_perplexity(tiny_model, files, tmp_path):
    result = etude(
        "evaluate", tiny_model, "--data", files / "texts.jsonl", "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "report.json").read_text())["models"]["model"]
    assert found["perplexity"] > 1
    assert "exact_match" not in found


def test_only_rows_with_a_quality_are_compared(tiny_model, files, tmp_path):
    rows = [json.loads(line) for line in (files / "quality.jsonl").read_text().splitlines()]
    first = {"prompt": "Define x.", "completion": "No judgement was given of this one."}
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in [first, *rows]))
    result = etude("evaluate", tiny_model, "--data", mixed, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    lines = [json.loads(x) for x in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [(x["line"], x["heuristics"]["predicted"]) for x in lines] == [(2, "good"), (3, "poor")]


def test_rows_that_cannot_be_measured_are_named_before_anything_is_written(tiny_model, tmp_path):
    long = {"prompt": "why " * 600, "completion": "So."}
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n" + json.dumps(long) + "\n")
    result = etude("evaluate", tiny_model, "--data", file, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "cannot be measured" in result.output and "line 2" in result.output
    assert not list((tmp_path / "out").glob("*"))


def broken(tiny_model, folder, change):
    """The tiny model with one of its tensors changed."""
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = change(weights[name])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def poisoned(weight):
    weight[3, 4] = math.nan
    return weight


@pytest.fixture(scope="module")
def nan_model(tiny_model, tmp_path_factory):
    return broken(tiny_model, tmp_path_factory.mktemp("nan") / "model", poisoned)


NAN = "1 of 20 tensors (model.layers.1.mlp.up_proj.weight). Copy the model again"


@pytest.mark.parametrize(
    ("file", "settings", "row"),
    [
        ("tweets", [], "tweets.jsonl:1, "),
        ("tweets", ["evaluation.method=generate", "evaluation.batch_size=2"], "tweets.jsonl:"),
        ("pairs", [], "pairs.jsonl:1, "),
        ("texts", [], "texts.jsonl:1, "),
    ],
)
def test_a_model_with_nan_is_measured_by_nothing(nan_model, files, tmp_path, file, settings, row):
    result = etude("evaluate", nan_model, "--data", files / f"{file}.jsonl", "--out",
                   tmp_path / "out", "training.use_cpu=true", *settings)  # fmt: skip
    assert result.exit_code == 2, result.output
    assert "is not a finite number: " in result.output
    assert row in result.output and NAN in result.output
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "{}", "--text", "Well?"),
        ("evaluate", "{}", "--text", "Well?", "dataset.labels=[a, b]"),
        ("chat", "{}", "--prompt", "Well?"),
        ("chat", "{}", "--prompt", "Well?", "generation.temperature=0"),
    ],
)
def test_a_model_with_nan_answers_nothing(nan_model, command):
    result = etude(*(part.format(nan_model) for part in command), "training.use_cpu=true")
    assert result.exit_code == 2, result.output
    assert "is not a finite number" in result.output and NAN in result.output
    assert "Traceback" not in result.output


def test_finite_weights_that_overflow_are_not_called_broken(tiny_model, files, tmp_path):
    huge = broken(tiny_model, tmp_path / "huge", lambda weight: weight * 1e38)
    result = etude("evaluate", huge, "--data", files / "tweets.jsonl", "--out", tmp_path / "out",
                   "model.dtype=float32", "training.use_cpu=true")  # fmt: skip
    assert result.exit_code == 2, result.output
    assert "The model's weights are finite" in result.output
    assert "tweets.jsonl:1" in result.output


def test_only_the_row_whose_own_loss_is_not_finite_is_named(tiny, monkeypatch):
    examples = [Example([5, 6 + n, 7], [False, True, True], f"x.jsonl:{n}") for n in range(4)]
    true_losses = packing.token_losses

    def losses(model, batch):
        found = true_losses(model, batch)
        # A pass shares its numbers: all of it is lost.
        return found * math.nan if (batch.input_ids == 8).any() else found

    monkeypatch.setattr(packing, "token_losses", losses)
    with pytest.raises(UserError, match=r"The loss is .*: x.jsonl:2\. The model's weights are"):
        likelihood.sequence_losses(tiny.base.model, examples, tiny.config)
    monkeypatch.undo()
    assert len(likelihood.sequence_losses(tiny.base.model, examples, tiny.config)) == 4


def test_a_perplexity_beyond_all_numbers_gives_its_loss():
    assert responses.mean_and_perplexity(8000.0, 10) == {"perplexity": None, "loss": 800.0}
    assert report.perplexity({"perplexity": None, "loss": 800.0}) == "over 1e308 (loss 800.0)"
    assert report.perplexity(responses.mean_and_perplexity(3 * math.log(2), 3)) == "2.00"


def test_no_report_holds_a_number_that_is_none(tmp_path):
    figures = {"kind": "responses", "perplexity": math.nan, "loss": 1.0}
    result = {"models": {"model": figures}, "target": "x", "method": "greedy", "base": "b", "given": [],
              "data": {"rows": 1, "source": "s", "format": "text", "dropped": {}, "drawn": ""}}  # fmt: skip
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write_evaluation(result, {}, [], tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, sample_tokenizer):
    """A tiny model with learned positions, which fails beyond its window of 64 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2") / "model"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(sample_tokenizer), n_positions=64, n_embd=16, n_layer=1,
                        n_head=2, bos_token_id=1, eos_token_id=2)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    sample_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["validate", "train"])
@pytest.mark.parametrize(
    ("rows", "long"),
    [
        ([{"prompt": "Why?", "completion": "So " * n} for n in (1, 99, 2, 88)], (2, 4)),
        ([{"text": "so " * n, "label": "ab"[n % 2]} for n in (1, 4, 2, 77)], (4,)),
        ([{"text": "so " * n} for n in (70, 1, 2, 3)], (1,)),
    ],
    ids=["answers", "labels", "text"],
)
def test_rows_beyond_the_window_of_learned_positions(gpt2, tmp_path, command, rows, long):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        command, "--preset", "cpu", f"model.name={gpt2}", f"dataset.train={file}",
        "dataset.validation_split=0", "dataset.validation=null", "dataset.test=null",
        "dataset.instruction=Of {labels} take {text}", "lora.target_modules=[c_attn]",
        f"output.dir={tmp_path}/run", "dataset.max_length=200", "training.max_steps=1",
        "training.warmup_steps=0",
    ]  # fmt: skip
    result = etude(*arguments)
    assert result.exit_code == 2, result.output
    assert "too long for the model's window of 64 tokens" in result.output
    named = re.findall(r"rows.jsonl:(\d+): [0-9]+ tokens", result.output)
    assert tuple(map(int, named)) == long
    assert "dataset.max_length: 64" in result.output
    if command == "validate":  # within the window a larger max_length is no fault
        short = [row for n, row in enumerate(rows, 1) if n not in long]
        file.write_text("".join(json.dumps(row) + "\n" for row in short))
        assert etude(*arguments).exit_code == 0
        assert etude(*arguments, "dataset.max_length=64").exit_code == 0


@pytest.mark.parametrize("file", ["pairs", "texts", "tweets"])
def test_an_evaluation_beyond_the_window_names_its_rows(gpt2, tmp_path, file):
    rows = {
        "pairs": [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b " * 99}],
        "texts": [{"text": "a"}, {"text": "a " * 99}],
        "tweets": [{"text": "a", "label": "a"}, {"text": "a " * 99, "label": "b"}],
    }[file]
    path = tmp_path / f"{file}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = etude("evaluate", gpt2, "--data", path, "--out", tmp_path / "out",
                   "training.use_cpu=true", "dataset.instruction=Of {labels} take {text}")  # fmt: skip
    assert result.exit_code == 2, result.output
    assert f"{file}.jsonl:2: " in result.output and f"{file}.jsonl:1" not in result.output
    assert "too long for the model's window of 64 tokens" in result.output


def test_labels_that_fill_the_window_are_blamed(gpt2, tiny_model, tmp_path):
    rows = [{"text": f"t{n}", "label": f"class number {n // 2}"} for n in range(260)]
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = "Every prompt names all 130 labels: name fewer"
    result = etude("evaluate", tiny_model, "--data", file, "--out", tmp_path / "out",
                   "training.use_cpu=true")  # fmt: skip
    assert result.exit_code == 2 and re.search(said, result.output), result.output
    for length in (64, 8192):  # none left within max_length; beyond the window
        result = etude("validate", "--preset", "cpu", f"model.name={gpt2}", f"dataset.train={file}",
                       "dataset.test=null", f"dataset.max_length={length}")  # fmt: skip
        assert result.exit_code == 2 and re.search(said, result.output), result.output
    assert dataset.many_labels(["a", "b"]) == ""


@pytest.mark.parametrize(("dtype", "merged"), [("float32", True), ("bfloat16", False)])
def test_what_answers_is_what_was_proven(classifier, dtype, merged):
    settings = [f"model.dtype={dtype}", "training.use_cpu=true"]
    target = opening.open_target(str(classifier), settings)
    model = target.tuned()
    assert merged != any("lora" in name for name, _ in model.named_parameters())
    other = opening.open_target(str(classifier), settings)
    proven = lora.load_adapter(other.base.model, other.adapter)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        difference = (model(ids).logits - proven(ids).logits).abs().max()
    assert difference < 1e-4 if merged else difference == 0


def test_a_report_keeps_the_settings_in_force_and_those_that_were_given(classifier, tmp_path):
    given = ["evaluation.max_rows=4", "dataset.instruction=Of {labels} take {text}"]
    out = tmp_path / "out"
    result = etude("evaluate", classifier, "--out", out, *given)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "report.json").read_text())
    assert found["settings"]["dataset.instruction"] == "Of {labels} take {text}"
    assert found["settings"]["dataset.labels"] == ["no", "yes"]
    assert found["settings"]["evaluation.method"] == "likelihood"
    assert found["given"] == given
    assert f"- given: {given[1]}" in (out / "report.md").read_text()
    assert found["models"]["tuned"]["dtype"] == "float32"


def test_a_dollar_sign_in_a_label_and_many_labels_are_drawn(tmp_path):
    labels = ["$5_{-$9", "b", "unparseable"]
    figures = {"columns": labels, "truth": labels[:2], "predicted": [labels[0], None]}
    plots.confusion_plot(figures, "title", tmp_path / "a.png")
    many = [f"label {n}" for n in range(80)]
    figures = {"columns": many, "truth": many, "predicted": many}
    plots.confusion_plot(figures, "title", tmp_path / "b.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lora.r=4"], "which run or model?"),
        (["runs/none"], "no such run"),
        (["a", "b"], "one name is expected"),
        (["{run}", "--text", " "], "one text that is not empty"),
        (["{run}", "--data", "nothing.jsonl"], "no such file"),
        (["{run}", "dataset.test=null"], "dataset.test is null"),
        (["{tiny}", "--base", "--data", "{files}/tweets.jsonl"], "is no run"),
        (["{run}", "evaluation.metod=x"], "did you mean evaluation.method?"),
    ],
)
def test_mistakes_are_reported(classifier, tiny_model, files, arguments, words):
    result = etude(
        "evaluate", *(a.format(run=classifier, tiny=tiny_model, files=files) for a in arguments)
    )
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output


def test_summary_and_verdict_say_what_the_figures_say():
    figures = {
        "kind": "responses", "perplexity": 3.0, "exact_match": 0.5, "rouge_l": 0.25, "chrf": 12.0,
        "finished": 0.95, "quality": 0.8, "quality_labels": {"good": 3, "fair": 2, "poor": 1},
    }  # fmt: skip
    result = {"models": {"base": figures, "tuned": figures}}
    head, rows = report.summary(result)
    assert head == ["", "base", "tuned"]
    assert ["stopped at EOS", "95.0%", "95.0%"] in rows
    assert ["good / fair / poor", "3 / 2 / 1", "3 / 2 / 1"] in rows
    comparison = {"only_first_right": 1, "only_second_right": 40, "p_value": 1e-9}
    assert "p < 0.0001" in report.verdict(comparison)
