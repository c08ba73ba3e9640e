"""Text in, text out, through the files of tiny models made here."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import decoders

from ostinato.errors import ContextLengthError, OstinatoError, TokenizerError, UsageError
from ostinato.llm import LLM, Delta
from ostinato.load.gguf_writer import write_gguf
from ostinato.sampling import SamplingParams
from ostinato.text import Tokenizer
from tests.tiny_model import CHATML, CONTEXT, write_tiny_model
from tests.unit.models import tiny_qwen3_5 as qwen35
from tests.unit.models.tiny import Spec, reference
from tests.unit.text.vocabularies import byte_level


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def recurrent_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Delta nets, gated attention and experts, with a real vocabulary and a template."""
    vocabulary = byte_level("qwen35")
    vocabulary["tokenizer.ggml.token_type"] = [int(kind) for kind in vocabulary["tokenizer.ggml.token_type"]]
    spec = qwen35.SPECS[0]
    assert spec.arch is not None
    sizes = {"vocab_size": len(vocabulary["tokenizer.ggml.tokens"]), "max_position_embeddings": CONTEXT}
    model = qwen35.reference(dataclasses.replace(spec, changes={**spec.changes, **sizes}))
    metadata = qwen35.gguf_metadata(model, spec.arch) | vocabulary | {"tokenizer.chat_template": CHATML}
    path = tmp_path_factory.mktemp("recurrent") / "tiny.gguf"
    write_gguf(path, metadata, qwen35.gguf_tensors(model, spec.arch))
    return path


@pytest.fixture(scope="module", params=["float32", "auto", "recurrent float32"])
def llm(request: pytest.FixtureRequest, path: Path, recurrent_path: Path) -> Iterator[LLM]:
    file = recurrent_path if "recurrent" in request.param else path
    with LLM.load(str(file), device="cpu", dtype=request.param.split()[-1], max_batch=3, threads=1) as loaded:
        yield loaded


PROMPT = "The step runs again and again"


def sampled(seed: int, **params: object) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=48, **params)  # type: ignore[arg-type]  # by keyword


def ids_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


@pytest.mark.parametrize("seed", range(6))
def test_the_pieces_together_are_the_text_of_the_tokens(llm: LLM, seed: int) -> None:
    """Random weights write fragments of characters: what never becomes one is U+FFFD, as when decoded at once."""
    deltas = list(llm.stream(PROMPT, sampled(seed)))
    assert "".join(d.text for d in deltas) == llm.tokenizer.decode(ids_of(deltas), skip_special=True)
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    stopped = ids_of(deltas)[-1] in llm.tokenizer.eos_ids
    assert deltas[-1].finish_reason == ("stop" if stopped else "length")
    assert stopped or len(deltas) == 48
    assert llm.generate(PROMPT, sampled(seed)) == "".join(d.text for d in deltas)
    stats = llm.stats
    assert (stats.prompt_tokens, stats.cached_tokens) == (len(llm.tokenizer.encode(PROMPT)), 0)
    assert stats.new_tokens == len(deltas)
    assert stats.prefill_tokens_per_s > 0


def test_an_end_of_text_token_ends_the_answer_and_is_no_text(llm: LLM) -> None:
    eos = min(llm.tokenizer.eos_ids)
    deltas = list(llm.stream(PROMPT, sampled(1, logit_bias={eos: 50.0})))
    assert ids_of(deltas) == [eos]
    assert [(d.text, d.finish_reason) for d in deltas] == [("", "stop")]
    going_on = list(llm.stream(PROMPT, sampled(1, logit_bias={eos: 50.0}, ignore_eos=True)))
    assert ids_of(going_on) == [eos] * 48
    assert going_on[-1].finish_reason == "length"


@pytest.mark.parametrize("seed", range(3))
def test_stop_strings_wherever_tokens_end(llm: LLM, seed: int) -> None:
    """Any piece of an answer as the stop string, over however many tokens: the text before its first place."""
    free = list(llm.stream(PROMPT, sampled(seed)))
    text = "".join(d.text for d in free)
    choose = random.Random(seed)
    for _ in range(12):
        start = choose.randrange(len(text) - 1)
        stop = text[start : start + choose.randint(1, 9)]
        deltas = list(llm.stream(PROMPT, sampled(seed, stop=(stop, "never\x00written"))))
        assert "".join(d.text for d in deltas) == text[: text.index(stop)]
        assert deltas[-1].finish_reason == "stop"
        assert ids_of(deltas) == ids_of(free)[: len(deltas)]
        # It ends with the token that completes the stop string, not later.
        before = llm.tokenizer.decode(ids_of(deltas)[:-1], skip_special=True)
        assert stop not in before.rstrip("\ufffd")


