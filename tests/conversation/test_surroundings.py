"""What a template writes around an answer, today's date and an adapter's own tokenizer."""

import copy
import datetime
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CHATML
from hypothesis import given, settings
from hypothesis import strategies as st
from test_records import etude, rows, train, unproven  # noqa: F401
from tokenizers import AddedToken
from transformers import AutoTokenizer

from etude import evaluation
from etude.chat import Talk
from etude.config.schema import Config, Generation
from etude.conversation.history import Conversation
from etude.conversation.renderer import Renderer
from etude.engine.generation import _response, _Streamer, generate
from etude.errors import UserError
from etude.measure import responses
from etude.model import Model
from etude.models import loading, lora
from etude.runs import opening
from etude.runs.folder import log
from etude.runs.manifest import recorded_date
from etude.training import trainer

TEMPLATES = Path(__file__).parent / "templates"
HARMONY = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]
LLAMA = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CLOSING = CHATML.replace(
    "message['content'] + '<|im_end|>'",
    "(('<answer>' + message['content'] + ' </answer>') if message['role'] == 'assistant' "
    "else message['content']) + '<|im_end|>'",
)
MONDAY, TUESDAY = datetime.date(2026, 1, 5), datetime.date(2026, 1, 6)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def text(renderer, messages):
    """The prompt of a conversation, as text."""
    return renderer.tokenizer.decode(renderer.prompt(messages))


def trl(name):
    return (TEMPLATES / f"{name}.jinja").read_text()


@pytest.fixture(scope="module")
def tokenizer(qwen_tokenizer):
    """Qwen's, with the control tokens of gpt-oss and Llama 3."""
    changed = copy.deepcopy(qwen_tokenizer)
    tokens = [AddedToken(text, special=True, normalized=False) for text in HARMONY + LLAMA]
    changed.add_tokens(tokens)
    changed.bos_token = "<|im_start|>"
    return changed


@pytest.fixture(scope="module")
def renderers(tokenizer):
    templates = {"qwen3": trl("qwen3"), "gptoss": trl("gptoss"), "closing": CLOSING}
    return {
        name: Renderer(tokenizer, text) for name, text in (templates | {"chatml": CHATML}).items()
    }


def written(renderer, question, answer):
    """The ids that a perfectly trained model writes: the answer as it was rendered, to its end token."""
    example = renderer.answer([*question, assistant(answer)])
    return example.ids[-example.targets :]


def streamed(renderer, ids):
    pieces = []
    streamer = _Streamer(renderer, lambda piece, reasoning: reasoning or pieces.append(piece))
    streamer.put(torch.tensor([[1, 2, 3]]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return "".join(pieces)


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "closing", "chatml"])
@given(answer=st.text(st.characters(exclude_categories=["Cs", "Cc", "Co"]), max_size=20))
@settings(max_examples=10)
def test_what_rendering_adds_generation_takes_off(renderers, name, answer):
    renderer, answer = renderers[name], answer.strip()
    ids = written(renderer, [user("Fine?")], answer)
    expected = renderer.tokenizer.decode(renderer.tokenizer(answer).input_ids).strip()  # NFC
    assert _response(renderer, ids, False).text == expected
    assert streamed(renderer, ids).strip() == expected
    # And it renders again, as the answer and as history.
    assert written(renderer, [user("Fine?")], expected) == written(
        renderer, [user("Fine?")], answer
    )
    assert renderer.prompt([user("Fine?"), assistant(expected), user("Sure?")])


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "closing", "chatml"])
def test_a_model_that_does_not_write_it_keeps_its_text(renderers, name):
    renderer = renderers[name]
    for text in ("Yes.", "final", "<b>Yes</b>", "<answers", "<"):
        ids = [*renderer.tokenizer(text).input_ids, renderer.end_of_turn]
        assert _response(renderer, ids, False).text == text
        assert streamed(renderer, ids) == text


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "closing"])
def test_of_what_is_cut_short_only_the_answer_is_shown(renderers, name):
    renderer = renderers[name]
    ids = written(renderer, [user("Fine?")], "Yes, quite.")
    for length in range(len(ids)):
        text = _response(renderer, ids[:length], True).text
        assert "Yes, quite.".startswith(text)
        assert streamed(renderer, ids[:length]).strip() == text


