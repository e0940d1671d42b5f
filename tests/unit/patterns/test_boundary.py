"""What a boundary refuses."""

import pytest

from sglang_mminfer import AShape, Boundary2D, Dense, Modality, QBoundary

A = AShape(1, 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: QBoundary(None), "QBoundary.patterns: expected a dict, got None"),
        (lambda: QBoundary([A]), r"QBoundary.patterns: expected a dict, got \[AShape"),
        (lambda: QBoundary({"text": 3}), r"QBoundary.patterns\['text'\]: expected a pattern, got 3"),
        (
            lambda: QBoundary({"text": QBoundary({"text": A})}),
            r"QBoundary.patterns\['text'\]: expected a pattern, got Q",
        ),
        (lambda: QBoundary({"audio": A}), "a key of QBoundary.patterns: expected one of text, .*, got 'audio'"),
        (lambda: QBoundary({"vision": A, "image": A}), "QBoundary.patterns: vision and image or video name the same"),
        (lambda: Boundary2D(()), r"Boundary2D.patterns: expected a dict, got \(\)"),
        (lambda: Boundary2D({("text", "text"): "dense"}), "Boundary2D.patterns.*: expected a pattern, got 'dense'"),
        (
            lambda: Boundary2D({Modality.TEXT: A}),
            "a key of Boundary2D.patterns: expected .query modality, key modality",
        ),
        (lambda: Boundary2D({("text",): A}), "a key of Boundary2D.patterns: expected .query modality, key modality"),
        (lambda: Boundary2D({("text", "sound"): A}), "a key of Boundary2D.patterns: expected one of text, .*'sound'"),
        (
            lambda: Boundary2D({("vision", "text"): A, ("image", "text"): A}),
            "Boundary2D.patterns: .* the same pair",
        ),
    ],
)
def test_what_a_boundary_refuses(make, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        make()


def test_words_and_members_name_the_same_modality():
    assert QBoundary({"video": A}) == QBoundary({Modality.VIDEO: A})
    assert Boundary2D({("text", "vision"): Dense()}) == Boundary2D({(Modality.TEXT, Modality.VISION): Dense()})
