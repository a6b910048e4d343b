"""The conversation as it goes on: turns, what fits the window, and its file."""

import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.conversation.calling import call
from etude.conversation.history import Conversation, fit, load, save
from etude.conversation.renderer import Renderer
from etude.errors import UserError


def exchange(conversation, question, answer):
    conversation.ask(question)
    conversation.answer({"role": "assistant", "content": answer})


def use(conversation, question, *results, answer="Done."):
    """A question that is answered by a call for each result, and then in words."""
    conversation.ask(question)
    calls = [call("look_up", number=at) for at, _ in enumerate(results)]
    conversation.answer({"role": "assistant", "content": "", "tool_calls": calls})
    for one, result in zip(calls, results, strict=True):
        conversation.give(one, result)
    conversation.answer({"role": "assistant", "content": answer})


# --- the state -------------------------------------------------------------------------------


def test_conversation_takes_turns():
    conversation = Conversation(system="Be brief.")
    assert not conversation.pending
    conversation.ask("lost")
    conversation.ask("One?")
    assert conversation.pending and len(conversation.messages) == 1
    conversation.answer({"role": "assistant", "content": "1"})
    exchange(conversation, "Two?", "2")
    assert [m["role"] for m in conversation.sent()] == ["system", *["user", "assistant"] * 2]
    assert conversation.take_answer()[0]["content"] == "2" and conversation.pending
    assert conversation.take_answer() == []
    assert conversation.undo() == "Two?"
    assert conversation.undo() == "One?"
    with pytest.raises(UserError, match="Nothing was asked"):
        conversation.undo()


def test_a_call_and_its_result_belong_to_their_question():
    conversation = Conversation()
    use(conversation, "One?", "1", "2")
    use(conversation, "Two?", "3")
    ids = [m["tool_call_id"] for m in conversation.messages if m["role"] == "tool"]
    assert ids == ["call00001", "call00002", "call00003"]
    assert [m["role"] for m in conversation.take_answer()] == ["assistant", "tool", "assistant"]
    assert conversation.pending and conversation.undo() == "Two?"
    assert [m["role"] for m in conversation.messages] == [
        "user", "assistant", "tool", "tool", "assistant",
    ]  # fmt: skip
    # One that was called and got no result never got an answer.
    conversation.ask("Three?")
    conversation.answer({"role": "assistant", "content": "", "tool_calls": [call("look_up")]})
    assert conversation.pending
    conversation.ask("Four?")
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["One?", "Four?"]


def test_tools_are_on_the_first_message_that_is_sent():
    conversation = Conversation(tools=TOOLS)
    assert conversation.sent() == []
    conversation.ask("One?")
    assert conversation.sent()[0] == {"role": "user", "content": "One?", "tools": TOOLS}
    conversation.system = "Be brief."
    assert [m.get("tools") for m in conversation.sent()] == [TOOLS, None]
    assert "tools" not in conversation.messages[0]


def test_fit_drops_a_call_with_its_results_and_keeps_the_tools():
    for system in (None, "Be brief."):
        conversation = Conversation(system, tools=TOOLS)
        use(conversation, "One?", "long " * 20, "longer " * 20)
        use(conversation, "Two?", "3")
        conversation.ask("Three?")
        sent = conversation.sent()
        messages, dropped = fit(Letters(), sent, 120, 20)
        head = 1 if system else 0
        assert dropped == 1 and messages[0]["tools"] == TOOLS
        assert [m["content"] for m in messages[head:]] == ["Two?", "", "3", "Done.", "Three?"]
        assert not any("tools" in m for m in messages[1:])
        assert sent == conversation.sent()


def test_an_empty_system_prompt_is_one():
    assert Conversation(system="").sent() == [{"role": "system", "content": ""}]
    assert Conversation().sent() == []


TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "", "parameters": {}}}]


class Letters:
    """A renderer whose tokens can be counted by hand: 3 a message and 2 for the answer's head."""

    def prompt(self, messages):
        return [0] * (sum(3 + len(m["content"]) for m in messages) + 2)


turns = st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9)), max_size=6)


