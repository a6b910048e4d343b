import copy
import json
import os
import sys

import pytest
import typer
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from typer.testing import CliRunner

from etude import chat
from etude.chat import Talk, changed, handle
from etude.config.schema import Generation, Lora
from etude.console import printable
from etude.conversation.calling import call
from etude.conversation.history import Conversation
from etude.engine import generation
from etude.engine.generation import Response
from etude.errors import UserError
from etude.models import lora
from etude.runs import opening

ON_CPU = ["model.dtype=float32", "training.use_cpu=true"]
SHORT = ["generation.max_new_tokens=4", "generation.temperature=0"]


def exchange(conversation, question, answer):
    conversation.ask(question)
    conversation.answer(answer)


@pytest.fixture(scope="module")
def tiny_target(tiny_model):
    return opening.open_target(str(tiny_model), [*ON_CPU, *SHORT])


@pytest.fixture
def talk(tiny_target):
    return Talk(tiny_target, Conversation(), compare=False, quiet=False)


@pytest.fixture
def says(monkeypatch):
    """Let the model say these texts, one after the other; an exception among them is raised."""
    calls = []

    def install(*replies):
        left = list(replies)

        def generate(model, renderer, prompts, settings, on_text, tools):
            calls.append((prompts[0], settings))
            reply = left.pop(0)
            if isinstance(reply, BaseException):
                raise reply
            if isinstance(reply, str):
                reply = Response(reply, 3, True)
            for text, reasoning in ((reply.reasoning, True), (reply.text, False)):
                if text:
                    on_text(text, reasoning)
            return [reply]

        monkeypatch.setattr(generation, "generate", generate)
        return calls

    return install


@pytest.fixture
def adapter(tiny_target, tiny_model, tmp_path):
    """A run-like adapter folder on the tiny model that changes its answers."""
    import torch

    base = opening.open_target(str(tiny_model), ON_CPU).base.model
    tuned = lora.attach(base, Lora(r=4, alpha=64, target_modules=["all-linear"]), str(tiny_model))
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    lora.save(tuned, tmp_path / "adapter")
    return tmp_path / "adapter"


def drive(talk, keys, monkeypatch, folder):
    monkeypatch.setenv("ETUDE_CACHE", str(folder / "cache"))
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        chat.interactive(talk)


def run(*arguments, stdin=None):
    app = typer.Typer()
    app.command()(chat.chat)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


# --- commands --------------------------------------------------------------------------------


def test_commands_on_the_state(talk, says, tmp_path, capsys):
    calls = says("Hi.", "Paris.", "Berlin.")
    for line in ("Hello", "//etc is what?"):
        assert handle(talk, line) is False
    assert [m["content"] for m in talk.conversation.messages] == [
        "Hello",
        "Hi.",
        "/etc is what?",
        "Paris.",
    ]
    prompt = talk.model.target.renderer.prompt(talk.conversation.messages[:3])
    assert calls[1][0] == prompt
    handle(talk, "/undo")
    assert "Dropped: /etc is what?" in capsys.readouterr().err
    handle(talk, "/system You are a pirate.")
    handle(talk, "And now?")
    assert calls[2][0][: len(prompt)] != prompt
    assert talk.conversation.sent()[0] == {"role": "system", "content": "You are a pirate."}
    handle(talk, f"/save {tmp_path}/c.json")
    handle(talk, "/reset")
    assert talk.conversation == Conversation("You are a pirate.")
    handle(talk, "/system -")
    assert talk.conversation == Conversation()
    handle(talk, f"/load {tmp_path}/c.json")
    assert talk.conversation.messages[-1]["content"] == "Berlin."
    handle(talk, "/show")
    shown = capsys.readouterr().err
    assert "4 messages" in shown and "of a window of 512" in shown and "You are a pirate." in shown
    handle(talk, "/help")
    told = capsys.readouterr().err
    assert all(f"/{name}" in told for name in chat.COMMANDS) and "Alt-Enter" in told
    assert handle(talk, "/exit") and handle(talk, "/quit")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/undoo", "did you mean /undo?"),
        ("/xyzzyx", "/help lists them"),
        ("/", "no such command"),
        ("/undo twice", "takes nothing after it"),
        ("/save", "usage: /save FILE"),
        ("/set", "usage: /set KEY VALUE"),
        ("/undo", "Nothing was asked"),
        ("/retry", "Nothing was asked"),
    ],
)
def test_misused_commands_say_what_is_right(talk, line, says):
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        handle(talk, line)
    assert talk.conversation == Conversation()


