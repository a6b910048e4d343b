"""LoRA training side by side: Etude and its peers on the same rows, in turn, in separate processes.

python benchmarks/train.py --workload tweets --engines etude,etude-int8,trl,transformers,main --steps 8

Every engine gets the same token ids, the same supervised tokens, the same adapter (r=64, alpha 128,
q_proj and v_proj, no dropout), AdamW, constant learning rate 2e-4, clipping at 1.0, and steps of
the same examples. Medians over all timed steps of all rounds. The first step of a process stands
apart: it is the time from the loaded model to the end of the first step, with all preparation in
it (Etude's proof and compiling, from an empty cache; the warm-up of every engine). After the timed
steps one more runs with every matrix product noted; each is then timed alone, which gives the
share of a step that its bare products would take. The peers come from `pip install .[bench]`.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
ENGINES = ("etude", "etude-bf16", "etude-int8", "trl", "trl-bf16", "transformers", "main")
MODELS = ("smollm2-135m", "qwen2-1.5b-shape")
WORKLOADS = {
    "tweets": "data/tweets_sentiment.train.jsonl",
    "dictionary": "data/devils_dictionary.train.jsonl",
    "long": "data/devils_dictionary.train.jsonl",  # joined to conversations of 400-500 tokens
    "full": "data/devils_dictionary.train.jsonl",  # joined, and cut to 512 tokens or little less
}
LIBRARIES = ("etude", "torch", "transformers", "peft", "accelerate", "trl")
LEARNING_RATE = 2e-4
SEED = 42
PAD_TO = 512  # what the engine `main` pads every row to


# --- the rows --------------------------------------------------------------------------------


def make_steps(workload: str, rows: int, steps: int) -> list[list[dict[str, list[int]]]]:
    """The examples of every step as ids and labels (-100 where not supervised), in a fixed order."""
    import random

    from transformers import AutoTokenizer

    from etude.config.schema import Dataset
    from etude.conversation.renderer import Renderer
    from etude.data import dataset
    from etude.models import gguf, loading

    renderer = Renderer(AutoTokenizer.from_pretrained(loading.locate(gguf.SAMPLE)))
    settings = Dataset(train=WORKLOADS[workload], max_length=512)
    table = dataset.read(str(ROOT / settings.train), settings)
    conversations = [dataset.conversation(row, table.labels, settings) for row in table.rows]
    random.Random(SEED).shuffle(conversations)
    if workload in ("long", "full"):
        conversations = joined(conversations, renderer, *((513, 700) if workload == "full" else ()))
    if len(conversations) < rows * steps:
        raise SystemExit(f"error: {workload} has rows for {len(conversations) // rows} steps")
    rendered = [renderer.render(messages)[0] for messages in conversations[: rows * steps]]
    examples = [dataset.truncate(e, 512) if len(e) > 512 else e for e in rendered]
    plain = [
        {
            "ids": e.ids,
            "labels": [i if s else -100 for i, s in zip(e.ids, e.supervised, strict=True)],
        }
        for e in examples
    ]
    return [plain[at : at + rows] for at in range(0, len(plain), rows)]


def joined(conversations: list[Any], renderer: Any, least: int = 400, most: int = 500) -> list[Any]:
    """Conversations of `least` to `most` tokens, made of definitions after one another."""
    found: list[Any] = []
    current: list[Any] = []
    for number, messages in enumerate(conversations * 40):
        # A system prompt of its own at the start: no two conversations share a beginning.
        head = [] if current else [{"role": "system", "content": f"Volume {number}."}]
        longer = [*current, *head, *messages]
        length = len(renderer.render(longer)[-1])
        if length > most:
            current = []
        elif length >= least:
            found.append(longer)
            current = []
        else:
            current = longer
    return found


# --- the engines: each yields (loss, seconds) of every step --------------------------------------


def load_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model with a fresh adapter, the same for every engine.

    ``qwen2-1.5b-shape`` has random weights. `dtype` is the base's format; the adapter's is float32.
    """
    from transformers import AutoModelForCausalLM, Qwen2Config

    from etude.config.schema import Lora
    from etude.models import loading, lora

    torch.manual_seed(SEED)
    if name == "qwen2-1.5b-shape":
        shape = Qwen2Config(
            vocab_size=151936,
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        base = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    else:
        base = AutoModelForCausalLM.from_pretrained(
            loading.locate(name), dtype=dtype, local_files_only=True
        )
    base.requires_grad_(False)
    torch.manual_seed(SEED)
    return lora.attach(base, Lora(), name)


def arguments(folder: str, **more: Any) -> dict[str, Any]:
    """What all Trainer-based engines are given."""
    return {
        "output_dir": folder,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": SEED,
        **more,
    }


class Clock(TrainerCallback):
    """Notes when steps end, their losses, and the matrix products of the last of `steps`."""

    def __init__(self, steps: int) -> None:
        """Start now."""
        self.ends = [time.perf_counter()]
        self.losses: list[float] = []
        self.products = Products()
        self._steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to note products where the last step begins."""
        if state.global_step == self._steps - 1:
            torch.compiler.set_stance("force_eager")
            self.products.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the time."""
        if state.global_step == self._steps:
            self.products.__exit__(None, None, None)
        self.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Note the loss."""
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


class Products(TorchDispatchMode):
    """Notes the shapes of all matrix products: those of layers, and those inside attention."""

    def __init__(self) -> None:
        """Start with none."""
        super().__init__()
        self.found: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a product and compute it."""
        name = func.overloadpacket.__name__
        if name in {"mm", "_int_mm", "bmm"}:
            self._note(name, args[0], args[1])
        elif name == "addmm":
            self._note("mm", args[1], args[2])
        elif name == "_scaled_dot_product_flash_attention_for_cpu":
            self._attention(args[0], args[1], 1)
        elif name == "_scaled_dot_product_flash_attention_for_cpu_backward":
            self._attention(args[1], args[2], 2)  # two products for each of the forward's
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, *operands: torch.Tensor, times: int = 1) -> None:
        layout = tuple((tuple(x.shape), x.stride()) for x in operands)
        self.found[name, operands[0].dtype, *layout] += times

    def _attention(self, query: torch.Tensor, key: torch.Tensor, times: int) -> None:
        # [batch, heads, tokens, size]: scores = Q K^T, output = scores V.
        q = torch.empty(query.flatten(0, 1).shape, dtype=query.dtype)
        k = torch.empty(q.shape[0], *key.shape[2:], dtype=key.dtype)  # one for each query head
        scores = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
        self._note("bmm", q, k.transpose(1, 2), times=times)
        self._note("bmm", scores, k, times=times)

    def seconds(self) -> float:
        """What all of them take alone: the median of five of each, times how often it occurred."""
        total = 0.0
        for (name, dtype, *layouts), times in self.found.items():
            operands = []
            for shape, stride in layouts:
                x = torch.empty_strided(shape, stride, dtype=dtype)
                operands.append(x.random_(-9, 9) if name == "_int_mm" else x.normal_())
            product = getattr(torch, name)
            product(*operands)
            taken = []
            for _ in range(5):
                started = time.perf_counter()
                product(*operands)
                taken.append(time.perf_counter() - started)
            total += times * statistics.median(taken)
        return total


