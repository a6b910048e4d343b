"""Every key of config.yml changes what a program does: none is read by nothing."""

import functools
import json
import re
import types
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

from etude import train_with_config
from etude.config.loading import key_paths, load_config
from etude.data import dataset, splits
from etude.engine import generation
from etude.engine.setup import configure_engine
from etude.errors import UserError
from etude.measure import labels as class_labels
from etude.measure import responses
from etude.model import read_table
from etude.models import device, loading, lora
from etude.runs import opening
from etude.training import order, resuming, trainer
from etude.training.reporter import Reporter


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
    turns = [{"role": role, "content": "hm"} for role in ("user", "assistant") * 2]
    (folder / "talk.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (folder / "thinking.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last and m.role =="
        " 'assistant' %}{{ '<think>\n</think>\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is false %}{{ '<think>\n</think>\n' }}{% endif %}{% endif %}"
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

        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=9, **shape))
        tuned = lora.attach(model, config.lora, "base")
        trained = {name: part for name, part in tuned.named_parameters() if part.requires_grad}
        for name, part in trained.items():
            if "lora_B" in name:
                torch.nn.init.constant_(part, 0.1)
        with torch.no_grad():
            answers = tuned.eval()(torch.tensor([[1, 2, 3]])).logits
            noisy = tuned.train()(torch.tensor([[1, 2, 3]])).logits
        return {n: part.shape for n, part in trained.items()}, answers.tolist(), noisy.tolist()

    def tables(config):
        renderer = opening.renderer_for(base(config), config)
        return {
            split: dataset.encode(table, renderer, config.dataset, split).examples
            for split, table in splits.read_splits(config.dataset, config.training.seed)[0].items()
        }

    def kept(config):
        try:
            return {split: len(part) for split, part in tables(config).items()}
        except UserError as error:
            return str(error)

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
        result = class_labels.measure_labels(
            None, opening.renderer_for(base(config), config), table, config
        )
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

    def weights(config):
        return opening.open_target(
            str(tiny_model), [f"model.dtype={config.model.dtype}"]
        ).base.model.dtype

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
    "model.dtype": ("weights", "bfloat16", []),
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
    "dataset.train_on": (
        "tables",
        "last",
        ["dataset.train={0}/talk.jsonl", "dataset.validation=null", "dataset.test=null"],
    ),
    "dataset.max_rows": ("tables", "5", []),
    "training.fp16": ("chosen", "true", ["training.use_cpu=false", "model.dtype=auto"]),
    "training.use_cpu": ("chosen", "false", []),
    "training.compile": ("engine", "true", []),
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
    "generation.thinking": ("tables", "false", ["model.chat_template={0}/thinking.jinja"]),
    "output.dir": ("folder", "{0}/elsewhere", []),
}


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


# --- trainings ---------------------------------------------------------------------------------

