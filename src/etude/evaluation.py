"""A run or a base in, a report out: a whole data set with metrics, or a single text."""

import contextlib
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from etude import console
from etude.config.loading import check_config, key_paths, value_at
from etude.config.schema import Config, normal_label
from etude.conversation.renderer import Example, Message, Renderer, RenderError
from etude.data import dataset as data
from etude.engine import generation, packing
from etude.errors import UserError, command
from etude.files import expanded
from etude.measure import metrics, quality
from etude.models import lora
from etude.models.loading import not_finite
from etude.models.loading import window as window_of
from etude.runs import opening, report
from etude.runs.folder import MANIFEST, Busy, entries, free_name, locked, refuse_live
from etude.runs.manifest import changes_since, current_environment, read_manifest

ANSWER_TOKENS = 16  # room after a prompt: a label and its end


@console.command
def evaluate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN [KEY=VALUE]",
            help="a run folder or a model name, then settings: evaluation.method=generate",
        ),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="measure the base beside the run")] = False,
    data_file: Annotated[
        str | None, typer.Option("--data", help="the set to measure; else dataset.test")
    ] = None,
    text: Annotated[str | None, typer.Option(help="one text in place of a data set")] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the report; else RUN/evaluation")
    ] = None,
) -> None:
    """Measure a model: labels or responses against a data set, or the response to one text."""
    name, overrides = console.split_arguments(arguments or [])
    if name is None:
        raise UserError(
            "command line: which run or model? For example: etude evaluate runs/quickstart"
        )
    # Config and data first: their faults show before a model is loaded.
    refuse_live(name)
    settings = opening.open_config(name, overrides)
    if base and not lora.is_adapter(expanded(name)):
        raise UserError(f"--base compares a run with its base, and {name} is no run; leave it out")
    if text is not None:
        if not text.strip() or data_file or out:
            raise UserError("--text takes one text that is not empty, and neither --data nor --out")
        for title, model, target in models(name, overrides, base):
            console.say(title, name if title == "tuned" else target.base.name)
            single(model, target, text)
        return
    table = read_table(settings, data_file)
    judged = [row for row in table.rows if row.quality]
    if judged:
        if base:
            raise UserError(
                f"{table.source} gives the quality of its own completions, so no model is "
                "measured; leave --base out"
            )
        table = dataclasses.replace(table, rows=judged, drawn="")
    # Before the long part: a folder that cannot be made is an error now, and no other process takes it.
    with report_folder(name, out) as folder:
        if judged:
            measured = {"heuristics": measure_judgement(table, settings)}
        else:
            measured = {
                title: measure(model, target, table, title)
                for title, model, target in models(name, overrides, base)
            }
        result = assemble(name, settings, table, measured)
        for notice in report.overridden(result):
            aside(notice)
        report.write_evaluation(result, measured, table.rows, folder)
    for block in report.evaluation_tables(result):
        console.out.print(block)
    console.say("saved", f"{folder}/report.md, report.json, predictions.jsonl")


def aside(notice: str) -> None:
    """Print a notice on stderr: stdout holds the tables, which may be piped."""
    console.err.print(f"notice    {console.printable(notice)}")


def models(
    name: str, overrides: list[str], with_base: bool
) -> Iterator[tuple[str, Any, opening.Target]]:
    """The models to measure, one after the other in the same memory: base, then tuned."""
    console.quiet_transformers()
    target = opening.open_target(name, overrides)
    console.err.print(f"device    {target.base.device.why}")
    for difference in changes_since(expanded(name)):
        aside(f"since the training: {difference}")
    if with_base:
        yield "base", target.base.model, target
    yield ("tuned" if target.adapter else "model"), target.tuned(), target


def read_table(settings: Config, data_file: str | None) -> data.Table:
    """The rows to measure, at most `evaluation.max_rows` of them.

    Raises:
        UserError: no data set is named, or it cannot be used.
    """
    source = data_file or settings.dataset.test
    if source is None:
        raise UserError("Nothing to measure: dataset.test is null; give a file: --data FILE")
    table = data.read(source, settings.dataset)
    for notice in table.drops("test") + table.notices:
        aside(notice)
    # The answer that is measured is the last one that would be trained on.
    rows = [dataclasses.replace(row, messages=row.messages[: row.answer + 1]) for row in table.rows]
    table = dataclasses.replace(table, rows=rows)
    return data.sample(table, settings.evaluation.max_rows, settings.training.seed)