def test_set_is_checked_by_the_schema(talk):
    for line in ("/set temperature 0", "/set top_k=5", "/set seed = 3", "/set seed null"):
        handle(talk, line)
    assert talk.settings == Generation(max_new_tokens=4, temperature=0, top_k=5)
    with pytest.raises(UserError, match="did you mean temperature"):
        handle(talk, "/set temprature 0")
    for key, value in [
        ("temperature", "-1"),
        ("temperature", "warm"),
        ("top_p", "nan"),
        ("seed", ""),
        ("max_new_tokens", "0"),
        ("max_new_tokens", "[1"),
    ]:
        with pytest.raises(UserError, match=key if value != "[1" else "YAML"):
            changed(talk.settings, key, value)
    assert talk.settings.top_k == 5


def test_retry_asks_again(talk, says):
    calls = says("a", "b")
    for line in ("Hello", "/retry"):
        handle(talk, line)
    assert len({tuple(prompt) for prompt, _ in calls}) == 1
    assert [m["content"] for m in talk.conversation.messages] == ["Hello", "b"]


# --- answers ---------------------------------------------------------------------------------


def test_control_characters_do_not_reach_the_terminal(talk, says, capsys):
    assert printable("a\x1b[2Jb\x07\x9b31m\x7f\r\n\tc") == "a[2Jb31m\n\tc"
    assert printable("\u202eabc\u202c \u2067d\u2069 \u05d0") == "abc d \u05d0"
    says(" \x1b]0;owned\x07Hi\r\n ")
    handle(talk, "Hello")
    assert capsys.readouterr().out == "]0;ownedHi\n"


def test_pieces_add_up_to_the_stripped_answer(capsys):
    writer = chat.Writer()
    for piece in (" ", "\n a", " ", "", " b\n", "\n"):
        writer(piece, False)
    assert capsys.readouterr().out == "a  b"


def test_the_real_loop_streams_what_it_keeps(talk, capsys):
    handle(talk, "Hello")
    captured = capsys.readouterr()
    assert captured.out == printable(talk.conversation.messages[-1]["content"]) + "\n"
    assert "4 tokens" in captured.err and "stopped at max_new_tokens 4" in captured.err


def test_ctrl_c_keeps_the_part_that_was_written(talk, monkeypatch, capsys):
    class Impatient(chat.Writer):
        pieces = 0

        def __call__(self, piece, reasoning):
            super().__call__(piece, reasoning)
            self.pieces += 1
            if self.pieces == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(chat, "Writer", Impatient)
    talk.settings = Generation(max_new_tokens=50, temperature=0)
    handle(talk, "Hello")
    captured = capsys.readouterr()
    assert "stopped by Ctrl-C" in captured.err and "stays in the conversation" in captured.err
    assert 1 <= len(talk.model.target.base.tokenizer.tokenize(captured.out.strip())) < 50
    assert captured.out == printable(talk.conversation.messages[-1]["content"]) + "\n"


def test_a_retry_that_fails_brings_the_former_answer_back(talk, says):
    says("Hi.", RuntimeError("out of memory"), Response("", 0, False, interrupted=True))
    handle(talk, "Hello")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            handle(talk, "/retry")
        assert talk.conversation.messages[-1]["content"] == "Hi."


def test_turns_that_are_not_sent_are_reported_and_kept(talk, says, capsys):
    calls = says("x " * 50, "y " * 50, "ok")
    talk.model.window = 200
    for line in ("One " * 20, "Two " * 20, "Three"):
        handle(talk, line)
    assert "turns at the beginning that were not sent: 1" in capsys.readouterr().err
    assert len(calls[-1][0]) + talk.settings.max_new_tokens <= 200
    assert len(talk.conversation.messages) == 6


