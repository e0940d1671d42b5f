"""LLaVA's original form: maps against what SGLang's own model puts at every token of a prompt, and whole prompts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_batch import Modality as SglModality
from sglang.srt.managers.schedule_batch import MultimodalDataItem, MultimodalInputs

from families import llava_original
from processing import Processing
from sglang_mminfer.families.llava_original.processor import lay_out, model_class, rasters_of, side_of
from sglang_mminfer.families.maps import GeometryError, map_from_mm_inputs, reader_of
from sglang_mminfer.families.processors import adapt_model
from sglang_mminfer.modality.items import KEY, Place
from sglang_mminfer.settings import SPLIT_VIDEOS
from sglang_mminfer.tools.media import make_image

SIDE, PIXELS = 5, 70
PINPOINTS = [[PIXELS * w, PIXELS * h] for w in range(1, 5) for h in range(1, 5)]
IMAGE, VOCABULARY = 90, 100
NEWLINE = -1.0
CONFIG = SimpleNamespace(model_type="llava")


class Language:
    """In place of the language model: keeps the embeddings it is given. A word's first number is its id."""

    def __init__(self):
        self.model = SimpleNamespace(
            image_newline=torch.full((3,), NEWLINE),
            embed_tokens=lambda ids: torch.stack([ids, *[torch.full_like(ids, -7)] * 2], dim=-1).float(),
        )

    def __call__(self, input_ids, positions, forward_batch, input_embeds):
        self.seen = input_embeds


def model_of(merge: str, aspect: str):
    """SGLang's model with ours over it. Pixels say where a view lies, and become features that say where they lie."""
    from sglang.srt.models.llava import LlavaQwenForCausalLM

    class Marked(model_class(LlavaQwenForCausalLM)):
        def encode_images(self, pixel_values):
            y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
            inside = torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(1, -1, 3)
            return (pixel_values[:, None, :, 0, 0] + inside).float()

    model = Marked.__new__(Marked)
    torch.nn.Module.__init__(model)
    model.config = SimpleNamespace(
        vocab_size=VOCABULARY, image_grid_pinpoints=PINPOINTS, image_aspect_ratio=aspect, image_token_index=IMAGE
    )
    model.image_size, model.patch_size, model.mm_patch_merge_type = PIXELS, PIXELS // SIDE, merge
    model.vision_tower, model.language_model = SimpleNamespace(device="cpu"), Language()
    return model


def item_of(size: tuple[int, int], modality: SglModality, merge: str, aspect: str) -> MultimodalDataItem:
    """As SGLang's processor makes it, with pixels [views, 3, 1, 1] of (cut or not, top, left)."""
    from sglang.srt.multimodal.mm_utils import get_anyres_image_grid_shape

    views = [[0, 0, 0]]
    if "anyres" in aspect:
        across, down = get_anyres_image_grid_shape(size, PINPOINTS, PIXELS)
        views += [[1, r * SIDE, c * SIDE] for r in range(down) for c in range(across)]
    rasters = rasters_of(size, SIDE, PIXELS, aspect, merge, PINPOINTS, modality is SglModality.VIDEO)
    return MultimodalDataItem(
        modality=modality,
        feature=np.array(views, dtype=np.float32)[:, :, None, None],
        model_specific_data={
            "image_sizes": [size],
            "image_aspect_ratio": aspect,
            KEY: [(0, 0, 1, *raster) for raster in rasters],
        },
    )


def embedded(model, ids: list[int], media: MultimodalInputs, cuts: list[int]) -> torch.Tensor:
    """[tokens, 3]: what the language model is given, chunk by chunk."""
    seen = []
    for start, stop in zip([0, *cuts], [*cuts, len(ids)]):
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_extend=lambda: True, is_decode=lambda: False),
            mm_inputs=[media],
            batch_size=1,
            extend_start_loc=torch.tensor([0]),
            extend_seq_lens=torch.tensor([stop - start]),
            extend_seq_lens_cpu=[stop - start],
            extend_prefix_lens_cpu=[start],
        )
        model.forward(torch.tensor(ids[start:stop]), torch.arange(start, stop), batch)
        assert batch.mm_inputs == [media]
        seen.append(model.language_model.seen)
    return torch.cat(seen)