def test_earlier_answers_are_rendered_as_the_template_does(renderers):
    renderer = renderers["qwen3"]
    thoughts = "<think>\nhm\n</think>\n\nYes."
    talk = [user("Fine?"), assistant(thoughts), user("Sure?")]
    bare = [user("Fine?"), assistant("Yes."), user("Sure?")]
    assert renderer.prompt(talk) == renderer.prompt(bare)
    assert renderers["chatml"].prompt(talk) != renderers["chatml"].prompt(bare)
    first, second = renderer.render([*talk, assistant("Yes.")])
    assert "hm" in renderer.tokenizer.decode(first.ids[-first.targets :])
    assert "hm" not in renderer.tokenizer.decode(second.ids)


class Scripted:
    """A model that writes what `renderer` renders for an answer."""

    def __init__(self, model, renderer, answer):
        self.model, self.renderer, self.answer = model, renderer, answer
        self.config, self.device = model.config, model.device

    def generate(self, input_ids, streamer=None, **_):
        ids = written(self.renderer, [user("Fine?")], self.answer)
        if streamer:
            streamer.put(input_ids)
            for token in ids:
                streamer.put(torch.tensor([token]))
            streamer.end()
        return torch.cat([input_ids, torch.tensor([ids] * len(input_ids))], dim=1)


@pytest.mark.parametrize("name", ["qwen3", "closing", "plain"])
def test_metrics_chat_and_a_single_text_see_the_bare_answer(tiny_model, name, monkeypatch, capsys):
    target = opening.open_target(str(tiny_model), ["training.use_cpu=true"])
    template = {"qwen3": trl("qwen3"), "closing": CLOSING, "plain": None}[name]
    renderer = Renderer(target.base.tokenizer, template)
    object.__setattr__(target, "renderer", renderer)
    model = Scripted(target.base.model, renderer, "Yes, fine.")
    question = renderer.prompt([user("Fine?")])
    for response in generate(model, renderer, [question, question], Generation()):
        assert response.text == "Yes, fine."
    monkeypatch.setattr(opening.Target, "tuned", lambda self: model)
    talk = Talk(target, Conversation(), compare=False, quiet=True)
    talk.ask("Fine?")
    talk.ask("Sure?")
    assert capsys.readouterr().out == "Yes, fine.\nYes, fine.\n"
    assert talk.conversation.messages[1] == assistant("Yes, fine.")
    monkeypatch.setattr(responses, "sequence_losses", lambda model, examples, *_: [1.0])
    evaluation.show_text(Model(target, model), "Fine?")
    said = capsys.readouterr().out
    assert "Yes, fine." in said and "of the response under the model itself" in said


# --- the date ------------------------------------------------------------------------------------

DATED = [
    ("gptoss", "Current date: 2026-01-05", "Current date: 2026-01-06"),
    ("llama3_2", "Today Date: 05 Jan 2026", "Today Date: 06 Jan 2026"),
    ("granite", "January 05, 2026 100%", "January 06, 2026 100%"),
]
GRANITE = "  {{ strftime_now(format='%B %d, %Y 100%%') }}\n" + CHATML


def dated(tokenizer, name, date):
    return Renderer(tokenizer, GRANITE if name == "granite" else trl(name), date=date)


@pytest.mark.parametrize(("name", "monday", "tuesday"), DATED)
def test_a_date_is_fixed_and_is_part_of_the_format(tokenizer, name, monday, tuesday):
    first, second = (dated(tokenizer, name, date) for date in (MONDAY, TUESDAY))
    assert monday in text(first, [user("x")])
    assert tuesday in text(second, [user("x")])
    assert first.state()["date"] == "2026-01-05"
    assert first.state()["probe_sha256"] != second.state()["probe_sha256"]
    first.check_state(json.loads(json.dumps(first.state())), "runs/a")
    with pytest.raises(UserError, match="date: trained '2026-01-05', now '2026-01-06'"):
        second.check_state(first.state(), "runs/a")
    # Today's is what the template writes by itself.
    today, clock = (dated(tokenizer, name, date) for date in (opening.today(), None))
    assert text(today, [user("x")]) == text(clock, [user("x")])
    # A run of before has no date, and opens as it did.
    clock.check_state({k: v for k, v in clock.state().items() if k != "date"}, "runs/a")
    assert clock.state()["probe_sha256"] is None