# --- in the terminal -------------------------------------------------------------------------


def test_a_session(talk, says, monkeypatch, tmp_path, capsys):
    calls = says("Hi.", RuntimeError("CUDA out of memory"), "Again.", KeyboardInterrupt(), "Last.")
    keys = (
        "Hello\r"
        "\x03"  # Ctrl-C on an empty line
        "half\x03"  # and on one that is not
        "one\x1b\rtwo\x1b\rthree\r"  # continued by Alt-Enter; fails
        "/retry\r"
        "/nudo\r"
        "\r"
        "\x1b[200~a\r\nb\x1b[201~\r"  # a bracketed paste; stopped at once
        "Other\r"
        "/undo\r"
        "\x04"  # Ctrl-D
        "/never\r"
    )
    drive(talk, keys, monkeypatch, tmp_path)
    captured = capsys.readouterr()
    assert captured.out == "Hi.\nAgain.\nLast.\n"
    assert captured.err.count("Ctrl-D or /exit leaves.") == 2
    assert "not enough memory on the GPU; " in captured.err
    assert captured.err.count("The question is kept") == 2
    assert "did you mean /undo?" in captured.err and "never" not in captured.err
    assert [m["content"] for m in talk.conversation.messages] == [
        "Hello",
        "Hi.",
        "one\ntwo\nthree",
        "Again.",
    ]
    assert len(calls) == 5
    assert "+three" in (tmp_path / "cache" / "history").read_text()


def test_a_session_ends_with_exit(talk, says, monkeypatch, tmp_path, capsys):
    says("Hi.")
    drive(talk, "/undo\r/exit\rHello\r", monkeypatch, tmp_path)
    captured = capsys.readouterr()
    assert captured.out == "" and "Nothing was asked yet" in captured.err


def test_a_session_without_a_place_for_its_history(talk, says, monkeypatch, tmp_path, capsys):
    says("Hi.")
    (tmp_path / "cache").write_text("a file where a folder should be")
    drive(talk, "Hello\r\x04", monkeypatch, tmp_path)
    assert capsys.readouterr().out == "Hi.\n"


def test_a_prompt_that_cannot_fit_is_reported_in_a_session(
    talk, says, monkeypatch, tmp_path, capsys
):
    says("Hi.")
    drive(talk, "word " * 600 + "\rHello\r\x04", monkeypatch, tmp_path)
    captured = capsys.readouterr()
    assert captured.out == "Hi.\n" and "508 fit" in captured.err


# --- reasoning ---------------------------------------------------------------------------------


def test_reasoning_is_shown_counted_and_kept_apart(talk, says, capsys):
    says(Response("Four.", 9, True, reasoning="Two and two."), "Right.")
    handle(talk, "2 + 2?")
    captured = capsys.readouterr()
    assert captured.out == "Two and two.\n\nFour.\n"
    count = len(talk.model.target.base.tokenizer.tokenize("Two and two."))
    assert f"9 tokens, {count} of them reasoning" in captured.err
    assert talk.conversation.messages[-1] == {
        "role": "assistant", "content": "Four.", "reasoning_content": "Two and two.",
    }  # fmt: skip
    handle(talk, "Sure?")
    assert "reasoning" not in capsys.readouterr().err


def test_reasoning_is_dim_in_a_terminal(monkeypatch, capsys):
    writer = chat.Writer()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for piece, reasoning in (("Hm", True), (". ", True), ("Yes", False), (".", False)):
        writer(piece, reasoning)
    dim, plain = "\x1b[2m", "\x1b[22m"
    assert capsys.readouterr().out == f"{dim}Hm{plain}{dim}.{plain}\n\nYes."


def test_once_the_answer_alone_is_on_stdout(tiny_model, says):
    says(Response("Four.", 9, True, reasoning="Two and two."))
    result = run(tiny_model, *ON_CPU, "--prompt", "2 + 2?")
    assert (result.stdout, result.stderr) == ("Four.\n", "Two and two.\n\n")


# --- calls -------------------------------------------------------------------------------------

