import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.measure import quality
from etude.measure.quality import (
    WEIGHTS,
    completeness,
    judge,
    length,
    refusal,
    relevance,
    repetition,
)

THRESHOLDS = {"good_threshold": 0.7, "fair_threshold": 0.4}
EXPLAIN = "Explain how photosynthesis works in plants."
TREE = (
    "Photosynthesis lets plants turn sunlight, water and carbon dioxide into sugar. "
    "The plant stores the sugar as energy and releases oxygen."
)
CODE = "Here is the function:\n\n```python\ndef add(a, b):\n    return a + b\n```"


@pytest.mark.parametrize(
    ("heuristic", "good", "bad"),
    [
        (length, (EXPLAIN, TREE), (EXPLAIN, "Plants.")),
        (length, ("Who wrote Hamlet?", "Shakespeare"), ("Write a poem.", "Shakespeare")),
        (length, ("Classify: why explain it?", "negative"), ("Tell me about bees.", "negative")),
        (length, ("介绍一下北京", "北京是中国的首都。"), ("介绍一下北京", "是。")),
        (repetition, (TREE,), ("The sun is hot. " * 20,)),
        (
            repetition,
            ("Eat well.\nSleep well.\nRun.",),
            ("1. Eat well.\n2. Eat well.\n3. Eat well.",),
        ),
        (repetition, ("Ten million is 10000000000000.",), ("Ten million is aaaaaaaaaaaaa",)),
        (repetition, ("Title\n----------------\nText.",), ("Title\n!!!!!!!!!!!!!!!!\nText.",)),
        (repetition, ("哈哈，我也这么想。",), ("哈哈哈哈哈哈哈哈哈哈哈哈",)),
        (completeness, (TREE,), (TREE[:-20],)),
        (completeness, ("The answer is in the book on the table.",), ("The answer is in the",)),
        (completeness, (CODE,), (CODE.removesuffix("```"),)),
        (completeness, ("f(x) is even (see above).",), ("f(x) is even (see above.",)),
        (completeness, ("Paris",), ("Paris,",)),
        (completeness, (TREE, True), (TREE, False)),
        (
            completeness,
            ("Things to buy today:\n- some milk\n- bread",),
            ("Things to buy today:\n-",),
        ),
        (relevance, (EXPLAIN, TREE), (EXPLAIN, "My favourite team won the cup last night. " * 5)),
        (relevance, (EXPLAIN, TREE), (EXPLAIN, EXPLAIN)),
        (refusal, (TREE,), ("I'm sorry, but I can't help with that.",)),
        (refusal, ("I'm sorry for your loss.",), ("I\u2019m sorry, but I can\u2019t do it.",)),
        (refusal, ("Think of it as an AI system.",), ("As an AI language model, I have no view.",)),
        (refusal, ("I can't help it, they are so good!",), ("I can't help you.",)),
        (refusal, (TREE,), (TREE + " " + "However, I cannot provide medical advice.",)),
        (quality.format, (EXPLAIN, TREE), (EXPLAIN, TREE + "<|im_end|>")),
        (
            quality.format,
            ("What is </s>?", "</s> ends a text."),
            ("What ends?", "</s> ends a text."),
        ),
        (quality.format, (EXPLAIN, TREE), (EXPLAIN, TREE + "\nuser\nAnd animals?")),
        (quality.format, ("Add", CODE), ("Add", CODE.removesuffix("```"))),
        (quality.format, ("Say", "One (two) :) 1)"), ("Say", "One (two")),
        (quality.format, ("Say", "a[0] and 1) b"), ("Say", "a 0] and 1) b")),
        (quality.format, ("Say", 'He said "no".'), ("Say", 'He said "no.')),
        (quality.format, ("Sag", "Er sagte „ja“."), ("Sag", "Er sagte “ja.")),
        (quality.format, ("Say", "Un café où l'été dure."), ("Say", "Un cafÃ© où l'été dure.")),
        (quality.format, ("Say", "Fine 😀"), ("Say", "Fine \ufffd")),
        (quality.format, ("Reply in JSON.", '{"a": 1}'), ("Reply in JSON.", "a is 1")),
        (quality.format, ("Return JSON", '```json\n{"a": 1}\n```'), ("Return JSON", "```\na\n```")),
        (
            quality.format,
            ("List three colours.", "Red, blue, green"),
            ("List three colours.", "Red"),
        ),
        (quality.format, ("Use bullet points", "- a\n- b"), ("Use bullet points", "a and b")),
    ],
)
def test_each_heuristic_scores_good_above_bad(heuristic, good, bad):
    assert heuristic(*good) >= 0.9
    assert heuristic(*bad) <= 0.67


def test_length_by_hand():
    assert length("Tell me about bees.", "They make honey") == 3 / 4
    assert length(EXPLAIN, "Plants eat sunlight") == 3 / 12


def test_repetition_by_hand():
    # Trigrams of a b c a b c: abc bca cab abc, 3 distinct of 4.
    assert repetition("a b c a b c") == 3 / 4
    # 10 looping characters of 20.
    assert repetition("xxxxxxxxxx abcd efgh") == pytest.approx(1 / 2)


def test_completeness_joins_shape_and_finish():
    no_full_stop = "This is a sentence of several words"
    assert completeness(no_full_stop) == 0.6
    assert completeness(no_full_stop, True) == pytest.approx(0.8)
    assert completeness(no_full_stop, False) == pytest.approx(0.3)


