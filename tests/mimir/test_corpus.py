"""Generators: deterministic by seed, answers that can be verified from the prompt, lengths as asked."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from engine.mimir import model_path
from engine.mimir.corpus.retrieval import BARE
from engine.mimir.corpus.symbols import Drill
from engine.mimir.tasks import MAKERS, SIZED, contains_answer, count_tokens, make_chat, make_task

LOOKUPS = ("needle", "needle_first", "key_value", "multi_key", "table")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(model_path() / "tokenizer.json"))


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_same_seed_gives_same_chat_and_other_seeds_differ(name: str) -> None:
    chats = [make_chat(name, seed, 100) for seed in range(8)]
    assert chats == [make_chat(name, seed, 100) for seed in range(8)]
    assert len({chat.prompt() for chat in chats}) > 1


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_answer_stands_in_the_last_turn(name: str) -> None:
    for seed in range(20):
        chat = make_chat(name, seed, 100)
        assert chat.turns[-1].role == "assistant"
        assert contains_answer(chat.turns[-1].text, chat.answer)


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookup_answers_stand_in_the_context(name: str) -> None:
    for seed in range(20):
        chat = make_chat(name, seed, 200)
        assert all(line in chat.prompt() for line in chat.answer.splitlines())


@pytest.mark.parametrize("name", sorted(SIZED))
@pytest.mark.parametrize("length", [256, 1024])
def test_tasks_fill_but_never_pass_the_wanted_length(tokenizer: Tokenizer, name: str, length: int) -> None:
    for seed in range(3):
        task = make_task(name, seed, length, tokenizer)
        assert 0.5 * length < count_tokens(tokenizer, task.prompt) <= length


def test_sums_and_extremes_are_right() -> None:
    for seed in range(50):
        question = make_chat("largest", seed, 0).turns[0].text
        numbers = [int(text) for text in re.findall(r"\d+", question)]
        wanted = max if re.search("largest|biggest|highest", question) else min
        assert make_chat("largest", seed, 0).answer == str(wanted(numbers))
        chat = make_chat("total", seed, 0)
        assert chat.answer == str(sum(map(int, re.findall(r"\d+", chat.turns[0].text))))


def test_word_counts_are_right() -> None:
    for seed in range(50):
        chat = make_chat("count_word", seed, 100)
        listed = chat.turns[0].text.split("\n\n")[0].split(", ")
        target = re.findall(r'"(.+)" appears', chat.turns[-1].text)[0]
        assert chat.answer.split()[0] == str(listed.count(target))


def test_most_frequent_word_leads_clearly() -> None:
    for seed in range(50):
        chat = make_chat("most_frequent", seed, 100)
        listed = chat.turns[0].text.split("\n\n")[0].split(", ")
        others = [listed.count(item) for item in set(listed) - {chat.answer}]
        assert listed.count(chat.answer) >= max(others) + 2


def test_question_stands_before_the_context_where_it_should() -> None:
    for seed in range(20):
        text = make_chat("needle_first", seed, 300).turns[0].text
        owner = re.findall(r"(?:for|of) (.+) is", make_chat("needle_first", seed, 300).turns[-1].text)[0]
        assert text.index(owner) < 120


def test_question_for_the_bare_value_gets_a_sentence_that_names_the_key() -> None:
    chats = [make_chat("needle", seed, 100) for seed in range(100)]
    bare = [chat for chat in chats if chat.turns[-2].text.endswith(BARE)]
    assert bare
    for chat in bare:
        assert re.fullmatch(r"The .+ is .+\.", chat.turns[-1].text)
        assert chat.answer in chat.turns[-1].text


@pytest.mark.parametrize("name", ["arithmetic", "small_arithmetic"])
def test_results_of_arithmetic_are_right(name: str) -> None:
    for seed in range(50):
        left, sign, right, result = re.findall(r"\d+|[-+*]", make_chat(name, seed, 0).turns[-1].text.replace("=", ""))
        expected = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]
        assert int(result) == expected


def test_json_replies_parse() -> None:
    for seed in range(50):
        assert isinstance(json.loads(make_chat("json_object", seed, 0).answer), dict)
        assert isinstance(json.loads(make_chat("json_list", seed, 0).answer), list)


@pytest.mark.parametrize("drill", [Drill("repeats", 64, 64), Drill("records", 64, 64), Drill("records", 256, 4083)])
def test_drill_scores_only_what_an_earlier_token_determines(drill: Drill) -> None:
    ids, mask = drill.rows(np.random.default_rng(0), 20, 4096)
    assert ids.shape == mask.shape == (20, drill.length)
    assert ids.min() >= 13
    for row, scored in zip(ids, mask, strict=True):
        spots = np.flatnonzero(scored)
        assert spots.size
        assert all(row[spot] in row[:spot] for spot in spots)


def test_answers_are_matched_as_whole_words() -> None:
    assert contains_answer("The code is 19.", "19")
    assert not contains_answer("The code is 195.", "19")


def test_tasks_import_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import engine.mimir, engine.mimir.tasks"
    subprocess.run([sys.executable, "-c", code], check=True)
