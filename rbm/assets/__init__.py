"""What ships inside the package: the bundled corpus and the trained `nano` weights (see the cards beside them)."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def bundled_corpus() -> Path:
    """Folder of the bundled Meta-World corpus, read-only."""
    return _HERE / "metaworld_mini"


def nano_weights() -> Path:
    """Folder of the shipped `nano` reward model."""
    return _HERE / "nano"