def test_relevance_spares_short_answers_and_is_neutral_without_evidence():
    question = "Which city is the seat of the French government?"
    assert relevance(question, "Paris.") > 0.45
    assert relevance(question, "bananas " * 30) == 0
    assert relevance("Why is it so?", TREE) == 0.5
    assert relevance('Define the word "nectar".', "A drink of the gods. " * 10) == 0.5
    assert relevance("Hello", "Hello") == 1  # a greeting is not an echo


def test_a_refusal_further_on_is_half_a_refusal():
    assert refusal("I cannot provide medical advice. " + TREE) == 0
    assert refusal(TREE + " I cannot provide medical advice.") == 0.5


def test_one_fatal_fault_leaves_the_floor_to_its_weight():
    score = judge("Can you help me?", "I can't help you.", **THRESHOLDS)["score"]
    assert score == pytest.approx(quality.FLOOR ** WEIGHTS["refusal"])


def test_format_halves_for_each_fault():
    assert quality.format("Reply in JSON.", 'Sure: "a [') == 0.5**3


TABLE = [
    ("good", EXPLAIN, TREE, True),
    ("good", "What is the capital of France?", "The capital of France is Paris.", True),
    ("good", "Who wrote Hamlet?", "Shakespeare", True),
    ("good", "Is the sentiment positive, negative or neutral? I loved the show!", "positive", True),
    ("good", "Write a Python function that adds two numbers.", CODE, True),
    ("good", "List three colours as bullet points.", "- Red\n- Green\n- Blue", True),
    ("fair", EXPLAIN, "Photosynthesis is the process by which plants make their", False),
    ("fair", EXPLAIN, "Plants.", None),
    ("fair", EXPLAIN, TREE + "<|im_end|>\n<|im_start|>user", None),
    ("fair", EXPLAIN, "My favourite team won the cup again last night, and the whole town came "
     "out into the streets. Nobody slept until the sun came up over the stadium.", True),
    ("poor", EXPLAIN, "I'm sorry, but I can't help with that.", True),
    ("poor", EXPLAIN, "Plants are green. " * 40, False),
    ("poor", EXPLAIN, "!" * 200, False),
    ("poor", EXPLAIN, " \n ", True),
]  # fmt: skip


@pytest.mark.parametrize(("label", "prompt", "response", "finished"), TABLE)
def test_labels_of_realistic_responses(label, prompt, response, finished):
    judgement = judge(prompt, response, finished=finished, **THRESHOLDS)
    assert judgement["label"] == label, judgement


def test_scores_are_ordered():
    scores = {"good": [], "fair": [], "poor": []}
    for label, prompt, response, finished in TABLE:
        scores[label].append(judge(prompt, response, finished=finished, **THRESHOLDS)["score"])
    assert min(scores["good"]) > max(scores["fair"])
    assert min(scores["fair"]) > max(scores["poor"])


def test_judge_is_the_weighted_geometric_mean():
    judgement = judge(EXPLAIN, "Plants are", **THRESHOLDS)
    expected = 1.0
    for name, weight in WEIGHTS.items():
        expected *= max(judgement["shares"][name], quality.FLOOR) ** weight
    assert judgement["score"] == pytest.approx(expected)
    assert sum(WEIGHTS.values()) == pytest.approx(1)


def test_a_score_at_a_threshold_meets_it():
    score = judge(EXPLAIN, "Plants are", **THRESHOLDS)["score"]
    for good, fair, label in [(score, 0, "good"), (1, score, "fair"), (1, score + 1e-9, "poor")]:
        judgement = judge(EXPLAIN, "Plants are", good_threshold=good, fair_threshold=fair)
        assert judgement["label"] == label


def test_an_empty_response_is_poor_whatever_the_thresholds():
    judgement = judge(EXPLAIN, "", good_threshold=0, fair_threshold=0)
    assert (judgement["score"], judgement["label"]) == (0, "poor")
    assert judgement["shares"] == dict.fromkeys(WEIGHTS, 0)


# Arbitrary Unicode, surrogates included, and text made of the pieces the heuristics look for.
any_text = st.text(st.characters(codec=None), max_size=300) | st.lists(
    st.sampled_from(["```", "json", "\n", "[", "{", '"', "I can't help", "<|", "|>", "- ", "1) "])
).map("".join)  # fmt: skip


@settings(deadline=None)
@given(any_text, any_text, st.sampled_from([True, False, None]))
def test_any_text_gives_shares_between_0_and_1_again_and_again(prompt, response, finished):
    judgement = judge(prompt, response, finished=finished, **THRESHOLDS)
    assert judgement["shares"].keys() == WEIGHTS.keys()
    for value in (judgement["score"], *judgement["shares"].values()):
        assert isinstance(value, float)
        assert 0 <= value <= 1
    assert judge(prompt, response, finished=finished, **THRESHOLDS) == judgement
    assert json.loads(json.dumps(judgement)) == judgement


@pytest.mark.parametrize(
    "unit", ["a", " ", "\n", "[", '{"a":', "```\n", "```", "1. ", "I can't ", "(", "é—", "\t-"]
)
def test_long_text_neither_crashes_nor_hangs(unit):
    text = (unit * 100_000)[:100_000]
    judgement = judge("Return JSON: " + text, "x" + text, **THRESHOLDS)
    assert 0 < judgement["score"] < 0.9