def in_order(trainer_class: Any) -> Any:
    """The Trainer class with its shuffling off: every engine sees the steps in the same order."""

    class Ordered(trainer_class):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def get_train_dataloader(self) -> Any:
            if trainer_class.__name__ != "StepTrainer":
                return super().get_train_dataloader()
            return torch.utils.data.DataLoader(
                self.train_dataset,
                batch_size=self.args.train_batch_size,
                collate_fn=self.data_collator,
            )

    return Ordered


def run_etude(
    steps: list[Any],
    model_name: str,
    folder: str,
    dtype: str = "float32",
    quantization: str = "null",
) -> Any:
    """Etude's own preparation and Trainer subclass, as `etude train` uses them; compiled."""
    from transformers import TrainingArguments

    from etude.config.loading import load_config
    from etude.conversation.renderer import Example
    from etude.engine.setup import configure_engine
    from etude.models import device
    from etude.training import trainer

    examples = [
        Example(row["ids"], [label != -100 for label in row["labels"]]) for s in steps for row in s
    ]
    place = device.choose(dtype, use_cpu=True)
    # As `etude train` does: what becomes int8 is loaded in the format it is stored in.
    stored = quantization == "int8" and model_name != MODELS[0]
    model = load_model(model_name, torch.bfloat16 if stored else place.torch_dtype)
    settings = load_config(
        None,
        overrides=[
            f"model.quantization={quantization}",
            f"training.batch_size={len(steps[0])}",
            "training.gradient_accumulation_steps=1",
            "training.compile=true",
        ],
    )
    clock = Clock(len(steps))
    cutter = configure_engine(model, settings, place, examples, len(steps)).cutter
    loop = in_order(trainer.StepTrainer)(
        cutter=cutter,
        tally=trainer.Tally(),
        model=model,
        args=TrainingArguments(
            **arguments(
                folder, per_device_train_batch_size=len(steps[0]), remove_unused_columns=False
            )
        ),
        train_dataset=examples,
        callbacks=[clock],
    )
    loop.train()
    return clock