@contextlib.contextmanager
def report_folder(name: str, out: Path | None) -> Iterator[Path]:
    """An empty folder for the report, made and held for this process; without a report it goes again.

    Raises:
        UserError: `out` holds something, or another process writes there.
    """
    if out:
        folder = expanded(str(out))
        with locked(folder):
            there = entries(folder)
            if there:
                what = "a report" if "report.json" in there else ", ".join(there[:5])
                raise UserError(
                    f"--out: {folder} holds {what} already; give a new folder: "
                    f"{command('--out', free_name(folder))}"
                )
            yield folder
        return
    # A model's own folder is no place for reports; a run's is.
    run = lora.is_adapter(expanded(name))
    home = expanded(name) if run else Path("runs") / re.sub(r"\W+", "-", name).strip("-")
    if not run and not Path(os.path.realpath(home)).is_relative_to(os.path.realpath("runs")):
        raise UserError(f"{home} is a link that leads out of runs/; give a folder: --out FOLDER")
    with contextlib.ExitStack() as stack:
        for number in itertools.count(1):
            folder = home / (f"evaluation-{number}" if number > 1 else "evaluation")
            if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
                continue
            if folder.is_dir() and entries(folder):
                continue
            with contextlib.suppress(Busy):
                stack.enter_context(locked(folder))
                if not entries(folder):
                    break
                stack.close()  # another process was quicker
        yield folder


def measure(model: Any, target: opening.Target, table: data.Table, name: str) -> dict[str, Any]:
    """Every figure of one model on one data set, and what it said to every row."""
    settings, renderer = target.config, target.renderer
    function = measure_labels if table.format == "classification" else measure_responses
    facts = {"device": target.base.device.name, "dtype": str(model.dtype).removeprefix("torch.")}
    return {**facts, **function(model, renderer, table, settings, name)}


# --- classification --------------------------------------------------------------------------


def measure_labels(
    model: Any, renderer: Renderer, table: data.Table, settings: Config, name: str
) -> dict[str, Any]:
    """Predict the label of every row and compare with the truth."""
    labels = cast(list[str], table.labels)
    for notice in data.contradicting("test", len(table.rows), data.repeats(table.rows)[1]):
        aside(notice)
    prompts = [data.instruct(row.text, labels, settings.dataset) for row in table.rows]
    refuse_beyond_window(model, renderer, prompts, table, settings)
    origins = [f"{table.source}:{row.line}" for row in table.rows]
    if settings.evaluation.method == "likelihood":
        scores = label_log_likelihoods(model, renderer, prompts, labels, settings, name, origins)
        predicted: list[str | None] = [labels[row.index(max(row))] for row in scores]
        said: list[Any] = [dict(zip(labels, softmax(row), strict=True)) for row in scores]
    else:
        responses = respond(model, renderer, prompts, settings, name, origins)
        predicted = [parse_label(response.text, labels) for response in responses]
        said = [response.text for response in responses]
    truth = [cast(str, row.label) for row in table.rows]
    return {**classify(truth, predicted, labels, settings), "said": said}


def answer_room(renderer: Renderer, prompt: list[Message], labels: Sequence[str]) -> int:
    """Tokens that the longest label takes after a prompt, its end included; ANSWER_TOKENS at least."""
    with contextlib.suppress(RenderError):  # scoring the labels says why
        start = len(renderer.prompt(prompt))
        sizes = [
            len(renderer.render([*prompt, {"role": "assistant", "content": label}])) - start
            for label in labels
        ]
        return max([ANSWER_TOKENS, *sizes])
    return ANSWER_TOKENS


