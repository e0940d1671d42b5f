"""`mminfer niah`: the places of needles, media that can be read, servers that fail, tables and pictures."""

import json
from pathlib import Path

import numpy as np
import pytest

from fake_openai import FakeOpenAI
from sglang_mminfer import Modality, cli
from sglang_mminfer.testing import needle_model
from sglang_mminfer.tools.needles import cards, kits, placed, sequence, task
from sglang_mminfer.tools.niah import ask as niah

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "needle_vlm"
DEPTHS = [0, 0.25, 0.5, 0.75, 1]


def _placed(name: str, length: int = 1024, seed: int = 0) -> placed.Placed:
    make, relays = niah.TASKS[name]
    return make(length, DEPTHS, np.random.default_rng((seed, length)), relays=relays)


def _last_text(messages) -> str:
    content = messages[-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"].strip()


# Conversations


@pytest.mark.parametrize("name", niah.TASKS)
@pytest.mark.parametrize("length", [512, 4096])
def test_needles_lie_at_their_depths_and_are_asked_for_after_they_were_shown(name, length):
    for seed in range(10):
        found = _placed(name, length, seed)
        assert found == _placed(name, length, seed)
        conversation = found.conversation
        assert sorted(asked.depth for asked in found.asked) == list(range(len(DEPTHS)))
        assert len({needle.key for needle in conversation.needles}) == placed.NEEDLES
        named = [needle.same_as for needle in conversation.needles if needle.same_as]
        assert len(named) == len(set(named)) == (len(DEPTHS) if "relay" in name else 0)
        where, before, shown, total = {}, {}, {}, sum(part.tokens for part in conversation.parts)
        at = 0
        for i, turn in enumerate(conversation.turns):
            for part in turn.parts:
                for needle in part.needles:
                    unit = part.tokens // part.size if part.kind != "image" else 0
                    where[needle.key] = (at + needle.slot[0] * unit) / total
                    shown[needle.key] = (i, part.kind)
                    assert needle.same_as is None or needle.digit == before[needle.same_as].digit
                    before[needle.key] = needle
                at += part.tokens
            assert turn.question in shown
        for asked in found.asked:
            turn = conversation.turns[asked.turn]
            assert turn.relay == ("relay" in name) and turn.answer == before[turn.question].digit
            assert shown[turn.question][0] <= asked.turn and shown[turn.question][1] == asked.kind
            assert abs(where[turn.question] - DEPTHS[asked.depth]) < 0.13


@pytest.mark.parametrize("name", niah.TASKS)
def test_the_map_of_a_prompt_is_nearly_that_of_its_tokens(name):
    vocabulary = sequence.Vocabulary(needle_model.make_processor().tokenizer)
    for seed in range(5):
        conversation = _placed(name, seed=seed).conversation
        made, item = kits.prompt_map(conversation, kits.GLYPHS), sequence.build(conversation, vocabulary)
        vision = (item.ids == vocabulary.image_pad) | (item.ids == vocabulary.video_pad)
        assert int(made.members(Modality.VISION).sum()) == vision.sum()
        assert abs(made.length - len(item.ids)) < 10 + 4 * len(conversation.turns)


@pytest.mark.parametrize("name", niah.TASKS)
def test_cards_say_what_is_asked_for(name, tmp_path):
    conversation = _placed(name).conversation
    numbers = cards.numbers_of(conversation)
    plain = [needle.key for needle in conversation.needles if needle.same_as is None]
    assert len({numbers[key] for key in plain}) == len(plain)
    said = cards.messages(conversation, tmp_path)
    assert len(said) == 2 * len(conversation.turns)
    for i, turn in enumerate(conversation.turns):
        assert cards.WORDS[turn.question] in _last_text(said[: 2 * i + 1])
        assert cards.is_right(said[2 * i + 1]["content"], f"It is {numbers[turn.question]}.")
        urls = [part[part["type"]]["url"] for part in said[2 * i]["content"] if part["type"] != "text"]
        assert all(Path(url).stat().st_size > 1000 for url in urls)
    texts = " ".join(cards.text_of(part, numbers) for part in conversation.parts if part.kind == "text")
    assert texts.count("The secret number of") == sum(
        len(part.needles) for part in conversation.parts if part.kind == "text"
    )


def test_a_card_stands_in_its_pair_of_frames_and_no_other():
    part = task.Part("video", 90, 3, needles=[task.Needle("A", "1", slot=(45, 0)), task.Needle("B", "2", slot=(45, 3))])
    bare = task.Part("video", 90, 3)
    numbers = {"A": "1234", "B": "5678"}
    changed = (cards.frames_of(part, numbers) != cards.frames_of(bare, numbers)).any((2, 3))
    assert changed.any(1).nonzero()[0].tolist() == [10, 11]  # the sixth of 10 pairs
    assert changed[10].sum() == 2 * cards.HEIGHT // cards.STRIPS  # two cards, one below the other
    with pytest.raises(ValueError, match="has no room for 4 cards"):
        cards.frames_of(
            task.Part("image", 112, 1, needles=[task.Needle(key, "1") for key in "ABCD"]), dict.fromkeys("ABCD", "1111")
        )


@pytest.mark.parametrize(
    ("said", "right"),
    [
        *(
            ("4217", True),
            ("The number is 4217.", True),
            ("4,217", True),
            ("Like ANCHOR: 4217, so 4217", True),
        ),
        *(("4218", False), ("42170", False), ("", False), ("4217 or 5000", False)),
    ],
)
def test_an_answer_is_right_if_it_names_one_number(said, right):
    assert cards.is_right("4217", said) is right


def test_only_the_needle_models_are_shown_glyphs():
    assert kits.knows_glyphs(str(EXAMPLES / "video")) and kits.knows_glyphs(str(EXAMPLES / "mixed"))
    assert not kits.knows_glyphs(str(EXAMPLES)) and not kits.knows_glyphs("Qwen/Qwen2.5-VL-7B-Instruct")


# The command


def _niah(*arguments: str) -> int:
    return cli.main(["niah", *arguments])


def _answers(settings: niah.Settings) -> dict[str, str]:
    """The right answer to each question, by the names of a conversation's files."""
    return {
        f"{case.name}/{turn.question}": turn.answer
        for case in settings.cases
        for turn in settings.conversation(case).conversation.turns
    }


def test_servers_side_by_side(tmp_path, capsys):
    """One server knows everything; the other fails on every long conversation and is wrong otherwise."""
    settings = niah.Settings(("v-niah", "v-relay"), (512, 768), depths=3, seeds=2, seed=4)
    right = _answers(settings)

    def case_of(messages):
        (url,) = {part["video_url"]["url"] for part in messages[0]["content"] if part["type"] == "video_url"}
        return Path(url).stem.rsplit("-", 2)[0]

    def knows(messages):
        return right[f"{case_of(messages)}/{_last_text(messages)}"]

    def fails(messages):
        return 400 if "-768-" in case_of(messages) else "?"

    common = ("--needles", "glyphs", "--tasks", "v-niah", "--relays", "--lengths", "512", "768", "--depths", "3")
    with FakeOpenAI(knows) as good, FakeOpenAI(fails) as bad:
        urls = ("--url", good.url, "--url", f"{bad.url}/v1")
        assert _niah(*urls, *common, "--seeds", "2", "--seed", "4", "--out", str(tmp_path)) == 0
        assert len(good.prompts) == len(bad.prompts) == settings.questions == 24
    result = json.loads((tmp_path / "niah.json").read_text())
    assert result["settings"]["depths"] == 3 and result["needles"] == "glyphs"
    best, worst = result["servers"].values()
    for name in settings.tasks:
        for length in ("512", "768"):
            assert best["accuracy"][name][length] == {"right": 6, "answered": 6, "errors": 0}
        assert worst["accuracy"][name]["512"] == {"right": 0, "answered": 6, "errors": 0}
        assert worst["accuracy"][name]["768"] == {"right": 0, "answered": 0, "errors": 6}
        assert [len(row) for row in best["grid"][name]] == [3, 3]
    assert worst["errors"] and "no such luck" in worst["errors"][0]
    assert (tmp_path / "niah.png").read_bytes().startswith(b"\x89PNG")
    assert "100.0 %" in capsys.readouterr().out


def test_a_server_with_mminfer_tells_its_density(tmp_path, capsys):
    """By HTTP; a server without it stands beside it and has none. One question's records are forgotten."""
    chunk = {"rid": "request-1", "prefix_len": 0, "chunk_len": 50, "seq_len": 50, "segments": 2, "sparse_layers": 2}
    chunk |= {"density": 0.25, "dense_reason": None, "plan_ms": 1.0, "attn_ms": 1.0, "forward_ms": 1.0}
    later = chunk | {"prefix_len": 50, "seq_len": 100, "density": None, "dense_reason": "short", "sparse_layers": 0}
    kept = {"records": 2, "most": 4096, "seconds": 3600.0}
    report = {"versions": {}, "replicas": 1, "serving": None, "counters": {}, "kept": kept, "mends": []}
    pages = {
        "/mminfer": report,
        "/mminfer/requests/request-1": {"rid": "request-1", "records": [chunk, later]},
        "/mminfer/requests/request-2": {"message": "forgotten"},
    }
    common = ("--needles", "glyphs", "--tasks", "v-niah", "--lengths", "512", "--depths", "2", "--seeds", "1")
    with FakeOpenAI(lambda messages: "0", pages=pages) as server, FakeOpenAI(lambda messages: "0") as stock:
        assert _niah("--url", server.url, "--url", stock.url, *common, "--out", str(tmp_path), "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((tmp_path / "niah.json").read_text())
    told, silent = json.loads((tmp_path / "niah.json").read_text())["servers"].values()
    density = (51 * 25 * 0.25 + 151 * 25) / (51 * 25 + 151 * 25)
    assert told["density"] == {"512": pytest.approx(density, abs=1e-4)} and "density" not in silent
    assert [answer["dense_reasons"] for answer in told["answers"]] == [["short"], []]
    assert [answer["density"] is None for answer in told["answers"]] == [False, True]
    assert f"{density:.3f}" in said.err


def test_media_can_go_with_the_request(tmp_path):
    with FakeOpenAI(lambda messages: "0") as server:
        common = ("--needles", "glyphs", "--tasks", "v-niah", "--lengths", "512", "--depths", "2", "--seeds", "1")
        assert _niah("--url", server.url, *common, "--inline-media", "--out", str(tmp_path)) == 0
        urls = [part["video_url"]["url"] for part in server.prompts[0][0]["content"] if part["type"] == "video_url"]
    assert urls[0].startswith("data:video/mp4;base64,AAAA")


def test_a_server_that_only_fails_is_an_error(tmp_path, capsys):
    with FakeOpenAI(lambda messages: 500) as server:
        common = ("--needles", "glyphs", "--tasks", "v-niah", "--lengths", "512", "--depths", "2", "--seeds", "1")
        assert _niah("--url", server.url, *common, "--out", str(tmp_path)) == 1
    assert "answered nothing: 500" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--url, or a model to serve with --model-path"),
        (("--url", "nowhere"), "expected something like http://"),
        (
            ("--url", "http://127.0.0.1:9", "--mminfer-config", "dense"),
            "--mminfer-config is for servers that are started",
        ),
        (("--model-path", "x", "--mminfer-config", "defualt"), "no built-in config has this name"),
        (("--model-path", "x", "--lengths", "10"), "--lengths: expected a number greater than or equal to 512"),
        (("--model-path", "x", "--depths", "40"), "--depths: expected a number less than or equal to 8"),
        (("--model-path", "x", "--concurrency", "0"), "--concurrency: expected a number greater than or equal to 1"),
    ],
)
def test_wrong_arguments_end_in_a_sentence(arguments, words, tmp_path, capsys):
    assert _niah(*arguments, "--out", str(tmp_path)) == 2
    captured = capsys.readouterr()
    assert words in " ".join(captured.err.split()) and not captured.out


def test_a_server_that_is_not_there_is_named_as_it_was_typed(capsys):
    assert _niah("--url", "http://127.0.0.1:9") == 1
    assert "--url http://127.0.0.1:9: no server there" in capsys.readouterr().err


def test_an_unknown_model_name_and_a_web_page(capsys):
    import functools
    import threading
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *a: None})
    page = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(EXAMPLES)))
    threading.Thread(target=page.serve_forever, args=(0.05,), daemon=True).start()
    try:
        assert _niah("--url", f"http://127.0.0.1:{page.server_address[1]}") == 1
    finally:
        page.shutdown()
        page.server_close()
    assert "/v1/models answers with an error" in " ".join(capsys.readouterr().err.split())
