"""LLM: the same engine inside the caller's process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.config import Config
from engine.core import EngineCore
from engine.errors import ConfigError, InvalidParameter, PromptTooLong, TemplateError
from engine.llm import LLM
from engine.types import ModelInfo, SamplingParams
from tests import fake_engine_process
from tests.fakes import FakeRunner

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def build(config: Config) -> tuple[EngineCore, ModelInfo]:
    return fake_engine_process.build(config, lambda phase, detail, share: None)


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(max_waiting_requests=4, max_num_seqs=2, build_core=build) as loaded:
        yield loaded


def test_answers_come_in_the_order_of_the_prompts_however_many_there_are(llm: LLM) -> None:
    prompts = [f"prompt number {index}" for index in range(30)]
    answers = llm.generate(prompts, GREEDY)
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in prompts[:3]]
    assert [answer.token_ids for answer in answers[:3]] == [answer.token_ids for answer in alone]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert llm.tokenizer.decode(answer.prompt_token_ids) == prompt
        assert answer.text == llm.tokenizer.decode(answer.token_ids)
        assert answer.choices[0].finish_reason == "length"


def test_takes_token_ids_several_choices_and_a_stop_string(llm: LLM) -> None:
    (answer,) = llm.generate([[5, 6, 7]], GREEDY)
    stop = answer.text[5:8]
    (stopped,) = llm.generate([[5, 6, 7]], GREEDY, stop=(stop,))
    assert stopped.text == answer.text[: answer.text.index(stop)]
    assert (stopped.choices[0].finish_reason, stopped.choices[0].stop_reason) == ("stop", stop)
    (several,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=5, logprobs=0), num_choices=3)
    assert len({tuple(choice.token_ids) for choice in several.choices}) == 3
    assert [len(choice.logprobs or []) for choice in several.choices] == [5, 5, 5]


def test_parameters_may_differ_from_prompt_to_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (1, 2, 3)]
    assert [len(answer.token_ids) for answer in llm.generate(["a", "b", "c"], params)] == [1, 2, 3]
    with pytest.raises(InvalidParameter, match="2 sampling parameters for 1"):
        llm.generate("a", params[:2])


def test_chat_uses_the_template_for_one_conversation_or_several(llm: LLM) -> None:
    hello = [{"role": "user", "content": "Hello <|im_end|>"}]
    (answer,) = llm.chat(hello, GREEDY)
    text = llm.tokenizer.decode(answer.prompt_token_ids)
    assert text == "<|im_start|>user\nHello <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert answer.prompt_token_ids.count(fake_engine_process.EOS) == 1
    assert [each.token_ids for each in llm.chat([hello, hello], GREEDY)] == [answer.token_ids] * 2
    with pytest.raises(TemplateError):
        llm.chat([{"role": "user", "content": "x"}, {"role": None}])


def test_a_wrong_prompt_or_option_is_told_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(PromptTooLong):
        llm.generate(["fine", [5] * fake_engine_process.MAX_MODEL_LEN], GREEDY)
    with pytest.raises(InvalidParameter, match="top_p"):
        llm.generate("a", SamplingParams(top_p=2.0))
    assert not llm._core.has_work
    with pytest.raises(ConfigError, match="unknown option 'colour'"):
        LLM(colour="blue", build_core=build)


def test_a_failure_of_one_prompt_leaves_the_others_alone(llm: LLM) -> None:
    runner = llm._core.runner
    assert isinstance(runner, FakeRunner)
    runner.nan_ids.add("offline-1")
    answers = llm.generate(["a", "b", "c"], GREEDY)
    assert [answer.choices[0].finish_reason for answer in answers] == ["length", "error", "length"]
    assert "not finite" in (answers[1].error or "")


def test_an_interrupt_leaves_no_work_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> list[object]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm._core, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], GREEDY)
    assert not llm._core.has_work
    assert len(llm.generate("a", GREEDY)[0].token_ids) == 8