def refuse_beyond_window(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[list[Message]],
    table: data.Table,
    settings: Config,
) -> None:
    """Raise UserError for prompts that leave the model no room for an answer, with their lines.

    Beyond its window a model fails or, with rotary positions, writes noise without a word.
    """
    window = window_of(model.config)
    if window is None:
        return
    room = answer_room(renderer, prompts[0], table.labels or [])
    beyond = [
        (f"{table.source}:{row.line}", size)
        for row, prompt in zip(table.rows, prompts, strict=True)
        if (size := len(renderer.prompt(prompt)) + room) > window
    ]
    if beyond:
        advice = f"Shorten them or leave them out; {room} tokens of each are room for the answer."
        advice += data.room_of_labels(renderer, table.labels or [], settings.dataset, window)
        raise data.beyond_window(beyond, window, advice)


def classify(
    truth: Sequence[str],
    predicted: Sequence[str | None],
    labels: Sequence[str],
    settings: Config,
) -> dict[str, Any]:
    """The classification metrics with their confidence intervals."""
    result = metrics.classification(truth, predicted, labels)
    intervals = metrics.confidence_intervals(
        result["confusion"],
        samples=settings.evaluation.bootstrap_samples,
        level=settings.evaluation.confidence,
        seed=settings.training.seed,
    )
    return {
        "kind": "classification",
        **result,
        "intervals": intervals,
        "truth": truth,
        "predicted": predicted,
    }