def check_raster(tokens: torch.Tensor, segment) -> None:
    """The features [n, 3] of one segment stand in its cells in raster order; what has no feature is a newline."""
    rows, cols = segment.grid.shape
    raster = tokens[: rows * cols].reshape(rows, cols, 3)
    assert (tokens[rows * cols :] == NEWLINE).all()
    newline = (raster == NEWLINE).all(dim=-1)
    cut = bool(newline.any())
    assert torch.equal(newline, (torch.arange(cols) == cols - 1).expand(rows, cols) & cut)
    raster = raster[:, : cols - cut]
    if not raster.numel():  # of a line of pixels nothing but newlines is left
        return
    assert torch.allclose(raster[..., 0], torch.tensor(float(cut)))
    for axis, line in ((1, raster[..., 1].T), (2, raster[..., 2])):
        assert torch.allclose(line, line[:1].expand_as(line), atol=1e-4), axis
        assert (line[0].diff() > 0).all()
    if not cut and rows == SIDE:
        assert torch.equal(raster[:, 0, 1], torch.arange(SIDE).float())


picture = st.tuples(st.integers(8, 900), st.integers(8, 900)) | st.sampled_from([(1, 900), (2000, 3), (70, 70)])
prompts = st.one_of(
    # One picture of any resolution; several, more than 16 among them; frames that come as pictures.
    st.tuples(
        st.just(SglModality.IMAGE),
        st.sampled_from(["anyres", "anyres_max_9", "anyres_max_2"]),
        picture.map(lambda p: [p]),
    ),
    st.tuples(st.just(SglModality.IMAGE), st.just("pad"), st.lists(picture, min_size=1, max_size=19)),
    st.tuples(st.just(SglModality.VIDEO), st.just("pad"), st.lists(picture, min_size=1, max_size=19)),
)


@settings(max_examples=60, deadline=None)
@given(prompts, st.sampled_from(["flat", "spatial_unpad"]), st.data())
def test_a_map_says_what_the_model_puts_where(prompt, merge, data):
    modality, aspect, sizes = prompt
    if merge == "flat":
        aspect = "pad"
    items = [item_of(size, modality, merge, aspect) for size in sizes]
    words = st.lists(st.integers(0, IMAGE - 1), min_size=1, max_size=4)
    ids = data.draw(words)
    for _ in items:
        ids += [IMAGE, *data.draw(words)]
    lengths = [sum(Place(*place).tokens for place in one.model_specific_data[KEY]) for one in items]
    whole, offsets = lay_out(ids, IMAGE, lengths)
    for i, (item, offset) in enumerate(zip(items, offsets)):
        item.offsets, item.pad_value = [offset], 1000 + i
    media = MultimodalInputs(mm_items=items, im_token_id=IMAGE, video_token_id=IMAGE)
    mmap = map_from_mm_inputs(media, len(whole), reader_of(CONFIG))

    model = model_of(merge, aspect)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=4)))
    from array import array

    padded = list(model.pad_input_ids(array("q", whole), media))
    assert [token for token in whole if token != IMAGE] == [token for token in padded if token < 1000]
    assert [token - 1000 for token in padded if token >= 1000] == [
        i for i, length in enumerate(lengths) for _ in range(length)
    ]
    seen = embedded(model, padded, media, cuts)
    text = torch.tensor([token < 1000 for token in padded])
    assert seen[text][:, 0].tolist() == [token for token in whole if token != IMAGE], "no word is overwritten"
    kinds = [segment.modality for segment in mmap.segments for _ in range(segment.stop - segment.start)]
    assert [kind == "text" for kind in kinds] == text.tolist()
    vision = [segment for segment in mmap.segments if segment.modality != "text"]
    assert {segment.modality for segment in vision} == {modality.name.lower()}
    assert all(segment.grid is not None and segment.grid.frames == 1 for segment in vision)
    for segment in vision:
        assert segment.grid.frame_starts == (segment.start,)
        check_raster(seen[segment.start : segment.stop], segment)