def test_a_stop_string_that_never_comes_holds_nothing_back_at_the_end(llm: LLM) -> None:
    text = llm.generate(PROMPT, sampled(4))
    assert llm.generate(PROMPT, sampled(4, stop=(text[-3:] + "\x00",))) == text


def test_logprobs_are_log_softmax_of_the_models_logits(llm: LLM) -> None:
    prompt = llm.tokenizer.encode(PROMPT)
    deltas = list(llm.stream(prompt, sampled(3, repetition_penalty=1.3, logit_bias={9: 2.0}, top_k=20, logprobs=4)))
    tokens = ids_of(deltas)
    llm.runner.admit(0, SamplingParams(), prompt, (), CONTEXT)
    logits = llm.runner.logits(0, [*prompt, *tokens[:-1]], 0)
    llm.runner.release(0)
    distribution = logits[len(prompt) - 1 :].log_softmax(-1)
    expected = distribution.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    actual = torch.tensor([value for d in deltas for value in d.logprobs])
    # Prompt and answer run through different sums; in bfloat16 each layer rounds them to 2^-9 of values of size 1. In
    # float32 some 30 of them follow each other, of 64 terms whose errors of 2^-23 add at random, in logits up to 8.
    atol = 30 * 64**0.5 / 2 * 2.0**-23 * 8 if llm.runner.kv.dtype == torch.float32 else 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
    top = torch.tensor([[value for _, value in best] for d in deltas for best in d.top_logprobs])
    torch.testing.assert_close(top, distribution.topk(4).values, rtol=0, atol=atol)


def test_a_seed_gives_the_same_text_and_no_seed_another(llm: LLM) -> None:
    assert llm.generate(PROMPT, sampled(5)) == llm.generate(PROMPT, sampled(5))
    assert llm.generate(PROMPT, sampled(5)) != llm.generate(PROMPT, sampled(6))
    unseeded = SamplingParams(temperature=1.0, max_tokens=48)
    assert llm.generate(PROMPT, unseeded) != llm.generate(PROMPT, unseeded)


def test_several_streams_read_in_turn(llm: LLM) -> None:
    alone = ["".join(d.text for d in llm.stream(PROMPT[: 9 * i + 9], sampled(i))) for i in range(3)]
    streams = [llm.stream(PROMPT[: 9 * i + 9], sampled(i)) for i in range(3)]
    texts = [""] * 3
    for deltas in itertools.zip_longest(*streams):
        for i, delta in enumerate(deltas):
            texts[i] += delta.text if delta is not None else ""
    assert texts == alone


# -- conversations ---------------------------------------------------------------------------------------------------


def turn(llm: LLM, messages: list[dict[str, str]], question: str, session: object) -> str:
    messages.append({"role": "user", "content": question})
    params = SamplingParams(temperature=0, max_tokens=12)
    answer = "".join(d.text for d in llm.stream(llm.chat_prompt(messages), params, session=session))  # type: ignore[arg-type]  # Session or None
    messages.append({"role": "assistant", "content": answer})
    return answer


def test_a_conversation_runs_only_what_is_new_and_answers_the_same(path: Path) -> None:
    with LLM.load(str(path), device="cpu", dtype="float32", max_batch=2, chunk=7) as llm:
        session = llm.session()
        kept: list[dict[str, str]] = []
        fresh: list[dict[str, str]] = []
        for number, question in enumerate(("again?", "and the step?", "why\n\n  so")):
            answer = turn(llm, kept, question, session)
            cached = llm.stats.cached_tokens
            prompt = llm.stats.prompt_tokens
            assert (cached == 0) == (number == 0)
            # An answer of random tokens need not come back from its text as the same ids: what is not equal runs anew.
            assert cached < prompt
            assert turn(llm, fresh, question, None) == answer
        edited = [kept[0], {"role": "assistant", "content": "something else"}, {"role": "user", "content": "again?"}]
        params = SamplingParams(temperature=0, max_tokens=12)
        first = "".join(d.text for d in llm.stream(llm.chat_prompt(edited), params, session=session))
        assert llm.stats.cached_tokens > 0
        assert first == llm.generate(llm.chat_prompt(edited), params)
        session.reset()
        assert llm.runner.kv.num_free_pages == llm.runner.kv.num_pages - 1


@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_answer_that_is_broken_off_leaves_the_conversation_usable(path: Path, after: int) -> None:
    with LLM.load(str(path), device="cpu", dtype="float32", chunk=5) as llm:
        session = llm.session()
        ids = llm.tokenizer.encode(PROMPT)
        stream = llm.stream(ids, sampled(1), session=session)
        tokens = ids_of(list(itertools.islice(stream, after)))
        stream.close()
        follow = [*ids, *tokens, *ids]
        params = SamplingParams(temperature=0, max_tokens=12)
        kept = ids_of(list(llm.stream(follow, params, session=session)))
        assert (llm.stats.cached_tokens > 0) == (after > 0)
        session.reset()
        assert kept == ids_of(list(llm.stream(follow, params)))