def test_a_date_whose_format_is_computed_stays_the_clocks(tokenizer):
    template = "{% set form = '%Y' %}{{ strftime_now(form) + strftime_now('%d') }}" + CHATML
    renderer = Renderer(tokenizer, template, date=MONDAY)
    assert renderer.date is None and renderer.state()["probe_sha256"] is None
    assert text(renderer, [user("x")]).startswith(f"{datetime.date.today():%Y}")


def test_a_template_without_a_date_has_none(tokenizer):
    monday = Renderer(tokenizer, CHATML, date=MONDAY)
    assert monday.state() == Renderer(tokenizer, CHATML).state()
    assert monday.state()["date"] is None


def test_a_run_keeps_the_date_it_began_with(tiny_model, rows, tmp_path, monkeypatch, unproven):  # noqa: F811
    template, run = tmp_path / "dated.jinja", tmp_path / "run"
    template.write_text(
        "{{ '<|im_start|>system\n' + strftime_now('%A') + '<|im_end|>\n' }}" + CHATML
    )
    monkeypatch.setattr(opening, "today", lambda: MONDAY)
    original = trainer.StepTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer.StepTrainer, "training_step", step)
    said = [f"output.dir={run}", f"model.chat_template={template}", "training.save_steps=1"]
    assert train(tiny_model, rows, *said).exit_code == 130
    assert recorded_date(run) == MONDAY
    monkeypatch.setattr(trainer.StepTrainer, "training_step", original)
    monkeypatch.setattr(opening, "today", lambda: TUESDAY)
    again = train(tiny_model, rows, *said)
    assert again.exit_code == 0 and "\nresume " in again.output, again.output
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["chat_format"]["date"] == "2026-01-05"
    opened = opening.open_target(str(run), [])
    assert "Monday" in text(opened.renderer, [user("x")])
    other_day = opening.renderer_for(opened.base, opened.config, opening.today())
    assert "Tuesday" in text(other_day, [user("x")])
    repeated = etude("reproduce", run)
    assert repeated.exit_code == 0, repeated.output
    assert recorded_date(tmp_path / "run-reproduced") == MONDAY


# --- an adapter made elsewhere -------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign_adapter(tiny_model, tmp_path_factory):
    """A PEFT folder without a tokenizer, as another program writes it."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    base = loading.load_base(str(tiny_model), opening.device.choose("float32", True))
    lora.save(lora.attach(base.model, Config().lora, str(tiny_model)), folder)
    return folder


OTHER = CHATML.replace("You are a helpful assistant", "Rhyme")


@pytest.mark.parametrize("kind", ["nothing", "in the config", "both"])
def test_an_adapters_own_tokenizer_and_template(
    foreign_adapter, tiny_model, tmp_path, kind, caplog, monkeypatch
):
    monkeypatch.setattr(log.parent, "propagate", True)
    folder = Path(shutil.copytree(foreign_adapter, tmp_path / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plain = tokenizer.chat_template
    if kind in ("in the config", "both"):
        tokenizer.add_special_tokens({"pad_token": "<|im_start|>"})
        tokenizer.chat_template = OTHER
        tokenizer.save_pretrained(folder, save_jinja_files=kind != "in the config")
    with caplog.at_level("INFO", "etude.runs.opening"):
        target = opening.open_target(str(folder), ["training.use_cpu=true"])
    assert target.renderer.template == (plain if kind == "nothing" else OTHER)
    own = kind in ("in the config", "both")
    assert any("its own tokenizer in use" in message for message in caplog.messages) == own
    assert (target.renderer.tokenizer.pad_token == "<|im_start|>") == own
    # What the user gives comes first.
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    mine = opening.open_target(
        str(folder), [f"model.chat_template={file}", "training.use_cpu=true"]
    )
    assert mine.renderer.template == CHATML