@pytest.fixture(scope="module", params=["onevision", "v1_5"])
def served(request, tmp_path_factory):
    """A checkpoint's own processing and its oracle."""
    path = getattr(llava_original, f"make_{request.param}")(tmp_path_factory.mktemp(request.param) / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SPLIT_VIDEOS.variable, "1")
        yield Processing(path, "llava"), llava_original.oracle(path)


@pytest.mark.parametrize("count", [1, 2, 18])
def test_whole_prompts(served, count, tmp_path):
    processing, oracle = served
    images = [make_image(tmp_path / f"{i}.png", 256 - 10 * i, 64, seed=i) for i in range(count)]
    prompt = "See: " + "".join("<image>\nWhat? " for _ in images)
    got = processing(prompt, images=images)
    pieces = oracle.pieces(
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": str(image)}} for image in images]}]
    )
    expected = [len(piece) for piece in pieces if isinstance(piece, torch.Tensor)]
    token = processing.token("<image>")
    runs = got.runs(token)
    assert [stop - start for start, stop in runs] == expected
    vision = [segment for segment in got.map.segments if segment.modality != "text"]
    alone = count == 1 and "onevision" in str(processing.hf_config.mm_vision_tower)
    assert len(vision) == count + alone
    assert all(segment.grid is not None for segment in vision)
    covered = [position for segment in vision for position in range(segment.start, segment.stop)]
    assert covered == [position for position, found in enumerate(got.ids) if found == token]


def test_what_cannot_be_served_is_said(served, tmp_path):
    processing, _ = served
    image = make_image(tmp_path / "a.png", 64, 64, seed=1)
    with pytest.raises(ValueError, match=r"expected a placeholder \(token \d+, .*\) for each of 2 images, got 1"):
        processing("<image> What?", images=[image, image])
    with pytest.raises(ValueError, match=r"takes images only, got 1 videos"):
        processing("<image> What?", images=[image], videos=[tmp_path / "a.mp4"])


def test_towers(tmp_path):
    with pytest.raises(ValueError, match=r"expected a name with clip or siglip in it, got '/absent/vit'"):
        side_of("/absent/vit")


def item(length: int, **data):
    return SimpleNamespace(
        mm_items=[SimpleNamespace(modality="IMAGE", offsets=[(7, 6 + length)], model_specific_data=data)]
    )


def test_what_the_items_do_not_say():
    """Another model of the type "llava": where its pictures stand and no more."""
    (_, segment) = map_from_mm_inputs(item(25), 32, reader_of(CONFIG)).segments
    assert (segment.modality, segment.start, segment.stop, segment.grid) == ("image", 7, 32, None)
    with pytest.raises(GeometryError, match=r"expected one span of 26 tokens for rasters .*, got \[25\]") as caught:
        map_from_mm_inputs(item(25, **{KEY: [(0, 0, 1, 5, 5, 1)]}), 32, reader_of(CONFIG))
    assert caught.value.reason == "grid_mismatch"
    with pytest.raises(GeometryError) as caught:
        map_from_mm_inputs(
            SimpleNamespace(mm_items=[SimpleNamespace(modality="IMAGE", offsets=None)]), 9, reader_of(CONFIG)
        )
    assert caught.value.reason == "no_offsets"


def test_it_can_be_left_as_sglang_has_it(monkeypatch, note):
    from sglang.srt.models.llava import LlavaQwenForCausalLM

    note(SimpleNamespace(attention_backend="mminfer"))
    resolved = (LlavaQwenForCausalLM, "LlavaQwenForCausalLM")
    assert adapt_model(resolved)[0] is not LlavaQwenForCausalLM
    monkeypatch.setenv(SPLIT_VIDEOS.variable, "0")
    assert adapt_model(resolved) is None
