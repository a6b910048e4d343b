"""Every key of config.yml changes what a program does: none is read by nothing."""

import json
import types
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from etude.config.loading import key_paths, load_config
from etude.data import dataset
from etude.engine import generation
from etude.engine.setup import configure_engine
from etude.errors import UserError
from etude.measure import labels as class_labels
from etude.measure import responses
from etude.model import read_table
from etude.models import device, loading, lora
from etude.runs import opening
from etude.training import order, resuming, trainer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Files for the data keys: 20 rows with other column names too, a template, a second set."""
    folder = tmp_path_factory.mktemp("keys")
    rows = [
        {"text": f"row {n} " + "x " * n, "label": "ab"[n % 2], "note": f"n{n}"} for n in range(20)
    ]
    for name, part in (("train", rows), ("other", rows[:7]), ("third", rows[3:9])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    flawed = [*rows, {"text": " ", "label": "a"}]
    (folder / "flawed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flawed))
    formatted = json.dumps({"text": "<|im_start|>user\nHi<|im_end|>"})
    (folder / "formatted.jsonl").write_text(f"{formatted}\n")
    (folder / "template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
    )
    return folder


@pytest.fixture
def observe(place, tiny_model, sample_tokenizer, monkeypatch):
    """One observer for each kind of key: what a program would do under a configuration."""
    base_settings = [
        f"model.name={tiny_model}",
        f"dataset.train={place}/train.jsonl",
        f"dataset.validation={place}/other.jsonl",
        f"dataset.test={place}/third.jsonl",
        "training.use_cpu=true",
        "model.dtype=float32",
    ]

    def settings(*overrides):
        return load_config(None, overrides=[*base_settings, *overrides])

    def base(config):
        return SimpleNamespace(tokenizer=sample_tokenizer)

    def loaded(config):
        seen = []

        def spy(source, **kwargs):
            seen.append((str(source), kwargs.get("revision")))
            raise OSError("stop here")

        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", spy)
        monkeypatch.setattr(loading, "hub_reachable", lambda: True)
        monkeypatch.setattr(
            "huggingface_hub.resolve_revision",
            lambda name, revision, **_: SimpleNamespace(resolved=revision),
        )
        with pytest.raises(UserError):
            loading.load_base(
                config.model.name, device.choose("float32", True), config.model.revision
            )
        return seen

    def template(config):
        return opening.renderer_for(base(config), config).state()

    def adapter(config):
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=9, **shape))
        tuned = lora.attach(model, config.lora, "base")
        found = tuned.peft_config["default"].to_dict()
        found["target_modules"] = sorted(found["target_modules"])
        return found

    def tables(config):
        renderer = opening.renderer_for(base(config), config)
        return {
            split: dataset.encode(table, renderer, config.dataset, split).examples
            for split, table in dataset.read_splits(config.dataset, config.training.seed)[0].items()
        }

    def kept(config):
        try:
            return {split: len(part) for split, part in tables(config).items()}
        except UserError as error:
            return str(error)

    def arguments(config):
        validated = bool(config.dataset.validation)
        cpu = device.choose("float32", True)
        found = trainer.arguments(config, cpu, place / "run", 48, validated)
        return {key: str(value) for key, value in found.to_dict().items()}

    def passes(config):
        captured = {}

        class Spy(trainer.StepTrainer):
            def __init__(self, **kwargs):
                captured.update(kwargs)
                raise KeyError("stop here")

        monkeypatch.setattr(trainer, "StepTrainer", Spy)
        with pytest.raises(KeyError):
            trainer.fit(None, config, device.choose("float32", True), tables(config), place, None)
        return [type(callback).__name__ for callback in captured["callbacks"]]

    def engine(config):
        from transformers import AutoModelForCausalLM

        # Whether there is a compiler belongs to another test.
        monkeypatch.setattr("etude.engine.compiling.compile_layers", lambda *_: None)
        cpu = device.choose("float32", True)
        model = lora.attach(AutoModelForCausalLM.from_pretrained(tiny_model), config.lora, "tiny")
        train = tables(config)["train"]
        done = str(configure_engine(model, config, cpu, train, steps(config)))
        kinds = Counter(type(module).__name__ for module in model.modules())
        return done, kinds

    def tested(config):
        table = read_table(config, None)
        return [row.line for row in table.rows]

    def method(config):
        calls = []

        def spy(kind, result):
            def record(*_):
                calls.append(kind)
                return result

            return record

        table = read_table(config, None)
        count = len(table.rows)
        answers = [generation.Response("a", 1, True)] * count
        monkeypatch.setattr(
            class_labels, "label_log_likelihoods", spy("likelihood", [[0.0, 1.0]] * count)
        )
        monkeypatch.setattr(class_labels, "respond", spy("generate", answers))
        monkeypatch.setattr(class_labels, "check_window", lambda *_: None)
        result = class_labels.measure_labels(None, None, table, config)
        return calls, result["intervals"]

    def judged(config):
        # Middling: a good form, but a refusal.
        response = generation.Response("I'm sorry, but I cannot say what tea is made of.", 9, True)
        return responses.judge("What is tea made of?", response, config)

    def batches(config):
        sizes = []

        def spy(model, renderer, prompts, settings, *_):
            sizes.append(len(prompts))
            return [generation.Response("a", 1, True)] * len(prompts)

        monkeypatch.setattr(generation, "generate", spy)
        renderer = opening.renderer_for(base(config), config)
        prompts = [[{"role": "user", "content": f"q{n}"}] for n in range(20)]
        model = types.SimpleNamespace(config=None)
        responses.respond(model, renderer, prompts, config, ["x:1"] * len(prompts))
        return sizes

    def sampled(config):
        seen = {}

        class Model:
            device, config = "cpu", None

            def generate(self, *, generation_config, input_ids, **_):
                seen.update(generation_config.to_dict())
                seen["random"] = float(torch.rand(()))
                return input_ids

        torch.manual_seed(99)
        renderer = opening.renderer_for(base(config), config)
        generation.generate(Model(), renderer, [[1, 2]], config.generation)
        return seen

    def chosen(config):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        t = config.training
        return device.choose(config.model.dtype, t.use_cpu, t.fp16, t.bf16)

    def steps(config):
        return order.step_count(config, 20)

    def folder(config):
        return resuming.open_folder(config, False), config.output.dir

    return SimpleNamespace(**locals())


# key -> (which observer, the changed value; {0} is the folder of files, further settings for both)
PROBES = {
    "model.name": ("loaded", "some/where", []),
    "model.revision": ("loaded", "abc123", ["model.name=some/where"]),
    "model.dtype": ("chosen", "bfloat16", []),
    "model.quantization": ("engine", "int8", []),
    "model.chat_template": ("template", "{0}/template.jinja", []),
    "lora.r": ("adapter", "16", []),
    "lora.alpha": ("adapter", "16", []),
    "lora.dropout": ("adapter", "0.1", []),
    "lora.target_modules": ("adapter", "[k_proj]", []),
    "lora.use_rslora": ("adapter", "true", []),
    "lora.use_dora": ("adapter", "true", []),
    "dataset.train": ("tables", "{0}/other.jsonl", []),
    "dataset.validation": ("tables", "{0}/third.jsonl", []),
    "dataset.test": ("tested", "{0}/other.jsonl", []),
    "dataset.validation_split": ("tables", "0.5", ["dataset.validation=null"]),
    "dataset.format": ("tables", "text", []),
    "dataset.columns": ("tables", "{{text: note}}", []),
    "dataset.ignore": ("tables", "[label]", []),
    "dataset.on_bad_row": ("kept", "skip", ["dataset.train={0}/flawed.jsonl"]),
    "dataset.labels": ("tables", "[a, b, c]", []),
    "dataset.instruction": ("tables", '"{{labels}}? {{text}}"', []),
    "dataset.system_prompt": ("tables", "Be brief.", []),
    "dataset.special_tokens": (
        "kept",
        "parse",
        ["dataset.train={0}/formatted.jsonl", "dataset.format=text"],
    ),
    "dataset.max_length": ("tables", "60", []),
    "dataset.overlength": ("tables", "drop", ["dataset.max_length=15", "dataset.format=text"]),
    "dataset.max_rows": ("tables", "5", []),
    "training.learning_rate": ("arguments", "1e-5", []),
    "training.batch_size": ("arguments", "4", []),
    "training.gradient_accumulation_steps": ("arguments", "2", []),
    "training.num_epochs": ("steps", "1", []),
    "training.max_steps": ("steps", "3", []),
    "training.lr_scheduler": ("arguments", "cosine", []),
    "training.warmup_steps": ("arguments", "0.1", []),
    "training.weight_decay": ("arguments", "0.1", []),
    "training.max_grad_norm": ("arguments", "0.5", []),
    "training.fp16": ("chosen", "true", ["training.use_cpu=false", "model.dtype=auto"]),
    "training.bf16": ("arguments", "true", []),
    "training.use_cpu": ("chosen", "false", []),
    "training.compile": ("engine", "true", []),
    "training.gradient_checkpointing": ("arguments", "true", []),
    "training.seed": ("arguments", "1", []),
    "training.logging_steps": ("arguments", "1", []),
    "training.eval_steps": ("arguments", "5", []),
    "training.save_steps": ("arguments", "10", []),
    "training.save_total_limit": ("arguments", "5", []),
    "training.early_stopping_patience": ("passes", "2", []),
    "evaluation.method": ("method", "generate", []),
    "evaluation.batch_size": ("batches", "3", []),
    "evaluation.max_rows": ("tested", "2", []),
    "evaluation.good_threshold": ("judged", "0.2", ["evaluation.fair_threshold=0.1"]),
    "evaluation.fair_threshold": ("judged", "0.1", []),
    "evaluation.bootstrap_samples": ("method", "500", []),
    "evaluation.confidence": ("method", "0.5", []),
    "generation.max_new_tokens": ("sampled", "5", []),
    "generation.temperature": ("sampled", "0.1", []),
    "generation.top_p": ("sampled", "0.5", []),
    "generation.top_k": ("sampled", "3", []),
    "generation.repetition_penalty": ("sampled", "1.2", []),
    "generation.seed": ("sampled", "7", []),
    "output.dir": ("folder", "{0}/elsewhere", []),
    "output.report_to": ("arguments", "[tensorboard]", []),
}


def test_every_key_has_a_probe():
    assert list(PROBES) == list(key_paths())
    assert len(PROBES) > 40


@pytest.mark.parametrize("key", PROBES)
def test_the_key_changes_behaviour(key, observe, place):
    watcher, changed, both = PROBES[key]
    look = getattr(observe, watcher)
    both = [setting.format(place) for setting in both]
    before = look(observe.settings(*both))
    again = look(observe.settings(*both))
    after = look(observe.settings(*both, f"{key}={changed.format(place)}"))
    # The control: the observer is steady, so a difference comes from the key.
    assert before == again
    assert before != after
