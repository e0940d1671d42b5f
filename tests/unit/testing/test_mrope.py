"""Times and positions of the oracle: numbers by hand from the released rule, and transformers' where they agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from families import qwen2_5_vl, qwen3_5, qwen3_vl
from sglang_mminfer.testing import mrope, qwen_video
from sglang_mminfer.testing.oracle import HFOracle
from sglang_mminfer.testing.oracle_media import open_video
from sglang_mminfer.testing.tiny_model import make_tiny_qwen2_vl
from sglang_mminfer.tools.media import make_image, make_video

IMAGE, VIDEO, WORD = 7, 8, 1


def rule(**fields: Any) -> mrope.Rule:
    return mrope.Rule(
        **{"image": IMAGE, "video": VIDEO, "merge": 2, "tokens_per_second": 2, "steps_apart": False, **fields}
    )


def test_a_prompt_by_hand() -> None:
    """Two words, a picture of 1 x 2 tokens, a word, a video of three steps of 1 x 1 token a second apart, a word."""
    ids = [WORD, WORD, IMAGE, IMAGE, WORD, VIDEO, VIDEO, VIDEO, WORD]
    got = mrope.positions(ids, rule(), images=[(1, 2, 4)], videos=[(3, 2, 2)], seconds=[1.0])
    assert got.tolist() == [
        [0, 1, 2, 2, 4, 5, 7, 9, 10],
        [0, 1, 2, 2, 4, 5, 5, 5, 10],
        [0, 1, 2, 3, 4, 5, 5, 5, 10],
    ]


def test_text_goes_on_behind_the_highest_position_whichever_axis_has_it() -> None:
    wide = mrope.positions([VIDEO] * 8 + [WORD], rule(), videos=[(2, 2, 8)], seconds=[0.5])
    assert wide[:, -1].tolist() == [4, 4, 4]  # columns 0 to 3; times 0 and 1
    long = mrope.positions([VIDEO] * 8 + [WORD], rule(), videos=[(8, 2, 2)], seconds=[2.0])
    assert long[0].tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 29]


def test_qwen3_omni_keeps_fractions() -> None:
    """A word, a video of three steps of 1 x 1 token 0.6 seconds apart at 2 positions a second, two words."""
    got = mrope.positions([WORD, *[VIDEO] * 3, WORD, WORD], rule(fractions=True), videos=[(3, 2, 2)], seconds=[0.6])
    torch.testing.assert_close(got[0], torch.tensor([0, 1, 2.2, 3.4, 4.4, 5.4]))
    assert got[1].tolist() == got[2].tolist() and got[1, :4].tolist() == [0, 1, 1, 1]


def test_qwen2_counts_steps_and_qwen3_pictures() -> None:
    steps = mrope.positions([VIDEO] * 3 + [WORD], rule(tokens_per_second=None), videos=[(3, 2, 2)])
    assert steps[0].tolist() == [0, 1, 2, 3]
    ids = [WORD, VIDEO, VIDEO, WORD, VIDEO, VIDEO, WORD]
    apart = mrope.positions(ids, rule(tokens_per_second=None, steps_apart=True), videos=[(2, 2, 4)])
    assert apart.tolist() == [[0, 1, 1, 3, 4, 4, 6], [0, 1, 1, 3, 4, 4, 6], [0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("ids", [[IMAGE], [IMAGE, IMAGE, IMAGE], [IMAGE, WORD, IMAGE], [WORD], [IMAGE, IMAGE, VIDEO]])
def test_placeholders_that_do_not_fit_are_said(ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"m-RoPE: .* the grids \[\(1, 2, 4\)\]"):
        mrope.positions(ids, rule(), images=[(1, 2, 4)])


# ---- files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> HFOracle:
    return HFOracle(qwen2_5_vl.make(tmp_path_factory.mktemp("tiny") / "model"))


def asked(video: Path, *more: Path) -> list[dict[str, Any]]:
    media = [{"type": "video_url", "video_url": {"url": str(video)}}]
    media += [{"type": "image_url", "image_url": {"url": str(picture)}} for picture in more]
    return [{"role": "user", "content": [*media, {"type": "text", "text": "When?"}]}]


def times(oracle: HFOracle, inputs: dict[str, torch.Tensor]) -> list[int]:
    """The times of the steps of a video, from 0."""
    own = inputs["position_ids"][0, 0, inputs["input_ids"][0] == oracle.model.config.video_token_id]
    return (own.unique() - own.min()).tolist()


def test_32_frames_at_2_fps(oracle: HFOracle, tmp_path: Path) -> None:
    inputs = oracle.inputs(asked(make_video(tmp_path / "a.mp4", 32, 56, 56, 2)))
    assert inputs["video_grid_thw"].tolist()[0][0] == 16
    assert times(oracle, inputs) == list(range(0, 31, 2))


def test_a_minute_at_1_fps_and_the_text_behind_it(tmp_path: Path) -> None:
    config = {"video": {"fps": 1}}
    oracle = HFOracle(qwen2_5_vl.make(tmp_path / "model"), mm_process_config=config)
    inputs = oracle.inputs(asked(make_video(tmp_path / "a.mp4", 60, 56, 56, 1)))
    assert times(oracle, inputs) == list(range(0, 117, 4))
    tokens = (inputs["input_ids"][0] == oracle.model.config.video_token_id).nonzero()
    first, last = inputs["position_ids"][:, 0, tokens[0]].max(), inputs["position_ids"][:, 0, tokens[-1] + 1]
    assert last.flatten().tolist() == [int(first) + 117] * 3


@pytest.mark.parametrize(("fps", "seconds"), [(4, 0.5), (2, 1.0), (1, 2.0)])
def test_seconds_of_a_step_by_the_rate_that_is_taken(tmp_path: Path, fps: int, seconds: float) -> None:
    video = open_video(make_video(tmp_path / "a.mp4", 48, 56, 56, 4))
    assert 2 / qwen_video.sample(video, {"fps": fps}).sampled_fps == seconds


def test_few_of_many_frames_are_far_apart(tmp_path: Path) -> None:
    """100 seconds in 10 frames: a step of two lasts 20 seconds."""
    sampled = qwen_video.sample(open_video(make_video(tmp_path / "a.mp4", 200, 56, 56, 2)), {"max_frames": 10})
    assert sampled.indices == [0, 22, 44, 66, 88, 110, 132, 154, 176, 199]
    assert 2 / sampled.sampled_fps == 20


def test_transformers_places_a_video_alike_where_its_rows_reach_further_than_its_time(
    oracle: HFOracle, tmp_path: Path
) -> None:
    """Told the true seconds. Where time reaches further, transformers' text stands behind the rows and columns."""
    picture = make_image(tmp_path / "a.png", 112, 56)
    for frames, fps, agree in ((8, 8, True), (40, 4, False)):
        inputs = oracle.inputs(asked(make_video(tmp_path / f"{fps}.mp4", frames, 448, 252, fps), picture))
        theirs, _ = oracle.model.model.get_rope_index(
            inputs["input_ids"],
            **{key: inputs[key] for key in ("mm_token_type_ids", "image_grid_thw", "video_grid_thw")},
            second_per_grid_ts=torch.tensor([2 / min(fps, 4 if frames == 8 else 2)]),
        )
        assert torch.equal(theirs, inputs["position_ids"]) == agree
        until = int((inputs["input_ids"][0] == oracle.model.config.video_token_id).nonzero()[-1]) + 1
        assert torch.equal(theirs[..., :until], inputs["position_ids"][..., :until])


