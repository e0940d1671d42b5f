"""A turn computes its own new tokens only, whatever came before it and whatever happens to the request meanwhile."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from serving import DENSE_BELOW, LONG_TOKENS, Media, Served, assistant, ran_sparse, same, scripted, text, user, video
from sglang_mminfer.tools.telemetry import Telemetry
from sglang_versions import is_before


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


@pytest.mark.server("main")
def test_videos_of_earlier_turns_are_not_decoded_again(main: Served, media: Media, tmp_path: Path) -> None:
    told = Telemetry(main.server.url)
    file = Path(shutil.copy(media.videos[0], tmp_path / "film.mp4"))
    messages = [user(video(file), text("What do you see?"))]
    first = main.ask(messages, rid="film-1")
    made = told.server().media_cache
    assert made is not None and made.entries >= 2 and 0 < made.bytes < made.limit

    again = main.ask(messages, rid="film-again")
    same(first, again)
    kept = told.server().media_cache
    assert kept is not None and (kept.misses, kept.hits) == (made.misses, made.hits + 2)  # frames and features
    assert again.cached_tokens == len(first.prompt_ids) - 1
    times, anew = told.report("film-again").media, told.report("film-1").media
    assert times is not None and anew is not None and times.decode_ms == 0.0 < anew.decode_ms < anew.prepare_ms

    shutil.copy(media.videos[1], file)
    other = main.ask(messages, rid="film-other")
    edited = told.server().media_cache
    assert edited is not None and (edited.misses, edited.hits) == (kept.misses + 2, kept.hits)
    assert other.prompt_ids != first.prompt_ids
    same(other, main.ask([user(video(media.videos[1]), text("What do you see?"))]))


RETRACTED = re.compile(r"(Testing retraction|Retract requests)\. #retracted_reqs: [1-9]")


@pytest.mark.skipif(is_before("0.5.22"), reason="pages of one token alone on a CPU")
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