SCHEMA = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}
ROME, OSLO = call("weather", city="Rome"), call("weather", city="Oslo")


@pytest.fixture
def schemas(tmp_path):
    """A file for --tools."""
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([SCHEMA]))
    return file


def roles(talk):
    return [message["role"] for message in talk.conversation.messages]


def test_a_result_is_typed_and_the_model_goes_on(
    talk, says, monkeypatch, tmp_path, schemas, capsys
):
    two = Response("", 9, True, calls=[copy.deepcopy(ROME), copy.deepcopy(OSLO)])
    calls = says(two, "Mild in both.", "Yes.")
    talk.conversation.tools = chat.read_tools(str(schemas))
    drive(talk, "Rome, Oslo?\r20 degrees\r10 degrees\rSure?\r\x04", monkeypatch, tmp_path)
    captured = capsys.readouterr()
    assert captured.out == "Mild in both.\nYes.\n"
    assert 'weather {"city": "Rome"}' in captured.err and '{"city": "Oslo"}' in captured.err
    assert roles(talk) == ["user", "assistant", "tool", "tool", "assistant", "user", "assistant"]
    results = [m for m in talk.conversation.messages if m["role"] == "tool"]
    assert [(m["content"], m["name"], m["tool_call_id"]) for m in results] == [
        ("20 degrees", "weather", "call00001"),
        ("10 degrees", "weather", "call00002"),
    ]
    renderer = talk.model.target.renderer
    assert calls[1][0] == renderer.prompt(talk.conversation.sent()[:4])
    text = renderer.tokenizer.decode(calls[1][0])
    assert '"name": "weather"' in text and "20 degrees" in text


def test_a_call_without_a_result_keeps_the_question(
    talk, says, monkeypatch, tmp_path, schemas, capsys
):
    says(Response("", 9, True, calls=[copy.deepcopy(ROME)]), "Hello.")
    talk.conversation.tools = chat.read_tools(str(schemas))
    drive(talk, "Rome?\r\x04Hi\r\x04", monkeypatch, tmp_path)  # Ctrl-D in place of a result
    assert "The question is kept" in capsys.readouterr().err
    assert [m["content"] for m in talk.conversation.messages] == ["Hi", "Hello."]


@pytest.mark.parametrize(
    ("stdin", "stdout"), [("20 degrees\n", "Mild.\n"), ("", 'weather {"city": "Rome"}\n')]
)
def test_once_a_result_is_piped_or_the_call_is_the_answer(tiny_model, says, schemas, stdin, stdout):
    says(Response("", 9, True, calls=[copy.deepcopy(ROME)]), "Mild.")
    result = run(tiny_model, *ON_CPU, "--prompt", "Rome?", "--tools", schemas, stdin=stdin)
    assert result.exit_code == 0, result.output
    assert result.stdout == stdout and 'weather {"city": "Rome"}' in result.stderr


def test_the_real_loop_hands_the_tools_on(talk, monkeypatch, schemas, capsys):
    seen = []
    original = generation.generate
    monkeypatch.setattr(
        generation,
        "generate",
        lambda *given, tools: seen.append(tools) or original(*given, tools=tools),
    )
    handle(talk, "Hello")
    talk.conversation.tools = chat.read_tools(str(schemas))
    handle(talk, "Hello")
    assert seen[0] == [None] and seen[1][0][0]["function"]["name"] == "weather"


def test_a_broken_call_is_text_with_a_word_about_it(talk, says, schemas, capsys):
    says(Response("<tool_call>{", 5, True, malformed=True))
    talk.conversation.tools = chat.read_tools(str(schemas))
    handle(talk, "Rome?")
    captured = capsys.readouterr()
    assert captured.out == "<tool_call>{\n" and "a call that cannot be read" in captured.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ('{"name": "weather"}', "must be a list"),
        ("[1]", "an object with a function's name"),
        (None, "No such file"),
    ],
)
def test_a_wrong_file_of_tools_is_named(tiny_model, tmp_path, content, words):
    file = tmp_path / "tools.json"
    if content is not None:
        file.write_text(content)
    result = run(tiny_model, *ON_CPU, "--prompt", "x", "--tools", file)
    assert result.exit_code == 2 and words in result.stderr and "tools.json" in result.stderr


