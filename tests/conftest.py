"""What several test files share: the real sample model, a tiny random one, and two tokenizers."""

import json
import os

# Before anything imports huggingface_hub: no test asks the network.
os.environ["HF_HUB_OFFLINE"] = "1"

from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest

# No deadline: a slow machine is no failure. Derandomised: the same examples on every machine.
hypothesis.settings.register_profile("etude", deadline=None, derandomize=True)
hypothesis.settings.load_profile("etude")

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def qwen_file() -> Path:
    """Qwen's own vocabulary, out of the package dashscope, which is found but never imported."""
    spec = find_spec("dashscope")
    assert spec and spec.submodule_search_locations, "pip install --no-deps dashscope==2.0.2"
    return Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"


@pytest.fixture(scope="session")
def sample():
    """The bundled sample model, opened as the programs open it. Its weights must stay as they are."""
    from etude.runs import opening

    return opening.open_target("smollm2-135m", ["model.dtype=float32", "training.use_cpu=true"])


@pytest.fixture(scope="session")
def sample_tokenizer():
    """The sample model's tokenizer, without the weights."""
    from transformers import AutoTokenizer

    from etude.models import gguf, loading

    return AutoTokenizer.from_pretrained(loading.locate(gguf.SAMPLE), local_files_only=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, sample_tokenizer) -> Path:
    """A folder with a random Llama of 2 layers and the sample's tokenizer: loads in no time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(sample_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,  # far from uniform, so that a wrong mask shows in the loss
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    sample_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with 40 questions and answers, pairs.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def qwen_tokenizer():
    """Qwen2-1.5B's tokenizer, built from Qwen's own vocabulary file."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    vocab, merges = TikTokenConverter().extract_vocab_merges_from_model(str(qwen_file()))
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def renderer(sample_tokenizer):
    """The renderer of the sample model's own template."""
    from etude.conversation.renderer import Renderer

    return Renderer(sample_tokenizer)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file into the current folder and gives its bare name, as messages have it."""
    monkeypatch.chdir(tmp_path)

    def _write(name, content):
        if isinstance(content, list):
            from data_files import encoded

            content = encoded(name, content)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return _write
