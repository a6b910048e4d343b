"""A tiny random Llama with an adapter, and examples for it."""

import torch
from torch import nn

from etude.config.schema import Lora
from etude.conversation.encoding import Example
from etude.models import lora


def llama(layers=2, name="tiny", dropout=0.0):
    """A tiny random Llama with an adapter that already changes something, as in training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = lora.attach(LlamaForCausalLM(config), Lora(r=4, alpha=8, dropout=dropout), str(name))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    return model.train()


def texts(*lengths):
    torch.manual_seed(1)
    return [
        Example([1, 2, *torch.randint(3, 97, (n,)).tolist()], [False] * 2 + [True] * n)
        for n in lengths
    ]
