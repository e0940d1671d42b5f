"""Makes the tables beside the result files of `results/` again from the single answers that they hold.

    python examples/needle_vlm/result_pages.py

Where a file has no dense answers of its own, those of another file to the same questions stand in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sglang_mminfer.tools import paired, verdicts
from sglang_mminfer.tools.compare import answers_in, table_of
from sglang_mminfer.tools.niah.against import compared, question_of
from sglang_mminfer.tools.niah.ask import Answer, Settings

RESULTS = Path(__file__).parent / "results"

DENSE_OF = {
    "a03_video_16384": "needles_video_16384",
    "baselines_video": "compare_video",
    "chunks_512_video": "compare_video",
    "chunks_2048_video": "compare_video",
    "chunks_512_mixed": "compare_mixed",
    "clip_video_8192": "chosen_video_8192",
    "default_chunks_512_video": "needles_video_4096",
    "default_chunks_2048_video": "needles_video_4096",
    "low_rank_mixed_8192": "needles_mixed_8192",
    "low_rank_video_4096": "needles_video_4096",
    "low_rank_video_8192": "chosen_video_8192",
    "others_mixed_16384": "needles_mixed_16384",
    "others_video_16384": "needles_video_16384",
    "own_basis_mixed_8192": "needles_mixed_8192",
    "own_basis_video_4096": "needles_video_4096",
    "own_basis_video_8192": "chosen_video_8192",
    "own_basis_video_16384": "needles_video_16384",
    "pooled_video_4096": "needles_video_4096",
    "pooled_video_8192": "chosen_video_8192",
    "text_2d_mixed_4096": "needles_mixed_4096",
    "text_2d_mixed_8192": "needles_mixed_8192",
    "text_2d_mixed_16384": "needles_mixed_16384",
    "text_chosen_mixed_4096": "needles_mixed_4096",
    "text_chosen_mixed_8192": "needles_mixed_8192",
    "text_chosen_mixed_16384": "needles_mixed_16384",
    "text_chosen_video_4096": "needles_video_4096",
    "text_chosen_video_8192": "chosen_video_8192",
    "text_chosen_video_16384": "needles_video_16384",
}
"""Result file -> the file with the dense answers to its questions, of the same model, its videos at the same times."""

OVER_ALL = {
    "default": {
        "needles_video_4096": "default",
        "clip_video_8192": "a01",
        "needles_video_16384": "default",
        "needles_mixed_4096": "default",
        "needles_mixed_8192": "default",
        "needles_mixed_16384": "default",
    },
    "text_chosen": {
        f"text_chosen_{model}_{length}": "text_chosen" for model in ("video", "mixed") for length in (4096, 8192, 16384)
    },
}
"""Config -> the result files that have it, over which it is compared with dense, and its name in them."""

KINDS = {"plain needles": ("v-niah", "mm-niah"), "relays": ("v-relay", "mm-relay")}


def main() -> None:
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if "configs" in result:
            path.with_suffix(".md").write_text(page_of(path.stem, result))
    for config in OVER_ALL:
        (RESULTS / f"{config}.md").write_text(page_over_all(config))


def page_over_all(config: str) -> str:
    """A config against dense over the questions of all result files that have it."""
    verdict = verdicts.markdown_section({config: over_all(config)}, "dense")
    return f"`{config}` over {', '.join(OVER_ALL[config])}.\n{verdict}"


def over_all(config: str) -> list[paired.Comparison]:
    """By kind of needle."""
    right: dict[str, dict[Any, float]] = {"dense": {}, config: {}}
    for name, called in OVER_ALL[config].items():
        for side, file, own in (("dense", DENSE_OF.get(name, name), "dense"), (config, name, called)):
            answers = answers_in(json.loads((RESULTS / f"{file}.json").read_text())["configs"])[own]
            right[side] |= {(name, *question_of(answer)): float(answer.right) for answer in answers}
    comparisons = []
    for kind, tasks in KINDS.items():
        dense, other = ({key: value for key, value in own.items() if key[1] in tasks} for own in right.values())
        videos = {key: key[:4] for key in dense}
        comparisons.append(paired.compare(kind, dense, other, videos))
    return paired.corrected(comparisons)


def page_of(name: str, result: dict[str, Any]) -> str:
    """The table of a result file, and its comparison with dense."""
    answers_of = answers_in(result["configs"])
    if name in DENSE_OF:
        other = json.loads((RESULTS / f"{DENSE_OF[name]}.json").read_text())
        answers_of = {"dense": same_questions(answers_in(other["configs"])["dense"], answers_of), **answers_of}
    settings = Settings(**{key: tuple(v) if isinstance(v, list) else v for key, v in result["settings"].items()})
    baseline, comparisons = compared(answers_of)
    return verdicts.markdown(table_of(result["configs"], settings)) + verdicts.markdown_section(comparisons, baseline)


def same_questions(dense: list[Answer], answers_of: dict[str, list[Answer]]) -> list[Answer]:
    """The dense answers to the questions of the others.

    Raises:
        ValueError: they are not the same questions, because another answer is expected.
    """
    expected = {question_of(answer): answer.expected for answers in answers_of.values() for answer in answers}
    kept = [answer for answer in dense if question_of(answer) in expected]
    if {question_of(answer): answer.expected for answer in kept} != expected:
        raise ValueError("the dense answers are to other questions")
    return kept


if __name__ == "__main__":
    main()