def label_log_likelihoods(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[list[Message]],
    labels: Sequence[str],
    settings: Config,
    name: str,
    origins: Sequence[str] = (),
) -> list[list[float]]:
    """Exact log P(label, end of turn | prompt) in nats for every prompt and label: [prompts][labels].

    The sum runs over all tokens of a label and its end token, so that "positive" and "positively"
    are told apart. Prompts and labels are packed: what they share is computed once.

    Raises:
        UserError: two labels that the model would see as one, or a template that refuses a prompt.
    """
    data.check_labels(renderer, labels)
    try:
        candidates = [
            renderer.render([*prompt, {"role": "assistant", "content": label}])
            for prompt in prompts
            for label in labels
        ]
    except RenderError as error:
        raise UserError(f"The chat template refuses a classification: {error}") from None
    size = len(labels)
    # Of a prompt with earlier answers in it, only the label counts.
    answers = [last_answer(candidate) for candidate in candidates]
    if origins:
        answers = [
            dataclasses.replace(one, origin=origins[at // size]) for at, one in enumerate(answers)
        ]
    losses = sequence_losses(model, answers, settings, name)
    return [[-loss for loss in losses[at : at + size]] for at in range(0, len(losses), size)]


def last_answer(example: Example) -> Example:
    """The same ids with only the last supervised stretch supervised."""
    supervised = example.supervised
    start = len(supervised) - 1
    while not supervised[start]:
        start -= 1
    while supervised[start - 1]:
        start -= 1
    return Example(example.ids, [yes and at >= start for at, yes in enumerate(supervised)])


# What may stand around a label that is all of a response; signs are not among them.
WRAPPING = " \t.,:;!?\"'*`_()[]{}\u2018\u2019\u201c\u201d\u00ab\u00bb\u2026\u3002"
# A word that turns what follows into its opposite, and up to three words between; quotes, stars and the
# like may stand there too, but no end of a clause.
NEGATED = re.compile(
    r"(?:\b(?:not|never|nor|neither|cannot|non|nicht|kein\w*|pas)|n['\u2019]t)(?:[^\w.,;!?]+\w+){0,3}[^\w.,;!?]+$"
    r"|\bno(?:[^\w.,;!?]+\w+)?[^\w.,;!?]+$"
)


def parse_label(response: str, labels: Sequence[str]) -> str | None:
    """The label that a response means: all of it, or the only one in it as a whole word; None if unclear.

    Of labels that hold one another the longest counts ("not hate" is not "hate"); of labels that
    differ in case only, the one that is spelled so. A label that is denied ("not positive") is none.
    """
    text = normal_label(response)
    if text in labels:
        return text
    folded = text.casefold()
    spellings: dict[str, list[str]] = {}
    for label in labels:
        if label.casefold() in folded:
            spellings.setdefault(label.casefold(), []).append(label)
    whole = [form for form in spellings if not _around(folded, form).strip(WRAPPING)]
    longest = max(map(len, whole), default=0)
    found = {form for form in whole if len(form) == longest}
    if not found:
        spans = {
            (match.start(), match.end()): form
            for form in spellings
            for match in _whole_word(form).finditer(folded)
        }
        outer = [
            (start, end)
            for start, end in spans
            if not any(a <= start and end <= b and (a, b) != (start, end) for a, b in spans)
        ]
        if any(NEGATED.search(folded[max(0, start - 80) : start]) for start, _ in outer):
            return None
        found = {spans[span] for span in outer}
    if len(found) != 1:
        return None
    alike = spellings[found.pop()]
    exact = [label for label in alike if _whole_word(label).search(text)]
    return alike[0] if len(alike) == 1 else exact[0] if len(exact) == 1 else None


def _around(text: str, part: str) -> str:
    """What is left of `text` without its wrapping and `part`."""
    before, _, after = text.partition(part)
    return before + after


@lru_cache(maxsize=4096)
def _whole_word(form: str) -> re.Pattern[str]:
    """Finds a label in a text, and not in a longer word, number or name with a sign (c++, -1, A-)."""
    first, last = form[0], form[-1]
    before, after = r"(?<![\w+#])(?<!\w-)", r"(?![\w+#]|-(?![\w-]))"
    if not first.isalpha():
        before += r"(?<![-\u2212])(?<!\d[.,])"
    if last.isdigit():
        after += r"(?![-.,]\d)"
    return re.compile(before + re.escape(form) + after)


def softmax(scores: Sequence[float]) -> list[float]:
    """Shares exp(s) / sum(exp(s)), computed from the largest so that nothing overflows."""
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


# --- responses -------------------------------------------------------------------------------


def measure_responses(
    model: Any, renderer: Renderer, table: data.Table, settings: Config, name: str
) -> dict[str, Any]:
    """Perplexity of the references; for conversations also greedy responses, judged and compared."""
    # What was dropped in reading was reported then.
    whole = dataclasses.replace(table, dropped={})
    window = window_of(model.config)
    examples, fate = data.encode(whole, renderer, settings.dataset, "test", window)
    if fate.dropped:
        raise UserError(
            f"{table.source}: rows that cannot be measured; fix them, leave them out or raise "
            "dataset.max_length:\n  " + "\n  ".join(fate.notices())
        )
    for notice in fate.notices():
        aside(notice)
    losses = sequence_losses(model, examples, settings, name)
    # Rows stay rows, however many examples one was split into.
    rows: list[list[tuple[float, int]]] = []
    for example, loss in zip(examples, losses, strict=True):
        if example.part == 0:
            rows.append([])
        rows[-1].append((loss, example.targets))
    losses = [sum(loss for loss, _ in row) for row in rows]
    tokens = [sum(count for _, count in row) for row in rows]
    result: dict[str, Any] = {
        "kind": "responses",
        "rows": len(table.rows),
        **mean_and_perplexity(sum(losses), sum(tokens)),
        "tokens": sum(tokens),
        "tokens_lost": fate.lost,
        "losses": [loss / count for loss, count in zip(losses, tokens, strict=True)],
    }
    if table.format == "text":
        return result
    prompts = [row.messages[:-1] for row in table.rows]
    refuse_beyond_window(model, renderer, prompts, table, settings)
    origins = [f"{table.source}:{row.line}" for row in table.rows]
    responses = respond(model, renderer, prompts, settings, name, origins)
    references = [row.messages[-1]["content"] for row in table.rows]
    judgements = [
        judge(row.messages[-2]["content"] if len(row.messages) > 1 else "", response, settings)
        for row, response in zip(table.rows, responses, strict=True)
    ]
    count = len(judgements)
    return {
        **result,
        **metrics.text_metrics(references, [response.text for response in responses]),
        "finished": sum(response.finished for response in responses) / count,
        "quality": sum(judgement["score"] for judgement in judgements) / count,
        "quality_labels": {
            label: sum(judgement["label"] == label for judgement in judgements)
            for label in quality.LABELS
        },
        "quality_shares": {
            heuristic: sum(judgement["shares"][heuristic] for judgement in judgements) / count
            for heuristic in judgements[0]["shares"]
        },
        "predicted": [judgement["label"] for judgement in judgements],
        "said": [response.text for response in responses],
    }


def mean_and_perplexity(loss: float, tokens: int) -> dict[str, float | None]:
    """The mean loss in nats a token, and its exponential; None where that is beyond all numbers."""
    return {"perplexity": metrics.perplexity(loss, tokens), "loss": loss / tokens}


def measure_judgement(table: data.Table, settings: Config) -> dict[str, Any]:
    """Judge the given completions by the heuristics and compare with the given quality labels."""
    judgements = [
        quality.judge(
            row.messages[-2]["content"],
            row.messages[-1]["content"],
            good_threshold=settings.evaluation.good_threshold,
            fair_threshold=settings.evaluation.fair_threshold,
        )
        for row in table.rows
    ]
    given = [cast(str, row.quality) for row in table.rows]
    predicted = [judgement["label"] for judgement in judgements]
    said = [judgement["shares"] for judgement in judgements]
    return {**classify(given, predicted, quality.LABELS, settings), "said": said}


def judge(prompt: str, response: generation.Response, settings: Config) -> quality.Judgement:
    """The quality of one response by the heuristics."""
    return quality.judge(
        prompt,
        response.text,
        good_threshold=settings.evaluation.good_threshold,
        fair_threshold=settings.evaluation.fair_threshold,
        finished=response.finished,
    )


def respond(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[list[Message]],
    settings: Config,
    name: str,
    origins: Sequence[str],
) -> list[generation.Response]:
    """Greedy responses to all prompts, in batches of like length, in the prompts' order."""
    greedy = settings.generation.model_copy(update={"temperature": 0.0})
    ids = [renderer.prompt(prompt) for prompt in prompts]
    room = (window_of(model.config) or math.inf) - max(map(len, ids))
    if room < greedy.max_new_tokens:
        console.err.print(
            f"notice    {name}: the model's window leaves the longest prompt {room} tokens for an "
            f"answer, fewer than generation.max_new_tokens {greedy.max_new_tokens}"
        )
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]), reverse=True)
    responses: dict[int, generation.Response] = {}
    with console.bar(f"{name}: responses", len(order)) as advance:
        for start in range(0, len(order), settings.evaluation.batch_size):
            chosen = order[start : start + settings.evaluation.batch_size]
            answers = generation.generate(
                model,
                renderer,
                [ids[index] for index in chosen],
                greedy,
                None,
                [origins[index] for index in chosen],
            )
            responses.update(zip(chosen, answers, strict=True))
            advance(len(chosen))
    return [responses[index] for index in range(len(ids))]


