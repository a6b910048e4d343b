"""The new process of an export's proof: the written folder, as transformers alone opens it.

`python -m etude.exports.opened FOLDER QUESTIONS OUT` writes what was measured, as JSON, to OUT. It goes
through none of Etude's own loading, rendering and passes.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(folder: str, questions: str, out: str) -> None:
    """Open the model in `folder`, put the `questions` to it, and write what it says to the file `out`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = json.loads(Path(questions).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    model.eval()
    ends = model.generation_config.eos_token_id
    found = {
        "losses": [loss for group in asked["groups"] for loss in losses(model, group)],
        "prompts": [prompt_ids(tokenizer, **prompt) for prompt in asked["prompts"]],
        "stop_ids": ends if isinstance(ends, list) else [] if ends is None else [ends],
        "answers": answers(model, asked["ids"], asked["new_tokens"]),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def prompt_ids(tokenizer: Any, messages: list[Any], tools: list[Any] | None) -> list[int]:
    """What the folder's own template and tokenizer make of a prompt; nothing where the template refuses."""
    try:
        encoded = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_dict=True
        )
    except Exception:  # a template can fail in every way
        return []
    return list(encoded["input_ids"])


def losses(model: Any, group: Sequence[dict[str, Any]]) -> list[float]:
    """Summed -log P in nats of the supervised tokens of each answer; the answers have one prompt."""
    import torch

    start = group[0]["supervised"].index(1)
    rests = [one["ids"][start:] for one in group]
    width = max(map(len, rests))

    def padded(rows: list[list[int]]) -> Any:
        return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)

    with torch.inference_mode():
        prompt = torch.tensor([group[0]["ids"][:start]], device=model.device)
        begun = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        cache = begun.past_key_values
        cache.batch_repeat_interleave(len(group))
        ids = padded(rests)
        later = model(input_ids=ids, past_key_values=cache).logits[:, :-1]
        logits = torch.cat([begun.logits.expand(len(group), -1, -1), later], dim=1).float()
        # In rows: over a strided vocabulary float32 sums are off by 1e-4.
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids.flatten(), reduction="none"
        ).view_as(ids)
        supervised = padded([one["supervised"][start:] for one in group])
        return [float(loss) for loss in (each * supervised).double().sum(1)]


def answers(model: Any, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """The greedy answer to each prompt, ended by the stop tokens of the model's generation_config."""
    import torch

    written = []
    for ids in prompts:
        prompt = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=new_tokens,
            )
        written.append(output[0, len(ids) :].tolist())
    return written


if __name__ == "__main__":
    main(*sys.argv[1:])