@pytest.mark.parametrize("after", [1, 5, 12])
def test_recurrent_state_is_gone_on_from_where_it_stands_alone(recurrent_path: Path, after: int) -> None:
    """It cannot go back: a prompt that leaves what has run starts anew, and both ways answer as without a session."""
    with LLM.load(str(recurrent_path), device="cpu", dtype="float32", max_batch=2, chunk=5) as llm:
        session = llm.session()
        ids = llm.tokenizer.encode(PROMPT)
        stream = llm.stream(ids, SamplingParams(temperature=0, max_tokens=12), session=session)
        tokens = ids_of(list(itertools.islice(stream, after)))
        stream.close()
        params = SamplingParams(temperature=0, max_tokens=12)
        follow = [*ids, *tokens, *ids]
        kept = ids_of(list(llm.stream(follow, params, session=session)))
        assert llm.stats.cached_tokens == len(ids) + after - 1
        assert kept == ids_of(list(llm.stream(follow, params)))
        edited = [*ids, *ids]
        kept = ids_of(list(llm.stream(edited, params, session=session)))
        assert llm.stats.cached_tokens == 0
        assert kept == ids_of(list(llm.stream(edited, params)))


def test_one_answer_at_a_time_in_a_conversation(path: Path) -> None:
    with LLM.load(str(path), device="cpu", max_batch=2) as llm:
        session = llm.session()
        stream = llm.stream(PROMPT, sampled(1), session=session)
        next(stream)
        with pytest.raises(UsageError, match="being answered"):
            next(llm.stream(PROMPT, sampled(2), session=session))
        with pytest.raises(UsageError, match="close that stream"):
            session.reset()
        stream.close()
        session.reset()


def test_a_conversation_that_holds_the_only_slot_is_named_in_the_error(path: Path) -> None:
    with LLM.load(str(path), device="cpu") as llm:
        session = llm.session()
        list(llm.stream(PROMPT, sampled(1), session=session))
        with pytest.raises(UsageError, match="kept"):
            llm.generate(PROMPT, sampled(1))
        again = ids_of(list(llm.stream(PROMPT, sampled(1), session=session)))
        session.reset()
        assert ids_of(list(llm.stream(PROMPT, sampled(1)))) == again


# -- limits and loading ----------------------------------------------------------------------------------------------


def test_limits_are_errors_that_say_what_to_do(path: Path) -> None:
    with LLM.load(str(path), device="cpu", context=16) as llm:
        with pytest.raises(ContextLengthError, match=r"17 tokens and the context 16; .*--context 65"):
            next(llm.stream([5] * 17, sampled(1)))
        with pytest.raises(OstinatoError, match="empty"):
            next(llm.stream([], sampled(1)))
        assert len(ids_of(list(llm.stream([5] * 10, sampled(1, ignore_eos=True))))) == 6
    for settings, says in (
        ({"threads": 0}, "--threads 0"),
        ({"max_batch": 0}, "batch of 0"),
        ({"dtype": "int3"}, "int3"),
        ({"context": CONTEXT + 1}, "--context"),
    ):
        with pytest.raises(OstinatoError, match=says):
            LLM.load(str(path), device="cpu", **settings)  # type: ignore[arg-type]  # by keyword


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    with LLM.load(str(write_tiny_model(tmp_path / "m.gguf", template=None)), device="cpu") as llm:
        with pytest.raises(TokenizerError, match="--raw"):
            llm.chat_prompt([{"role": "user", "content": "hi"}])
        assert llm.generate(PROMPT, sampled(1))


def test_a_directory_with_a_hugging_face_checkpoint(tmp_path: Path) -> None:
    """Weights, tokenizer.json and chat template as transformers writes them; greedy tokens are transformers'."""
    keys = byte_level("smollm")
    backend = Tokenizer.from_gguf(keys)._backend
    vocabulary = len(keys["tokenizer.ggml.tokens"])
    theirs = reference(Spec("qwen3", "Qwen3", {"vocab_size": vocabulary, "head_dim": 32}))
    theirs.save_pretrained(tmp_path)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with LLM.load(str(tmp_path), device="cpu", dtype="float32") as llm:
        ids = llm.chat_prompt([{"role": "user", "content": PROMPT}])
        assert ids == backend.encode(PROMPT).ids
        tokens = ids_of(list(llm.stream(ids, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))))
        for position, token in enumerate(tokens):
            with torch.no_grad():
                logits = theirs(torch.tensor([[*ids, *tokens[:position]]])).logits[0, -1]
            assert int(logits.argmax()) == token