def sequence_losses(
    model: Any, examples: Sequence[Example], settings: Config, name: str
) -> list[float]:
    """Summed negative log-likelihood in nats of each example's supervised tokens.

    Raises:
        UserError: an example beyond the model's window, or a sum that is not finite; with their rows.
    """
    import torch

    window = window_of(model.config)
    beyond = [
        (one.origin or "the text", len(one)) for one in examples if window and len(one) > window
    ]
    if beyond and window:
        raise data.beyond_window(list(dict(beyond).items()), window, "Shorten them.")
    longest = max(map(len, examples))
    cutter = packing.Cutter.of(model, settings.evaluation.batch_size, longest, examples)

    def told(advance: Any) -> Iterator[packing.Pass]:
        for batch in cutter(examples):
            yield batch
            advance(len(batch.owner.unique()))

    model.eval()
    with torch.inference_mode(), console.bar(f"{name}: likelihoods", len(examples)) as advance:
        sums = packing.sum_by_example(model, told(advance), len(examples))
        wrong = [examples[at] for at in (~sums.isfinite()).nonzero()[:, 0].tolist()]
        if wrong:
            # A pass shares its numbers; of many such rows the first will do to find the guilty ones.
            rows = packing.culprits(model, cutter, wrong[:64]) or [one.origin for one in wrong]
            raise not_finite(model, "The loss", [row or "the text" for row in rows])
    return cast(list[float], sums.tolist())


# --- one text --------------------------------------------------------------------------------