@pytest.mark.parametrize(
    "make", [make_tiny_qwen2_vl, qwen3_vl.make, qwen3_5.make], ids=["qwen2_vl", "qwen3_vl", "qwen3_5"]
)
def test_transformers_places_the_other_kinds_alike(make: Any, tmp_path: Path) -> None:
    oracle = HFOracle(make(tmp_path / "model"))
    video, picture = make_video(tmp_path / "a.mp4", 8, 448, 252, 8), make_image(tmp_path / "a.png", 112, 56)
    inputs = oracle.inputs(asked(video, picture))
    keys = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    theirs, _ = oracle.model.model.get_rope_index(inputs["input_ids"], **{key: inputs[key] for key in keys})
    assert torch.equal(theirs, inputs["position_ids"])


def test_qwen3_says_the_time_of_each_step_in_words(tmp_path: Path) -> None:
    oracle = HFOracle(qwen3_vl.make(tmp_path / "model"))
    inputs = oracle.inputs(asked(make_video(tmp_path / "a.mp4", 16, 56, 56, 4)))
    prompt = oracle.processor.tokenizer.decode(inputs["input_ids"][0])
    # Frames 0, 2, 4, 6, 8, 10, 12, 15 of 4 a second; each pair in its middle.
    for time in ("<0.2 seconds>", "<1.2 seconds>", "<2.2 seconds>", "<3.4 seconds>"):
        assert time in prompt, prompt