def run_etude_bf16(steps: list[Any], model_name: str, folder: str) -> Any:
    """The same on a bfloat16 base: fast only on a CPU with instructions for it."""
    return run_etude(steps, model_name, folder, dtype="bfloat16")


def run_etude_int8(steps: list[Any], model_name: str, folder: str) -> Any:
    """The same on an int8 base."""
    return run_etude(steps, model_name, folder, quantization="int8")


def run_trl(steps: list[Any], model_name: str, folder: str, bf16: bool = False) -> Any:
    """TRL's SFTTrainer on tokenised rows, dynamic padding, its loss over the completion only."""
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from etude.models import gguf, loading

    rows = [
        {
            "input_ids": row["ids"],
            "completion_mask": [int(label != -100) for label in row["labels"]],
        }
        for step in steps
        for row in step
    ]
    model = load_model(model_name)
    clock = Clock(len(steps))
    loop = in_order(SFTTrainer)(
        model=model,
        args=SFTConfig(
            **arguments(
                folder,
                per_device_train_batch_size=len(steps[0]),
                max_length=None,
                packing=False,
                completion_only_loss=True,
                gradient_checkpointing=False,
                bf16=bf16,
            )
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(loading.locate(gguf.SAMPLE)),
        callbacks=[clock],
    )
    loop.train()
    return clock


def run_trl_bf16(steps: list[Any], model_name: str, folder: str) -> Any:
    """The same under bfloat16 autocast: TRL's own default, fast only with instructions for it."""
    return run_trl(steps, model_name, folder, bf16=True)


def run_transformers(steps: list[Any], model_name: str, folder: str) -> Any:
    """A bare loop of transformers and PEFT: padded batches of a step, the model's own loss."""
    model = load_model(model_name)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    clock = Clock(len(steps))
    for number, step in enumerate(steps):
        if number == len(steps) - 1:
            clock.products.__enter__()
        width = max(len(row["ids"]) for row in step)
        loss = model(**padded(step, width)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.losses.append(loss.item())
        clock.ends.append(time.perf_counter())
    clock.products.__exit__(None, None, None)
    return clock


def run_main(steps: list[Any], model_name: str, folder: str) -> Any:
    """The Trainer as it comes: rows padded to 512, one at a time, gradients accumulated."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    rows = [
        {name: tensor[0] for name, tensor in padded([row], PAD_TO).items()}
        for step in steps
        for row in step
    ]
    model = load_model(model_name)
    clock = Clock(len(steps))
    loop = in_order(Trainer)(
        model=model,
        args=TrainingArguments(
            **arguments(
                folder,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=len(steps[0]),
            )
        ),
        train_dataset=rows,
        data_collator=default_data_collator,
        callbacks=[clock],
    )
    loop.train()
    return clock


def padded(rows: list[Any], width: int) -> dict[str, torch.Tensor]:
    """Rows as right-padded tensors [rows, width]."""
    full = {"input_ids": ("ids", 2), "labels": ("labels", -100)}
    batch = {
        name: torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])
        for name, (key, fill) in full.items()
    }
    lengths = torch.tensor([len(row["ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    return batch


# --- measuring -------------------------------------------------------------------------------


def machine_speed() -> dict[str, float]:
    """float32 and int8 matrix products of this machine, in 1e9 operations a second (best of five)."""

    def best(product: Any, size: int) -> float:
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            product()
            seconds.append(time.perf_counter() - started)
        return 2 * size**3 / min(seconds) / 1e9

    size = 2048
    real = torch.randn(size, size)
    whole = torch.randint(-127, 127, (size, size), dtype=torch.int8)
    return {
        "float32_gflops": best(lambda: real @ real, size),
        "int8_gops": best(lambda: torch._int_mm(whole, whole), size),
    }


def worker(engine: str, model: str, file: str) -> None:
    """Run one engine over the steps in `file` and print what was measured as one JSON line."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    steps = json.loads(Path(file).read_text())
    before = machine_speed()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        clock = globals()[f"run_{engine.replace('-', '_')}"](steps, model, folder)
    # Linux counts KiB, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    seconds = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
    result = {
        "engine": engine,
        "seconds": seconds[:-1],  # the last was slowed by noting its products
        "losses": clock.losses[: len(steps)],
        "products": clock.products.seconds(),
        "peak_gb": peak,
        "machine": before,
    }
    print("RESULT " + json.dumps(result))


def in_turn(workers: dict[str, list[str]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Run each engine's worker, a script and its arguments, in turn; its RESULT lines of all rounds."""
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in workers}
    for number in range(rounds):
        for engine, command in workers.items():
            done = subprocess.run(
                [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, check=False
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if done.returncode or not lines:
                raise SystemExit(f"error: {engine} failed:\n{done.stderr[-3000:]}")
            found[engine].append(json.loads(lines[0].removeprefix("RESULT ")))
            print(f"round {number + 1}: {engine} done", file=sys.stderr)
    return found


def environment() -> dict[str, Any]:
    """Versions and machine."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    facts = torch.cpu.get_capabilities()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "libraries": found,
        "cpu": facts.get("cpu_name"),
        "cores": torch.get_num_threads(),
        "amx": bool(facts.get("amx_int8")),
        "avx512_vnni": bool(facts.get("avx512_vnni")),
    }


def main() -> None:
    """Run the engines in turn and print the table; the JSON goes to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workload", choices=WORKLOADS, default="tweets")
    parser.add_argument("--engines", default="etude,etude-int8,trl,transformers,main")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="examples a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
        return
    engines = options.engines.split(",")
    if options.steps < 2:
        raise SystemExit("error: --steps: the first step stands apart, so at least 2 are needed")
    unknown = set(engines) - set(ENGINES)
    if unknown:
        raise SystemExit(
            f"error: no such engine: {', '.join(unknown)}; there are {', '.join(ENGINES)}"
        )
    # One more, in which the matrix products are noted.
    steps = make_steps(options.workload, options.rows, options.steps + 1)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(steps, file)
        file.flush()
        runs = in_turn(
            {e: [__file__, "--worker", e, options.model, file.name] for e in engines},
            options.rounds,
        )
    summary = {engine: summarise(found, options.rows) for engine, found in runs.items()}
    show(summary)
    RESULTS.mkdir(exist_ok=True)
    what = options.workload if options.model == MODELS[0] else f"{options.model}-{options.workload}"
    name = f"train-{what}-{options.rows}rows-{time.strftime('%Y%m%d-%H%M%S')}.json"
    record = {
        "options": vars(options),
        "environment": environment(),
        "summary": summary,
        "runs": runs,
    }
    (RESULTS / name).write_text(json.dumps(record, indent=1))
    print(f"\n{RESULTS / name}")


def summarise(found: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """Medians of one engine over all its rounds; the first step of a process stands apart."""
    step = statistics.median(s for run in found for s in run["seconds"][1:])
    return {
        "rows_per_second": rows / step,
        "share_of_products": statistics.median(run["products"] for run in found) / step,
        "first_step_seconds": statistics.median(run["seconds"][0] for run in found),
        "peak_gb": statistics.median(run["peak_gb"] for run in found),
        "losses": found[0]["losses"],
        "float32_gflops": statistics.median(run["machine"]["float32_gflops"] for run in found),
        "int8_gops": statistics.median(run["machine"]["int8_gops"] for run in found),
    }


def show(summary: dict[str, dict[str, Any]]) -> None:
    """Print the table; ratios are against TRL where it ran, else against the last engine."""
    against = summary["trl" if "trl" in summary else list(summary)[-1]]["rows_per_second"]
    print(
        f"{'engine':<14}{'rows/s':>8}{'ratio':>8}{'products':>10}{'first step':>12}{'peak GB':>9}"
        f"{'last loss':>11}"
    )
    for engine, found in summary.items():
        print(
            f"{engine:<14}{found['rows_per_second']:>8.2f}{found['rows_per_second'] / against:>7.2f}x"
            f"{found['share_of_products']:>10.0%}{found['first_step_seconds']:>10.2f} s"
            f"{found['peak_gb']:>9.2f}{found['losses'][-1]:>11.5f}"
        )


if __name__ == "__main__":
    main()