def single(model: Any, target: opening.Target, text: str) -> None:
    """Answer one text; print the response, its quality and perplexity, or the labels."""
    settings, renderer = target.config, target.renderer
    labels = settings.dataset.labels
    prompt: list[Message] = [{"role": "user", "content": text}]
    if labels:
        prompt = data.instruct(text, labels, settings.dataset)
        (scores,) = label_log_likelihoods(
            model, renderer, [prompt], labels, settings, "labels", ["--text"]
        )
        ranked = sorted(zip(softmax(scores), labels, strict=True), reverse=True)
        for share, label in ranked:
            console.out.print(f"{label:<16} {share:6.1%}")
    (response,) = generation.generate(
        model, renderer, [renderer.prompt(prompt)], settings.generation, None, ["--text"]
    )
    console.say("response", response.text)
    if labels:
        return
    judgement = judge(text, response, settings)
    shares = ", ".join(f"{name} {share:.2f}" for name, share in judgement["shares"].items())
    console.say("quality", f"{judgement['label']} ({judgement['score']:.2f}: {shares})")
    if response.text:
        try:
            answer = last_answer(
                renderer.render([*prompt, {"role": "assistant", "content": response.text}])
            )
        except RenderError as error:  # thoughts of a reasoning model, say
            console.say("perplexity", f"not measured: {error}")
            return
        if not response.finished:  # the end token is the template's, not the model's
            supervised = answer.supervised
            supervised[len(supervised) - 1 - supervised[::-1].index(True)] = False
            answer = Example(answer.ids, supervised)
        # What the template writes after an answer can reach beyond the window that the answer filled.
        end = window_of(model.config) or len(answer)
        answer = Example(answer.ids[:end], answer.supervised[:end], "--text")
        (loss,) = sequence_losses(model, [answer], settings, "perplexity")
        figures = mean_and_perplexity(loss, answer.targets)
        value = report.perplexity(figures)
        console.say("perplexity", f"{value} of the response under the model itself")


# --- the report ------------------------------------------------------------------------------


# What decides the figures of an evaluation, beside the weights and the rows.
DECIDING = (
    *(f"model.{key}" for key in ("name", "revision", "dtype", "quantization", "chat_template")),
    *(f"dataset.{key}" for key in ("instruction", "system_prompt", "labels", "format", "columns")),
    *(
        f"dataset.{key}"
        for key in ("max_length", "overlength", "special_tokens", "on_bad_row", "ignore")
    ),
    "training.seed",
    "evaluation.",
    "generation.",
)


def settings_in_force(name: str, settings: Config) -> dict[str, Any]:
    """The settings that decide the figures, and which of them are not those of the run (or a default).

    A run's are those that its manifest says it was trained with; its config.yml may have changed since.
    """
    folder = expanded(name)
    before = Config().model_copy(update={"model": settings.model})
    with contextlib.suppress(UserError):  # a run of another version, or faults that overrides fix
        if (folder / MANIFEST).is_file():
            before = check_config(read_manifest(folder)["config"], {})
        else:
            before = opening.open_config(name, [])
    keys = [key for key in key_paths() if key.startswith(DECIDING)]
    values = {key: value_at(settings, key) for key in keys}
    return {
        "settings": values,
        "overridden": {
            key: {"before": value_at(before, key), "now": value}
            for key, value in values.items()
            if value != value_at(before, key)
        },
    }


def assemble(
    name: str, settings: Config, table: data.Table, measured: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """report.json: what was measured on what, each model's figures, and base against tuned."""
    method = settings.evaluation.method if table.format == "classification" else "greedy"
    private = ("truth", "predicted", "said", "losses")
    result: dict[str, Any] = {
        "target": name,
        "base": None if "heuristics" in measured else settings.model.name,
        "data": {
            "source": table.source,
            "sha256": table.fingerprint,
            "rows": len(table.rows),
            "drawn": table.drawn,
            "dropped": table.dropped,
            "format": table.format,
        },
        "method": "heuristics" if "heuristics" in measured else method,
        "models": {
            model: {key: value for key, value in figures.items() if key not in private}
            for model, figures in measured.items()
        },
        **settings_in_force(name, settings),
        "environment": current_environment(),
    }
    if len(measured) == 2:
        first, second = measured["base"], measured["tuned"]
        if first["kind"] == "classification":
            result["comparison"] = metrics.mcnemar(
                first["truth"], first["predicted"], second["predicted"]
            )
        else:
            result["comparison"] = metrics.paired_losses(first["losses"], second["losses"])
    return result


if __name__ == "__main__":
    console.run(evaluate)