@given(
    turns,
    st.text(max_size=9),
    st.none() | st.text(max_size=9),
    st.integers(1, 120),
    st.integers(1, 40),
)
def test_fit_drops_whole_turns_from_the_front(said, last, system, window, reserve):
    conversation = Conversation(system)
    for question, answer in said:
        exchange(conversation, question, answer)
    conversation.ask(last)
    everything = conversation.sent()
    head = everything[: system is not None]
    before = [dict(message) for message in everything]
    try:
        messages, dropped = fit(Letters(), everything, window, reserve)
    except UserError as error:
        alone = len(Letters().prompt([*head, everything[-1]]))
        assert alone + reserve > window
        assert f"{alone:,} tokens" in str(error)
        return
    assert len(Letters().prompt(messages)) + reserve <= window
    assert messages == [*head, *everything[len(head) + 2 * dropped :]]
    assert messages[-1]["content"] == last
    if dropped:  # no more than had to go
        more = [*head, *everything[len(head) + 2 * (dropped - 1) :]]
        assert len(Letters().prompt(more)) + reserve > window
    assert everything == before


def test_fit_without_a_window_keeps_all():
    conversation = Conversation()
    exchange(conversation, "One?", "1")
    assert fit(Letters(), conversation.sent(), None, 10**9) == (conversation.sent(), 0)


def test_fit_with_the_real_renderer(sample_tokenizer):
    conversation = Conversation("Be brief.")
    for number in range(20):
        exchange(conversation, f"What is {number} + 1?", f"It is {number + 1}.")
    conversation.ask("And now?")
    renderer = Renderer(sample_tokenizer)
    messages, dropped = fit(renderer, conversation.sent(), 200, 50)
    assert 0 < dropped < 20 and messages[0]["role"] == "system"
    assert len(renderer.prompt(messages)) <= 150


# --- files -----------------------------------------------------------------------------------


def test_save_and_load_give_the_same_conversation(tmp_path):
    conversation = Conversation("Sois bref.")
    exchange(conversation, "Où ?\n\x1b[31m", "là 🙂")
    conversation.messages[-1]["reasoning_content"] = "hm"
    use(conversation, "Où ?", "là", "ici")
    conversation.tools = TOOLS
    save(conversation, tmp_path / "c.json")
    assert load(tmp_path / "c.json") == conversation


def test_save_overwrites_nothing(tmp_path):
    path = tmp_path / "c.json"
    path.write_text("precious")
    with pytest.raises(UserError, match="not overwritten"):
        save(Conversation(), path)
    assert path.read_text() == "precious"
    with pytest.raises(UserError, match="cannot be written"):
        save(Conversation(), tmp_path / "nowhere" / "c.json")


def test_a_save_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    broken = Conversation()
    exchange(broken, "\ud800", "b")
    with pytest.raises(UserError, match="cannot be written"):
        save(broken, tmp_path / "c.json")
    whole = Conversation()
    exchange(whole, "a", "b")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        save(whole, tmp_path / "c.json")
    assert not list(tmp_path.iterdir())


def user(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "an object"),
        ({"messages": {}}, "an object"),
        ({"messages": [], "system": 1}, "an object"),
        ({"messages": ["hello"]}, 'message 1: role "user"'),
        ({"messages": [user(1)]}, "message 1"),
        ({"messages": [user("a"), user("b")]}, 'message 2: role "assistant"'),
        ({"messages": [user("a"), {"role": "tool", "content": "b"}]}, 'role "assistant"'),
        (
            {
                "messages": [
                    user("a"),
                    {"role": "assistant", "content": "b", "tool_calls": [1]},
                    {"role": "assistant", "content": "c"},
                ]
            },
            'role "tool" or "user"',
        ),
        ({"messages": [{**user("a"), "tool": 1}]}, "message 1"),
        ({"messages": [user("\ud800")]}, "not a saved conversation: .*surrogates not allowed"),
    ],
)
def test_load_checks_the_form(tmp_path, value, says):
    (tmp_path / "c.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=says):
        load(tmp_path / "c.json")


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_load_of_what_is_no_json(tmp_path, content):
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(UserError, match="not a saved conversation"):
        load(tmp_path / "c.json")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "none.json")
