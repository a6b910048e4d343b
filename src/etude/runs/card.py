"""README.md of a run: the model card that hubs and people read."""

from pathlib import Path
from typing import Any

from etude.config.yaml import scalar
from etude.errors import command
from etude.models.gguf import SAMPLE
from etude.runs.folder import CONFIG
from etude.runs.report import markdown_cell as cell


def model_card(config: Any, manifest: dict[str, Any], parameters: str) -> str:
    """README.md of a run folder: what the adapter is, how it was trained, how to load it."""
    results, train = manifest["results"], manifest["data"]["train"]
    loss = f"{results['eval_loss']:.4f}" if results.get("eval_loss") is not None else "not measured"
    name, folder = config.model.name, config.output.dir
    converted = name == SAMPLE or name.endswith(".gguf")
    source = f"locate({name!r})" if converted else repr(name)
    folder_import = "from etude.models.loading import locate\n" if converted else ""
    return f"""---
base_model: {scalar(name)}
library_name: peft
tags: [lora, etude]
---

# {cell(Path(folder).name)}

A LoRA adapter for `{cell(name)}` ({manifest["base"]["identity"]}), trained with Etude
{manifest["environment"]["etude"]}. {parameters}.

| | |
| --- | --- |
| data | `{cell(config.dataset.train)}`, {train["kept"]:,} rows, format {train["format"]} |
| rank, alpha, layers | {config.lora.r}, {config.lora.alpha:g}, {cell(", ".join(config.lora.target_modules))} |
| steps | {results["steps"]:,} of {config.training.rows_per_step} examples |
| learning rate | {config.training.learning_rate:g}, {config.training.lr_scheduler} |
| validation loss | {loss} nats per token |

`{command("etude", "chat", Path(folder))}` chats with it;
`{command("etude", "evaluate", Path(folder), "--base")}` measures it;
`{command("etude", "train", Path(folder, CONFIG), "output.dir=runs/again")}` trains it
again. With PEFT alone:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
{folder_import}
base = AutoModelForCausalLM.from_pretrained({source})
model = PeftModel.from_pretrained(base, {folder!r})
```

`manifest.json` holds versions, seeds, data fingerprints and the chat format.
"""
