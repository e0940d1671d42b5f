"""A turn computes its own new tokens only, whatever came before it and whatever happens to the request meanwhile."""

from __future__ import annotations

import re

import pytest

from serving import DENSE_BELOW, LONG_TOKENS, Media, Served, assistant, ran_sparse, same, scripted, text, user, video


@pytest.mark.server("main")
def test_second_turn_after_a_long_video_prefills_its_own_tokens_only(main: Served, media: Media) -> None:
    messages = [user(video(media.long_video), text("What do you see in the video?"))]
    first = main.ask(messages, 4, rid="long-1")
    messages += [assistant(first.text), user(text("Which one came first? Tell me more. " * 6))]
    second = main.ask(messages, 4, rid="long-2")

    records = main.records("long-1")
    assert len(first.prompt_ids) > LONG_TOKENS
    assert sum(r.chunk_len for r in records) == len(first.prompt_ids) - first.cached_tokens
    assert ran_sparse([r for r in records if r.seq_len > DENSE_BELOW])
    assert [r.prefix_len for r in records[1:]] == [r.seq_len for r in records[:-1]]

    records = main.records("long-2")
    assert ran_sparse(records)
    assert second.cached_tokens >= len(first.prompt_ids)
    assert records[0].prefix_len == second.cached_tokens
    assert sum(r.chunk_len for r in records) == len(second.prompt_ids) - second.cached_tokens < 100
    assert records[-1].seq_len == len(second.prompt_ids)


@pytest.mark.server("main")
def test_every_turn_starts_where_the_cache_ends(main: Served, media: Media) -> None:
    before = 0
    for turn, prompt in enumerate(scripted(media.six_turns())):
        answer = main.ask(prompt, 1, rid=f"turn-{turn}")
        records = main.records(f"turn-{turn}")
        assert records[0].prefix_len == answer.cached_tokens
        assert sum(r.chunk_len for r in records) == len(answer.prompt_ids) - answer.cached_tokens
        assert ran_sparse([r for r in records if r.seq_len > DENSE_BELOW])
        assert answer.cached_tokens >= before
        before = len(answer.prompt_ids)


RETRACTED = re.compile(r"(Testing retraction|Retract requests)\. #retracted_reqs: [1-9]")


@pytest.mark.parametrize("name", ["paged"])
def test_retracted_requests_answer_as_they_do_alone(served: Served, media: Media) -> None:
    new_tokens = 80
    prompts = [media.conversation(seed, 3) for seed in range(40, 46)]
    before = len(RETRACTED.findall(served.server.log()))
    together = served.ask_all(prompts, new_tokens)
    assert len(RETRACTED.findall(served.server.log())) > before
    for prompt, answer in zip(prompts, together):
        served.server.flush_cache()
        same(served.ask(prompt, new_tokens), answer)


@pytest.mark.server("main")
def test_client_that_leaves_mid_prefill_leaves_nothing_behind(main: Served, media: Media) -> None:
    question = [user(video(media.videos[0]), text("And now?"))]
    expected = main.ask(question)
    main.server.flush_cache()
    main.ask_and_leave(
        [user(video(media.long_video), text("Who?"))], 4, when=lambda: len(main.records("left")) > 3, rid="left"
    )
    same(main.ask(question), expected)
    main.server.flush_cache()  # waits until the server is idle
    assert main.records("left")[-1].seq_len < LONG_TOKENS
    assert main.used_tokens() == 0
