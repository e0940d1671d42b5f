"""The paper's baselines as head configs: the packaged files, and sizes for a given density."""

import numpy as np
import pytest

from sglang_mminfer import AShape, HeadConfig, VerticalSlash
from sglang_mminfer.tools import baselines
from sglang_mminfer.tools.needles import kits, placed


@pytest.fixture(scope="module", params=[placed.video_needles, placed.mixed_needles])
def prompt(request):
    conversation = request.param(4096, [0, 0.5, 1], np.random.default_rng(5), relays=True).conversation
    return kits.prompt_map(conversation, kits.GLYPHS)


@pytest.mark.parametrize("name", baselines.PUBLISHED)
def test_a_packaged_baseline_is_the_published_one(name):
    packaged = HeadConfig.load(f"baseline_{name}")
    assert packaged.to_json() == baselines.published(name).to_json()
    assert f"baseline_{name}" in HeadConfig.available()


@pytest.mark.parametrize("name", baselines.NAMES)
def test_a_baseline_has_the_wished_density(prompt, name):
    for wished in (0.3, 0.6):
        config, budget = baselines.sized_for(name, wished, prompt)
        found = baselines.density_of(config.rows[0][0], prompt)
        smallest = baselines.density_of(baselines.with_budget(name, 1, prompt).rows[0][0], prompt)
        assert abs(found - max(wished, smallest)) < 0.04
        assert baselines.with_budget(name, budget, prompt).rows == config.rows
        assert HeadConfig.from_json(config.to_json()).rows == config.rows
        assert f"{found:.3f}" in config.provenance.note


def test_a_wider_window_visits_more(prompt):
    densities = [baselines.density_of(AShape(64, local), prompt) for local in (1, 300, 900, prompt.length)]
    assert densities == sorted(densities) and densities[-1] == 1
    assert baselines.density_of(VerticalSlash(prompt.length, prompt.length), prompt) == pytest.approx(1)


def test_what_cannot_be_made_is_refused_in_words(prompt):
    with pytest.raises(ValueError, match="no baseline is named 'swan'; there are: a_shape, "):
        baselines.at_density("swan", 0.2, prompt)
    with pytest.raises(ValueError, match="density: expected a number between 0 and 1, got"):
        baselines.at_density("swin", 1.5, prompt)
    with pytest.raises(ValueError, match="published numbers is named 'wrong_phase'"):
        baselines.published("wrong_phase")