# Each is one short training, in which several keys differ from the first one.
TRAININGS = {
    "plain": ["training.warmup_steps=0", "training.save_steps=2"],
    "rates": [
        "training.learning_rate=1e-3", "training.lr_scheduler=constant", "training.warmup_steps=3",
        "training.weight_decay=0.1", "training.max_grad_norm=1e-4",
    ],
    "wide": ["training.batch_size=2"],
    "times": [
        "training.max_steps=5", "training.logging_steps=1", "training.eval_steps=1",
        "training.save_steps=1", "training.save_total_limit=3", "training.warmup_steps=0",
    ],
    "inside": [
        "training.bf16=true", "training.gradient_checkpointing=true", "training.num_epochs=1",
        "training.gradient_accumulation_steps=8", "output.report_to=[tensorboard]",
    ],
    "patience": [
        "training.early_stopping_patience=1", "training.eval_steps=1", "training.learning_rate=1e-12",
        "training.seed=1",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """Trains as one of TRAININGS says, and gives what was seen of it."""
    folder = tmp_path_factory.mktemp("trainings")
    pairs = [{"prompt": f"Question {n}?", "completion": "word " * (n + 1)} for n in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    common = [
        f"model.name={tiny_model}", f"dataset.train={folder}/pairs.jsonl", "dataset.max_length=48",
        "dataset.validation_split=0.2", "lora.r=4", "training.compile=false", "training.num_epochs=2",
        "training.gradient_accumulation_steps=4",
    ]  # fmt: skip

    @functools.cache
    def train(name):
        seen = Seen()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("etude.runs.proof.in_a_new_process", lambda folder: "left out")
            fit = trainer.fit
            patch.setattr(trainer, "fit", lambda *given: seen.watch(fit, *given))
            output = f"output.dir={folder}/{name}"
            config = load_config(None, ["cpu"], [*common, *TRAININGS[name], output])
            seen.steps = train_with_config.run_training(config, Reporter()).results["steps"]
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        seen.lines = [json.loads(line) for line in lines]
        seen.files = {path.name for path in (folder / name).rglob("*")}
        return seen

    return train


class Seen:
    """What happens in a training: at each step of the optimizer, and in each pass."""

    def __init__(self):
        self.rates, self.decays, self.norms = [], [], []
        self.passes, self.layers, self.kinds = [], 0, set()

    def watch(self, fit, *given):
        hooks = [
            register_optimizer_step_pre_hook(self.on_step),
            register_module_forward_pre_hook(self.on_entry),
            register_module_forward_hook(self.on_forward),
        ]
        try:
            return fit(*given)
        finally:
            for hook in hooks:
                hook.remove()

    def on_step(self, optimizer, *_):
        (group,) = [group for group in optimizer.param_groups if group["params"]]
        self.rates.append(group["lr"])
        self.decays.append(group["weight_decay"])
        grads = [part.grad for part in group["params"]]
        self.norms.append(torch.nn.utils.get_total_norm(grads).item())

    def on_entry(self, module, *_):
        # Checkpointing enters what is within a layer once more in the backward pass.
        self.layers += module.training and type(module).__name__ == "LlamaAttention"

    def on_forward(self, module, inputs, output):
        kind = type(module).__name__
        if module.training and kind == "Embedding":
            self.passes.append(inputs[0].flatten().tolist())
        if module.training and kind == "Linear":
            self.kinds.add(str(output.dtype))

    def at(self, key):
        """The steps at which `key` was logged."""
        return [line["step"] for line in self.lines if key in line]

    @property
    def kept(self):
        """The steps of the checkpoints that are there at the end."""
        names = [name for name in self.files if re.fullmatch(r"checkpoint-\d+", name)]
        return sorted(int(name.rpartition("-")[2]) for name in names)


# key -> (which training, what to look at, what is seen there in the first training, and in this one)
EFFECTS = {
    "training.learning_rate": ("rates", lambda seen: max(seen.rates), 2e-4, 1e-3),
    "training.lr_scheduler": ("rates", lambda seen: seen.rates[-1] == max(seen.rates), False, True),
    "training.warmup_steps": ("rates", lambda seen: seen.rates.index(max(seen.rates)), 0, 3),
    "training.weight_decay": ("rates", lambda seen: set(seen.decays), {0.0}, {0.1}),
    "training.max_grad_norm": ("rates", lambda seen: max(seen.norms) > 1.01e-4, True, False),
    "training.batch_size": ("wide", lambda seen: max(map(len, seen.passes)) > 48, False, True),
    "training.num_epochs": ("inside", lambda seen: len(seen.passes), 2 * 16, 16),
    "training.max_steps": ("times", lambda seen: seen.steps, 8, 5),
    "training.logging_steps": ("times", lambda seen: seen.at("loss"), [1], [1, 2, 3, 4, 5]),
    "training.eval_steps": ("times", lambda seen: seen.at("eval_loss"), [4, 8], [1, 2, 3, 4, 5]),
    "training.save_steps": ("times", lambda seen: seen.kept[-1] - seen.kept[-2], 2, 1),
    "training.save_total_limit": ("times", lambda seen: len(seen.kept), 2, 3),
    "training.bf16": ("inside", lambda seen: "torch.bfloat16" in seen.kinds, False, True),
    "training.gradient_checkpointing": (
        "inside",
        lambda seen: seen.layers / len(seen.passes),
        2,
        4,
    ),
    "training.seed": ("patience", lambda seen: seen.passes[:4], None, None),
    "training.gradient_accumulation_steps": (
        "inside",
        lambda seen: len(seen.passes) / seen.steps,
        4,
        8,
    ),
    "output.report_to": (
        "inside",
        lambda seen: any(name.startswith("events.out.tfevents") for name in seen.files),
        False,
        True,
    ),
    "training.early_stopping_patience": ("patience", lambda seen: seen.steps < 8, False, True),
}


@pytest.mark.parametrize("key", EFFECTS)
def test_the_key_changes_a_training(key, trained):
    name, look, before, after = EFFECTS[key]
    found, other = look(trained("plain")), look(trained(name))
    assert found != other
    if before is not None:
        assert (found, other) == (before, after)


def test_every_key_is_tested():
    assert sorted([*PROBES, *EFFECTS]) == sorted(key_paths())
    assert len({*PROBES, *EFFECTS}) == len(PROBES) + len(EFFECTS) > 50