# --- once ------------------------------------------------------------------------------------


def test_one_shot_writes_the_answer_alone_to_stdout(tiny_model, tiny_target):
    by_option = run(
        tiny_model,
        *ON_CPU,
        "--prompt",
        "Hello",
        "generation.temperature=0",
        "generation.max_new_tokens=4",
    )
    by_pipe = run(tiny_model, *ON_CPU, *SHORT, stdin="Hello\n")
    [expected] = generation.generate(
        tiny_target.base.model,
        tiny_target.renderer,
        [tiny_target.renderer.prompt([{"role": "user", "content": "Hello"}])],
        tiny_target.config.generation,
    )
    for result in (by_option, by_pipe):
        assert result.exit_code == 0, result.stderr
        assert result.stdout == printable(expected.text) + "\n"
        assert "stopped at max_new_tokens 4" in result.stderr


def test_the_system_prompt_is_the_first_message(tiny_model, says):
    calls = says("Hi.")
    result = run(tiny_model, *ON_CPU, "--prompt", "Hello", "--system", "Be brief.")
    assert (result.stdout, result.stderr) == ("Hi.\n", "")
    renderer = opening.open_target(str(tiny_model), ON_CPU).renderer
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    assert calls[0][0] == renderer.prompt(messages)


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        ([], "", "stdin: the prompt is empty"),
        ([], b"\xff", "not UTF-8"),
        (["--prompt", " "], None, "--prompt: the prompt is empty"),
        (["--prompt", "\udcff"], None, "not UTF-8"),
        (["--prompt", "x", "generation.temperature=-1"], None, "generation.temperature"),
        (
            ["--prompt", "x", "generation.temprature=1"],
            None,
            "did you mean generation.temperature?",
        ),
        (["--prompt", "word " * 600], None, "window of 512"),
        (["--prompt", "x", "--compare"], None, "name a run"),
    ],
)
def test_mistakes_end_with_2_and_one_sentence(tiny_model, arguments, stdin, says):
    result = run(tiny_model, *ON_CPU, *arguments, stdin=stdin)
    assert result.exit_code == 2 and says in result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr


def test_ctrl_c_in_one_shot_exits_with_130(tiny_model, says):
    says(Response("Half", 1, False, interrupted=True))
    result = run(tiny_model, *ON_CPU, "--prompt", "Hello")
    assert (result.exit_code, result.stdout) == (130, "Half\n")


def test_compare_answers_with_base_and_tuned(adapter, tiny_model):
    compared = run(adapter, *ON_CPU, *SHORT, "--prompt", "Hello", "--compare")
    base = run(tiny_model, *ON_CPU, *SHORT, "--prompt", "Hello")
    merged = run(adapter, *ON_CPU, *SHORT, "--prompt", "Hello")
    assert compared.exit_code == 0, compared.stderr
    assert base.stdout != merged.stdout
    assert compared.stdout == f"base:\n{base.stdout}\ntuned:\n{merged.stdout}"


def test_compare_stopped_in_the_base_stops_both(adapter, says):
    calls = says(Response("Half", 1, False, interrupted=True))
    result = run(adapter, *ON_CPU, "--prompt", "Hello", "--compare")
    assert result.exit_code == 130 and len(calls) == 1


def test_the_newest_run_is_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert chat.default_target([]) == "smollm2-135m"
    assert chat.default_target(["model.name=a/b", "model.name=./c"]) == "./c"
    for age, name in enumerate(("b", "c", "a")):
        file = tmp_path / "runs" / name / "adapter_config.json"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (100 - age, 100 - age))
    (tmp_path / "runs" / "unfinished").mkdir()
    assert chat.default_target([]) == "runs/b"
    assert "runs/b" in capsys.readouterr().err


@pytest.mark.real
def test_the_sample_knows_the_capital_of_france():
    result = run(
        "smollm2-135m",
        *ON_CPU,
        "--prompt",
        "What is the capital of France?",
        "generation.temperature=0",
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "The capital of France is Paris.\n"
